"""`qcow2 map --output=json` says what `qemu-img map --output=json` says, for every image that qemu-img can make."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin import open_image
from qcow2_plugin.errors import CorruptImageError
from qcow2_plugin.operations.map import map_image
from tests.interop.test_chains import CHAINS, make_chain
from tests.interop.test_reading import ROWS, make, name_of, virtual_size_of
from tests.support.builder import ALL_PARTS, ImageBuilder, huge_empty, patch
from tests.support.command import qcow2, qcow2_json
from tests.support.holders import qemu_io_holding
from tests.support.pairwise import Row
from tests.support.tools import ToolError, qemu_img, qemu_img_json, qemu_io

KIB, MIB = 1 << 10, 1 << 20


def assert_same_map(path: Path | str, *options: str) -> list[dict[str, Any]]:
    told = qcow2_json("map", "--policy=trusted", *options, path)
    assert told == qemu_img_json("map", *options, path)
    return list(told)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_create_options(row: Row, folder: Path) -> None:
    cluster_size = int(row["cluster_size"])
    l2_coverage = cluster_size * cluster_size // (16 if row["extended_l2"] == "on" else 8)
    size = virtual_size_of(row, l2_coverage)
    make(folder / "disk.qcow2", row, size, l2_coverage, zlib.crc32(name_of(row).encode()))
    assert_same_map("disk.qcow2")
    for start, length in odd_ranges(size):
        assert_same_map("disk.qcow2", f"--start-offset={start}", f"--max-length={length}")


def odd_ranges(size: int) -> list[tuple[int, int]]:
    rng = random.Random(size)
    return [(0, size + 1), (size, 1), *((rng.randrange(size + 1), rng.randrange(size + 1)) for _ in range(4))]


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str, folder: Path) -> None:
    path = make_chain(folder, CHAINS[name])
    assert_same_map(path.name)
    for start, length in odd_ranges(CHAINS[name][-1].size):
        assert_same_map(path.name, "-s", str(start), "-l", str(length))


def test_sizes_with_suffixes(folder: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "disk.qcow2", "10M")
    qemu_io("disk.qcow2", "write 1M 1M")
    for start, length in (("64k", "1M"), ("1.5M", "0.5M"), ("1M", "1G"), ("0", "0"), ("1K", "1T")):
        assert_same_map("disk.qcow2", "-s", start, "-l", length)


Made = Callable[[ImageBuilder], object]
BUILT: dict[str, tuple[Callable[[], ImageBuilder], Made]] = {
    "preallocated zeros": (
        partial(ImageBuilder, MIB),
        lambda i: i.data(0, b"a").zero(2, preallocated=True).zero(3).zero(4, preallocated=True),
    ),
    "zeros of two kinds in line": (
        partial(ImageBuilder, MIB),
        lambda i: i.zero(0).zero(1, preallocated=True).zero(2, preallocated=True),
    ),
    "all compressed": (
        partial(ImageBuilder, MIB),
        lambda i: [i.compressed(cluster, bytes([cluster])) for cluster in range(16)],
    ),
    "compressed among data": (
        partial(ImageBuilder, MIB),
        lambda i: i.data(0, b"a").compressed(1, b"b").data(2, b"c").compressed(3, b"d"),
    ),
    "subclusters of every kind": (
        partial(ImageBuilder, MIB, extended_l2=True),
        lambda i: (
            i.subclusters(0, b"a" * 65536, allocated=0x0F0F00FF, zero=0x10F00F00)
            .subclusters(1, b"b" * 65536, allocated=0)
            .subclusters(2, b"", allocated=0, zero=ALL_PARTS)
            .zero(5)
            .data(7, b"c")
        ),
    ),
    "space kept for nothing": (
        partial(ImageBuilder, MIB, extended_l2=True),
        lambda i: i.subclusters(4, b"b" * 65536, allocated=0),
    ),
    "disk that ends in a cluster": (partial(ImageBuilder, MIB + 512), lambda i: i.data(15, b"a").data(16, b"b")),
    "dirty": (partial(ImageBuilder, MIB, incompatible=1, compatible=1), lambda i: i.data(3, b"a")),
    "version 2": (partial(ImageBuilder, MIB, version=2), lambda i: i.data(3, b"a").compressed(5, b"b")),
    "wide refcounts": (partial(ImageBuilder, MIB, refcount_bits=64), lambda i: i.data(3, b"a")),
    "narrow refcounts": (partial(ImageBuilder, MIB, refcount_bits=1), lambda i: i.data(3, b"a").data(9, b"b")),
}


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("backing", [None, "shorter", "longer"])
def test_built_images(name: str, backing: str | None, folder: Path) -> None:
    begin, tell = BUILT[name]
    image = begin()
    tell(image)
    if backing is not None:
        size = 300 * KIB + 512 if backing == "shorter" else 2 * MIB
        with open("base.raw", "wb") as base:
            base.truncate(size)
            os.pwrite(base.fileno(), b"x" * 70_000, 130 * KIB)
        image.backing(b"base.raw")
    image.build("disk.qcow2")
    assert_same_map("disk.qcow2")


def test_a_disk_of_no_size(folder: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "disk.qcow2", "0")
    assert_same_map("disk.qcow2")
    assert_same_map("disk.qcow2", "-s", "1M")


def test_the_largest_disk(folder: Path) -> None:
    huge_empty("disk.qcow2")
    (entry,) = qcow2_json("map", "disk.qcow2")
    assert (entry["length"], entry["present"], entry["zero"]) == (2 << 60, False, True)


def test_what_lies_behind_a_short_chain_is_told_by_the_layer_above_the_end(folder: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "base.qcow2", "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "middle.qcow2", "2M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", "top.qcow2", "3M")
    assert [entry["depth"] for entry in assert_same_map("top.qcow2")] == [2, 1, 0]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("rewritten", [False, True])
def test_preallocated_images_show_what_was_never_written(rewritten: bool, layers: int, folder: Path) -> None:
    """QEMU asks the file system about an image that has far more clusters in use than disk space."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "disk.qcow2", "64M")
    qemu_io("disk.qcow2", "write -P 1 1M 64k", "write -P 2 3100k 4k", "write -P 3 60M 1M")
    if rewritten:
        qemu_io("disk.qcow2", "write -P 1 0 64M")
    if layers == 2:
        qemu_img("create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", "top.qcow2", "70M")
        qemu_io("top.qcow2", "write -P 4 2M 1M")
    told = assert_same_map("top.qcow2" if layers == 2 else "disk.qcow2")
    unwritten = [entry for entry in told if entry["data"] and entry["zero"]]
    assert bool(unwritten) is not rewritten


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_preallocation_is_found_by_any_refcounts(cluster_size: int, refcount_bits: int, folder: Path) -> None:
    options = f"preallocation=metadata,refcount_bits={refcount_bits},cluster_size={cluster_size}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, "disk.qcow2", "8M")
    assert any(entry["data"] and entry["zero"] for entry in assert_same_map("disk.qcow2"))


