"""Dirty bitmaps over our own writes: QEMU sees marked exactly what changed, and can go on from there."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from qcow2_plugin import open_image
from qcow2_plugin.errors import ResizeError
from tests.support.qemu_bitmaps import Ranges, add, create, dirty, flags, merged, rounded
from tests.support.tools import convert_to_raw, qemu_img, qemu_io

KIB, MIB = 1 << 10, 1 << 20

KINDS = ["cluster_size=512", "cluster_size=65536", "cluster_size=16384,extended_l2=on", "cluster_size=2M", "data_file"]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("granularity", [512, 65536, 1 << 20])
def test_every_kind_of_change_is_marked(tmp_path: Path, options: str, granularity: int) -> None:
    path = tmp_path / "disk.qcow2"
    size = 24 * MIB + 512
    data_file = tmp_path / "disk.data" if options == "data_file" else None
    create(path, size, f"data_file={data_file}" if data_file else options)
    qemu_io(path, "write -P 1 0 3M")
    add(path, "b", granularity)
    before = convert_to_raw(path)
    chance = random.Random(granularity)
    changed: Ranges = []
    with open_image(path, writable=True, data_file=data_file) as image:
        for _ in range(60):
            offset = chance.randrange(size)
            length = min(chance.choice([1, 512, 4096, 70000, 1 * MIB]), size - offset)
            kind = chance.randrange(4)
            if kind == 3:  # a discard changes whole clusters alone
                cluster_size = image.header.geometry.cluster_size
                start = -(-offset // cluster_size) * cluster_size
                length = (offset + length) // cluster_size * cluster_size - start
                image.discard(start, max(length, 0))
                offset = start
            elif kind == 2:
                image.write_zeroes(offset, length)
            else:
                image.pwrite(chance.randbytes(length), offset)
            if length > 0:
                changed.append((offset, length))
    told = dirty(path, "b")
    assert merged(told + rounded(changed, granularity, size)) == rounded(changed, granularity, size)
    after = convert_to_raw(path)
    different = [
        (offset, 512) for offset in range(0, size, 512) if before[offset : offset + 512] != after[offset : offset + 512]
    ]
    assert different
    assert merged(told + different) == told
    assert flags(path, "b") == {"auto"}
    qemu_img("check", path)


def test_disabled_bitmaps_do_not_follow(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, MIB)
    add(path, "off", 65536)
    qemu_io(path, "write 0 1")
    add(path, "on", 65536)
    qemu_img("bitmap", "--disable", path, "off")
    with open_image(path, writable=True) as image:
        image.pwrite(b"x", 512 * KIB)
    assert dirty(path, "off") == [(0, 65536)]
    assert dirty(path, "on") == [(512 * KIB, 65536)]
    assert flags(path, "off") == set()


def test_qemu_and_we_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 64 * MIB, "cluster_size=4096")
    add(path, "b", 4096)
    changed: Ranges = []
    for turn in range(6):
        offset = turn * 10 * MIB + turn * 512
        changed.append((offset, 20 * KIB))
        if turn % 2:
            qemu_io(path, f"write -P {turn} {offset} 20k")
        else:
            with open_image(path, writable=True) as image:
                image.pwrite(bytes([turn]) * 20 * KIB, offset)
        assert dirty(path, "b") == rounded(changed, 4096, 64 * MIB)
    qemu_img("bitmap", "--clear", path, "b")
    with open_image(path, writable=True) as image:
        image.pwrite(b"again", 0)
    assert dirty(path, "b") == [(0, 4096)]
    qemu_img("bitmap", "--remove", path, "b")
    qemu_img("check", path)


def test_qemu_takes_a_bitmap_that_we_left_for_stale(tmp_path: Path) -> None:
    """A writer that was killed: whoever comes next must not believe the bits."""
    path = tmp_path / "disk.qcow2"
    create(path, MIB)
    add(path, "b")
    program = (
        "import os, signal, sys\n"
        "from qcow2_plugin import open_image\n"
        "image = open_image(sys.argv[1], writable=True)\n"
        "image.pwrite(b'x' * 65536, 65536)\n"
        "image.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, path], timeout=60, check=False)
    assert killed.returncode == -9
    assert flags(path, "b") == {"auto", "in-use"}
    qemu_img("check", path)
    with open_image(path, writable=True) as image:
        image.pwrite(b"y", 0)
    assert flags(path, "b") == {"auto", "in-use"}
    qemu_img("bitmap", "--remove", path, "b")
    qemu_img("check", path)


@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=65536"])
def test_bitmaps_follow_the_size_of_the_disk(tmp_path: Path, options: str) -> None:
    path = tmp_path / "disk.qcow2"
    size = 2 * MIB
    create(path, size, options)
    add(path, "on", 512)
    qemu_io(path, f"write -z 0 {size}")
    add(path, "off", 512, "--disable")
    for new_size in (7 * MIB, 200 * MIB, 2 * MIB + 1536, 3 * MIB, MIB + 512, 5 * MIB):
        with open_image(path, writable=True) as image:
            image.resize(new_size, allow_shrink=True)
        size = min(size, new_size)
        assert dirty(path, "on") == [(0, size)]
        assert dirty(path, "off") == []
        assert flags(path, "off") == set()
        qemu_img("check", path)
    with open_image(path, writable=True) as image:
        image.pwrite(b"x", 4 * MIB)
    assert dirty(path, "on") == [(0, size), (4 * MIB, 512)]


def test_writes_between_two_sizes_are_marked(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 2 * MIB, "cluster_size=512")
    add(path, "b", 512)
    with open_image(path, writable=True) as image:
        image.pwrite(b"x", 2 * MIB - 512)
        image.resize(6 * MIB)
        image.pwrite(b"x", 5 * MIB)
        image.pwrite(b"y", 5 * MIB)
        image.resize(3 * MIB, allow_shrink=True)
        image.resize(7 * MIB)
        image.pwrite(b"z", 5 * MIB + 512)
    assert dirty(path, "b") == [(2 * MIB - 512, 512), (5 * MIB + 512, 512)]
    qemu_img("check", path)


def test_a_stale_bitmap_blocks_another_size_as_it_does_in_qemu(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, MIB)
    add(path, "b")
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", "write 0 1", "-c", "flush", "-c", "sigraise 9", str(path)],
            check=True,
            capture_output=True,
            timeout=60,
        )
    content = path.read_bytes()
    with (
        open_image(path, writable=True) as image,
        pytest.raises(ResizeError, match='bitmap "b" cannot follow the disk to another size: it is in use'),
    ):
        image.resize(2 * MIB)
    assert path.read_bytes() == content
