"""nbdkit's command line: this plugin's parameters, what they mean together, and whether nbdkit was given -r.

Refuses to know what is served. It is pure: `nbdkit_plugin.py` reads the words, here they are understood.

**Writable or not** is decided before the image is opened, so that the right locks are taken and a failure is told at
start. nbdkit tells a plugin of -r only when a client connects, which is too late; so its command line is read as it
reads it itself (`asks_for_read_only`). `readonly=` decides where that is not wanted, for example below a filter that
keeps all writes to itself. Either mistake would be harmless: nbdkit holds clients to -r whatever the plugin does.

Source: nbdkit(1); getopt(3).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qcow2_plugin.engine.chain import DEFAULT_CACHE_SIZE
from qcow2_plugin.errors import Qcow2Error, printable
from qcow2_plugin.format import names
from qcow2_plugin.storage.directory import absolute_path
from qcow2_plugin.storage.opener import Policy

PARAMETERS = {
    "file": "FILE  the qcow2 image to serve (this or backup= is required)",
    "backup": "DIR  instead of an image, a point of the backups in this directory",
    "point": "ID  which point of the backups (default: the latest)",
    "disk": "NAME  which disk of the point (default: its only one)",
    "scratch": "FILE  a qcow2 image that takes what is written to a point; made if it is not there",
    "readonly": "true|false  serve it read-only (default: true if nbdkit is given -r, or one of snapshot=, bitmap=, "
    "allow-damaged=, force-share=, or backup= without scratch=, is)",
    "policy": "inspect|confined|trusted  which files that the image names may be opened (default: confined, plain "
    "names below the image's directory)",
    "data-file": "FILE  external data file, instead of the name in the image",
    "backing-file": "FILE  backing file, instead of the name in the image",
    "backing-format": "qcow2|raw  format of backing files where the image does not record it",
    "base-directory": "DIR  where relative names in the image start (default: the image's directory)",
    "snapshot": "ID|NAME  serve this internal snapshot as the default export, read-only",
    "bitmap": "NAME  serve this dirty bitmap as the default export, read-only: data is dirty, a hole is clean",
    "allow-damaged": "true|false  read what a truncated image lacks as zeros, read-only (default: false, refuse it)",
    "force-share": "true|false  read although another program may be writing, read-only (default: false, refuse)",
    "cache-size": "SIZE  bytes of mapping tables to keep in memory for each export in use (default: 32M)",
}
_PATHS = frozenset({"file", "backup", "scratch", "data-file", "backing-file", "base-directory"})
_BOOLEANS = frozenset({"readonly", "allow-damaged", "force-share"})
_READ_ONLY_KINDS = ("snapshot", "bitmap", "allow-damaged", "force-share")
"""Parameters that are for reading only."""
_ABOUT_BACKUP = ("point", "disk", "scratch")
_ABOUT_IMAGE = (
    *("file", "data-file", "backing-file", "backing-format", "base-directory", "snapshot", "bitmap", "allow-damaged"),
    "force-share",
)

_SHORT_WITH_VALUE = frozenset("DegiPptUu")
_LONG_WITH_VALUE = (
    *("debug", "export", "export-name", "exportname", "filter", "group", "ip-addr", "ipaddr", "log", "mask-handshake"),
    *("pid-file", "pidfile", "port", "run", "selinux-label", "threads", "timeout"),
    *("tls", "tls-certificates", "tls-psk", "unix", "user"),
)
"""Options of nbdkit that take the next word along."""
_LONG_READ_ONLY = ("readonly", "read-only")


class ParameterError(Qcow2Error):
    """A parameter on nbdkit's command line is wrong."""

    errno = errno.EINVAL


