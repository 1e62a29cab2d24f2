"""Tables that are being changed: what memory knows better than the disk, what is owed to it, and in which order."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from qcow2_plugin.engine.allocator import Allocator
from qcow2_plugin.engine.header import read_header
from qcow2_plugin.engine.image_file import ImageFile
from qcow2_plugin.engine.metadata import read_metadata
from qcow2_plugin.engine.tables import RUN_MASK, TableSource
from qcow2_plugin.engine.written_tables import TableWrites, WrittenTables
from qcow2_plugin.errors import CorruptImageError
from tests.support.builder import BuiltImage, ImageBuilder
from tests.support.fields import ALL_PARTS, COPIED, ZERO
from tests.support.image_checker import CORRUPT, OFFSET_MASK
from tests.support.memory_storage import MemoryStorage

CLUSTER = 512  # 64 entries a table, one slice, 32 KiB of guest
COVERAGE = 64 * CLUSTER
PLACE = 100 * CLUSTER  # of nothing in particular


@dataclass
class Opened:
    """The tables of an image in memory, with what they need."""

    tables: WrittenTables
    allocator: Allocator
    storage: MemoryStorage
    built: BuiltImage

    def stored(self, host_offset: int) -> int:
        """A word of the file."""
        word: int
        (word,) = struct.unpack_from(">Q", self.storage.content, host_offset)
        return word

    def l1_entry(self, index: int) -> int:
        return int(self.tables.read_l1(index, 1)[0])

    def set_word(self, key: int, index: int, word: int) -> None:
        """Change one word of a slice, as a commit does."""
        found = self.tables.own(key)
        found.words[index] = word
        self.tables.changed(key, found)

    def write(self, writes: TableWrites) -> None:
        """All of it, as a write-back does that nothing stops."""
        for host_offset, data in (*writes.unpublished, *writes.l1_entries, *writes.slices):
            self.storage.write_from(data, host_offset)
        self.tables.publish(writes)
        self.tables.written(writes)


def opened(told: ImageBuilder, folder: Path, cache_size: int = 1 << 20, *, tracks_changes: bool = False) -> Opened:
    built = told.build(folder / "image")
    storage = MemoryStorage(built.path.read_bytes())
    header = read_header(storage)
    file = ImageFile(storage, header, read_metadata(storage, header))
    allocator = Allocator(file)
    source = TableSource.of(header, storage, None, allow_damaged=False)
    return Opened(
        WrittenTables(source, cache_size, file, allocator, tracks_changes=tracks_changes), allocator, storage, built
    )


def four_tables() -> ImageBuilder:
    """The second L2 table is missing."""
    image = ImageBuilder(4 * COVERAGE, 9)
    for cluster in (0, 5, 2 * 64, 3 * 64 + 63):
        image.data(cluster, b"x")
    return image


# ---- whose table it is


def test_a_table_that_is_ours_changes_where_it_is(tmp_path: Path) -> None:
    made = opened(four_tables(), tmp_path)
    before = bytes(made.storage.content)
    made.set_word(0, 3, COPIED | PLACE)
    assert made.l1_entry(0) == COPIED | made.built.l2_offsets[0]
    assert made.tables.slice_at(0).words[3] == COPIED | PLACE
    assert int(made.tables.read_l2(made.built.l2_offsets[0], 3, 1)[0]) == COPIED | PLACE
    assert made.storage.content == before


def test_a_missing_table_is_made_in_memory_first(tmp_path: Path) -> None:
    made = opened(four_tables(), tmp_path)
    assert made.tables.slice_at(1).host_offset == 0
    made.set_word(1, 3, COPIED | PLACE)
    entry = made.l1_entry(1)
    assert entry & COPIED and entry & OFFSET_MASK
    assert made.stored(made.built.l1_entry_offset(1)) == 0
    place = entry & OFFSET_MASK
    assert made.storage.content[place : place + CLUSTER] == bytes(CLUSTER)
    assert made.allocator.refcount(place // CLUSTER) == 1
    assert made.tables.read_l2(place, 0, 64).tolist() == [0, 0, 0, COPIED | PLACE, *[0] * 60]


def test_a_shared_table_is_copied_and_the_old_one_loses_a_reference_later(tmp_path: Path) -> None:
    image = four_tables()
    image.snapshot(b"1", b"then")
    made = opened(image, tmp_path)
    old = made.built.l2_offsets[0]
    content, words = bytes(made.storage.content), list(made.tables.slice_at(0).words)
    made.set_word(0, 3, COPIED | PLACE)
    entry = made.l1_entry(0)
    assert entry & COPIED and entry & OFFSET_MASK not in (0, old)
    words[3] = COPIED | PLACE
    assert list(made.tables.slice_at(0).words) == words
    assert made.tables.read_l2(entry & OFFSET_MASK, 0, 64).tolist() == words
    assert made.storage.content[: len(content)] == content
    assert made.allocator.refcount(old // CLUSTER) == 2
    assert [retired.clusters.tolist() for retired in made.allocator.take_retired()] == [[old // CLUSTER]]


def test_copied_and_a_refcount_of_two_is_no_table_of_ours(tmp_path: Path) -> None:
    image = four_tables()
    place = image.build(tmp_path / "first").l2_offsets[0]
    made = opened(image.refcount(place // CLUSTER, 2), tmp_path)
    with pytest.raises(CorruptImageError):
        made.tables.own(0)
    assert made.storage.content[79] & CORRUPT


def test_a_table_in_another_structure_is_refused(tmp_path: Path) -> None:
    made = opened(four_tables(), tmp_path)
    places = [made.built.l1_offset, made.built.refcount_table_offset, made.built.refcount_block_offsets[0]]
    for place in places:
        made.storage.write_from((COPIED | place).to_bytes(8, "big"), made.built.l1_entry_offset(1))
        with pytest.raises(CorruptImageError):
            made.tables.slice_at(1)
        with pytest.raises(CorruptImageError):
            made.tables.own(1)


def test_a_table_that_cannot_be_written_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = opened(four_tables(), tmp_path)

    def fail(buffer: bytes, host_offset: int) -> None:
        raise OSError(28, f"no space for {len(buffer)} bytes at {host_offset}")

    monkeypatch.setattr(made.storage, "write_from", fail)
    with pytest.raises(OSError, match="no space"):
        made.tables.own(1)
    assert made.l1_entry(1) == 0
    assert not made.tables.has_changes
    monkeypatch.undo()
    made.set_word(1, 0, ZERO)
    place = made.l1_entry(1) & OFFSET_MASK
    assert made.allocator.refcount(place // CLUSTER) == 1


# ---- what is kept


@pytest.mark.parametrize("cache_size", [0, 3000])
def test_what_has_changed_outlives_every_cache(cache_size: int, tmp_path: Path) -> None:
    image = ImageBuilder(40 * COVERAGE, 9)
    for table in range(0, 40, 2):
        image.data(64 * table, b"x")
    made = opened(image, tmp_path, cache_size)
    for key in range(40):
        made.set_word(key, key, COPIED | PLACE + key * CLUSTER)
    for _ in range(2):
        for key in range(40):
            assert made.tables.slice_at(key).words[key] == COPIED | PLACE + key * CLUSTER
        made.tables.forget()
    assert made.tables.changed_size == 40 * CLUSTER


def test_what_is_written_is_read_again_from_disk(tmp_path: Path) -> None:
    made = opened(four_tables(), tmp_path, 0)
    for key in range(4):
        made.set_word(key, 9, COPIED | PLACE)
    made.write(made.tables.take_writes())
    assert not made.tables.has_changes and not made.tables.changed_size
    made.tables.forget()
    for key in range(4):
        found = made.tables.slice_at(key)
        assert found.words[9] == made.stored(found.host_offset + 8 * 9) == COPIED | PLACE
        assert made.stored(made.built.l1_entry_offset(key)) == COPIED | found.host_offset


@pytest.mark.parametrize("extended", [False, True])
def test_any_window_of_a_table_shows_what_has_changed(extended: bool, tmp_path: Path) -> None:
    """Changed slices, such that are being written, and such that changed again meanwhile; a table has several."""
    bits, step = 14, 2 if extended else 1
    entries = (1 << bits) // (8 * step)
    image = ImageBuilder(2 * entries << bits, bits, extended_l2=extended).data(0, b"x").data(entries, b"y")
    made = opened(image, tmp_path, 0)
    chance = random.Random(1)
    per_slice = made.tables.slice_entries * step
    known = {
        table: np.frombuffer(made.storage.content, dtype=">u8", count=entries * step, offset=offset).astype(np.uint64)
        for table, offset in made.built.l2_offsets.items()
    }
    taken: TableWrites | None = None
    for _ in range(150):
        table, index, word = chance.randrange(2), chance.randrange(entries * step), chance.getrandbits(60)
        made.set_word((table * entries * step + index) // per_slice, index % per_slice, word)
        known[table][index] = word
        if taken is None and chance.random() < 0.1:
            taken = made.tables.take_writes()
        elif taken is not None and chance.random() < 0.2:
            if chance.random() < 0.5:
                made.write(taken)
            else:
                made.tables.put_back()
            taken = None
        for _ in range(4):
            first = chance.randrange(entries)
            count = chance.randint(1, entries - first)
            found = made.tables.read_l2(made.built.l2_offsets[table], first, count)
            assert (found == known[table][first * step : (first + count) * step]).all()
        key = chance.randrange(2 * entries * step // per_slice)
        words = np.concatenate([known[0], known[1]])[key * per_slice : (key + 1) * per_slice]
        assert list(made.tables.slice_at(key).words) == words.tolist()


# ---- what is owed to the disk


def test_writes_are_told_in_the_order_that_makes_them_safe(tmp_path: Path) -> None:
    """A table that no entry on disk names comes first, then its L1 entry and the tables that are named already."""
    made = opened(four_tables(), tmp_path)
    made.set_word(1, 3, COPIED | PLACE)
    made.set_word(0, 7, ZERO)
    writes = made.tables.take_writes()
    place = made.l1_entry(1) & OFFSET_MASK
    assert [host_offset for host_offset, _ in writes.unpublished] == [place]
    assert [host_offset for host_offset, _ in writes.slices] == [made.built.l2_offsets[0]]
    assert writes.l1_entries == [(made.built.l1_entry_offset(1), (COPIED | place).to_bytes(8, "big"))]
    assert writes.unpublished[0][1] == struct.pack(">64Q", *[0] * 3, COPIED | PLACE, *[0] * 60)
    assert writes.slices[0][1] == struct.pack(">64Q", *made.tables.slice_at(0).words)


def test_a_table_is_named_once_and_then_written_like_any_other(tmp_path: Path) -> None:
    made = opened(four_tables(), tmp_path)
    made.set_word(1, 3, COPIED | PLACE)
    made.write(made.tables.take_writes())
    made.set_word(1, 4, ZERO)
    writes = made.tables.take_writes()
    assert (writes.unpublished, writes.l1_entries) == ([], [])
    assert [host_offset for host_offset, _ in writes.slices] == [made.l1_entry(1) & OFFSET_MASK]


def test_changes_during_a_write_back_belong_to_the_next(tmp_path: Path) -> None:
    made = opened(four_tables(), tmp_path)
    made.set_word(0, 1, ZERO)
    made.set_word(1, 1, ZERO)
    writes = made.tables.take_writes()
    assert made.tables.changed_size == 0
    made.set_word(0, 2, ZERO)
    made.set_word(3, 2, ZERO)
    made.write(writes)
    assert made.tables.changed_size == 2 * CLUSTER
    assert made.stored(made.built.l2_entry_offset(1)) == ZERO
    assert made.stored(made.built.l2_entry_offset(2)) == 0
    assert int(made.tables.read_l2(made.built.l2_offsets[0], 2, 1)[0]) == ZERO
    again = made.tables.take_writes()
    assert {host_offset for host_offset, _ in again.slices} == {made.built.l2_offsets[0], made.built.l2_offsets[3]}
    assert not again.l1_entries
    made.write(again)
    assert not made.tables.has_changes


def test_a_table_that_is_replaced_during_a_write_back_is_not_forgotten(tmp_path: Path) -> None:
    """The L1 entry that the write-back wrote is not the newest one any more."""
    made = opened(four_tables(), tmp_path)
    made.set_word(1, 1, ZERO)
    writes = made.tables.take_writes()
    made.tables.drop_table(1)
    made.write(writes)
    assert made.tables.has_changes
    assert made.l1_entry(1) == 0
    again = made.tables.take_writes()
    assert again.l1_entries == [(made.built.l1_entry_offset(1), bytes(8))]


@pytest.mark.parametrize("is_named", [False, True])
def test_what_could_not_be_written_is_owed_still(is_named: bool, tmp_path: Path) -> None:
    """Once the disk may name a table it is no new one, whatever became of the rest."""
    made = opened(four_tables(), tmp_path)
    made.set_word(0, 1, ZERO)
    made.set_word(1, 1, ZERO)
    writes = made.tables.take_writes()
    made.set_word(0, 2, ZERO)
    if is_named:
        made.tables.publish(writes)
    made.tables.put_back()
    assert made.tables.changed_size == 2 * CLUSTER
    again = made.tables.take_writes()
    assert again.l1_entries == writes.l1_entries
    assert [len(again.unpublished), len(again.slices)] == ([0, 2] if is_named else [1, 1])
    stored = dict(again.slices)[made.built.l2_offsets[0]]
    assert struct.unpack_from(">2Q", stored, 8) == (ZERO, ZERO)


# ---- L1


def test_l1_entries_are_read_with_what_has_changed(tmp_path: Path) -> None:
    made = opened(four_tables(), tmp_path)
    before = made.tables.read_l1(0, 4).tolist()
    made.tables.own(1)
    made.tables.drop_table(2)
    place = made.l1_entry(1)
    assert place & COPIED
    expected = [before[0], place, 0, before[3]]
    for first in range(4):
        for end in range(first, 5):
            assert made.tables.read_l1(first, end - first).tolist() == expected[first:end]


def test_the_next_table_is_found_however_far_it_is(tmp_path: Path) -> None:
    image = ImageBuilder(30000 * COVERAGE, 9).l2_table(5).l2_table(8197).l2_table(29999)
    made = opened(image, tmp_path)
    search = made.tables.next_table
    assert [search(index, 30000) for index in (0, 5, 6, 8196, 8197, 8198, 29999)] == [
        5, 5, 8197, 8197, 8197, 29999, 29999,
    ]  # fmt: skip
    assert [search(0, 5), search(0, 6), search(6, 100), search(7, 7)] == [5, 5, 100, 7]
    made.tables.own(20000)
    made.tables.drop_table(29999)
    assert [search(8198, 30000), search(20001, 30000)] == [20000, 30000]


def test_a_dropped_table_maps_nothing_and_is_retired(tmp_path: Path) -> None:
    made = opened(four_tables(), tmp_path)
    place = made.built.l2_offsets[2]
    assert made.tables.slice_at(2).words[0]
    made.tables.drop_table(2)
    made.tables.drop_table(1)  # there is none
    assert made.tables.slice_at(2).host_offset == 0 and not any(made.tables.slice_at(2).words)
    assert 2 not in made.tables.write_lane
    assert [each.clusters.tolist() for each in made.allocator.take_retired()] == [[place // CLUSTER]]


# ---- the lanes


def runs(lane: memoryview) -> dict[int, tuple[int, int]]:
    """Host offset and clusters in line by index."""
    return {index: (word & ~RUN_MASK, word & RUN_MASK) for index, word in enumerate(lane) if word}


def test_only_what_is_ours_may_be_written_straight(tmp_path: Path) -> None:
    """Read straight, yes: a cluster that a snapshot shares, one without COPIED, one with another refcount than 1."""
    image = ImageBuilder(COVERAGE, 9)
    snapshot = image.map().data(1, b"x", host_offset=50 * CLUSTER)
    image.data(0, b"x").data(1, b"x", host_offset=50 * CLUSTER).data(2, b"x").data(3, b"x", copied=False)
    image.data(4, b"x").zero(5, preallocated=True).compressed(6, b"x").data(7, b"x", host_offset=60 * CLUSTER)
    image.data(8, b"x", host_offset=50 * CLUSTER, copied=True).data(63, b"x")
    image.snapshot(b"1", b"then", snapshot).refcount(60, 2)
    made = opened(image, tmp_path)
    found = made.tables.slice_for_writing(0)
    assert set(runs(found.lane)) == {0, 1, 2, 3, 4, 7, 8, 63}
    assert found.write_lane is not None and set(runs(found.write_lane)) == {0, 2, 4, 63}
    assert made.tables.write_lane[0] is found.write_lane
    for index, (host_offset, _) in runs(found.write_lane).items():
        assert host_offset == made.built.data_offsets[index]


def test_a_structure_is_never_written_straight(tmp_path: Path) -> None:
    image = ImageBuilder(COVERAGE, 9).data(0, b"x").l2_table(0)
    built = image.build(tmp_path / "first")
    structures = [built.l1_offset, built.l2_offsets[0], built.refcount_table_offset, built.refcount_block_offsets[0]]
    for index, place in enumerate(structures, 1):
        image.entry(index, COPIED | place)
    made = opened(image, tmp_path)
    found = made.tables.slice_for_writing(0)
    assert found.write_lane is not None and set(runs(found.write_lane)) == {0}


def test_with_bitmaps_to_keep_nothing_is_written_straight_at_first(tmp_path: Path) -> None:
    made = opened(four_tables(), tmp_path, tracks_changes=True)
    found = made.tables.slice_for_writing(0)
    assert found.write_lane is not None and not runs(found.write_lane) and runs(found.lane)
    made.tables.enter_lanes(0, found, [(5, 1, made.built.data_offsets[5])], may_write=True)
    assert found.write_lane is not None
    assert runs(found.write_lane) == {5: (made.built.data_offsets[5], 1)}


def test_clusters_of_a_data_file_need_copied_alone(tmp_path: Path) -> None:
    image = ImageBuilder(COVERAGE, 9).data_file(tmp_path / "data", b"data")
    image.data(0, b"x").data(1, b"x").data(2, b"x", copied=False).entry(3, COPIED | 9 * CLUSTER)
    found = opened(image, tmp_path).tables.slice_for_writing(0)
    assert found.write_lane is not None
    assert runs(found.write_lane) == {0: (0, 2), 1: (CLUSTER, 1)}


def test_extended_clusters_are_written_straight_if_all_of_them_is_there(tmp_path: Path) -> None:
    image = ImageBuilder(20 << 14, 14, extended_l2=True).data(0, b"x").subclusters(1, b"x", allocated=ALL_PARTS >> 1)
    image.subclusters(2, b"x", allocated=ALL_PARTS, copied=False).subclusters(3, b"x", allocated=1, zero=ALL_PARTS - 1)
    found = opened(image, tmp_path).tables.slice_for_writing(0)
    assert found.write_lane is not None and set(runs(found.write_lane)) == {0}
    assert set(runs(found.lane)) == {0, 2}


def in_line(places: list[tuple[int, int]], chance: random.Random) -> list[tuple[int, int, int]]:
    """Clusters in line taken together, mostly."""
    taken: list[tuple[int, int, int]] = []
    for index, host_offset in places:
        first, count, start = taken[-1] if taken else (-1, 0, 0)
        if (first + count, start + count * CLUSTER) == (index, host_offset) and chance.random() < 0.8:
            taken[-1] = (first, count + 1, start)
        else:
            taken.append((index, 1, host_offset))
    return taken


@pytest.mark.parametrize("tracks_changes", [False, True])
def test_lanes_tell_the_truth_whatever_comes_and_goes(tracks_changes: bool, tmp_path: Path) -> None:
    """A run never promises a cluster that is not in line; after joining, runs are as long as they are."""
    made = opened(four_tables(), tmp_path, tracks_changes=tracks_changes)
    chance = random.Random(2)
    found = made.tables.slice_for_writing(0)
    read = {index: host_offset for index, (host_offset, _) in runs(found.lane).items()}
    write = {} if tracks_changes else dict(read)
    for _ in range(400):
        first = chance.randrange(64)
        end = chance.randint(first + 1, min(first + 12, 64))
        if chance.random() < 0.6:
            start = PLACE + chance.choice([0, 0, 0, 40]) * CLUSTER  # mostly in line with each other
            may_write = chance.random() < 0.7
            places = [(index, start + index * CLUSTER) for index in range(first, end) if chance.random() < 0.9]
            if not places:
                continue
            made.tables.enter_lanes(0, found, in_line(places, chance), may_write=may_write)
            for index in range(places[0][0], places[-1][0] + 1):
                read.pop(index, None)
                write.pop(index, None)
            read.update(places)
            write.update(places if may_write else [])
        else:
            made.tables.leave_lanes(found, first, end)
            for index in range(first, end):
                read.pop(index, None)
                write.pop(index, None)
        joined = chance.random() < 0.1
        if joined:
            made.tables.join_lanes(found)
        found = made.tables.slice_for_writing(0)
        assert found.write_lane is not None
        for lane, truth in ((found.lane, read), (found.write_lane, write)):
            told = runs(lane)
            assert {index: host_offset for index, (host_offset, _) in told.items()} == truth
            for index, (host_offset, count) in told.items():
                assert all(truth.get(index + step) == host_offset + step * CLUSTER for step in range(count))
                if joined:
                    assert truth.get(index + count) != host_offset + count * CLUSTER


def test_a_moved_table_leaves_no_lane_behind(tmp_path: Path) -> None:
    image = four_tables()
    image.snapshot(b"1", b"then")
    made = opened(image, tmp_path)
    old = made.tables.slice_for_writing(0)
    made.tables.own(0)
    assert made.tables.write_lane[0] is not old.write_lane
    assert made.tables.lane[0] is not old.lane


def test_another_size_of_the_disk_is_another_end_of_the_lanes(tmp_path: Path) -> None:
    image = ImageBuilder(COVERAGE, 9)
    for cluster in range(64):
        image.data(cluster, b"x")
    made = opened(image, tmp_path)
    source = made.tables.source
    assert len(runs(made.tables.slice_for_writing(0).lane)) == 64
    made.tables.move(source.l1_table_offset, source.l1_size, 10 * CLUSTER)
    assert not made.tables.lane and not made.tables.write_lane
    found = made.tables.slice_for_writing(0)
    assert found.write_lane is not None
    assert len(runs(found.lane)) == len(runs(found.write_lane)) == 10


def test_a_changed_slice_stays_what_it_is_when_those_around_are_read(tmp_path: Path) -> None:
    size = 1 << 16
    made = opened(ImageBuilder(2048 * size, 16).data(0, b"x").data(600, b"y"), tmp_path)
    found = made.tables.own(1)
    found.words[7] = COPIED | 40 * size
    made.tables.changed(1, found)
    made.tables.forget()
    assert made.tables.slice_at(0).words[0] == COPIED | made.built.data_offsets[0]
    assert made.tables.slice_at(1) is found
    assert 2 in made.tables.lane, "not read together"
