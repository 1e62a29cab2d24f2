"""Block devices as targets: whether a file is one, and that nobody else in the system uses it.

Owns the claim that mounts, LVM and RAID make on a device (O_EXCL without O_CREAT), which byte locks know nothing of.

Source: open(2), O_EXCL.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from qcow2_plugin.errors import ImageLockedError
from qcow2_plugin.storage.file import FileStorage


def is_device(path: str | os.PathLike[str]) -> bool:
    """True if `path` leads to a block device, False if to something else or nothing. Raises OSError."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


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
