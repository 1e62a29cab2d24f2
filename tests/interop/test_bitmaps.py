"""Persistent dirty bitmaps that QEMU wrote: what we call dirty is what qemu-nbd tells its clients."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import nbd
import pytest

from qcow2_plugin import open_image
from qcow2_plugin.errors import CorruptImageError, MissingReferenceError
from tests.support.agreement import assert_reads_as, converted
from tests.support.builder import ImageBuilder, patch
from tests.support.mixture import fill
from tests.support.tools import qemu_img, qemu_img_json, qemu_io

MIB = 1 << 20
AUTOCLEAR_OFFSET = 88
Ranges = list[tuple[int, int]]


def dirty_as_qemu_tells(path: Path, name: str) -> Ranges:
    """(offset, length) of what qemu-nbd shows as dirty, merged."""
    context = f"qemu:dirty-bitmap:{name}"
    handle = nbd.NBD()
    handle.add_meta_context(context)
    handle.connect_systemd_socket_activation(["qemu-nbd", "-r", "-f", "qcow2", "-B", name, str(path)])
    assert handle.can_meta_context(context)
    ranges: Ranges = []
    offset, size = 0, handle.get_size()
    while offset < size:
        entries: list[int] = []
        handle.block_status(min(size - offset, 1 << 31), offset, lambda _c, _o, told, _e, to=entries: to.extend(told))
        for length, flags in itertools.zip_longest(entries[::2], entries[1::2]):
            end = min(offset + length, size)
            if flags and ranges and sum(ranges[-1]) == offset:
                ranges[-1] = (ranges[-1][0], end - ranges[-1][0])
            elif flags:
                ranges.append((offset, end - offset))
            offset = end
    handle.shutdown()
    return ranges


def dirty_as_we_tell(path: Path, name: str) -> Ranges:
    with open_image(path) as image:
        return list(image.dirty_bitmap(name).ranges(0, image.virtual_size))


def create(path: Path, size: int, options: str = "compat=1.1") -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(size))


def add(path: Path, name: str, granularity: int = 65536) -> None:
    qemu_img("bitmap", "--add", "-g", str(granularity), path, name)


@pytest.mark.parametrize("granularity_bits", range(9, 32))
def test_dirty_ranges_are_those_of_qemu(granularity_bits: int, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    cluster_size = 65536 if granularity_bits % 2 else 512
    size = 5 * MIB + 512 * (granularity_bits % 3)
    create(path, size, f"cluster_size={cluster_size}")
    fill(path, size, cluster_size, seed=granularity_bits, count=4)
    add(path, "b", 1 << granularity_bits)
    fill(path, size, cluster_size, seed=granularity_bits + 1, count=16)
    told = dirty_as_qemu_tells(path, "b")
    assert told
    assert dirty_as_we_tell(path, "b") == told
    with converted(path) as expected, open_image(path) as image:
        assert_reads_as(image, expected)
        bitmap = image.dirty_bitmap("b")
        for offset, length in [(0, 1), (size - 1, 1), (MIB + 17, 2 * MIB + 5), (size // 2, size // 3)]:
            clipped = [(max(start, offset), min(start + run, offset + length)) for start, run in told]
            wanted = [(start, end - start) for start, end in clipped if start < end]
            assert list(bitmap.ranges(offset, length)) == wanted
        extents = list(image.dirty_extents("b"))
        assert sum(extent.length for extent in extents) == sum(length for _, length in told)
        dirty = {start for start, _ in told}
        assert dirty <= {extent.guest_offset for extent in extents}


def test_a_bitmap_over_several_clusters_of_bits(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    size = 64 * MIB + 512
    create(path, size, "cluster_size=512")  # one cluster of bits covers 2 MiB
    add(path, "b", 512)
    writes = [f"write {offset} 512" for offset in (0, 2 * MIB - 512, 2 * MIB, 4 * MIB - 512, 31 * MIB, size - 512)]
    qemu_io(path, *writes, "write -z 40M 7M", "discard 50M 1M", "write 8388607 2")
    told = dirty_as_qemu_tells(path, "b")
    assert told[0] == (0, 512)
    assert told[-1] == (size - 512, 512)
    assert dirty_as_we_tell(path, "b") == told


def test_everything_and_nothing_dirty(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 5 * MIB + 512, "cluster_size=4096")
    add(path, "all", 512)
    qemu_io(path, f"write -z 0 {5 * MIB + 512}")
    add(path, "none", 512)
    assert dirty_as_we_tell(path, "all") == dirty_as_qemu_tells(path, "all") == [(0, 5 * MIB + 512)]
    assert dirty_as_we_tell(path, "none") == dirty_as_qemu_tells(path, "none") == []


def test_bitmaps_in_a_data_file_image_and_an_overlay(tmp_path: Path) -> None:
    base, path = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    create(base, 3 * MIB)
    data = tmp_path / "disk.data"
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", "-o", f"data_file={data}", path, "4M")
    add(path, "b", 4096)
    fill(path, 4 * MIB, 65536, seed=1)
    told = dirty_as_qemu_tells(path, "b")
    with open_image(path, data_file=data) as image:
        assert list(image.dirty_bitmap("b").ranges(0, 4 * MIB)) == told


def test_a_disabled_bitmap_keeps_what_it_had(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, MIB)
    add(path, "b")
    qemu_io(path, "write 0 64k")
    qemu_img("bitmap", "--disable", path, "b")
    qemu_io(path, "write 512k 64k")
    assert dirty_as_we_tell(path, "b") == dirty_as_qemu_tells(path, "b") == [(0, 65536)]
    qemu_img("bitmap", "--enable", path, "b")
    qemu_io(path, "write 256k 64k")
    assert dirty_as_we_tell(path, "b") == dirty_as_qemu_tells(path, "b") == [(0, 65536), (256 << 10, 65536)]
    qemu_img("bitmap", "--clear", path, "b")
    assert dirty_as_we_tell(path, "b") == []


def test_merged_bitmaps(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 8 * MIB + 512)
    add(path, "coarse", 1 << 20)
    qemu_io(path, "write 3M 64k")
    qemu_img("bitmap", "--disable", path, "coarse")
    add(path, "fine", 512)
    qemu_io(path, "write 512 512", "write 8M 512")
    add(path, "both", 4096)
    qemu_img("bitmap", "--merge", "coarse", "--merge", "fine", path, "both")
    told = dirty_as_qemu_tells(path, "both")
    assert told == [(0, 4096), (3 * MIB, MIB), (8 * MIB, 512)]
    assert dirty_as_we_tell(path, "both") == told


def test_bitmaps_follow_the_size_of_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 2 * MIB, "cluster_size=512")  # one cluster of bits covers 2 MiB
    add(path, "b", 512)
    qemu_io(path, "write -z 0 2M")
    for size in (2 * MIB + 1536, 7 * MIB, MIB + 512):
        qemu_img("resize", "-q", "--shrink", path, str(size))
        assert dirty_as_we_tell(path, "b") == dirty_as_qemu_tells(path, "b") == [(0, min(size, 2 * MIB))]


def test_many_bitmaps_with_all_kinds_of_names(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, MIB)
    names = ["a", "b c", "ü", "bitmap=x", "-", "n" * 1023]
    for name in names:
        qemu_img("bitmap", "--add", path, "--", name) if name == "-" else add(path, name)
    qemu_io(path, "write 64k 64k")
    with open_image(path) as image:
        listed = image.bitmaps()
        assert sorted(bitmap.name.decode() for bitmap in listed) == sorted(names)
        for name in names:
            assert list(image.dirty_bitmap(name).ranges(0, MIB)) == [(65536, 65536)]
        told = {each["name"]: each for each in qemu_img_json("info", path)["format-specific"]["data"]["bitmaps"]}
        assert {bitmap.name.decode(): bitmap.granularity for bitmap in listed} == {
            name: each["granularity"] for name, each in told.items()
        }


@pytest.fixture
def abandoned(tmp_path: Path) -> Path:
    """An image whose bitmap "b" was in use when its writer was killed; "c" was added afterwards."""
    path = tmp_path / "disk.qcow2"
    create(path, MIB)
    add(path, "b")
    with pytest.raises(subprocess.CalledProcessError) as killed:
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", "write 0 64k", "-c", "flush", "-c", "sigraise 9", str(path)],
            check=True,
            capture_output=True,
            timeout=60,
        )
    assert killed.value.returncode == -9
    add(path, "c")
    qemu_io(path, "write -P 7 128k 64k")
    return path


def test_a_bitmap_in_use_is_listed_but_not_believed(abandoned: Path) -> None:
    with converted(abandoned) as expected, open_image(abandoned) as image:
        assert_reads_as(image, expected)
        in_use, sound = image.bitmaps()
        assert (in_use.name, in_use.in_use) == (b"b", True)
        assert (sound.name, sound.in_use) == (b"c", False)
        with pytest.raises(CorruptImageError, match=r'"b" cannot be used: it is in use'):
            image.dirty_bitmap("b")
        with pytest.raises(CorruptImageError, match=r'"b" cannot be used: it is in use'):
            next(image.dirty_extents("b"))
        assert list(image.dirty_bitmap("c").ranges(0, MIB)) == [(128 << 10, 65536)]
    told = qemu_img_json("info", abandoned)["format-specific"]["data"]["bitmaps"]
    assert [each["flags"] for each in told] == [["in-use", "auto"], ["auto"]]


def test_bitmaps_that_an_ignorant_writer_left_are_not_believed(abandoned: Path) -> None:
    patch(abandoned, AUTOCLEAR_OFFSET, bytes(8))
    assert "bitmaps" not in qemu_img_json("info", abandoned)["format-specific"]["data"]
    with open_image(abandoned) as image:
        assert image.bitmaps() == []
        with pytest.raises(MissingReferenceError, match='no bitmap "c"'):
            image.dirty_bitmap("c")


@pytest.mark.parametrize("wanted", ["", "B", "b ", "bitmap=b"])
def test_a_bitmap_that_does_not_exist_is_refused(wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    ImageBuilder(MIB).bitmap(b"b").build(path)
    with open_image(path) as image, pytest.raises(MissingReferenceError, match="no bitmap"):
        image.dirty_bitmap(wanted)
