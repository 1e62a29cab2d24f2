"""adopt: an image around a volume of which not one byte changes, whole after a crash or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin import Policy, check, info, open_image
from qcow2_plugin.errors import BitmapError, ImageLockedError, NotQcow2Error, OptionError, ReferenceDeniedError
from qcow2_plugin.extent import ExtentKind
from qcow2_plugin.operations.adopt import adopt
from tests.support.command import qcow2
from tests.support.file_calls import CHANGES, FileCalls, contents
from tests.support.lockbytes import QEMU_WRITER, holding, locked_bytes
from tests.support.loop import loop_device
from tests.support.tools import convert_to_raw, qemu_img, qemu_img_json, qemu_io
from tests.support.watching import no_descriptor_left

KIB, MIB = 1 << 10, 1 << 20
DISK = b"".join(b"%07d\n" % number for number in range(MIB // 8)) + bytes(MIB) + b"end" * 1000


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("disk.raw").write_bytes(DISK[: len(DISK) & -512])
    return tmp_path


def state(path: Path | str) -> tuple[object, ...]:
    """Everything that a write, a truncate, a fallocate or a chmod would change."""
    found = os.stat(path)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return digest, found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_blocks, found.st_mode


@pytest.mark.parametrize("bitmap", [None, "daily"])
@pytest.mark.parametrize(
    ("cluster_size", "extended_l2"),
    [(512, False), (65536, False), (2 * MIB, False), (16384, True), (65536, True), (2 * MIB, True)],
)
def test_the_volume_is_the_disk(cluster_size: int, extended_l2: bool, bitmap: str | None) -> None:
    before = state("disk.raw")
    with no_descriptor_left():
        adopted = adopt(
            "disk.raw", "disk.qcow2", cluster_size=cluster_size, extended_l2=extended_l2, bitmap=bitmap, refcount_bits=8
        )
    assert state("disk.raw") == before
    assert adopted.virtual_size == adopted.volume_size == len(DISK) & -512
    assert not adopted.needs_trust
    with open_image("disk.qcow2") as image:
        assert image.pread(image.virtual_size, 0) == Path("disk.raw").read_bytes()
        assert [extent.kind for extent in image.extents()] == [ExtentKind.DATA]
        assert [each.name for each in image.bitmaps()] == ([] if bitmap is None else [b"daily"])
    found = check("disk.qcow2", deep=True)
    assert (found.corruptions, found.leaks, found.extra_corruptions) == (0, 0, 0)
    qemu_img("check", "disk.qcow2")
    qemu_img("compare", "-f", "qcow2", "-F", "raw", "disk.qcow2", "disk.raw")
    told = qemu_img_json("info", "disk.qcow2")["format-specific"]["data"]
    assert (told["data-file"], told["data-file-raw"]) == ("disk.raw", True)
    if bitmap is not None:
        assert [(each["name"], each["flags"]) for each in told["bitmaps"]] == [("daily", ["auto"])]
    assert state("disk.raw") == before


def test_the_bitmap_follows_the_disk() -> None:
    adopt("disk.raw", "disk.qcow2", bitmap=b"daily", bitmap_granularity=512)
    with open_image("disk.qcow2", writable=True) as image:
        assert list(image.dirty_extents("daily")) == []
        image.pwrite(b"new", 5000)
    with open_image("disk.qcow2") as image:
        assert [(each.guest_offset, each.length) for each in image.dirty_extents("daily")] == [(4608, 512)]
    assert Path("disk.raw").read_bytes()[5000:5003] == b"new"


def test_the_system_is_asked_for_no_change_of_the_volume(folder: Path) -> None:
    """Every system call of the process that could change the file, or open it for that."""
    if shutil.which("strace") is None:
        pytest.skip("no strace here")
    calls = (
        "write,pwrite64,pwritev,pwritev2,writev,truncate,ftruncate,fallocate,ioctl,mmap,sendfile,splice,copy_file_range"
    )
    code = "from qcow2_plugin.operations.adopt import adopt; adopt('disk.raw', 'disk.qcow2', bitmap='b')"
    command = [
        "strace",
        "-f",
        "-y",
        "-o",
        "calls",
        "-e",
        f"trace={calls},openat,open,openat2",
        sys.executable,
        "-c",
        code,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "ptrace" in done.stderr.lower() and "not permitted" in done.stderr.lower():
        pytest.skip(f"no process may be traced here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    lines = [line for line in Path("calls").read_text().splitlines() if re.search(r"disk\.raw[\"'>]", line)]
    opened = [line for line in lines if " open" in line]
    assert opened
    for line in opened:
        assert re.search(r"O_PATH|O_RDONLY", line), line
        assert not re.search(r"O_RDWR|O_WRONLY|O_TRUNC|O_CREAT", line), line
    assert [line for line in lines if line not in opened and "PROT_READ," not in line] == []
    assert any("disk.qcow2" in line and "pwrite" in line for line in Path("calls").read_text().splitlines())


def test_no_call_changes_the_volume(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    calls = FileCalls(monkeypatch)
    adopt("disk.raw", "disk.qcow2", bitmap="daily")
    assert [call for call in calls.calls if call.file.endswith("disk.raw") and call.name != "barrier"] == []
    assert any(call.name in CHANGES for call in calls.calls)


@pytest.mark.parametrize("bitmap", [None, "daily"])
def test_a_volume_that_cannot_be_written_to(folder: Path, bitmap: str | None) -> None:
    os.chmod("disk.raw", 0o444)
    before = state("disk.raw")
    with loop_device(folder / "disk.raw") as device:
        adopted = adopt(device, "disk.qcow2", bitmap=bitmap)
        assert (adopted.recorded_name, adopted.needs_trust) == (device.encode(), True)
        with pytest.raises(ReferenceDeniedError):
            open_image("disk.qcow2")
        with open_image("disk.qcow2", policy=Policy.TRUSTED) as image:
            assert image.pread(image.virtual_size, 0) == Path("disk.raw").read_bytes()
        assert convert_to_raw(Path("disk.qcow2")) == Path("disk.raw").read_bytes()
        ended = qcow2("adopt", device, "other.qcow2")
        assert "takes --policy=trusted or --data-file" in ended.stderr
    assert state("disk.raw") == before


def test_an_immutable_volume(folder: Path) -> None:
    if (
        shutil.which("chattr") is None
        or subprocess.run(["chattr", "+i", "disk.raw"], capture_output=True, check=False).returncode
    ):
        pytest.skip("this user or file system cannot make a file immutable")
    try:
        adopt("disk.raw", "disk.qcow2", bitmap="daily")
    finally:
        subprocess.run(["chattr", "-i", "disk.raw"], check=True)
    assert check("disk.qcow2", deep=True).is_sound


def test_readers_locks_are_held_to_the_end(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    calls, held = FileCalls(monkeypatch), set()
    calls.before = lambda: held.add(frozenset(locked_bytes(folder / "disk.raw")))
    adopt("disk.raw", "disk.qcow2", bitmap="daily")
    assert held == {frozenset((100, 201, 203))}
    assert not locked_bytes(folder / "disk.raw")
    with holding(folder / "disk.raw", (100, 201, 203)):
        adopt("disk.raw", "other.qcow2", bitmap="daily")
    for writer in (QEMU_WRITER, (100, 101)):
        with holding(folder / "disk.raw", writer), no_descriptor_left(), pytest.raises(ImageLockedError):
            adopt("disk.raw", "third.qcow2")
    assert not (folder / "third.qcow2").exists()


# ---- sizes and names


def test_a_size_of_no_whole_sectors_is_rounded_up() -> None:
    Path("odd.raw").write_bytes(DISK[:1000])
    before = state("odd.raw")
    assert adopt("odd.raw", "odd.qcow2", extended_l2=True)[:2] == (1024, 1000)
    with open_image("odd.qcow2") as image:
        assert image.pread(1024, 0) == DISK[:1000] + bytes(24)
    assert convert_to_raw(Path("odd.qcow2")) == DISK[:1000] + bytes(24)
    assert state("odd.raw") == before
    ended = qcow2("adopt", "odd.raw", "again.qcow2")
    assert "rounded up to whole sectors" in ended.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"virtual_size": MIB}, "more than the disk of 1048576; leave out the size, or add clip"),
        ({"virtual_size": 5 * MIB}, "less than the disk of 5242880, and is not made longer"),
        ({"virtual_size": 5 * MIB, "clip": True}, "less than the disk"),
        ({"virtual_size": -1}, "cannot have -1 bytes"),
        ({"cluster_size": 1000}, "power of two"),
        ({"cluster_size": 4096, "extended_l2": True}, "extended_l2 needs"),
        ({"refcount_bits": 3}, "must be 1, 2, 4"),
        ({"bitmap_granularity": 512}, "no bitmap to have it"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, folder: Path) -> None:
    before = contents(folder)
    with no_descriptor_left(), pytest.raises(OptionError, match=message):
        adopt("disk.raw", "disk.qcow2", **options)
    assert contents(folder) == before


@pytest.mark.parametrize("options", [{"bitmap": ""}, {"bitmap": "x" * 1024}, {"bitmap": "b", "bitmap_granularity": 7}])
def test_a_bitmap_that_cannot_be(options: dict[str, Any], folder: Path) -> None:
    before = contents(folder)
    with no_descriptor_left(), pytest.raises(BitmapError):
        adopt("disk.raw", "disk.qcow2", **options)
    assert contents(folder) == before


def test_a_part_of_the_volume() -> None:
    before = state("disk.raw")
    adopt("disk.raw", "disk.qcow2", virtual_size=MIB + 512, clip=True)
    with open_image("disk.qcow2") as image:
        assert image.pread(image.virtual_size, 0) == Path("disk.raw").read_bytes()[: MIB + 512]
    assert state("disk.raw") == before


def test_a_qcow2_image_is_no_volume_unless_it_must_be(folder: Path) -> None:
    adopt("disk.raw", "disk.qcow2")
    before = contents(folder)
    with pytest.raises(OptionError, match="looks like a qcow2 image"):
        adopt("disk.qcow2", "other.qcow2")
    assert contents(folder) == before
    assert qcow2("adopt", "--raw", "disk.qcow2", "other.qcow2").status == 0
    with open_image("other.qcow2") as image:
        assert image.pread(image.virtual_size, 0)[: len(before["disk.qcow2"])] == before["disk.qcow2"]


def test_other_things_are_no_volumes(folder: Path) -> None:
    Path("empty").touch()
    os.mkfifo("fifo")
    for name, error in (("empty", OptionError), ("fifo", NotQcow2Error), (".", NotQcow2Error), ("no", OSError)):
        with pytest.raises(error):
            adopt(name, "disk.qcow2")
    assert not (folder / "disk.qcow2").exists()


@pytest.mark.parametrize("kind", ["file", "the volume", "dangling symlink", "directory"])
def test_an_image_that_exists_is_refused(kind: str, folder: Path) -> None:
    name = "disk.raw" if kind == "the volume" else "disk.qcow2"
    if kind == "file":
        (folder / name).write_bytes(b"precious")
    elif kind == "dangling symlink":
        (folder / name).symlink_to("elsewhere")
    elif kind == "directory":
        (folder / name).mkdir()
    before = contents(folder)
    with pytest.raises(FileExistsError):
        adopt("disk.raw", name)
    assert contents(folder) == before
    assert sorted(os.listdir(folder)) == sorted({"disk.raw", name})


def test_the_name_that_is_recorded(folder: Path) -> None:
    (folder / "images").mkdir()
    assert adopt("disk.raw", folder / "a.qcow2").recorded_name == b"disk.raw"
    elsewhere = adopt("disk.raw", "images/b.qcow2")
    assert elsewhere.recorded_name == os.fsencode(folder / "disk.raw")
    assert elsewhere.needs_trust
    (folder / "link.raw").symlink_to("disk.raw")
    linked = adopt("link.raw", "c.qcow2")
    assert (linked.recorded_name, linked.needs_trust) == (b"link.raw", True)


def test_a_volume_behind_a_link_and_back(folder: Path) -> None:
    """ ".." of a link is the parent of where it leads: another file of that name is not the volume."""
    (folder / "far" / "away").mkdir(parents=True)
    (folder / "images").mkdir()
    (folder / "link").symlink_to("far/away")
    Path("far/disk.raw").write_bytes(b"volume" * 1024)
    adopted = adopt("link/../disk.raw", "images/disk.qcow2")
    assert adopted.recorded_name == os.fsencode(folder / "far" / "disk.raw")
    with open_image("images/disk.qcow2", policy=Policy.TRUSTED) as image:
        assert image.pread(6144, 0) == b"volume" * 1024


def test_the_longest_name_of_an_image(folder: Path) -> None:
    adopt("disk.raw", "x" * 255)
    assert check("x" * 255, deep=True).is_sound


def test_messages_have_the_name_that_was_given(folder: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        adopt("disk.raw", "nowhere/disk.qcow2")
    assert caught.value.filename == "nowhere/disk.qcow2"


def test_a_volume_whose_name_goes_meanwhile(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Nothing is asked of it once the image has its name, so that an error would leave an image."""
    calls = FileCalls(monkeypatch)

    def unlink() -> None:
        calls.before = lambda: None
        os.unlink("disk.raw")

    calls.before = unlink
    assert not adopt("disk.raw", "disk.qcow2").needs_trust
    assert list(contents(folder)) == ["disk.qcow2"]


