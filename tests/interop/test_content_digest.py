"""One digest for one disk: an image, what qemu-img makes of it, and a device that is larger."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qcow2_plugin import create_image, create_snapshot, open_image, resize
from qcow2_plugin.errors import DigestError, OptionError
from qcow2_plugin.operations.content_digest import content_digest, opened_raw, recorder
from tests.support.command import qcow2, qcow2_json
from tests.support.loop import loop_device
from tests.support.tools import qemu_img, qemu_io

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, str(24 * MIB + 512))
    qemu_io(path, "write -P 3 100k 3M", "write -P 0 8M 1M", "write -z 10M 1M", "write -P 4 24M 512")
    return path


def digest(*words: str | Path) -> str:
    return str(qcow2_json("digest", *words)["digest"])


def test_every_copy_that_qemu_img_makes_has_the_digest_of_the_disk(disk: Path, tmp_path: Path) -> None:
    wanted = digest(disk)
    ways = {
        "raw": ["-O", "raw"],
        "plain": ["-O", "qcow2"],
        "compressed": ["-O", "qcow2", "-c", "-o", "compression_type=zstd"],
        "subclusters": ["-O", "qcow2", "-o", "extended_l2=on,cluster_size=128k"],
        "external": ["-O", "qcow2", "-o", f"data_file={tmp_path / 'external.raw'},data_file_raw=on"],
    }
    for name, words in ways.items():
        copy = tmp_path / name
        qemu_img("convert", *words, disk, copy)
        how = ["-f", "raw"] if name == "raw" else ["--policy=trusted"]
        assert digest(*how, copy) == wanted, name
    size = f"--size={24 * MIB + 512}"  # qemu-img makes it whole clusters
    assert digest("-f", "raw", size, tmp_path / "external.raw") == wanted
    with open(tmp_path / "raw", "r+b") as raw:
        raw.seek(12 * MIB)
        raw.write(b"!")
    assert digest("-f", "raw", tmp_path / "raw") != wanted


def test_a_device_that_is_larger_than_the_disk_on_it(disk: Path, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    qemu_img("convert", "-O", "raw", disk, volume)
    with open(volume, "r+b") as file:
        file.truncate(32 * MIB)
        file.seek(24 * MIB + 512)
        file.write(b"what was there before")
    with loop_device(volume) as device:
        assert digest("-f", "raw", f"--size={24 * MIB + 512}", device) == digest(disk)
        assert digest("-f", "raw", device) != digest(disk)


def test_a_snapshot_has_the_digest_that_the_disk_had(disk: Path) -> None:
    before = digest(disk)
    create_snapshot(disk, "then")
    qemu_io(disk, "write -P 9 5M 64k")
    assert digest("--snapshot=then", disk) == before != digest(disk)


def test_people_see_a_line(disk: Path) -> None:
    assert qcow2("digest", disk).stdout == f"{digest(disk)}  {disk}\n"
    told = qcow2("digest", "-p", disk)
    assert "100 % read" in told.stderr


@pytest.mark.parametrize("words", [["--size=100G"], ["--size=100"], ["-f", "raw", "--snapshot=1"]])
def test_what_makes_no_sense_is_refused(words: list[str], disk: Path) -> None:
    ended = qcow2("digest", *words, disk)
    assert ended.status == 1
    assert ended.stderr.startswith("qcow2: error: ")


def test_a_raw_file_is_never_taken_for_an_image(disk: Path, tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    qemu_img("convert", "-O", "raw", disk, raw)
    assert qcow2("digest", raw).status == 1
    with opened_raw(disk) as whole:  # and an image that is said to be raw is the bytes of its file
        assert content_digest(whole).leaves.virtual_size == -(-disk.stat().st_size // 512) * 512


def test_zeros_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, 8 << 40)
    with open_image(path, writable=True) as image:
        image.pwrite(random.Random(1).randbytes(64 << 10), 5 << 40)
        image.write_zeroes(1 << 40, 1 << 30)
    with open_image(path) as image:
        result = content_digest(image)
    assert len(result.leaves.pack()) == 24 + 40 + 32 + 32


def test_a_disk_that_has_shrunk_begins_anew(disk: Path) -> None:
    with open_image(disk) as image:
        before = content_digest(image).leaves
    resize(disk, 8 * MIB, allow_shrink=True)
    with open_image(disk) as image, pytest.raises(DigestError, match="shrunk"):
        recorder(image, before)
    with open_image(disk) as image, pytest.raises(OptionError):
        content_digest(image, virtual_size=9 * MIB)
