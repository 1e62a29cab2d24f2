"""`qcow2 info --output=json` says what `qemu-img info --output=json` says, for every image that qemu-img can make."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.operations.info import info
from tests.interop.test_chains import CHAINS, make_chain
from tests.interop.test_reading import ROWS, create_options, name_of
from tests.support.builder import ImageBuilder, set_field
from tests.support.command import qcow2, qcow2_json
from tests.support.holders import qemu_io_holding
from tests.support.pairwise import Row
from tests.support.tools import ToolError, qemu_img, qemu_img_json
from tests.support.watching import Opens, audited_opens, no_descriptor_left

MIB = 1 << 20
CIPHERS = [
    ("aes-256", "xts", "plain64", "sha256"),
    ("aes-128", "xts", "plain64", "sha1"),
    ("aes-192", "xts", "plain64", "sha512"),
    ("aes-256", "cbc", "essiv", "sha256"),
    ("aes-128", "ctr", "plain", "sha256"),
    ("aes-256", "ecb", "plain64", "sha256"),
    ("serpent-256", "xts", "plain64", "sha512"),
    ("serpent-128", "cbc", "plain64", "sha256"),
    ("twofish-256", "xts", "plain64", "sha256"),
    ("cast5-128", "cbc", "plain64", "sha256"),
]


def assert_same_info(path: Path | str, *options: str) -> dict[str, Any]:
    told = qcow2_json("info", *options, path)
    assert told == qemu_img_json("info", *options, path)
    return dict(told[0] if isinstance(told, list) else told)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_create_options(row: Row, folder: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", *create_options(row, folder / "disk.data"), "disk.qcow2", "10M")
    for path in ("disk.qcow2", "./disk.qcow2", folder / "disk.qcow2"):
        assert_same_info(path)


@pytest.mark.parametrize(
    "name",
    ["base", "sub/base", "/a/b", "../up", "./a:b", "file:base", "nbd://host/x", "c:d/e", 'json:{"driver":"x"}', "ü b"],
)
def test_backing_names(name: str, folder: Path) -> None:
    (folder / "sub").mkdir()
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "raw", "sub/disk.qcow2", "1M")
    told = assert_same_info("sub/disk.qcow2")
    assert told["backing-filename"] == name
    assert_same_info(folder / "sub" / ".." / "sub" / "disk.qcow2")


@pytest.mark.parametrize("format", [None, b"raw", b"qcow2", b"unheard-of"])
@pytest.mark.parametrize("version", [2, 3])
def test_backing_formats(version: int, format: bytes | None, folder: Path) -> None:
    ImageBuilder(MIB, version=version).backing(b"base", format).build("disk.qcow2")
    assert_same_info("disk.qcow2")


def test_snapshots(folder: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "disk.qcow2", "10M")
    for name in ("before", "after", "ünïcode name", "2"):
        qemu_img("snapshot", "-c", name, "disk.qcow2")
    assert len(assert_same_info("disk.qcow2")["snapshots"]) == 4


def test_snapshots_with_vm_state(folder: Path) -> None:
    image = ImageBuilder(MIB)
    image.snapshot(b"1", b"running", extra=struct.pack(">QQQ", 5 << 32, MIB, 77), vm_clock_nsec=3_500_000_007)
    image.snapshot(b"2", b"no icount", extra=struct.pack(">QQ", 9, MIB), date_sec=2**32 - 1, date_nsec=999_999_999)
    image.build("disk.qcow2")
    first, second = assert_same_info("disk.qcow2")["snapshots"]
    assert (first["vm-state-size"], first["icount"], first["vm-clock-nsec"]) == (5 << 32, 77, 500_000_007)
    assert "icount" not in second


def test_old_snapshots(folder: Path) -> None:
    ImageBuilder(MIB, version=2).snapshot(b"1", b"old", extra=b"", vm_state_size=7).build("disk.qcow2")
    assert assert_same_info("disk.qcow2")["snapshots"][0]["vm-state-size"] == 7


def test_snapshots_that_no_data_file_image_may_have(folder: Path) -> None:
    ImageBuilder(MIB).data_file(folder / "data", b"data").snapshot(b"1", b"one").build("disk.qcow2")
    assert "snapshots" not in assert_same_info("disk.qcow2")


def test_bitmaps(folder: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "disk.qcow2", "10M")
    qemu_img("bitmap", "--add", "disk.qcow2", "enabled")
    qemu_img("bitmap", "--add", "--disable", "-g", "1M", "disk.qcow2", "disabled")
    told = assert_same_info("disk.qcow2")["format-specific"]["data"]["bitmaps"]
    assert [(bitmap["granularity"], bitmap["flags"]) for bitmap in told] == [(65536, ["auto"]), (MIB, [])]


@pytest.mark.parametrize("flags", range(4))
def test_bitmap_flags(flags: int, folder: Path) -> None:
    ImageBuilder(MIB).bitmap(b"one", [(0, 1)], flags=flags).build("disk.qcow2")
    assert_same_info("disk.qcow2")


def test_bitmaps_that_another_program_made_stale(folder: Path) -> None:
    ImageBuilder(MIB).bitmap(b"one").build("disk.qcow2")
    set_field("disk.qcow2", "autoclear_features", 0)
    assert "bitmaps" not in assert_same_info("disk.qcow2")["format-specific"]["data"]


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("name", [b"disk.data", b"/no/such/file", b'json:{"driver":"nbd"}', None])
def test_data_file_names(name: bytes | None, raw: bool, folder: Path) -> None:
    ImageBuilder(MIB).data_file(folder / "elsewhere", name, raw=raw).build("disk.qcow2")
    (folder / "elsewhere").unlink()
    assert assert_same_info("disk.qcow2")["format-specific"]["data"]["data-file-raw"] is raw


def test_raw_bit_without_data_file(folder: Path) -> None:
    ImageBuilder(MIB, autoclear=2).build("disk.qcow2")
    assert_same_info("disk.qcow2")


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_dirty_and_corrupt(bits: int, folder: Path) -> None:
    ImageBuilder(MIB, incompatible=bits, compatible=1).build("disk.qcow2")
    told = assert_same_info("disk.qcow2")
    assert told["dirty-flag"] is bool(bits & 1)
    assert told["format-specific"]["data"]["corrupt"] is bool(bits & 2)


@pytest.mark.parametrize("size", [0, 512, 513, 1023, 2 << 60])
def test_odd_sizes(size: int, folder: Path) -> None:
    ImageBuilder(size, cluster_bits=21).build("disk.qcow2")
    assert assert_same_info("disk.qcow2")["virtual-size"] == size & ~511


def create_encrypted(path: str, *options: str) -> None:
    """QEMU measures how fast it hashes, and now and then gives up on a busy machine."""
    secret = ("--object", "secret,id=key,data=open sesame", "-o", "encrypt.key-secret=key")
    for _ in range(30):
        try:
            qemu_img("create", "-q", "-f", "qcow2", *secret, *options, path, "1M")
        except ToolError as error:
            if "CPU usage" not in error.stderr:
                raise
            time.sleep(0.01)
        else:
            return
    raise AssertionError("qemu-img never got to measure its speed")


@pytest.mark.parametrize("cipher", CIPHERS, ids=":".join)
def test_luks(cipher: tuple[str, str, str, str], folder: Path) -> None:
    algorithm, mode, generator, digest = cipher
    options = {"format": "luks", "iter-time": "10", "cipher-alg": algorithm, "cipher-mode": mode}
    options |= {"ivgen-alg": generator, "hash-alg": digest}
    if generator == "essiv":
        options["ivgen-hash-alg"] = "sha256"
    create_encrypted("disk.qcow2", "-o", ",".join(f"encrypt.{key}={value}" for key, value in options.items()))
    told = assert_same_info("disk.qcow2")
    assert told["encrypted"] is True
    assert told["format-specific"]["data"]["encrypt"]["cipher-alg"] == algorithm


def test_aes(folder: Path) -> None:
    create_encrypted("disk.qcow2", "-o", "encrypt.format=aes")
    assert assert_same_info("disk.qcow2")["format-specific"]["data"]["encrypt"] == {"format": "aes"}
    create_encrypted("old.qcow2", "-o", "encrypt.format=aes,compat=0.10")
    assert_same_info("old.qcow2")


def test_unknown_incompatible_features_are_refused_by_name(folder: Path) -> None:
    names = [(0, 17, b"time travel"), (1, 18, b"not this one")]
    ImageBuilder(MIB, incompatible=(1 << 17) | (1 << 18)).feature_names(names).build("disk.qcow2")
    with pytest.raises(ToolError, match="time travel"):
        qemu_img("info", "disk.qcow2")
    ended = qcow2("info", "disk.qcow2")
    assert ended.status == 1
    assert "time travel, bit 18" in ended.stderr


def test_unknown_other_features_are_accepted(folder: Path) -> None:
    ImageBuilder(MIB, compatible=1 << 40, autoclear=1 << 50).build("disk.qcow2")
    assert_same_info("disk.qcow2")


@pytest.mark.parametrize("name", CHAINS)
def test_backing_chains(name: str, folder: Path) -> None:
    path = make_chain(folder, CHAINS[name])
    for top in (path, Path(path.name)):
        told = qcow2_json("info", "--backing-chain", top)
        assert told == qemu_img_json("info", "--backing-chain", top)
        assert len(told) == len(CHAINS[name])


def test_a_chain_through_directories(folder: Path) -> None:
    (folder / "sub" / "below").mkdir(parents=True)
    (folder / "sub" / "below" / "base.raw").write_bytes(b"x" * 1000)
    base = ("create", "-q", "-f", "qcow2")
    qemu_img(*base, "-b", "below/base.raw", "-F", "raw", "sub/middle.qcow2")
    qemu_img(*base, "-b", "sub/middle.qcow2", "-F", "qcow2", "top.qcow2")
    told = qcow2_json("info", "--backing-chain", "top.qcow2")
    assert told == qemu_img_json("info", "--backing-chain", "top.qcow2")
    assert [entry["filename"] for entry in told] == ["top.qcow2", "sub/middle.qcow2", "sub/below/base.raw"]


def test_a_chain_that_comes_back_is_refused(folder: Path) -> None:
    ImageBuilder(MIB).backing(b"b.qcow2", b"qcow2").build("a.qcow2")
    ImageBuilder(MIB).backing(b"a.qcow2", b"qcow2").build("b.qcow2")
    with no_descriptor_left():
        ended = qcow2("info", "--backing-chain", "a.qcow2")
    assert ended.status == 1
    assert "the backing file is the same file as the image above it" in ended.stderr


def test_a_chain_deeper_than_allowed_is_refused(folder: Path) -> None:
    for number in range(66):
        ImageBuilder(MIB).backing(b"%d.qcow2" % (number + 1), b"qcow2").build(f"{number}.qcow2")
    with no_descriptor_left():
        ended = qcow2("info", "--backing-chain", "0.qcow2")
    assert ended.status == 1
    assert "deeper than 64 files" in ended.stderr


def test_a_chain_keeps_to_the_policy(folder: Path) -> None:
    (folder / "base.raw").write_bytes(bytes(MIB))
    ImageBuilder(MIB).backing(os.fsencode(folder / "base.raw")).build("disk.qcow2")
    with Opens("base.raw") as opens:
        assert qcow2("info", "--backing-chain", "disk.qcow2").status == 1
        assert qcow2("info", "--backing-chain", "--policy=inspect", "disk.qcow2").status == 1
        assert not opens.seen()
        assert qcow2("info", "--backing-chain", "--policy=trusted", "disk.qcow2").status == 0
        assert opens.seen()


@pytest.mark.parametrize("backing", [b"base.raw", b"/etc/passwd", b"nbd://host/x", b"json:{}", b"disk.qcow2"])
@pytest.mark.parametrize("has_data_file", [False, True])
def test_one_file_is_opened(backing: bytes, has_data_file: bool, folder: Path) -> None:
    """Whatever an image names, a look at it opens that image alone, for reading."""
    (folder / "base.raw").write_bytes(bytes(MIB))
    (folder / "other.data").write_bytes(bytes(MIB))
    image = ImageBuilder(MIB).backing(backing).bitmap(b"bitmap")
    if has_data_file:
        image.data_file(folder / "disk.data", b"other.data", raw=True)
    else:
        image.snapshot(b"1", b"snapshot")
    image.build("disk.qcow2")
    info("disk.qcow2")  # what is imported late is imported now
    with no_descriptor_left(), audited_opens() as names, Opens("base.raw") as base, Opens("other.data") as data:
        assert info("disk.qcow2").qcow2 is not None
        assert not base.seen()
        assert not data.seen()
    looked_up, opened = names
    assert looked_up == "disk.qcow2"
    assert opened.startswith("/proc/self/fd/"), "the very file that was looked up"


def test_a_running_writer_is_respected(folder: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "disk.qcow2", "4M")
    with qemu_io_holding(folder / "disk.qcow2"):
        ended = qcow2("info", "disk.qcow2")
        assert ended.status == 1
        assert "force-share" in ended.stderr
        assert qcow2_json("info", "-U", "disk.qcow2") == qemu_img_json("info", "-U", "disk.qcow2")
