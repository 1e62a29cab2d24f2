"""Another size of the disk: what was there stays, what is new is zeros wherever it comes from, and QEMU agrees."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest

from qcow2_plugin import Image, Policy, open_image
from qcow2_plugin.errors import ResizeError
from tests.support.builder import ImageBuilder
from tests.support.model import Model, assert_reads_as
from tests.support.tools import convert_to_raw, qemu_img, qemu_img_json, qemu_io

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
BELOW = 3 * MIB + 700


@dataclass(frozen=True)
class Kind:
    """How an image is made; `below` is the form of its backing file, which is longer than the disk."""

    options: str = ""
    cluster_size: int = 65536
    below: str = ""
    compressed: bool = False

    @property
    def has_data_file(self) -> bool:
        return "data_file=" in self.options

    @property
    def is_raw(self) -> bool:
        return "data_file_raw=on" in self.options


KINDS = {
    "64k": Kind(compressed=True),
    "512": Kind("cluster_size=512,refcount_bits=64", 512, compressed=True),
    "2M": Kind("cluster_size=2M", 2 * MIB),
    "1-bit refcounts": Kind("cluster_size=4k,refcount_bits=1", 4096, compressed=True),
    "version 2": Kind("cluster_size=4k,compat=0.10", 4096, compressed=True),
    "extended": Kind("cluster_size=16k,extended_l2=on", 16384, compressed=True),
    "preallocated": Kind("cluster_size=4k,preallocation=metadata", 4096),
    "lazy": Kind("cluster_size=4k,lazy_refcounts=on", 4096),
    "over raw": Kind("cluster_size=4k", 4096, "raw", compressed=True),
    "over qcow2": Kind("cluster_size=64k", 65536, "qcow2"),
    "version 2 over raw": Kind("cluster_size=4k,compat=0.10", 4096, "raw"),
    "extended over raw": Kind("cluster_size=64k,extended_l2=on", 65536, "raw"),
    "data file": Kind("cluster_size=4k,data_file={data}", 4096),
    "data file over raw": Kind("cluster_size=4k,data_file={data}", 4096, "raw"),
    "raw data file": Kind("cluster_size=64k,data_file={data},data_file_raw=on", 65536),
    "extended raw data file": Kind("cluster_size=16k,extended_l2=on,data_file={data},data_file_raw=on", 16384),
}
SIZE = 700 * KIB + 512  # inside a cluster of any kind but the smallest


class Disk:
    """An image of a kind, filled by QEMU to the last byte, and what it reads as."""

    def __init__(self, kind: Kind, folder: Path, size: int = SIZE) -> None:
        self.kind, self.folder = kind, folder
        self.path, self.data_path = folder / "disk.qcow2", folder / "disk.data"
        below = random.Random(1).randbytes(BELOW) if kind.below else b""
        words: list[str | Path] = ["-o", kind.options.format(data=self.data_path)] if kind.options else []
        if below:
            (folder / "below.raw").write_bytes(below)
            if kind.below == "qcow2":
                qemu_img("convert", "-f", "raw", "-O", "qcow2", folder / "below.raw", folder / "below.qcow2")
            words += ["-b", folder / f"below.{kind.below}", "-F", kind.below]
        qemu_img("create", "-q", "-f", "qcow2", *words, self.path, str(size))
        self.model = Model(size, kind.cluster_size, content=below)
        commands = []
        if kind.compressed:
            last = (size - 1) // kind.cluster_size * kind.cluster_size
            commands += [self._write(0, kind.cluster_size, "-c"), self._write(last, size - last, "-c")]
        commands += [
            self._write(size // 2 - 9000, 20_000),
            self._write(size - 70_000 - kind.cluster_size % MIB, 69_000),
        ]
        if not kind.compressed:
            commands.append(self._write(size - 1000, 1000))
        qemu_io(self.path, *commands, options=("-f", "qcow2", "-t", "unsafe"))

    def _write(self, offset: int, length: int, flag: str = "") -> str:
        offset, length = max(offset, 0), length + min(offset, 0)
        length = min(length, self.model.virtual_size - offset)
        data = bytes(random.Random(offset).choices(b"qcow2 data\xff", k=length // 2 + 1)) * 2
        payload = self.folder / f"payload-{offset}"
        payload.write_bytes(data[:length])
        self.model.write(offset, data[:length])
        return f"write {flag} -s {payload} {offset} {length}"

    def open(self) -> Image:
        return open_image(self.path, writable=True, policy=Policy.TRUSTED)

    def resize(self, size: int, *, preallocation: str = "off") -> None:
        """By us; the disk is right at once, and after it was opened anew."""
        with self.open() as image:
            image.resize(size, allow_shrink=True, preallocation=preallocation)
            self.model.resize(size)
            self.assert_all_zeros_behind(image)
            assert_reads_as(image, self.model)
        self.assert_as_modelled()

    def assert_all_zeros_behind(self, image: Image) -> None:
        """Reads at the end, where the model may know of nothing."""
        for offset in {max(image.virtual_size - 5000, 0), image.virtual_size // 2}:
            length = min(image.virtual_size - offset, 5000)
            assert image.pread(length, offset) == self.model.read(offset, length)

    def assert_as_modelled(self) -> None:
        """QEMU finds nothing and reads the same; a raw data file is the disk."""
        qemu_img("check", "-f", "qcow2", self.path)
        raw = self.folder / "model.raw"
        self.model.save(raw)
        qemu_img("compare", "-f", "qcow2", "-F", "raw", self.path, raw)
        if self.kind.is_raw:
            assert self.data_path.stat().st_size >= self.model.virtual_size
            with open(self.data_path, "rb") as data, open(raw, "rb") as wanted:
                while piece := wanted.read(MIB):
                    assert data.read(len(piece)) == piece

    def facts(self) -> tuple[int, int]:
        """Virtual size, and number of L1 entries."""
        header = self.path.read_bytes()[:512]
        return int.from_bytes(header[24:32], "big"), int.from_bytes(header[36:40], "big")


SIZES = {
    "by a sector": [SIZE + 512],
    "to the end of the cluster": [-(-SIZE // 65536) * 65536],
    "by some clusters": [SIZE + 300 * KIB + 512],
    "past the backing file": [4 * MIB + 512],
    "by many tables": [40 * MIB],
    "shorter": [100 * KIB + 512],
    "to one sector": [512],
    "to nothing and back": [0, SIZE],
    "inside the last cluster and back": [SIZE - 512, SIZE],
    "inside a cluster and back, in steps": [330 * KIB + 512, 330 * KIB + 1024, 331 * KIB, SIZE, 2 * SIZE],
    "to the border of a cluster and back": [256 * KIB, SIZE],
    "there and back again": [5 * MIB, SIZE, 5 * MIB],
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_of_another_size(kind: str, sizes: str, tmp_path: Path) -> None:
    disk = Disk(KINDS[kind], tmp_path)
    for size in SIZES[sizes]:
        disk.resize(size)
        assert disk.facts()[0] == size


@pytest.mark.parametrize("kind", ["64k", "512", "extended", "data file", "raw data file", "over raw"])
def test_we_and_qemu_resize_in_turn(kind: str, tmp_path: Path) -> None:
    """Neither leaves anything that the other would stumble over, and L1 tables are as long as QEMU would have them."""
    disk = Disk(KINDS[kind], tmp_path)
    ours, theirs = [SIZE + 100 * KIB, 3 * MIB, 200 * KIB + 1024], [2 * MIB, 100 * KIB, 900 * KIB]
    for our_size, their_size in zip(ours, theirs, strict=True):
        disk.resize(our_size)
        old_size, their_old_end = our_size, -(-our_size // disk.kind.cluster_size) * disk.kind.cluster_size
        qemu_img("resize", "-q", "-f", "qcow2", "--shrink", disk.path, str(their_size))
        disk.model.resize(their_size)
        if their_size > old_size:  # QEMU shows what was behind the end in the last cluster
            end = min(their_old_end, their_size)
            disk.model.write(old_size, convert_to_raw(disk.path)[old_size:end])
        disk.assert_as_modelled()
    by_qemu = tmp_path / "by-qemu.qcow2"
    options = disk.kind.options.format(data=tmp_path / "other.data")
    qemu_img("create", "-q", "-f", "qcow2", "-o", options or "compat=1.1", by_qemu, "1M")
    for path in (disk.path, by_qemu):
        qemu_img("resize", "-q", "-f", "qcow2", "--shrink", path, "1M")
    disk.model.resize(MIB)
    for size in (5 * MIB, 20 * MIB):
        qemu_img("resize", "-q", "-f", "qcow2", by_qemu, str(size))
        with disk.open() as image:
            image.resize(size)
        header = by_qemu.read_bytes()[:512]
        assert disk.facts()[0] == int.from_bytes(header[24:32], "big")
        assert disk.facts()[1] >= int.from_bytes(header[36:40], "big")


def test_what_was_behind_the_end_is_not_shown_when_qemu_has_shrunk(tmp_path: Path) -> None:
    """QEMU leaves the bytes in the last cluster, and in the data file; we do not show them."""
    for number, name in enumerate(("64k", "extended", "data file", "preallocated")):
        folder = tmp_path / str(number)
        folder.mkdir()
        disk = Disk(KINDS[name], folder)
        size = SIZE - 2048
        qemu_img("resize", "-q", "-f", "qcow2", "--shrink", disk.path, str(size))
        disk.model.resize(size)
        disk.resize(SIZE + 100 * KIB)


def test_bytes_that_a_longer_data_file_has_are_not_shown(tmp_path: Path) -> None:
    """Whatever is behind the disk in its data file is not the guest's."""
    for number, kind in enumerate(("data file", "raw data file")):
        folder = tmp_path / str(number)
        folder.mkdir()
        disk = Disk(KINDS[kind], folder)
        with open(disk.data_path, "r+b") as data:
            data.seek(SIZE)
            data.write(b"\xee" * 300 * KIB)
        disk.resize(SIZE + 512)
        disk.resize(SIZE + 400 * KIB)


