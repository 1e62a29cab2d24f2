"""Which file may be opened, and by which name.

Owns the only places of the package where a name becomes an open file:

* `open_given` opens what the caller names: whoever starts the program may read what the system lets them read.
* `create_given` makes a file where the caller says.
* `open_reference` opens what an *image* names as its backing or data file. The header of an image is a list of file
  names that a stranger may have chosen, and following such a name discloses that file to whoever reads the disk.
  What may be followed is the `Policy`; there is no other way in.

Refuses to know what is in the files, and never guesses: names are file names, never URLs or json.

**How a file is opened.** A look-up by name only pins the inode (O_PATH), which neither reads it nor runs a driver: no
waiting for the other end of a FIFO, no tape rewound. Its type is checked there, and then this very inode is opened
through /proc/self/fd. So there is no moment between check and use in which the name could change hands.

**For writing** nothing is different but the flag of this second open, and the locks: no way of opening changes a file
that others use, not even by emptying it.

**How a confined name is looked up.** The name is taken apart here first: only plain components remain. Then openat2
resolves it below the directory and refuses every symlink on the way, the last one included; where the kernel has no
openat2 (before 5.6, or a sandbox that does not know it) the components are pinned one after the other, each in the
directory pinned before it. Swapping directories or links meanwhile can make the look-up fail, never leave the
directory. The directory itself is the operator's choice and may well be reached through links.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qcow2_plugin.errors import MissingReferenceError, NotQcow2Error, ReferenceDeniedError, printable
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.locks import lock_for_reading, lock_for_writing

_NAME_LIMIT = 1023  # bytes; the longest backing file name that the format allows
_NO_SUCH_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})
_PIN = os.O_PATH | os.O_CLOEXEC

_SYS_OPENAT2 = 437
_OPEN_HOW = struct.Struct("QQQ")  # struct open_how: flags, mode, resolve
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_RESOLVE = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS
_ATTEMPTS = 32
_syscall = ctypes.CDLL(None, use_errno=True).syscall

Identity = tuple[int, int]
"""Device and inode number, as in `Storage.identity`."""
Vet = Callable[[Identity, str], None]
"""Asked with the identity and the path of a file before it is opened; raises what speaks against it."""

_REGULAR = frozenset({stat.S_IFREG})
_REGULAR_OR_BLOCK = frozenset({stat.S_IFREG, stat.S_IFBLK})
_OTHER_WAYS = {"transaction record": "'qcow2 bitmap recover'"}
"""How the user names a file of such a role, where there is no option for it."""
_FILE_TYPES = {
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


class Policy(enum.Enum):
    """Which of the files that an image names may be opened."""

    INSPECT = "inspect"
    """None: names are reported, never followed."""
    CONFINED = "confined"
    """Regular files below the image's directory, by a plain relative name and through no symlink."""
    TRUSTED = "trusted"
    """Wherever the name leads: absolute, through `..` or symlinks, to block devices. For images of one's own making."""


def open_given(
    path: str | os.PathLike[str], *, writable: bool = False, force_share: bool = False, vet: Vet | None = None
) -> FileStorage:
    """Open a file that the caller names, and lock it for reading or, if `writable`, for reading and writing.

    `force_share` has no say in the latter.

    Raises: OSError (FileNotFoundError, ...) with the path; NotQcow2Error if it is neither a regular file nor a block
    device; ImageLockedError; what `vet` raises.
    """
    given = os.fspath(path)
    with _pinned_file(given) as pinned:
        return _open_pinned(pinned, given, vet, writable=writable, force_share=force_share)


