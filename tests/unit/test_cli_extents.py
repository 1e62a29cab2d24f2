"""`qcow2 extents`: what programs and people see, and streams of any length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qcow2_plugin import add_bitmap, create_image, create_snapshot, open_image
from tests.support.command import qcow2, qcow2_json

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    create_image(path, 2 * MIB)
    add_bitmap(path, "a")
    with open_image(path, writable=True) as image:
        image.pwrite(b"x" * 64 * KIB, 64 * KIB)
    add_bitmap(path, "b")
    with open_image(path, writable=True) as image:
        image.write_zeroes(MIB, 64 * KIB)
    return path


def run(start: int, length: int, kind: str) -> dict[str, object]:
    return {"start": start, "length": length, "kind": kind}


def test_programs_get_a_list(disk: Path) -> None:
    assert qcow2_json("extents", "--bitmap", "a", disk) == [
        run(0, 64 * KIB, "clean"),
        run(64 * KIB, 64 * KIB, "data"),
        run(128 * KIB, MIB - 128 * KIB, "clean"),
        run(MIB, 64 * KIB, "zero"),
        run(MIB + 64 * KIB, MIB - 64 * KIB, "clean"),
    ]
    assert qcow2_json("extents", "-B", "b", "--dirty", disk) == [run(MIB, 64 * KIB, "zero")]
    assert qcow2_json("extents", "-B", "b", "-B", "a", "--dirty", disk) == [
        run(64 * KIB, 64 * KIB, "data"),
        run(MIB, 64 * KIB, "zero"),
    ]


def test_without_a_bitmap_it_is_the_whole_disk(disk: Path) -> None:
    kinds = [each["kind"] for each in qcow2_json("extents", disk)]
    assert kinds == ["hole", "data", "hole", "zero", "hole"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--offset=100k", "--length=100k"], [run(100 * KIB, 28 * KIB, "data"), run(128 * KIB, 72 * KIB, "clean")]),
        (["--offset=1M", "--dirty"], [run(MIB, 64 * KIB, "zero")]),
        (["--offset=2M"], []),
        (["--offset=9G", "--length=1G"], []),
    ],
)
def test_a_listing_can_begin_anywhere(words: list[str], wanted: list[dict[str, object]], disk: Path) -> None:
    assert qcow2_json("extents", "-B", "a", *words, disk) == wanted


def test_people_see_a_table_and_sums(disk: Path) -> None:
    title, *rows, summary = qcow2("extents", "-B", "a", "--dirty", disk).stdout.splitlines()
    assert title.split() == ["START", "LENGTH", "KIND"]
    assert [row.split() for row in rows] == [["0x10000", "0x10000", "data"], ["0x100000", "0x10000", "zero"]]
    assert summary == "in all: 64 KiB data, 64 KiB zero"
    assert qcow2("extents", "-B", "a", "--offset=2M", disk).stdout.splitlines()[-1] == "in all: nothing"


def test_what_cannot_be_is_refused(disk: Path) -> None:
    missing = qcow2("extents", "-B", "none", disk)
    assert (missing.status, missing.stdout) == (1, "")
    assert "no bitmap" in missing.stderr
    create_snapshot(disk, "then")
    both = qcow2("extents", "-B", "a", "--snapshot=then", disk)
    assert both.status == 1
    assert "active disk" in both.stderr
    assert qcow2("extents", "--snapshot=then", disk).status == 0


def test_a_long_list_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, 8 * MIB, cluster_size=512)
    with open_image(path, writable=True) as image:
        for offset in range(0, 2 * MIB, 1024):
            image.pwrite(b"x" * 512, offset)
    listed = qcow2_json("extents", path)
    assert len(listed) == 4096
    assert sum(each["length"] for each in listed) == 8 * MIB
    text = qcow2("extents", "--output=json", path).stdout
    assert text.count("\n") == len(json.loads(text))
