"""What `qcow2 create` makes is what qemu-img makes with the same words: the same line, the same information and map, no
finding of its check, and the same bytes wherever the layouts are meant to be the same."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin import Policy, create_image, open_image
from tests.support.command import qcow2, qcow2_json
from tests.support.holders import qemu_io_holding
from tests.support.pairwise import Row, pairwise
from tests.support.tools import ToolError, convert_to_raw, qemu_img, qemu_img_json, qemu_io

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
FACTORS = {
    "compat": ("1.1", "0.10"),
    "cluster_size": ("65536", "512", "4096", "8192", "16384", "2097152"),
    "refcount_bits": ("16", "1", "2", "4", "8", "32", "64"),
    "lazy_refcounts": ("off", "on"),
    "extended_l2": ("off", "on"),
    "compression_type": ("zlib", "zstd"),
    "preallocation": ("off", "metadata", "falloc", "full"),
    "data_file": ("none", "plain", "raw"),
    "backing": ("none", "qcow2", "raw", "unsafe"),
    "size": ("sector", "nothing", "odd", "inside a cluster", "two L2 tables"),
}
ONLY_VERSION_3 = {
    "refcount_bits": "16", "lazy_refcounts": "off", "extended_l2": "off", "compression_type": "zlib",
    "data_file": "none",
}  # fmt: skip


def conflicts(row: Row) -> bool:
    """What qemu-img refuses, and what would be larger than a test can write."""
    if row.get("compat") == "0.10" and any(row.get(name, value) != value for name, value in ONLY_VERSION_3.items()):
        return True
    if row.get("extended_l2") == "on" and row.get("cluster_size") in ("512", "4096", "8192"):
        return True
    if row.get("backing", "none") != "none":
        if row.get("data_file") == "raw":
            return True
        if row.get("preallocation", "off") != "off" and row.get("extended_l2", "on") == "off":
            return True
        if row.get("preallocation", "off") != "off" and row.get("cluster_size") in ("512", "4096", "8192"):
            return True
        if row.get("preallocation", "off") != "off" and row.get("compat") == "0.10":
            return True
    if row.get("size") == "two L2 tables":
        if row.get("cluster_size") == "2097152":
            return row.get("preallocation", "off") != "off" or row.get("data_file") == "raw"
        return row.get("cluster_size") == "65536" and row.get("preallocation") in ("falloc", "full")
    return False


ROWS = pairwise(FACTORS, conflicts)


def name_of(row: Row) -> str:
    return "-".join(row.values()).replace(" ", "_")


def virtual_size_of(row: Row) -> int:
    cluster_size = int(row["cluster_size"])
    l2_coverage = cluster_size * cluster_size // (16 if row["extended_l2"] == "on" else 8)
    return {
        "nothing": 0,
        "sector": 512,
        "odd": MIB + 1536,
        "inside a cluster": 5 * cluster_size + cluster_size // 1024 * 512 + 512,
        "two L2 tables": l2_coverage + 3 * cluster_size + 512,
    }[row["size"]]


def has_the_bytes_of_qemu(row: Row) -> bool:
    """One refcount block describes the file, and one L2 table at most maps what is in it; nothing else is promised.

    Counted by hand: header, refcount table and block, L1 table, L2 tables, data.
    """
    if row["preallocation"] in ("falloc", "full") and row["data_file"] == "none":
        return False
    cluster_size, bits = int(row["cluster_size"]), int(row["refcount_bits"])
    l2_entries = cluster_size // (16 if row["extended_l2"] == "on" else 8)
    guest_clusters = -(-virtual_size_of(row) // cluster_size)
    l1_clusters = -(-(-(-guest_clusters // l2_entries) * 8) // cluster_size)
    is_mapped = row["preallocation"] != "off" or row["data_file"] == "raw"
    l2_tables = -(-guest_clusters // l2_entries) if is_mapped else 0
    data = guest_clusters if is_mapped and row["data_file"] == "none" else 0
    return 3 + l1_clusters + l2_tables + data <= cluster_size * 8 // bits and (not data or l2_tables <= 1)


def words_of(row: Row) -> list[str]:
    options = {name: value for name, value in row.items() if name not in ("data_file", "size", "backing")}
    if row["compat"] == "0.10":
        for name in ONLY_VERSION_3:
            options.pop(name, None)
    if row["data_file"] != "none":
        options["data_file"] = "disk.data"
        options["data_file_raw"] = "on" if row["data_file"] == "raw" else "off"
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    backing = {
        "none": (), "qcow2": ("-b", "../base.qcow2", "-F", "qcow2"), "raw": ("-b", "../base.raw", "-F", "raw"),
        "unsafe": ("-u", "-b", "none", "-F", "qcow2"),
    }  # fmt: skip
    return [*words, *backing[row["backing"]], "disk.qcow2", str(virtual_size_of(row))]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def inside(directory: str) -> Iterator[None]:
    before = Path.cwd()
    Path(directory).mkdir(exist_ok=True)
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def told(directory: str) -> tuple[Any, Any]:
    """What qemu-img info says, but for the disk space, and its map."""
    with inside(directory):
        about = qemu_img_json("info", "disk.qcow2")
        about.pop("actual-size")
        try:
            return about, qemu_img_json("map", "disk.qcow2")
        except ToolError:  # without its backing file
            return about, None


def without(keys: set[str], entries: Any) -> list[dict[str, Any]]:
    """A map by what its other keys say; neighbours that differ in nothing else are one."""
    merged: list[dict[str, Any]] = []
    for entry in entries or []:
        rest = {key: value for key, value in entry.items() if key not in keys}
        if merged and {**rest, "start": merged[-1]["start"], "length": merged[-1]["length"]} == merged[-1]:
            merged[-1]["length"] += rest["length"]
        else:
            merged.append(rest)
    return merged


def test_every_possible_pair_of_options_is_among_the_images() -> None:
    pairs = {pair for row in ROWS for pair in itertools.combinations(row.items(), 2)}
    for (first, first_values), (second, second_values) in itertools.combinations(FACTORS.items(), 2):
        for first_value, second_value in itertools.product(first_values, second_values):
            pair = ((first, first_value), (second, second_value))
            assert (pair in pairs) != conflicts(dict(pair)), pair
    with_bytes = [row for row in ROWS if has_the_bytes_of_qemu(row)]
    assert len(with_bytes) > len(ROWS) // 2


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_an_image_is_what_qemu_makes_of_the_same_words(row: Row, folder: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "base.qcow2", "5M")
    qemu_io("base.qcow2", "write -P 7 0 64k", "write -P 8 4M 128k")
    (folder / "base.raw").write_bytes(b"r" * 1000)
    words = words_of(row)
    with inside("theirs"):
        line = qemu_img("create", "-f", "qcow2", *words)
    with inside("ours"):
        ended = qcow2("create", "-f", "qcow2", *words)
        assert (ended.status, ended.stdout) == (0, line), ended.stderr

        if row["backing"] != "unsafe":
            assert qemu_img_json("check", "disk.qcow2")["check-errors"] == 0
    (their_info, their_map), (our_info, our_map) = told("theirs"), told("ours")
    assert our_info == their_info
    if has_the_bytes_of_qemu(row):
        assert Path("ours/disk.qcow2").read_bytes() == Path("theirs/disk.qcow2").read_bytes()
        differing = set[str]()
    else:
        differing = {"offset"}
    if row["compat"] == "0.10":  # QEMU writes zeros behind the end of the disk, where ours has a hole
        differing = {"offset", "zero"}
    assert without(differing, our_map) == without(differing, their_map)
    if row["data_file"] != "none":
        assert Path("ours/disk.data").stat().st_size == virtual_size_of(row)
    if row["backing"] != "unsafe" and row["size"] != "two L2 tables":
        with inside("ours"), open_image("disk.qcow2", policy=Policy.TRUSTED) as image:
            found = image.pread(image.virtual_size, 0)
        with inside("theirs"):
            assert found == convert_to_raw("disk.qcow2")


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (1 << 40, {}),
        (2 << 50, {}),
        (GIB, {"cluster_size": 512, "refcount_bits": 1}),
        (2 << 60, {"cluster_size": 2 * MIB}),
        (512 * MIB, {"preallocation": "metadata"}),
        (100 * GIB, {"data_file": "disk.data", "data_file_raw": True}),
        (200 * GIB, {"data_file": "disk.data", "data_file_raw": True, "extended_l2": True, "refcount_bits": 8}),
        (100 * KIB, {"extended_l2": True, "preallocation": "metadata"}),
    ],
    ids=str,
)
def test_the_bytes_of_large_disks_are_those_of_qemu(size: int, options: dict[str, Any], folder: Path) -> None:
    words = [f"{name}={'on' if value is True else value}" for name, value in options.items()]
    with inside("theirs"):
        qemu_img(
            "create",
            "-q",
            "-f",
            "qcow2",
            *(word for option in words for word in ("-o", option)),
            "disk.qcow2",
            f"{size}",
        )
    with inside("ours"):
        create_image("disk.qcow2", size, **options)
    subprocess.run(["cmp", "ours/disk.qcow2", "theirs/disk.qcow2"], check=True)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (10 * GIB, {"preallocation": "metadata"}),
        (300 * MIB, {"preallocation": "metadata", "cluster_size": 512, "refcount_bits": 64}),
        (20 * GIB, {"preallocation": "metadata", "cluster_size": 16384, "extended_l2": True}),
        (40 * MIB, {"preallocation": "full", "cluster_size": 512}),
        (40 * MIB, {"preallocation": "falloc", "cluster_size": 4096, "version": 2}),
        (20 * GIB, {"cluster_size": 512}),
        (20 * GIB, {"cluster_size": 512, "refcount_bits": 64}),
        (200 * MIB, {"data_file": "disk.data", "data_file_raw": True, "cluster_size": 512, "refcount_bits": 64}),
    ],
    ids=str,
)
def test_images_of_many_tables_and_refcount_blocks_are_clean(size: int, options: dict[str, Any], folder: Path) -> None:
    create_image("disk.qcow2", size, **options)
    checked = qemu_img_json("check", "disk.qcow2")
    assert checked["check-errors"] == 0
    assert {"corruptions", "leaks"}.isdisjoint(checked)
    qemu_img("create", "-q", "-f", "qcow2", "empty.qcow2", str(size))
    assert "identical" in qemu_img("compare", "disk.qcow2", "empty.qcow2")


@pytest.mark.parametrize(
    "options", [{}, {"preallocation": "metadata"}, {"cluster_size": 512, "refcount_bits": 1}], ids=str
)
@pytest.mark.parametrize("data_file", ["none", "plain", "raw"])
def test_qemu_goes_on_with_our_images(options: dict[str, Any], data_file: str, folder: Path) -> None:
    if data_file != "none":
        options = {**options, "data_file": "disk.data", "data_file_raw": data_file == "raw"}
    create_image("disk.qcow2", 10 * MIB, **options)
    qemu_io("disk.qcow2", "write -P 1 1000 100000", "write -z 5M 1M", "discard 2M 1M", "write -P 2 10485248 512")
    qemu_img("bitmap", "--add", "disk.qcow2", "bitmap")
    qemu_img("resize", "-q", "disk.qcow2", "20M")
    checked = qemu_img_json("check", "disk.qcow2")
    assert checked["check-errors"] == 0
    assert {"corruptions", "leaks"}.isdisjoint(checked)
    assert convert_to_raw("disk.qcow2")[1000:101000] == b"\1" * 100000


@pytest.mark.parametrize("extended_l2", [False, True])
@pytest.mark.parametrize("options", [{"data_file_raw": True}, {"preallocation": "metadata"}], ids=str)
def test_qemu_sees_what_is_in_a_data_file_that_was_kept(
    options: dict[str, Any], extended_l2: bool, folder: Path
) -> None:
    disk = b"".join(b"%07d\n" % number for number in range(300_000))
    (folder / "disk.data").write_bytes(disk)
    create_image("disk.qcow2", data_file="disk.data", keep_data_file=True, extended_l2=extended_l2, **options)
    assert qemu_img_json("check", "disk.qcow2")["check-errors"] == 0
    assert convert_to_raw("disk.qcow2") == disk.ljust(-(-len(disk) // 512) * 512, b"\0")
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", "qcow2", "disk.data", "disk.qcow2")


def test_files_that_qemu_uses_stay_as_they_are(folder: Path) -> None:
    create_image("disk.qcow2", 4 * MIB)
    create_image("base.qcow2", 4 * MIB)
    before = (folder / "disk.qcow2").read_bytes()
    for options in ((), ("-r",)):
        with qemu_io_holding(folder / "disk.qcow2", *options):
            ended = qcow2("create", "disk.qcow2", "1M")
            assert ended.status == 1
            assert "stop it first" in ended.stderr
    assert (folder / "disk.qcow2").read_bytes() == before
    with qemu_io_holding(folder / "base.qcow2"):
        assert qcow2("create", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2").status == 1
        assert qcow2("create", "-u", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", "4M").status == 0


REFUSED = [
    "disk.qcow2",
    "-b base.qcow2 disk.qcow2",
    "-F qcow2 disk.qcow2 1M",
    "-b none -F qcow2 disk.qcow2 1M",
    "-b base.raw -F qcow2 disk.qcow2",
    "-b base.qcow2 -F weird disk.qcow2",
    "-u -b base.qcow2 -F qcow2 disk.qcow2",
    "-b disk.qcow2 -F qcow2 disk.qcow2 1M",
    "-o cluster_size=1000 disk.qcow2 1M",
    "-o cluster_size=256 disk.qcow2 1M",
    "-o cluster_size=4M disk.qcow2 1M",
    "-o cluster_size=8k,extended_l2=on disk.qcow2 1M",
    "-o compat=0.10,lazy_refcounts=on disk.qcow2 1M",
    "-o compat=0.10,refcount_bits=1 disk.qcow2 1M",
    "-o compat=0.10,extended_l2=on disk.qcow2 1M",
    "-o compat=0.10,compression_type=zstd disk.qcow2 1M",
    "-o compat=0.10,data_file=disk.data disk.qcow2 1M",
    "-o compat=3 disk.qcow2 1M",
    "-o refcount_bits=3 disk.qcow2 1M",
    "-o refcount_bits=128 disk.qcow2 1M",
    "-o data_file_raw=on disk.qcow2 1M",
    "-o data_file=disk.data,data_file_raw=on -b base.qcow2 -F qcow2 disk.qcow2",
    "-o preallocation=metadata -b base.qcow2 -F qcow2 disk.qcow2",
    "-o preallocation=some disk.qcow2 1M",
    "-o compression_type=lzma disk.qcow2 1M",
    "-o lazy_refcounts=maybe disk.qcow2 1M",
    "-o colour=red disk.qcow2 1M",
    "-o data_file=disk.qcow2 disk.qcow2 1M",
    "-o size=1M disk.qcow2 1M",
    "-o cluster_size=512 disk.qcow2 129G",
    "disk.qcow2 3P",
    "disk.qcow2 1M more",
    "disk.qcow2 10Q",
    "-o extended_l2=on disk.qcow2 1025T",
]


@pytest.mark.parametrize("words", REFUSED)
def test_what_qemu_refuses_is_refused(words: str, folder: Path) -> None:
    create_image("base.qcow2", MIB)
    (folder / "base.raw").write_bytes(bytes(1000))
    with pytest.raises(ToolError):
        qemu_img("create", "-f", "qcow2", *words.split())
    for leftover in ("disk.qcow2", "disk.data"):
        (folder / leftover).unlink(missing_ok=True)
    ended = qcow2("create", "-f", "qcow2", *words.split())
    assert ended.status in (1, 2)
    assert {path.name for path in folder.iterdir()} == {"base.qcow2", "base.raw"}


def test_our_tools_agree_about_our_images(folder: Path) -> None:
    create_image("disk.qcow2", 100 * MIB, preallocation="metadata", cluster_size=4096, refcount_bits=8)
    assert qcow2_json("info", "disk.qcow2") == qemu_img_json("info", "disk.qcow2")
    assert qcow2_json("map", "disk.qcow2") == qemu_img_json("map", "disk.qcow2")