# ---- crashes and failures


def test_the_image_has_its_name_when_it_is_durable_and_not_before(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    calls, states = FileCalls(monkeypatch), []
    calls.before = lambda: states.append(contents(folder))
    adopt("disk.raw", "disk.qcow2", bitmap="daily")
    made = contents(folder)
    for each in states:
        assert each["disk.raw"] == made["disk.raw"]
        assert each.get("disk.qcow2") in (None, made["disk.qcow2"])
    names = [call.name for call in calls.calls]
    named = names.index("link")
    image_calls = [call.name for call in calls.calls[:named] if call.file.endswith(".partial")]
    assert image_calls[-1] == "barrier"
    assert names[named:] == ["link", "unlink", "fsync"]
    assert calls.calls[-1].file == str(folder)
    assert sorted(made) == ["disk.qcow2", "disk.raw"]


def test_the_first_sector_is_written_when_the_tables_are_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = FileCalls(monkeypatch)
    adopt("disk.raw", "disk.qcow2", extended_l2=True)
    names = [call.name for call in calls.calls if call.file.endswith(".partial") and call.name != "unlink"]
    assert names[-4:] == ["barrier", "write_from", "barrier", "link"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_after_a_failure_nothing_is_left(number: int, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    before, volume = contents(folder), state("disk.raw")
    calls = FileCalls(monkeypatch, with_reads=True)
    at = 0
    while True:
        calls.arm(at, OSError(number, os.strerror(number)))
        try:
            with no_descriptor_left():
                adopt("disk.raw", "disk.qcow2", bitmap="daily")
        except OSError as error:
            assert error.errno == number
        else:
            if not calls.has_failed:
                break
            calls.arm(None, OSError())
            assert check("disk.qcow2", deep=True).is_sound, "only less tidy than it could be"
            with open_image("disk.qcow2") as image:
                assert image.bitmaps()
            os.unlink("disk.qcow2")
        assert contents(folder) == before, f"after call {at}"
        at += 1
    assert at > 20
    assert state("disk.raw") == volume


def test_the_command(folder: Path) -> None:
    ended = qcow2(
        "adopt", "-o", "cluster_size=4k,extended_l2=off,lazy_refcounts", "--bitmap=b", "disk.raw", "disk.qcow2"
    )
    assert (ended.status, ended.stdout) == (0, f"Adopted 'disk.raw': a disk of 2 MiB ({len(DISK) & -512} bytes)\n")
    assert "QEMU looks for the data file in its working directory" in ended.stderr
    told = info("disk.qcow2").qcow2
    assert told is not None
    assert (told.cluster_size, told.lazy_refcounts) == (4096, True)
    ended = qcow2("adopt", "disk.raw", "disk.qcow2")
    assert (ended.status, ended.stderr) == (1, "qcow2: error: File exists (disk.qcow2)\n")
    assert qcow2("adopt", "-q", "--size=1M", "--clip", "disk.raw", "quiet.qcow2").stdout == ""
    assert qcow2("adopt", "-o", "help").stdout.count("\n") == 4


def test_qemu_writes_to_it_and_the_volume_stays_the_disk() -> None:
    adopt("disk.raw", "disk.qcow2", bitmap="daily")
    qemu_io(Path("disk.qcow2"), "write -P 5 70000 3000", "write -z 0 65536", "discard 131072 65536")
    assert convert_to_raw(Path("disk.qcow2")) == Path("disk.raw").read_bytes()
    with open_image("disk.qcow2") as image:
        assert [each.guest_offset for each in image.dirty_extents("daily")][:1] == [0]
