"""L1 and L2 tables: what is read, what is refused, what is kept, and what may go down the lane."""

from __future__ import annotations

import random

import pytest

from qcow2_plugin.engine.header import read_header
from qcow2_plugin.engine.tables import RUN_MASK, Tables, TableSource
from qcow2_plugin.errors import CorruptImageError, TruncatedImageError
from qcow2_plugin.format.snapshots import Snapshot
from tests.support.fields import ALL_PARTS, COMPRESSED, COPIED, ZERO
from tests.support.mapped import Mapped, mapped_image

CLUSTER = 512  # 64 entries a table, 32 KiB of guest per table
COVERAGE = 64 * CLUSTER
DATA = 40 * CLUSTER


def opened(made: Mapped, cache_size: int = 1 << 20, *, allow_damaged: bool = False) -> Tables:
    header = read_header(made.storage)
    return Tables(TableSource.of(header, made.storage, None, allow_damaged=allow_damaged), cache_size)


def lane(made: Mapped, key: int = 0, *, allow_damaged: bool = False) -> list[tuple[int, int]]:
    """(host offset, clusters in line) of every cluster of a slice."""
    words = opened(made, allow_damaged=allow_damaged).slice_at(key).lane
    return [(word & ~RUN_MASK, word & RUN_MASK) for word in words]


# ---- geometry of slices


@pytest.mark.parametrize(
    ("cluster_bits", "extended_l2", "entries"), [(9, False, 64), (12, False, 512), (16, False, 512), (16, True, 256)]
)
def test_a_slice_has_up_to_4_kib(cluster_bits: int, extended_l2: bool, entries: int) -> None:
    made = mapped_image({}, virtual_size=1 << 20, cluster_bits=cluster_bits, extended_l2=extended_l2, clusters=0)
    tables = opened(made)
    assert tables.slice_entries == entries
    assert 1 << tables.slice_bits == entries << cluster_bits
    found = tables.slice_at(0)
    assert (len(found.words), len(found.lane)) == (entries * (2 if extended_l2 else 1), entries)


def test_every_slice_of_a_table_is_found_at_its_place() -> None:
    size = 1 << 14  # 2048 entries, 4 slices
    words = {0: size * 100, 511: size * 101, 512: size * 102, 2047: size * 103}
    made = mapped_image({0: {}, 1: words}, virtual_size=2048 * size * 2, cluster_bits=14)
    tables = opened(made)
    assert [tables.slice_at(4 + index).host_offset for index in range(4)] == [
        made.l2_offsets[1] + 4096 * index for index in range(4)
    ]
    assert [tables.slice_at(4).words[0], tables.slice_at(4).words[511]] == [size * 100, size * 101]
    assert [tables.slice_at(5).words[0], tables.slice_at(7).words[511]] == [size * 102, size * 103]
    assert not any(tables.slice_at(0).words)


def one_after_the_other(made: Mapped) -> Tables:
    """Slices read alone, because not all of them can be kept."""
    return opened(made, cache_size=8 << 10)


