"""detach: the image goes only when its data file is proved to be the disk, and never before that is durable."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin import Policy, add_bitmap, create_image, open_image
from qcow2_plugin.errors import DetachError, ImageLockedError, MissingReferenceError, Qcow2Error, ReadOnlyImageError
from qcow2_plugin.operations.adopt import adopt
from qcow2_plugin.operations.detach import detach
from tests.support.builder import ImageBuilder
from tests.support.command import qcow2
from tests.support.fields import set_field
from tests.support.file_calls import FileCalls, contents
from tests.support.lockbytes import QEMU_READER, holding, locked_bytes
from tests.support.loop import loop_device
from tests.support.tools import convert_to_raw, qemu_img, qemu_io
from tests.support.watching import no_descriptor_left

KIB, MIB = 1 << 10, 1 << 20
SIZE = MIB + 3 * KIB


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*, raw: bool = True, **options: Any) -> bytes:
    """disk.qcow2 over disk.raw with something of everything; what the guest sees of it, by qemu-img."""
    create_image("disk.qcow2", SIZE, data_file="disk.raw", data_file_raw=raw, **options)
    with open_image("disk.qcow2", writable=True) as image:
        image.pwrite(b"first" * 5000, 1000)
        image.pwrite(b"last" * 256, SIZE - KIB)
        image.write_zeroes(8 * KIB, 70 * KIB)
        image.discard(512 * KIB, 64 * KIB)
    view = convert_to_raw(Path("disk.qcow2"))
    assert len(view) == SIZE
    return view


KINDS: list[dict[str, Any]] = [
    {},
    {"extended_l2": True},
    {"cluster_size": 512},
    {"raw": False},
    {"raw": False, "extended_l2": True, "cluster_size": 16384},
    {"raw": False, "preallocation": "metadata"},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("writer", ["we", "QEMU"])
def test_the_data_file_alone_is_the_disk(writer: str, options: dict[str, Any], folder: Path) -> None:
    view = make(**options)
    if writer == "QEMU":
        qemu_io(Path("disk.qcow2"), "write -P 7 3000 100000", "write -z -u 65536 131072", "discard 300k 200k")
        view = convert_to_raw(Path("disk.qcow2"))
    proved = detach("disk.qcow2", dry_run=True)
    assert sorted(contents(folder)) == ["disk.qcow2", "disk.raw"]
    with no_descriptor_left():
        assert detach("disk.qcow2") == proved
    assert contents(folder) == {"disk.raw": view}
    assert (proved.data_file, proved.virtual_size, proved.lost_bitmaps) == (str(folder / "disk.raw"), SIZE, 0)


def test_what_was_adopted_goes_back(folder: Path) -> None:
    Path("disk.raw").write_bytes(b"x" * 100_000)
    adopt("disk.raw", "disk.qcow2")
    assert detach("disk.qcow2").found_size == 100_000
    assert contents(folder) == {"disk.raw": (b"x" * 100_000).ljust(100_352, b"\0")}


@pytest.mark.parametrize("raw", [False, True])
def test_zeros_that_the_file_does_not_hold(raw: bool, folder: Path) -> None:
    image = ImageBuilder(SIZE, 16).data_file(folder / "disk.raw", b"disk.raw", raw=raw)
    image.data(0, b"a").zero(3, preallocated=True, payload=b"\0" * 70 + b"hidden").build(folder / "disk.qcow2")
    before = contents(folder)
    for dry_run in (False, True):
        with no_descriptor_left(), pytest.raises(DetachError, match="at guest offset 0x30046 the disk reads as zeros"):
            detach("disk.qcow2", dry_run=dry_run)
    assert contents(folder) == before


def test_what_nothing_was_written_to_must_be_zeros_too(folder: Path) -> None:
    make(raw=False)
    with open("disk.raw", "r+b") as stream:
        stream.seek(700 * KIB)
        stream.write(b"!")
    with pytest.raises(DetachError, match="at guest offset 0xaf000"):
        detach("disk.qcow2")


def test_data_in_another_place(folder: Path) -> None:
    image = ImageBuilder(SIZE, 16).data_file(folder / "disk.raw", b"disk.raw")
    image.data(0, b"a").data(5, b"b", host_offset=6 << 16).build(folder / "disk.qcow2")
    before = contents(folder)
    with pytest.raises(Qcow2Error, match="0x50000"):
        detach("disk.qcow2", dry_run=True)
    assert contents(folder) == before


# ---- its length


@pytest.mark.parametrize(
    ("size", "ends"),
    [(SIZE, b""), (SIZE + 512, b""), (17 << 16, b""), (SIZE + 1000, b"\1"), (1 + (17 << 16), b""), (SIZE - 200, b"")],
)
def test_the_length(size: int, ends: bytes, folder: Path) -> None:
    view = make()
    os.truncate("disk.raw", size)
    if ends:
        with open("disk.raw", "r+b") as stream:
            stream.seek(size - 1)
            stream.write(ends)
    if ends or size > 17 << 16:
        before = contents(folder)
        match = f"behind its end, at {size - 1:#x}" if ends else "nobody knows what the rest is for"
        with pytest.raises(DetachError, match=match):
            detach("disk.qcow2")
        assert contents(folder) == before
        return
    if size < SIZE:
        view = view[:size].ljust(SIZE, b"\0")
    assert detach("disk.qcow2").found_size == size
    assert contents(folder) == {"disk.raw": view}


@pytest.mark.parametrize("more", [0, 64 * KIB])
def test_a_block_device(more: int, folder: Path) -> None:
    Path("device").write_bytes(os.urandom(SIZE + more))
    content = Path("device").read_bytes()
    with loop_device(folder / "device", read_only=False) as device:
        adopt(device, "disk.qcow2", virtual_size=SIZE, clip=True)
        found = detach("disk.qcow2", policy=Policy.TRUSTED)
        assert (found.is_device, found.found_size) == (True, SIZE + more)
        adopt(device, "disk.qcow2", virtual_size=SIZE, clip=True)
        ended = qcow2("detach", "--policy=trusted", "disk.qcow2")
        assert ended.status == 0
        assert (f"{more} bytes longer than the disk" in ended.stderr) is bool(more)
    assert Path("device").read_bytes() == content


# ---- what speaks against it


def test_bitmaps_are_not_lost_by_mistake(folder: Path) -> None:
    make()
    add_bitmap("disk.qcow2", "daily")
    before = contents(folder)
    for dry_run in (False, True):
        with pytest.raises(DetachError, match=r"1 dirty bitmaps, which would be lost.*--lose-bitmaps"):
            detach("disk.qcow2", dry_run=dry_run)
    assert contents(folder) == before
    assert detach("disk.qcow2", lose_bitmaps=True).lost_bitmaps == 1
    assert list(contents(folder)) == ["disk.raw"]


def refused(message: str, kind: type[Exception] = DetachError, **options: Any) -> None:
    before = contents(Path())
    for dry_run in (True, False):
        with no_descriptor_left(), pytest.raises(kind, match=message):
            detach("disk.qcow2", dry_run=dry_run, **options)
    assert contents(Path()) == before


def test_an_image_that_keeps_its_data() -> None:
    create_image("disk.qcow2", MIB)
    refused("has no external data file, it keeps the disk itself")


def test_a_backing_file() -> None:
    create_image("base.qcow2", MIB)
    create_image("disk.qcow2", data_file="disk.raw", backing_file="base.qcow2", backing_format="qcow2")
    refused('may be in the backing file "base.qcow2"')
    os.unlink("base.qcow2")
    refused('may be in the backing file "base.qcow2"')


def test_a_corrupt_image(folder: Path) -> None:
    make()
    set_field(folder / "disk.qcow2", "incompatible_features", 4 | 2)
    refused("marked as corrupt", Qcow2Error)


def test_another_name_of_the_image() -> None:
    make()
    os.link("disk.qcow2", "other.qcow2")
    refused("another name")


def test_a_data_file_that_is_not_there(folder: Path) -> None:
    make()
    os.rename("disk.raw", "moved.raw")
    refused("does not exist", MissingReferenceError)
    detach("disk.qcow2", data_file="moved.raw")
    assert list(contents(folder)) == ["moved.raw"]


def test_what_others_use_stays(folder: Path) -> None:
    make()
    before = contents(folder)
    for name in ("disk.qcow2", "disk.raw"):
        with holding(folder / name, QEMU_READER):
            detach("disk.qcow2", dry_run=True)
            with no_descriptor_left(), pytest.raises(ImageLockedError):
                detach("disk.qcow2")
    assert contents(folder) == before


def test_locks(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    make()
    calls, held = FileCalls(monkeypatch, with_reads=True), list[tuple[bool, bool]]()

    def look() -> None:
        is_there = (folder / "disk.qcow2").exists()
        held.append((is_there and 101 in locked_bytes(folder / "disk.qcow2"), 101 in locked_bytes(folder / "disk.raw")))

    calls.before = look
    detach("disk.qcow2", dry_run=True)
    assert set(held) == {(False, False)}
    held.clear()
    detach("disk.qcow2")
    assert held[-3:] == [(True, True), (True, True), (False, True)]


def test_a_symlink_to_the_image(folder: Path) -> None:
    view = make()
    (folder / "link").symlink_to("disk.qcow2")
    detach("link", data_file="disk.raw")
    assert not (folder / "disk.qcow2").exists()
    assert (folder / "disk.raw").read_bytes() == view


def test_a_name_that_changes_hands(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    make()
    calls = FileCalls(monkeypatch)

    def swap() -> None:
        calls.before = lambda: None
        os.replace("other", "disk.qcow2")

    Path("other").write_bytes(b"precious")
    calls.before = swap
    with pytest.raises(DetachError, match="another file by now"):
        detach("disk.qcow2")
    assert (folder / "disk.qcow2").read_bytes() == b"precious"


@pytest.mark.parametrize("swap", [lambda: os.replace("other", "disk.raw"), lambda: os.unlink("disk.raw")])
def test_a_data_file_whose_name_changes_hands(swap: Callable[[], None], folder: Path) -> None:
    make()
    Path("other").write_bytes(b"not the disk")
    image = Path("disk.qcow2").read_bytes()
    swaps = [swap]

    def progress(done: int, total: int) -> None:
        while swaps:
            swaps.pop()()

    with no_descriptor_left(), pytest.raises(DetachError, match=r"another file by now, or of none .*disk\.raw"):
        detach("disk.qcow2", progress=progress)
    assert Path("disk.qcow2").read_bytes() == image


def test_a_data_file_behind_a_link_and_back(folder: Path) -> None:
    (folder / "far" / "away").mkdir(parents=True)
    (folder / "link").symlink_to("far/away")
    make()
    os.rename("disk.raw", "far/disk.raw")
    assert detach("disk.qcow2", data_file="link/../disk.raw").data_file == str(folder / "far" / "disk.raw")


# ---- crashes and failures


@pytest.mark.parametrize("size", [SIZE - 512, SIZE, 17 << 16])
def test_the_image_goes_when_the_disk_is_durable(size: int, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    view = make()
    os.truncate("disk.raw", size)
    view = view[:size].ljust(SIZE, b"\0")[:SIZE]
    image = Path("disk.qcow2").read_bytes()
    calls, states = FileCalls(monkeypatch), []
    calls.before = lambda: states.append(contents(folder))
    detach("disk.qcow2")
    for state in states:
        assert state["disk.raw"][:SIZE].ljust(SIZE, b"\0") == view
        assert state.get("disk.qcow2", image) == image
        assert "disk.qcow2" in state or len(state["disk.raw"]) == SIZE
    names = [(call.name, os.path.basename(call.file)) for call in calls.calls]
    expected = [("barrier", "disk.raw"), ("fsync", folder.name), ("unlink", "disk.qcow2"), ("fsync", folder.name)]
    assert names == [("barrier", "disk.raw"), *([] if size == SIZE else [("truncate", "disk.raw")]), *expected]


@pytest.mark.parametrize("raw", [False, True])
def test_after_a_failure_there_is_the_image_or_the_disk(
    raw: bool, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    view = make(raw=raw)
    os.truncate("disk.raw", 17 << 16)
    before = contents(folder)
    calls, at = FileCalls(monkeypatch, with_reads=True), 0
    while True:
        calls.arm(at, OSError(errno.EIO, "fails"))
        try:
            with no_descriptor_left():
                detach("disk.qcow2")
        except OSError as error:
            assert error.errno == errno.EIO
        else:
            assert not calls.has_failed
            break
        calls.arm(None, OSError())
        after = contents(folder)
        assert after["disk.raw"][:SIZE] == view
        if "disk.qcow2" in after:
            assert after["disk.qcow2"] == before["disk.qcow2"]
            assert convert_to_raw(Path("disk.qcow2")) == view
        else:
            assert after == {"disk.raw": view}
        for name, content in before.items():
            Path(name).write_bytes(content)
        at += 1
    assert at > 8
    assert contents(folder) == {"disk.raw": view}


def test_the_cost_follows_the_data(folder: Path) -> None:
    create_image("disk.qcow2", 1 << 43, data_file="disk.raw", cluster_size=2 * MIB)
    with open_image("disk.qcow2", writable=True) as image:
        image.pwrite(b"far", 1 << 42)
    assert detach("disk.qcow2").virtual_size == 1 << 43


# ---- the command


def test_the_command(folder: Path) -> None:
    make()
    ended = qcow2("detach", "-n", "-p", "disk.qcow2")
    assert (ended.status, ended.stdout[-22:]) == (0, "; the image could go.\n")
    assert ended.stderr.endswith("100 % proved\n")
    ended = qcow2("detach", "--output=json", "disk.qcow2")
    assert json.loads(ended.stdout) == {
        "image": "disk.qcow2",
        "removed": True,
        "data-file": str(folder / "disk.raw"),
        "virtual-size": SIZE,
        "data-file-size": SIZE,
        "lost-bitmaps": 0,
    }
    make_again = qcow2("adopt", "-q", "--bitmap=b", "disk.raw", "disk.qcow2")
    assert make_again.status == 0
    ended = qcow2("detach", "disk.qcow2")
    assert (ended.status, "--lose-bitmaps" in ended.stderr) == (1, True)
    ended = qcow2("detach", "--lose-bitmaps", "disk.qcow2")
    assert ended.stdout.endswith("format raw; the image is removed.\n")
    assert qemu_img("info", "-f", "raw", "disk.raw")


def test_a_read_only_view_is_not_enough(folder: Path) -> None:
    make()
    set_field(folder / "disk.qcow2", "incompatible_features", 4 | 2)
    with pytest.raises(ReadOnlyImageError):
        detach("disk.qcow2")
