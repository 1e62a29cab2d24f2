"""Images that lie about who owns what, and writes that fail: nothing is overwritten, nothing is lost."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2_plugin.errors import CorruptImageError, FailedImageError, TruncatedImageError
from tests.support.builder import ImageBuilder
from tests.support.clusters import CLEAR, SNAPSHOT, STATES, builder, text
from tests.support.fields import ALL_PARTS, COMPRESSED, COPIED, ZERO
from tests.support.image_checker import CORRUPT
from tests.support.in_memory import InMemory
from tests.support.memory_storage import MemoryStorage

# ---- images that lie


def refused(memory: InMemory, request: Callable[[], None]) -> None:
    """The request is refused, the image marked corrupt and not written to any more; it can still be read."""
    before = bytes(memory.storage.content)
    with pytest.raises(CorruptImageError):
        request()
    assert memory.field("incompatible_features") & CORRUPT
    after = bytearray(memory.storage.content)
    after[79] &= ~CORRUPT
    assert after == before, "something else changed"
    with pytest.raises(FailedImageError):
        memory.disk.pwrite(b"x", 5 * 512)
    with pytest.raises(FailedImageError):
        memory.disk.write_zeroes(0, 512)
    assert memory.disk.pread(10, 5 * 512) == text(5, 512)[:10]
    marked = bytes(memory.storage.content)
    memory.disk.close()
    assert memory.storage.content == marked


@pytest.mark.parametrize("length", [1, 100, 512])
def test_a_cluster_that_only_claims_to_be_ours_is_not_overwritten(length: int, tmp_path: Path) -> None:
    """COPIED, and a refcount of 2: a snapshot has it too."""
    image = builder()
    snapshot = image.map().data(1, text(1, 512), host_offset=40 * 512)
    image.data(1, text(1, 512), host_offset=40 * 512, copied=True)
    image.snapshot(SNAPSHOT.encode(), b"then", snapshot)
    memory = InMemory(image, tmp_path)
    assert memory.refcount(40 * 512) == 2 and memory.l2_entry(1)[0] == COPIED | 40 * 512
    refused(memory, lambda: memory.disk.pwrite(b"x" * length, 512))
    assert memory.cluster(40 * 512) == text(1, 512)


@pytest.mark.parametrize("refcount", [0, 2, 3])
@pytest.mark.parametrize("state", ["normal", "kept"])
def test_a_wrong_refcount_of_a_cluster_is_noticed(state: str, refcount: int, tmp_path: Path) -> None:
    image = builder()
    STATES[state](image, 1)
    place = image.build(tmp_path / "first").data_offsets[1]
    memory = InMemory(image.refcount(place // 512, refcount), tmp_path)
    refused(memory, lambda: memory.disk.pwrite(b"x" * 10, 512))


def test_a_wrong_refcount_of_a_table_is_noticed(tmp_path: Path) -> None:
    image = builder()
    place = image.build(tmp_path / "first").l2_offsets[0]
    memory = InMemory(image.refcount(place // 512, 2), tmp_path)
    refused(memory, lambda: memory.disk.pwrite(b"x" * 10, 512))


def everything() -> ImageBuilder:
    """An image with each structure that there is."""
    image = builder()
    own = image.map().data(3, text(3, 512))
    return image.snapshot(SNAPSHOT.encode(), b"then", own).bitmap(b"dirty", [(0, 512)], granularity_bits=9, flags=2)


TARGETS: dict[str, Callable[[InMemory], int]] = {
    "L1 table": lambda memory: memory.built.l1_offset,
    "L2 table": lambda memory: memory.built.l2_offsets[0],
    "refcount table": lambda memory: memory.built.refcount_table_offset,
    "refcount block": lambda memory: memory.built.refcount_block_offsets[0],
    "snapshot table": lambda memory: memory.built.snapshots_offset,
    "snapshot L1 table": lambda memory: memory.built.snapshots[0].l1_offset,
    "snapshot L2 table": lambda memory: memory.built.snapshots[0].l2_offsets[0],
    "bitmap directory": lambda memory: memory.built.bitmap_directory_offset,
    "bitmap table": lambda memory: memory.built.bitmap_table_offsets[0],
    "bits": lambda memory: memory.built.bitmap_data_offsets[0][0],
}


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("request_name", ["write", "unmap", "discard"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_table_that_an_entry_calls_data_is_left_alone(
    target: str, request_name: str, copied: bool, tmp_path: Path
) -> None:
    """Not overwritten, and not given away as free either. What has to be true before the first change may be done."""
    image = everything().l2_table(0)
    memory = InMemory(image, tmp_path)
    place = TARGETS[target](memory)
    entry = memory.built.l2_entry_offset(1)
    memory.disk.close()
    memory.storage.content[entry : entry + 8] = (place | COPIED * copied).to_bytes(8, "big")
    memory.reopen()
    before = bytearray(memory.cluster(place))
    with pytest.raises(CorruptImageError):
        if request_name == "write":
            memory.disk.pwrite(b"x" * 512, 512)
        else:
            CLEAR[request_name](memory.disk, 512, 512)
        memory.disk.flush()
    assert memory.field("incompatible_features") & CORRUPT
    after = bytearray(memory.cluster(place))
    if target == "bitmap directory":  # in use
        before[15], after[15] = 0, 0
    assert after == before
    with pytest.raises(FailedImageError):
        memory.disk.pwrite(b"x", 5 * 512)
    memory.disk.close()
    assert memory.refcount(place) == 1


@pytest.mark.parametrize("place", [1 << 50, (1 << 56) - 512, 200 * 512])
@pytest.mark.parametrize("state", ["normal", "kept"])
@pytest.mark.parametrize("length", [10, 512])
def test_a_cluster_past_the_end_of_the_file_is_not_written(state: str, place: int, length: int, tmp_path: Path) -> None:
    memory = InMemory(builder().entry(1, COPIED | place | ZERO * (state == "kept")), tmp_path)
    before = bytes(memory.storage.content)
    with pytest.raises(TruncatedImageError):
        memory.disk.pwrite(b"x" * length, 512)
    memory.disk.close()
    assert memory.storage.content == before


@pytest.mark.parametrize("request_name", ["write", *CLEAR])
@pytest.mark.parametrize(
    ("extended", "word", "bitmap"),
    [
        (False, COMPRESSED | COPIED | 20 * 512, 0),
        (True, COPIED | 60 << 14, 0x1_0000_0001),
        (True, 0, 1),
        (True, COMPRESSED | 20 << 14, 1),
        (True, COPIED | 20 << 14 | 512, ALL_PARTS),
    ],
)
def test_an_entry_that_breaks_the_format_is_left_as_it_is(
    extended: bool, word: int, bitmap: int, request_name: str, tmp_path: Path
) -> None:
    bits = 14 if extended else 9
    memory = InMemory(builder(bits, extended_l2=extended).entry(1, word, bitmap), tmp_path)
    before = bytes(memory.storage.content)
    offset, length = 1 << bits, 1 << bits
    with pytest.raises(CorruptImageError):
        if request_name == "write":
            memory.disk.pwrite(b"x" * 10, offset)
        else:
            CLEAR[request_name](memory.disk, offset, length)
    memory.disk.close()
    assert memory.storage.content == before


def test_a_zero_flag_in_version_2(tmp_path: Path) -> None:
    memory = InMemory(builder(version=2).entry(1, ZERO), tmp_path)
    before = bytes(memory.storage.content)
    with pytest.raises(CorruptImageError):
        memory.disk.pwrite(b"x", 512)
    with pytest.raises(CorruptImageError):
        memory.disk.discard(512, 512)
    memory.disk.close()
    assert memory.storage.content == before


def test_refcounts_that_call_tables_free_hand_out_nothing(tmp_path: Path) -> None:
    """A refcount block of zeros."""
    image = builder()
    memory = InMemory(image, tmp_path)
    block = memory.built.refcount_block_offsets[0]
    memory.storage.content[block : block + 512] = bytes(512)
    before = bytes(memory.storage.content)
    with pytest.raises(CorruptImageError):
        memory.disk.pwrite(b"x", 512)
    after = bytearray(memory.storage.content)
    assert after[79] & CORRUPT
    after[79] &= ~CORRUPT
    assert after == before


@pytest.mark.parametrize("target", ["header", *TARGETS])
def test_a_table_that_its_refcount_calls_free_is_not_handed_out(target: str, tmp_path: Path) -> None:
    """It would be the first free cluster, and the write finds nothing else wrong."""
    image = everything().l2_table(0)
    first = InMemory(image, tmp_path)
    place = 0 if target == "header" else TARGETS[target](first)
    memory = InMemory(image.refcount(place // 512, 0), tmp_path)
    before = bytearray(memory.cluster(place))
    with pytest.raises(CorruptImageError):
        memory.disk.pwrite(b"x" * 512, 512)
    memory.disk.close()
    assert memory.field("incompatible_features") & CORRUPT
    after = bytearray(memory.cluster(place))
    if target == "header":
        after[79] &= ~CORRUPT
    if target == "bitmap directory":  # in use
        before[15], after[15] = 0, 0
    assert after == before


# ---- what fails


class Failing(MemoryStorage):
    """Writes at or behind `limit` fail with ENOSPC."""

    limit = 1 << 62

    def write_from(self, buffer: bytes | bytearray | memoryview, host_offset: int) -> None:
        if host_offset + len(buffer) > self.limit:
            raise OSError(errno.ENOSPC, "no space")
        super().write_from(buffer, host_offset)


@pytest.mark.parametrize("state", ["unallocated", "packed", "zero", "shared"])
def test_a_write_that_fails_leaves_the_entry_and_gives_the_cluster_back(state: str, tmp_path: Path) -> None:
    image = builder()
    STATES["normal" if state == "shared" else state](image, 1)
    if state == "shared":
        image.snapshot(SNAPSHOT.encode(), b"then")
    view = image.expected()
    memory = InMemory(image, tmp_path)
    memory.disk.close()
    storage = Failing(memory.storage.content)
    memory.storage = storage
    memory.reopen()
    entry, size = memory.l2_entry(1), len(storage.content)
    if state == "shared":  # its table is copied first
        memory.disk.write_zeroes(2 * 512, 512)
        memory.settle()
        entry, size = memory.l2_entry(1), len(storage.content)
    storage.limit = size
    for _ in range(3):
        with pytest.raises(OSError) as found:
            memory.disk.pwrite(b"x" * 10, 512)
        assert found.value.errno == errno.ENOSPC
        assert memory.disk.pread(len(view), 0) == view
    memory.settle()
    assert memory.l2_entry(1) == entry
    memory.assert_clean()
    storage.limit = 1 << 62
    memory.disk.pwrite(b"x" * 10, 512)
    memory.disk.close()
    assert memory.view() == view[:512] + b"x" * 10 + view[522:]
    memory.assert_clean()


def test_a_fill_that_cannot_be_read_leaves_the_cluster_as_it_is(tmp_path: Path) -> None:
    image = builder().compressed(1, b"", stream=b"\xff" * 100)
    memory = InMemory(image, tmp_path)
    entry = memory.l2_entry(1)
    with pytest.raises(CorruptImageError):
        memory.disk.pwrite(b"x", 512)
    memory.settle()
    assert memory.l2_entry(1) == entry
    memory.assert_clean()
    memory.disk.pwrite(b"x" * 512, 512)  # nothing to fill up
    memory.disk.close()
    assert memory.disk.virtual_size == len(memory.view())
    memory.assert_clean()
