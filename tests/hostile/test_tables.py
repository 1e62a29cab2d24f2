"""Tables in places where they cannot be, and entries that point where they must not.

A table that the header misplaces is refused at open. A bad L1 or L2 entry spoils the range below it and nothing else:
what is readable is read, and every look at the spoiled range says so.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import CorruptImageError, Qcow2Error, TruncatedImageError
from qcow2_plugin.extent import ExtentKind
from tests.support.builder import BuiltImage, ImageBuilder, patch, set_field
from tests.support.fields import COMPRESSED, COPIED
from tests.support.hostile import IMAGE, Hostile, assert_harmless_text, check, look, unharmed
from tests.support.reference import ReferenceReader
from tests.support.tools import qemu_img_json

MIB = 1 << 20
CLUSTER = 1 << 16
PIB = 1 << 50
RESERVED = 0x7F << 56 | 0x1FE
Place = Callable[[BuiltImage], int]
L2_CHECKS_NONE = "QEMU follows the pointer and takes whatever is there for a table"


def crowded(virtual_size: int = MIB, **options: Any) -> ImageBuilder:
    """An image that has every structure, so that each can be aimed at."""
    image = ImageBuilder(virtual_size, **options).data(0, b"first").data(3, b"other").compressed(5, b"compressed")
    return image.snapshot(b"1", b"one", image.map().data(0, b"before")).bitmap(b"bitmap", [(0, 1)], literal=True)


def header_field(name: str, place: int | Place) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        built = crowded().build(path)
        set_field(path, name, place if isinstance(place, int) else place(built))

    return make


def l1_entry(word: int | Place) -> Callable[[Path], object]:
    """The image with another first L1 entry: the whole disk is below it."""

    def make(path: Path) -> None:
        built = crowded().build(path)
        patch(path, built.l1_offset, struct.pack(">Q", word if isinstance(word, int) else word(built)))

    return make


def l2_entry(word: int | Place, bitmap: int = 0, **options: Any) -> Callable[[Path], object]:
    """The image with another first L2 entry."""

    def make(path: Path) -> None:
        image = ImageBuilder(MIB, **options).data(0, b"first").data(3, b"other")
        built = image.build(path) if options else crowded().build(path)
        entry = struct.pack(">Q", word if isinstance(word, int) else word(built))
        patch(path, built.l2_entry_offset(0), entry + (struct.pack(">Q", bitmap) if image.extended_l2 else b""))

    return make


def in_data_file(word: int) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        image = ImageBuilder(MIB).data_file(path.parent / "data.raw", b"data.raw").data(3, b"other")
        image.data(0, b"first").entry(1, word).build(path)

    return make


ALLOWED_AT_OPEN = "QEMU accepts the table where it is and reads what it finds there"
HEADER = [
    Hostile("L1 table at 0", header_field("l1_table_offset", 0), CorruptImageError, "inside the header cluster",
            differs=ALLOWED_AT_OPEN),
    Hostile("L1 table unaligned", header_field("l1_table_offset", CLUSTER + 512), CorruptImageError, "not aligned"),
    Hostile("L1 table past the end", header_field("l1_table_offset", 1 << 40), TruncatedImageError, "past the end",
            differs=ALLOWED_AT_OPEN),
    Hostile("L1 table at 2^63", header_field("l1_table_offset", 1 << 63), CorruptImageError, "out of range"),
    Hostile("L1 table at the last cluster of all", header_field("l1_table_offset", 2**63 - CLUSTER),
            TruncatedImageError, "past the end"),
    Hostile("L1 table in the refcount table", header_field("l1_table_offset", lambda b: b.refcount_table_offset),
            CorruptImageError, "overlaps the refcount table", differs=ALLOWED_AT_OPEN),
    Hostile("L1 table in the snapshot table", header_field("l1_table_offset", lambda b: b.snapshots_offset),
            CorruptImageError, "overlaps the snapshot table", differs=ALLOWED_AT_OPEN),
    Hostile("refcount table at 0", header_field("refcount_table_offset", 0), CorruptImageError,
            "inside the header cluster", differs=ALLOWED_AT_OPEN),
    Hostile("refcount table unaligned", header_field("refcount_table_offset", 1), CorruptImageError, "not aligned"),
    Hostile("refcount table past the end", header_field("refcount_table_offset", 1 << 40), TruncatedImageError,
            "past the end", differs=ALLOWED_AT_OPEN),
    Hostile("refcount table at 2^63", header_field("refcount_table_offset", 1 << 63), CorruptImageError, "refcount"),
    Hostile("refcount table in the L1 table", header_field("refcount_table_offset", lambda b: b.l1_offset),
            CorruptImageError, "overlaps", differs=ALLOWED_AT_OPEN),
    Hostile("refcount table of 0 clusters", header_field("refcount_table_clusters", 0), CorruptImageError, "0 clust"),
    Hostile("refcount table of 128 clusters", header_field("refcount_table_clusters", 128), TruncatedImageError,
            "past the end", differs=ALLOWED_AT_OPEN),
    Hostile("refcount table of 129 clusters", header_field("refcount_table_clusters", 129), CorruptImageError,
            "129 clusters"),
    Hostile("refcount table of 2^32-1 clusters", header_field("refcount_table_clusters", 2**32 - 1),
            CorruptImageError, "clusters"),
    Hostile("snapshot table at 0", header_field("snapshots_offset", 0), CorruptImageError, "header cluster",
            differs=ALLOWED_AT_OPEN),
    Hostile("snapshot table past the end", header_field("snapshots_offset", 1 << 40), TruncatedImageError, "past",
            differs=ALLOWED_AT_OPEN),
]  # fmt: skip
L1 = [
    Hostile("nothing but COPIED", l1_entry(COPIED), CorruptImageError, "no place for an L2 table", "read",
            differs="QEMU reads it as unallocated, and aborts when it writes"),
    Hostile("reserved bits", l1_entry(lambda b: b.l2_offsets[0] | RESERVED | 1)),
    Hostile("unaligned", l1_entry(lambda b: b.l2_offsets[0] + 512), CorruptImageError, "no place", "read"),
    Hostile("in the L1 table", l1_entry(lambda b: b.l1_offset), CorruptImageError, "the L1 table", "read",
            differs=L2_CHECKS_NONE),
    Hostile("in the refcount table", l1_entry(lambda b: b.refcount_table_offset), CorruptImageError,
            "the refcount table", "read", differs=L2_CHECKS_NONE),
    Hostile("in the snapshot table", l1_entry(lambda b: b.snapshots_offset), CorruptImageError,
            "the snapshot table", "read", qemu=""),
    Hostile("in a refcount block", l1_entry(lambda b: b.refcount_block_offsets[0]), TruncatedImageError, "past", "read",
            differs=L2_CHECKS_NONE),
    Hostile("in guest data", l1_entry(lambda b: b.data_offsets[3]), TruncatedImageError, "past the end", "read"),
    Hostile("one cluster past the end", l1_entry(lambda b: -(-b.file_size // CLUSTER) * CLUSTER), TruncatedImageError,
            "L2 table", "read", differs="to QEMU what lies past the end of the file is zeros"),
    Hostile("a pebibyte away", l1_entry(PIB), TruncatedImageError, "L2 table", "read",
            differs="to QEMU what lies past the end of the file is zeros"),
    Hostile("the last cluster of all", l1_entry((1 << 56) - CLUSTER), TruncatedImageError, "L2 table", "read",
            differs="to QEMU what lies past the end of the file is zeros"),
]  # fmt: skip
PAST_THE_END = "to QEMU data past the end of the file is zeros"
L2 = [
    Hostile("nothing but COPIED", l2_entry(COPIED)),
    Hostile("zero and COPIED", l2_entry(COPIED | 1)),
    Hostile("zero past the end", l2_entry(PIB | 1)),
    Hostile("reserved bits", l2_entry(lambda b: b.data_offsets[0] | COPIED | 0x3F << 56 | 0x1FE)),
    Hostile("unaligned", l2_entry(0x50200), CorruptImageError, "0x50200 is invalid", "read"),
    Hostile("all bits but one", l2_entry(2**64 - 1 - COMPRESSED), CorruptImageError, "is invalid", "read"),
    Hostile("all bits", l2_entry(2**64 - 1), CorruptImageError, "is invalid", "read"),
    Hostile("a pebibyte away", l2_entry(PIB), TruncatedImageError, "past the end", "read", differs=PAST_THE_END),
    Hostile("the last cluster of all", l2_entry((1 << 56) - CLUSTER), TruncatedImageError, "past the end", "read",
            differs=PAST_THE_END),
    Hostile("one cluster past the end", l2_entry(lambda b: -(-b.file_size // CLUSTER) * CLUSTER), TruncatedImageError,
            "past the end", "read", differs=PAST_THE_END),
    Hostile("zero flag in version 2", l2_entry(1, version=2), CorruptImageError, "is invalid", "read"),
    Hostile("zero flag and data in version 2", l2_entry(lambda b: b.data_offsets[3] | 1, version=2), CorruptImageError,
            "is invalid", "read"),
]  # fmt: skip
STRUCTURES: list[tuple[str, Place]] = [
    ("the L1 table", lambda b: b.l1_offset),
    ("its own L2 table", lambda b: b.l2_offsets[0]),
    ("the refcount table", lambda b: b.refcount_table_offset),
    ("a refcount block", lambda b: b.refcount_block_offsets[0]),
    ("the snapshot table", lambda b: b.snapshots_offset),
    ("the L1 table of a snapshot", lambda b: b.snapshots[0].l1_offset),
    ("an L2 table of a snapshot", lambda b: b.snapshots[0].l2_offsets[0]),
    ("the bitmap directory", lambda b: b.bitmap_directory_offset),
    ("a bitmap table", lambda b: b.bitmap_table_offsets[0]),
    ("the bits of a bitmap", lambda b: b.bitmap_data_offsets[0][0]),
    ("another cluster of the guest", lambda b: b.data_offsets[3]),
]
L2_INTO = [Hostile(name, l2_entry(place)) for name, place in STRUCTURES]
EXTENDED_L2 = [
    Hostile("both bits of a subcluster", l2_entry(lambda b: b.data_offsets[0] | COPIED, 1 | 1 << 32, extended_l2=True),
            CorruptImageError, "with bitmap 0x100000001 is invalid", "read"),
    Hostile("both bits of the last subcluster", l2_entry(lambda b: b.data_offsets[0], 1 << 31 | 1 << 63,
            extended_l2=True), CorruptImageError, "is invalid", "read"),
    Hostile("allocated in no cluster", l2_entry(0, 1, extended_l2=True), CorruptImageError, "is invalid", "read"),
    Hostile("allocated, and only COPIED", l2_entry(COPIED, 2**32 - 1, extended_l2=True), CorruptImageError,
            "is invalid", "read"),
    Hostile("zero in no cluster", l2_entry(0, 1 << 32, extended_l2=True)),
    Hostile("zero flag of the standard entry", l2_entry(lambda b: b.data_offsets[0] | COPIED | 1, 2**32 - 1,
            extended_l2=True)),
    Hostile("compressed with a bitmap", l2_entry(lambda b: b.data_offsets[0] | COMPRESSED, 1, extended_l2=True),
            CorruptImageError, "is invalid", "read"),
    Hostile("unaligned", l2_entry(0x50200, 1, extended_l2=True), CorruptImageError, "is invalid", "read"),
    Hostile("past the end", l2_entry(PIB, 1, extended_l2=True), TruncatedImageError, "past the end", "read",
            differs=PAST_THE_END),
    Hostile("past the end without anything there", l2_entry(PIB, 0, extended_l2=True)),
]  # fmt: skip
# QEMU looks for a data file in its own working directory, so it is not asked about these.
DATA_FILE = [
    Hostile("at another place than the guest's", in_data_file(3 * CLUSTER | COPIED), CorruptImageError,
            "instead of", "read", qemu=""),
    Hostile("zero at another place than the guest's", in_data_file(3 * CLUSTER | COPIED | 1), CorruptImageError,
            "instead of", "read", qemu=""),
    Hostile("at 0 without being cluster 0", in_data_file(COPIED), CorruptImageError, "instead of", "read", qemu=""),
    Hostile("compressed", in_data_file(COMPRESSED | CLUSTER), CorruptImageError, "is invalid", "read", qemu=""),
    Hostile("unaligned", in_data_file(CLUSTER + 512 | COPIED), CorruptImageError, "is invalid", "read", qemu=""),
]  # fmt: skip
IMAGES = [*HEADER, *L1, *L2, *L2_INTO, *EXTENDED_L2, *DATA_FILE]


@pytest.mark.parametrize("hostile", HEADER, ids=str)
def test_tables_that_the_header_misplaces(hostile: Hostile, tmp_path: Path) -> None:
    check(hostile, tmp_path)


@pytest.mark.parametrize("hostile", L1, ids=str)
def test_l1_entry(hostile: Hostile, tmp_path: Path) -> None:
    check(hostile, tmp_path)


@pytest.mark.parametrize("hostile", L2, ids=str)
def test_l2_entry(hostile: Hostile, tmp_path: Path) -> None:
    check(hostile, tmp_path)


@pytest.mark.parametrize("hostile", L2_INTO, ids=str)
def test_l2_entry_that_points_into(hostile: Hostile, tmp_path: Path) -> None:
    """Reading what belongs to another structure does no harm; what such a cluster holds is what is there."""
    check(hostile, tmp_path)


@pytest.mark.parametrize("hostile", EXTENDED_L2, ids=str)
def test_extended_l2_entry(hostile: Hostile, tmp_path: Path) -> None:
    check(hostile, tmp_path)


@pytest.mark.parametrize("hostile", DATA_FILE, ids=str)
def test_l2_entry_for_a_data_file(hostile: Hostile, tmp_path: Path) -> None:
    check(hostile, tmp_path)


@pytest.mark.parametrize(
    "hostile", [hostile for hostile in (*L2, *EXTENDED_L2, *DATA_FILE) if hostile.at == "read"], ids=str
)
def test_a_bad_l2_entry_spoils_its_own_cluster_only(hostile: Hostile, tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    hostile.make(path)
    bad = 1 if hostile in DATA_FILE else 0
    with unharmed(tmp_path), open_image(path) as image:
        assert image.pread(5, 3 * CLUSTER) == b"other"
        for offset in (bad * CLUSTER, (bad + 1) * CLUSTER - 1):
            with pytest.raises(Qcow2Error):
                image.pread(1, offset)
        sound = [cluster for cluster in range(16) if cluster != bad]
        for cluster in sound:
            image.pread(CLUSTER, cluster * CLUSTER)
        assert list(image.extents((bad + 1) * CLUSTER))
        with pytest.raises(Qcow2Error):
            list(image.extents())


@pytest.mark.parametrize("bad", [1, 2, 5, 100, 8191])
@pytest.mark.parametrize("step", [1, 2])
def test_the_map_is_told_up_to_a_bad_entry(bad: int, step: int, tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    image = ImageBuilder(8192 * CLUSTER).entry(bad, 0x50200)
    for cluster in range(0, bad, step):
        image.zero(cluster)
    image.build(path)
    told = 0
    with unharmed(tmp_path, seconds=1), open_image(path) as opened, pytest.raises(CorruptImageError):
        for extent in opened.extents():
            told = extent.guest_offset + extent.length
    assert told == bad * CLUSTER


@pytest.mark.parametrize(
    "place",
    [
        lambda b: COPIED,
        lambda b: b.l2_offsets[1] + 512,
        lambda b: b.l1_offset,
        lambda b: b.refcount_table_offset,
        lambda b: b.snapshots_offset,
        lambda b: PIB,
    ],
    ids=["COPIED alone", "unaligned", "in the L1 table", "in the refcount table", "in the snapshot table", "far away"],
)
def test_a_bad_l1_entry_spoils_what_is_below_it_only(place: Place, tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    coverage = CLUSTER // 8 * CLUSTER
    built = crowded(virtual_size=coverage + MIB).data(coverage // CLUSTER, b"second").build(path)
    patch(path, built.l1_offset, struct.pack(">Q", place(built)))
    with unharmed(tmp_path), open_image(path) as image:
        assert image.pread(6, coverage) == b"second"
        extents = image.extents(coverage)
        assert next(extents).kind is ExtentKind.DATA
        for offset in (0, coverage - 1):
            with pytest.raises(CorruptImageError):
                image.pread(1, offset)
        with pytest.raises(CorruptImageError):
            next(image.extents(coverage - CLUSTER, 2 * CLUSTER))


@pytest.mark.parametrize("hostile", [hostile for hostile in HEADER if hostile.differs], ids=str)
def test_a_damaged_image_can_still_be_tried(hostile: Hostile, tmp_path: Path) -> None:
    """With `allow_damaged` a misplaced table is read as it is found: as QEMU does, or with an error of ours."""
    path = tmp_path / IMAGE
    hostile.make(path)
    with unharmed(tmp_path):
        outcome = look(path, allow_damaged=True)
    assert outcome.stage != "open"
    assert_harmless_text(str(outcome.error))
    if "refcount" in hostile.name and "L1" not in hostile.name:
        assert outcome.content == ReferenceReader(path).read(0, MIB)


@pytest.mark.parametrize("word", [2**64 - 1, 2**63 - 512, 1 << 63, 1 << 40, 512, CLUSTER + 512])
def test_a_refcount_block_anywhere_only_means_that_the_image_must_prove_itself(word: int, tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    built = crowded().build(path)
    expected = look(path).content
    patch(path, built.refcount_table_offset, struct.pack(">Q", word))
    with unharmed(tmp_path):
        outcome = look(path)
    assert outcome.error is None
    assert outcome.content == expected


@pytest.mark.parametrize("filler", [b"\0", b"\xff"])
def test_refcounts_that_make_no_sense_are_no_reason_to_refuse_reading(filler: bytes, tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    built = crowded().build(path)
    expected = look(path).content
    patch(path, built.refcount_block_offsets[0], filler * CLUSTER)
    with unharmed(tmp_path):
        outcome = look(path)
    assert outcome.error is None
    assert outcome.content == expected
    assert qemu_img_json("info", path)["virtual-size"] == MIB
