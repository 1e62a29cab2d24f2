"""Snapshot tables that lie: the active disk reads as ever, the list is bounded, and using a bad entry is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import CorruptImageError, MissingReferenceError, Qcow2Error, TruncatedImageError
from qcow2_plugin.operations.info import info
from qcow2_plugin.operations.snapshots import list_snapshots
from tests.support.builder import BuiltImage, ImageBuilder, patch, set_field
from tests.support.hostile import IMAGE, Hostile, assert_harmless_text, bounded, check, unharmed

MIB = 1 << 20
CLUSTER = 1 << 16
NAMES = [b"\x1b[2J", b"\r\n", b"\x9b31m", b"\xff\xfe", "\u202e".encode(), b"\0", b"", b"\\", b"n" * 65535]


def disk() -> ImageBuilder:
    return ImageBuilder(MIB).data(0, b"now")


def snapshot(**options: Any) -> Callable[[Path], object]:
    """A disk with a sound snapshot "1" and then a second one, of which fields are replaced."""
    return two_snapshots(**options).build


def pointing(place: Callable[[BuiltImage], int]) -> Callable[[Path], object]:
    """The second snapshot's L1 table is somewhere else."""

    def make(path: Path) -> None:
        built = two_snapshots().build(path)
        patch(path, built.snapshot_entry_offsets[1], struct.pack(">Q", place(built)))

    return make


def two_snapshots(**options: Any) -> ImageBuilder:
    image = disk()
    image.snapshot(b"1", b"sound", image.map().data(0, b"before"))
    return image.snapshot(b"2", b"bad", image.map().data(0, b"long before"), **options)


def extra(virtual_size: int) -> bytes:
    return struct.pack(">QQQ", 0, virtual_size, 2**64 - 1)


AT_OPEN = "QEMU opens no image whose snapshot table is bad; the active disk does not need it"
# Field by field: what a table does to the active disk (nothing), to the list, and to the use of the snapshot.
FIELDS: list[tuple[Hostile, type[Qcow2Error] | None, type[Qcow2Error] | None]] = [
    (Hostile("L1 table of 2^32-1 entries", snapshot(l1_size=2**32 - 1)), None, CorruptImageError),
    (Hostile("L1 table of 4 Mi + 1 entries", snapshot(l1_size=(4 << 20) + 1)), None, CorruptImageError),
    (Hostile("L1 table of 4 Mi entries past the end", snapshot(l1_size=4 << 20)), None, TruncatedImageError),
    (Hostile("L1 table of 0 entries", snapshot(l1_size=0)), None, CorruptImageError),
    (Hostile("L1 table at 2^62", snapshot(l1_table_offset=1 << 62)), None, TruncatedImageError),
    (Hostile("L1 table at 2^63", snapshot(l1_table_offset=1 << 63)), None, Qcow2Error),
    (Hostile("L1 table at the last cluster of all", snapshot(l1_table_offset=2**64 - CLUSTER)), None, Qcow2Error),
    (Hostile("L1 table unaligned", snapshot(l1_table_offset=CLUSTER + 512)), None, CorruptImageError),
    (Hostile("L1 table at 0", snapshot(l1_table_offset=0)), None, CorruptImageError),
    (Hostile("disk of 2^64-1 bytes", snapshot(extra=extra(2**64 - 1))), None, CorruptImageError),
    (Hostile("disk larger than its L1 table", snapshot(extra=extra(1 << 40))), None, CorruptImageError),
    (Hostile("disk of 0 bytes", snapshot(extra=extra(0))), None, None),
    (Hostile("ID of 65535 bytes, whatever they are", snapshot(id_size=65535)), None, MissingReferenceError),
    (Hostile("name of 65535 bytes, whatever they are", snapshot(name_size=65535)), None, None),
    (Hostile("4 GiB of extra data", snapshot(extra_data_size=2**32 - 1), differs=AT_OPEN), CorruptImageError, None),
    (Hostile("1025 bytes of extra data", snapshot(extra_data_size=1025), differs=AT_OPEN), CorruptImageError, None),
    (Hostile("1024 bytes of extra data", snapshot(extra=extra(MIB) + bytes(1000))), None, None),
    (Hostile("no extra data", snapshot(extra=b"")), None, None),
    (Hostile("dates at the end of time", snapshot(date_sec=2**32 - 1, date_nsec=2**32 - 1, vm_clock_nsec=2**64 - 1)),
     None, None),
]  # fmt: skip
PLACES = [
    Hostile("the header's L1 table", pointing(lambda b: b.l1_offset)),
    Hostile("another snapshot's", pointing(lambda b: b.snapshots[0].l1_offset)),
    Hostile("the refcount table", pointing(lambda b: b.refcount_table_offset)),
    Hostile("the snapshot table", pointing(lambda b: b.snapshots_offset)),
    Hostile("an L2 table", pointing(lambda b: b.l2_offsets[0])),
]
IMAGES = [*(hostile for hostile, *_ in FIELDS), *PLACES]


