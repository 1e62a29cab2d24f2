"""create_image: every contradiction, what a failure leaves, which files are touched, and in which order."""

from __future__ import annotations

import errno
import os
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin import Policy, create_image, info, open_image
from qcow2_plugin.errors import (
    ImageLockedError,
    MissingReferenceError,
    NotQcow2Error,
    OptionError,
    Qcow2Error,
    ReferenceDeniedError,
)
from qcow2_plugin.extent import ExtentKind
from qcow2_plugin.storage.file import FileStorage
from tests.support.builder import ImageBuilder
from tests.support.lockbytes import QEMU_READER, QEMU_WRITER, holding, locked_bytes
from tests.support.loop import loop_device
from tests.support.watching import no_descriptor_left

KIB, MIB = 1 << 10, 1 << 20
DATA: dict[str, Any] = {"data_file": "disk.data"}
RAW: dict[str, Any] = {**DATA, "data_file_raw": True}
BASE: dict[str, Any] = {"backing_file": "base.raw", "backing_format": "raw"}
KEPT: dict[str, Any] = {**RAW, "keep_data_file": True}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 4}, r"no version 4; take 3 \(compat=1.1\) or 2"),
        ({"cluster_size": 256}, "power of two from 512 to 2097152 bytes, not 256"),
        ({"cluster_size": 4 << 20}, "not 4194304"),
        ({"cluster_size": 65537}, "not 65537"),
        ({"cluster_size": 0}, "not 0"),
        ({"refcount_bits": 0}, "must be 1, 2, 4, 8, 16, 32 or 64, not 0"),
        ({"refcount_bits": 3}, "not 3"),
        ({"refcount_bits": 128}, "not 128"),
        ({"compression_type": "lzma"}, 'compression_type cannot be "lzma"; it is one of zlib, zstd'),
        ({"preallocation": "on"}, 'preallocation cannot be "on"; it is one of off, metadata, falloc, full'),
        (
            {"extended_l2": True, "cluster_size": 8192},
            "extended_l2 needs a cluster_size of 16384 bytes or more, not 8192",
        ),
        (
            {"version": 2, "lazy_refcounts": True},
            r"version 2 \(compat=0.10\) has no lazy_refcounts; leave it out, or take",
        ),
        ({"version": 2, "refcount_bits": 8}, "has no refcount_bits but 16"),
        ({"version": 2, "extended_l2": True}, "has no extended_l2"),
        ({"version": 2, "compression_type": "zstd"}, "has no compression_type but zlib"),
        ({"version": 2, **DATA}, "has no data_file"),
        ({"backing_format": "raw"}, "backing_format, but no backing_file .*name the file"),
        ({"backing_file": "base.raw"}, r"say the format .*\(backing_format qcow2 or raw\): it is never guessed"),
        ({"backing_file": "base.raw", "backing_format": ""}, "say the format"),
        ({"backing_file": "base.raw", "backing_format": "vmdk"}, 'backing_format cannot be "vmdk"; .* qcow2, raw'),
        ({"backing_file": "base.raw", "backing_format": "x" * 16, "check_backing_file": False}, "is no backing_format"),
        ({"backing_file": "", "backing_format": "raw"}, "no name for a backing_file"),
        ({"backing_file": "a\0b", "backing_format": "raw"}, 'x00b" is no name for a backing_file'),
        ({"backing_file": "x" * 1024, "backing_format": "raw"}, "longer than 1023 bytes"),
        ({"backing_file": "nbd://host/x", "backing_format": "raw"}, "taken for a driver or URL.*put ./ before it"),
        ({"backing_file": "json:{}", "backing_format": "raw"}, "taken for a driver or URL"),
        ({**BASE, **RAW}, "data_file_raw means the whole disk.* backing_file; take one"),
        (
            {**BASE, "preallocation": "metadata"},
            "preallocation=metadata hides the backing_file, other than with extended_l2",
        ),
        ({**BASE, **DATA, "keep_data_file": True, "preallocation": "metadata"}, "keep_data_file means the whole disk"),
        ({"data_file_raw": True}, "data_file_raw is about a data_file, and none is named; name one, or leave it out"),
        ({"keep_data_file": True}, "keep_data_file is about a data_file"),
        ({"overwrite_data_file": True}, "overwrite_data_file is about a data_file"),
        ({"clip_data_file": True}, "clip_data_file is about a data_file"),
        ({"data_file": ""}, "no name for a data_file"),
        ({"data_file": "a\0b"}, "no name for a data_file"),
        ({**RAW, "clip_data_file": True}, "clip_data_file is about a data file that is kept; add keep_data_file"),
        ({**KEPT, "overwrite_data_file": True}, "keep_data_file and overwrite_data_file contradict each other"),
        ({**KEPT, "preallocation": "falloc"}, "preallocation=falloc cannot be; take metadata"),
        ({**KEPT, "preallocation": "full"}, "preallocation=full cannot be"),
        ({**DATA, "keep_data_file": True}, "nothing .* would be seen; add data_file_raw, or.* preallocation=metadata"),
        ({"virtual_size": None}, "say how large the disk is"),
        ({"virtual_size": None, **DATA}, "say how large"),
        ({"virtual_size": None, **BASE, "check_backing_file": False}, "say how large"),
        ({"virtual_size": -1}, "cannot have -1 bytes"),
        ({"virtual_size": 1 << 63}, "too large"),
        (
            {"cluster_size": 512, **BASE, "backing_file": "x" * 400, "check_backing_file": False},
            "larger clusters, or short",
        ),
        ({"backing_file": "none", "backing_format": "qcow2"}, "none"),
        ({**BASE, "backing_format": "qcow2"}, "not a qcow2 image"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_is_touched(
    options: dict[str, Any], message: str, folder: Path
) -> None:
    for name in ("base.raw", "disk.data", "disk.qcow2"):
        (folder / name).write_bytes(name.encode() * 100)
    before = contents(folder)
    size = options.pop("virtual_size", MIB)
    with no_descriptor_left(), pytest.raises((Qcow2Error, OSError), match=message) as caught:
        create_image("disk.qcow2", size, **options)
    assert isinstance(caught.value, Qcow2Error | OSError)
    assert caught.value.errno in (errno.EINVAL, errno.ENOENT)
    assert contents(folder) == before


def test_the_size_is_rounded_up_to_sectors() -> None:
    for given, virtual_size in ((0, 0), (1, 512), (512, 512), (MIB - 1, MIB)):
        create_image("disk.qcow2", given)
        assert info("disk.qcow2").virtual_size == virtual_size


def test_the_size_is_that_of_the_backing_file(folder: Path) -> None:
    (folder / "base.raw").write_bytes(b"x" * 1000)
    create_image("middle.qcow2", **BASE)
    assert info("middle.qcow2").virtual_size == 1024
    create_image("top.qcow2", backing_file="middle.qcow2", backing_format="qcow2")
    with open_image("top.qcow2") as image:
        assert image.pread(1024, 0) == b"x" * 1000 + bytes(24)
    create_image("top.qcow2", 2048, backing_file="middle.qcow2", backing_format="qcow2")
    assert info("top.qcow2").virtual_size == 2048


# ---- backing files


def test_a_relative_backing_name_starts_at_the_image(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "base.raw").write_bytes(b"x" * KIB)
    create_image("sub/disk.qcow2", **BASE)
    with open_image("sub/disk.qcow2") as image:
        assert image.pread(KIB, 0) == b"x" * KIB


def test_a_backing_file_is_not_looked_at_if_that_is_not_wanted(folder: Path) -> None:
    for name in ("none", "nbd://host/x", "/etc/shadow"):
        create_image("disk.qcow2", MIB, backing_file=name, backing_format="weird", check_backing_file=False)
        qcow2 = info("disk.qcow2").qcow2
        assert qcow2 is not None
        assert (qcow2.backing_file, qcow2.backing_format) == (name, "weird")


def test_what_is_below_the_backing_file_keeps_to_the_policy(folder: Path) -> None:
    (folder / "below").mkdir()
    (folder / "below" / "base.raw").write_bytes(bytes(KIB))
    absolute = folder / "below" / "base.raw"
    create_image("middle.qcow2", backing_file=absolute, backing_format="raw")
    with no_descriptor_left(), pytest.raises(ReferenceDeniedError, match="absolute"):
        create_image("top.qcow2", backing_file="middle.qcow2", backing_format="qcow2")
    assert not (folder / "top.qcow2").exists()
    create_image("top.qcow2", backing_file="middle.qcow2", backing_format="qcow2", policy=Policy.TRUSTED)
    absolute.unlink()
    with pytest.raises(MissingReferenceError):
        create_image("other.qcow2", backing_file="middle.qcow2", backing_format="qcow2", policy=Policy.TRUSTED)


def test_a_backing_file_that_is_being_written_to_is_refused(folder: Path) -> None:
    create_image("base.qcow2", MIB)
    with holding(folder / "base.qcow2", QEMU_WRITER), pytest.raises(ImageLockedError):
        create_image("disk.qcow2", backing_file="base.qcow2", backing_format="qcow2")
    assert not (folder / "disk.qcow2").exists()


# ---- one file, one part


def chain(folder: Path) -> None:
    (folder / "base.raw").write_bytes(b"b" * MIB)
    create_image("lower.qcow2", **BASE, **DATA)
    create_image("middle.qcow2", backing_file="lower.qcow2", backing_format="qcow2")
    os.link("lower.qcow2", "hardlink")
    (folder / "symlink").symlink_to("middle.qcow2")


OVER_CHAIN: dict[str, Any] = {"backing_file": "middle.qcow2", "backing_format": "qcow2"}


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        ("middle.qcow2", OVER_CHAIN, "the image is the same file as the backing file"),
        ("symlink", OVER_CHAIN, "the image is the same file as the backing file"),
        ("lower.qcow2", OVER_CHAIN, "the image is the same file as the backing file"),
        ("hardlink", OVER_CHAIN, "the image is the same file as the backing file"),
        ("base.raw", OVER_CHAIN, "the image is the same file as the backing file"),
        ("disk.data", OVER_CHAIN, "the image is the same file as the data file of the backing file"),
        ("middle.qcow2", {**OVER_CHAIN, "check_backing_file": False}, "the image is the same file as the backing file"),
        (
            "new",
            {**OVER_CHAIN, "backing_file": "new", "check_backing_file": False},
            "backing file is the same .* the image",
        ),
        (
            "new",
            {**OVER_CHAIN, "data_file": "base.raw", "overwrite_data_file": True},
            "data file is the same .* backing file",
        ),
        ("new", {**OVER_CHAIN, "data_file": "base.raw"}, "data file is the same .* backing file"),
        ("new", {"data_file": "new"}, "the data file is the same file as the image"),
        ("new", {"data_file": "./new", "overwrite_data_file": True}, "the data file is the same file as the image"),
        ("base.raw", {"data_file": "base.raw", "overwrite_data_file": True}, "data file is the same file as the image"),
        ("base.raw", {**KEPT, "data_file": "base.raw"}, "the image is the same file as the data file"),
    ],
    ids=str,
)
def test_no_file_plays_two_parts(image: str, options: dict[str, Any], message: str, folder: Path) -> None:
    chain(folder)
    before = contents(folder)
    with no_descriptor_left(), pytest.raises(OptionError, match=f"{message}; name another"):
        create_image(image, MIB, **options)
    assert contents(folder) == before


