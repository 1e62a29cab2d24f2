"""NBD for nbdkit: parameters, exports, reads and block status, in terms of `Image`.

`nbdkit_plugin.py` holds nbdkit's callbacks, each one line into here; nothing in this module imports `nbdkit`.

Exports. The default export ("") is what the parameters say: the disk, or the snapshot or bitmap that they name. The
others are named as the parameters would be: `snapshot=ID` (or a name) is the disk as an internal snapshot keeps it,
`bitmap=NAME` the disk as a persistent dirty bitmap sees it: what is dirty is data, what is clean is a hole and reads as
zeros. So any client that copies data and skips holes makes an incremental backup. One image is opened, before nbdkit
forks, and shared by all connections.

Errors reach the client as an errno and the operator as one line; a traceback is for errors that we did not expect.

Source: the NBD protocol's "base:allocation" metadata context; nbdkit-plugin(3), nbdkit-python-plugin(3).
"""

from __future__ import annotations

import errno
import itertools
import os
import sys
import threading
from _thread import get_ident
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from qcow2_plugin.adapters.thread_states import KeptThreadStates
from qcow2_plugin.engine.chain import DEFAULT_CACHE_SIZE, open_image
from qcow2_plugin.engine.image import Image
from qcow2_plugin.engine.snapshots import find as find_snapshot
from qcow2_plugin.errors import ImageClosedError, Qcow2Error, printable
from qcow2_plugin.extent import Extent, ExtentKind, clear
from qcow2_plugin.format import names
from qcow2_plugin.format.bitmaps import Bitmap
from qcow2_plugin.format.snapshots import Snapshot
from qcow2_plugin.storage.opener import Policy

STATE_HOLE = 1
STATE_ZERO = 2
_MAX_STATES = 4096
"""Entries of one block status reply; the client asks again for the rest."""
_MAX_RUNS = 65536
"""Runs looked at for one reply."""
_MAX_TABLES = 4096
"""L2 tables looked at for one reply."""
_MIN_PREFERRED_BLOCK_SIZE = 65536
_MAX_BLOCK_SIZE = 0xFFFF_FFFF

_MAX_VIEWS = 16
"""Exports in use at once; each has a table cache of its own."""
_MAX_LISTED = 1000
"""Exports told to a client that asks for a list."""
_MAX_STRING = 4096
"""Bytes of an NBD string."""
_MAX_SHOWN = 200
"""Characters of a name in a description."""
_SNAPSHOT = "snapshot="
_BITMAP = "bitmap="

Run = tuple[int, int, int]
"""Guest offset, length, state flags."""

PARAMETERS = {
    "file": "FILE  the qcow2 image to serve (required)",
    "policy": "inspect|confined|trusted  which files that the image names may be opened (default: confined, plain "
    "names below the image's directory)",
    "data-file": "FILE  external data file, instead of the name in the image",
    "backing-file": "FILE  backing file, instead of the name in the image",
    "backing-format": "qcow2|raw  format of backing files where the image does not record it",
    "base-directory": "DIR  where relative names in the image start (default: the image's directory)",
    "snapshot": "ID|NAME  serve this internal snapshot as the default export",
    "bitmap": "NAME  serve this dirty bitmap as the default export: data is dirty, a hole is clean",
    "allow-damaged": "true|false  read what a truncated image lacks as zeros (default: false, refuse it)",
    "force-share": "true|false  read although another program may be writing (default: false, refuse)",
    "cache-size": "SIZE  bytes of mapping tables to keep in memory for each export in use (default: 32M)",
}


class ParameterError(Qcow2Error):
    """A parameter on nbdkit's command line is wrong."""

    errno = errno.EINVAL


@dataclass
class Parameters:
    """What the command line asks for; names are those of `PARAMETERS` with underscores."""

    file: str | None = None
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
        name = key.replace("-", "_")
        if key in ("file", "data-file", "backing-file", "base-directory"):
            setattr(self, name, os.path.abspath(os.fsdecode(names.to_bytes(value))))
        elif key in ("allow-damaged", "force-share"):
            setattr(self, name, _boolean(key, value))
        elif key == "policy":
            self.policy = _policy(value)
        elif key == "cache-size":
            self.cache_size = _size(key, value, parse_size)
        else:
            setattr(self, name, value)

    def check(self) -> str:
        """The image's path, if the parameters make sense together. Raises ParameterError."""
        if self.file is None:
            raise ParameterError("which image? add file=IMAGE.qcow2")
        if self.snapshot is not None and self.bitmap is not None:
            raise ParameterError("snapshot= and bitmap= exclude each other")
        return self.file


