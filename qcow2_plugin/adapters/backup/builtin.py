"""What happens without other plugins, as plugins: each can be blocked, and is asked after all others."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.backup.hook_values import BaseChoice, Decision, JournalEntry, Location, Verdict
from qcow2_plugin.adapters.backup.hookspecs import API_LEVEL, hookimpl
from qcow2_plugin.adapters.backup.model import Job
from qcow2_plugin.adapters.backup.secrets import Secret
from qcow2_plugin.errors import OptionError
from qcow2_plugin.storage.opener import broken_rule, open_given

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.target import BackupTarget
    from qcow2_plugin.engine.files import Reference
    from qcow2_plugin.storage.file import FileStorage

_SECRET_LIMIT = 64 << 10


class References:
    """Allows what the policy of the job allows; has no opinion on what a plugin located."""

    QCOW2_PLUGIN_API = API_LEVEL

    @hookimpl
    def qcow2_authorize_reference(self, reference: Reference, location: Location) -> Decision | None:
        """See `hookspecs`."""
        if location.plugin is not None:
            return None
        rule = broken_rule(reference.name, reference.policy)
        return Decision(True) if rule is None else Decision(False, rule)


class Files:
    """Storage in files and block devices: by a path, or `file:PATH`."""

    QCOW2_PLUGIN_API = API_LEVEL

    @hookimpl
    def qcow2_open_storage(self, location: str, writable: bool) -> FileStorage | None:
        """See `hookspecs`."""
        path = _path(location)
        return None if path is None else open_given(path, writable=writable)


class Targets:
    """The kinds of target that this package brings."""

    QCOW2_PLUGIN_API = API_LEVEL

    @hookimpl
    def qcow2_open_target(
        self, uri: str, options: dict[str, str], secret: Callable[[str, str], Secret]
    ) -> BackupTarget | None:
        """See `hookspecs`."""
        from qcow2_plugin.adapters.backup.targets import open_target

        return open_target(uri, options, secret)


class SecretFiles:
    """Secrets that are the content of a file, `file:PATH`, less the line end that an editor leaves."""

    QCOW2_PLUGIN_API = API_LEVEL

    @hookimpl
    def qcow2_resolve_secret(self, secret_id: str) -> Secret | None:
        """See `hookspecs`."""
        if not secret_id.startswith("file:"):
            return None
        path = secret_id.removeprefix("file:")
        file = open_given(path)
        try:
            content = file.pread(_SECRET_LIMIT + 1, 0)
        finally:
            file.close()
        if len(content) > _SECRET_LIMIT:
            raise OptionError("the file is too long for a secret", file=path)
        content = content.removesuffix(b"\n").removesuffix(b"\r")
        if not content:
            raise OptionError("the file is empty, and is to hold a secret", file=path)
        return Secret(content)


class Chains:
    """Every disk builds on the newest point that it can build on, and the catalogue says what became of a job."""

    QCOW2_PLUGIN_API = API_LEVEL

    @hookimpl
    def qcow2_select_base(self, job: Job, candidates: tuple[str, ...]) -> BaseChoice | None:
        """See `hookspecs`."""
        return BaseChoice(point=candidates[0]) if candidates else None

    @hookimpl
    def qcow2_backup_recover(self, entry: JournalEntry) -> Verdict | None:
        """See `hookspecs`."""
        if entry.is_published is None:
            return None
        return "commit" if entry.is_published else "abort"


PLUGINS: dict[str, object] = {
    "builtin-references": References(),
    "builtin-files": Files(),
    "builtin-targets": Targets(),
    "builtin-secrets": SecretFiles(),
    "builtin-chains": Chains(),
}
"""By their names."""


def _path(location: str) -> str | None:
    """The path that a location is, None if it is a URI of something else."""
    if location.startswith("file:"):
        return location.removeprefix("file:").removeprefix("//")
    head = location.partition(os.sep)[0]
    return None if ":" in head else location