# ---- what exists already


def test_an_image_that_exists_is_overwritten(folder: Path) -> None:
    create_image("disk.qcow2", 64 * MIB, preallocation="full")
    create_image("disk.qcow2", MIB)
    size = (folder / "disk.qcow2").stat().st_size
    assert size == 3 * 65536 + 8
    create_image("fresh.qcow2", MIB)
    assert (folder / "disk.qcow2").read_bytes() == (folder / "fresh.qcow2").read_bytes()


@pytest.mark.parametrize("lock_bytes", [QEMU_READER, QEMU_WRITER])
def test_what_others_use_is_not_touched(lock_bytes: tuple[int, ...], folder: Path) -> None:
    (folder / "disk.qcow2").write_bytes(b"q" * MIB)
    (folder / "disk.data").write_bytes(b"d" * MIB)
    before = contents(folder)
    for used in ("disk.qcow2", "disk.data"):
        with holding(folder / used, lock_bytes), no_descriptor_left(), pytest.raises(ImageLockedError, match="stop it"):
            create_image("disk.qcow2", MIB, **RAW, overwrite_data_file=True)
        assert contents(folder) == before
    with holding(folder / "disk.data", lock_bytes), pytest.raises(ImageLockedError):
        create_image("disk.qcow2", MIB, **KEPT)
    assert contents(folder) == before


