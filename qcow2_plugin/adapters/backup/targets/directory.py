"""A directory as a target: every blob is an ordinary file under its name, members are qcow2 files for any tool."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

from qcow2_plugin.adapters.backup.target import BackupTarget, check_name, exactly, is_name
from qcow2_plugin.errors import printable
from qcow2_plugin.storage.blobs import move_blob, read_blob, write_blob, write_new_blob
from qcow2_plugin.storage.directory import absolute_path, make_names_durable


class DirectoryTarget(BackupTarget):
    """The files of the directory `path`, which is made for the first of them if there is none.

    A blob on its way has a name of its own with ".partial" at the end, so that `names` shows what a kill left of it.
    """

    directory: str

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.directory = absolute_path(path)
        self.uri = printable(self.directory)

    def put(self, name: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        """As the base class says."""
        path = self._path(name)
        self._make()
        self.remove(name)
        write_blob(path, exactly(chunks, size))

    def put_file(self, name: str, path: str) -> None:
        """As the base class says; a file in the same file system is moved, not copied."""
        try:
            move_blob(path, self._path(name))
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            super().put_file(name, path)

    def publish(self, name: str, content: bytes) -> None:
        """As the base class says."""
        path = self._path(name)
        self._make()
        write_new_blob(path, content)

    def names(self) -> list[str]:
        """As the base class says: those of regular files; none if there is no directory yet."""
        if not os.path.lexists(self.directory):
            return []
        with os.scandir(self.directory) as entries:
            return sorted(
                entry.name for entry in entries if is_name(entry.name) and entry.is_file(follow_symlinks=False)
            )

    def get(self, name: str) -> Iterator[bytes]:
        """As the base class says."""
        return read_blob(self._path(name))

    def remove(self, name: str) -> None:
        """As the base class says."""
        try:
            os.unlink(self._path(name))
        except FileNotFoundError:
            return
        make_names_durable(self.directory)

    def _make(self) -> None:
        if os.path.isdir(self.directory):
            return
        with suppress(FileExistsError):  # somebody else was faster
            os.mkdir(self.directory)
        make_names_durable(os.path.dirname(self.directory))

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, check_name(name))
