"""What a verb does to files, call by call, and what is left when it is killed or a call fails.

It owns the list of calls that change or read a file, or change a directory. It refuses to know which verb makes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qcow2_plugin.storage.file import FileStorage

CHANGES = ("write_from", "write_vector", "write_zeroes", "truncate", "preallocate", "punch")
READS = ("pread", "read_into", "size")
NAMES = ("link", "unlink", "rename")


class FileCall(NamedTuple):
    """A call and the file that it is about; the directory, for "fsync"."""

    name: str
    file: str


class FileCalls:
    """Every call of this process while a test runs. At the `fail_at`-th, counted from 0, it is `error` instead."""

    def __init__(self, patch: pytest.MonkeyPatch, *, with_reads: bool = False) -> None:
        self.calls: list[FileCall] = []
        self.fail_at: int | None = None
        self.error: BaseException = OSError()
        self.before: Callable[[], None] = lambda: None
        """Called before every call: whoever is killed then leaves the files as they are now."""
        for name in (*CHANGES, "barrier", *(READS if with_reads else ())):
            self._watch_storage(patch, name)
        for name in NAMES:
            self._watch_system(patch, name)
        self._watch_fsync(patch)

    def arm(self, fail_at: int | None, error: BaseException) -> None:
        self.calls, self.fail_at, self.error = [], fail_at, error

    @property
    def has_failed(self) -> bool:
        return self.fail_at is not None and len(self.calls) > self.fail_at

    def _note(self, name: str, file: str) -> None:
        self.before()
        self.calls.append(FileCall(name, file))
        if len(self.calls) - 1 == self.fail_at:
            raise self.error

    def _watch_storage(self, patch: pytest.MonkeyPatch, name: str) -> None:
        original = getattr(FileStorage, name)

        def watched(storage: FileStorage, *arguments: Any, **more: Any) -> Any:
            self._note(name, os.readlink(f"/proc/self/fd/{storage._fd}"))
            return original(storage, *arguments, **more)

        patch.setattr(FileStorage, name, watched)

    def _watch_system(self, patch: pytest.MonkeyPatch, name: str) -> None:
        original = getattr(os, name)

        def watched(path: Any, *arguments: Any, **more: Any) -> Any:
            self._note(name, os.path.abspath(os.fsdecode(path)))
            return original(path, *arguments, **more)

        patch.setattr(os, name, watched)

    def _watch_fsync(self, patch: pytest.MonkeyPatch) -> None:
        original = os.fsync

        def watched(fd: int) -> None:
            self._note("fsync", os.readlink(f"/proc/self/fd/{fd}"))
            original(fd)

        patch.setattr(os, "fsync", watched)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a directory."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