@pytest.mark.parametrize(("hostile", "listing", "using"), FIELDS, ids=[str(each[0]) for each in FIELDS])
def test_entry(
    hostile: Hostile, listing: type[Qcow2Error] | None, using: type[Qcow2Error] | None, tmp_path: Path
) -> None:
    check(hostile, tmp_path)  # the active disk reads as ever
    path = tmp_path / IMAGE
    with unharmed(tmp_path), open_image(path) as image:
        expect(listing, image.snapshots)
        expect(listing or using, lambda: image.at_snapshot("2").pread(512, 0) if using else image.at_snapshot("2"))
        if listing is None:
            assert image.at_snapshot("1").pread(6, 0) == b"before"
        assert image.pread(3, 0) == b"now"
    with unharmed(tmp_path):
        expect(listing or using, lambda: open_image(path, snapshot="2").close())
    found = info(path).qcow2
    assert found is not None
    assert bool(found.problems) == (listing is not None)


@pytest.mark.parametrize(("hostile", "listing", "using"), FIELDS, ids=[str(each[0]) for each in FIELDS])
def test_entry_of_an_image_known_to_be_damaged(
    hostile: Hostile, listing: type[Qcow2Error] | None, using: type[Qcow2Error] | None, tmp_path: Path
) -> None:
    path = tmp_path / IMAGE
    hostile.make(path)
    with unharmed(tmp_path), open_image(path, allow_damaged=True) as image:
        assert image.pread(3, 0) == b"now"
        for wanted in ("1", "2"):
            try:
                kept = image.at_snapshot(wanted)
                kept.pread(kept.virtual_size, 0)
            except Qcow2Error as error:  # anything else is a failure
                assert_harmless_text(str(error))
                assert wanted == "2" or listing


@pytest.mark.parametrize("hostile", PLACES, ids=str)
def test_an_l1_table_in_the_place_of(hostile: Hostile, tmp_path: Path) -> None:
    """It is read as what it is found to be, without harm."""
    check(hostile, tmp_path)
    with unharmed(tmp_path), open_image(tmp_path / IMAGE) as image:
        try:
            image.at_snapshot("2").pread(MIB, 0)
        except Qcow2Error as error:
            assert_harmless_text(str(error))
        assert image.at_snapshot("1").pread(6, 0) == b"before"


