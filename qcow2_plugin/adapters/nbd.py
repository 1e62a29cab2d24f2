"""NBD for nbdkit: one image, its connections, and every request of theirs in terms of `Image`.

`nbdkit_plugin.py` holds nbdkit's callbacks, each one line into here; nothing in this module imports `nbdkit`. What the
command line means is in `command_line`, what can be served in `exports`.

**One image for all.** It is opened once, before nbdkit forks, and shared by all connections. So a flush on any of them
makes durable what was written on every other, and what one has written the others read: multi-conn as NBD means it.

**Durable or not.** A write is acknowledged when every reader would see it; it is durable after a flush, or at once with
FUA, which is the operation and a flush here. `close`, which nbdkit calls when its last client has gone, flushes too: a
server that ends in order loses nothing that it acknowledged, whatever its clients forgot.

**Errors** reach the client as an errno and the operator as one line; a traceback is for errors that we did not expect.

Source: the NBD protocol; nbdkit-plugin(3), nbdkit-python-plugin(3).
"""

from __future__ import annotations

import errno
import itertools
import sys
import threading
from _thread import get_ident
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from qcow2_plugin.adapters.command_line import ParameterError, Parameters
from qcow2_plugin.adapters.exports import Exports, Run, View
from qcow2_plugin.adapters.thread_states import KeptThreadStates
from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.engine.image import Image
from qcow2_plugin.errors import ImageClosedError, Qcow2Error, ReadOnlyImageError

_MAX_STATES = 4096
"""Entries of one block status reply; the client asks again for the rest."""
_MAX_RUNS = 65536
"""Runs looked at for one reply."""
_MIN_PREFERRED_BLOCK_SIZE = 65536
_MAX_BLOCK_SIZE = 0xFFFF_FFFF
_MAX_VIEWS = 16
"""Exports in use at once; each has a table cache of its own."""

_NOT_WRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_ERRNO_OF_NBD = {
    errno.EPERM: errno.EPERM,
    errno.EACCES: errno.EPERM,
    errno.EROFS: errno.EPERM,
    errno.ENOMEM: errno.ENOMEM,
    errno.EINVAL: errno.EINVAL,
    errno.ENOSPC: errno.ENOSPC,
    errno.EDQUOT: errno.ENOSPC,
    errno.EFBIG: errno.ENOSPC,
    errno.EOVERFLOW: errno.EOVERFLOW,
    errno.ENOTSUP: errno.ENOTSUP,
    errno.ESHUTDOWN: errno.ESHUTDOWN,
}
"""What NBD has a word for. All else is EIO: nbdkit would make it EINVAL, as if the client had asked something wrong."""


class NotStoredError(Qcow2Error):
    """What was written could not be stored when the image was closed."""


