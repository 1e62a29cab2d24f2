"""Refcounts: who gets which cluster, when one is free again, and what of it is on disk at any moment."""

from __future__ import annotations

import errno
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from qcow2_plugin.engine import allocator as module
from qcow2_plugin.engine import refcount_blocks
from qcow2_plugin.engine.allocator import Allocator, Retired, Run
from qcow2_plugin.engine.header import read_header
from qcow2_plugin.engine.image_file import ImageFile, Structure
from qcow2_plugin.engine.metadata import read_metadata
from qcow2_plugin.engine.writeback import write_refcounts
from qcow2_plugin.errors import CorruptImageError, TruncatedImageError
from tests.support.builder import BuiltImage, ImageBuilder
from tests.support.crash_states import Crashes
from tests.support.image_checker import check_image
from tests.support.recording import Action, Log, RecordingStorage

WIDTHS = [1, 2, 4, 8, 16, 32, 64]


class Session:
    """The refcounts of an image, and what was handed out since it was opened."""

    def __init__(self, content: bytes) -> None:
        self.log = Log()
        self.storage = RecordingStorage(self.log, 0, content)
        header = read_header(self.storage)
        self.bits = header.cluster_bits
        self.file = ImageFile(self.storage, header, read_metadata(self.storage, header))
        self.allocator = Allocator(self.file)

    def allocate(self, count: int) -> list[int]:
        """So many clusters."""
        return [cluster for run in self.allocator.allocate(count) for cluster in self.clusters(run)]

    def clusters(self, run: Run) -> range:
        return range(run.host_offset >> self.bits, run.host_offset + run.length >> self.bits)

    def retire(self, clusters: list[int], *, punch: bool = False) -> None:
        self.allocator.retire(np.array(clusters, dtype=np.int64), punch=punch)

    def write_back(self) -> None:
        retired = self.allocator.take_retired()
        write_refcounts(self.file, self.allocator.take_writes())
        self.file.barrier()
        self.allocator.written()
        self.reclaim(retired)

    def reclaim(self, retired: list[Retired]) -> None:
        for each in retired:
            self.allocator.reclaim(each)

    def settle(self) -> None:
        while self.allocator.has_changes:
            self.write_back()

    def unreferenced(self) -> int:
        """Clusters with a refcount and nothing that refers to them, by somebody else's count."""
        report = check_image(self.storage.content)
        assert report.is_sound, report
        return report.all_leaks


def build(tmp_path: Path, told: ImageBuilder) -> tuple[bytes, BuiltImage]:
    built = told.build(tmp_path / "image.qcow2")
    return built.path.read_bytes(), built


def small(refcount_bits: int = 16) -> ImageBuilder:
    return ImageBuilder(1 << 20, 9, refcount_bits=refcount_bits).data(0, b"x").data(100, b"y").bitmap(b"b", [(0, 1)])


def session(tmp_path: Path, told: ImageBuilder | None = None) -> Session:
    return Session(build(tmp_path, small() if told is None else told)[0])


# ---- handing out


@pytest.mark.parametrize("refcount_bits", WIDTHS)
def test_what_is_handed_out_was_free_and_is_counted(tmp_path: Path, refcount_bits: int) -> None:
    opened = session(tmp_path, small(refcount_bits))
    used = {cluster for cluster in range(5000) if opened.allocator.refcount(cluster)}
    handed_out: list[int] = []
    for count in (1, 2, 700, 1, 3000):
        handed_out += opened.allocate(count)
    assert len(set(handed_out)) == 3704
    assert not used & set(handed_out)
    assert not opened.file.metadata.among(np.array(handed_out)).any()
    assert {opened.allocator.refcount(cluster) for cluster in handed_out} == {1}
    opened.settle()
    assert opened.unreferenced() == 3704
    again = Session(bytes(opened.storage.content))
    assert again.allocator.refcounts_of(np.array(handed_out, dtype=np.int64)).tolist() == [1] * 3704
    assert not set(again.allocate(100)) & set(handed_out)


def test_nothing_is_handed_out_for_nothing(tmp_path: Path) -> None:
    opened = session(tmp_path)
    assert opened.allocator.allocate(0) == []
    assert not opened.allocator.has_changes


def test_runs_are_as_long_as_they_can_be(tmp_path: Path) -> None:
    content, built = build(tmp_path, ImageBuilder(1 << 20).data(0, b"x", host_offset=20 << 16))
    opened = Session(content)
    first = built.refcount_table_offset + (1 << 16)
    last = (20 << 16) - first
    assert opened.allocator.allocate(3) == [Run(first, 3 << 16, False)]
    assert opened.allocator.allocate(30) == [
        Run(first + (3 << 16), last - (3 << 16), False),
        Run(21 << 16, (33 << 16) - last, True),
    ]