def create_given(path: str | os.PathLike[str], *, mode: int = 0o666) -> FileStorage:
    """Make an empty file that the caller names, open for reading and writing and locked for that.

    Its permissions are `mode`, less what the umask takes away. Where something of that name is already, if only a
    dangling symlink, nothing happens. The name is durable when the directory is.

    Raises: FileExistsError and other OSError with the path; ImageLockedError if somebody was quicker to lock the new
    file, or its file system has no locks (it stays then, and is empty).
    """
    given = os.fspath(path)
    fd = os.open(given, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    return _locked(fd, given, writable=True)


def open_reference(
    name: bytes,
    role: str,
    *,
    policy: Policy,
    directory: str,
    referrer: str,
    below: bytes = b"",
    writable: bool = False,
    force_share: bool = False,
    vet: Vet | None = None,
) -> FileStorage:
    """Open the file that the image `referrer` names as its `role` ("backing file", "data file"); lock it for reading
    or, if `writable`, for reading and writing.

    A relative name starts at `below`, the referrer's own directory as a path relative to `directory` ("" is the
    working directory); it is confined to `directory` as a whole.

    Raises: ReferenceDeniedError if `policy` forbids it, and then no file was opened; MissingReferenceError if there is
    no such file; ImageLockedError; other OSError with the path; what `vet` raises.
    """
    rule = broken_rule(name, policy)
    if rule is not None:
        raise _denied(name, role, referrer, rule, trusted_helps=broken_rule(name, Policy.TRUSTED) is None)
    looked_up = os.path.join(below, name)
    path = os.path.join(directory, os.fsdecode(looked_up))
    with _closing(os.open(directory or os.curdir, _PIN | os.O_DIRECTORY)) as start:
        try:
            if policy is Policy.TRUSTED:
                pinned = os.open(looked_up, _PIN, dir_fd=start)
            else:
                pinned = _pin_beneath(start, looked_up)
        except OSError as error:
            if error.errno in _NO_SUCH_FILE:
                raise _missing(name, role, referrer, path) from error
            if error.errno == errno.ELOOP and policy is Policy.CONFINED:
                raise _denied(name, role, referrer, "it leads through a symlink", trusted_helps=True) from error
            error.filename = path
            raise
    with _closing(pinned):
        kind = _kind_unless(_REGULAR_OR_BLOCK if policy is Policy.TRUSTED else _REGULAR, pinned)
        if kind is not None:
            raise _denied(name, role, referrer, f"it is {kind}", trusted_helps=kind == _FILE_TYPES[stat.S_IFBLK])
        return _open_pinned(pinned, path, vet, writable=writable, force_share=force_share)


def broken_rule(name: bytes, policy: Policy) -> str | None:
    """Why `policy` forbids to even look up `name`, None if it does not. Looks at the name alone."""
    if policy is Policy.INSPECT:
        return "policy inspect opens nothing that an image names"
    if not name:
        return "it is empty"
    if b"\0" in name:
        return "it holds a NUL byte"
    if b":" in name.partition(b"/")[0]:
        return "it has a driver or URL prefix, and names are plain file names here"
    if policy is Policy.TRUSTED:
        return None
    if len(name) > _NAME_LIMIT:
        return f"it is longer than {_NAME_LIMIT} bytes"
    if name.startswith(b"/"):
        return "it is absolute"
    if not {b"", b".", b".."}.isdisjoint(name.split(b"/")):
        return 'it has an empty, "." or ".." component'
    return None


def _pin_beneath(start: int, name: bytes) -> int:
    """An O_PATH descriptor of `name` below the directory `start`; OSError with ELOOP if a symlink is on the way."""
    for _ in range(_ATTEMPTS):
        try:
            return _openat2(start, name)
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EPERM):
                return _walk(start, name)
            if error.errno not in (errno.EAGAIN, errno.EINTR):  # EAGAIN: somebody renames at this very moment
                raise
    raise OSError(errno.EAGAIN, "directories on the way keep changing")


def _openat2(start: int, name: bytes) -> int:
    how = _OPEN_HOW.pack(_PIN, 0, _RESOLVE)
    sys.audit("open", name, None, _PIN)  # as os.open does
    fd: int = _syscall(
        ctypes.c_long(_SYS_OPENAT2), ctypes.c_int(start), ctypes.c_char_p(name), how, ctypes.c_size_t(len(how))
    )
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd


def _walk(start: int, name: bytes) -> int:
    pinned = os.dup(start)
    for component in name.split(b"/"):
        with _closing(pinned):
            pinned = os.open(component, _PIN | os.O_NOFOLLOW, dir_fd=pinned)
        if stat.S_ISLNK(os.fstat(pinned).st_mode):
            os.close(pinned)
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return pinned


@contextmanager
def _pinned_file(given: str) -> Iterator[int]:
    """An O_PATH descriptor of the regular file or block device that the caller names."""
    with _closing(os.open(given, _PIN)) as pinned:
        kind = _kind_unless(_REGULAR_OR_BLOCK, pinned)
        if kind is not None:
            raise NotQcow2Error(f"this is {kind}, neither a regular file nor a block device", file=given)
        yield pinned


def _open_pinned(
    pinned: int, path: str, vet: Vet | None = None, *, writable: bool, force_share: bool = False
) -> FileStorage:
    if vet is not None:
        status = os.fstat(pinned)
        vet((status.st_dev, status.st_ino), path)
    mode = os.O_RDWR if writable else os.O_RDONLY
    try:
        fd = os.open(f"/proc/self/fd/{pinned}", mode | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENOENT:  # the file exists, so then it is /proc that does not: let its name show
            error.filename = path
        raise
    return _locked(fd, path, writable=writable, force_share=force_share)


def _locked(fd: int, path: str, *, writable: bool, force_share: bool = False) -> FileStorage:
    """The open file as a storage, locked; after an error `fd` is closed."""
    try:
        if writable:
            lock_for_writing(fd, path)
        else:
            lock_for_reading(fd, path, force_share=force_share)
        return FileStorage(fd, path)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            error.filename = path
        raise


def _kind_unless(allowed: frozenset[int], pinned: int) -> str | None:
    """What the file is, in words, if it is none of the `allowed` types."""
    file_type = stat.S_IFMT(os.fstat(pinned).st_mode)
    return None if file_type in allowed else _FILE_TYPES.get(file_type, "of an unknown type")


def _denied(name: bytes, role: str, referrer: str, rule: str, *, trusted_helps: bool) -> ReferenceDeniedError:
    way_out = f"name the file yourself ({_option(role)})"
    if trusted_helps:
        way_out += ", or use policy trusted if you trust whoever made the image"
    return ReferenceDeniedError(f'{role} "{printable(name)}" is not opened: {rule}; {way_out}', file=referrer)


def _missing(name: bytes, role: str, referrer: str, path: str) -> MissingReferenceError:
    return MissingReferenceError(
        f'{role} "{printable(name)}" does not exist as {printable(path)}; name the file yourself ({_option(role)}), or '
        "where relative names start (option base-directory)",
        file=referrer,
    )


def _option(role: str) -> str:
    return _OTHER_WAYS.get(role) or "option " + role.replace(" ", "-")


@contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)
