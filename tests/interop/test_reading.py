"""Every image that qemu-img can make with its create options reads as qemu-img reads it, and has the map it says."""

from __future__ import annotations

import itertools
import zlib
from pathlib import Path

import pytest

from qcow2_plugin import Policy, open_image
from qcow2_plugin.errors import OutOfRangeError
from tests.support.agreement import assert_extents_agree, assert_reads_as, converted
from tests.support.mixture import fill
from tests.support.pairwise import Row, pairwise
from tests.support.tools import qemu_img, qemu_img_json, qemu_io

FACTORS = {
    "compat": ("1.1", "0.10"),
    "cluster_size": ("65536", "512", "4096", "16384", "2097152"),
    "refcount_bits": ("16", "1", "2", "4", "8", "32", "64"),
    "lazy_refcounts": ("off", "on"),
    "extended_l2": ("off", "on"),
    "compression_type": ("zlib", "zstd"),
    "preallocation": ("off", "metadata", "falloc", "full"),
    "data_file": ("none", "plain", "raw"),
    "size": ("sector", "nothing", "odd", "inside a cluster", "two L2 tables"),
    "content": ("written", "written compressed", "converted", "converted compressed"),
}
ONLY_VERSION_3 = {
    "refcount_bits": "16", "lazy_refcounts": "off", "extended_l2": "off", "compression_type": "zlib",
    "data_file": "none",
}  # fmt: skip


def conflicts(row: Row) -> bool:
    """What qemu-img refuses, and what would be larger than a test can read."""
    if row.get("compat") == "0.10" and any(row.get(name, value) != value for name, value in ONLY_VERSION_3.items()):
        return True
    if row.get("extended_l2") == "on" and row.get("cluster_size") in ("512", "4096"):
        return True
    is_compressed = row.get("content", "").endswith(" compressed")
    if is_compressed and row.get("data_file", "none") != "none":
        return True
    if row.get("content") == "converted compressed" and row.get("preallocation", "off") != "off":
        return True
    if row.get("size") == "two L2 tables":
        if row.get("cluster_size") == "2097152":
            return row.get("preallocation", "off") != "off" or row.get("data_file") == "raw"
        return row.get("cluster_size") == "65536" and row.get("preallocation") in ("falloc", "full")
    return False


ROWS = pairwise(FACTORS, conflicts)


def name_of(row: Row) -> str:
    return "-".join(row.values()).replace(" ", "_")


def test_every_possible_pair_of_options_is_among_the_images() -> None:
    pairs = {pair for row in ROWS for pair in itertools.combinations(row.items(), 2)}
    for (first, first_values), (second, second_values) in itertools.combinations(FACTORS.items(), 2):
        for first_value, second_value in itertools.product(first_values, second_values):
            pair = ((first, first_value), (second, second_value))
            assert (pair in pairs) != conflicts(dict(pair)), pair


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_an_image_reads_as_qemu_reads_it(row: Row, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    seed = zlib.crc32(name_of(row).encode())
    cluster_size = int(row["cluster_size"])
    l2_coverage = cluster_size * cluster_size // (16 if row["extended_l2"] == "on" else 8)
    make(path, row, virtual_size_of(row, l2_coverage), l2_coverage, seed)

    near = (cluster_size, 3 * cluster_size, l2_coverage)
    with converted(path) as expected, open_image(path, policy=Policy.TRUSTED) as image:
        assert_reads_as(image, expected, near=near, seed=seed)
        assert_extents_agree(image.extents(), qemu_img_json("map", path), expected)


@pytest.mark.parametrize("options", ["preallocation=off", "preallocation=metadata", "extended_l2=on"])
def test_the_rest_of_the_last_cluster_is_out_of_reach(options: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    size = 65536 * 3 + 512
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(size))
    qemu_io(path, f"write -P 1 0 {size}")
    with open_image(path) as image:
        assert image.pread(size, 0) == b"\1" * size
        for offset, length in [(size - 1, 2), (size, 1), (65536, size), (0, size + 1), (-1, 1), (size + 65536, 0)]:
            with pytest.raises(OutOfRangeError):
                image.read_into(memoryview(bytearray(length)), offset)
            with pytest.raises(OutOfRangeError):
                image.pread(length, offset)
        assert image.pread(0, size) == b""


def make(path: Path, row: Row, virtual_size: int, l2_coverage: int, seed: int) -> None:
    """The image of a row, written in place or converted from another."""
    options = create_options(row, path.with_suffix(".data"))
    is_compressed = row["content"].endswith(" compressed")
    if row["content"].startswith("converted"):
        source = path.with_name("source.qcow2")
        qemu_img("create", "-q", "-f", "qcow2", source, str(virtual_size))
        fill(source, virtual_size, 65536, seed=seed, l2_coverage=l2_coverage)
        qemu_img("convert", "-f", "qcow2", "-O", "qcow2", *(["-c"] if is_compressed else []), *options, source, path)
    else:
        qemu_img("create", "-q", "-f", "qcow2", *options, path, str(virtual_size))
        cluster_size = int(row["cluster_size"])
        fill(path, virtual_size, cluster_size, seed=seed, l2_coverage=l2_coverage, compressed=is_compressed)


def virtual_size_of(row: Row, l2_coverage: int) -> int:
    """In whole sectors."""
    cluster_size = int(row["cluster_size"])
    return {
        "nothing": 0,
        "sector": 512,
        "odd": (10 << 20) + 1536,
        "inside a cluster": 5 * cluster_size + cluster_size // 1024 * 512 + 512,
        "two L2 tables": l2_coverage + 3 * cluster_size + 512,
    }[row["size"]]


def create_options(row: Row, data_path: Path) -> list[str]:
    options = {name: value for name, value in row.items() if name not in ("data_file", "size", "content")}
    if row["compat"] == "0.10":
        for name in ONLY_VERSION_3:
            options.pop(name, None)
    if row["data_file"] != "none":
        options["data_file"] = str(data_path)
        options["data_file_raw"] = "on" if row["data_file"] == "raw" else "off"
    return [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