def test_only_what_the_file_never_held_is_clean(tmp_path: Path) -> None:
    opened = session(tmp_path, ImageBuilder(1 << 20).data(0, b"x"))
    (first,) = opened.allocator.allocate(2)
    assert first.is_clean
    assert first.host_offset == opened.storage.size()
    opened.allocator.release([first])
    (second,) = opened.allocator.allocate(1)
    assert second == Run(first.host_offset, 1 << 16, False)
    assert opened.allocator.allocate(2) == [Run(first.host_offset + (1 << 16), 2 << 16, False)]
    assert opened.allocator.allocate(2) == [Run(first.host_offset + (3 << 16), 2 << 16, True)]


def test_freed_clusters_are_handed_out_first(tmp_path: Path) -> None:
    opened = session(tmp_path)
    handed_out = opened.allocate(1000)
    opened.retire([handed_out[500], handed_out[3]])
    opened.settle()
    assert opened.allocate(3) == [handed_out[3], handed_out[500], handed_out[-1] + 1]


# ---- growing


@pytest.mark.parametrize("refcount_bits", WIDTHS)
def test_the_refcount_table_grows_again_and_again(tmp_path: Path, refcount_bits: int) -> None:
    opened = session(tmp_path, small(refcount_bits))
    total, tables = 0, {opened.allocator.table_run}
    while len(tables) < 4:
        total += len(opened.allocate(opened.allocator.per_block * 3))
        if len(tables) != 2:  # twice without a write-back in between
            opened.write_back()
        tables.add(opened.allocator.table_run)
    opened.settle()
    header = read_header(opened.storage)
    first, count = opened.allocator.table_run
    assert (header.refcount_table_offset >> 9, header.refcount_table_clusters) == (first, count)
    assert opened.file.header == header
    assert opened.unreferenced() == total
    assert opened.file.metadata.owner(first) == Structure.REFCOUNT_TABLE
    assert all(not opened.file.metadata.owner(old) for old, _ in tables - {(first, count)})


@pytest.mark.parametrize("refcount_bits", [4, 16, 64])
def test_tables_are_consecutive_however_long(tmp_path: Path, refcount_bits: int) -> None:
    opened = session(tmp_path, small(refcount_bits))
    chance = random.Random(refcount_bits)
    seen: set[int] = set()
    per_block = opened.allocator.per_block
    for count in (1, 3, 10 * per_block, 2, per_block, 100 * per_block):
        place = opened.allocator.allocate_table(Structure.L1_TABLE, count * 512 - chance.randrange(512))
        clusters = range(place >> 9, (place >> 9) + count)
        assert not place % 512
        assert not seen & set(clusters)
        seen |= set(clusters)
        assert {opened.file.metadata.owner(cluster) for cluster in clusters} == {Structure.L1_TABLE}
        assert opened.file.metadata.owner(clusters[-1] + 1) != Structure.L1_TABLE
        seen |= set(opened.allocate(chance.randrange(1, 100)))
    opened.settle()
    assert opened.unreferenced() == len(seen)


def test_a_longer_table_finds_room_behind_what_is_in_use(tmp_path: Path) -> None:
    """Instead of 2 GiB further on, where the next refcount block's clusters begin."""
    opened = session(tmp_path, ImageBuilder(1 << 20).data(0, b"x", host_offset=40 << 16))
    place = opened.allocator.allocate_table(Structure.L1_TABLE, 100 << 16)
    assert place == 41 << 16
    opened.settle()
    assert opened.unreferenced() == 100
    rest = opened.allocator.per_block - 141
    assert opened.allocator.allocate_table(Structure.L1_TABLE, rest << 16) == 141 << 16
    second = opened.allocator.allocate_table(Structure.L1_TABLE, 200 << 16)
    assert second == opened.allocator.per_block + 1 << 16


def test_growing_fails_where_the_format_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REFCOUNT_TABLE_SIZE", 1024)
    opened = session(tmp_path, small(64))
    before = opened.allocator.refcounts_of(np.arange(5000)).sum()
    with pytest.raises(OSError, match="large") as refused:
        opened.allocator.allocate(9000)
    assert refused.value.errno == errno.EFBIG
    with pytest.raises(OSError, match="large"):
        opened.allocator.allocate_table(Structure.L1_TABLE, 9000 * 512)
    assert opened.file.failure is None
    opened.settle()
    assert opened.unreferenced() == 0
    added = opened.allocator.refcounts_of(np.arange(9000)).sum() - before
    assert 0 < added < 200  # blocks that were added are there to stay
    assert len(opened.allocate(4000)) == 4000