# ---- preallocation


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if not kind.below or "extended" in name])
def test_a_disk_grows_with_places_for_all_of_it(kind: str, preallocation: str, tmp_path: Path) -> None:
    disk = Disk(KINDS[kind], tmp_path)
    new_size = SIZE + 5 * MIB + 512
    before = space(disk)
    disk.resize(new_size, preallocation=preallocation)
    entries = qemu_img_json("map", disk.path)
    allocated = [(entry["start"], entry["start"] + entry["length"]) for entry in entries if entry["present"]]
    start = SIZE // disk.kind.cluster_size * disk.kind.cluster_size
    assert covers(allocated, start, new_size)
    assert all("offset" in entry for entry in entries if entry["start"] >= SIZE + disk.kind.cluster_size)
    if preallocation != "metadata":
        assert space(disk) - before >= 5 * MIB - 2 * disk.kind.cluster_size
    qemu_io(disk.path, f"write -P 7 {new_size - 600} 600", f"write -P 8 {SIZE} 700")
    disk.model.write(new_size - 600, b"\7" * 600)
    disk.model.write(SIZE, b"\10" * 700)
    disk.assert_as_modelled()


def space(disk: Disk) -> int:
    """Bytes of disk space that its files take."""
    paths = [disk.path, disk.data_path] if disk.kind.has_data_file else [disk.path]
    return sum(path.stat().st_blocks * 512 for path in paths)


