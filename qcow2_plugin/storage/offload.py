"""Bytes that the system moves from one file to another by itself: shared blocks, or a copy inside the kernel.

Owns FICLONERANGE and copy_file_range(2), and the memory of what does not work between two files: file systems differ,
and a way that failed once for what it is fails every time. Every way may do less than it was asked for, or nothing, and
answers how much; whoever asked moves the rest through memory.

Source: ioctl_ficlonerange(2), copy_file_range(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from qcow2_plugin.storage.file import FileStorage

_FICLONERANGE = 0x4020940D
_FILE_CLONE_RANGE = struct.Struct("=qQQQ")  # struct file_clone_range: fd, source offset, length, target offset
_CANNOT = frozenset(
    {
        errno.EOPNOTSUPP,
        errno.EXDEV,
        errno.EINVAL,
        errno.ENOSYS,
        errno.ENOTTY,
        errno.EPERM,
        errno.EACCES,
        errno.ETXTBSY,
        errno.EBADF,
        errno.EISDIR,
        errno.EOVERFLOW,
    }
)
_AT_ONCE = 1 << 30
"""Bytes of one copy_file_range; it is done before a signal gets through."""


class Offload:
    """The ways from `source` to `target`, which are open as long as this is used. Any thread may use them.

    `shares` says whether blocks can be shared: None until it was tried.
    """

    def __init__(self, source: FileStorage, target: FileStorage, *, may_share: bool, may_copy: bool) -> None:
        self._source = source
        self._target = target
        self._block_size = max(os.fstatvfs(target.fileno()).f_frsize, 512)
        self.shares: bool | None = None if may_share else False
        self._copies = may_copy

    def share(self, source_offset: int, target_offset: int, length: int) -> tuple[int, int]:
        """Let the files share the whole blocks of a range; (start, length) of what is shared, from its begin, in bytes.

        Raises OSError (ENOSPC, EIO, ...) for what is not a lack of means.
        """
        head = -source_offset % self._block_size
        shared = (length - head) // self._block_size * self._block_size
        if self.shares is False or shared <= 0 or (source_offset - target_offset) % self._block_size:
            return 0, 0
        argument = _FILE_CLONE_RANGE.pack(self._source.fileno(), source_offset + head, shared, target_offset + head)
        try:
            fcntl.ioctl(self._target.fileno(), _FICLONERANGE, argument)
        except OSError as error:
            if error.errno not in _CANNOT:
                error.filename = self._target.path
                raise
            self.shares = False
            return 0, 0
        self.shares = True
        return head, shared

    def copy(self, source_offset: int, target_offset: int, length: int) -> int:
        """Copy the first bytes of a range inside the kernel; how many. Raises OSError as `share` does."""
        done = 0
        while self._copies and done < length:
            try:
                count = os.copy_file_range(
                    self._source.fileno(),
                    self._target.fileno(),
                    min(length - done, _AT_ONCE),
                    source_offset + done,
                    target_offset + done,
                )
            except OSError as error:
                if error.errno not in _CANNOT:
                    error.filename = self._target.path
                    raise
                self._copies = False
                break
            if not count:  # the source ends here, or a file system has nothing to say
                break
            done += count
        return done