def test_clusters_that_no_entry_can_name_are_not_handed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = session(tmp_path)
    monkeypatch.setattr(module, "OFFSET_MASK", (100 << 20) - 1)
    with pytest.raises(OSError, match="large") as refused:
        opened.allocate((100 << 20) >> 9)
    assert refused.value.errno == errno.EFBIG
    opened.settle()
    assert opened.unreferenced() == 0


def test_a_table_that_cannot_grow_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = session(tmp_path, small(64))
    table = opened.allocator.table_run
    monkeypatch.setattr(module, "OFFSET_MASK", (2 << 20) - 1)  # 64 entries reach as far as that
    with pytest.raises(OSError, match="large"):
        opened.allocate(5000)
    assert opened.allocator.table_run == table
    opened.allocate(1000)
    opened.settle()
    assert opened.unreferenced() == 1000


def test_a_table_with_refcounts_in_several_blocks(tmp_path: Path) -> None:
    """It takes 96 clusters, and a block of 64-bit refcounts counts 64."""
    opened = session(tmp_path, small(64))
    opened.allocator.allocate_table(Structure.L1_TABLE, 64 * 4096 * 512)
    assert opened.allocator.table_run[1] > 64
    first, count = opened.allocator.table_run
    assert set(opened.allocator.refcounts_of(np.arange(first, first + count)).tolist()) == {1}
    opened.settle()
    table = np.frombuffer(opened.file.storage.pread(count * 512, first * 512), dtype=">u8")
    blocks = (table[table != 0] // 512).astype(np.int64)
    assert set(opened.allocator.refcounts_of(blocks).tolist()) == {1}
    assert not set(blocks.tolist()) & set(range(first, first + count))


def test_a_table_that_grows_while_the_old_one_is_being_written(tmp_path: Path) -> None:
    """A write-back runs without the lock: what it took may be written after more has changed."""
    opened = session(tmp_path, small(64))
    total = len(opened.allocate(300))
    old_table = opened.allocator.table_run
    writes = opened.allocator.take_writes()
    assert writes.entries
    total += len(opened.allocate(6000))
    assert opened.allocator.table_run != old_table
    write_refcounts(opened.file, writes)
    opened.file.barrier()
    opened.allocator.written()
    assert opened.file.failure is None
    opened.settle()
    assert opened.unreferenced() == total


def test_a_table_that_grows_while_its_predecessor_is_being_written(tmp_path: Path) -> None:
    opened = session(tmp_path, small(64))
    total = len(opened.allocate(6000))
    retired, writes = opened.allocator.take_retired(), opened.allocator.take_writes()
    assert writes.table is not None
    total += len(opened.allocate(12000))
    write_refcounts(opened.file, writes)
    opened.file.barrier()
    opened.allocator.written()
    opened.reclaim(retired)
    opened.settle()
    assert opened.unreferenced() == total


def test_what_could_not_be_written_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refcount_blocks, "_BLOCK_CACHE_SIZE", 0)  # four blocks
    opened = session(tmp_path, small(64))
    total = len(opened.allocate(300))
    opened.write_back()
    total += len(opened.allocate(3))
    for more in (0, 6000, 20, 12000):
        total += len(opened.allocate(more))
        retired, writes = opened.allocator.take_retired(), opened.allocator.take_writes()
        opened.allocator.put_back(writes)
        opened.allocator.put_back_retired(retired)
        opened.allocator.refcounts_of(np.arange(total))
    opened.settle()
    assert opened.unreferenced() == total


# ---- giving back


def test_a_retired_cluster_is_free_when_it_was_reclaimed(tmp_path: Path) -> None:
    opened = session(tmp_path)
    handed_out = opened.allocate(10)
    opened.retire(handed_out[:4])
    assert int(opened.allocator.retired_count) == 4
    assert opened.allocator.has_changes
    assert opened.allocator.refcount(handed_out[0]) == 1
    assert not set(opened.allocate(5)) & set(handed_out)
    retired = opened.allocator.take_retired()
    assert int(opened.allocator.retired_count) == 0
    assert opened.allocator.refcount(handed_out[0]) == 1
    opened.allocator.put_back_retired(retired)
    assert int(opened.allocator.retired_count) == 4
    opened.reclaim(opened.allocator.take_retired())
    assert opened.allocator.refcount(handed_out[0]) == 0
    assert opened.allocate(4) == handed_out[:4]
    opened.settle()
    assert opened.unreferenced() == 15


