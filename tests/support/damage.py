"""Sound images of every kind, and images of which one word was changed at random.

It owns `SOUND`, on which `damage_ways` builds its table of damaged images, and `mutate`. It refuses to know the package
under test: what QEMU says of an image is asked of QEMU.

    path = SOUND["rich 16"](tmp_path)
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tests.support.builder import ImageBuilder
from tests.support.fields import COMPRESSED, COPIED, ZERO
from tests.support.tools import qemu_img, qemu_io

IMAGE = "image.qcow2"
DATA = "image.data"


def noise(number: int, length: int) -> bytes:
    """Bytes that do not compress."""
    return random.Random(number).randbytes(length)


def text(number: int, length: int) -> bytes:
    """Bytes that compress well."""
    return (b"%d " % number * length)[:length]


def plain(cluster_bits: int = 12, **options: int | str | bool) -> ImageBuilder:
    """A disk with data in two L2 tables."""
    size = 1 << cluster_bits
    per_table = size // (16 if options.get("extended_l2") else 8)
    image = ImageBuilder(2 * per_table * size, cluster_bits, **options)  # type: ignore[arg-type] # of its own
    for cluster in (0, 1, 2, 5, per_table - 1, per_table, per_table + 7):
        image.data(cluster, text(cluster, size))
    return image.zero(8).zero(9, preallocated=True) if options.get("version", 3) == 3 else image


def rich(cluster_bits: int = 12, **options: int | str | bool) -> ImageBuilder:
    """Data, zeros, compressed data, two snapshots of which one shares everything, bitmaps."""
    image = plain(cluster_bits, **options)
    size = image.cluster_size
    for cluster in range(16, 22):
        image.compressed(cluster, text(cluster, size))
    image.compressed(23, noise(23, size // 2))
    old = image.map().data(0, b"old").compressed(3, text(3, size))
    if image.version == 3:
        old.zero(4, preallocated=True)
    image.snapshot(b"1", b"shared").snapshot(b"2", b"own", old)
    if image.version == 3:
        image.bitmap(b"dirty", [(0, size), (5 * size, 1)], granularity_bits=9, literal=True)
        image.bitmap(b"clean", granularity_bits=12)
    return image


def with_subclusters(cluster_bits: int = 14, **options: int | str | bool) -> ImageBuilder:
    """Extended L2 entries of every sort."""
    image = ImageBuilder(1 << 24, cluster_bits, extended_l2=True, **options)  # type: ignore[arg-type] # of its own
    size = image.cluster_size
    image.data(0, text(0, size)).zero(1).zero(2, preallocated=True)
    image.subclusters(3, text(3, size), allocated=0x00FF_0F10, zero=0xF000_0083)
    image.subclusters(4, text(4, size), allocated=0)
    image.subclusters(5, b"", allocated=0, zero=0x0F0F_0F00, stored=False)
    return image.compressed(6, text(6, size)).compressed(7, text(7, size)).data(600, text(600, size))


def with_data_file(
    folder: Path, cluster_bits: int = 12, *, raw: bool = False, **options: int | str | bool
) -> ImageBuilder:
    """Guest data in a file of its own."""
    image = ImageBuilder(1 << 20, cluster_bits, **options)  # type: ignore[arg-type] # of its own
    image.data_file(folder / DATA, bytes(folder / DATA), raw=raw)
    size = image.cluster_size
    per_disk = image.virtual_size // size
    for cluster in range(per_disk) if raw else (0, 1, 5, per_disk - 1):
        image.data(cluster, text(cluster, size) if cluster % 3 else b"")
    return image if raw else image.zero(2).zero(3, preallocated=True)


def _made_by_qemu(options: str, *commands: str, snapshots: int = 0) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / IMAGE
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "16M")
        for number in range(snapshots + 1):
            qemu_io(path, "write -P 1 0 300k", f"write -P 2 {5 + number}M 200k", "write -z 9M 1M", *commands)
            if number < snapshots:
                qemu_img("snapshot", "-c", f"number {number}", path)
        return path

    return make


def _built(make: Callable[[Path], ImageBuilder]) -> Callable[[Path], Path]:
    return lambda folder: make(folder).build(folder / IMAGE).path


def _with_qemu_bitmaps(folder: Path) -> Path:
    path = _made_by_qemu("cluster_size=4k")(folder)
    for number in range(3):
        qemu_img("bitmap", "--add", "-g", "512", path, f"bitmap {number}")
        qemu_io(path, f"write {number}M 100k")
    return path


def _with_qemu_data_file(folder: Path, *, raw: bool = False) -> Path:
    path = folder / IMAGE
    options = f"cluster_size=4k,data_file={folder / DATA},data_file_raw={'on' if raw else 'off'}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "4M")
    qemu_io(path, "write 0 1M", "write -z 2M 64k", "write 3M 5k")
    return path


def _compressed_by_qemu(folder: Path) -> Path:
    source, path = folder / "source.raw", folder / IMAGE
    source.write_bytes(b"".join(text(number, 3000) + noise(number, 1100) for number in range(300)))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "cluster_size=4k", source, path)
    return path


SOUND: dict[str, Callable[[Path], Path]] = {
    "empty": _built(lambda folder: ImageBuilder(1 << 20, 12)),
    "no disk": _built(lambda folder: ImageBuilder(0, 12)),
    **{f"plain {bits}": _built(lambda folder, bits=bits: plain(bits)) for bits in (9, 12, 16, 21)},  # type: ignore[misc]
    **{
        f"rich, refcounts of {bits} bits": _built(lambda folder, bits=bits: rich(9, refcount_bits=bits))  # type: ignore[misc]
        for bits in (4, 8, 16, 32, 64)
    },
    "refcounts of 1 bit": _built(lambda folder: plain(9, refcount_bits=1)),
    "refcounts of 2 bits": _built(lambda folder: plain(9, refcount_bits=2)),
    "rich 12": _built(lambda folder: rich(12)),
    "rich 16": _built(lambda folder: rich(16)),
    "version 2": _built(lambda folder: rich(12, version=2)),
    "zstd": _built(lambda folder: rich(12, compression="zstd")),
    "subclusters": _built(lambda folder: with_subclusters()),
    "data file": _built(with_data_file),
    "raw data file": _built(lambda folder: with_data_file(folder, raw=True)),
    "zero prealloc": _built(lambda folder: ImageBuilder(1 << 20, 9).zero(5, preallocated=True)),
    "QEMU 512": _made_by_qemu("cluster_size=512"),
    "QEMU 64k": _made_by_qemu("cluster_size=64k", snapshots=3),
    "QEMU 64k, no snapshots": _made_by_qemu("cluster_size=64k"),
    "QEMU subclusters, no snapshots": _made_by_qemu("extended_l2=on,cluster_size=16k", "write 7M 1k"),
    "QEMU 2M": _made_by_qemu("cluster_size=2M", snapshots=1),
    "QEMU 1 bit": _made_by_qemu("refcount_bits=1"),
    "QEMU 64 bits": _made_by_qemu("refcount_bits=64,cluster_size=1k", snapshots=2),
    "QEMU version 2": _made_by_qemu("compat=0.10,cluster_size=4k", snapshots=2),
    "QEMU subclusters": _made_by_qemu("extended_l2=on,cluster_size=16k", "write 7M 1k", "write -z 8M 4k", snapshots=2),
    "QEMU preallocation": _made_by_qemu("preallocation=metadata,cluster_size=4k"),
    "QEMU bitmaps": _with_qemu_bitmaps,
    "QEMU data file": _with_qemu_data_file,
    "QEMU raw data file": lambda folder: _with_qemu_data_file(folder, raw=True),
    "QEMU compressed": _compressed_by_qemu,
}
"""Images in which nothing is wrong: made in a folder, and where they are."""


def metadata_words(content: bytes) -> list[tuple[str, int]]:
    """What and where the 8-byte words of an image's metadata are: those that say something, and some beside them."""
    cluster_bits = _word(content, 20, ">I")
    size = 1 << cluster_bits
    found = [("header", place) for place in (24, 40, 48, 64)] + [("header counts", place) for place in (32, 56)]
    l1_offset, table_offset, snapshots_offset = (_word(content, place) for place in (40, 48, 64))
    l1_size, table_clusters, snapshot_count = (_word(content, place, ">I") for place in (36, 56, 60))
    found += _words_of(content, "refcount table", table_offset, table_clusters * size)
    for _, place in _words_of(content, "", table_offset, table_clusters * size):
        found += _words_of(content, "refcount block", _word(content, place) & _OFFSETS, size)
    l1_tables = [("L1", l1_offset, l1_size)]
    place = snapshots_offset
    for _ in range(min(snapshot_count, 64)):
        found += [("snapshot", place + step) for step in range(0, 64, 8)]
        l1_tables.append(("snapshot L1", _word(content, place), _word(content, place + 8, ">I")))
        lengths = _word(content, place + 12, ">H") + _word(content, place + 14, ">H")
        place = place + 40 + _word(content, place + 36, ">I") + lengths + 7 & ~7
    for name, offset, count in l1_tables:
        words = _words_of(content, name, offset, 8 * count)
        found += words
        for _, entry in words:
            found += _words_of(content, name.replace("L1", "L2"), _word(content, entry) & _OFFSETS, size)
    return found