def test_nobody_can_use_the_files_meanwhile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {}

    def barrier(storage: FileStorage) -> None:
        for name in ("disk.qcow2", "disk.data"):
            held[name] = locked_bytes(folder / name)

    monkeypatch.setattr(FileStorage, "barrier", barrier)
    create_image("disk.qcow2", MIB, **RAW)
    assert held == {"disk.qcow2": set(QEMU_WRITER), "disk.data": set(QEMU_WRITER)}
    assert not locked_bytes(folder / "disk.qcow2")


def test_a_data_file_that_exists_is_never_lost_by_mistake(folder: Path) -> None:
    (folder / "disk.data").write_bytes(b"precious")
    with (
        no_descriptor_left(),
        pytest.raises(OptionError, match=r"exists; add keep_data_file .* overwrite_data_file to lose"),
    ):
        create_image("disk.qcow2", MIB, **RAW)
    assert contents(folder) == {"disk.data": b"precious"}
    create_image("disk.qcow2", MIB, **RAW, overwrite_data_file=True)
    assert (folder / "disk.data").read_bytes() == bytes(MIB)
    create_image("new.qcow2", MIB, data_file="new.data", overwrite_data_file=True)
    assert (folder / "new.data").stat().st_size == MIB


def test_a_dangling_symlink_is_no_data_file(folder: Path) -> None:
    (folder / "disk.data").symlink_to("elsewhere")
    with pytest.raises(OptionError, match="the data file exists"):
        create_image("disk.qcow2", MIB, **RAW)
    with pytest.raises(FileNotFoundError):
        create_image("disk.qcow2", MIB, **RAW, overwrite_data_file=True)
    assert [path.name for path in folder.iterdir()] == ["disk.data"]