def test_only_the_last_reference_frees_a_cluster_and_punches_it(tmp_path: Path) -> None:
    image = ImageBuilder(1 << 20, 9).data(0, b"shared").data(1, b"single").data(2, b"kept")
    content, built = build(tmp_path, image)
    opened = Session(content)
    shared, single, kept = (built.data_offsets[index] >> 9 for index in range(3))
    counts = opened.allocator.refcounts_of(np.arange(opened.allocator.per_block))
    counts[shared] = 3
    assert opened.allocator.set_refcounts(0, counts)
    opened.retire([shared, shared, single], punch=True)
    opened.retire([kept])
    opened.write_back()
    assert [opened.allocator.refcount(cluster) for cluster in (shared, single, kept)] == [1, 0, 0]
    punched = [call.offset for call in opened.log.calls if call.action is Action.PUNCH]
    assert punched == [single << 9]


def test_refcounts_on_disk_fall_one_write_back_after_the_pointer(tmp_path: Path) -> None:
    opened = session(tmp_path)
    handed_out = opened.allocate(3)
    opened.write_back()
    opened.retire(handed_out)
    opened.write_back()
    assert opened.unreferenced() == 3
    opened.write_back()
    assert opened.unreferenced() == 0
    assert not opened.allocator.has_changes


def test_released_clusters_are_free_at_once(tmp_path: Path) -> None:
    opened = session(tmp_path)
    runs = opened.allocator.allocate(700)
    opened.allocator.release(runs)
    assert opened.allocator.allocate(1)[0].host_offset == runs[0].host_offset
    place = opened.allocator.allocate_table(Structure.BITMAP, 1000)
    opened.allocator.release_table(place, 1000)
    assert not opened.file.metadata.owner(place >> 9)
    opened.settle()
    assert opened.unreferenced() == 1


def test_what_a_table_left_behind_is_not_clean(tmp_path: Path) -> None:
    opened = session(tmp_path, ImageBuilder(1 << 20, 9, refcount_bits=64).data(0, b"x"))
    for length in (2 * 512, 300 * 512):
        place = opened.allocator.allocate_table(Structure.BITMAP, length)
        opened.file.write(Structure.BITMAP, b"x" * length, place)
        opened.allocator.release_table(place, length)
        runs = opened.allocator.allocate(1000)
        touched = [run for run in runs if run.host_offset < place + length and place < run.host_offset + run.length]
        assert touched and not any(run.is_clean for run in touched)


def test_blocks_that_are_not_on_disk_yet_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refcount_blocks, "_BLOCK_CACHE_SIZE", 0)  # four blocks
    opened = session(tmp_path, small(64))
    handed_out = opened.allocate(1000)
    opened.settle()
    opened.allocator.release([Run(handed_out[500] << 9, 512, False)])
    writes = opened.allocator.take_writes()
    opened.allocator.release([Run(handed_out[600] << 9, 512, False)])
    everything = opened.allocator.refcounts_of(np.array(handed_out, dtype=np.int64))
    assert opened.allocator.refcount(handed_out[500]) == opened.allocator.refcount(handed_out[600]) == 0
    assert everything.sum() == 998
    opened.allocator.put_back(writes)
    opened.settle()
    assert opened.unreferenced() == 998


def test_blocks_that_are_on_disk_are_not_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refcount_blocks, "_BLOCK_CACHE_SIZE", 0)  # four blocks
    opened = session(tmp_path, small(64))
    size = opened.storage.size()
    handed_out = opened.allocate(1000)
    opened.settle()
    opened.storage.truncate(size)
    with pytest.raises(TruncatedImageError):
        opened.allocator.refcounts_of(np.array(handed_out, dtype=np.int64))


def test_the_end_of_use(tmp_path: Path) -> None:
    opened = session(tmp_path, ImageBuilder(1 << 20).data(0, b"x", host_offset=40 << 16))
    assert opened.allocator.end_of_use() == 41 << 16
    handed_out = opened.allocate(100)
    assert opened.allocator.end_of_use() == handed_out[-1] + 1 << 16
    opened.allocator.release([Run(handed_out[-1] << 16, 1 << 16, False)])
    assert opened.allocator.end_of_use() == handed_out[-1] << 16


