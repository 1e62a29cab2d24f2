"""The files that a new image is made of: taken under their locks, emptied when all of them are, or left as they were.

Owns what happens to them before they hold anything, and after a failure. Refuses to know what is written to them.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack, suppress

from qcow2_plugin.errors import OptionError
from qcow2_plugin.format.geometry import SECTOR_SIZE
from qcow2_plugin.storage.directory import give_name, identity_of, make_names_durable, remove, temporary_name
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.opener import Identity, create_given, open_given

_ZEROS = bytes(1 << 20)
_ZEROS_AT_ONCE = 64

Path = str | os.PathLike[str]


class NewFile:
    """A file that is locked and about to be written to. Sizes and offsets in bytes. Methods raise OSError."""

    def __init__(self, storage: FileStorage, path: Path, *, is_new: bool, is_kept: bool) -> None:
        """`is_new`: it was not there before. `is_kept`: what is in it stays."""
        self.storage = storage
        self.path = os.fspath(path)
        self.is_new = is_new
        self._is_kept = is_kept
        self._is_device = not is_new and stat.S_ISBLK(os.stat(path).st_mode)
        self._size = 0 if is_new else storage.size()
        self._is_changed = False

    def require_room(self, size: int) -> None:
        """Raises OptionError if it is a block device of less than `size` bytes."""
        if self._is_device and self._size < size:
            raise OptionError(f"the block device has {self._size} bytes, and {size} are needed", file=self.path)

    def clear(self, size: int) -> None:
        """Forget what was there: it has `size` bytes, or is a larger device, and all that many are zeros.

        Whatever image it was, durably it is none before this returns.
        """
        self._is_changed = True
        if self._is_device:
            self.storage.write_zeroes(0, SECTOR_SIZE, may_punch=False)
        else:
            self.storage.truncate(0)
        if not self.is_new:
            self.storage.barrier()
        if self._is_device:
            self.storage.write_zeroes(0, size, may_punch=False)
        else:
            self.storage.truncate(size)

    def extend(self, size: int) -> None:
        """Make it `size` bytes long, if it is shorter, with zeros at its end."""
        if not self._is_device and self.storage.size() < size:
            self._is_changed = True
            self.storage.truncate(size)

    def reserve(self, preallocation: str, offset: int, end: int) -> None:
        """Get disk space for a range of zeros, as `preallocation` says. A device has it."""
        if self._is_device:
            return
        if preallocation == "falloc":
            self.storage.preallocate(offset, end - offset)
        elif preallocation == "full":
            step = _ZEROS_AT_ONCE * len(_ZEROS)
            for start in range(offset, end, step):
                whole, rest = divmod(min(step, end - start), len(_ZEROS))
                self.storage.write_vector([_ZEROS] * whole + [_ZEROS[:rest]], start)

    def give_name(self, path: Path) -> None:
        """Let it have the name `path`, durably, which nothing has so far. Raises FileExistsError, too."""
        give_name(self.path, path)
        self.path = os.fspath(path)
        make_names_durable(os.path.dirname(self.path))

    def undo(self) -> None:
        """Leave nothing of what was made."""
        if self.is_new:
            remove(self.path, self.storage.identity)
        elif not self._is_changed:
            return
        elif self._is_device:
            self.storage.write_zeroes(0, SECTOR_SIZE, may_punch=False)
        else:
            self.storage.truncate(self._size if self._is_kept else 0)


class NewFiles:
    """All files of one image, each with the part that it plays: no file has two of them, whatever its names.

    A context manager that leaves nothing of what was made if its block fails, and closes the files in any case.
    """

    def __init__(self) -> None:
        self.resources = ExitStack()
        """What is closed with the files."""
        self._roles: dict[Identity, str] = {}
        self._files: list[NewFile] = []

    def __enter__(self) -> NewFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self.resources:
            if kind is not None:
                self._undo()

    def assign(self, identity: Identity | None, role: str) -> None:
        """This file, if there is one, has a part already."""
        if identity is not None:
            self._roles[identity] = role

    def refuse(self, identity: Identity | None, role: str, path: str) -> None:
        """Raises OptionError if the file that is to play `role` has another part."""
        earlier = None if identity is None else self._roles.get(identity)
        if earlier not in (None, role):
            raise OptionError(f"the {role} is the same file as the {earlier}; name another", file=path)

    def open(self, path: Path, role: str, *, is_kept: bool = False) -> NewFile:
        """The file of this name, which exists. Raises what `open_given` does; OptionError if it has another part."""
        storage = open_given(path, writable=True, vet=lambda identity, found: self.refuse(identity, role, found))
        return self._keep(storage, path, role, is_new=False, is_kept=is_kept)

    def make(self, path: Path, role: str, *, mode: int = 0o666) -> NewFile:
        """A file that does not exist yet. Raises what `create_given` does, FileExistsError among it."""
        return self._keep(create_given(path, mode=mode), path, role, is_new=True, is_kept=False)

    def make_for(self, path: Path, role: str, *, mode: int = 0o666) -> NewFile:
        """A file of a temporary name, which is to have the name `path` (`give_name`) and is called that in messages.

        Raises as `make` does.
        """
        temporary = temporary_name(path)
        try:
            made = self.make(temporary, role, mode=mode)
        except FileExistsError:
            raise
        except BaseException as error:
            with suppress(OSError):
                os.unlink(temporary)  # no lock on it, or interrupted before anybody knew of it
            if isinstance(error, OSError):
                error.filename = os.fspath(path)
            raise
        made.storage.path = os.fspath(path)
        return made

    def make_or_open(self, path: Path, role: str) -> NewFile:
        """The file of this name, new if there is none. Raises as `open` does."""
        try:
            return self.make(path, role)
        except FileExistsError:
            return self.open(path, role)

    def _keep(self, storage: FileStorage, path: Path, role: str, *, is_new: bool, is_kept: bool) -> NewFile:
        self.resources.callback(storage.close)
        file = NewFile(storage, path, is_new=is_new, is_kept=is_kept)
        self._files.append(file)
        self._roles[storage.identity] = role
        return file

    def _undo(self) -> None:
        for file in reversed(self._files):
            with suppress(OSError):  # the error that led here says more
                file.undo()

    def make_names_durable(self) -> None:
        """Return when the names of the new files are durable. Raises OSError."""
        for directory in {os.path.dirname(file.path) for file in self._files if file.is_new}:
            make_names_durable(directory)


def identity_if_any(path: Path) -> Identity | None:
    """The file of this name, as far as it can be looked up."""
    with suppress(OSError):
        return identity_of(path)
    return None
