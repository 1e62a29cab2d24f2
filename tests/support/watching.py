"""Witnesses of what is opened: the descriptors of this process, Python's audit events, and the kernel's own report.

`Opens` asks inotify, so it sees an open by whatever means and for however short a time. It does not see an O_PATH
look-up, which is no open: `audited_opens` does, as far as it went through Python.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_IN_OPEN = 0x20
_EVENT = struct.Struct("iIII")  # struct inotify_event: watch, mask, cookie, length of the name that follows
_libc = ctypes.CDLL(None, use_errno=True)
_listeners: list[list[str]] = []


def open_descriptors() -> dict[int, str]:
    """Each open descriptor of this process and what it refers to."""
    found = {}
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return found


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Fails if the block leaves another set of open descriptors than it found."""
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@contextmanager
def audited_opens() -> Iterator[list[str]]:
    """The names that Python opens, or looks up, while the block runs."""
    names: list[str] = []
    _listeners.append(names)
    try:
        yield names
    finally:
        _listeners.remove(names)


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _listeners:
        name = arguments[0]
        for names in _listeners:
            names.append(os.fsdecode(name) if isinstance(name, str | bytes) else repr(name))


sys.addaudithook(_hear)  # stays for good: Python has no way to take it back


class Opens:
    """Tells whether a file is opened, by anybody and by whatever means, while the block runs."""

    def __init__(self, path: str | Path) -> None:
        self._path = os.fsencode(path)

    def __enter__(self) -> Opens:
        self._watch = _libc.inotify_add_watch(_inotify, self._path, _IN_OPEN)
        if self._watch < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch", self._path)
        return self

    def __exit__(self, *_: object) -> None:
        _libc.inotify_rm_watch(_inotify, self._watch)

    def seen(self) -> bool:
        """True if the file was opened since the last call."""
        _collect_opens()
        opened = self._watch in _opened
        _opened.discard(self._watch)
        return opened


_inotify = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)  # one for all: closing it takes the kernel 20 ms
_opened: set[int] = set()  # watches


def _collect_opens() -> None:
    with suppress(BlockingIOError):
        while events := os.read(_inotify, 65536):
            place = 0
            while place < len(events):
                watch, mask, _, name_length = _EVENT.unpack_from(events, place)
                place += _EVENT.size + name_length
                if mask & _IN_OPEN:
                    _opened.add(watch)