def covers(ranges: list[tuple[int, int]], start: int, end: int) -> bool:
    for first, last in sorted(ranges):
        if first <= start < last:
            start = last
    return start >= end


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("last", ["kept", "unallocated", "packed", "data"])
def test_the_old_last_cluster_keeps_what_it_shows(
    last: str, extended: bool, preallocation: str, tmp_path: Path
) -> None:
    """Preallocation gives it a place; neither what that held before nor zeros take the place of the guest's bytes."""
    size = 1 << 14 if extended else 1 << 12
    image = ImageBuilder(5 * size + size // 2, size.bit_length() - 1, extended_l2=extended).data(0, b"first")
    payload = random.Random(1).randbytes(size)
    if last == "kept":
        image.zero(5, preallocated=True, payload=payload)
    elif last == "packed":
        image.compressed(5, payload[: size // 3])
    elif last == "data":
        image.data(5, payload)
    path = tmp_path / "disk.qcow2"
    image.build(path)
    view = image.expected()
    with open_image(path, writable=True) as disk:
        if last == "unallocated":  # and the next free cluster has held something
            disk.pwrite(payload, 4 * size)
            disk.discard(4 * size, size)
            disk.flush()
            disk.flush()
        disk.resize(9 * size + 512, preallocation=preallocation)
        assert disk.pread(disk.virtual_size, 0) == view.ljust(9 * size + 512, b"\0")
    qemu_img("check", path)
    assert convert_to_raw(path) == view.ljust(9 * size + 512, b"\0")


def test_a_raw_data_file_has_places_for_all_of_the_disk_at_any_size(tmp_path: Path) -> None:
    """Growth forces preallocation, or the file would say more than the tables."""
    for number, kind in enumerate(("raw data file", "extended raw data file")):
        folder = tmp_path / str(number)
        folder.mkdir()
        disk = Disk(KINDS[kind], folder)
        for size in (SIZE + 512, 2 * MIB + 512, 40 * MIB):
            disk.resize(size)
            assert all(entry["present"] for entry in qemu_img_json("map", disk.path))
        assert disk.data_path.stat().st_blocks * 512 < 4 * MIB


# ---- tables


def test_the_l1_table_of_small_clusters_grows_and_moves(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
    qemu_io(path, "write -P 1 0 100k", "write -P 2 1000k 24k")
    model = Model(MIB, 512)
    model.write(0, b"\1" * 100 * KIB)
    model.write(1000 * KIB, b"\2" * 24 * KIB)
    with open_image(path, writable=True) as image:
        for size in (MIB + 512, 10 * MIB, 300 * MIB, 2 * GIB):
            image.resize(size)
            model.resize(size)
            image.pwrite(b"end of the disk", size - 15)
            model.write(size - 15, b"end of the disk")
            assert_reads_as(image, model)
        assert image.header.l1_size == 2 * GIB // (64 * 512)
    qemu_img("check", path)
    with open_image(path) as image:
        assert_reads_as(image, model)
    assert qemu_io(path, f"read -P 2 {1000 * KIB} 24k", f"read -P 0 {300 * MIB} 1M").count("fail") == 0


def test_the_largest_disk_of_small_clusters(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
    before = path.read_bytes()
    with open_image(path, writable=True) as image:
        for size in (128 * GIB + 512, 1 << 62, (1 << 63) - 512):
            with pytest.raises(ResizeError, match="too large"):
                image.resize(size)
    assert path.read_bytes() == before
    with open_image(path, writable=True) as image:
        image.resize(128 * GIB)
        image.pwrite(b"end", 128 * GIB - 3)
    qemu_img("check", path)
    qemu_io(path, "read -P 101 137438953469 1")


def test_shrinking_a_sparse_disk_makes_no_tables(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, str(2 * TIB))
    qemu_io(path, "write -P 1 0 64k", f"write -P 2 {TIB} 64k", f"write -P 3 {2 * TIB - 65536} 64k")
    with open_image(path, writable=True) as image:
        image.discard(65536, TIB - 65536)
        image.write_zeroes(TIB + 65536, TIB - 131072)
        image.resize(65536 + 512, allow_shrink=True)
        assert image.pread(65536, 0) == b"\1" * 65536
    qemu_img("check", path)
    assert path.stat().st_size < MIB
    with open_image(path, writable=True) as image:
        image.resize(2 * TIB)
        for offset in (65536, TIB, 2 * TIB - 65536):
            assert image.pread(65536, offset) == bytes(65536)
    qemu_img("check", path)
    assert path.stat().st_size < MIB


def test_shrinking_gives_space_back(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "64M")
    qemu_io(path, "write -P 1 0 20M")
    with open_image(path, writable=True) as image:
        image.resize(MIB, allow_shrink=True)
    qemu_img("check", path)
    assert path.stat().st_blocks * 512 < 2 * MIB
    assert convert_to_raw(path) == b"\1" * MIB


def test_shrinking_leaves_no_table_behind_the_disk(tmp_path: Path) -> None:
    disk = Disk(KINDS["512"], tmp_path)
    disk.resize(100 * KIB)
    disk.resize(10 * MIB)
    content, size = disk.path.read_bytes(), disk.facts()[1]
    l1_table = int.from_bytes(content[40:48], "big")
    entries = struct.unpack_from(f">{size}Q", content, l1_table)
    assert size == 320 and not any(entries[4:])


def test_shrinking_cuts_the_file_behind_what_is_in_use(tmp_path: Path) -> None:
    disk = Disk(KINDS["64k"], tmp_path)
    disk.resize(100 * KIB, preallocation="off")
    end = disk.path.stat().st_size
    disk.resize(20 * MIB, preallocation="full")
    assert disk.path.stat().st_size > 20 * MIB
    disk.resize(100 * KIB)
    assert disk.path.stat().st_size <= end + 65536


# ---- snapshots


@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=64k", "cluster_size=16k,extended_l2=on"])
def test_snapshots_keep_a_size_of_their_own(options: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE))
    qemu_io(path, f"write -P 1 0 {SIZE}")
    qemu_img("snapshot", "-c", "full", path)
    with open_image(path, writable=True) as image:
        image.resize(100 * KIB + 512, allow_shrink=True)
        image.pwrite(b"\2" * 1000, 0)
    qemu_img("check", path)
    qemu_img("snapshot", "-c", "short", path)
    with open_image(path, writable=True) as image:
        image.resize(3 * SIZE)
        image.pwrite(b"\3" * 1000, 2 * SIZE)
        assert image.at_snapshot("full").pread(SIZE, 0) == b"\1" * SIZE
        assert image.at_snapshot("short").virtual_size == 100 * KIB + 512
    qemu_img("check", path)
    qemu_img("snapshot", "-a", "full", path)
    assert convert_to_raw(path) == b"\1" * SIZE
    qemu_img("snapshot", "-a", "short", path)
    assert convert_to_raw(path) == b"\2" * 1000 + b"\1" * (100 * KIB + 512 - 1000)
    qemu_img("check", path)


def test_version_2_with_snapshots_keeps_its_size(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", path, "1M")
    qemu_img("snapshot", "-c", "then", path)
    before = path.read_bytes()
    with open_image(path, writable=True) as image:
        for size in (MIB // 2, 2 * MIB):
            with pytest.raises(ResizeError, match="snapshots"):
                image.resize(size, allow_shrink=True)
    assert path.read_bytes() == before


# ---- what is refused, and what is not


def test_nothing_changes_when_it_is_refused(tmp_path: Path) -> None:
    disk = Disk(KINDS["over raw"], tmp_path)
    before = disk.path.read_bytes()
    with disk.open() as image:
        with pytest.raises(ResizeError, match="shrink"):
            image.resize(SIZE - 512)
        with pytest.raises(ResizeError, match="backing"):
            image.resize(2 * SIZE, preallocation="full")
        with pytest.raises(ResizeError, match="growing"):
            image.resize(SIZE - 512, allow_shrink=True, preallocation="metadata")
        with pytest.raises(ResizeError, match="none of"):
            image.resize(2 * SIZE, preallocation="some")
        with pytest.raises(ResizeError):
            image.resize(-512, allow_shrink=True)
        image.resize(SIZE)
        assert image.virtual_size == SIZE
    assert disk.path.read_bytes() == before


def test_sizes_are_whole_sectors(tmp_path: Path) -> None:
    disk = Disk(KINDS["64k"], tmp_path)
    with disk.open() as image:
        image.resize(SIZE + 1)
        assert image.virtual_size == SIZE + 512
        image.resize(1, allow_shrink=True)
        assert image.virtual_size == 512
    disk.model.resize(512)
    disk.assert_as_modelled()


def test_a_disk_that_has_grown_can_be_used_at_once(tmp_path: Path) -> None:
    """In the same breath as it grows and shrinks it is written, flushed and cleared, at both sides of its ends."""
    disk = Disk(KINDS["512"], tmp_path)
    chance = random.Random(3)
    with disk.open() as image:
        for _ in range(60):
            size = max(512, (disk.model.virtual_size + chance.randint(-200, 260) * 512) // 512 * 512)
            image.resize(size, allow_shrink=True)
            disk.model.resize(size)
            for _ in range(3):
                length = min(chance.choice([1, 512, 3000]), size)
                offset = chance.choice([size - length, chance.randrange(size - length + 1)])
                if chance.random() < 0.5:
                    data = chance.randbytes(length)
                    image.pwrite(data, offset)
                    disk.model.write(offset, data)
                else:
                    image.write_zeroes(offset, length)
                    disk.model.zero(offset, offset + length)
            if chance.random() < 0.3:
                image.flush()
            assert_reads_as(image, disk.model)
    disk.assert_as_modelled()
