"""Checking images that were made to cost much: time and memory follow what is in the file, not what it claims."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.engine.checking import references, table_references
from qcow2_plugin.errors import Qcow2Error, UnsupportedFeatureError
from qcow2_plugin.operations.check import check
from tests.hostile.test_bitmaps import IMAGES as BITMAPS
from tests.hostile.test_compressed import IMAGES as COMPRESSED
from tests.hostile.test_header import IMAGES as HEADERS
from tests.hostile.test_snapshots import IMAGES as SNAPSHOTS
from tests.hostile.test_tables import IMAGES as TABLES
from tests.support.builder import ImageBuilder, huge_empty, patch, set_field, shared_l2_bomb
from tests.support.damage import plain
from tests.support.fields import COPIED
from tests.support.hostile import IMAGE, Hostile, assert_harmless_text, quick, unharmed
from tests.support.tools import qemu_img_json

PROJECT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def limited(*paths: Path, memory: int, seconds: int) -> list[dict[str, Any]]:
    """What checking each image cost in a process of its own, which may not take more than that."""
    words = [sys.executable, "-m", "tests.support.limited", str(memory), str(seconds), "--check", *map(str, paths)]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=110, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(paths), done.stderr
    assert not any(told["status"] for told in found), done.stderr
    return found


@pytest.mark.parametrize(
    "family",
    [HEADERS, TABLES, COMPRESSED, SNAPSHOTS, BITMAPS],
    ids=["header", "tables", "compressed", "snapshots", "bitmaps"],
)
def test_every_hostile_image_is_checked_or_refused(tmp_path: Path, family: list[Hostile]) -> None:
    """With an error of ours or a result, within bounds, and without touching anything."""
    paths = []
    for number, hostile in enumerate(family):
        folder = tmp_path / str(number)
        folder.mkdir()
        paths.append(folder / IMAGE)
        hostile.make(paths[-1])
        if paths[-1].stat().st_size > 1 << 30:
            continue  # its clusters, holes included, are counted in more memory than that
        with unharmed(folder, seconds=4, memory=96 * MIB):
            try:
                found = check(paths[-1])
            except Qcow2Error as error:
                assert_harmless_text(str(error))
            else:
                for finding in found.findings:
                    assert_harmless_text(finding.detail + finding.structure)
    limited(*paths, memory=1 << 30, seconds=4)


def test_4096_snapshots(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    image = plain(12, refcount_bits=16)
    for number in range(4096):
        image.snapshot(b"%d" % number, b"")
    image.build(path)
    with quick(2):
        found = check(path)
    assert found.is_sound
    answer = qemu_img_json("check", path)
    assert answer["image-end-offset"] == found.image_end_offset
    (told,) = limited(path, memory=256 * MIB, seconds=4)
    assert told["memory"] < 32 * MIB


def test_4096_snapshots_of_a_large_disk(tmp_path: Path) -> None:
    """Each with an L1 table of 1 TiB of disk, all of them naming the same L2 tables."""
    path = tmp_path / IMAGE
    size = 1 << 16
    image = ImageBuilder(1 << 40, 16)
    for cluster in range(0, 64 * 8192, 8192):
        image.data(cluster, b"x")
    built = image.snapshot(b"1", b"").build(path)
    with open(path, "r+b") as file:
        file.seek(built.l1_offset)
        l1_table = file.read(8 * built.l1_size).ljust(size, b"\0")
        start = built.file_size
        entry = struct.Struct(">QIHHIIQIIQQQ")
        for number in range(4096):
            file.seek(start + number * size)
            file.write(l1_table)
        table = b"".join(
            entry.pack(start + number * size, built.l1_size, 0, 0, 0, 0, 0, 0, 24, 0, 1 << 40, 0)
            for number in range(4096)
        )
        file.write(table)
    set_field(path, "nb_snapshots", 4096)
    set_field(path, "snapshots_offset", start + 4096 * size)
    with quick(4):
        found = check(path)
    assert found.kinds["refcount-too-low"] == 64 * 2  # every L2 table, and every data cluster
    assert not found.aborted


def shared_table(path: Path, virtual_size: int) -> int:
    """One L2 table full of data clusters that every L1 entry names; how many do."""
    entries = 8192
    image = ImageBuilder(virtual_size, 16, refcount_bits=64)
    image.data(0, b"x")
    built = image.build(path)
    times = built.l1_size
    with open(path, "r+b") as file:
        first = built.file_size
        words = [first + number * (1 << 16) for number in range(entries)]
        file.seek(built.l2_offsets[0])
        file.write(struct.pack(f">{entries}Q", *words))
        file.seek(built.l1_offset)
        file.write(struct.pack(">Q", built.l2_offsets[0]) * times)
        file.truncate(first + entries * (1 << 16))
    return times


def test_64_tib_whose_tables_are_all_one(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    times = shared_table(path, 64 << 40)
    assert times == 131072
    with quick(2):
        found = check(path)
    assert found.allocated_clusters == times * 8192 == found.total_clusters
    assert found.extra_corruptions == times - 1
    assert found.references is None
    limited(path, memory=256 * MIB, seconds=4)


def test_a_smaller_one_is_counted_as_qemu_does(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    shared_table(path, 20 << 30)
    found = check(path)
    done = subprocess.run(["qemu-img", "check", "--output=json", str(path)], capture_output=True, check=False)
    answer = json.loads(done.stdout)
    assert found.corruptions == answer["corruptions"] > 8192
    assert found.allocated_clusters == answer["allocated-clusters"]
    assert found.fragmented_clusters == answer.get("fragmented-clusters", 0)


def test_a_bomb_of_shared_streams(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    shared_l2_bomb(path)
    with quick(2):
        found = check(path)
    assert not found.corruptions and not found.leaks
    assert found.extra_corruptions == 127
    assert found.compressed_clusters == 64 << 40 >> 21


def test_the_largest_disk_there_is(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    huge_empty(path)
    with quick(1):
        assert check(path).is_sound


def overlapping(path: Path) -> None:
    """16384 L1 tables of 32 MiB, each beginning a cluster behind the one before: 512 GiB of tables in 40 MiB."""
    built = ImageBuilder(1 << 20, 9).data(0, b"x").build(path)
    start = -(-built.file_size // 512) * 512
    entry = struct.Struct(">QIHHIIQIIQQ")
    table = b"".join(entry.pack(start + 512 * number, 4 << 20, 0, 0, 0, 0, 0, 0, 16, 0, 0) for number in range(16384))
    with open(path, "r+b") as file:
        file.seek(start)
        dice = random.Random(1)
        file.write(b"".join(struct.pack(">Q", dice.randrange(1, 1 << 17) * 512) for _ in range(1 << 16)))
        place = start + (40 << 20)
        file.seek(place)
        file.write(table)
        file.truncate(place + len(table) + (32 << 20))
    set_field(path, "snapshots_offset", place)
    set_field(path, "nb_snapshots", 16384)


def test_snapshots_whose_tables_overlap_are_read_once(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    overlapping(path)
    with quick(8):
        found = check(path, max_findings=10)
    assert found.corruptions and not found.aborted
    limited(path, memory=512 * MIB, seconds=20)


def test_a_repair_reads_tables_that_overlap_once(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    overlapping(path)
    with quick(30):
        found = check(path, repair="all", repair_ours=True, max_findings=10)
    assert found.corruptions and not found.aborted


def test_tables_in_holes_are_not_read(tmp_path: Path) -> None:
    """A million L2 tables of 64 KiB, none of which takes any space."""
    path = tmp_path / IMAGE
    count = 1 << 20
    built = ImageBuilder(count << 29, 16).build(path)
    first = -(-built.file_size >> 16)
    with open(path, "r+b") as file:
        file.seek(built.l1_offset)
        file.write(struct.pack(f">{count}Q", *((first + number) << 16 for number in range(count))))
        file.truncate((first + count) << 16)
    with quick(8):
        found = check(path, max_findings=10)
    assert found.corruptions >= count


@pytest.mark.parametrize(("refcount_bits", "width"), [(16, 4), (64, 10)])
def test_memory_follows_the_clusters_of_the_file(tmp_path: Path, refcount_bits: int, width: int) -> None:
    """32 Mi clusters, in a file that takes next to no space."""
    path = tmp_path / IMAGE
    ImageBuilder(1 << 20, 9, refcount_bits=refcount_bits).data(0, b"x").build(path)
    count = 32 << 20
    os.truncate(path, count << 9)
    (told,) = limited(path, memory=width * count + 64 * MIB, seconds=20)
    assert told["memory"] < width * count + 32 * MIB


def test_too_many_clusters(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    ImageBuilder(1 << 20, 9).build(path)
    os.truncate(path, (references.MAX_CLUSTERS << 9) + 1)
    with quick(0.5), pytest.raises(UnsupportedFeatureError, match="too many to count"):
        check(path)


def test_too_many_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / IMAGE
    built = ImageBuilder(1 << 24, 9).data(0, b"x").build(path)
    patch(path, built.l1_offset, struct.pack(">4Q", *(number << 9 | COPIED for number in range(4))))
    monkeypatch.setattr(table_references, "MAX_TABLES", 4)
    check(path)
    monkeypatch.setattr(table_references, "MAX_TABLES", 3)
    with pytest.raises(UnsupportedFeatureError, match="more than 3 L2 tables"):
        check(path)


def test_findings_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    built = plain(16).build(path)
    patch(path, built.l2_offsets[0], struct.pack(">Q", 1 << 60) * 8192)
    found = check(path, max_findings=5)
    assert found.kinds["l2-entry-reserved"] == 8192
    assert sum(finding.kind == "l2-entry-reserved" for finding in found.findings) == 5