@pytest.mark.parametrize("extended_l2", [False, True])
@pytest.mark.parametrize("kind", ["in line", "in line but for one", "anything"])
def test_slices_that_are_read_together_are_those_read_alone(kind: str, extended_l2: bool) -> None:
    chance = random.Random(3)
    size, entries = 1 << 16, 4096 if extended_l2 else 8192
    words: dict[int, tuple[int, int]] = {}
    if kind == "anything":
        for index in chance.sample(range(entries), entries // 2):
            word = chance.choice([COPIED, COPIED, 0, COMPRESSED, 1]) | chance.randrange(300) * size
            words[index] = (word, chance.choice([ALL_PARTS, ALL_PARTS, 7]))
    elif kind == "in line but for one":
        words[700] = (0, 0)
    made = mapped_image(
        {0: words if extended_l2 else {index: word for index, (word, _) in words.items()}},
        virtual_size=entries * size - size // 2,
        cluster_bits=16,
        extended_l2=extended_l2,
        patterns={} if kind == "anything" else {0: (COPIED | 4 * size, size)},
        clusters=entries,
    )
    together, alone = opened(made), one_after_the_other(made)
    for key in chance.sample(range(16), 16):
        found, other = together.slice_at(key), alone.slice_at(key)
        assert list(found.words) == list(other.words)
        assert list(found.lane) == list(other.lane)
        assert found.host_offset == other.host_offset
    assert sum(map(bool, alone.slice_at(1).lane)) > 30


def test_a_table_is_read_once_if_all_can_be_kept() -> None:
    size = 1 << 16
    made = mapped_image({0: {0: 5 * size, 512: 5 * size}}, virtual_size=8192 * size, cluster_bits=16)
    together, alone = opened(made), one_after_the_other(made)
    for tables in (together, alone):
        tables.slice_at(0)
    offset = made.l2_offsets[0] + 4096
    made.storage.content[offset : offset + 8] = bytes(8)
    assert together.slice_at(1).words[0] == 5 * size
    assert together.lane[1] is together.slice_at(1).lane
    assert alone.slice_at(1).words[0] == 0


def test_words_are_plain_ints() -> None:
    found = opened(mapped_image({0: {0: DATA}}, virtual_size=COVERAGE)).slice_at(0)
    assert type(found.words[0]) is int
    assert type(found.lane[0]) is int


def test_read_l1_and_l2() -> None:
    made = mapped_image({0: {3: DATA}, 2: {63: COMPRESSED | 5}}, virtual_size=3 * COVERAGE)
    tables = opened(made)
    assert tables.read_l1(0, 3).tolist() == [made.l2_offsets[0] | COPIED, 0, made.l2_offsets[2] | COPIED]
    assert tables.read_l1(1, 1).tolist() == [0]
    assert tables.read_l2(made.l2_offsets[0], 2, 3).tolist() == [0, DATA, 0]
    assert tables.read_l2(made.l2_offsets[2], 63, 1).tolist() == [COMPRESSED | 5]


def test_extended_words_come_in_pairs() -> None:
    made = mapped_image({0: {1: (7 << 14, 9)}}, virtual_size=1 << 20, cluster_bits=14, extended_l2=True)
    tables = opened(made)
    assert tables.read_l2(made.l2_offsets[0], 1, 2).tolist() == [7 << 14, 9, 0, 0]
    assert list(tables.slice_at(0).words[2:4]) == [7 << 14, 9]


def test_a_snapshot_has_tables_of_its_own() -> None:
    made = mapped_image({0: {}}, virtual_size=COVERAGE)
    header = read_header(made.storage)
    extra = bytes(8) + (3 * COVERAGE + 100).to_bytes(8, "big")
    snapshot = Snapshot(0x7000, 17, b"1", b"", 0, 0, 0, 0, extra)
    source = TableSource.of(header, made.storage, snapshot, allow_damaged=True)
    assert (source.l1_table_offset, source.l1_size, source.virtual_size) == (0x7000, 17, 3 * COVERAGE)
    active = TableSource.of(header, made.storage, None, allow_damaged=False)
    assert (active.l1_table_offset, active.l1_size, active.virtual_size) == (1024, 1, COVERAGE)
    assert (source.allow_damaged, active.allow_damaged) == (True, False)


@pytest.mark.parametrize(("version", "extended_l2", "flag"), [(2, False, False), (3, False, True), (3, True, False)])
def test_who_has_a_zero_flag(version: int, extended_l2: bool, flag: bool) -> None:
    made = mapped_image({}, virtual_size=1 << 20, cluster_bits=14, version=version, extended_l2=extended_l2)
    rules = TableSource.of(read_header(made.storage), made.storage, None, allow_damaged=False).rules
    assert rules.has_zero_flag is flag
    assert rules.has_data_file is False


# ---- L1 entries


@pytest.mark.parametrize("word", [0, 0x1FF, 0x3F << 56])
def test_an_l1_entry_without_a_table(word: int) -> None:
    made = mapped_image({}, virtual_size=COVERAGE, l1_words={0: word})
    assert opened(made).slice_at(0).host_offset == 0
    assert not any(opened(made).slice_at(0).words)


@pytest.mark.parametrize("word", [COPIED, COPIED | 1])
def test_an_l1_entry_that_is_only_copied_is_corrupt(word: int) -> None:
    made = mapped_image({}, virtual_size=COVERAGE, l1_words={0: word})
    with pytest.raises(CorruptImageError, match=rf"L1 table at host offset 0x400: entry 0 is {word:#x}.*\(memory\)"):
        opened(made).slice_at(0)


@pytest.mark.parametrize("cluster_bits", [10, 16, 21])
def test_an_l2_table_starts_at_a_cluster(cluster_bits: int) -> None:
    for bit in range(9, cluster_bits):
        word = 3 << cluster_bits | 1 << bit
        made = mapped_image({}, virtual_size=1 << 20, cluster_bits=cluster_bits, l1_words={0: word}, clusters=3)
        with pytest.raises(CorruptImageError, match="no place for an L2 table"):
            opened(made).slice_at(0)


@pytest.mark.parametrize("word", [512, 1024, 512 | COPIED, 1024 | COPIED])
def test_an_l2_table_must_not_lie_in_other_tables(word: int) -> None:
    made = mapped_image({}, virtual_size=COVERAGE, l1_words={0: word})
    name = "refcount table" if word & 512 else "L1 table"
    with pytest.raises(CorruptImageError, match=rf"entry 0 points into the {name}"):
        opened(made).slice_at(0)


def test_an_l2_table_may_touch_other_tables() -> None:
    made = mapped_image({0: {0: DATA}}, virtual_size=64 * COVERAGE)
    assert made.l2_offsets[0] == made.l1_offset + 512
    assert opened(made).slice_at(0).words[0] == DATA


def test_reserved_bits_of_an_l1_entry_mean_nothing_to_a_reader() -> None:
    made = mapped_image({0: {0: DATA}}, virtual_size=COVERAGE)
    made = mapped_image({0: {0: DATA}}, virtual_size=COVERAGE, l1_words={0: made.l2_offsets[0] | 0x3F << 56 | 0x1FF})
    assert opened(made).slice_at(0).words[0] == DATA


def test_behind_the_l1_table_nothing_is_mapped() -> None:
    made = mapped_image({0: {}}, virtual_size=COVERAGE)
    assert opened(made).slice_at(1).host_offset == 0
    assert opened(made).slice_at(1 << 40).host_offset == 0


def test_a_word_right_behind_the_l1_table_is_none_of_its_entries() -> None:
    made = mapped_image({0: {0: DATA}}, virtual_size=COVERAGE)
    made.storage.content[made.l1_offset + 8 : made.l1_offset + 16] = made.l2_offsets[0].to_bytes(8, "big")
    assert opened(made).slice_at(1).host_offset == 0


def test_l1_entries_behind_the_disk_are_not_looked_at() -> None:
    made = mapped_image({0: {0: DATA}}, virtual_size=COVERAGE, l1_size=8, l1_words={1: COPIED, 7: 513})
    assert opened(made).slice_at(0).words[0] == DATA


# ---- truncated files


def test_a_table_past_the_end_of_the_file_is_truncated() -> None:
    made = mapped_image({}, virtual_size=COVERAGE, l1_words={0: 100 * CLUSTER}, clusters=97, cut=100 * CLUSTER + 511)
    with pytest.raises(TruncatedImageError, match=r"L2 table at host offset 0xc800: .*\(memory\)"):
        opened(made).slice_at(0)
    assert not any(opened(made, allow_damaged=True).slice_at(0).words)


def test_a_damaged_table_is_read_as_far_as_it_goes() -> None:
    made = mapped_image({0: {0: DATA, 63: DATA}}, virtual_size=COVERAGE, clusters=0)
    made.storage.content = made.storage.content[: made.l2_offsets[0] + 511]
    words = opened(made, allow_damaged=True).slice_at(0).words
    assert (words[0], words[63]) == (DATA, DATA & ~0xFF)


def test_an_l1_table_past_the_end_of_the_file_is_truncated() -> None:
    made = mapped_image({}, virtual_size=COVERAGE * 64, cut=1024 + 511)
    with pytest.raises(TruncatedImageError, match="L1 table"):
        opened(made).slice_at(63)
    assert opened(made).slice_at(62).host_offset == 0
    assert opened(made, allow_damaged=True).slice_at(63).host_offset == 0


# ---- the lane


def test_clusters_in_line_know_how_many_follow() -> None:
    words = {0: DATA, 1: DATA + 512, 2: DATA + 1024, 4: DATA, 5: DATA, 6: DATA + 512, 63: DATA}
    found = lane(mapped_image({0: words}, virtual_size=COVERAGE))
    assert found[:8] == [
        (DATA, 3),
        (DATA + 512, 2),
        (DATA + 1024, 1),
        (0, 0),
        (DATA, 1),
        (DATA, 2),
        (DATA + 512, 1),
        (0, 0),
    ]
    assert found[63] == (DATA, 1)


def test_a_whole_slice_in_line() -> None:
    made = mapped_image({0: {}}, patterns={0: (DATA | COPIED, 512)}, virtual_size=COVERAGE, clusters=200)
    assert lane(made) == [(DATA + 512 * index, 64 - index) for index in range(64)]


def test_a_run_counts_to_511() -> None:
    made = mapped_image({0: {}}, patterns={0: (1 << 20, 4096)}, virtual_size=2 << 20, cluster_bits=12, clusters=1024)
    found = lane(made)
    assert [count for _, count in found] == [511, *range(511, 0, -1)]
    assert found[0] == (1 << 20, 511)


@pytest.mark.parametrize("word", [0, COPIED, ZERO, DATA | ZERO, COMPRESSED | DATA, COMPRESSED | COPIED | DATA, 1 << 40])
def test_what_is_not_plain_data_is_not_in_the_lane(word: int) -> None:
    found = lane(mapped_image({0: {0: DATA, 1: word, 2: DATA}}, virtual_size=COVERAGE))
    assert found[:3] == [(DATA, 1), (0, 0), (DATA, 1)]


def test_unaligned_offsets_are_not_in_the_lane() -> None:
    made = mapped_image({0: {0: 1024 + 512}}, virtual_size=1 << 20, cluster_bits=10)
    assert lane(made)[0] == (0, 0)


def test_reserved_bits_do_not_keep_out_of_the_lane_nor_into_it() -> None:
    word = DATA | 0x3F << 56 | 0x1FE
    assert lane(mapped_image({0: {0: word}}, virtual_size=COVERAGE))[0] == (DATA, 1)


@pytest.mark.parametrize(("missing", "inside"), [(0, True), (1, False), (511, False), (512, False)])
def test_a_cluster_partly_past_the_end_of_the_file_is_not_in_the_lane(missing: int, inside: bool) -> None:
    made = mapped_image({0: {0: DATA}}, virtual_size=COVERAGE, cut=DATA + 512 - missing)
    assert lane(made)[0] == ((DATA, 1) if inside else (0, 0))
    assert lane(made, allow_damaged=True)[0] == ((DATA, 1) if inside else (0, 0))


@pytest.mark.parametrize("clusters", [0, 1, 5, 63, 64])
def test_the_lane_ends_with_the_last_whole_cluster_of_the_disk(clusters: int) -> None:
    made = mapped_image({0: {}}, patterns={0: (DATA, 512)}, virtual_size=clusters * 512, l1_size=1, clusters=200)
    assert [count for _, count in lane(made)] == [clusters - index if index < clusters else 0 for index in range(64)]


def test_a_partial_last_cluster_is_not_in_the_lane() -> None:
    made = mapped_image(
        {0: {}}, patterns={0: (1 << 14, 4096)}, virtual_size=4096 * 3 + 512, cluster_bits=12, clusters=64
    )
    assert [count for _, count in lane(made)[:5]] == [3, 2, 1, 0, 0]


def test_with_a_data_file_the_lane_is_where_host_equals_guest() -> None:
    words = {0: COPIED, 1: 512, 2: 1024 | COPIED, 3: 2048, 4: 2048 | COPIED | ZERO, 5: 5 * 512}
    made = mapped_image({0: words}, virtual_size=COVERAGE, data_file=True, clusters=0)
    found = lane(made)
    assert found[:6] == [(0, 3), (512, 2), (1024, 1), (0, 0), (0, 0), (2560, 1)]


def test_data_file_cluster_0_needs_its_copied_bit() -> None:
    made = mapped_image({0: {0: 0}}, virtual_size=COVERAGE, data_file=True)
    assert lane(made)[0] == (0, 0)


def test_with_a_data_file_later_tables_map_later_clusters() -> None:
    made = mapped_image({1: {0: COVERAGE, 1: 512}}, virtual_size=2 * COVERAGE, data_file=True)
    assert lane(made, 1)[:2] == [(COVERAGE, 1), (0, 0)]


def test_subclusters_are_in_the_lane_when_all_are_data() -> None:
    size = 1 << 14
    words = {0: (8 * size, ALL_PARTS), 1: (9 * size | 1, ALL_PARTS), 2: (10 * size, ALL_PARTS >> 1), 3: (0, 0)}
    words |= {4: (COMPRESSED | 8 * size, 0), 5: (8 * size, ALL_PARTS | 1 << 40), 6: (0, ALL_PARTS)}
    made = mapped_image({0: words}, virtual_size=1 << 20, cluster_bits=14, extended_l2=True)
    assert lane(made)[:7] == [(8 * size, 2), (9 * size, 1), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0)]