# ---- corrupt images


def is_marked(opened: Session) -> bool:
    return bool(opened.storage.content[79] & 2)


@pytest.mark.parametrize("structure", ["L2 table", "L1 table", "bitmap", "refcount block", "refcount table", "header"])
def test_a_structure_that_a_refcount_calls_free_is_never_handed_out(tmp_path: Path, structure: str) -> None:
    built = build(tmp_path, small())[1]
    place = {
        "L2 table": built.l2_offsets[0],
        "L1 table": built.l1_offset,
        "bitmap": built.bitmap_directory_offset,
        "refcount block": built.refcount_block_offsets[0],
        "refcount table": built.refcount_table_offset,
        "header": 0,
    }[structure]
    opened = Session(build(tmp_path, small().refcount(place >> 9, 0))[0])
    message = f"refcounts: say that cluster {place >> 9:#x} of the {structure} is free"
    with pytest.raises(CorruptImageError, match=message):
        opened.allocator.allocate(1000)
    assert is_marked(opened)
    assert opened.file.failure is not None
    assert [call.offset for call in opened.log.calls if call.length] == [72]


def test_a_range_without_refcounts_is_not_taken_when_a_structure_is_there(tmp_path: Path) -> None:
    content, built = build(tmp_path, ImageBuilder(1 << 20, 9, refcount_bits=64).data(0, b"x"))
    broken = bytearray(content)
    slot = 4
    struct.pack_into(">Q", broken, built.l1_entry_offset(1), slot * 64 * 512 + 512)
    broken.extend(bytes(slot * 64 * 512 + 1024 - len(broken)))
    opened = Session(bytes(broken))
    with pytest.raises(CorruptImageError, match="of the L2 table is free"):
        opened.allocator.allocate(1000)
    opened = Session(bytes(broken))
    with pytest.raises(CorruptImageError, match="of the L2 table is free"):
        opened.allocator.allocate_table(Structure.L1_TABLE, 300 * 512)


def test_a_structure_cannot_be_retired_as_data(tmp_path: Path) -> None:
    content, built = build(tmp_path, small())
    opened = Session(content)
    with pytest.raises(CorruptImageError, match="points to a structure of the image"):
        opened.retire([built.data_offsets[0] >> 9, built.l2_offsets[0] >> 9])
    assert is_marked(opened)


@pytest.mark.parametrize("cluster", [300, 100_000, 1 << 40])
def test_more_references_gone_than_there_were(tmp_path: Path, cluster: int) -> None:
    """Of a cluster that is free, one without a refcount block, and one behind the refcount table."""
    opened = session(tmp_path)
    with pytest.raises(CorruptImageError, match="refcount"):
        opened.allocator.reclaim(Retired(np.array([cluster], dtype=np.int64), punch=False))
    assert is_marked(opened)


@pytest.mark.parametrize("word", [0x201, 1 << 40])
def test_a_refcount_table_that_was_changed_under_us(tmp_path: Path, word: int) -> None:
    """Blocks are read when they are needed, from places that were proven to be theirs."""
    content, built = build(tmp_path, small())
    opened = Session(content)
    struct.pack_into(">Q", opened.storage.content, built.refcount_table_offset, word)
    again = Allocator(opened.file)
    with pytest.raises(CorruptImageError, match="no place for a block"):
        again.allocate(1)


def test_version_2_has_no_place_for_the_mark(tmp_path: Path) -> None:
    image = ImageBuilder(1 << 20, 9, version=2).data(0, b"x")
    built = build(tmp_path, image)[1]
    content = build(tmp_path, image.refcount(built.l2_offsets[0] >> 9, 0))[0]
    opened = Session(content)
    with pytest.raises(CorruptImageError):
        opened.allocator.allocate(1000)
    assert opened.storage.content == content
    assert opened.file.failure is not None


# ---- for a rebuild


