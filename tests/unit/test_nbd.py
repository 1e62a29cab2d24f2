"""Exports, replies of bounded size and the way of a write, without a server."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcow2_plugin import info, open_image
from qcow2_plugin.adapters.command_line import ParameterError
from qcow2_plugin.adapters.nbd import Connection, NotStoredError, Server, WritableConnection
from qcow2_plugin.engine.refcounts import is_preallocated
from qcow2_plugin.errors import CorruptImageError, ImageClosedError, OutOfRangeError, Qcow2Error, ReadOnlyImageError
from qcow2_plugin.storage.file import FileStorage
from tests.support.builder import ImageBuilder, patch, set_field
from tests.support.watching import no_descriptor_left

MIB = 1 << 20
CLUSTER = 65536


@contextmanager
def serving(path: Path, *, writable: bool = False, told: list[int] | None = None) -> Iterator[Server]:
    """An open server; the errno that it tells of each failure goes into `told`."""
    server = Server((list[int]() if told is None else told).append, int, read_only=not writable)
    server.configure("file", str(path))
    server.open()
    try:
        yield server
    finally:
        server.close()


def test_no_listed_name_is_longer_than_nbd_allows(tmp_path: Path) -> None:
    path = tmp_path / "image"
    for count, listed in ((1020, True), (1025, False)):
        ImageBuilder(MIB).snapshot("\U0001f600".encode() * count, b"name").build(path)
        with serving(path) as server:
            names = [name for name, _ in server.exports()]
            assert len(names) == 1 + listed
            assert all(len(name.encode()) <= 4096 for name in names)


def test_a_broken_snapshot_table_does_not_keep_the_disk_from_being_listed(tmp_path: Path) -> None:
    path = tmp_path / "image"
    built = ImageBuilder(MIB).snapshot(b"1", b"name").build(path)
    with serving(path) as server:
        assert [name for name, _ in server.exports()] == ["", "snapshot=1"]
    patch(path, built.snapshots_offset + 12, b"\xff" * 8)  # lengths of ID and name, past the end of the file
    with serving(path) as server:
        assert [name for name, _ in server.exports()] == [""]


def test_a_reply_looks_at_a_bounded_number_of_tables(tmp_path: Path) -> None:
    path = tmp_path / "image"
    coverage = 64 * 512
    ImageBuilder(8192 * coverage, cluster_bits=9).build(path)
    with serving(path) as server:
        connection = server.connect("")
        assert connection.states(0, 8192 * coverage, only_first=False) == [(0, 4096 * coverage, 3)]
        connection.close()


def test_of_a_long_hint_only_the_beginning_is_taken(tmp_path: Path) -> None:
    hinted: list[tuple[int, int]] = []

    class Watched(FileStorage):
        """Tells what was hinted at."""

        __slots__ = ()

        def prefetch(self, offset: int, length: int) -> None:
            """Remember it."""
            hinted.append((offset, length))

    path = tmp_path / "image"
    ImageBuilder(256 * MIB).data(0, b"x").data(16 * 64, b"x").data(16 * 65, b"x").build(path)
    with open_image(path) as image:
        storage = image.layer.storage
        assert isinstance(storage, FileStorage)
        storage.__class__ = Watched
        image.prefetch(0, 256 * MIB)
        assert len(hinted) == 1
        image.prefetch(64 * MIB, 256 * MIB - 64 * MIB)
        assert len(hinted) == 3


def test_listing_takes_no_more_than_a_piece_of_a_huge_snapshot_table(tmp_path: Path) -> None:
    path = tmp_path / "image"
    ImageBuilder(MIB).build(path)
    entry = struct.pack(">QIHHIIQII", 1 << 16, 1, 65535, 65535, 0, 0, 0, 0, 0).ljust(40 + 2 * 65535 + 2, b"n")
    with path.open("r+b") as file:
        file.seek(MIB)
        file.write(entry * 500)
    set_field(path, "nb_snapshots", 500)
    set_field(path, "snapshots_offset", MIB)
    tracemalloc.start()
    try:
        found = info(path).qcow2
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found is not None
    assert 0 < len(found.snapshots) < found.snapshot_count == 500
    assert peak < 32 * MIB


def test_a_file_that_ends_inside_its_refcount_table_can_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "image"
    built = ImageBuilder(MIB, pack=False).data(0, b"x").build(path)
    with path.open("r+b") as file:
        file.truncate(built.refcount_table_offset + 3)
    with open_image(path, allow_damaged=True) as image:
        assert not is_preallocated(image.header, image.layer.storage)


# -- errors --


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "quota"), errno.ENOSPC),
        (OSError(errno.EFBIG, "limit"), errno.ENOSPC),
        (OSError(errno.EIO, "bad sector"), errno.EIO),
        (OSError(errno.EBADF, "closed"), errno.EIO),
        (OSError(errno.ESTALE, "gone"), errno.EIO),
        (OSError(errno.EROFS, "read-only"), errno.EPERM),
        (OSError(errno.EACCES, "denied"), errno.EPERM),
        (OSError(errno.ENOTSUP, "slow"), errno.ENOTSUP),
        (OSError("without a number"), errno.EIO),
        (MemoryError(), errno.ENOMEM),
        (ReadOnlyImageError("no"), errno.EPERM),
        (OutOfRangeError("no"), errno.EINVAL),
        (ImageClosedError("no"), errno.ESHUTDOWN),
        (CorruptImageError("L2 table", "no"), errno.EIO),
        (NotStoredError("no"), errno.EIO),
        (ZeroDivisionError(), errno.EIO),
    ],
    ids=repr,
)
def test_errors_reach_the_client_as_what_nbd_can_say(error: Exception, number: int) -> None:
    told: list[int] = []
    Server(told.append, int).report(error)
    assert told == [number]


def test_nothing_is_served_before_the_image_is_open() -> None:
    told: list[int] = []
    server = Server(told.append, int)
    server.close()
    with pytest.raises(ImageClosedError):
        server.connect("")
    with pytest.raises(ImageClosedError):
        server.exports()
    assert told == [errno.ESHUTDOWN, errno.ESHUTDOWN]


# -- writing --


@contextmanager
def connected(server: Server) -> Iterator[WritableConnection]:
    connection = server.connect("")
    assert isinstance(connection, WritableConnection)
    try:
        yield connection
    finally:
        connection.close()


def read(connection: Connection, length: int, offset: int) -> bytes:
    buffer = bytearray(length)
    connection.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def write(connection: WritableConnection, data: bytes, offset: int, *, durable: bool = False) -> None:
    """As nbdkit does: its memory is gone when the call returns."""
    memory = bytearray(data)
    connection.write_from(memoryview(memory).toreadonly(), offset, durable)
    memory.clear()  # fails if anybody holds on to it


def on_disk(path: Path, length: int, offset: int) -> bytes:
    """What would be read after a crash now."""
    copy = shutil.copy(path, path.with_suffix(".copy"))
    with open_image(copy) as image:
        return image.pread(length, offset)


def test_the_disk_is_written_through_any_connection(tmp_path: Path) -> None:
    path = tmp_path / "image"
    ImageBuilder(MIB).data(0, b"a" * CLUSTER).data(3, b"c" * CLUSTER).build(path)
    with serving(path, writable=True) as server, connected(server) as first, connected(server) as second:
        write(first, b"b" * 1000, 500)
        assert read(second, 1002, 499) == b"a" + b"b" * 1000 + b"a"
        write(first, b"new", 5 * CLUSTER + 1)
        assert on_disk(path, 3, 5 * CLUSTER + 1) == bytes(3)
        second.flush()
        assert on_disk(path, 3, 5 * CLUSTER + 1) == b"new"
        write(first, b"durable", 7 * CLUSTER, durable=True)
        assert on_disk(path, 7, 7 * CLUSTER) == b"durable"
        second.write_zeroes(CLUSTER - 1, CLUSTER, may_unmap=True, only_fast=False, durable=True)
        assert on_disk(path, 2, CLUSTER - 2) == b"a\0"
        second.discard(3 * CLUSTER, CLUSTER, durable=False)
        assert read(first, CLUSTER, 3 * CLUSTER) == bytes(CLUSTER)
        second.discard(7 * CLUSTER, CLUSTER, durable=True)
        assert on_disk(path, 7, 7 * CLUSTER) == bytes(7)
        assert first.states(3 * CLUSTER, CLUSTER, only_first=False) == [(3 * CLUSTER, CLUSTER, 3)]
    with open_image(path) as image:
        assert image.pread(3, 5 * CLUSTER + 1) == b"new"


def test_a_failing_request_is_told_and_hurts_nobody(tmp_path: Path) -> None:
    path, told = tmp_path / "image", list[int]()
    ImageBuilder(MIB).data(0, b"a").entry(1, 0x50200).build(path)
    with serving(path, writable=True, told=told) as server, connected(server) as connection:
        with pytest.raises(CorruptImageError):
            write(connection, b"x", CLUSTER)
        with pytest.raises(OutOfRangeError):
            write(connection, b"xx", MIB - 1)
        with pytest.raises(OutOfRangeError):
            connection.discard(MIB, 1, durable=True)
        with pytest.raises(OSError, match="not supported"):
            connection.write_zeroes(0, 1, may_unmap=True, only_fast=True, durable=False)
        assert told == [errno.EIO, errno.EINVAL, errno.EINVAL, errno.ENOTSUP]
        assert read(connection, 1, 0) == b"a"


def test_snapshots_and_bitmaps_are_never_written_to(tmp_path: Path) -> None:
    path = tmp_path / "image"
    built = ImageBuilder(MIB).data(0, b"now").snapshot(b"1", b"name").bitmap(b"off", [(0, 1)])
    built.build(path)
    with serving(path, writable=True) as server:
        for name in ("snapshot=1", "bitmap=off"):
            connection = server.connect(name)
            assert type(connection) is Connection
            assert not connection.writable
            connection.close()
        assert [name for name, _ in server.exports()] == ["", "snapshot=1", "bitmap=off"]
        assert server.description("") == "image, writable"
    with serving(path) as server:
        assert type(server.connect("")) is Connection


def test_an_enabled_bitmap_is_no_export_of_a_writable_image(tmp_path: Path) -> None:
    path = tmp_path / "image"
    ImageBuilder(MIB).data(0, b"now").bitmap(b"on", [(0, 1)], flags=2).build(path)
    with serving(path, writable=True) as server:
        assert [name for name, _ in server.exports()] == [""]
        with pytest.raises(ParameterError, match='bitmap "on" records what is written'):
            server.connect("bitmap=on")
    with serving(path) as server:
        assert [name for name, _ in server.exports()] == ["", "bitmap=on"]
        server.connect("bitmap=on").close()


@pytest.mark.parametrize("noticed", [False, True])
def test_what_cannot_be_stored_at_the_end_is_told(noticed: bool, tmp_path: Path) -> None:
    path, told = tmp_path / "image", list[int]()
    ImageBuilder(MIB).data(0, b"a").build(path)
    server = Server(told.append, int, read_only=False)
    server.configure("file", str(path))
    with no_descriptor_left():
        server.open()
        with connected(server) as connection:
            write(connection, b"x" * MIB, 0)
            os.truncate(path, 512)
            if noticed:
                with pytest.raises(Qcow2Error):
                    connection.flush()
        with pytest.raises(NotStoredError, match="what was written after the last flush may be lost"):
            server.close()
    assert told == [errno.EIO] * (2 if noticed else 1)