# ---- what is kept

SLICE_COST = 512 + 8 * 64 + 1200


def many(count: int = 8) -> Mapped:
    tables = {index: {0: DATA} for index in range(count)}
    return mapped_image(tables, virtual_size=count * COVERAGE)


def changed(made: Mapped) -> None:
    """Overwrite all L2 tables, so that what is read anew is seen."""
    for offset in made.l2_offsets.values():
        made.storage.content[offset : offset + 8] = bytes(8)


def test_a_slice_is_read_once() -> None:
    made = many()
    tables = opened(made)
    first = tables.slice_at(3)
    changed(made)
    assert tables.slice_at(3) is first
    assert tables.lane[3] is first.lane
    assert tables.slice_at(4).words[0] == 0


def test_slices_outlive_one_change_of_generation_and_not_two() -> None:
    made = many()
    tables = opened(made, cache_size=2 * 2 * SLICE_COST)  # two slices make a generation
    kept = [tables.slice_at(index) for index in range(3)]
    assert sorted(tables.lane) == [0, 1, 2]
    changed(made)
    assert tables.slice_at(0) is kept[0]
    assert sorted(tables.lane) == [0, 1, 2]
    assert tables.slice_at(3).words[0] == 0  # 0 and 2 are the old generation now, 1 is forgotten
    assert sorted(tables.lane) == [0, 2, 3]
    assert tables.slice_at(1) is not kept[1]
    assert sorted(tables.lane) == [0, 1, 2, 3]


