"""Small images that are broken in one way each, in memory, for repairs: every kind of finding, and what lies in wait.

It owns the damage, told as bytes of finished images of the builder. What a repair makes of it is asked elsewhere.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.support.builder import BuiltImage, ImageBuilder
from tests.support.fields import COPIED, HEADER_FIELDS, ZERO

NOISE = random.Random(3).randbytes(1 << 16)
SIZE = 512


class Image(NamedTuple):
    """An image in memory, and where its structures are."""

    content: bytearray
    built: BuiltImage
    refcount_bits: int

    def word(self, place: int) -> int:
        return int(struct.unpack_from(">Q", self.content, place)[0])

    def set_word(self, place: int, word: int) -> None:
        struct.pack_into(">Q", self.content, place, word)

    def flip(self, place: int, mask: int) -> None:
        self.set_word(place, self.word(place) ^ mask)

    def set_field(self, name: str, value: int) -> None:
        place, code = HEADER_FIELDS[name]
        struct.pack_into(">" + code, self.content, place, value)

    def entry(self, cluster: int) -> int:
        """Where the L2 entry of a guest cluster is."""
        return self.built.l2_entry_offset(cluster)

    def block_entry(self, slot: int) -> int:
        return self.built.refcount_table_offset + 8 * slot

    def set_refcount(self, host_offset: int, refcount: int) -> None:
        """Of 16 bits."""
        assert self.refcount_bits == 16
        slot, index = divmod(host_offset // self.built.cluster_size, self.built.cluster_size // 2)
        struct.pack_into(">H", self.content, self.built.refcount_block_offsets[slot] + 2 * index, refcount)

    def refcount(self, host_offset: int) -> int:
        slot, index = divmod(host_offset // self.built.cluster_size, self.built.cluster_size // 2)
        return int(struct.unpack_from(">H", self.content, self.built.refcount_block_offsets[slot] + 2 * index)[0])


def plain(refcount_bits: int = 16) -> ImageBuilder:
    """Two L2 tables and all kinds of entries, without snapshots."""
    image = ImageBuilder(100 * SIZE, 9, refcount_bits=refcount_bits)
    for cluster in range(8):
        image.data(cluster, NOISE[cluster * SIZE : (cluster + 1) * SIZE])
    image.data(70, b"b" * SIZE).data(99, b"c" * SIZE).zero(20).zero(21, preallocated=True)
    return image.compressed(30, NOISE[:300]).compressed(31, NOISE[300:500])


def with_snapshots() -> ImageBuilder:
    """One that shares everything, and one with its own tables."""
    image = plain()
    own = image.map()
    own.data(1, b"own" * 100).compressed(2, NOISE[:300]).zero(5, preallocated=True)
    return image.snapshot(b"1", b"shares").snapshot(b"2", b"own", own)


def with_bitmaps() -> ImageBuilder:
    """Snapshots, and bitmaps as well."""
    image = with_snapshots()
    return image.bitmap(b"some", [(0, 1), (70 * SIZE, 1)], granularity_bits=9, flags=2)


def extended() -> ImageBuilder:
    """Subclusters."""
    size = 1 << 14
    image = ImageBuilder(100 * size, 14, extended_l2=True)
    image.data(0, NOISE[:size]).subclusters(9, NOISE[:size], allocated=0xFF, zero=0xF00)
    return image.subclusters(10, b"", allocated=0, zero=1).zero(12, preallocated=True)


def one_bit() -> ImageBuilder:
    """Refcounts that cannot count two references."""
    image = ImageBuilder(100 * SIZE, 9, refcount_bits=1)
    for cluster in range(8):
        image.data(cluster, NOISE[cluster * SIZE : (cluster + 1) * SIZE])
    return image


def long_table() -> ImageBuilder:
    """Several refcount blocks: 64 bits in clusters of 512 bytes."""
    return plain(64)


Break = Callable[[Image], None]


class Broken(NamedTuple):
    """One kind of damage. `mended`: `-r all` leaves nothing; `as_qemu`: our counters are those of qemu-img."""

    base: Callable[[], ImageBuilder]
    break_it: Break
    mended: bool = True
    as_qemu: bool = True


def broken(name: str, folder: Path) -> Image:
    """The damaged image of this name."""
    chosen = BROKEN[name]
    image = whole(chosen.base, folder)
    chosen.break_it(image)
    return image


def whole(base: Callable[[], ImageBuilder], folder: Path) -> Image:
    """The image before the damage."""
    told = base()
    built = told.build(folder / "built.qcow2")
    return Image(bytearray(built.path.read_bytes()), built, told.refcount_bits)


def _data(image: Image, cluster: int = 3) -> int:
    return image.built.data_offsets[cluster]


def _free_cluster(image: Image) -> int:
    """Host offset of a cluster behind everything, inside the file from now on."""
    image.content.extend(bytes(SIZE))
    return len(image.content) - SIZE


def _noise_refcounts(image: Image) -> None:
    for place in image.built.refcount_block_offsets.values():
        image.content[place : place + SIZE] = random.Random(place).randbytes(SIZE)


def _zero_blocks(image: Image) -> None:
    for place in image.built.refcount_block_offsets.values():
        image.content[place : place + SIZE] = bytes(SIZE)


def _flip_all_flags(image: Image) -> None:
    for index in image.built.l2_offsets:
        image.flip(image.built.l1_entry_offset(index), COPIED)
    for cluster in (0, 1, 5, 70, 99, 21):
        image.flip(image.entry(cluster), COPIED)


def _dirty(image: Image) -> None:
    image.set_field("incompatible_features", 1)
    _zero_blocks(image)


def _corrupt_and_leaking(image: Image) -> None:
    image.set_field("incompatible_features", 2)
    image.set_refcount(_data(image), 2)


def _corrupt_and_flagged(image: Image) -> None:
    image.set_field("incompatible_features", 2)
    _flip_all_flags(image)


def _leak_and_unknown_feature(image: Image) -> None:
    image.set_field("autoclear_features", 1 << 40)
    image.set_refcount(_data(image), 2)


def _low_and_high(image: Image) -> None:
    image.set_refcount(_data(image), 1)
    image.set_refcount(_data(image, 4), 3)


def _table_and_blocks_lost(image: Image) -> None:
    image.set_word(image.built.l1_entry_offset(1), 1 << 18)
    image.set_word(image.block_entry(0), 0)


def _several(image: Image) -> None:
    """A leak, a refcount that is too low, a wrong flag, an unaligned zero cluster, all at once."""
    image.set_refcount(_data(image, 0), 4)
    image.set_refcount(_data(image, 1), 1)
    image.flip(image.entry(70), COPIED)
    image.set_word(image.entry(21), image.word(image.entry(21)) + 512 | ZERO)


def _set_extra(image: Image, size: int) -> None:
    """Cut or grow the extra data of the first snapshot; the table moves to the end of the file."""
    start = image.built.snapshots_offset
    end = image.built.snapshot_entry_offsets[1]
    id_size, name_size = struct.unpack_from(">HH", image.content, start + 12)
    (old,) = struct.unpack_from(">I", image.content, start + 36)
    names = bytes(image.content[start + 40 + old :][: id_size + name_size])
    extra = bytes(image.content[start + 40 :][:old])[:size].ljust(size, b"\x55")
    first = bytes(image.content[start : start + 36]) + struct.pack(">I", size) + extra + names
    first += bytes(-len(first) % 8)
    rest = bytes(image.content[end : end + 40 + 24 + 8])
    place = -(-len(image.content) // SIZE) * SIZE
    image.content.extend(bytes(place - len(image.content)) + first + rest)
    image.content.extend(bytes(-len(image.content) % SIZE))
    image.set_field("snapshots_offset", place)
    image.set_refcount(start, 0)
    for cluster in range(place, place + len(first) + 70, SIZE):
        image.set_refcount(cluster, 1)


BROKEN: dict[str, Broken] = {
    "leak": Broken(plain, lambda image: image.set_refcount(_data(image), 5)),
    "leak of a free cluster": Broken(plain, lambda image: image.set_refcount(_free_cluster(image), 1)),
    "too low": Broken(with_snapshots, lambda image: image.set_refcount(_data(image), 1)),
    "too low and too high": Broken(with_snapshots, _low_and_high),
    "missing": Broken(plain, lambda image: image.set_refcount(_data(image), 0)),
    "no refcounts": Broken(with_snapshots, _zero_blocks),
    "refcounts of noise": Broken(with_snapshots, _noise_refcounts),
    "block entry with reserved bits": Broken(plain, lambda image: image.flip(image.block_entry(0), 8)),
    "block entry unaligned": Broken(extended, lambda image: image.flip(image.block_entry(0), 512)),
    "block entry lost": Broken(with_snapshots, lambda image: image.set_word(image.block_entry(0), 0)),
    "block past the end": Broken(
        with_snapshots, lambda image: image.set_word(image.block_entry(0), 1 << 20), as_qemu=False
    ),
    "unused block past the end": Broken(
        plain, lambda image: image.set_word(image.block_entry(3), 1 << 18), as_qemu=False
    ),
    "block named twice": Broken(
        plain, lambda image: image.set_word(image.block_entry(1), image.built.refcount_block_offsets[0])
    ),
    "block that the guest has": Broken(
        plain, lambda image: image.set_word(image.entry(40), image.built.refcount_block_offsets[0] | COPIED)
    ),
    "block that the guest has, 1 bit": Broken(
        one_bit, lambda image: image.set_word(image.block_entry(0), image.built.data_offsets[5]), as_qemu=False
    ),
    "table that the guest has": Broken(
        plain, lambda image: image.set_word(image.entry(40), image.built.refcount_table_offset | COPIED)
    ),
    "one of several blocks lost": Broken(long_table, lambda image: image.set_word(image.block_entry(0), 0)),
    "no refcount table": Broken(plain, lambda image: image.set_field("refcount_table_clusters", 0)),
    "refcount table past the end": Broken(plain, lambda image: image.set_field("refcount_table_offset", 1 << 22)),
    "flag missing": Broken(plain, lambda image: image.flip(image.entry(1), COPIED)),
    "flag of a table missing": Broken(plain, lambda image: image.flip(image.built.l1_entry_offset(0), COPIED)),
    "flags of shared clusters": Broken(with_snapshots, _flip_all_flags),
    "zero cluster unaligned": Broken(
        extended, lambda image: image.set_word(image.entry(12), image.word(image.entry(12)) + 512)
    ),
    "several": Broken(with_snapshots, _several),
    "several, and bitmaps": Broken(with_bitmaps, _several, as_qemu=False),
    "snapshot without disk size": Broken(with_snapshots, lambda image: _set_extra(image, 8)),
    "snapshot with too much extra data": Broken(with_snapshots, lambda image: _set_extra(image, 1400)),
    "dirty": Broken(plain, _dirty),
    "marked corrupt": Broken(plain, lambda image: image.set_field("incompatible_features", 2)),
    "corrupt and leaking": Broken(plain, _corrupt_and_leaking),
    "corrupt and shared clusters flagged": Broken(with_snapshots, _corrupt_and_flagged),
    "leak and unknown autoclear feature": Broken(plain, _leak_and_unknown_feature),
    # ---- what neither QEMU nor we repair
    "L1 entry with reserved bits": Broken(
        plain, lambda image: image.flip(image.built.l1_entry_offset(1), 1 << 60), mended=False
    ),
    "L2 entry with reserved bits": Broken(plain, lambda image: image.flip(image.entry(1), 1 << 59), mended=False),
    "L2 table unaligned": Broken(
        extended, lambda image: image.flip(image.built.l1_entry_offset(0), 512), mended=False, as_qemu=False
    ),
    "data cluster unaligned": Broken(
        extended, lambda image: image.set_word(image.entry(0), image.word(image.entry(0)) + 512), mended=False
    ),
    "subclusters contradict": Broken(
        extended, lambda image: image.set_word(image.entry(9) + 8, 0xFF << 32 | 0xFF), mended=False
    ),
    "compressed with flag": Broken(plain, lambda image: image.flip(image.entry(30), COPIED), mended=False),
    "data past the end": Broken(plain, lambda image: image.set_word(image.entry(50), 1 << 22 | COPIED), mended=False),
    "L2 table past the end": Broken(
        with_snapshots,
        lambda image: image.set_word(image.built.l1_entry_offset(1), 1 << 22),
        mended=False,
        as_qemu=False,
    ),
    "L2 table past the end, blocks lost": Broken(with_snapshots, _table_and_blocks_lost, mended=False, as_qemu=False),
    "snapshot L1 table unaligned": Broken(
        with_snapshots,
        lambda image: image.flip(image.built.snapshot_entry_offsets[1], 8),
        mended=False,
        as_qemu=False,
    ),
}


# ---- what only we repair, on request


def on_data_file(folder: Path, *, raw: bool = False, extended_l2: bool = False) -> ImageBuilder:
    """An image with a data file; a raw one has every cluster mapped."""
    bits = 14 if extended_l2 else 9
    size = 1 << bits
    image = ImageBuilder(100 * size, bits, extended_l2=extended_l2).data_file(folder / "data", b"data", raw=raw)
    for cluster in range(100):
        if raw or cluster < 8:
            image.data(cluster, NOISE[cluster * 100 :][:size])
    return image if raw else image.zero(20, preallocated=True)


def in_the_wrong_place(folder: Path) -> Image:
    """Two clusters of the data file are not where their guest is; there is a bitmap."""
    image = whole(lambda: on_data_file(folder).bitmap(b"some", [(0, 1)], granularity_bits=9, flags=2), folder)
    image.set_word(image.entry(3), image.word(image.entry(3)) + 5 * SIZE)
    image.set_word(image.entry(20), image.word(image.entry(20)) + SIZE)
    return image


def with_gaps(folder: Path, *, extended_l2: bool = False) -> Image:
    """A raw data file of which a cluster, and with small clusters a whole L2 table, is not mapped."""
    image = whole(lambda: on_data_file(folder, raw=True, extended_l2=extended_l2), folder)
    image.set_word(image.entry(3), 0)
    if extended_l2:
        image.set_word(image.entry(3) + 8, 0)
        image.set_word(image.entry(4) + 8, 0xFFFF)
        return image
    image.set_word(image.built.l1_entry_offset(1), 0)
    image.set_refcount(image.built.l2_offsets[1], 0)
    return image


def with_wrong_flags(folder: Path, *, raw: bool) -> Image:
    """On a data file: flags of L1 and L2 entries that lack, refcounts of tables that are wrong."""
    image = whole(lambda: on_data_file(folder, raw=raw), folder)
    image.flip(image.entry(3), COPIED)
    image.flip(image.entry(7), COPIED)
    image.flip(image.built.l1_entry_offset(0), COPIED)
    image.set_refcount(image.built.l2_offsets[0], 2)
    image.set_refcount(_free_cluster(image), 1)
    return image


def dirty_with_data_file(folder: Path, *, raw: bool) -> Image:
    """As a program with lazy refcounts leaves an image with a data file that it was killed over."""
    image = whole(lambda: on_data_file(folder, raw=raw), folder)
    image.set_field("incompatible_features", 4 | 1)
    _zero_blocks(image)
    return image


def with_aliases(folder: Path, base: Callable[[], ImageBuilder] = plain) -> Image:
    """Three guest clusters in one host cluster; refcounts and flags say so."""
    image = whole(base, folder)
    place = image.built.data_offsets[3]
    for cluster in (3, 50, 98):
        image.set_word(image.entry(cluster), place)
    image.set_refcount(place, 3)
    return image


def with_odd_bits(folder: Path) -> Image:
    """Bits that mean nothing: in an L1 entry, in an L2 entry, and bit 0 beside a subcluster bitmap."""
    image = whole(extended, folder)
    image.flip(image.built.l1_entry_offset(0), 1 << 60)
    image.flip(image.entry(0), 1 << 58)
    image.flip(image.entry(9), 1)
    return image