@dataclass
class Parameters:
    """What the command line asks for; names are those of `PARAMETERS` with underscores."""

    file: str | None = None
    backup: str | None = None
    point: str | None = None
    disk: str | None = None
    scratch: str | None = None
    readonly: bool | None = None
    policy: Policy = Policy.CONFINED
    data_file: str | None = None
    backing_file: str | None = None
    backing_format: str | None = None
    base_directory: str | None = None
    snapshot: str | None = None
    bitmap: str | None = None
    allow_damaged: bool = False
    force_share: bool = False
    cache_size: int = DEFAULT_CACHE_SIZE

    def set(self, key: str, value: str, parse_size: Callable[[str], int]) -> None:
        """Take one parameter; paths become absolute, because nbdkit changes its directory later.

        Raises ParameterError.
        """
        if key not in PARAMETERS:
            raise ParameterError(f'unknown parameter "{printable(key)}"; known are: {", ".join(PARAMETERS)}')
        name = _attribute(key)
        if key in _PATHS:
            setattr(self, name, absolute_path(os.fsdecode(names.to_bytes(value))))
        elif key in _BOOLEANS:
            setattr(self, name, _boolean(key, value))
        elif key == "policy":
            self.policy = _policy(value)
        elif key == "cache-size":
            self.cache_size = _size(key, value, parse_size)
        else:
            setattr(self, name, value)

    def check(self) -> str:
        """The path of the image, or of the backups, if the parameters make sense together. Raises ParameterError."""
        path = self.file or self.backup
        if path is None:
            raise ParameterError("which image? add file=IMAGE.qcow2")
        self._check_backup()
        if self.snapshot is not None and self.bitmap is not None:
            raise ParameterError("snapshot= and bitmap= exclude each other")
        if self.readonly is False and (kinds := self._read_only_kinds()):
            raise ParameterError(f"{kinds[0]}= is for reading only; leave out readonly=false")
        return path

    def _check_backup(self) -> None:
        about_backup = [key for key in _ABOUT_BACKUP if getattr(self, key) is not None]
        if self.backup is None:
            if about_backup:
                raise ParameterError(f"{about_backup[0]}= is about backups; add backup=DIR")
            return
        for key in _ABOUT_IMAGE:
            if getattr(self, _attribute(key)) not in (None, False):
                raise ParameterError(f"{key}= is about an image, and backup= names a point; leave one of them out")

    def is_writable(self, *, read_only_server: bool) -> bool:
        """True if the image is to be opened for writing; `read_only_server` if nbdkit was given -r."""
        if self.readonly is not None:
            return not self.readonly
        return not read_only_server and not self._read_only_kinds()

    def _read_only_kinds(self) -> list[str]:
        kinds = [key for key in _READ_ONLY_KINDS if getattr(self, _attribute(key)) not in (None, False)]
        return ["backup", *kinds] if self.backup is not None and self.scratch is None else kinds


def asks_for_read_only(words: Iterable[str]) -> bool:
    """True if -r is on nbdkit's command line, in any spelling; `words` begin behind the program's name.

    Options may stand anywhere before "--", short ones together in a word, long ones cut short.
    """
    remaining = iter(words)
    for word in remaining:
        if word == "--":
            return False
        if word.startswith("--"):
            name, has_value, _ = word[2:].partition("=")
            if len(name) > 1 and any(option.startswith(name) for option in _LONG_READ_ONLY):
                return True
            takes_next = not has_value and any(option.startswith(name) for option in _LONG_WITH_VALUE)
        elif word.startswith("-"):
            letters = word[1:]
            first = next((index for index, letter in enumerate(letters) if letter in _SHORT_WITH_VALUE), len(letters))
            if "r" in letters[:first]:
                return True
            takes_next = first == len(letters) - 1
        else:
            continue
        if takes_next:
            next(remaining, None)
    return False


def dump_parameters() -> str:
    """The parameters as `key=value` lines, for `nbdkit --dump-plugin`."""
    return "\n".join(f"qcow2_{_attribute(key)}={text}" for key, text in PARAMETERS.items())


def help_text() -> str:
    """How to use the plugin."""
    width = max(map(len, PARAMETERS)) + 1
    lines = [f"  {key + '=':<{width}}{text}" for key, text in PARAMETERS.items()]
    return "\n".join(
        [
            "Serve a qcow2 image over NBD, writable unless nbdkit is given -r:",
            "",
            "  nbdkit -f -i 127.0.0.1 python ./nbdkit_plugin.py file=disk.qcow2",
            "  nbdkit -r -U - python ./nbdkit_plugin.py file=disk.qcow2 --run 'nbdinfo \"$uri\"'",
            "  nbdkit -f -U disk.sock python ./nbdkit_plugin.py backup=/backups/guest point=ID disk=root",
            "",
            "Parameters:",
            *lines,
            "",
            'Exports: "" is the disk (or what snapshot= or bitmap= name), "snapshot=ID" an internal snapshot,',
            '"bitmap=NAME" a persistent dirty bitmap, whose map says data for dirty and hole for clean. Snapshots and',
            "bitmaps are read-only; a bitmap that records writes is served only where nothing is written (-r).",
            "",
            "Below a filter that keeps writes to itself, like cow, say readonly=true.",
        ]
    )


def _attribute(key: str) -> str:
    return key.replace("-", "_")


def _boolean(key: str, value: str) -> bool:
    if value.lower() in ("true", "on", "yes", "1"):
        return True
    if value.lower() in ("false", "off", "no", "0"):
        return False
    raise ParameterError(f'{key}={printable(value)} is neither "true" nor "false"')


def _size(key: str, value: str, parse_size: Callable[[str], int]) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise ParameterError(f"{key}={printable(value)} is not a size") from error


def _policy(value: str) -> Policy:
    try:
        return Policy(value)
    except ValueError as error:
        known = ", ".join(policy.value for policy in Policy)
        raise ParameterError(f"policy={printable(value)} is none of {known}") from error
