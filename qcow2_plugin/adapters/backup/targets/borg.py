"""A Borg repository (1.2 or newer) as a target: every blob is an archive with one file.

The archives are called "qcow2.NAME", so that others may be in the repository. Borg never makes a second archive of a
name, which is what `publish` needs. It reads through a small command of its own (`--content-from-command`) that fails
unless everything came, so that no death on this side leaves an archive with a part. Chunks are cut every 64 KiB, where
clusters of members lie: what did not change is stored once, full members too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qcow2_plugin.adapters.backup.secrets import Secret
from qcow2_plugin.adapters.backup.target import BackupTarget, check_name, exactly, missing_blob, taken_name
from qcow2_plugin.adapters.backup.targets.program import Program, without_password
from qcow2_plugin.errors import TargetError, printable

_PREFIX = "qcow2."
_FILE = "content"
_WHOLE = b"whole"
_COPY_IF_WHOLE = 'head -c "$1" && [ "$(head -c 9)" = whole ]'
_CREATE = ("create", "--content-from-command", "--stdin-name", _FILE, "--chunker-params", "fixed,65536")


class BorgTarget(BackupTarget):
    """The archives of the repository at `location`, a path or ssh://..., made by `borg init` before.

    Without a passphrase Borg finds it by its own means (BORG_PASSPHRASE, BORG_PASSCOMMAND), if it needs one.
    """

    def __init__(self, location: str, passphrase: Secret | None = None) -> None:
        self.uri = f"borg:{printable(without_password(location))}"
        self._location = location
        words = ["borg", "--lock-wait", "30"]
        keyed = (
            ["env", "-u", "BORG_PASSPHRASE", "-u", "BORG_PASSCOMMAND", "BORG_PASSPHRASE_FD={fd}"] if passphrase else []
        )
        self._borg = Program("borg", [*keyed, *words], passphrase)

    def put(self, name: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        """As the base class says."""
        self.remove(name)
        self._create(name, exactly(chunks, size), size)

    def publish(self, name: str, content: bytes) -> None:
        """As the base class says."""
        try:
            self._create(name, [content], len(content))
        except TargetError as error:
            if "already exists" in error.detail:
                raise taken_name(name, self.uri) from error
            raise

    def names(self) -> list[str]:
        """As the base class says."""
        listed = self._borg.list("list", "--short", "--glob-archives", f"{_PREFIX}*", "--", self._location)
        return sorted(line.removeprefix(_PREFIX) for line in listed.decode().splitlines())

    def get(self, name: str) -> Iterator[bytes]:
        """As the base class says."""
        try:
            yield from self._borg.stream("extract", "--stdout", "--", self._archive(name), _FILE)
        except TargetError as error:
            if "does not exist" in error.detail:
                raise missing_blob(name, self.uri) from error
            raise

    def remove(self, name: str) -> None:
        """As the base class says. Space is given back by `borg compact`."""
        check_name(name)
        if name in self.names():
            self._borg.change("delete", "--", self._archive(name))

    def _create(self, name: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        command = ("sh", "-c", _COPY_IF_WHOLE, "sh", str(size))
        try:
            self._borg.feed(*_CREATE, "--", self._archive(name), *command, chunks=chunks, ending=_WHOLE)
        except TargetError as error:
            if "exit status 1" in error.detail:  # a warning, with which there is an archive
                self.remove(name)
            raise

    def _archive(self, name: str) -> str:
        return f"{self._location}::{_PREFIX}{check_name(name)}"
