"""`qcow2 snapshot`: what it does, what it prints, and wrong usage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qcow2_plugin import create_image, create_snapshot, list_snapshots, open_image
from tests.support.builder import ImageBuilder
from tests.support.command import qcow2

MIB = 1 << 20


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(value: bytes) -> None:
    with open_image("disk.qcow2", writable=True) as image:
        image.pwrite(value * 100000, 0)


def test_snapshots_are_made_applied_and_deleted() -> None:
    create_image("disk.qcow2", 10 * MIB)
    for value, name in ((b"1", "one"), (b"2", "two")):
        write(value)
        ended = qcow2("snapshot", "-c", name, "disk.qcow2")
        assert (ended.status, ended.stdout, ended.stderr) == (0, "", "")
    ended = qcow2("snapshot", "-a", "one", "disk.qcow2")
    assert (ended.status, ended.stdout, ended.stderr) == (0, "", "")
    with open_image("disk.qcow2") as image:
        assert image.pread(3, 0) == b"111"
    assert qcow2("snapshot", "-q", "-d", "1", "disk.qcow2").status == 0
    assert [each.snapshot.name for each in list_snapshots("disk.qcow2")] == ["two"]
    ended = qcow2("snapshot", "-d", "one", "disk.qcow2")
    assert ended.status == 1
    assert 'no internal snapshot "one"' in ended.stderr


def test_a_list_for_people() -> None:
    image = ImageBuilder(10 * MIB).data(0, b"x")
    image.snapshot(b"7", b"a\x1b[31m", date_sec=86400, vm_clock_nsec=3_723_004_000_000).build("disk.qcow2")
    create_snapshot("disk.qcow2", "now")
    for words in (["-l"], ["--list"], [], ["-U"]):
        ended = qcow2("snapshot", *words, "disk.qcow2")
        lines = ended.stdout.splitlines()
        assert (ended.status, ended.stderr) == (0, "")
        assert lines[0] == "Snapshot list:"
        assert lines[1].split() == ["ID", "TAG", "VM", "SIZE", "DATE", "(UTC)", "VM", "CLOCK", "ICOUNT", "DISK"]
        assert lines[2].split() == [
            "7", "a\\x1b[31m", "0", "bytes", "1970-01-02", "00:00:00", "01:02:03.004", "10", "MiB"
        ]  # fmt: skip
        assert lines[3].split()[:2] == ["8", "now"]
    sizes = qcow2("snapshot", "-l", "--sizes", "disk.qcow2").stdout.splitlines()
    assert sizes[1].endswith("  OWN SIZE  REFERRED")
    assert sizes[2].split()[-4:] == ["64", "KiB", "192", "KiB"]
    create_image("empty.qcow2", MIB)
    assert not qcow2("snapshot", "-l", "empty.qcow2").stdout
    assert not qcow2("snapshot", "-q", "-l", "disk.qcow2").stdout


def test_a_list_for_programs() -> None:
    create_image("disk.qcow2", 10 * MIB)
    assert json.loads(qcow2("snapshot", "--output=json", "disk.qcow2").stdout) == []
    create_snapshot("disk.qcow2", "then")
    told = qcow2("snapshot", "-l", "--output=json", "disk.qcow2").stdout
    (entry,) = json.loads(told)
    (info,) = json.loads(qcow2("info", "--output=json", "disk.qcow2").stdout)["snapshots"]
    assert entry == {**info, "virtual-size": 10 * MIB}
    (entry,) = json.loads(qcow2("snapshot", "-l", "--sizes", "--output=json", "disk.qcow2").stdout)
    assert entry == {**info, "virtual-size": 10 * MIB, "own-size": 65536, "referred-size": 65536}


def test_bitmaps_have_to_be_asked_for() -> None:
    ImageBuilder(MIB).data(0, b"x").snapshot(b"1", b"then").bitmap(b"changed", flags=2).build("disk.qcow2")
    write(b"2")
    ended = qcow2("snapshot", "-a", "then", "disk.qcow2")
    assert ended.status == 1
    assert "option mark-bitmaps" in ended.stderr
    assert qcow2("snapshot", "-a", "then", "--mark-bitmaps", "disk.qcow2").status == 0
    with open_image("disk.qcow2") as image:
        assert image.pread(1, 0) == b"x"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "required: IMAGE"),
        ("-c", "argument -c/--create: expected one argument"),
        ("-c a -d b disk.qcow2", "argument -d/--delete: not allowed with argument -c/--create"),
        ("-l -a b disk.qcow2", "not allowed with argument -l/--list"),
        ("-U -c a disk.qcow2", "-U is for -l: an image that others use must not be changed"),
        ("-d a --mark-bitmaps disk.qcow2", "--mark-bitmaps goes with -a"),
        ("-c a --sizes disk.qcow2", "--sizes and --output go with -l"),
        ("-d a --output=json disk.qcow2", "--sizes and --output go with -l"),
        ("--output=text disk.qcow2", "invalid choice: 'text'"),
    ],
)
def test_wrong_usage_says_what_is_wrong(words: str, message: str) -> None:
    create_image("disk.qcow2", MIB)
    ended = qcow2("snapshot", *words.split())
    assert ended.status == 2
    assert message in ended.stderr
    assert not list_snapshots("disk.qcow2")


def test_failures_are_one_line() -> None:
    create_image("disk.qcow2", MIB)
    for words in (["-c", "", "disk.qcow2"], ["-a", "x", "disk.qcow2"], ["-l", "nowhere.qcow2"]):
        ended = qcow2("snapshot", *words)
        assert ended.status == 1
        assert ended.stderr.startswith("qcow2: error: ")
        assert len(ended.stderr.splitlines()) == 1
