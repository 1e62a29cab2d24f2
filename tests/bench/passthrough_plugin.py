"""The floor for a Python plugin: every read is one `preadv` of a raw file, every write one `pwritev`, and that is all.

    nbdkit python ./passthrough_plugin.py file=disk.raw

nbdkit's threads are unknown to Python, so by default each callback makes a thread state and destroys it. Like the real
plugin this one keeps it alive (one extra `PyGILState_Ensure` when a thread is first seen), because the comparison is
about the work per read. Unlike the real plugin it never gives the states back: a benchmark's server does not live long
enough to care.
"""

from __future__ import annotations

import ctypes
import errno
import os
from threading import get_ident

API_VERSION = 2

SERIALIZE_REQUESTS = 2
"""nbdkit's number for: connections in parallel, one request at a time on each."""

parameters: dict[str, str] = {}


class Connection:
    """One client: its file, and the threads whose state is kept."""

    def __init__(self, readonly: bool) -> None:
        self.fd = os.open(parameters["file"], (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
        self.seen: set[int] = set()

    def read(self, buffer: bytearray, offset: int) -> None:
        """Fill the buffer; a short read leaves the rest as it is, which a floor may do."""
        self.keep_thread()
        os.preadv(self.fd, (buffer,), offset)

    def write(self, buffer: bytearray, offset: int) -> None:
        """Store the buffer; a short write is an error."""
        self.keep_thread()
        if os.pwritev(self.fd, (buffer,), offset) != len(buffer):
            raise OSError(errno.EIO, "a short write")

    def keep_thread(self) -> None:
        """Keep the state of the thread that runs this."""
        thread = get_ident()
        if thread not in self.seen:
            ctypes.pythonapi.PyGILState_Ensure()
            self.seen.add(thread)


def config(key: str, value: str) -> None:
    """`file=PATH`, made absolute because nbdkit changes directory."""
    if key != "file":
        raise ValueError(f"unknown parameter {key}; this plugin takes file=PATH")
    parameters[key] = os.path.abspath(value)


def thread_model() -> int:
    """See SERIALIZE_REQUESTS."""
    return SERIALIZE_REQUESTS


def open(readonly: bool) -> Connection:
    """A client has come."""
    return Connection(readonly)


def close(connection: Connection) -> None:
    """The client has gone."""
    os.close(connection.fd)


def get_size(connection: Connection) -> int:
    """Bytes of the file."""
    return os.fstat(connection.fd).st_size


def can_multi_conn(connection: Connection) -> bool:
    """All connections write to one file, and a flush is of the whole file."""
    return True


def pread(connection: Connection, buffer: bytearray, offset: int, flags: int) -> None:
    """One read."""
    connection.read(buffer, offset)


def pwrite(connection: Connection, buffer: bytearray, offset: int, flags: int) -> None:
    """One write."""
    connection.write(buffer, offset)


def flush(connection: Connection, flags: int) -> None:
    """What was written is durable."""
    os.fdatasync(connection.fd)
