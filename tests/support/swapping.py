"""A thread that keeps swapping two names of a directory while a test looks one of them up.

Each swap is one atomic system call, so that both names exist at every moment.
"""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)


class Swapping:
    """Runs while the block runs; `count` says how often the names were swapped."""

    def __init__(self, one: Path, other: Path) -> None:
        self._one, self._other = os.fsencode(one), os.fsencode(other)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._failure: OSError | None = None
        self.count = 0

    def __enter__(self) -> Swapping:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while not self._stop.is_set():
            if _libc.renameat2(_AT_FDCWD, self._one, _AT_FDCWD, self._other, _RENAME_EXCHANGE):
                self._failure = OSError(ctypes.get_errno(), "renameat2")
                return
            self.count += 1
