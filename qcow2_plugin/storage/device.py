"""Block devices as targets: whether a file is one, what else it is, and that nobody else in the system uses it.

Owns the claim that mounts, LVM and RAID make on a device (O_EXCL without O_CREAT), which byte locks know nothing of,
and the numbers of a device, of which several files may be the name.

Source: open(2), O_EXCL; loop(4), LOOP_GET_STATUS64.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from qcow2_plugin.errors import ImageLockedError
from qcow2_plugin.storage.file import FileStorage

_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO = struct.Struct("=QQ216x")  # struct loop_info64: device and inode number of the file behind it, the rest


def is_device(path: str | os.PathLike[str]) -> bool:
    """True if `path` leads to a block device, False if to something else or nothing. Raises OSError."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def leads_to(device: FileStorage, file: FileStorage) -> bool:
    """True if what is written to `device` changes `file`: it is the same device under another name, or is made of it by
    the loop driver. Mappings and partitions are not seen through. Raises OSError."""
    number = os.fstat(device.fileno()).st_rdev
    other = os.fstat(file.fileno())
    if stat.S_ISBLK(other.st_mode):
        return number == other.st_rdev
    try:
        told = fcntl.ioctl(device.fileno(), _LOOP_GET_STATUS64, bytes(_LOOP_INFO.size))
    except OSError:  # no loop device
        return False
    return _LOOP_INFO.unpack(told) == file.identity


@contextmanager
def claimed(device: FileStorage) -> Iterator[FileStorage]:
    """The open device, ours until the block ends, opened anew: while it is claimed, no other way to give its space back
    works. Raises ImageLockedError if it is in use; OSError."""
    try:
        fd = os.open(f"/proc/self/fd/{device.fileno()}", os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ImageLockedError(
                "the device is in use (mounted, or part of a volume group or an array); free it first", file=device.path
            ) from error
        error.filename = device.path
        raise
    ours = FileStorage(fd, device.path)
    try:
        yield ours
    finally:
        ours.close()
