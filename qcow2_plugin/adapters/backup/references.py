"""Files that images name, opened as the hooks say: what an image is opened with (option `references`).

A name is first located. If no plugin knows where it is, the engine looks it up as its policy has it, and asks for leave
right before the file, whose inode it holds by then, is opened. What a plugin located is opened by a storage plugin, if
somebody allows it: the policy has no say in that, and no plugin that allows it means that it is not allowed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.backup.hook_values import Location
from qcow2_plugin.errors import ReferenceDeniedError
from qcow2_plugin.storage.directory import identity_of

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.manager import Hooks
    from qcow2_plugin.engine.files import Reference
    from qcow2_plugin.storage import Storage
    from qcow2_plugin.storage.opener import Identity, Vet


class HookedReferences:
    """`engine.files.References` by the plugins of `hooks`."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks

    def open(self, reference: Reference, vet: Vet) -> Storage | None:
        """See `References.open`. Raises PluginError and ReferenceDeniedError, too."""
        location = self._hooks.locate(reference)
        if location is None:
            return None
        self._hooks.authorize(reference, location)
        storage = self._hooks.open_storage(location.uri, writable=reference.writable)
        try:
            vet(storage.identity, storage.path)
        except BaseException:
            storage.close()
            raise
        return storage

    def authorize(self, reference: Reference, identity: Identity, path: str) -> None:
        """See `References.authorize`. Plugins are told where the file is, not by which links the name leads there."""
        resolved = os.path.realpath(path)
        if identity_of(resolved) != identity:
            raise ReferenceDeniedError(
                f"the {reference.role} is not opened: its name leads to another file than a moment before", file=path
            )
        self._hooks.authorize(reference, Location(uri=resolved, plugin=None))