_OFFSETS = 0x00FF_FFFF_FFFF_FE00


def _word(content: bytes, place: int, code: str = ">Q") -> int:
    if place + struct.calcsize(code) > len(content):
        return 0
    return int(struct.unpack_from(code, content, place)[0])


def _words_of(content: bytes, name: str, start: int, length: int) -> list[tuple[str, int]]:
    """The words of a table that are not 0, and the first that is."""
    stop = min(start + length, len(content)) & ~7
    if not start or start % 8 or start >= stop:
        return []
    values = np.frombuffer(content, dtype=np.uint64, count=(stop - start) // 8, offset=start)
    used, unused = np.flatnonzero(values), np.flatnonzero(values == 0)[:1]
    return [(name, start + 8 * index) for index in (*used.tolist(), *unused.tolist())]


def mutate(content: bytes, words: Sequence[tuple[str, int]], dice: random.Random) -> tuple[str, bytes]:
    """An image with one of these words changed (see `metadata_words`), or cut short, and what was done to it."""
    names = sorted({name for name, _ in words})
    size = 1 << _word(content, 20, ">I")
    if dice.random() < 0.04:
        length = max(dice.randrange(len(content)) & ~dice.choice((0, 511, size - 1)), 512)
        return f"cut to {length}", content[:length]
    chosen = dice.choice(names)
    name, place = dice.choice([word for word in words if word[0] == chosen])
    before = _word(content, place)
    other = _word(content, dice.choice(words)[1])
    cluster = dice.randrange(len(content) // size + 3) * size
    value = dice.choice(
        [
            *(before ^ 1 << dice.randrange(64) for _ in range(6)),
            before ^ COPIED, before ^ ZERO, before ^ COMPRESSED, before + size, before + 512, 0, other,
            cluster, cluster | COPIED, cluster | 512, cluster | COPIED | ZERO, before & ~_OFFSETS | cluster,
            (1 << dice.randrange(30, 60)) | COPIED, dice.getrandbits(64), before + (1 << dice.choice((0, 8, 16, 32))),
        ]
    ) & (1 << 64) - 1  # fmt: skip
    if name == "header counts":
        value &= (1 << 32 if place == 32 else 1 << 64) - 1  # QEMU wants to have the key of an encrypted image
    if name == "header":  # offsets and sizes
        value = dice.choice([cluster, cluster + 512, before ^ 1 << dice.randrange(9, 64), 0, other & _OFFSETS])
    changed = content[:place] + struct.pack(">Q", value) + content[place + 8 :]
    return f"{name} at {place:#x}: {before:#x} -> {value:#x}", changed
