"""Persistent bitmaps that lie: the disk reads as ever, and the bitmap is not used, with a reason.

A bitmap that is believed wrongly means an incremental backup without the blocks that changed. So whatever is wrong
with one must come out before any of its bits is taken for "clean".
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import CorruptImageError, MissingReferenceError, Qcow2Error
from qcow2_plugin.operations.info import info
from tests.support.builder import BuiltImage, ImageBuilder, patch
from tests.support.fields import BITMAPS
from tests.support.hostile import IMAGE, Hostile, assert_harmless_text, check, unharmed

MIB = 1 << 20
CLUSTER = 1 << 16
NAME = b"bad"
QEMU_IS_STRICT = "QEMU opens no image with a bitmap like that; the disk does not need it"


def bitmap(**options: Any) -> Callable[[Path], object]:
    """A disk with one bitmap, of which fields are replaced."""
    return disk().bitmap(NAME, [(0, 1)], literal=True, **options).build


def disk() -> ImageBuilder:
    return ImageBuilder(MIB).data(0, b"data")


def extension(**fields: int) -> Callable[[Path], object]:
    return disk().bitmap(NAME, [(0, 1)]).bitmaps_extension(**fields).build


def table_at(place: Callable[[BuiltImage], int]) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        built = disk().bitmap(NAME, [(0, 1)], literal=True).snapshot(b"1", b"one").build(path)
        patch(path, built.bitmap_entry_offsets[0], struct.pack(">Q", place(built)))

    return make


def bits_at(place: Callable[[BuiltImage], int]) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        built = disk().bitmap(NAME, [(0, 1)], literal=True).snapshot(b"1", b"one").build(path)
        patch(path, built.bitmap_table_offsets[0], struct.pack(">Q", place(built)))

    return make


def directory_at(place: Callable[[BuiltImage], int]) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        built = disk().bitmap(NAME, [(0, 1)], literal=True).build(path)
        (start,) = [offset for type, offset in built.extension_offsets if type == BITMAPS]
        patch(path, start + 8 + 16, struct.pack(">Q", place(built)))

    return make


def twice() -> Callable[[Path], object]:
    return disk().bitmap(NAME, [(0, 1)]).bitmap(NAME, [(5 * CLUSTER, 1)]).build


STRICT = QEMU_IS_STRICT
# The directory cannot be read, so no bitmap is there.
DIRECTORY = [
    Hostile("0 bitmaps", extension(nb_bitmaps=0), differs=STRICT),
    Hostile("2 bitmaps where there is one", extension(nb_bitmaps=2), differs=STRICT),
    Hostile("65536 bitmaps", extension(nb_bitmaps=65536), differs=STRICT),
    Hostile("reserved field set", extension(reserved=1), differs=STRICT),
    Hostile("directory of 0 bytes", extension(directory_size=0), differs=STRICT),
    Hostile("directory of 2^40 bytes", extension(directory_size=1 << 40), differs=STRICT),
    Hostile("directory of 64 MiB past the end", extension(directory_size=1024 * 65535), differs=STRICT),
    Hostile("directory cut short", extension(directory_size=24), differs=STRICT),
    Hostile("directory at 2^40", extension(directory_offset=1 << 40), differs=STRICT),
    Hostile("directory at 2^63", extension(directory_offset=1 << 63), differs=STRICT),
    Hostile("directory at 0", extension(directory_offset=0), differs=STRICT),
    Hostile("directory unaligned", extension(directory_offset=CLUSTER + 512), differs=STRICT),
    Hostile("directory in the L1 table", directory_at(lambda b: b.l1_offset), differs=STRICT),
    Hostile("directory in guest data", directory_at(lambda b: b.data_offsets[0]), differs=STRICT),
    Hostile("extension of 23 bytes", disk().bitmap(NAME).extension(BITMAPS, bytes(23), first=True).build,
            differs=STRICT),
    Hostile("table at 0", bitmap(table_offset=0), differs=STRICT),
    Hostile("table unaligned", bitmap(table_offset=CLUSTER + 8), differs=STRICT),
    Hostile("table at the last cluster of all", bitmap(table_offset=2**64 - CLUSTER), differs=STRICT),
    Hostile("table of 0 entries", bitmap(table_size=0), differs=STRICT),
    Hostile("table of 2^31 entries", bitmap(table_size=1 << 31), differs=STRICT),
    Hostile("4 GiB of extra data", bitmap(extra_data_size=2**32 - 1), differs=STRICT),
    Hostile("name of 0 bytes", bitmap(name_size=0), differs=STRICT),
    Hostile("name of 65535 bytes", bitmap(name_size=65535), differs=STRICT),
    Hostile("a name twice", twice(), differs=STRICT),
]  # fmt: skip
# The directory says why this one must not be used.
ENTRY = [
    Hostile("table of 2 entries", bitmap(table_size=2), differs=STRICT),
    *(Hostile(f"granularity 2^{n}", bitmap(granularity_bits=n), differs=STRICT) for n in (0, 8, 32, 63, 64, 255)),
    Hostile("type 0", bitmap(type=0), differs=STRICT),
    Hostile("type 255", bitmap(type=255), differs=STRICT),
    Hostile("unknown flags", bitmap(flags=1 << 3), differs=STRICT),
    Hostile("all flags", bitmap(flags=2**32 - 1), differs=STRICT),
    Hostile("in use", bitmap(flags=1)),
    Hostile("extra data of an unknown kind", bitmap(extra=b"extra"), differs=STRICT),
]
# Only who looks at the bits can see it.
USE = [
    Hostile("table past the end", bitmap(table_offset=1 << 40)),
    Hostile("bits unaligned", bits_at(lambda b: b.bitmap_data_offsets[0][0] + 512), differs=STRICT),
    Hostile("bits with the flag for all ones", bits_at(lambda b: b.bitmap_data_offsets[0][0] | 1), differs=STRICT),
    Hostile("reserved bits in its table", bits_at(lambda b: b.bitmap_data_offsets[0][0] | 1 << 60), differs=STRICT),
    Hostile("bits past the end", bits_at(lambda b: 1 << 40)),
    Hostile("table in the L1 table", table_at(lambda b: b.l1_offset)),
    Hostile("table in the refcount table", table_at(lambda b: b.refcount_table_offset)),
    Hostile("table in the snapshot table", table_at(lambda b: b.snapshots_offset)),
    Hostile("bits in the L1 table", bits_at(lambda b: b.l1_offset)),
    Hostile("bits in the refcount table", bits_at(lambda b: b.refcount_table_offset)),
    Hostile("bits in the snapshot table", bits_at(lambda b: b.snapshots_offset)),
    Hostile("bits in the bitmap directory", bits_at(lambda b: b.bitmap_directory_offset)),
    Hostile("bits in their own table", bits_at(lambda b: b.bitmap_table_offsets[0])),
]
IMAGES = [*DIRECTORY, *ENTRY, *USE]


@pytest.mark.parametrize("hostile", IMAGES, ids=str)
def test_the_disk_is_read_and_the_bitmap_is_not_used(hostile: Hostile, tmp_path: Path) -> None:
    check(hostile, tmp_path)
    with unharmed(tmp_path), open_image(tmp_path / IMAGE) as image:
        assert image.pread(4, 0) == b"data"
        with pytest.raises(Qcow2Error) as caught:
            list(image.dirty_extents(NAME))
        assert_harmless_text(str(caught.value))
        assert image.pread(4, 0) == b"data"


@pytest.mark.parametrize("hostile", DIRECTORY, ids=str)
def test_info_tells_that_the_bitmaps_cannot_be_read(hostile: Hostile, tmp_path: Path) -> None:
    hostile.make(tmp_path / IMAGE)
    found = info(tmp_path / IMAGE).qcow2
    assert found is not None
    assert not found.bitmaps
    (problem,) = found.problems
    assert "bitmaps cannot be read" in problem or "bitmaps are not listed" in problem


@pytest.mark.parametrize("hostile", ENTRY, ids=str)
def test_info_tells_why_a_bitmap_cannot_be_used(hostile: Hostile, tmp_path: Path) -> None:
    hostile.make(tmp_path / IMAGE)
    found = info(tmp_path / IMAGE).qcow2
    assert found is not None
    assert not found.problems
    (bitmap,) = found.bitmaps
    assert bitmap.unusable


def test_the_bit_without_the_extension_means_no_bitmaps(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    ImageBuilder(MIB, autoclear=1).data(0, b"data").build(path)
    with unharmed(tmp_path), open_image(path) as image:
        assert image.bitmaps() == []
        assert image.pread(4, 0) == b"data"


def test_a_bitmap_after_a_program_that_knows_none_is_gone(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    disk().bitmap(NAME, [(0, 1)]).build(path)
    patch(path, 88, bytes(8))
    with unharmed(tmp_path), open_image(path) as image:
        assert image.bitmaps() == []
        with pytest.raises(MissingReferenceError):
            next(image.dirty_extents(NAME))


def test_a_bad_bitmap_does_not_spoil_its_neighbour(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    image = disk().bitmap(NAME, [(0, 1)], literal=True, flags=1)
    image.bitmap(b"good", [(CLUSTER, 1)], literal=True).build(path)
    with unharmed(tmp_path), open_image(path) as opened:
        (extent,) = opened.dirty_extents("good")
        assert (extent.guest_offset, extent.length) == (CLUSTER, CLUSTER)
        with pytest.raises(CorruptImageError, match="in use"):
            list(opened.dirty_extents(NAME))


@pytest.mark.parametrize(
    "name", [b"\x1b[2J", b"a\r\nb", b"a\0b", b"\x9b", b"\xff\xfe", "\u202e".encode(), b"n" * 1023], ids=repr
)
def test_any_bytes_are_a_name(name: bytes, tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    disk().bitmap(name, [(0, 1)], literal=True).build(path)
    with unharmed(tmp_path), open_image(path) as image:
        assert [bitmap.name for bitmap in image.bitmaps()] == [name]
        assert [extent.length for extent in image.dirty_extents(name)] == [CLUSTER]
        with pytest.raises(MissingReferenceError) as caught:
            list(image.dirty_extents(name + b"\x1b"))
        assert_harmless_text(str(caught.value))
    patch(path, ImageBuilder(MIB).data(0, b"data").bitmap(name, [(0, 1)], literal=True).build(path)
          .bitmap_table_offsets[0], struct.pack(">Q", 1 << 40))  # fmt: skip
    with open_image(path) as image, pytest.raises(Qcow2Error) as truncated:
        list(image.dirty_extents(name))
    assert_harmless_text(str(truncated.value))
