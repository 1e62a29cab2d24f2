"""The kinds of images that are crashed: small, with something of everything that a write can meet, made in memory.

Owns their contents and what the guest sees of them before the first request, told by the builder and not by the engine
under test. What lies where is the same in every run.
"""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.crash.history import text
from tests.support.builder import ImageBuilder, deflate
from tests.support.fields import ALL_PARTS
from tests.support.tools import ToolError, qemu_img, qemu_io

KIB, MIB = 1 << 10, 1 << 20
UNKNOWN_AUTOCLEAR = 1 << 17
SNAPSHOT = "1"


@dataclass(frozen=True)
class Kind:
    """An image and what is known of it. `spots` are guest clusters that are worth a request, by what they are.

    `data` and `backing` are the contents of its other files, None if it has none. `sizes` are what it is resized to.
    """

    name: str
    content: bytes
    data: bytes | None
    backing: bytes | None
    view: bytes
    snapshot_view: bytes | None
    cluster_size: int
    l2_coverage: int
    spots: dict[str, tuple[int, ...]]
    sizes: tuple[int, ...]

    @property
    def files(self) -> tuple[bytes, ...]:
        """The contents of the files that are written to: the image, and its data file if it has one."""
        return (self.content,) if self.data is None else (self.content, self.data)


class _Filler:
    """Fills a builder with a repeating mixture, and notes which guest clusters are what."""

    def __init__(self, image: ImageBuilder) -> None:
        self.image = image
        self.spots: dict[str, list[int]] = {}

    def fill(self, clusters: range, *kinds: str) -> None:
        """The kinds in turn, three clusters of each."""
        for index, cluster in enumerate(clusters):
            self.tell(cluster, kinds[index // 3 % len(kinds)])

    def tell(self, cluster: int, kind: str) -> None:
        image, size = self.image, self.image.cluster_size
        payload = text("base", cluster * size, size)
        if kind == "data":
            image.data(cluster, payload)
        elif kind == "zero":
            image.zero(cluster)
        elif kind == "kept":
            image.zero(cluster, preallocated=True, payload=text("hidden", cluster * size, size))
        elif kind == "packed":
            image.compressed(cluster, payload, stream=deflate(payload))
        elif kind == "parts":
            allocated = random.Random(cluster).getrandbits(32)
            zero = random.Random(-cluster).getrandbits(32) & ~allocated & ALL_PARTS
            image.subclusters(cluster, payload, allocated=allocated, zero=zero)
        elif kind == "space":
            image.subclusters(cluster, text("hidden", cluster * size, size), allocated=0)
        self.spots.setdefault(kind, []).append(cluster)


def _new(virtual_size: int, cluster_bits: int, *kinds: str, count: int, **options: int | bool) -> _Filler:
    image = ImageBuilder(virtual_size, cluster_bits, autoclear=UNKNOWN_AUTOCLEAR, **options)  # type: ignore[arg-type] # of its own
    filler = _Filler(image)
    filler.fill(range(count), *kinds)
    return filler


def _finish(name: str, filler: _Filler, *, backing: bytes | None = None, sizes: tuple[int, ...] | None = None) -> Kind:
    image = filler.image
    if backing is not None:
        image.backing(b"backing", b"raw")
    with tempfile.TemporaryDirectory(prefix="kind-") as folder:
        if image.data_path is not None:
            image.data_path = Path(folder) / "data"
        image.build(Path(folder) / "image")
        content = (Path(folder) / "image").read_bytes()
        data = None if image.data_path is None else image.data_path.read_bytes()
    view = image.expected(backing or b"")
    return Kind(
        name,
        content,
        data,
        backing,
        view,
        view if image.snapshots else None,
        image.cluster_size,
        image.cluster_size * image.l2_entries,
        {kind: tuple(clusters) for kind, clusters in filler.spots.items()},
        (image.virtual_size // 2 // KIB * KIB, image.virtual_size + 3 * image.cluster_size + 512)
        if sizes is None
        else sizes,
    )


def _plain() -> Kind:
    filler = _new(MIB, 16, "data", "none", "zero", "kept", count=16)
    return _finish("plain", filler, sizes=(MIB // 2 + 512, MIB + MIB // 2))


def _small() -> Kind:
    """Four L2 tables, the last of which is not there."""
    filler = _new(128 * KIB, 9, "data", "none", "zero", "kept", "data", "packed", count=170)
    filler.spots["none"] += range(180, 256)
    return _finish("small", filler, sizes=(45 * KIB + 512, 160 * KIB, 3 * MIB))


def _four_k() -> Kind:
    """Past the first L2 table."""
    filler = _new(2 * MIB + 64 * KIB, 12, "data", "zero", "packed", "none", "kept", count=24)
    filler.fill(range(506, 519), "data", "none", "kept")
    return _finish("4k", filler, sizes=(2 * MIB - 6 * KIB, 2 * MIB + 80 * KIB, 4 * MIB + 512))


def _version_2() -> Kind:
    filler = _new(64 * KIB, 9, "data", "none", "packed", count=100, version=2)
    filler.image.autoclear = 0
    return _finish("version 2", filler)


def _backing() -> Kind:
    filler = _new(96 * KIB, 10, "none", "data", "none", "zero", "kept", "packed", count=90)
    return _finish("backing", filler, backing=text("below", 0, 70 * KIB + 512))


def _snapshot() -> Kind:
    """Everything is shared with an internal snapshot."""
    filler = _new(96 * KIB, 9, "data", "none", "zero", "kept", "packed", count=160)
    filler.image.snapshot(SNAPSHOT.encode(), b"first")
    return _finish("snapshot", filler)


def _extended() -> Kind:
    filler = _new(512 * KIB, 14, "data", "parts", "none", "kept", "space", count=15, extended_l2=True)
    filler.tell(16, "packed")
    filler.fill(range(17, 24), "zero", "parts")
    filler.spots["none"] += range(24, 32)
    return _finish("extended", filler)


def _extended_backing() -> Kind:
    filler = _new(256 * KIB, 14, "none", "parts", "space", "packed", count=12, extended_l2=True)
    return _finish("extended over backing", filler, backing=text("below", 0, 200 * KIB))


def _data_file() -> Kind:
    filler = _new(96 * KIB, 9, "data", "none", "zero", "kept", count=150)
    filler.image.data_file(Path("data"), b"data")
    return _finish("data file", filler)


def _extended_data_file() -> Kind:
    filler = _new(400 * KIB, 14, "data", "parts", "none", "zero", "space", "kept", count=22, extended_l2=True)
    filler.image.data_file(Path("data"), b"data")
    return _finish("extended data file", filler)


def _raw_filler(size: int) -> _Filler:
    """As `data_file_raw` has it: everything is allocated, and what is zero is so in the data file."""
    image = ImageBuilder(size, 9, autoclear=UNKNOWN_AUTOCLEAR).data_file(Path("data"), b"data", raw=True)
    filler = _Filler(image)
    for cluster in range(size // 512):
        if cluster % 5 == 4:
            image.zero(cluster, preallocated=cluster % 2 == 0)
            filler.spots.setdefault("zero", []).append(cluster)
        else:
            image.data(cluster, text("base", cluster * 512, 512 if cluster % 3 else 0))
            filler.spots.setdefault("data", []).append(cluster)
    return filler


def _raw_data_file() -> Kind:
    return _finish("raw data file", _raw_filler(48 * KIB), sizes=(40 * KIB, 24 * KIB, 50 * KIB))


def _raw_data_file_bitmap() -> Kind:
    """An enabled bitmap, and one that stays as it is."""
    filler = _raw_filler(40 * KIB)
    filler.image.bitmap(b"enabled", [(0, KIB)], granularity_bits=9, flags=2)
    filler.image.bitmap(b"disabled", [(8 * KIB, 9 * KIB)], granularity_bits=10)
    return _finish("raw data file with bitmap", filler, sizes=(30 * KIB, 44 * KIB))


def _extended_raw() -> Kind:
    image = ImageBuilder(160 * KIB, 14, extended_l2=True, autoclear=UNKNOWN_AUTOCLEAR)
    image.data_file(Path("data"), b"data", raw=True)
    filler = _Filler(image)
    for cluster in range(10):
        if cluster % 4 == 3:
            image.subclusters(cluster, b"", allocated=0)
            filler.spots.setdefault("space", []).append(cluster)
        else:
            filler.tell(cluster, "data")
    return _finish("extended raw data file", filler)


def _bitmap() -> Kind:
    """Two enabled bitmaps and a disabled one."""
    filler = _new(96 * KIB, 9, "data", "none", "zero", "packed", count=150)
    image = filler.image
    image.bitmap(b"enabled", [(0, 512), (70 * KIB, 512)], granularity_bits=9, flags=2)
    image.bitmap(b"disabled", [(4 * KIB, KIB), (59 * KIB, 20 * KIB)], granularity_bits=9)
    image.bitmap(b"coarse", granularity_bits=12, flags=2)
    return _finish("bitmap", filler, sizes=(60 * KIB, 200 * KIB, 4 * MIB))


def _data_file_bitmap() -> Kind:
    filler = _new(64 * KIB, 9, "data", "none", "zero", count=100)
    """One bitmap was left in use, so the disk keeps its size."""
    filler.image.data_file(Path("data"), b"data").bitmap(b"enabled", [(0, KIB)], granularity_bits=9, flags=2)
    filler.image.bitmap(b"stale", [(8 * KIB, KIB)], granularity_bits=12, flags=3)
    return _finish("data file with bitmap", filler, sizes=())


def _growth() -> Kind:
    """One more cluster, and the refcount table is too small; the blocks are full but for a few clusters."""
    filler = _new(96 * KIB, 9, "data", "none", "zero", count=120, refcount_bits=64)
    image = filler.image
    last = 64 * 64 - 1  # of the clusters that one cluster of the refcount table describes
    image.data(191, text("base", 191 * 512, 512), host_offset=last * 512)
    for cluster in range(2000, last):
        image.refcount(cluster, 1)
    with tempfile.TemporaryDirectory(prefix="kind-") as folder:
        built = image.build(Path(folder) / "image")
    for cluster in range(max(built.refcount_block_offsets.values()) // 512 + 6, 2000):
        image.refcount(cluster, 1)
    return _finish("growth", filler, sizes=(60 * KIB, 140 * KIB, 5 * MIB))


def _narrow() -> Kind:
    filler = _new(96 * KIB, 9, "data", "none", "zero", "kept", count=150, refcount_bits=1)
    return _finish("1-bit refcounts", filler)


def _dirty() -> Kind:
    """As a program with lazy refcounts leaves an image that it was killed over."""
    size = 96 * KIB
    with tempfile.TemporaryDirectory(prefix="kind-") as folder:
        path = Path(folder) / "image"
        qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=512", path, str(size))
        pattern = Path(folder) / "pattern"
        pattern.write_bytes(text("base", 0, size))
        whole = bytearray(size)
        commands = []
        for start, length in ((0, 20 * KIB), (30 * KIB, 512), (40 * KIB, 9 * KIB), (70 * KIB, 10 * KIB)):
            part = Path(folder) / str(start)
            part.write_bytes(text("base", start, length))
            whole[start : start + length] = part.read_bytes()
            commands.append(f"write -q -s {part} {start} {length}")
        try:
            qemu_io(path, *commands, "flush", "abort", options=("-f", "qcow2"))
        except ToolError:
            content = path.read_bytes()
    assert content[79] & 1, "qemu-io did not leave the image dirty"
    spots = {"data": (*range(40), 60, *range(80, 98)), "none": (*range(41, 58), *range(100, 140), 170, 190)}
    return Kind("dirty", content, None, None, bytes(whole), None, 512, 32 * KIB, spots, (60 * KIB, 130 * KIB))


_MAKERS: dict[str, Callable[[], Kind]] = {
    "plain": _plain,
    "small": _small,
    "4k": _four_k,
    "version2": _version_2,
    "backing": _backing,
    "snapshot": _snapshot,
    "extended": _extended,
    "extended_backing": _extended_backing,
    "data_file": _data_file,
    "raw_data_file": _raw_data_file,
    "extended_data_file": _extended_data_file,
    "extended_raw": _extended_raw,
    "bitmap": _bitmap,
    "data_file_bitmap": _data_file_bitmap,
    "raw_data_file_bitmap": _raw_data_file_bitmap,
    "growth": _growth,
    "narrow": _narrow,
    "dirty": _dirty,
}
KINDS = tuple(_MAKERS)


@functools.cache
def kind(name: str) -> Kind:
    """The kind of this name, made once."""
    return _MAKERS[name]()


def all_kinds() -> Iterator[Kind]:
    return map(kind, KINDS)