@pytest.mark.parametrize("refcount_bits", WIDTHS)
def test_refcounts_can_be_set(tmp_path: Path, refcount_bits: int) -> None:
    opened = session(tmp_path, small(refcount_bits))
    per_block = opened.allocator.per_block
    before = opened.allocator.refcounts_of(np.arange(per_block))
    assert not opened.allocator.set_refcounts(0, before)
    assert not opened.allocator.has_changes
    largest = (1 << min(refcount_bits, 63)) - 1
    wanted = before.copy()
    wanted[-1] = largest
    assert opened.allocator.set_refcounts(0, wanted)
    if refcount_bits < 64:
        wanted[-1] += 1
        with pytest.raises(OverflowError, match=f"does not fit {refcount_bits} bits"):
            opened.allocator.set_refcounts(0, wanted)
    opened.settle()
    again = Session(bytes(opened.storage.content)).allocator
    assert again.refcount(per_block - 1) == largest
    assert opened.allocator.set_refcounts(0, before[: len(before) // 2])
    assert not opened.allocator.refcounts_of(np.arange(len(before) // 2, per_block)).any()


def test_a_missing_block_is_put_where_a_cluster_is_free(tmp_path: Path) -> None:
    opened = session(tmp_path, small(64))
    references = np.ones(64, dtype=np.uint64)
    references[17] = references[40] = 0
    assert not opened.allocator.set_refcounts(40, np.zeros(64, dtype=np.uint64))
    assert opened.allocator.set_refcounts(40, references)
    assert opened.file.metadata.owner(40 * 64 + 17) == Structure.REFCOUNT_BLOCK
    assert opened.allocator.refcounts_of(np.array([40 * 64 + 17, 40 * 64 + 40])).tolist() == [1, 0]
    with pytest.raises(CorruptImageError, match="no room"):
        opened.allocator.set_refcounts(41, np.ones(64, dtype=np.uint64))
    opened = session(tmp_path, small(64))
    with pytest.raises(CorruptImageError, match="too small"):
        opened.allocator.set_refcounts(64, np.ones(1, dtype=np.uint64))


# ---- all of it


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("refcount_bits", [1, 8, 64])
def test_whatever_happens_refcounts_are_those_of_a_plain_dictionary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refcount_bits: int, seed: int
) -> None:
    monkeypatch.setattr(refcount_blocks, "_BLOCK_CACHE_SIZE", 0)  # four blocks
    chance = random.Random(f"{refcount_bits}/{seed}")
    opened = session(tmp_path, small(refcount_bits))
    allocator = opened.allocator
    live: list[int] = []
    retired: list[int] = []
    tables: list[tuple[int, int]] = []
    for _ in range(150):
        kind = chance.randrange(7)
        if kind < 2:
            live += opened.allocate(chance.choice([1, 5, 64, 500]))
        elif kind == 2:
            length = 512 * chance.choice([1, 2, 60, 100, 700])
            tables.append((allocator.allocate_table(Structure.BITMAP, length), length))
        elif kind == 3 and tables:
            place, length = tables.pop(chance.randrange(len(tables)))
            if chance.random() < 0.5:
                allocator.release_table(place, length)
            else:
                allocator.retire_table(place >> 9, length >> 9)
                retired += range(place >> 9, place + length >> 9)
        elif kind == 4 and live:
            chance.shuffle(live)
            count = chance.randrange(min(len(live), 300))
            opened.retire(live[:count], punch=chance.random() < 0.5)
            retired += live[:count]
            del live[:count]
        elif kind == 5:
            opened.write_back()
            retired.clear()
        elif kind == 6:
            runs = allocator.allocate(chance.randrange(1, 200))
            assert not {cluster for run in runs for cluster in opened.clusters(run)} & {*live, *retired}
            allocator.release(runs)
    expected = [*live, *retired, *(each for place, length in tables for each in range(place >> 9, place + length >> 9))]
    assert len(expected) == len(set(expected))
    assert set(allocator.refcounts_of(np.array(expected, dtype=np.int64)).tolist()) <= {1}
    opened.settle()
    assert opened.unreferenced() == len(expected) - len(retired)
    again = Session(bytes(opened.storage.content))
    assert not set(again.allocate(3000)) & {*live, *(place >> 9 for place, _ in tables)}


@pytest.mark.parametrize("refcount_bits", [16, 64])
def test_a_crash_at_any_time_leaves_refcounts_that_are_high_enough(tmp_path: Path, refcount_bits: int) -> None:
    """New blocks, new tables, a table given back: at no time does the disk name what is not there."""
    content, _ = build(tmp_path, small(refcount_bits))
    opened = Session(content)
    per_block = opened.allocator.per_block
    for count in (1, per_block, 70 * per_block, 2 * per_block):
        handed_out = opened.allocate(count)
        opened.write_back()
    opened.retire(handed_out)
    opened.settle()
    crashes = Crashes(opened.log, (content,))
    seen = set()
    for plan in crashes.plans():
        state = crashes.state(plan)
        if state.key not in seen:
            seen.add(state.key)
            assert check_image(state.files[0].content()).is_sound, plan
    assert len(seen) > 30