def test_without_any_room_the_latest_slice_is_kept() -> None:
    made = many()
    tables = opened(made, cache_size=0)
    first = tables.slice_at(0)
    assert tables.slice_at(0) is first
    tables.slice_at(1)
    assert sorted(tables.lane) == [0, 1]
    assert tables.slice_at(0) is first
    tables.slice_at(1)
    tables.slice_at(2)
    assert tables.slice_at(0) is not first


def test_the_cache_is_bounded() -> None:
    made = many(200)
    cache_size = 20 * SLICE_COST
    tables = opened(made, cache_size)
    most = 0
    for _ in range(3):
        for index in range(200):
            tables.slice_at(index)
            most = max(most, len(tables.lane))
    assert most == 20


def test_missing_tables_cost_less_but_something() -> None:
    made = mapped_image({}, virtual_size=1000 * COVERAGE)
    tables = opened(made, cache_size=2 * 10 * 120)
    most = 0
    for index in range(1000):
        tables.slice_at(index)
        most = max(most, len(tables.lane))
    assert most == 20


def test_forgetting_forgets_everything() -> None:
    made = many()
    tables = opened(made)
    first = tables.slice_at(0)
    tables.forget()
    assert not tables.lane
    assert tables.slice_at(0) is not first


def test_a_lane_is_gone_with_its_generation() -> None:
    tables = opened(many(), cache_size=2 * SLICE_COST)
    shared = tables.lane
    for index in range(3):
        tables.slice_at(index)
    assert sorted(shared) == [1, 2]
    assert shared is tables.lane
