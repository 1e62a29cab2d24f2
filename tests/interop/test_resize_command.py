"""`qcow2 resize`: the disk has what it had and zeros behind, on every kind of image; qemu-img finds nothing wrong."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin import create_image, info, open_image, resize
from qcow2_plugin.errors import ImageLockedError, ReferenceDeniedError, ResizeError
from tests.support.builder import ImageBuilder
from tests.support.command import qcow2
from tests.support.holders import qemu_io_holding
from tests.support.tools import ToolError, convert_to_raw, qemu_img, qemu_img_json, qemu_io
from tests.support.watching import no_descriptor_left

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZE = 10 * MIB + 512
DATA: dict[str, Any] = {"data_file": "disk.data"}
RAW: dict[str, Any] = {**DATA, "data_file_raw": True}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small clusters": {"cluster_size": 512},
    "narrow refcounts": {"cluster_size": 4096, "refcount_bits": 1},
    "large clusters": {"cluster_size": 2 * MIB},
    "extended L2": {"extended_l2": True},
    "preallocated": {"preallocation": "metadata"},
    "preallocated small clusters": {"preallocation": "falloc", "cluster_size": 512},
    "data file": DATA,
    "raw data file": RAW,
    "raw data file, extended L2": {**RAW, "extended_l2": True, "cluster_size": 16384},
    "raw data file, small clusters": {**RAW, "cluster_size": 512},
    "longer backing file": {"backing_file": "long.raw", "backing_format": "raw"},
    "longer backing file, extended L2": {"backing_file": "long.raw", "backing_format": "raw", "extended_l2": True},
    "shorter backing file": {"backing_file": "short.raw", "backing_format": "raw", "cluster_size": 4096},
    "version 2": {"version": 2},
}
STEPS = {
    "longer": [("+5M", 15 * MIB + 512)],
    "much longer": [("3G", 3 * GIB)],
    "into the last cluster": [("+1k", SIZE + KIB)],
    "shorter": [("3M", 3 * MIB)],
    "to a sector": [("512", 512)],
    "inside a cluster and back": [("-1500k", SIZE - 1500 * KIB), ("+3M", SIZE + 1572 * KIB)],
    "much longer and back": [("3G", 3 * GIB), (str(SIZE), SIZE)],
    "as it is": [("+0", SIZE)],
}


CASES = [
    (kind, steps)
    for kind, options in KINDS.items()
    for steps in STEPS
    if not (steps.startswith("much") and options.get("cluster_size") == 512 and len(options) > 1)  # all of it mapped
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def filled(kind: str, folder: Path) -> bytes:
    """An image of this kind with something everywhere that matters; what the guest sees of it."""
    (folder / "long.raw").write_bytes(b"L" * 20 * MIB)
    (folder / "short.raw").write_bytes(b"S" * 5_000_500)
    create_image("disk.qcow2", SIZE, **KINDS[kind])
    qemu_io(
        "disk.qcow2", "write -P 1 0 100k", "write -P 2 3M 300k", "write -z 5M 1M", f"write -P 3 {SIZE - 70000} 70000"
    )
    return convert_to_raw("disk.qcow2")


def resized(disk: bytes, size: int) -> bytes:
    return disk[:size].ljust(size, b"\0")


def assert_sound() -> None:
    checked = qemu_img_json("check", "disk.qcow2")
    assert checked["check-errors"] == 0
    assert {"corruptions", "leaks"}.isdisjoint(checked), checked


@pytest.mark.parametrize(("kind", "steps"), CASES)
def test_the_disk_is_what_it_was_and_zeros_behind(kind: str, steps: str, folder: Path) -> None:
    disk = filled(kind, folder)
    for word, size in STEPS[steps]:
        with no_descriptor_left():
            ended = qcow2("resize", "--shrink", "disk.qcow2", word)
        assert (ended.status, ended.stdout, ended.stderr) == (0, "Image resized.\n", "")
        assert info("disk.qcow2").virtual_size == size
        assert_sound()
        disk = resized(disk, min(size, 32 * MIB))
        with open_image("disk.qcow2") as image:
            assert image.pread(len(disk), 0) == disk
    if size <= 32 * MIB:
        assert convert_to_raw("disk.qcow2") == disk
    if "data_file" in KINDS[kind]:
        data = folder / "disk.data"
        assert size <= data.stat().st_size <= size + 65536, "no more than QEMU added to fill the last cluster"
        if KINDS[kind].get("data_file_raw"):
            with data.open("rb") as file:
                assert file.read(len(disk)) == disk


@pytest.mark.parametrize("kind", KINDS)
def test_qemu_and_we_resize_in_turn(kind: str, folder: Path) -> None:
    disk = filled(kind, folder)
    for number, (word, size) in enumerate(
        [("12M", 12 * MIB), ("7M", 7 * MIB), ("9M", 9 * MIB), ("33M", 33 * MIB), ("8M", 8 * MIB), ("10M", 10 * MIB)]
    ):
        if number % 2:
            qemu_img("resize", "-q", "--shrink", "disk.qcow2", word)
        else:
            assert qcow2("resize", "-q", "--shrink", "disk.qcow2", word).status == 0
        assert_sound()
        disk = resized(disk, size)
        assert convert_to_raw("disk.qcow2") == disk
        qemu_io("disk.qcow2", f"write -P {number + 10} {size - 5000} 5000")
        disk = disk[: size - 5000] + bytes([number + 10]) * 5000


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("kind", ["plain", "small clusters", "extended L2", "data file", "raw data file", "version 2"])
def test_what_is_added_is_preallocated_as_asked(kind: str, preallocation: str, folder: Path) -> None:
    disk = filled(kind, folder)
    data = folder / ("disk.data" if "data_file" in KINDS[kind] else "disk.qcow2")
    before = data.stat().st_blocks * 512
    ended = qcow2("resize", f"--preallocation={preallocation}", "disk.qcow2", "20M")
    assert (ended.status, ended.stderr) == (0, "")
    assert_sound()
    assert convert_to_raw("disk.qcow2") == resized(disk, 20 * MIB)
    added = data.stat().st_blocks * 512 - before
    if preallocation == "metadata":
        assert added < 2 * MIB
    else:
        assert added > 9 * MIB
    if kind != "extended L2":  # where what was not written is not present
        assert all(entry["present"] for entry in qemu_img_json("map", "disk.qcow2") if entry["start"] >= 11 * MIB)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("disk.qcow2 5M", "loses what is behind"),
        ("disk.qcow2 -5M", "loses what is behind"),
        ("--shrink disk.qcow2 0", "take a size of more than 0"),
        ("--shrink disk.qcow2 -20M", "nothing would be left of the disk of 10486272 bytes"),
        ("--shrink --preallocation=metadata disk.qcow2 5M", "preallocation is for growing"),
        ("disk.qcow2 4P", "too large"),
        ("disk.qcow2 +8191P", "too large"),
        ("none 5M", "No such file or directory (none)"),
        ("long.raw 5M", "not a qcow2 image"),
    ],
)
def test_what_qemu_refuses_is_refused_and_changes_nothing(words: str, message: str, folder: Path) -> None:
    filled("plain", folder)
    before = (folder / "disk.qcow2").read_bytes()
    with pytest.raises(ToolError):
        qemu_img("resize", "-f", "qcow2", *words.split())
    with no_descriptor_left():
        ended = qcow2("resize", "-f", "qcow2", *words.split())
    assert (ended.status, ended.stdout) == (1, "")
    assert ended.stderr.startswith("qcow2: error: ")
    assert ended.stderr.count("\n") == 1
    assert message in ended.stderr
    assert (folder / "disk.qcow2").read_bytes() == before


def test_bytes_are_rounded_up_to_sectors() -> None:
    create_image("disk.qcow2", MIB)
    resize("disk.qcow2", MIB + 1)
    assert info("disk.qcow2").virtual_size == MIB + 512
    resize("disk.qcow2", 512, is_relative=True)
    assert info("disk.qcow2").virtual_size == MIB + 1024
    resize("disk.qcow2", -1024, is_relative=True, allow_shrink=True)
    assert info("disk.qcow2").virtual_size == MIB


def test_an_error_is_of_its_kind(folder: Path) -> None:
    filled("plain", folder)
    with no_descriptor_left(), pytest.raises(ResizeError) as caught:
        resize("disk.qcow2", -SIZE, is_relative=True, allow_shrink=True)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(ResizeError, match="off, metadata, falloc, full"):
        resize("disk.qcow2", 2 * SIZE, preallocation="some")
    with qemu_io_holding(folder / "disk.qcow2"), no_descriptor_left(), pytest.raises(ImageLockedError):
        resize("disk.qcow2", 2 * SIZE)


def test_only_files_that_may_be_opened_are(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    create_image("disk.qcow2", MIB, data_file="elsewhere/disk.data")
    with no_descriptor_left(), pytest.raises(ReferenceDeniedError):
        resize("disk.qcow2", 2 * MIB)
    assert (folder / "elsewhere" / "disk.data").stat().st_size == MIB
    assert qcow2("resize", "-q", "--data-file=elsewhere/disk.data", "disk.qcow2", "2M").status == 0
    assert qcow2("resize", "-q", "--policy=trusted", "disk.qcow2", "+1M").status == 0
    assert (folder / "elsewhere" / "disk.data").stat().st_size == 3 * MIB


def test_bitmaps_keep_what_they_know(folder: Path) -> None:
    create_image("disk.qcow2", 4 * MIB)
    qemu_img("bitmap", "--add", "disk.qcow2", "bitmap")
    qemu_io("disk.qcow2", "write 1M 64k", "write 3M 64k")
    for word, expected in (("8M", [(MIB, 65536), (3 * MIB, 65536)]), ("2M", [(MIB, 65536)]), ("4M", [(MIB, 65536)])):
        assert qcow2("resize", "-q", "--shrink", "disk.qcow2", word).status == 0
        assert_sound()
        told = qemu_img_json("info", "disk.qcow2")["format-specific"]["data"]["bitmaps"]
        assert [(bitmap["name"], bitmap["flags"]) for bitmap in told] == [("bitmap", ["auto"])]
        with open_image("disk.qcow2") as image:
            extents = [(extent.guest_offset, extent.length) for extent in image.dirty_extents("bitmap")]
        assert extents == expected


def test_an_image_that_must_not_be_written_to_is_refused(folder: Path) -> None:
    ImageBuilder(MIB, incompatible=2).build("disk.qcow2")
    ended = qcow2("resize", "disk.qcow2", "2M")
    assert ended.status == 1
    assert "corrupt" in ended.stderr
    assert info("disk.qcow2").virtual_size == MIB
