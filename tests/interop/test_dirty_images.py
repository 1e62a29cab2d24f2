"""Images that QEMU left dirty: after a rebuild qemu-img finds nothing wrong with them, not even a leak."""

from __future__ import annotations

import random
import struct
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from qcow2_plugin import open_image
from qcow2_plugin.engine.allocator import Allocator
from qcow2_plugin.engine.header import read_header
from qcow2_plugin.engine.image_file import ImageFile
from qcow2_plugin.engine.metadata import read_metadata
from qcow2_plugin.engine.repairing.rebuild import rebuild_refcounts
from qcow2_plugin.storage.opener import open_given
from tests.support.fields import patch, set_field
from tests.support.tools import ToolError, convert_to_raw, qemu_img, qemu_io

KIB = 1 << 10
MIB = 1 << 20


def create(path: Path, size: int, options: str) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"lazy_refcounts=on,{options}", path, str(size))


def write_and_die(path: Path, *commands: str) -> None:
    """The commands, a flush, and the end of a process that closes nothing."""
    words = [word for command in (*commands, "flush", "sigraise 9") for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", *words, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    assert "error" not in done.stdout + done.stderr and "failed" not in done.stdout + done.stderr
    with closing(open_given(path)) as storage:
        assert read_header(storage).dirty


def scramble_refcounts(path: Path) -> None:
    """Make every refcount block noise, as no crash does, and the image dirty."""
    with closing(open_given(path)) as storage:
        header = read_header(storage)
        table = storage.pread(header.refcount_table_clusters << header.cluster_bits, header.refcount_table_offset)
    set_field(path, "incompatible_features", header.incompatible_features | 1)
    for (block,) in struct.iter_unpack(">Q", table):
        if block:
            patch(path, block, random.Random(block).randbytes(header.geometry.cluster_size))
    assert_stale(path)


def rebuild(path: Path) -> None:
    with closing(open_given(path, writable=True)) as storage:
        header = read_header(storage)
        file = ImageFile(storage, header, read_metadata(storage, header))
        rebuild_refcounts(file, Allocator(file))
        assert not file.header.dirty


def assert_stale(path: Path) -> None:
    with pytest.raises(ToolError) as found:
        qemu_img("check", path)
    assert found.value.returncode == 2


def assert_rebuilt(path: Path) -> None:
    """Nothing is wrong and nothing is lost, however QEMU looks at it."""
    before = convert_to_raw(path)
    rebuild(path)
    with closing(open_given(path)) as storage:
        assert not read_header(storage).dirty
    qemu_img("check", path)  # fails on a leak, too
    assert convert_to_raw(path) == before


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("cluster_size", [512, 4 * KIB, 64 * KIB])
def test_every_width_and_small_clusters(tmp_path: Path, refcount_bits: int, cluster_size: int) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 16 * MIB, f"cluster_size={cluster_size},refcount_bits={refcount_bits}")
    qemu_io(path, "write -P 1 0 100k", "write -P 2 5M 70k")
    write_and_die(path, "write -P 3 50k 2M", "write -z 11M 1M", "write -P 4 9M 1M")
    assert_stale(path)
    assert_rebuilt(path)


def test_subclusters(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 64 * MIB, "cluster_size=16k,extended_l2=on")
    qemu_io(path, "write -P 1 0 100k")
    write_and_die(
        path, "write -P 3 50k 2M", "write -P 4 9M 512", "write -P 5 40M 3k", "write -z 9M 4k", "discard 1M 1M"
    )
    assert_stale(path)
    assert_rebuilt(path)


@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=64k", "cluster_size=16k,extended_l2=on"])
def test_snapshots_share_clusters_and_tables(tmp_path: Path, options: str) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 64 * MIB, options)
    qemu_io(path, "write -P 1 0 3M", "write -P 2 40M 1M", "write -z 50M 1M")
    qemu_img("snapshot", "-c", "first", path)
    qemu_io(path, "write -P 3 1M 1M")
    qemu_img("snapshot", "-c", "second", path)
    write_and_die(path, "write -P 4 0 64k", "write -P 5 2M 200k", "discard 40M 1M", "write -P 6 60M 1M")
    assert_stale(path)
    assert_rebuilt(path)
    for snapshot in ("first", "second"):
        qemu_img("snapshot", "-a", snapshot, path)
        qemu_img("check", path)
    for snapshot in ("first", "second"):
        qemu_img("snapshot", "-d", snapshot, path)
    qemu_img("check", path)


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=4k",
        "cluster_size=64k",
        "cluster_size=64k,compression_type=zstd",
        "cluster_size=512,refcount_bits=8",
        "cluster_size=64k,refcount_bits=1",
        "cluster_size=2M",
    ],
)
def test_compressed_clusters_share_host_clusters(tmp_path: Path, options: str) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 64 * MIB, options)
    commands = [f"write -c -P {index} {index * 2}M 2M" for index in range(8)]
    if "refcount_bits=1" not in options:
        qemu_io(path, *commands[:4])
        qemu_img("snapshot", "-c", "first", path)
    write_and_die(path, *commands[4:], "write -P 99 1M 100k", "write -P 98 9M 100k", "discard 12M 2M")
    assert_stale(path)
    assert_rebuilt(path)


