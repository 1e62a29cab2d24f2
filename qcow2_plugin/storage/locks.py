"""Byte locks on an open file: how we and QEMU keep out of each other's way.

Owns the lock protocol of QEMU and refuses to know what the file holds or who opened it.

**Who holds what.** A program states what it does to a file, and what it cannot bear others doing, by locking single
bytes of it: byte 100 + n says "I use permission n", byte 200 + n says "I forbid permission n to others".

    permission         in use    forbidden        the file is open for      its bytes
    consistent read       100          200        reading                   100; 201, 203
    write                 101          201        writing                   100, 101, 103; 201, 203
    resize                103          203        reading, force-share      100

A file may hold the image or be its data file; we make no difference. QEMU leaves 201 of a data file alone, so that
somebody may write it as a raw disk under a running guest, which is never right.

The bytes are names only. They need not exist, and data can be read and written under a lock.

**Take first, test second.** Every lock is a read lock, so taking one succeeds however many others hold the same byte.
Then each side asks whether anybody else holds a byte that contradicts its own: for each permission used the byte that
forbids it, for each one forbidden the byte that uses it. Both announce before they look, so of two programs that start
together at least one sees the other. Both may see each other, and both give up; never do both go on.

**Why OFD locks.** Their owner is the open file description. Classic POSIX locks belong to the process: two handles in
one process would not conflict, and closing any descriptor of the file, of a library that only looked at it, would
drop the lock of them all. So where a file system has no OFD locks there is no falling back: opening fails unless the
caller gives up protection by force-share, which only readers may. flock is no substitute either, since QEMU does not
look at it.

**Giving back.** Locks go when the last descriptor of the open file description is closed, also by a crash.

Source: measured on QEMU 7.2; fcntl(2), "Open file description locks".
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import struct

from qcow2_plugin.errors import ImageLockedError

_USED = 100
_FORBIDDEN = 200
_FLOCK = struct.Struct("hhqqi0q")  # struct flock: l_type, l_whence, l_start, l_len, l_pid
_CONFLICT = frozenset({errno.EAGAIN, errno.EACCES})
_NO_LOCKS = frozenset({errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})


class Permission(enum.Flag):
    """What a program may do to a file. Bit n stands for the lock bytes 100 + n and 200 + n."""

    CONSISTENT_READ = 1 << 0
    WRITE = 1 << 1
    RESIZE = 1 << 3


_CHANGES = Permission.WRITE | Permission.RESIZE


def lock_for_reading(fd: int, path: str, *, force_share: bool) -> None:
    """Announce that `fd` is read and, unless `force_share`, make sure that nobody changes the file meanwhile.

    With `force_share` writers are neither looked for nor kept out, so what is read may be torn; a file system
    without locks is accepted then, and only then. The locks go when `fd` is closed.

    Raises: ImageLockedError if others exclude us or, without `force_share`, the file system has no such locks.
    """
    if not force_share:
        lock(fd, path, use=Permission.CONSISTENT_READ, forbid=_CHANGES)
        return
    try:
        _take(fd, path, _bytes(_USED, Permission.CONSISTENT_READ)[0])
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def lock_for_writing(fd: int, path: str) -> None:
    """Announce that `fd` (open for reading too) is read and changed, and make sure that nobody else does either.

    Others may read the file by force-share only. The locks go when `fd` is closed.

    Raises: ImageLockedError if anybody else uses the file, or its file system has no such locks.
    """
    lock(fd, path, use=Permission.CONSISTENT_READ | _CHANGES, forbid=_CHANGES)


def lock(fd: int, path: str, *, use: Permission, forbid: Permission) -> None:
    """Take the bytes of all permissions in `use` and `forbid`, or none; `fd` must not hold any of them before.

    Raises: ImageLockedError, naming the byte and the permission that stand against it.
    """
    taken = []
    try:
        for byte in _bytes(_USED, use) + _bytes(_FORBIDDEN, forbid):
            _take(fd, path, byte)
            taken.append(byte)
        for byte in _bytes(_FORBIDDEN, use) + _bytes(_USED, forbid):
            _refuse_if_held(fd, path, byte, writing=Permission.WRITE in use)
    except (OSError, ImageLockedError) as error:
        for byte in taken:
            _fcntl(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, byte)
        if isinstance(error, OSError) and error.errno in _NO_LOCKS:
            raise _unprotected(error, path, writing=Permission.WRITE in use) from error
        raise


def _take(fd: int, path: str, byte: int) -> None:
    try:
        _fcntl(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
    except OSError as error:
        if error.errno not in _CONFLICT:
            raise
        raise ImageLockedError(
            f"another program has locked the file for itself (byte {byte}, {_permission(byte)}); stop it first",
            file=path,
        ) from error


def _refuse_if_held(fd: int, path: str, byte: int, *, writing: bool) -> None:
    if _fcntl(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte) == fcntl.F_UNLCK:
        return
    holds = "holds" if byte < _FORBIDDEN else "forbids"
    way_out = "" if writing else ", or, where that is an option, use force-share to read what may be changing"
    raise ImageLockedError(
        f"another program {holds} the permission to {_permission(byte)} the file (byte {byte} is locked); "
        f"stop it first{way_out}",
        file=path,
    )


def _unprotected(error: OSError, path: str, *, writing: bool) -> ImageLockedError:
    others, way_out = "writes to", "force-share reads it unprotected"
    if writing:
        others, way_out = "else uses", "write to it on a file system that has them"
    return ImageLockedError(
        f"cannot make sure that nobody {others} the file: its file system has no locks ({error.strerror}); {way_out}",
        file=path,
    )


def _fcntl(fd: int, command: int, lock_type: int, byte: int) -> int:
    """fcntl(2) about the lock on one byte; the type of lock in its answer."""
    answer = fcntl.fcntl(fd, command, _FLOCK.pack(lock_type, os.SEEK_SET, byte, 1, 0))
    return int(_FLOCK.unpack(answer)[0])


def _bytes(group: int, permissions: Permission) -> list[int]:
    return [group + permission.value.bit_length() - 1 for permission in permissions]


def _permission(byte: int) -> str:
    return "read" if byte % 100 == 0 else str(Permission(1 << byte % 100).name).lower()
