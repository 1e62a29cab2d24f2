"""One open image: what the guest sees, range by range and extent by extent."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from qcow2_plugin.engine.header import read_header
from qcow2_plugin.engine.image import Image, Layer
from qcow2_plugin.engine.raw import RawDisk
from qcow2_plugin.errors import (
    CorruptImageError,
    ImageClosedError,
    MissingReferenceError,
    OutOfRangeError,
    TruncatedImageError,
)
from qcow2_plugin.extent import Extent, ExtentKind, GuestDisk
from tests.support.builder import ImageBuilder, deflate
from tests.support.memory import MemoryStorage

CLUSTER = 4096
DATA, ZERO, PACKED, UNALLOCATED = ExtentKind.DATA, ExtentKind.ZERO, ExtentKind.COMPRESSED, ExtentKind.UNALLOCATED


def noise(seed: int, length: int = CLUSTER) -> bytes:
    return random.Random(seed).randbytes(length)


def text(seed: int) -> bytes:
    return (b"%d words " % seed * CLUSTER)[:CLUSTER]


def opened(
    image: ImageBuilder,
    tmp_path: Path,
    *,
    backing: GuestDisk | None = None,
    data: bytes | None = None,
    cut: int = 0,
    allow_damaged: bool = False,
    cache_size: int = 1 << 20,
) -> Image:
    built = image.build(tmp_path / "image")
    content = built.path.read_bytes()
    storage = MemoryStorage(content[: len(content) - cut], "image.qcow2")
    data_storage = storage if data is None else MemoryStorage(data, "data.raw")
    layer = Layer(read_header(storage), storage, data_storage, backing, cache_size, allow_damaged)
    return Image(layer, ExitStack())


def mixed(virtual_size: int = 16 * CLUSTER) -> ImageBuilder:
    return (
        ImageBuilder(virtual_size, cluster_bits=12)
        .data(0, noise(0))
        .data(1, noise(1))
        .zero(2)
        .zero(3, preallocated=True, payload=noise(3))
        .compressed(4, text(4))
        .compressed(5, text(5))
        .compressed(6, text(6))
        .data(8, noise(8))
        .data(15, noise(15))
    )


EDGES = [0, 1, CLUSTER - 1, CLUSTER, CLUSTER + 1, 4 * CLUSTER + 7, 7 * CLUSTER - 1, 9 * CLUSTER, 16 * CLUSTER - 1]


@pytest.mark.parametrize("start", EDGES)
@pytest.mark.parametrize("length", [0, 1, 511, CLUSTER, 3 * CLUSTER + 5, 16 * CLUSTER])
def test_every_range_reads_as_told(tmp_path: Path, start: int, length: int) -> None:
    image = mixed()
    disk = opened(image, tmp_path)
    expected = image.expected()[start : start + length]
    for _ in range(2):  # the second time from what is kept
        assert disk.pread(len(expected), start) == expected


def test_what_lies_around_the_buffer_is_left_alone(tmp_path: Path) -> None:
    image = mixed()
    disk = opened(image, tmp_path)
    for start in EDGES:
        whole = bytearray(b"\xaa" * 300)
        length = min(100, 16 * CLUSTER - start)
        disk.read_into(memoryview(whole)[100 : 100 + length], start)
        assert whole[100 : 100 + length] == image.expected()[start : start + length]
        assert set(whole[:100]) == set(whole[100 + length :]) == {0xAA}


def test_all_of_an_empty_disk_reads_zeros(tmp_path: Path) -> None:
    disk = opened(ImageBuilder(1 << 20, cluster_bits=12), tmp_path)
    assert disk.pread(1 << 20, 0) == bytes(1 << 20)
    assert list(disk.extents()) == [Extent(0, 1 << 20, UNALLOCATED, None)]


def test_a_disk_of_no_size(tmp_path: Path) -> None:
    disk = opened(ImageBuilder(0, cluster_bits=12), tmp_path)
    assert (disk.virtual_size, disk.pread(0, 0), list(disk.extents())) == (0, b"", [])
    with pytest.raises(OutOfRangeError):
        disk.pread(1, 0)


def test_the_last_cluster_may_be_partial(tmp_path: Path) -> None:
    image = ImageBuilder(CLUSTER + 700, cluster_bits=12).data(0, noise(0)).data(1, noise(1))
    disk = opened(image, tmp_path)
    assert disk.virtual_size == CLUSTER + 512
    assert disk.pread(CLUSTER + 512, 0) == noise(0) + noise(1)[:512]
    assert sum(extent.length for extent in disk.extents()) == CLUSTER + 512
    with pytest.raises(OutOfRangeError):
        disk.pread(1, CLUSTER + 512)


@pytest.mark.parametrize(
    ("length", "offset"), [(1, 16 * CLUSTER), (2, 16 * CLUSTER - 1), (1, -1), (5, -5), (-1, 5), (1, 1 << 70)]
)
def test_ranges_outside_the_disk_are_refused(tmp_path: Path, length: int, offset: int) -> None:
    disk = opened(mixed(), tmp_path)
    with pytest.raises(OutOfRangeError, match=r"is not inside the disk of 65536 bytes \(image\.qcow2\)"):
        disk.pread(length, offset)
    with pytest.raises(OutOfRangeError):
        list(disk.extents(offset, length))
    if length > 0:
        with pytest.raises(OutOfRangeError):
            disk.read_into(memoryview(bytearray(length)), offset)


def test_a_read_that_leaves_the_disk_is_refused_though_the_lane_knows_its_start(tmp_path: Path) -> None:
    disk = opened(mixed(), tmp_path)
    disk.pread(CLUSTER, 15 * CLUSTER)
    with pytest.raises(OutOfRangeError):
        disk.read_into(memoryview(bytearray(CLUSTER + 1)), 15 * CLUSTER)


def test_a_broken_cluster_breaks_only_itself(tmp_path: Path) -> None:
    image = mixed().compressed(7, text(7), stream=b"\xff" * 60).entry(9, 0x200 | 1 << 62 | 1 << 63)
    disk = opened(image, tmp_path)
    assert disk.pread(7 * CLUSTER, 0) == mixed().expected()[: 7 * CLUSTER]
    assert disk.pread(CLUSTER, 8 * CLUSTER) == noise(8)
    for _ in range(2):
        with pytest.raises(CorruptImageError, match=r"compressed cluster at host offset .*\(image\.qcow2\)"):
            disk.pread(1, 7 * CLUSTER)
        with pytest.raises(CorruptImageError, match=r"L2 entry at host offset .*\(image\.qcow2\)"):
            disk.pread(1, 9 * CLUSTER)


# ---- compressed clusters


def test_compressed_clusters_in_any_order(tmp_path: Path) -> None:
    image = ImageBuilder(64 * CLUSTER, cluster_bits=12)
    order = random.Random(1).sample(range(64), 40)
    for cluster in order:
        image.compressed(cluster, text(cluster) if cluster % 3 else noise(cluster)[:100])
    disk = opened(image, tmp_path)
    assert disk.pread(64 * CLUSTER, 0) == image.expected()
    for cluster in order:
        assert disk.pread(700, cluster * CLUSTER + 300) == image.expected()[cluster * CLUSTER + 300 :][:700]


def test_two_compressed_clusters_may_be_one(tmp_path: Path) -> None:
    built = ImageBuilder(8 * CLUSTER, cluster_bits=12).compressed(0, text(0)).build(tmp_path / "x")
    entry = int.from_bytes(built.path.read_bytes()[built.l2_entry_offset(0) :][:8], "big")
    image = ImageBuilder(8 * CLUSTER, cluster_bits=12).compressed(0, text(0)).entry(1, entry).entry(3, entry)
    disk = opened(image, tmp_path)
    assert disk.pread(4 * CLUSTER, 0) == text(0) * 2 + bytes(CLUSTER) + text(0)


def test_the_last_stream_may_say_more_sectors_than_the_file_has(tmp_path: Path) -> None:
    image = ImageBuilder(8 * CLUSTER, cluster_bits=12, pack=False).compressed(0, text(0), sectors=7)
    built = image.build(tmp_path / "x")
    end = built.data_offsets[0] + len(deflate(text(0)))
    content = built.path.read_bytes()
    refcounts_first = image.compressed(0, text(0), sectors=7, host_offset=len(content))
    disk = opened(refcounts_first, tmp_path)
    assert end < len(content)
    assert disk.pread(CLUSTER, 0) == text(0)
    size = disk.layer.storage.size()
    cut = size - (len(content) + len(deflate(text(0))))
    assert opened(refcounts_first, tmp_path, cut=cut).pread(CLUSTER, 0) == text(0)


def test_a_stream_that_ends_in_zeros_may_end_with_the_file(tmp_path: Path) -> None:
    """Past the end of a file are zeros, for compressed clusters too."""
    content = text(0)[:100] + bytes(CLUSTER - 100)
    stream = struct.pack("<BHH", 1, CLUSTER, CLUSTER ^ 0xFFFF) + content  # RFC 1951, 3.2.4: one stored block
    image = ImageBuilder(8 * CLUSTER, cluster_bits=12).compressed(0, content, stream=stream, host_offset=16 * CLUSTER)
    end = 16 * CLUSTER + stream.index(content[:100]) + 100
    size = image.build(tmp_path / "whole").path.stat().st_size
    disk = opened(image, tmp_path, cut=size - end, allow_damaged=True)
    assert disk.pread(CLUSTER, 0) == content


# ---- backing


def raw(content: bytes) -> RawDisk:
    return RawDisk(MemoryStorage(content, "base.raw"))


@pytest.mark.parametrize("length", [0, 1, 512, 700, CLUSTER, 10 * CLUSTER + 3, 16 * CLUSTER, 30 * CLUSTER])
def test_a_backing_file_of_any_length_shows_through(tmp_path: Path, length: int) -> None:
    image = mixed()
    base = noise(99, length)
    disk = opened(image, tmp_path, backing=raw(base))
    expected = image.expected(base)
    assert disk.pread(16 * CLUSTER, 0) == expected
    for start in EDGES:
        assert disk.pread(min(5000, 16 * CLUSTER - start), start) == expected[start : start + 5000]
    told = list(disk.extents())
    assert sum(extent.length for extent in told) == 16 * CLUSTER
    assert {extent.depth for extent in told} == ({0, 1} if length > 7 * CLUSTER else {0})
    nowhere = [extent for extent in told if extent.kind is UNALLOCATED]
    assert all(extent.guest_offset >= length and extent.depth == 0 for extent in nowhere)
    assert any(nowhere) == (length < 15 * CLUSTER)


def test_extents_through_a_chain_count_its_layers(tmp_path: Path) -> None:
    base = raw(noise(99, 9 * CLUSTER))
    (tmp_path / "m").mkdir()
    middle = opened(ImageBuilder(12 * CLUSTER, cluster_bits=12).data(1, noise(1)).zero(2), tmp_path / "m", backing=base)
    top = opened(ImageBuilder(16 * CLUSTER, cluster_bits=12).data(0, noise(0)), tmp_path, backing=middle)
    told = [(extent.guest_offset // CLUSTER, extent.kind, extent.depth) for extent in top.extents()]
    assert told == [(0, DATA, 0), (1, DATA, 1), (2, ZERO, 1), (3, DATA, 2), (9, UNALLOCATED, 1), (12, UNALLOCATED, 0)]
    own = [(extent.guest_offset // CLUSTER, extent.kind) for extent in top.extents(whole_chain=False)]
    assert own == [(0, DATA), (1, UNALLOCATED)]
    assert [extent.depth for extent in top.extents(CLUSTER + 5, 10)] == [1]


def test_extents_of_a_range(tmp_path: Path) -> None:
    disk = opened(mixed(), tmp_path)
    told = list(disk.extents(CLUSTER + 100, 5 * CLUSTER))
    assert [(extent.guest_offset, extent.length, extent.kind) for extent in told] == [
        (CLUSTER + 100, CLUSTER - 100, DATA),
        (2 * CLUSTER, CLUSTER, ZERO),
        (3 * CLUSTER, CLUSTER, ZERO),
        (4 * CLUSTER, 2 * CLUSTER + 100, PACKED),
    ]
    assert told[-1].host_offset is None
    assert told[-1].stored_length > 0
    assert list(disk.extents(5, 0)) == []


# ---- data files


def test_traps_2_and_8_and_14_a_data_file_is_read_where_the_guest_reads(tmp_path: Path) -> None:
    base = noise(1, 3 * CLUSTER)
    image = ImageBuilder(8 * CLUSTER, cluster_bits=12).data_file(tmp_path / "data", b"data")
    image.data(0, base[:CLUSTER]).data(2, base[2 * CLUSTER :]).zero(1, preallocated=True, payload=noise(5))
    looks_like_qcow2 = b"QFI\xfb\0\0\0\3" + base[8:]
    image.data(0, looks_like_qcow2[:CLUSTER])
    disk = opened(image, tmp_path, data=looks_like_qcow2)
    assert disk.pread(CLUSTER, 0) == looks_like_qcow2[:CLUSTER]
    assert disk.pread(8 * CLUSTER, 0) == image.expected()
    longer = opened(image, tmp_path, data=looks_like_qcow2 + b"x" * 50 * CLUSTER)
    assert longer.pread(8 * CLUSTER, 0) == image.expected()
    shorter = opened(image, tmp_path, data=looks_like_qcow2[: 2 * CLUSTER + 10])
    assert shorter.pread(8 * CLUSTER, 0) == image.expected()[: 2 * CLUSTER + 10].ljust(8 * CLUSTER, b"\0")
    assert [extent.host_offset for extent in disk.extents()][:3] == [0, CLUSTER, 2 * CLUSTER]


# ---- damaged files


@pytest.mark.parametrize("allow_damaged", [False, True])
def test_what_a_truncated_file_lacks_is_an_error_or_zeros(tmp_path: Path, allow_damaged: bool) -> None:
    image = ImageBuilder(8 * CLUSTER, cluster_bits=12).data(0, noise(0)).data(1, noise(1), host_offset=30 * CLUSTER)
    disk = opened(image, tmp_path, cut=CLUSTER, allow_damaged=allow_damaged)
    assert disk.pread(CLUSTER, 0) == noise(0)
    if allow_damaged:
        assert disk.pread(2 * CLUSTER, 0) == noise(0) + bytes(CLUSTER)
        return
    with pytest.raises(TruncatedImageError):
        disk.pread(1, CLUSTER)
    with pytest.raises(TruncatedImageError):
        list(disk.extents())


def test_a_cluster_cut_in_the_middle_goes_on_with_zeros(tmp_path: Path) -> None:
    image = ImageBuilder(8 * CLUSTER, cluster_bits=12).data(1, noise(1), host_offset=30 * CLUSTER)
    disk = opened(image, tmp_path, cut=1000)
    assert disk.pread(2 * CLUSTER, 0) == bytes(CLUSTER) + noise(1)[:-1000] + bytes(1000)


# ---- snapshots


def test_snapshots_are_disks_of_their_own(tmp_path: Path) -> None:
    image = mixed()
    then = image.map(virtual_size=20 * CLUSTER).data(0, noise(70)).zero(1).compressed(19, text(19))
    image.snapshot(b"1", b"then", then).snapshot(b"2", b"1")
    disk = opened(image, tmp_path)
    assert [snapshot.name for snapshot in disk.snapshots()] == [b"then", b"1"]
    for wanted in ("1", b"1", "then"):
        old = disk.at_snapshot(wanted)
        assert (old.virtual_size, old.pread(20 * CLUSTER, 0)) == (20 * CLUSTER, then.expected())
    assert disk.at_snapshot("2").pread(16 * CLUSTER, 0) == image.expected()
    assert disk.pread(16 * CLUSTER, 0) == image.expected()
    with pytest.raises(MissingReferenceError, match='no internal snapshot "none"'):
        disk.at_snapshot("none")


def test_a_snapshot_sees_the_backing_file(tmp_path: Path) -> None:
    image = mixed()
    then = image.map().data(0, noise(70))
    base = noise(99, 16 * CLUSTER)
    disk = opened(image.snapshot(b"1", b"then", then), tmp_path, backing=raw(base))
    assert disk.at_snapshot("1").pread(16 * CLUSTER, 0) == then.expected(base)


def test_vm_state_is_not_part_of_the_disk(tmp_path: Path) -> None:
    image = ImageBuilder(512 * CLUSTER, cluster_bits=12, l1_size=3).data(0, noise(0)).data(512, noise(5))
    disk = opened(image, tmp_path)
    assert disk.virtual_size == 512 * CLUSTER
    assert sum(extent.length for extent in disk.extents()) == 512 * CLUSTER
    with pytest.raises(OutOfRangeError):
        disk.pread(1, 512 * CLUSTER)


# ---- bitmaps


def test_dirty_extents_are_the_extents_of_what_is_marked(tmp_path: Path) -> None:
    image = mixed().bitmap(b"b", [(CLUSTER, 2 * CLUSTER), (8 * CLUSTER, 1)], granularity_bits=12)
    disk = opened(image, tmp_path)
    assert [bitmap.name for bitmap in disk.bitmaps()] == [b"b"]
    told = [
        (extent.guest_offset // CLUSTER, extent.length // CLUSTER, extent.kind) for extent in disk.dirty_extents("b")
    ]
    assert told == [(1, 1, DATA), (2, 1, ZERO), (8, 1, DATA)]
    with pytest.raises(MissingReferenceError):
        list(disk.dirty_extents("c"))


def test_a_bitmap_in_use_is_listed_and_not_used(tmp_path: Path) -> None:
    disk = opened(mixed().bitmap(b"b", [(0, 1)], flags=1), tmp_path)
    assert [bitmap.in_use for bitmap in disk.bitmaps()] == [True]
    with pytest.raises(CorruptImageError, match="in use"):
        list(disk.dirty_extents("b"))
    assert disk.pread(CLUSTER, 0) == noise(0)


def test_a_bitmap_bit_without_extension_is_no_trouble(tmp_path: Path) -> None:
    image = mixed()
    image.autoclear |= 1
    disk = opened(image, tmp_path)
    assert disk.bitmaps() == []
    assert disk.pread(CLUSTER, 0) == noise(0)


# ---- life


@contextmanager
def closing(disk: Image) -> Iterator[Image]:
    with disk:
        yield disk


def test_a_closed_image_says_so(tmp_path: Path) -> None:
    disk = opened(mixed(), tmp_path)
    with closing(disk):
        disk.pread(CLUSTER, 0)
    disk.close()
    for offset in (0, 2 * CLUSTER, 4 * CLUSTER):
        with pytest.raises(ImageClosedError) as caught:
            disk.pread(1, offset)
        assert caught.value.errno == errno.ESHUTDOWN
        with pytest.raises(ImageClosedError):
            disk.read_into(memoryview(bytearray(1)), offset)
    with pytest.raises(ImageClosedError):
        disk.extents()


def test_closing_gives_back_what_the_image_owns(tmp_path: Path) -> None:
    storage = MemoryStorage(mixed().build(tmp_path / "x").path.read_bytes())
    resources = ExitStack()
    resources.callback(storage.close)
    Image(Layer(read_header(storage), storage, storage, None, 1 << 20, False), resources).close()
    assert storage.closed


def test_prefetch_is_a_hint_about_a_range_inside_the_disk(tmp_path: Path) -> None:
    disk = opened(mixed(), tmp_path, backing=raw(noise(1, 9 * CLUSTER)))
    disk.prefetch(0, 16 * CLUSTER)
    disk.prefetch(7 * CLUSTER + 5, 1)
    disk.prefetch(5, 0)
    with pytest.raises(OutOfRangeError):
        disk.prefetch(0, 16 * CLUSTER + 1)
