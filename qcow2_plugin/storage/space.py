"""Disk space of an open file: giving it back, and zeros that cost none.

Owns fallocate(2) beyond what `os` offers of it. Which of its modes a file system knows differs from one to the next,
for block devices also with the alignment, so every function answers whether it was done and leaves it to the caller
what to do instead.

Source: fallocate(2).
"""

from __future__ import annotations

import ctypes
import errno
import os

_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10
_CANNOT = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate64", _libc.fallocate)
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch_hole(fd: int, host_offset: int, length: int) -> bool:
    """Give back the space of a range, which then reads as zeros. False if the system cannot. Raises OSError."""
    return _change(fd, _PUNCH_HOLE | _KEEP_SIZE, host_offset, length)


def zero_range(fd: int, host_offset: int, length: int) -> bool:
    """Make a range read as zeros and keep its space. False if the system cannot. Raises OSError."""
    return _change(fd, _ZERO_RANGE | _KEEP_SIZE, host_offset, length)


def _change(fd: int, mode: int, host_offset: int, length: int) -> bool:
    while _fallocate(fd, mode, host_offset, length):
        number = ctypes.get_errno()
        if number in _CANNOT:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True