def test_an_entry_made_of_nothing_is_no_snapshot(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    disk().snapshot(b"1", b"one").build(path)
    set_field(path, "nb_snapshots", 2)
    with unharmed(tmp_path), open_image(path) as image:
        assert image.pread(3, 0) == b"now"
        with pytest.raises(CorruptImageError):
            image.at_snapshot(b"")


def test_a_table_that_cannot_be_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    disk().snapshot(b"1", b"one").build(path)
    set_field(path, "nb_snapshots", 65536)
    with unharmed(tmp_path), pytest.raises(TruncatedImageError):
        open_image(path)
    with unharmed(tmp_path, seconds=3, memory=64 << 20), open_image(path, allow_damaged=True) as image:
        assert image.pread(3, 0) == b"now"
        with pytest.raises(Qcow2Error):
            image.snapshots()


@pytest.mark.parametrize("sizes", [(65535, 0), (0, 65535), (65535, 65535), (1, 0)])
def test_an_entry_that_runs_past_the_end(sizes: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    disk().snapshot(b"1", b"one").build(path)
    end = path.stat().st_size
    with open(path, "ab") as file:
        file.write(struct.pack(">QIHHIIQII", CLUSTER, 1, *sizes, 0, 0, 0, 0, 0))
    set_field(path, "snapshots_offset", end)
    with unharmed(tmp_path), open_image(path) as image:
        assert image.pread(3, 0) == b"now"
        with pytest.raises(TruncatedImageError, match="entry 0 of 1"):
            image.snapshots()
    with unharmed(tmp_path), pytest.raises(TruncatedImageError):
        open_image(path, snapshot="1")


def many_with_one_l1_table(path: Path) -> None:
    """65536 entries at the end of the file that cost an attacker 40 bytes each."""
    built = disk().snapshot(b"", b"").build(path)
    size = path.stat().st_size
    end = -(-size // CLUSTER) * CLUSTER
    entry = struct.pack(">QIHHIIQII", built.snapshots[0].l1_offset, 1, 0, 0, 0, 0, 0, 0, 0)
    with open(path, "r+b") as file:
        file.seek(end)
        file.write(entry * 65536)
    set_field(path, "nb_snapshots", 65536)
    set_field(path, "snapshots_offset", end)


def test_the_list_of_65536_snapshots_is_quick(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    many_with_one_l1_table(path)
    with unharmed(tmp_path, seconds=0.5), open_image(path) as image:
        assert image.pread(3, 0) == b"now"
    with open_image(path) as image, bounded(seconds=3, memory=64 << 20):  # tracing memory makes it slow
        assert len(image.snapshots()) == 65536
    with unharmed(tmp_path, seconds=0.5, memory=4 << 20):
        found = info(path).qcow2
    assert found is not None
    assert (len(found.snapshots), found.snapshot_count) == (4096, 65536)


def test_an_l1_table_is_not_read_for_every_snapshot_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    many_with_one_l1_table(path)
    with unharmed(tmp_path, seconds=10), pytest.raises(CorruptImageError, match="overlaps that of another"):
        list_snapshots(path, with_sizes=True)


def test_ids_may_be_there_twice(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    image = disk()
    image.snapshot(b"1", b"a", image.map().data(0, b"first")).snapshot(b"1", b"b", image.map().data(0, b"second"))
    image.build(path)
    with unharmed(tmp_path), open_image(path) as opened:
        assert opened.at_snapshot("1").pread(6, 0) == b"first\0"
        assert opened.at_snapshot("b").pread(6, 0) == b"second"
        assert [each.id for each in opened.snapshots()] == [b"1", b"1"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_any_bytes_are_a_name(name: bytes, tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    image = disk()
    image.snapshot(name, b"name", image.map().data(0, b"by id")).snapshot(b"2", name, image.map().data(0, b"by name"))
    image.build(path)
    with unharmed(tmp_path), open_image(path) as opened:
        first, second = opened.snapshots()
        assert (first.id, second.name) == (name, name)
        assert opened.at_snapshot(name).pread(5, 0) == b"by id"
    with unharmed(tmp_path), open_image(path, snapshot=name) as opened:
        assert opened.pread(5, 0) == b"by id"
    with unharmed(tmp_path), pytest.raises(MissingReferenceError) as caught:
        open_image(path, snapshot=name + b"no\x1b")
    assert_harmless_text(str(caught.value))


def expect(error: type[Qcow2Error] | None, call: Callable[[], object]) -> None:
    if error is None:
        call()
        return
    with pytest.raises(error) as caught:
        call()
    assert_harmless_text(str(caught.value))
