"""Exports and replies of bounded size, without a server."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qcow2_plugin import info, open_image
from qcow2_plugin.adapters.nbd import Server
from qcow2_plugin.engine.refcounts import is_preallocated
from qcow2_plugin.storage.file import FileStorage
from tests.support.builder import ImageBuilder, patch, set_field

MIB = 1 << 20


@contextmanager
def serving(path: Path) -> Iterator[Server]:
    server = Server(lambda number: None, int)
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
