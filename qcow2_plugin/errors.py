"""The error tree: every failure this package finds by itself.

Each class carries the `errno` that the NBD protocol can transport (EPERM, EIO, ENOMEM, EINVAL, ENOSPC,
EOVERFLOW, ENOTSUP, ESHUTDOWN), so that an adapter translates an error by reading one attribute. `OSError` is
never wrapped: what the kernel said reaches the guest as it is.

Messages say what, where (host offsets in hex), in which file, and what to do. They may quote text that an image
chose (names, feature strings), so everything quoted passes through `printable`: no control character of an image
reaches a terminal or a log.
"""

from __future__ import annotations

import errno
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

_UNSAFE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_SHOWN_LIMIT = 1100


def printable(text: str | bytes) -> str:
    """`text` with every character escaped that could act on a terminal or mislead its reader.

    Escaped as in Python literals: control and format characters (ESC, CR, bidi overrides, ...), bytes that are not
    UTF-8, and the backslash itself, so that the result is unambiguous. Longer texts than any name that the format
    allows are cut.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    if len(text) > _SHOWN_LIMIT:
        text = text[:_SHOWN_LIMIT] + "..."
    if text.isascii() and text.isprintable() and "\\" not in text:
        return text
    return "".join(map(_printable_character, text))


def _printable_character(character: str) -> str:
    if character == "\\":
        return "\\\\"
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if unicodedata.category(character) not in _UNSAFE_CATEGORIES:
        return character
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class Qcow2Error(Exception):
    """Base of all errors of this package.

    `detail` is the message without the file; `file` is the path of the file it is about, filled in by whoever knows
    it first (the pure parsers do not).
    """

    errno = errno.EIO

    def __init__(self, detail: str, *, file: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.file = file

    def __str__(self) -> str:
        return self.detail if self.file is None else f"{self.detail} ({printable(self.file)})"


@contextmanager
def about_file(path: str) -> Iterator[None]:
    """Errors raised inside that do not know their file, as those of the pure parsers, are about `path`."""
    try:
        yield
    except Qcow2Error as error:
        error.file = error.file or path
        raise


class NotQcow2Error(Qcow2Error):
    """The file has no qcow2 magic or is shorter than a header."""

    errno = errno.EINVAL


class UnsupportedFeatureError(Qcow2Error):
    """The image is valid but needs something this package does not do; the message names it."""

    errno = errno.ENOTSUP


class CorruptImageError(Qcow2Error):
    """A structure in the image breaks a rule of the format.

    Message form: `L2 table at host offset 0x50000: entry 17 has reserved bits 0x1e0 (image.qcow2)`.
    """

    def __init__(self, structure: str, detail: str, *, host_offset: int | None = None, file: str | None = None) -> None:
        place = structure if host_offset is None else f"{structure} at host offset {host_offset:#x}"
        super().__init__(f"{place}: {detail}", file=file)
        self.structure = structure
        self.host_offset = host_offset


class TruncatedImageError(CorruptImageError):
    """A structure or guest cluster lies past the end of the file: part of the image is missing."""


class OptionError(Qcow2Error):
    """An option was given a value that it cannot have, or options contradict each other; nothing was changed."""

    errno = errno.EINVAL


class ReferenceDeniedError(Qcow2Error):
    """The policy does not allow opening a file that the image names."""

    errno = errno.EPERM


class MissingReferenceError(Qcow2Error):
    """A file that the image needs does not exist, or the image does not say which it is."""

    errno = errno.EINVAL


class ReadOnlyImageError(Qcow2Error):
    """A change was asked of an image that is open read-only."""

    errno = errno.EPERM


class FailedImageError(Qcow2Error):
    """The image takes no changes any more, because an earlier failure left open what of it is durable or right."""


class ResizeError(Qcow2Error):
    """The disk cannot get the size that was asked for."""

    errno = errno.EINVAL


class BitmapError(Qcow2Error):
    """A dirty bitmap cannot be used or changed in the way that was asked for; nothing was changed."""

    errno = errno.EINVAL


class SnapshotError(Qcow2Error):
    """An internal snapshot cannot be made or applied; nothing was changed."""

    errno = errno.EINVAL


class AmendError(Qcow2Error):
    """The image cannot become what was asked for; of that nothing was changed."""

    errno = errno.EINVAL


class DetachError(Qcow2Error):
    """The data file is not all of the disk, or more depends on the image than that; nothing was changed."""

    errno = errno.EINVAL


class NoRawViewError(Qcow2Error):
    """The data file of the image is not the raw disk, or not all of it; the message says why."""

    errno = errno.EINVAL


class ExportError(Qcow2Error):
    """The disk cannot be exported there, or what arrived is not the disk."""


class BackupError(Qcow2Error):
    """A backup cannot be made, or an interrupted one cannot be finished; the images are as they were, or the message
    says what is left to do."""


class LooseEndError(BackupError):
    """The backup is made and durable, but something is left to do, which the next one does."""


class ManifestError(Qcow2Error):
    """What a repository of backups says of itself cannot be believed, or what it names is not there."""


class DigestError(Qcow2Error):
    """What is said to be a digest, or a part of one, cannot be; or it does not go with the disk."""

    errno = errno.EINVAL


class RelocateError(Qcow2Error):
    """The image cannot have that file in the place of the one that it names; nothing was changed."""

    errno = errno.EINVAL


class HeaderFullError(Qcow2Error):
    """The header cluster has no room for what would have to be in it; nothing was changed."""

    errno = errno.ENOSPC


class UnfinishedTransactionError(Qcow2Error):
    """A change of the bitmaps of several images was interrupted, and has to be finished before this can be done."""


class TargetError(Qcow2Error):
    """A place for backups does not do what was asked for; the message quotes the program or service that failed."""


class PluginError(Qcow2Error):
    """A plugin cannot be loaded, refused what was to be done, or failed; `plugin` is its name, and in the message."""

    def __init__(self, plugin: str, detail: str) -> None:
        super().__init__(f'plugin "{printable(plugin)}" {detail}')
        self.plugin = plugin


class OutOfRangeError(Qcow2Error):
    """A request reaches outside the virtual disk."""

    errno = errno.EINVAL


class ImageLockedError(Qcow2Error):
    """Another process, QEMU for example, uses the file in a way that excludes ours."""

    errno = errno.EPERM


class ImageClosedError(Qcow2Error):
    """The image was closed before the request."""

    errno = errno.ESHUTDOWN


class WrongKeyError(Qcow2Error):
    """The secret does not open the image."""

    errno = errno.EPERM
