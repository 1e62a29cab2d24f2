"""The ways in which an image can be damaged, each a few fields of a sound one.

It owns the table of format.md 11.2 as images: `DAMAGES` names each row, makes the image in a folder, and says which
kinds of findings must come of it. Where things are in an image it reads from the image, so that one way of damage
serves images made by the builder and by QEMU. It refuses to know what QEMU says to it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.builder import ImageBuilder
from tests.support.damage import IMAGE, SOUND, plain, rich, with_data_file, with_subclusters
from tests.support.fields import ALL_PARTS, COMPRESSED, COPIED, ZERO

OFFSETS = 0x00FF_FFFF_FFFF_FE00


class Fields:
    """An image file in which words are read and put; places are bytes in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = bytearray(path.read_bytes())
        self.size = 1 << self.word(20, ">I")
        version_3 = self.word(4, ">I") == 3
        self.entry_size = 16 if version_3 and self.word(72) & 16 else 8
        self.refcount_bits = 1 << self.word(96, ">I") if version_3 else 16
        self.per_table = self.size // self.entry_size

    def word(self, place: int, code: str = ">Q") -> int:
        return int(struct.unpack_from(code, self.content, place)[0])

    def put(self, place: int, value: int, code: str = ">Q") -> None:
        struct.pack_into(code, self.content, place, value)

    def flip(self, place: int, bits: int) -> None:
        self.put(place, self.word(place) ^ bits)

    def l1(self, index: int = 0) -> int:
        """The place of an L1 entry."""
        return self.word(40) + 8 * index

    def l2(self, cluster: int) -> int:
        """The place of the L2 entry of a guest cluster."""
        table, index = divmod(cluster, self.per_table)
        return (self.word(self.l1(table)) & OFFSETS) + index * self.entry_size

    def host(self, cluster: int) -> int:
        """Where a guest cluster is stored."""
        return self.word(self.l2(cluster)) & OFFSETS

    def compressed(self) -> int:
        """The place of the L2 entry of a compressed cluster."""
        places = range(self.l2(0), self.l2(0) + self.size, self.entry_size)
        return next(place for place in places if self.word(place) & COMPRESSED)

    def shared(self) -> int:
        """The place of the L2 entry of a cluster that the disk shares."""
        places = range(self.l2(0), self.l2(0) + self.size, self.entry_size)
        return next(place for place in places if 0 < self.word(place) < COMPRESSED and self.word(place) & OFFSETS)

    def table(self, slot: int = 0) -> int:
        """The place of an entry of the refcount table."""
        return self.word(48) + 8 * slot

    def set_refcount(self, host_offset: int, value: int) -> None:
        """Refcounts of 8 bits and more, in the first block."""
        width = self.refcount_bits // 8
        place = (self.word(self.table()) & OFFSETS) + host_offset // self.size * width
        self.content[place : place + width] = value.to_bytes(width, "big")

    def grow(self, clusters: int = 1) -> int:
        """Add empty clusters to the file; where they begin."""
        start = -(-len(self.content) // self.size) * self.size
        self.content += bytes(start + clusters * self.size - len(self.content))
        return start

    @property
    def beyond(self) -> int:
        """A host offset well past the end of the file."""
        return -(-len(self.content) // self.size) * self.size + 8 * self.size

    def snapshot(self, index: int = 0) -> int:
        """The place of an entry of the snapshot table."""
        place = self.word(64)
        for _ in range(index):
            place += 40 + self.word(place + 36, ">I") + self.word(place + 12, ">H") + self.word(place + 14, ">H")
            place = place + 7 & ~7
        return place

    def bitmaps(self) -> int:
        """The place of the data of the bitmaps extension."""
        place = self.word(100, ">I")
        while self.word(place, ">I") != 0x23852875:
            place += 8 + (self.word(place + 4, ">I") + 7 & ~7)
        return place + 8


@dataclass(frozen=True)
class Damage:
    """A sound image, what is done to it, and the kinds of findings that come of it, others that follow apart.

    `ours`: those that QEMU does not look for. `aborts`: the check cannot be completed.
    """

    image: Callable[[Path], Path]
    hurt: Callable[[Fields], object]
    kinds: frozenset[str] = frozenset()
    ours: frozenset[str] = frozenset()
    aborts: bool = False

    def make(self, folder: Path) -> Path:
        """The damaged image in this folder."""
        path = self.image(folder)
        fields = Fields(path)
        self.hurt(fields)
        path.write_bytes(fields.content)
        return path


def _built(make: Callable[[Path], ImageBuilder]) -> Callable[[Path], Path]:
    return lambda folder: make(folder).build(folder / IMAGE).path


_PLAIN = {"built": _built(lambda folder: plain()), "QEMU": SOUND["QEMU 64k, no snapshots"]}
_KEPT = {"built": _built(lambda folder: plain().snapshot(b"1", b"all")), "QEMU": SOUND["QEMU 64k"]}
_BITMAPS = {"built": _built(lambda folder: rich()), "QEMU": SOUND["QEMU bitmaps"]}
_COMPRESSED = {"built": _built(lambda folder: rich()), "QEMU": SOUND["QEMU compressed"]}
_SUBCLUSTERS = {"built": _built(lambda folder: with_subclusters()), "QEMU": SOUND["QEMU subclusters, no snapshots"]}
_DATA_FILE = {"built": _built(with_data_file), "QEMU": SOUND["QEMU data file"]}
_RAW = {"built": _built(lambda folder: with_data_file(folder, raw=True)), "QEMU": SOUND["QEMU raw data file"]}
_VERSION_2 = {"built": _built(lambda folder: plain(version=2)), "QEMU": SOUND["QEMU version 2"]}
_NARROW = {"built": _built(lambda folder: plain(9, refcount_bits=1)), "QEMU": SOUND["QEMU 1 bit"]}


def _kinds(words: str) -> frozenset[str]:
    return frozenset(words.split())


DAMAGES: dict[str, Damage] = {}
"""By name; each row is there once for every maker of the image."""


def _way(
    name: str,
    images: dict[str, Callable[[Path], Path]],
    kinds: str = "",
    *,
    ours: str = "",
    aborts: bool = False,
) -> Callable[[Callable[[Fields], object]], Callable[[Fields], object]]:
    def declare(hurt: Callable[[Fields], object]) -> Callable[[Fields], object]:
        for maker, image in images.items():
            DAMAGES[f"{name} ({maker})"] = Damage(image, hurt, _kinds(kinds), _kinds(ours), aborts)
        return hurt

    return declare


# ---- refcounts


@_way("leaked cluster", _PLAIN, "refcount-leak")
def _leak(fields: Fields) -> None:
    fields.set_refcount(fields.grow(), 1)


@_way("leaked clusters in a row", _PLAIN, "refcount-leak")
def _leaks(fields: Fields) -> None:
    start = fields.grow(5)
    for number in range(5):
        fields.set_refcount(start + number * fields.size, 7 if number < 3 else 1)


@_way("refcount too high", _PLAIN, "refcount-leak l2-copied-wrong")
def _too_high(fields: Fields) -> None:
    fields.set_refcount(fields.host(0), 3)


@_way("refcount too low", _KEPT, "refcount-too-low l2-copied-wrong")
def _too_low(fields: Fields) -> None:
    fields.set_refcount(fields.word(fields.shared()) & OFFSETS, 1)


@_way("refcount missing", _PLAIN, "refcount-missing l2-copied-wrong")
def _missing(fields: Fields) -> None:
    fields.set_refcount(fields.host(0), 0)


@_way("refcount of the L2 table missing", _PLAIN, "refcount-missing l1-copied-wrong")
def _table_missing(fields: Fields) -> None:
    fields.set_refcount(fields.word(fields.l1()) & OFFSETS, 0)


@_way("refcount of the header missing", _PLAIN, "refcount-missing")
def _header_missing(fields: Fields) -> None:
    fields.set_refcount(0, 0)


@_way("refcount table entry with reserved bits", _PLAIN, "refcount-entry-reserved refcount-leak")
def _entry_reserved(fields: Fields) -> None:
    fields.flip(fields.table(), 1 << 3)


@_way("refcount table entry unaligned", _PLAIN, "refcount-entry-unaligned refcounts-unreadable")
def _entry_unaligned(fields: Fields) -> None:
    fields.flip(fields.table(), 512)


@_way("refcount block outside the file", _PLAIN, "refcount-block-outside")
def _block_outside(fields: Fields) -> None:
    fields.put(fields.table(1), fields.beyond)


@_way(
    "all refcounts outside the file",
    _PLAIN,
    "refcount-block-outside refcount-missing l1-copied-wrong l2-copied-wrong",
)
def _all_outside(fields: Fields) -> None:
    fields.put(fields.table(), fields.beyond)


@_way("refcount block named twice", _PLAIN, "refcount-block-shared refcount-too-low")
def _block_twice(fields: Fields) -> None:
    fields.put(fields.table(1), fields.word(fields.table()))


@_way(
    "refcount block in the place of an L2 table",
    _PLAIN,
    "refcount-block-shared refcount-too-low",
)
def _block_over_table(fields: Fields) -> None:
    fields.put(fields.table(1), fields.word(fields.l1()) & OFFSETS)


@_way("no refcount block", _PLAIN, "refcount-missing l1-copied-wrong l2-copied-wrong")
def _no_block(fields: Fields) -> None:
    fields.put(fields.table(), 0)


@_way(
    "refcount table outside the file", _PLAIN, "reference-beyond-end refcount-missing l1-copied-wrong l2-copied-wrong"
)
def _table_outside(fields: Fields) -> None:
    fields.put(48, fields.beyond)


@_way("no refcount table", _PLAIN, "refcount-missing l1-copied-wrong l2-copied-wrong")
def _no_table(fields: Fields) -> None:
    fields.put(56, 0, ">I")


@_way("more references than a refcount can say", _NARROW, "references-too-many", ours="guest-aliased")
def _too_many(fields: Fields) -> None:
    fields.put(fields.l2(1), fields.word(fields.l2(0)))
    fields.put(fields.l2(2), fields.word(fields.l2(0)))


# ---- L1 and L2 tables


@_way("L1 entry with reserved bits", _PLAIN, "l1-entry-reserved")
def _l1_reserved(fields: Fields) -> None:
    fields.flip(fields.l1(), 1 << 60 | 4)


@_way("L2 entry with reserved bits", _PLAIN, "l2-entry-reserved")
def _l2_reserved(fields: Fields) -> None:
    fields.flip(fields.l2(0), 1 << 57)
    fields.flip(fields.l2(1), 1 << 5)


@_way("L2 entry with reserved bits in a shared table", _KEPT, "l2-entry-reserved")
def _shared_reserved(fields: Fields) -> None:
    fields.flip(fields.l2(2), 1 << 57)


@_way("L2 table unaligned", _PLAIN, "l2-table-unaligned")
def _table_unaligned(fields: Fields) -> None:
    fields.flip(fields.l1(), 512)


@_way("L2 table outside the file", _PLAIN, "reference-beyond-end refcount-leak l1-copied-wrong")
def _l2_outside(fields: Fields) -> None:
    fields.put(fields.l1(), fields.beyond | COPIED)


@_way("L1 entry without an offset", _PLAIN, "refcount-leak refcount-too-low")
def _l1_header(fields: Fields) -> None:
    fields.put(fields.l1(), COPIED)


@_way("data cluster unaligned", _PLAIN, "data-unaligned refcount-too-low")
def _data_unaligned(fields: Fields) -> None:
    fields.flip(fields.l2(0), 512)


@_way("preallocated cluster unaligned", _PLAIN, "preallocated-unaligned refcount-too-low")
def _zero_unaligned(fields: Fields) -> None:
    fields.flip(fields.l2(0), 512 | ZERO)


@_way("data cluster outside the file", _PLAIN, "reference-beyond-end refcount-leak l2-copied-wrong")
def _data_outside(fields: Fields) -> None:
    fields.put(fields.l2(0), fields.beyond | COPIED)


@_way("data cluster at the very end of the file", _PLAIN, "reference-beyond-end refcount-leak l2-copied-wrong")
def _data_at_end(fields: Fields) -> None:
    fields.put(fields.l2(0), fields.beyond - 8 * fields.size | COPIED)


@_way("COPIED missing in L1", _PLAIN, "l1-copied-wrong")
def _l1_not_copied(fields: Fields) -> None:
    fields.flip(fields.l1(), COPIED)


@_way("COPIED missing in L2", _PLAIN, "l2-copied-wrong")
def _l2_not_copied(fields: Fields) -> None:
    for cluster in (0, 1):
        fields.flip(fields.l2(cluster), COPIED)


@_way("COPIED set in a shared L1 entry", {"built": _KEPT["built"]}, "l1-copied-wrong")
def _l1_copied(fields: Fields) -> None:
    fields.flip(fields.l1(), COPIED)


@_way("COPIED set in a shared L2 entry", {"built": _KEPT["built"]}, "l2-copied-wrong")
def _l2_copied(fields: Fields) -> None:
    fields.flip(fields.l2(0), COPIED)


@_way("COPIED set in a snapshot only", {"built": _KEPT["built"]})
def _snapshot_copied(fields: Fields) -> None:
    fields.flip(fields.word(fields.snapshot()), COPIED)


@_way("COPIED on a compressed cluster", _COMPRESSED, "compressed-copied")
def _compressed_copied(fields: Fields) -> None:
    fields.flip(fields.compressed(), COPIED)


@_way("compressed cluster outside the file", _COMPRESSED, "reference-beyond-end refcount-leak")
def _compressed_outside(fields: Fields) -> None:
    place = fields.compressed()
    bits = 70 - (fields.size.bit_length() - 1)
    fields.put(place, fields.word(place) >> bits << bits | fields.beyond)


@_way("compressed cluster in three clusters", _COMPRESSED, "refcount-too-low")
def _compressed_long(fields: Fields) -> None:
    place = fields.compressed()
    bits = 70 - (fields.size.bit_length() - 1)
    start = (fields.word(place) & (1 << bits) - 1) // fields.size * fields.size + fields.size - 100
    fields.put(place, COMPRESSED | (1 << 62) - (1 << bits) | start)


@_way("refcount block where a stream ends behind the file", {"built": _COMPRESSED["built"]}, "refcount-block-shared")
def _block_behind_stream(fields: Fields) -> None:
    place, end = fields.compressed(), fields.beyond - 8 * fields.size
    bits = 70 - (fields.size.bit_length() - 1)
    fields.put(place, COMPRESSED | 1 << bits | end - 100)
    fields.put(fields.table(1), end)


@_way("zero flag in version 2", _VERSION_2, ours="zero-flag-in-v2")
def _zero_in_v2(fields: Fields) -> None:
    fields.flip(fields.l2(0), ZERO)


@_way("one host cluster for two guest clusters", _PLAIN, "refcount-leak", ours="guest-aliased")
def _alias(fields: Fields) -> None:
    fields.set_refcount(fields.host(1), 2)
    for cluster in (1, 2):
        fields.put(fields.l2(cluster), fields.host(1))


@_way(
    "one L2 table for two L1 entries",
    {"built": _PLAIN["built"]},
    "refcount-leak refcount-too-low",
    ours="guest-aliased",
)
def _shared_table(fields: Fields) -> None:
    fields.put(fields.l1(1), fields.word(fields.l1()))


# ---- extended L2


@_way("subclusters both allocated and zero", _SUBCLUSTERS, "subclusters-contradict")
def _contradict(fields: Fields) -> None:
    fields.put(fields.l2(0) + 8, 1 << 32 | ALL_PARTS)


@_way("allocated subclusters without a cluster", _SUBCLUSTERS, "subclusters-without-cluster refcount-leak")
def _without(fields: Fields) -> None:
    fields.put(fields.l2(0), 0)


@_way("compressed cluster with a bitmap", {"built": _SUBCLUSTERS["built"]}, "compressed-subclusters refcount-leak")
def _compressed_bitmap(fields: Fields) -> None:
    fields.put(fields.compressed() + 8, 4)


@_way("preallocated cluster with subclusters unaligned", _SUBCLUSTERS, "preallocated-unaligned refcount-too-low")
def _subclusters_unaligned(fields: Fields) -> None:
    fields.flip(fields.l2(0), 512)
    fields.put(fields.l2(0) + 8, 0xFF << 32)


@_way("zero flag with subclusters", _SUBCLUSTERS, ours="zero-flag-reserved")
def _zero_with_subclusters(fields: Fields) -> None:
    fields.flip(fields.l2(0), ZERO)


# ---- data files


@_way("compressed cluster with a data file", _DATA_FILE, "compressed-with-data-file")
def _compressed_outside_file(fields: Fields) -> None:
    fields.put(fields.l2(0), COMPRESSED | 512)


@_way(
    "snapshots with a data file",
    {
        "built": _built(
            lambda folder: with_data_file(folder).snapshot(b"1", b"impossible", ImageBuilder(1 << 20, 12).map())
        )
    },
    "snapshots-with-data-file",
)
def _snapshots_with_data_file(fields: Fields) -> None:
    """As built."""


@_way("data file cluster without COPIED", _DATA_FILE, "l2-copied-wrong")
def _data_not_copied(fields: Fields) -> None:
    fields.flip(fields.l2(1), COPIED)


@_way("zeros with COPIED and without a place in a data file", _DATA_FILE)
def _zeros_copied(fields: Fields) -> None:
    fields.put(fields.l2(0), COPIED | ZERO)


@_way("data file cluster elsewhere", _DATA_FILE, ours="host-not-guest")
def _elsewhere(fields: Fields) -> None:
    fields.put(fields.l2(1), 7 * fields.size | COPIED)


@_way("raw data file not covered", _RAW, ours="raw-not-covered")
def _not_covered(fields: Fields) -> None:
    fields.put(fields.l2(1), 0)


@_way(
    "raw data file and a backing file",
    {"built": _built(lambda folder: with_data_file(folder, raw=True).backing(b"base.raw"))},
    ours="raw-with-backing-file",
)
def _raw_with_backing(fields: Fields) -> None:
    (fields.path.parent / "base.raw").write_bytes(bytes(512))


# ---- snapshots


@_way("snapshot L1 table unaligned", _KEPT, "snapshot-l1-unaligned refcount-leak")
def _snapshot_unaligned(fields: Fields) -> None:
    fields.flip(fields.snapshot(), 512)


@_way("snapshot L1 table too large", _KEPT, "snapshot-l1-too-large refcount-leak")
def _snapshot_too_large(fields: Fields) -> None:
    fields.put(fields.snapshot() + 8, (4 << 20) + 1, ">I")


@_way("snapshot L1 table outside the file", _KEPT, "reference-beyond-end refcount-leak")
def _snapshot_outside(fields: Fields) -> None:
    fields.put(fields.snapshot(), fields.beyond)


@_way("snapshot L1 table where no file can reach", _KEPT, "table-unreachable", aborts=True)
def _snapshot_unreachable(fields: Fields) -> None:
    fields.put(fields.snapshot(), 1 << 63)


@_way(
    "snapshot without the size of its disk",
    {"built": _built(lambda folder: plain().snapshot(b"1", b"old", extra=b"").snapshot(b"2", b"old", extra=bytes(8)))},
    "snapshot-incomplete",
)
def _incomplete(fields: Fields) -> None:
    """As built."""


@_way(
    "snapshot with too much extra data",
    {
        "built": _built(
            lambda folder: plain().snapshot(b"1", b"much", extra=struct.pack(">QQQ", 0, 1 << 22, 0) + bytes(1100))
        )
    },
    "snapshot-extra-too-large",
    aborts=True,
)
def _too_much_extra(fields: Fields) -> None:
    """As built."""


@_way("too many snapshots", _KEPT, "snapshots-too-many", aborts=True)
def _too_many_snapshots(fields: Fields) -> None:
    fields.put(60, 65537, ">I")


@_way("more snapshots than the table has", _KEPT, "snapshot-incomplete")
def _more_snapshots(fields: Fields) -> None:
    fields.put(60, fields.word(60, ">I") + 2, ">I")


@_way("snapshot table unaligned", _KEPT, "snapshot-table-misplaced", aborts=True)
def _snapshots_unaligned(fields: Fields) -> None:
    fields.flip(64, 512)


@_way("snapshot table outside the file", _KEPT, "reference-beyond-end refcount-leak snapshot-incomplete")
def _snapshots_outside(fields: Fields) -> None:
    fields.put(64, fields.beyond)


# ---- bitmaps


@_way("bitmap directory unreadable", _BITMAPS, "bitmaps-unreadable", aborts=True)
def _directory_unreadable(fields: Fields) -> None:
    fields.put(fields.word(fields.bitmaps() + 16) + 12, 1 << 20, ">I")


@_way("bitmap table with reserved bits", _BITMAPS, "bitmaps-unreadable", aborts=True)
def _bits_reserved(fields: Fields) -> None:
    fields.put(fields.word(fields.word(fields.bitmaps() + 16)), 1 << 60)


@_way(
    "bitmap bits outside the file",
    {"built": _built(lambda folder: plain().bitmap(b"dirty", [(0, 1)], granularity_bits=9, literal=True, flags=1))},
    "reference-beyond-end refcount-leak",
)
def _bits_outside(fields: Fields) -> None:
    fields.put(fields.word(fields.word(fields.bitmaps() + 16)), fields.beyond)


@_way("bitmaps given up", _BITMAPS, "refcount-leak")
def _bitmaps_given_up(fields: Fields) -> None:
    fields.put(88, 0)


# ---- the file itself


@_way("last cluster half cut off", {"QEMU": _PLAIN["QEMU"]})
@_way("last cluster half cut off", {"built": _PLAIN["built"]}, ours="table-cut-off")
def _cut_in_cluster(fields: Fields) -> None:
    del fields.content[-fields.size // 2 :]


@_way("cut in the middle", _PLAIN, "reference-beyond-end")
def _cut(fields: Fields) -> None:
    del fields.content[len(fields.content) // 2 // fields.size * fields.size :]


@_way("L1 table outside the file", _PLAIN, "reference-beyond-end refcount-leak")
def _l1_outside(fields: Fields) -> None:
    fields.put(40, fields.beyond)


@_way("L1 table cut off", {"built": _built(lambda folder: ImageBuilder(1 << 20, 9))}, ours="table-cut-off")
def _l1_cut(fields: Fields) -> None:
    place = fields.grow()
    length = 8 * fields.word(36, ">I")
    fields.content[place:] = fields.content[fields.word(40) : fields.word(40) + length - 8]
    fields.set_refcount(fields.word(40), 0)
    fields.set_refcount(place, 1)
    fields.put(40, place)
