"""Having what is written to a file brought to the disk while more is being written, so that the barrier is short.

Owns sync_file_range(2), which starts that and waits for nothing. It makes nothing durable: only a barrier does.

Source: sync_file_range(2).
"""

from __future__ import annotations

import ctypes

from qcow2_plugin.storage.file import FileStorage

_START_WRITING = 2
_AT_ONCE = 8 << 20

_libc = ctypes.CDLL(None)
_sync_file_range = getattr(_libc, "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class EarlyWriting:
    """For one writer, of several that a file may have, which goes upward in it."""

    def __init__(self, storage: FileStorage) -> None:
        self._storage = storage
        self._start = self._end = 0
        self._length = 0

    def wrote(self, host_offset: int, length: int) -> None:
        """So many bytes were written there. A hint that never fails."""
        if not self._length:
            self._start = host_offset
        self._end = max(self._end, host_offset + length)
        self._length += length
        if self._length >= _AT_ONCE:
            self._length = 0
            if _sync_file_range is not None:
                _sync_file_range(self._storage.fileno(), self._start, self._end - self._start, _START_WRITING)