class View(Protocol):
    """What an export serves."""

    virtual_size: int

    def read_into(self, buffer: memoryview, offset: int, /) -> None:
        """Fill `buffer` from guest `offset`."""

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """The states of a range from its start on, ascending, without gaps, lazily; not always to its end."""

    def prefetch(self, offset: int, length: int, /) -> None:
        """Have the range in memory soon."""


class DiskView:
    """A disk as it is: the active one or a snapshot's."""

    def __init__(self, image: Image) -> None:
        self.virtual_size = image.virtual_size
        self.read_into = image.read_into
        self.prefetch = image.prefetch
        self._image = image
        self._span = _MAX_TABLES * _least_coverage(image)

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """The states of a range, or of as much as `_MAX_TABLES` tell."""
        length = min(length, self._span)
        return ((extent.guest_offset, extent.length, _state(extent)) for extent in self._image.extents(offset, length))


class BitmapView:
    """The disk as a dirty bitmap sees it: dirty is data, clean is a hole."""

    def __init__(self, image: Image, name: bytes) -> None:
        self.virtual_size = image.virtual_size
        self._image = image
        self._dirty = image.dirty_bitmap(name)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Dirty ranges from the disk, zeros between them."""
        done = 0
        for start, length in self._dirty.ranges(offset, len(buffer)):
            begin = start - offset
            clear(buffer[done:begin])
            done = begin + length
            self._image.read_into(buffer[begin:done], start)
        clear(buffer[done:])

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """The states of a range."""
        end = offset + length
        for start, dirty_length in self._dirty.ranges(offset, length):
            if offset < start:
                yield offset, start - offset, STATE_HOLE | STATE_ZERO
            yield start, dirty_length, 0
            offset = start + dirty_length
        if offset < end:
            yield offset, end - offset, STATE_HOLE | STATE_ZERO

    def prefetch(self, offset: int, length: int) -> None:
        """Have the dirty part of the range in memory soon."""
        for start, dirty_length in self._dirty.ranges(offset, length):
            self._image.prefetch(start, dirty_length)


class Server:
    """One image and its exports.

    `set_error` tells nbdkit the errno of a failing callback, `parse_size` reads sizes as nbdkit does.
    """

    def __init__(self, set_error: Callable[[int], None], parse_size: Callable[[str], int]) -> None:
        self._set_error = set_error
        self._parse_size = parse_size
        self._parameters = Parameters()
        self._image: Image | None = None
        self._known_snapshots: list[Snapshot] | None = None
        self._views: dict[str, tuple[View, int]] = {}
        """Open views and how many connections use each."""
        self._lock = threading.Lock()

    def configure(self, key: str, value: str) -> None:
        """Take one parameter of the command line."""
        with self.reporting():
            self._parameters.set(key, value, self._parse_size)

    def open(self) -> None:
        """Open the image and prove that the default export can be served, before nbdkit forks."""
        with self.reporting():
            given = self._parameters
            self._image = open_image(
                given.check(),
                policy=given.policy,
                data_file=given.data_file,
                backing_file=given.backing_file,
                backing_format=given.backing_format,
                base_directory=given.base_directory,
                allow_damaged=given.allow_damaged,
                force_share=given.force_share,
                cache_size=given.cache_size,
            )
            self._open_view("")

    def close(self) -> None:
        """Give back the image."""
        if self._image is not None:
            self._image.close()

    def exports(self) -> list[tuple[str, str]]:
        """(name, description) of every export that a client can be shown, the disk and at most `_MAX_LISTED` others.

        Names that a terminal should not be shown are left out; a client that knows one can still ask for it.
        """
        with self.reporting():
            image = self._opened()
            found = [("", self.description(""))]
            found += [
                (_SNAPSHOT + names.to_text(each.id), self._of_snapshot(each)) for each in self._listed_snapshots()
            ]
            found += [
                (_BITMAP + names.to_text(each.name), self._of_bitmap(each.name)) for each in _usable_bitmaps(image)
            ]
            return [(name, told) for name, told in found if _can_be_listed(name)][: _MAX_LISTED + 1]

    def description(self, name: str) -> str:
        """What an export is, for people."""
        kind, wanted = self._meaning(name)
        if kind == _SNAPSHOT:
            return self._of_snapshot(find_snapshot(self._snapshots(), wanted, self._file_name()))
        if kind == _BITMAP:
            return self._of_bitmap(wanted)
        return f"{self._file_name()}, read-only"

    def connect(self, name: str) -> Connection:
        """A connection to the export `name`."""
        with self.reporting(), self._lock:
            view, users = self._views.get(name) or (self._open_view(name), 0)
            if users == 0 and len(self._views) >= _MAX_VIEWS:
                raise ParameterError(f"more than {_MAX_VIEWS} exports are in use at once")
            self._views[name] = (view, users + 1)
            return Connection(self, name, view, self._opened().header.geometry.cluster_size)

    def disconnect(self, name: str) -> None:
        """The end of a connection to the export `name`."""
        with self._lock:
            view, users = self._views.pop(name)
            if users > 1:
                self._views[name] = (view, users - 1)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Failures inside are told to nbdkit."""
        try:
            yield
        except Exception as error:
            self.report(error)
            raise

    def report(self, error: Exception) -> None:
        """Tell nbdkit the errno of `error`; nbdkit logs the exception itself when it leaves the callback."""
        is_expected = isinstance(error, (Qcow2Error, OSError))
        sys.tracebacklimit = 0 if is_expected else 1000
        if is_expected:
            error.__suppress_context__ = True
            error.__cause__ = None
        self._set_error(_errno(error))

    def _snapshots(self) -> list[Snapshot]:
        """The internal snapshots; while the image is locked they stay what they are, so they are read once."""
        if self._known_snapshots is None:
            self._known_snapshots = self._opened().snapshots()
        return self._known_snapshots

    def _listed_snapshots(self) -> list[Snapshot]:
        """The snapshots to tell of; a broken table must not keep a client from the list of exports."""
        try:
            return self._snapshots()[:_MAX_LISTED]
        except Qcow2Error:
            return []

    def _opened(self) -> Image:
        if self._image is None:
            raise ImageClosedError("the image is not open")
        return self._image

    def _file_name(self) -> str:
        return _shown(os.path.basename(self._parameters.check()))

    def _of_snapshot(self, snapshot: Snapshot) -> str:
        taken = datetime.fromtimestamp(snapshot.date_seconds, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f'internal snapshot "{_shown(snapshot.name)}" of {self._file_name()}, taken {taken}'

    def _of_bitmap(self, name: bytes) -> str:
        return f'dirty bitmap "{_shown(name)}" of {self._file_name()}: data is dirty, a hole is clean'

    def _meaning(self, name: str) -> tuple[str, bytes]:
        """What kind of export a name means (`_SNAPSHOT`, `_BITMAP` or "" for the disk) and which one."""
        for kind in (_SNAPSHOT, _BITMAP):
            if name.startswith(kind):
                return kind, names.to_bytes(name.removeprefix(kind))
        if name:
            raise ParameterError(
                f'there is no export "{printable(name)}"; there are "", "{_SNAPSHOT}ID" and "{_BITMAP}NAME"'
            )
        if self._parameters.snapshot is not None:
            return _SNAPSHOT, names.to_bytes(self._parameters.snapshot)
        if self._parameters.bitmap is not None:
            return _BITMAP, names.to_bytes(self._parameters.bitmap)
        return "", b""

    def _open_view(self, name: str) -> View:
        image = self._opened()
        kind, wanted = self._meaning(name)
        if kind == _SNAPSHOT:
            return DiskView(image.at_snapshot(find_snapshot(self._snapshots(), wanted, self._file_name())))
        if kind == _BITMAP:
            return BitmapView(image, wanted)
        return DiskView(image)


class Connection:
    """One client's connection to one export: nbdkit's handle."""

    def __init__(self, server: Server, name: str, view: View, cluster_size: int) -> None:
        self.virtual_size = view.virtual_size
        self.block_sizes = (1, max(cluster_size, _MIN_PREFERRED_BLOCK_SIZE), _MAX_BLOCK_SIZE)
        """Minimum, preferred, maximum."""
        self._server = server
        self._name = name
        self._view = view
        self._read_into = view.read_into
        self._threads = KeptThreadStates()
        self._kept_threads = self._threads.idents

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from guest `offset`."""
        if get_ident() not in self._kept_threads:
            self._threads.keep()
        try:
            self._read_into(buffer, offset)
        except Exception as error:
            self._server.report(error)
            raise

    def states(self, offset: int, length: int, *, only_first: bool) -> list[Run]:
        """Block status of a range, or of as much of it as one reply should hold; `only_first` asks for one entry.

        An error behind the first entry is left for the request that begins there.
        """
        states: list[Run] = []
        try:
            for run in itertools.islice(self._view.runs(offset, length), _MAX_RUNS):
                if states and states[-1][2] == run[2]:
                    states[-1] = (states[-1][0], states[-1][1] + run[1], run[2])
                elif len(states) < (1 if only_first else _MAX_STATES):
                    states.append(run)
                else:
                    break
        except Exception as error:
            if not states:
                self._server.report(error)
                raise
        return states

    def prefetch(self, offset: int, length: int) -> None:
        """Have a range in memory soon."""
        with self._server.reporting():
            self._view.prefetch(offset, length)

    def description(self) -> str:
        """What the export is, for people."""
        with self._server.reporting():
            return self._server.description(self._name)

    def close(self) -> None:
        """The client has gone and its worker threads have ended."""
        self._server.disconnect(self._name)
        self._threads.give_back()


def dump_parameters() -> str:
    """The parameters as `key=value` lines, for `nbdkit --dump-plugin`."""
    return "\n".join(f"qcow2_{key.replace('-', '_')}={text}" for key, text in PARAMETERS.items())


def help_text() -> str:
    """How to use the plugin."""
    width = max(map(len, PARAMETERS)) + 1
    lines = [f"  {key + '=':<{width}}{text}" for key, text in PARAMETERS.items()]
    return "\n".join(
        [
            "Serve a qcow2 image over NBD, read-only:",
            "",
            "  nbdkit -f -i 127.0.0.1 python ./nbdkit_plugin.py file=disk.qcow2",
            "  nbdkit -U - python ./nbdkit_plugin.py file=disk.qcow2 --run 'nbdinfo \"$uri\"'",
            "",
            "Parameters:",
            *lines,
            "",
            'Exports: "" is the disk (or what snapshot= or bitmap= name), "snapshot=ID" an internal snapshot,',
            '"bitmap=NAME" a persistent dirty bitmap, whose map says data for dirty and hole for clean.',
        ]
    )


def _least_coverage(image: Image) -> int:
    """The fewest guest bytes that an L2 table in the chain maps."""
    coverage = image.header.geometry.l2_coverage
    backing = image.layer.backing
    return min(coverage, _least_coverage(backing)) if isinstance(backing, Image) else coverage


def _can_be_listed(name: str) -> bool:
    return printable(name) == name and len(name.encode()) <= _MAX_STRING


def _shown(name: str | bytes) -> str:
    return printable(name)[:_MAX_SHOWN]


def _usable_bitmaps(image: Image) -> list[Bitmap]:
    """The bitmaps that can be served; broken bitmaps must not keep a client from the list of exports."""
    try:
        known = image.bitmaps()
    except Qcow2Error:
        return []
    cluster_size = image.header.geometry.cluster_size
    return [bitmap for bitmap in known if bitmap.unusable_reason(image.virtual_size, cluster_size) is None]


def _state(extent: Extent) -> int:
    if extent.kind in (ExtentKind.DATA, ExtentKind.COMPRESSED):
        return 0
    if extent.kind is ExtentKind.ZERO and extent.host_offset is not None:
        return STATE_ZERO
    return STATE_HOLE | STATE_ZERO


def _errno(error: Exception) -> int:
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    number = getattr(error, "errno", None)
    return number if isinstance(number, int) else errno.EIO


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