@pytest.mark.parametrize("written_clusters", range(0, 40, 3))
def test_preallocation_begins_where_qemu_says(written_clusters: int, folder: Path) -> None:
    """Around the threshold: some of 32 clusters are written, the rest is a hole."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "disk.qcow2", "2M")
    if written_clusters:
        qemu_io("disk.qcow2", f"write -P 1 0 {min(written_clusters, 32) * 64}k")
    assert_same_map("disk.qcow2")


def test_a_preallocated_data_file(folder: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=disk.data,data_file_raw=on", "disk.qcow2", "8M")
    qemu_io("disk.qcow2", "write -P 1 1M 100k")
    assert_same_map("disk.qcow2")
    os.truncate("disk.data", 3 * MIB + 1000)
    assert_same_map("disk.qcow2")
    os.truncate("disk.data", 1 * MIB + 1000)
    assert_same_map("disk.qcow2")


def test_the_holes_of_a_data_file(folder: Path) -> None:
    """The image file decides whether holes are asked for, the data file where they are."""
    told = ImageBuilder(8 * MIB).data_file(folder / "disk.data", b"disk.data")
    for cluster in range(64):
        told.data(cluster, b"x")
    told.build("disk.qcow2")
    os.truncate("disk.data", 0)
    os.truncate("disk.data", 8 * MIB)
    qemu_io("disk.qcow2", "write -P 1 1M 64k")
    told_kinds = {(entry["zero"], entry["data"]) for entry in assert_same_map("disk.qcow2")}
    assert told_kinds == {(True, True), (False, True), (True, False)}


@pytest.mark.parametrize("length", [1, 511, 4096, 5000, 65536, 100_001])
def test_raw_files_of_odd_sizes(length: int, folder: Path) -> None:
    (folder / "base.raw").write_bytes(b"x" * length)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "disk.qcow2", "200k")
    assert_same_map("disk.qcow2")
    os.truncate("base.raw", length + 10_000)
    assert_same_map("disk.qcow2")


def test_many_open_ranges_over_a_chain(folder: Path) -> None:
    """The layer below is walked on, not begun anew, and what is skipped there does no harm."""
    base = ImageBuilder(16 * MIB, cluster_bits=12)
    for cluster in range(0, 4096, 3):
        base.data(cluster, b"b")
    base.build("base.qcow2")
    top = ImageBuilder(16 * MIB, cluster_bits=9).backing(b"base.qcow2", b"qcow2")
    for cluster in range(0, 32768, 5):
        top.data(cluster, b"t")
    top.build("disk.qcow2")
    assert len(assert_same_map("disk.qcow2")) > 10_000


def test_damage_that_a_layer_hides_is_not_met(folder: Path) -> None:
    base = ImageBuilder(4 * MIB).data(0, b"a").data(2, b"b").data(40, b"c").build("base.qcow2")
    patch("base.qcow2", base.l2_entry_offset(2), (0x8000000000010200).to_bytes(8, "big"))
    top = ImageBuilder(4 * MIB).backing(b"base.qcow2", b"qcow2").data(2, b"t").build("disk.qcow2")
    assert_same_map("disk.qcow2")
    patch("disk.qcow2", top.l2_entry_offset(2), bytes(8))
    ended = qcow2("map", "disk.qcow2")
    assert ended.status == 1
    assert "is invalid" in ended.stderr
    with pytest.raises(ToolError):
        qemu_img("map", "disk.qcow2")


def test_a_snapshot_has_the_map_of_its_time(folder: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "disk.qcow2", "4M")
    qemu_io("disk.qcow2", "write -P 1 0 1M")
    before = assert_same_map("disk.qcow2")
    qemu_img("snapshot", "-c", "then", "disk.qcow2")
    qemu_io("disk.qcow2", "write -P 2 2M 1M")
    assert qcow2_json("map", "--snapshot=then", "disk.qcow2") == before
    assert qcow2_json("map", "--snapshot=1", "disk.qcow2") == before
    assert assert_same_map("disk.qcow2") != before


def test_files_named_by_the_caller(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "real.raw").write_bytes(b"x" * MIB)
    ImageBuilder(MIB).backing(b"/nowhere/base", None).build("disk.qcow2")
    named = ("--backing-file=elsewhere/real.raw", "--backing-format=raw", "disk.qcow2")
    assert qcow2_json("map", *named)[0]["depth"] == 1
    ImageBuilder(MIB).backing(b"real.raw").build("other.qcow2")
    assert qcow2("map", "other.qcow2").status == 1
    assert qcow2_json("map", "--base-directory=elsewhere", "other.qcow2")[0]["depth"] == 1
    ImageBuilder(MIB).data_file(folder / "moved.data", None).data(0, b"x").build("data.qcow2")
    assert qcow2("map", "data.qcow2").status == 1
    assert qcow2_json("map", "--data-file=moved.data", "data.qcow2")[0]["offset"] == 0


def test_a_running_writer_is_respected(folder: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "disk.qcow2", "4M")
    with qemu_io_holding(folder / "disk.qcow2"):
        assert qcow2("map", "disk.qcow2").status == 1
        assert_same_map("disk.qcow2", "-U")


def test_the_policy_decides_which_files_are_opened(folder: Path) -> None:
    (folder / "base.raw").write_bytes(bytes(MIB))
    ImageBuilder(MIB).backing(os.fsencode(folder / "base.raw")).build("disk.qcow2")
    assert qcow2("map", "disk.qcow2").status == 1
    assert qcow2("map", "--policy=inspect", "disk.qcow2").status == 1
    assert qcow2("map", "--policy=trusted", "disk.qcow2").status == 0


def test_the_start_of_a_large_map_comes_at_once(folder: Path) -> None:
    """Nothing is collected before the first entry is there, so damage at the end is not met before."""
    told = ImageBuilder(1 << 40).data((1 << 24) - 1, b"b")
    for cluster in range(0, 8, 2):
        told.data(cluster, b"a")
    image = told.build("disk.qcow2")
    patch("disk.qcow2", image.l1_entry_offset((1 << 11) - 1), (0x8000000000000200).to_bytes(8, "big"))
    with open_image("disk.qcow2") as disk:
        entries = map_image(disk)
        assert next(entries).length == 65536
        with pytest.raises(CorruptImageError, match="entry 2047"):
            list(entries)
