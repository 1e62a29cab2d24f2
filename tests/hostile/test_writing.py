"""Writing to images that lie: what a change would damage or rely on must stop it.

A request that meets a lie fails with an error of ours, and the image is marked corrupt if the lie is about what would
be written to. Either way no structure of the image and no cluster of somebody else has changed by then. What a lie
does not touch can still be written to. Time and memory stay within bounds, whatever is claimed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.engine.image import Image
from qcow2_plugin.engine.writable import WritableImage
from qcow2_plugin.errors import (
    CorruptImageError,
    Qcow2Error,
    ReferenceDeniedError,
    ResizeError,
    TruncatedImageError,
    UnsupportedFeatureError,
)
from qcow2_plugin.operations.resize import resize
from tests.support.builder import BuiltImage, ImageBuilder, huge_empty, patch, set_field, shared_l2_bomb
from tests.support.fields import COPIED, ZERO
from tests.support.hostile import IMAGE, assert_harmless_text, bounded, unharmed
from tests.support.image_checker import CORRUPT
from tests.support.in_memory import open_in_memory
from tests.support.memory_storage import MemoryStorage

CLUSTER = 1 << 16
MIB = 1 << 20
PIB = 1 << 50
RESERVED = 0x7F << 56 | 0x1FE
MARK = range(72, 80)  # bytes of the header that may change when an image is marked corrupt

Change = Callable[[Image], None]
CHANGES: dict[str, Change] = {
    "part": lambda image: image.pwrite(b"x" * 700, 100),
    "whole": lambda image: image.pwrite(b"x" * CLUSTER, 0),
    "zero": lambda image: image.write_zeroes(0, CLUSTER),
    "keep": lambda image: image.write_zeroes(0, CLUSTER, may_unmap=False),
    "discard": lambda image: image.discard(0, CLUSTER),
}


def crowded() -> ImageBuilder:
    """An image that has every structure, so that each can be aimed at; no bitmap follows the disk."""
    image = ImageBuilder(MIB).data(0, b"first").data(3, b"other").compressed(5, b"compressed")
    image.snapshot(b"1", b"one", image.map().data(0, b"before"))
    return image.bitmap(b"bitmap", [(0, 1)], literal=True)


TARGETS: dict[str, Callable[[BuiltImage], int]] = {
    "L1 table": lambda built: built.l1_offset,
    "L2 table": lambda built: built.l2_offsets[0],
    "refcount table": lambda built: built.refcount_table_offset,
    "refcount block": lambda built: built.refcount_block_offsets[0],
    "snapshot table": lambda built: built.snapshots_offset,
    "snapshot L1 table": lambda built: built.snapshots[0].l1_offset,
    "snapshot L2 table": lambda built: built.snapshots[0].l2_offsets[0],
    "bitmap directory": lambda built: built.bitmap_directory_offset,
    "bitmap table": lambda built: built.bitmap_table_offsets[0],
    "bits": lambda built: built.bitmap_data_offsets[0][0],
}


def attempt(path: Path, change: Change) -> Qcow2Error | None:
    """Open the image, change it, store that; what came of it. Errors that are not ours pass."""
    try:
        with open_image(path, writable=True) as image:
            change(image)
            image.flush()
    except Qcow2Error as error:
        assert_harmless_text(str(error))
        return error
    return None


def put_entry(path: Path, place: int, word: int) -> None:
    patch(path, place, struct.pack(">Q", word))


def is_marked(content: bytes) -> bool:
    (features,) = struct.unpack_from(">Q", content, 72)
    return bool(features & CORRUPT)


def assert_only_marked(before: bytes, after: bytes, *, may_grow: bool = False) -> None:
    """Nothing that was there has changed but for the mark, which is set."""
    assert is_marked(after)
    assert len(after) == len(before) or may_grow
    different = [index for index, (old, new) in enumerate(zip(before, after, strict=False)) if old != new]
    assert set(different) <= set(MARK), f"{len(different)} bytes have changed, from {different[:5]}"


def structures(built: BuiltImage, content: bytes, *, but: int = -1) -> dict[str, bytes]:
    """What is in the clusters of the structures, but for the one at a host offset and the mark."""
    found = {"header": content[: MARK.start] + content[MARK.stop : CLUSTER]}
    for name, place in TARGETS.items():
        if place(built) != but:
            found[name] = content[place(built) : place(built) + CLUSTER]
    return found


# ---- entries that point where they must not


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("copied", [COPIED, 0])
@pytest.mark.parametrize("target", TARGETS)
def test_an_l2_entry_that_points_to_a_structure(tmp_path: Path, target: str, copied: int, change: str) -> None:
    path = tmp_path / IMAGE
    built = crowded().build(path)
    put_entry(path, built.l2_entry_offset(0), copied | TARGETS[target](built))
    before = path.read_bytes()
    error = attempt(path, CHANGES[change])
    after = path.read_bytes()
    if change == "keep" and error is None:  # the entry says zero now, and writes to it are refused as ever
        assert structures(built, after, but=built.l2_offsets[0]) == structures(built, before, but=built.l2_offsets[0])
        error = attempt(path, CHANGES["part"])
        before, after = after, path.read_bytes()
    assert isinstance(error, CorruptImageError)
    assert_only_marked(before, after, may_grow=True)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("flags", [0, COPIED, ZERO, COPIED | ZERO])
@pytest.mark.parametrize("place", [PIB, (1 << 56) - CLUSTER, "end of file"])
def test_an_l2_entry_that_points_past_the_end(tmp_path: Path, place: int | str, flags: int, change: str) -> None:
    """Nothing grows to that size, and the entry is not followed."""
    path = tmp_path / IMAGE
    built = crowded().build(path)
    size = path.stat().st_size
    host_offset = size if isinstance(place, str) else place
    put_entry(path, built.l2_entry_offset(0), flags | host_offset)
    before = path.read_bytes()
    error = attempt(path, CHANGES[change])
    after = path.read_bytes()
    assert len(after) <= size + 4 * CLUSTER
    if error is None:
        assert structures(built, after, but=built.l2_offsets[0]).keys() == structures(built, before).keys() - {
            "L2 table"
        }
        for name in ("L1 table", "snapshot L2 table", "snapshot L1 table", "bits", "bitmap table"):
            assert structures(built, after)[name] == structures(built, before)[name]
    else:
        assert isinstance(error, (CorruptImageError, TruncatedImageError))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("entry", [1 << 9, COPIED | 1 << 9, COPIED | CLUSTER + 512, RESERVED, COPIED | RESERVED])
def test_an_l2_entry_that_is_no_place(tmp_path: Path, entry: int, change: str) -> None:
    path = tmp_path / IMAGE
    built = crowded().build(path)
    put_entry(path, built.l2_entry_offset(0), entry)
    before = path.read_bytes()
    error = attempt(path, CHANGES[change])
    assert error is None or isinstance(error, (CorruptImageError, TruncatedImageError))
    if error is not None:
        assert structures(built, path.read_bytes()) == structures(built, before)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("target", ["COPIED alone", "unaligned", "past the end", "1 PiB", *TARGETS])
def test_an_l1_entry_that_names_no_table(tmp_path: Path, target: str, change: str) -> None:
    path = tmp_path / IMAGE
    built = crowded().build(path)
    size = path.stat().st_size
    words = {"COPIED alone": 0, "unaligned": built.l2_offsets[0] + 512, "past the end": size, "1 PiB": PIB}
    place = words[target] if target in words else TARGETS[target](built)
    if target == "L2 table":
        place = built.data_offsets[0]  # the one that it names is right; this one is guest data
    put_entry(path, built.l1_offset, COPIED | place)
    before = path.read_bytes()
    error = attempt(path, CHANGES[change])
    after = path.read_bytes()
    if target != "L2 table" or error is not None:
        assert isinstance(error, (CorruptImageError, TruncatedImageError))
        assert after == before or is_marked(after)
    assert structures(built, after, but=place) == structures(built, before, but=place)


# ---- refcounts that lie


@pytest.mark.parametrize("structure", ["header", *TARGETS])
def test_a_structure_without_a_refcount_is_never_handed_out(tmp_path: Path, structure: str) -> None:
    path = tmp_path / IMAGE
    image = crowded()
    built = image.build(path)
    place = 0 if structure == "header" else TARGETS[structure](built)
    image.refcount(place // CLUSTER, 0).build(path)
    before = path.read_bytes()
    error = attempt(path, lambda image: image.pwrite(b"x" * CLUSTER, 7 * CLUSTER))
    assert isinstance(error, CorruptImageError)
    assert_only_marked(before, path.read_bytes())


def test_a_refcount_block_of_zeros(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    built = crowded().build(path)
    patch(path, built.refcount_block_offsets[0], bytes(CLUSTER))
    before = path.read_bytes()
    error = attempt(path, lambda image: image.pwrite(b"x" * 10, 7 * CLUSTER))
    assert isinstance(error, CorruptImageError)
    assert_only_marked(before, path.read_bytes())


@pytest.mark.parametrize("change", ["part", "whole"])
@pytest.mark.parametrize("refcount", [0, 2, 0xFFFF])
@pytest.mark.parametrize("shared", ["cluster", "table"])
def test_copied_is_not_believed_without_the_refcount(tmp_path: Path, shared: str, refcount: int, change: str) -> None:
    path = tmp_path / IMAGE
    image = ImageBuilder(MIB).data(0, b"first", copied=True)
    if refcount:
        image.snapshot(b"1", b"one")
    built = image.build(path)
    if shared == "table":
        put_entry(path, built.l2_entry_offset(0), 0)
        place = built.l2_offsets[0]
    else:
        place = built.data_offsets[0]
    built = image.refcount(place // CLUSTER, refcount).build(path)
    if shared == "table":
        put_entry(path, built.l2_entry_offset(0), 0)  # so that the table has to change
    put_entry(path, built.l1_offset, COPIED | built.l2_offsets[0])
    if shared == "cluster":  # the table is ours
        data = bytearray(path.read_bytes())
        block, order = built.refcount_block_offsets[0], 2
        struct.pack_into(">H", data, block + order * (built.l2_offsets[0] // CLUSTER), 1)
        path.write_bytes(data)
    before = path.read_bytes()
    error = attempt(path, CHANGES[change])
    assert isinstance(error, CorruptImageError)
    after = path.read_bytes()
    if after != before:  # else it was refused when it was opened
        assert_only_marked(before, after, may_grow=True)


def test_a_huge_refcount(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    image = ImageBuilder(MIB, refcount_bits=64).data(0, b"first", copied=True).data(1, b"second", copied=False)
    built = image.build(path)
    for cluster in (0, 1):
        image.refcount(built.data_offsets[cluster] // CLUSTER, (1 << 64) - 1)
    built = image.build(path)
    assert attempt(path, lambda image: image.pwrite(b"x", CLUSTER)) is None
    content = path.read_bytes()
    assert content[built.data_offsets[1] :][:6] == b"second"
    assert isinstance(attempt(path, CHANGES["part"]), CorruptImageError)
    assert_only_marked(content, path.read_bytes())


# ---- several names for one place

SMALL = 512
SMALL_TABLE = SMALL * SMALL // 8  # guest bytes below one L2 table


@pytest.mark.parametrize("second", [1, 64])
def test_two_entries_that_share_a_cluster_do_not_open_a_table_to_the_guest(tmp_path: Path, second: int) -> None:
    """One of them gives the cluster back, a table gets its place, and the other one still points there."""
    path = tmp_path / IMAGE
    built = ImageBuilder(64 * SMALL_TABLE, 9).data(0, b"shared").data(2, b"").data(66, b"").build(path)
    put_entry(path, built.l2_entry_offset(second), COPIED | built.data_offsets[0])
    with open_image(path, writable=True) as image:
        try:
            image.pwrite(b"x" * SMALL, second * SMALL)
            image.discard(0, SMALL)
            image.flush()
            for number in range(10, 30):
                image.pwrite(number.to_bytes(1, "big") * SMALL, number * SMALL_TABLE)
            image.flush()
            image.pwrite(b"\xff" * SMALL, second * SMALL)
        except CorruptImageError:
            return
    with open_image(path) as image:
        for number in range(10, 30):
            assert image.pread(SMALL, number * SMALL_TABLE) == number.to_bytes(1, "big") * SMALL


def test_two_l1_entries_that_share_a_table_do_not_open_a_table_to_the_guest(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    built = ImageBuilder(64 * SMALL_TABLE, 9).data(0, b"shared").data(2, b"").build(path)
    put_entry(path, built.l1_entry_offset(1), COPIED | built.l2_offsets[0])
    try:
        with open_image(path, writable=True) as image:
            image.pwrite(b"x" * SMALL, SMALL_TABLE)
            image.discard(0, SMALL)
            image.flush()
            for number in range(10, 30):
                image.pwrite(number.to_bytes(1, "big") * SMALL, number * SMALL_TABLE)
            image.flush()
            image.pwrite(b"\xff" * SMALL, SMALL_TABLE)
    except CorruptImageError:
        return
    with open_image(path) as image:
        for number in range(10, 30):
            assert image.pread(SMALL, number * SMALL_TABLE) == number.to_bytes(1, "big") * SMALL


# ---- tables where none can be: refused before anything is written

Lie = Callable[[Path, BuiltImage], None]
Place = Callable[[BuiltImage], int]


def header_field(name: str, value: Place) -> Lie:
    return lambda path, built: set_field(path, name, value(built))


def word(where: Place, value: Place) -> Lie:
    return lambda path, built: put_entry(path, where(built), value(built))


def constant(number: int) -> Place:
    return lambda built: number


PLACES: dict[str, Place] = {
    **TARGETS,
    "header": constant(0),
    "unaligned": lambda built: built.l2_offsets[0] + 512,
    "past the end": lambda built: built.file_size,
    "1 PiB": constant(PIB),
}
LIES: dict[str, Lie] = {}
for _name, _place in PLACES.items():
    if _name not in ("L1 table", "bits"):  # where nothing but the length of the L1 table would be a lie
        LIES[f"L1 table at {_name}"] = header_field("l1_table_offset", _place)
    if _name != "refcount table":
        LIES[f"refcount table at {_name}"] = header_field("refcount_table_offset", _place)
    if _name != "snapshot table":
        LIES[f"snapshot table at {_name}"] = header_field("snapshots_offset", _place)
    if _name not in ("refcount block", "header"):  # 0 says that there is none
        LIES[f"refcount block at {_name}"] = word(TARGETS["refcount table"], _place)
    if _name not in ("snapshot L1 table", "snapshot L2 table"):  # a table of tables is one of data, one level up
        LIES[f"snapshot L1 table at {_name}"] = word(lambda built: built.snapshot_entry_offsets[0], _place)
    if _name != "bitmap table":
        LIES[f"bitmap table at {_name}"] = word(lambda built: built.bitmap_entry_offsets[0], _place)
    if _name not in ("bits", "header"):
        LIES[f"bits at {_name}"] = word(TARGETS["bitmap table"], _place)
for _count in (0, 128, 129, (1 << 32) - 1):
    LIES[f"refcount table of {_count} clusters"] = header_field("refcount_table_clusters", constant(_count))
for _count in (0, 4 << 20, (4 << 20) + 1, (1 << 32) - 1):
    LIES[f"L1 table of {_count} entries"] = header_field("l1_size", constant(_count))
LIES["one refcount block, named twice"] = word(
    lambda built: built.refcount_table_offset + 8, lambda built: built.refcount_block_offsets[0]
)


@pytest.mark.parametrize("lie", LIES)
def test_an_image_that_lies_about_its_tables_is_not_opened_for_writing(tmp_path: Path, lie: str) -> None:
    path = tmp_path / IMAGE
    LIES[lie](path, crowded().build(path))
    with unharmed(tmp_path, seconds=0.5):
        error = attempt(path, CHANGES["part"])
    assert isinstance(error, (CorruptImageError, TruncatedImageError, UnsupportedFeatureError)), error


BITMAP_LIES: dict[str, dict[str, Any]] = {
    "granularity 2^0": {"granularity_bits": 0},
    "granularity 2^8": {"granularity_bits": 8},
    "granularity 2^32": {"granularity_bits": 32},
    "granularity 2^63": {"granularity_bits": 63},
    "unknown flags": {"flags": 0x8000_0002},
    "unknown type": {"type": 77},
    "in use": {"flags": 3},
}


@pytest.mark.parametrize("lie", BITMAP_LIES)
def test_a_bitmap_that_cannot_follow_the_disk_is_never_believed_afterwards(tmp_path: Path, lie: str) -> None:
    path = tmp_path / IMAGE
    ImageBuilder(MIB).data(0, b"first").bitmap(b"odd", [], **{"flags": 2, **BITMAP_LIES[lie]}).build(path)
    assert attempt(path, CHANGES["part"]) is None
    with open_image(path) as image:
        (bitmap,) = image.bitmaps()
        assert bitmap.unusable_reason(image.virtual_size, CLUSTER) is not None
        assert bitmap.in_use
        assert image.pread(700, 100) == b"x" * 700
    with pytest.raises(ResizeError):
        resize(path, 2 * MIB)


@pytest.mark.parametrize(
    "fields",
    [{"nb_bitmaps": 0}, {"nb_bitmaps": 65536}, {"nb_bitmaps": 2}, {"directory_size": 1 << 40},
     {"directory_offset": 512}, {"directory_offset": 0}, {"directory_offset": 1 << 62}],
)  # fmt: skip
def test_a_bitmap_directory_that_cannot_be(tmp_path: Path, fields: dict[str, int]) -> None:
    path = tmp_path / IMAGE
    crowded().bitmaps_extension(**fields).build(path)
    with unharmed(tmp_path, seconds=0.5):
        error = attempt(path, CHANGES["part"])
    assert isinstance(error, (CorruptImageError, TruncatedImageError)), error


# ---- names of other files

NAMES = [b"/etc/passwd", b"../outside", b"link", b"json:{}", b"nbd://localhost", b"fifo"]


@pytest.mark.parametrize("verb", ["write", "resize"])
@pytest.mark.parametrize("kind", ["backing", "data"])
@pytest.mark.parametrize("name", NAMES)
def test_no_change_reaches_a_file_that_the_image_may_not_name(
    tmp_path: Path, name: bytes, kind: str, verb: str
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(b"secret" * 1000)
    (folder / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(folder / "fifo")
    told = ImageBuilder(MIB).data(0, b"first")
    if kind == "backing":
        told.backing(name, b"raw")
    else:
        told.data_file(tmp_path / "unused", name)
    told.build(folder / IMAGE)
    with unharmed(tmp_path, seconds=0.5):
        if verb == "write":
            error = attempt(folder / IMAGE, CHANGES["part"])
        else:
            with pytest.raises(ReferenceDeniedError) as caught:
                resize(folder / IMAGE, 2 * MIB)
            error = caught.value
    assert isinstance(error, ReferenceDeniedError)


# ---- bounds


def test_the_largest_disk_is_written_and_cleared_in_little_memory(tmp_path: Path) -> None:
    """2 EiB of which nothing is there; the L1 table of 32 MiB is looked through a few times."""
    path = tmp_path / IMAGE
    huge_empty(path)
    with bounded(seconds=10, memory=160 << 20), open_image(path, writable=True) as image:
        image.pwrite(b"x", 1 << 60)
        image.discard(0, image.virtual_size)
        image.write_zeroes(0, image.virtual_size)
    assert path.stat().st_blocks * 512 < 80 << 20


def test_a_large_disk_shrinks_as_fast_as_its_tables_are_few(tmp_path: Path) -> None:
    """128 PiB, an L1 table of 2 MiB, and one L2 table."""
    path = tmp_path / IMAGE
    ImageBuilder(128 << 50, cluster_bits=21).data(0, b"first").build(path)
    with bounded(seconds=3, memory=64 << 20), open_image(path, writable=True) as image:
        image.resize(1 << 40, allow_shrink=True)


def test_a_shared_table_is_cleared_in_little_memory(tmp_path: Path) -> None:
    """64 TiB, all of it one compressed cluster; a TiB is given back."""
    path = tmp_path / IMAGE
    shared_l2_bomb(path)
    with bounded(seconds=15, memory=96 << 20), open_image(path, writable=True, cache_size=8 << 20) as image:
        image.discard(3 << 40, 1 << 40)
        image.flush()
        assert image.pread(4096, 3 << 40) == bytes(4096)


@pytest.mark.parametrize("cluster_bits", [9, 16])
def test_much_is_written_without_a_flush_in_little_memory(tmp_path: Path, cluster_bits: int) -> None:
    path = tmp_path / IMAGE
    tables = 6000 if cluster_bits == 9 else 3000
    slice_coverage = SMALL_TABLE if cluster_bits == 9 else 512 * CLUSTER
    ImageBuilder(tables * slice_coverage, cluster_bits).build(path)
    with bounded(seconds=30, memory=24 << 20), open_image(path, writable=True, cache_size=4 << 20) as image:
        for number in range(tables):
            image.pwrite(b"x" * SMALL, number * slice_coverage)


def test_preallocation_writes_tables_back_in_between(tmp_path: Path) -> None:
    storage = Watched(ImageBuilder(MIB, 9).build(tmp_path / IMAGE).path.read_bytes())
    with open_in_memory(storage, cache_size=0) as image:
        storage.image = image
        image.resize(80 << 20, preallocation="metadata")  # 2560 tables of 512 bytes
        assert 0 < max(storage.changed_sizes) <= 1088 << 10
        assert image.pread(MIB, 79 << 20) == bytes(MIB)


class Watched(MemoryStorage):
    """Looks, whenever it is made longer, how much the image has changed and not written."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.image: WritableImage | None = None
        self.changed_sizes: list[int] = []

    def truncate(self, size: int) -> None:
        super().truncate(size)
        if self.image is not None:
            self.changed_sizes.append(self.image.tables.changed_size)


def test_many_bitmaps_do_not_take_all_memory(tmp_path: Path) -> None:
    """Each would need 2 MiB for the first write alone; the file is sparse and small."""
    path = tmp_path / IMAGE
    told = ImageBuilder(1 << 30, 21)
    for number in range(64):
        told.bitmap(b"%d" % number, granularity_bits=9, flags=2)
    told.build(path)
    with bounded(seconds=5, memory=64 << 20):
        error = attempt(path, CHANGES["part"])
    assert error is None or isinstance(error, UnsupportedFeatureError)