class Server:
    """One image and its connections.

    `set_error` tells nbdkit the errno of a failing callback, `parse_size` reads sizes as nbdkit does. `read_only` says
    that nbdkit was given -r.
    """

    def __init__(
        self, set_error: Callable[[int], None], parse_size: Callable[[str], int], *, read_only: bool = True
    ) -> None:
        self._set_error = set_error
        self._parse_size = parse_size
        self._read_only = read_only
        self._parameters = Parameters()
        self._image: Image | None = None
        self._resources = ExitStack()
        self._exports: Exports | None = None
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
            self._image = self._open_image()
            self._exports = Exports(self._image, self._parameters)
            self._exports.view("")

    def close(self) -> None:
        """Store what was written and give back the image; no connection may be left."""
        if self._image is None:
            return
        with self.reporting():
            try:
                with self._image as image:
                    if image.writable:
                        image.flush()  # tells of a failure once more; `close` leaves a failed image as it is
            except Exception as error:
                raise NotStoredError(
                    f"what was written after the last flush may be lost: {error}", file=self._parameters.file
                ) from error
            finally:
                self._resources.close()

    def exports(self) -> list[tuple[str, str]]:
        """(name, description) of the exports that a client can be shown."""
        with self.reporting():
            return self._opened().listed()

    def description(self, name: str) -> str:
        """What an export is, for people."""
        with self.reporting():
            return self._opened().description(name)

    def connect(self, name: str) -> Connection:
        """A connection to the export `name`."""
        with self.reporting(), self._lock:
            view, users = self._views.get(name) or (self._opened().view(name), 0)
            if users == 0 and len(self._views) >= _MAX_VIEWS:
                raise ParameterError(f"more than {_MAX_VIEWS} exports are in use at once")
            self._views[name] = (view, users + 1)
            if view.target is None:
                return Connection(self, name, view)
            return WritableConnection(self, name, view, view.target)

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

    def _opened(self) -> Exports:
        if self._exports is None:
            raise ImageClosedError("the image is not open")
        return self._exports

    def _open_image(self) -> Image:
        given = self._parameters
        path = given.check()
        writable = given.is_writable(read_only_server=self._read_only)
        if given.backup is not None:
            return self._open_point(given.backup, writable=writable)
        try:
            return open_image(
                path,
                writable=writable,
                policy=given.policy,
                data_file=given.data_file,
                backing_file=given.backing_file,
                backing_format=given.backing_format,
                base_directory=given.base_directory,
                allow_damaged=given.allow_damaged,
                force_share=given.force_share,
                cache_size=given.cache_size,
            )
        except OSError as error:
            if not writable or error.errno not in _NOT_WRITABLE:
                raise
            raise ReadOnlyImageError(
                f"cannot open for writing: {error.strerror}; to serve it read-only, give nbdkit -r",
                file=error.filename,
            ) from error

    def _open_point(self, directory: str, *, writable: bool) -> Image:
        from qcow2_plugin.adapters.backup.serving import opened_point  # who serves an image need not wait for it

        given = self._parameters
        point = opened_point(
            directory,
            given.point or "latest",
            given.disk,
            scratch=given.scratch,
            writable=writable,
            cache_size=given.cache_size,
        )
        return self._resources.enter_context(point)


class Connection:
    """One client's connection to one export that it can only read: nbdkit's handle."""

    writable = False

    def __init__(self, server: Server, name: str, view: View) -> None:
        self.virtual_size = view.virtual_size
        self.block_sizes = (1, max(view.cluster_size, _MIN_PREFERRED_BLOCK_SIZE), _MAX_BLOCK_SIZE)
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
        return self._server.description(self._name)

    def close(self) -> None:
        """The client has gone and its worker threads have ended."""
        self._server.disconnect(self._name)
        self._threads.give_back()


class WritableConnection(Connection):
    """One client's connection to the disk that it can write to. `durable` is NBD's FUA."""

    writable = True

    def __init__(self, server: Server, name: str, view: View, disk: Image) -> None:
        super().__init__(server, name, view)
        self._disk = disk
        self._write_from = disk.write_from

    def write_from(self, buffer: memoryview, offset: int, durable: bool) -> None:
        """Write `buffer`, which is nbdkit's and good for this call only, to guest `offset`."""
        if get_ident() not in self._kept_threads:
            self._threads.keep()
        try:
            if durable:
                self._write_from(buffer, offset, durable=True)
            else:
                self._write_from(buffer, offset)
        except Exception as error:
            self._server.report(error)
            raise

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool, only_fast: bool, durable: bool) -> None:
        """Make a range read as zeros; `may_unmap` allows to give its space back.

        With `only_fast` ENOTSUP tells, before anything has changed, that zeros would have to be written as data.
        """
        with self._server.reporting():
            self._disk.write_zeroes(offset, length, may_unmap=may_unmap, only_fast=only_fast)
            if durable:
                self._disk.flush()

    def discard(self, offset: int, length: int, *, durable: bool) -> None:
        """Give back the space of a range, whose contents are not wanted any more."""
        with self._server.reporting():
            self._disk.discard(offset, length)
            if durable:
                self._disk.flush()

    def flush(self) -> None:
        """Make durable what was acknowledged to any client."""
        with self._server.reporting():
            self._disk.flush()


def _errno(error: Exception) -> int:
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    number = getattr(error, "errno", None)
    return _ERRNO_OF_NBD.get(number, errno.EIO) if isinstance(number, int) else errno.EIO