def test_bitmaps_keep_their_clusters(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 64 * MIB, "cluster_size=4k")
    for name in ("held", "other"):
        qemu_img("bitmap", "--add", "-g", "512", path, name)
    qemu_io(path, "write -P 1 0 1M", "write -P 1 40M 1M")
    write_and_die(path, "write -P 4 20M 1M")
    with closing(open_given(path)) as storage:
        directory = read_header(storage).bitmaps
        assert directory is not None
        assert directory.bitmap_count == 2
    assert_stale(path)
    assert_rebuilt(path)
    for name in ("held", "other"):
        qemu_img("bitmap", "--remove", path, name)
    qemu_img("check", path)


def test_the_first_write_makes_a_dirty_image_clean(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 16 * MIB, "cluster_size=4k")
    qemu_io(path, "write -P 1 0 1M", "write -c -P 2 8M 1M")
    qemu_img("snapshot", "-c", "first", path)
    write_and_die(path, "write -P 3 512k 2M", "write -P 4 8448k 64k")
    assert_stale(path)
    expected = bytearray(convert_to_raw(path))
    content = path.read_bytes()
    with open_image(path, writable=True) as image:
        assert path.read_bytes() == content
        for offset in (0, 512 * KIB + 7, 3 * MIB, 8 * MIB + 100, 12 * MIB):
            image.pwrite(b"ours" * 3000, offset)
            expected[offset : offset + 12000] = b"ours" * 3000
    qemu_img("check", path)
    assert convert_to_raw(path) == expected
    qemu_img("snapshot", "-a", "first", path)
    qemu_img("check", path)
    qemu_io(path, "read -P 1 0 1M", "read -P 2 8M 1M")


def test_an_external_data_file_has_no_refcounts(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 64 * MIB, f"cluster_size=4k,data_file={tmp_path / 'disk.data'}")
    qemu_io(path, "write -P 1 0 1M")
    write_and_die(path, "write -P 4 20M 1M", "write -P 5 0 4k")
    scramble_refcounts(path)
    assert_rebuilt(path)


def test_the_space_of_a_lost_write_is_given_back(tmp_path: Path) -> None:
    """What was allocated before the end and never reached a table has refcounts on disk, if QEMU's cache was small."""
    path = tmp_path / "disk.qcow2"
    create(path, 64 * MIB, "cluster_size=512")
    words = [f"write -P 7 {offset}M 512k" for offset in range(1, 60, 3)]
    write_and_die(path, *words)
    assert_rebuilt(path)


@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=4k,refcount_bits=64", "refcount_bits=8"])
def test_refcounts_that_are_all_wrong(tmp_path: Path, options: str) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 64 * MIB, options)
    qemu_io(path, "write -P 1 0 20M", "write -c -P 1 40M 1M")
    qemu_img("snapshot", "-c", "first", path)
    qemu_img("bitmap", "--add", path, "b")
    qemu_io(path, "write -P 2 512k 1M", "discard 10M 1M")
    scramble_refcounts(path)
    assert_rebuilt(path)


def test_a_rebuild_of_what_is_right_changes_the_dirty_bit_alone(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 64 * MIB, "cluster_size=4k")
    qemu_io(path, "write -P 1 0 1M", "write -c -P 1 8M 1M")
    qemu_img("snapshot", "-c", "first", path)
    qemu_io(path, "write -P 2 512k 1M")
    clean = path.read_bytes()
    dirty = bytearray(clean)
    dirty[79] |= 1
    path.write_bytes(dirty)
    rebuild(path)
    assert path.read_bytes() == clean