@pytest.mark.parametrize("name", ["directory", "fifo", "/dev/null"])
def test_what_is_no_file_is_refused(name: str, folder: Path) -> None:
    (folder / "directory").mkdir()
    os.mkfifo("fifo")
    with no_descriptor_left():
        with pytest.raises(NotQcow2Error, match="neither a regular file nor a block device"):
            create_image(name, MIB)
        with pytest.raises(NotQcow2Error):
            create_image("disk.qcow2", MIB, data_file=name, overwrite_data_file=True)
        with pytest.raises(FileNotFoundError, match="none/disk"):
            create_image("none/disk.qcow2", MIB)
    assert not (folder / "disk.qcow2").exists()


# ---- data files


def text(count: int) -> bytes:
    return b"".join(b"%07d\n" % number for number in range(count // 8 + 1))[:count]


@pytest.mark.parametrize("extended_l2", [False, True])
@pytest.mark.parametrize("options", [{"data_file_raw": True}, {"preallocation": "metadata"}], ids=str)
def test_a_data_file_that_is_kept_is_the_disk(options: dict[str, Any], extended_l2: bool, folder: Path) -> None:
    disk = text(3 * MIB + 1000)
    (folder / "disk.data").write_bytes(disk)
    create_image("disk.qcow2", **DATA, keep_data_file=True, extended_l2=extended_l2, cluster_size=32768, **options)
    assert (folder / "disk.data").read_bytes() == disk.ljust(3 * MIB + KIB, b"\0")
    with open_image("disk.qcow2") as image:
        assert image.virtual_size == 3 * MIB + KIB
        assert image.pread(image.virtual_size, 0) == disk.ljust(3 * MIB + KIB, b"\0")
        assert [extent.kind for extent in image.extents()] == [ExtentKind.DATA]
        assert image.header.data_file_raw is ("data_file_raw" in options)


def test_a_data_file_that_is_kept_grows_with_a_larger_disk_only(folder: Path) -> None:
    (folder / "disk.data").write_bytes(text(MIB))
    create_image("disk.qcow2", 2 * MIB, **KEPT)
    assert (folder / "disk.data").read_bytes() == text(MIB) + bytes(MIB)
    before = contents(folder)
    with (
        no_descriptor_left(),
        pytest.raises(
            OptionError,
            match=rf"has {2 * MIB} bytes, more than the disk of {MIB}; make the disk larger, or add clip_data_file",
        ),
    ):
        create_image("other.qcow2", MIB, **KEPT)
    assert contents(folder) == before
    create_image("other.qcow2", MIB, **KEPT, clip_data_file=True)
    assert (folder / "disk.data").read_bytes() == text(MIB) + bytes(MIB)
    with open_image("other.qcow2") as image:
        assert image.pread(MIB, 0) == text(MIB)


def test_a_data_file_that_is_kept_fits_to_the_sector(folder: Path) -> None:
    (folder / "disk.data").write_bytes(text(MIB + 1))
    with pytest.raises(OptionError, match="has 1048577 bytes, more than the disk of 1048576"):
        create_image("disk.qcow2", MIB, **KEPT)
    create_image("disk.qcow2", MIB + 1, **KEPT)
    assert (folder / "disk.data").read_bytes() == text(MIB + 1) + bytes(511)


def test_a_data_file_that_is_to_be_kept_must_exist(folder: Path) -> None:
    with no_descriptor_left(), pytest.raises(FileNotFoundError, match=r"disk\.data"):
        create_image("disk.qcow2", MIB, **KEPT)
    assert not contents(folder)


@pytest.mark.parametrize("extended_l2", [False, True])
def test_a_fresh_data_file_reads_as_zeros(extended_l2: bool, folder: Path) -> None:
    create_image("disk.qcow2", 100 * KIB, **RAW, extended_l2=extended_l2)
    assert (folder / "disk.data").read_bytes() == bytes(100 * KIB)
    with open_image("disk.qcow2") as image:
        assert image.pread(100 * KIB, 0) == bytes(100 * KIB)


def stored_name(path: str) -> str | None:
    qcow2 = info(path).qcow2
    assert qcow2 is not None
    return qcow2.data_file


def test_the_data_file_is_named_so_that_it_is_found_again(folder: Path) -> None:
    (folder / "images").mkdir()
    (folder / "data").mkdir()
    (folder / "link").symlink_to("images")
    (folder / "data" / "deep").mkdir()
    (folder / "deep").symlink_to("data/deep")
    for image, data, stored in (
        ("a.qcow2", "a.data", "a.data"),
        (folder / "b.qcow2", "b.data", "b.data"),
        ("images/c.qcow2", "images/c.data", "c.data"),
        ("images/d.qcow2", folder / "images" / "d.data", "d.data"),
        ("images/e.qcow2", "link/e.data", "e.data"),
        ("images/f.qcow2", "data/f.data", str(folder / "data" / "f.data")),
        ("images/g.qcow2", "g.data", str(folder / "g.data")),
        ("h.qcow2", "a:h.data", str(folder / "a:h.data")),
        ("images/i.qcow2", "deep/../i.data", str(folder / "data" / "i.data")),
    ):
        create_image(image, MIB, data_file=data)
        assert stored_name(str(image)) == stored
        policy = Policy.TRUSTED if stored.startswith("/") else Policy.CONFINED
        with open_image(image, policy=policy) as opened:
            assert opened.pread(MIB, 0) == bytes(MIB)


# ---- space


def space(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_space_is_reserved_as_asked(folder: Path) -> None:
    size = 4 * MIB
    for preallocation, least, most in (
        ("off", 0, MIB),
        ("metadata", 0, MIB),
        ("falloc", size, size + MIB),
        ("full", size, size + MIB),
    ):
        create_image("disk.qcow2", size, preallocation=preallocation)
        assert least <= space(folder / "disk.qcow2") <= most, preallocation
        create_image("raw.qcow2", size, **RAW, overwrite_data_file=True, preallocation=preallocation)
        assert least <= space(folder / "disk.data") <= most, preallocation
        assert (folder / "disk.data").read_bytes() == bytes(size)
        with open_image("disk.qcow2") as image:
            assert image.pread(size, 0) == bytes(size)


def test_full_writes_every_byte(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    write_vector = FileStorage.write_vector

    def record(storage: FileStorage, buffers: list[bytes], host_offset: int) -> None:
        written.append((host_offset, sum(map(len, buffers))))
        write_vector(storage, buffers, host_offset)

    monkeypatch.setattr(FileStorage, "write_vector", record)
    create_image("disk.qcow2", 130 * MIB + 512, data_file="disk.data", preallocation="full")
    assert written[:3] == [(0, 64 * MIB), (64 * MIB, 64 * MIB), (128 * MIB, 2 * MIB + 512)]


# ---- failures

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {"preallocation": "full"},
    "falloc": {"preallocation": "falloc"},
    "raw": RAW,
    "raw falloc": {**RAW, "preallocation": "falloc"},
    "kept": KEPT,
}
CALLS = ("write_from", "write_vector", "write_zeroes", "truncate", "preallocate", "barrier")


class Calls:
    """Counts the changing calls of every storage; `before` is told of each and may raise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: Callable[[int, str, str], None]) -> None:
        self.count = 0
        for name in CALLS:
            monkeypatch.setattr(FileStorage, name, self._counting(name, getattr(FileStorage, name), before))

    def _counting(
        self, name: str, inner: Callable[..., None], before: Callable[[int, str, str], None]
    ) -> Callable[..., None]:
        def call(storage: FileStorage, *arguments: Any, **named: Any) -> None:
            self.count += 1
            before(self.count, name, storage.path)
            inner(storage, *arguments, **named)

        return call


def failing_at(number: int, error: BaseException) -> Callable[[int, str, str], None]:
    def before(count: int, name: str, path: str) -> None:
        if count == number:
            raise error

    return before


def call_counts(options: dict[str, Any], folder: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch, lambda *_: None)
        create_image("disk.qcow2", MIB, **options)
    for path in folder.iterdir():
        path.unlink()
    return calls.count


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["ENOSPC", "interrupt"])
def test_a_failure_anywhere_leaves_nothing(case: str, error: BaseException, folder: Path) -> None:
    options = CASES[case]
    if case == "kept":
        (folder / "disk.data").write_bytes(text(1000))
    count = call_counts(options, folder)
    assert count >= 4
    for number in range(1, count + 1):
        if case == "kept":
            (folder / "disk.data").write_bytes(text(1000))
        before = contents(folder)
        with pytest.MonkeyPatch.context() as patch, no_descriptor_left(), pytest.raises(type(error)) as caught:
            Calls(patch, failing_at(number, error))
            create_image("disk.qcow2", MIB, **options)
        assert caught.value is error
        assert contents(folder) == before, number


@pytest.mark.parametrize("case", ["plain", "raw", "raw falloc"])
def test_a_failure_while_overwriting_leaves_empty_files_or_the_old_ones(case: str, folder: Path) -> None:
    options = {**CASES[case], **({"overwrite_data_file": True} if "raw" in case else {})}
    names = ["disk.qcow2", "disk.data"] if "raw" in case else ["disk.qcow2"]
    count = call_counts(options, folder)
    for number in range(1, count + 1):
        for name in names:
            (folder / name).write_bytes(b"old")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
            Calls(patch, failing_at(number, OSError(errno.EIO, "broken")))
            create_image("disk.qcow2", MIB, **options)
        assert set(contents(folder)) == set(names)
        assert set(contents(folder).values()) <= {b"", b"old"}, number
    assert set(contents(folder).values()) == {b""}


def test_a_name_that_cannot_be_made_durable_is_a_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", fail)
    with no_descriptor_left(), pytest.raises(OSError, match="broken"):
        create_image("disk.qcow2", MIB, **RAW)
    assert not contents(folder)


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_no_image_before_all_else_is_durable(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the write that makes it an image, everything else was written and made durable: in both files."""
    if case == "kept":
        (folder / "disk.data").write_bytes(text(1000))
    log: list[tuple[str, str]] = []
    was_image: list[bool] = []

    def before(count: int, name: str, path: str) -> None:
        log.append((name, path))
        was_image.append((folder / "disk.qcow2").read_bytes()[:4] == b"QFI\xfb")

    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(len(log)))
    Calls(monkeypatch, before)
    create_image("disk.qcow2", MIB, **CASES[case])
    assert was_image.index(True) == len(log) - 1, "only the last barrier comes after"
    assert log[-2:] == [("write_from", "disk.qcow2"), ("barrier", "disk.qcow2")]
    for path in {path for _, path in log}:
        calls = [name for name, of in log[:-2] if of == path]
        assert calls[-1] == "barrier", path
    assert synced == [len(log)], "the directory, after all"


def test_an_old_image_is_gone_before_its_data_file_is_emptied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_image("disk.qcow2", MIB, **RAW)
    (folder / "disk.data").write_bytes(text(MIB))
    log: list[tuple[str, str]] = []
    sizes: list[tuple[int, bool]] = []

    def before(count: int, name: str, path: str) -> None:
        log.append((name, path))
        sizes.append(((folder / "disk.qcow2").stat().st_size, (folder / "disk.data").read_bytes() == text(MIB)))

    Calls(monkeypatch, before)
    create_image("disk.qcow2", MIB, **RAW, overwrite_data_file=True)
    assert log[:2] == [("truncate", "disk.qcow2"), ("barrier", "disk.qcow2")]
    assert sizes[1] == (0, True)


# ---- block devices


@pytest.fixture
def device(folder: Path) -> Iterator[Path]:
    backing = folder / "device"
    backing.write_bytes(b"\xee" * 8 * MIB)
    with loop_device(backing, read_only=False) as name:
        yield Path(name)


def test_an_image_on_a_block_device(device: Path) -> None:
    create_image(device, 64 * MIB)
    assert info(device).virtual_size == 64 * MIB
    create_image(device, 4 * MIB, preallocation="metadata")
    with open_image(device) as image:
        assert image.pread(4 * MIB, 0) == bytes(4 * MIB), "nothing shows of what was on the device"
    before = device.read_bytes()
    with pytest.raises(OptionError, match=rf"the block device has {8 * MIB} bytes, and \d+ are needed"):
        create_image(device, 8 * MIB, preallocation="full")
    assert device.read_bytes() == before


def test_a_failure_on_a_block_device_leaves_no_image(device: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch, lambda *_: None)
        create_image(device, 64 * MIB)
    assert calls.count >= 6
    for number in range(1, calls.count + 1):
        create_image(device, 64 * MIB)
        with pytest.MonkeyPatch.context() as patch, no_descriptor_left(), pytest.raises(OSError, match="broken"):
            Calls(patch, failing_at(number, OSError(errno.EIO, "broken")))
            create_image(device, 64 * MIB)
        with pytest.raises(NotQcow2Error, match="not a qcow2 image"):
            info(device)


def test_a_data_file_on_a_block_device(device: Path, folder: Path) -> None:
    options: dict[str, Any] = {"data_file": device, "data_file_raw": True}
    with pytest.raises(OptionError, match="the data file exists"):
        create_image("disk.qcow2", 4 * MIB, **options)
    create_image("disk.qcow2", **options, keep_data_file=True)
    with open_image("disk.qcow2", policy=Policy.TRUSTED) as image:
        assert image.pread(8 * MIB, 0) == b"\xee" * 8 * MIB
    with pytest.raises(OptionError, match="and 9437184 are needed"):
        create_image("other.qcow2", 9 * MIB, **options, keep_data_file=True)
    for preallocation in ("falloc", "full"):
        create_image("disk.qcow2", 4 * MIB, **options, overwrite_data_file=True, preallocation=preallocation)
        with open_image("disk.qcow2", policy=Policy.TRUSTED) as image:
            assert image.pread(4 * MIB, 0) == bytes(4 * MIB)
    assert device.read_bytes()[4 * MIB :] == b"\xee" * 4 * MIB
    with pytest.raises(OptionError, match="and 9437184 are needed"):
        create_image("disk.qcow2", 9 * MIB, **options, overwrite_data_file=True)


# ---- names


NASTY = [b"\x1b[31mred", b"back\rover", "right\u202eleft".encode(), b"two\nlines", b"\xff\xfe", b"a\\b"]


@pytest.mark.parametrize("name", NASTY)
def test_names_of_any_bytes_are_stored_and_shown_safely(name: bytes, folder: Path) -> None:
    text_name = os.fsdecode(name)
    (folder / (text_name + "base")).write_bytes(b"b" * KIB)
    create_image(text_name, backing_file=text_name + "base", backing_format="raw")
    with open_image(text_name) as image:
        assert image.header.backing_file == name + b"base"
    create_image("data.qcow2", KIB, data_file=text_name + "data")
    assert stored_name("data.qcow2") == text_name + "data"
    for options in (
        {"data_file": text_name + "data"},
        {"data_file": text_name, "overwrite_data_file": True},
        {"backing_file": text_name + "none", "backing_format": "qcow2"},
        {"backing_file": text_name + ":x", "backing_format": "raw"},
        {"backing_file": "x", "backing_format": text_name},
        {"compression_type": text_name},
        {"preallocation": text_name},
    ):
        with pytest.raises((Qcow2Error, OSError)) as caught:
            create_image(text_name, KIB, **options)
        if isinstance(caught.value, Qcow2Error):
            assert all(unicodedata.category(character) not in {"Cc", "Cf", "Cs"} for character in str(caught.value))


def test_built_images_can_be_backing_files(folder: Path) -> None:
    ImageBuilder(MIB).data(0, b"x").build("base.qcow2")
    create_image(
        "disk.qcow2", backing_file="base.qcow2", backing_format="qcow2", extended_l2=True, preallocation="falloc"
    )
    with open_image("disk.qcow2") as image:
        assert image.pread(1, 0) == b"x"
        assert image.header.version == 3
