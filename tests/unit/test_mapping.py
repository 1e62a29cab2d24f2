"""Where guest ranges live: `resolve` and `runs` over tables of every sort."""

from __future__ import annotations

import contextlib
import itertools

import pytest

from qcow2_plugin.engine.header import read_header
from qcow2_plugin.engine.mapping import Mapping
from qcow2_plugin.engine.tables import Tables, TableSource
from qcow2_plugin.errors import CorruptImageError, TruncatedImageError
from qcow2_plugin.extent import Extent, ExtentKind, merge
from tests.support.fields import COMPRESSED, COPIED, ZERO
from tests.support.mapped import Mapped, mapped_image
from tests.support.memory import MemoryStorage

CLUSTER = 512
COVERAGE = 64 * CLUSTER
DATA = 40 * CLUSTER

DATA_KIND, ZERO_KIND = ExtentKind.DATA, ExtentKind.ZERO
PACKED, UNALLOCATED = ExtentKind.COMPRESSED, ExtentKind.UNALLOCATED


def mapping(made: Mapped, *, allow_damaged: bool = False) -> Mapping:
    header = read_header(made.storage)
    return Mapping(Tables(TableSource.of(header, made.storage, None, allow_damaged=allow_damaged), 1 << 20))


def told(made: Mapped, offset: int, length: int, *, allow_damaged: bool = False) -> list[Extent]:
    """The extents of a range as `resolve` has them, after `runs` said the same."""
    found = mapping(made, allow_damaged=allow_damaged)
    resolved = found.resolve(offset, length)
    assert list(merge(map(without_place, found.runs(offset, length)))) == list(merge(map(without_place, resolved)))
    return resolved


def without_place(extent: Extent) -> Extent:
    """Runs of compressed clusters have none."""
    return extent._replace(host_offset=None) if extent.kind is PACKED else extent


def extent(guest: int, length: int, kind: ExtentKind, host: int | None = None, stored: int = 0) -> Extent:
    return Extent(guest, length, kind, host, stored)


def test_nothing_is_no_extent() -> None:
    assert told(mapped_image({}, virtual_size=COVERAGE), 0, 0) == []


def test_an_empty_disk_is_one_extent() -> None:
    made = mapped_image({}, virtual_size=100 * COVERAGE)
    assert told(made, 0, 100 * COVERAGE) == [extent(0, 100 * COVERAGE, UNALLOCATED)]
    assert told(made, 5, 1) == [extent(5, 1, UNALLOCATED)]


def test_every_kind_of_a_standard_entry() -> None:
    words = {1: DATA, 2: DATA + 512 | COPIED, 3: ZERO, 4: DATA | ZERO, 5: COMPRESSED | 1 << 61 | DATA + 7, 7: DATA}
    made = mapped_image({0: words}, virtual_size=COVERAGE)
    assert told(made, 0, 8 * 512) == [
        extent(0, 512, UNALLOCATED),
        extent(512, 1024, DATA_KIND, DATA),
        extent(1536, 512, ZERO_KIND),
        extent(2048, 512, ZERO_KIND, DATA),
        extent(2560, 512, PACKED, DATA + 7, 1024 - 7),
        extent(3072, 512, UNALLOCATED),
        extent(3584, 512, DATA_KIND, DATA),
    ]


def test_ranges_are_cut_to_what_was_asked() -> None:
    words = {0: DATA, 1: DATA + 512, 2: DATA | ZERO, 3: COMPRESSED | DATA}
    made = mapped_image({0: words}, virtual_size=COVERAGE)
    assert told(made, 100, 600) == [extent(100, 600, DATA_KIND, DATA + 100)]
    assert told(made, 1023, 2) == [extent(1023, 1, DATA_KIND, DATA + 1023), extent(1024, 1, ZERO_KIND, DATA)]
    assert told(made, 1100, 1) == [extent(1100, 1, ZERO_KIND, DATA + 76)]
    assert told(made, 1600, 10) == [extent(1600, 10, PACKED, DATA, 512)]


def test_resolve_keeps_compressed_clusters_apart() -> None:
    made = mapped_image({0: {0: COMPRESSED | DATA, 1: COMPRESSED | DATA + 100}}, virtual_size=COVERAGE)
    assert told(made, 0, 1024) == [extent(0, 512, PACKED, DATA, 512), extent(512, 512, PACKED, DATA + 100, 412)]
    assert list(mapping(made).runs(0, 1024)) == [extent(0, 1024, PACKED, None, 924)]


def test_extents_go_on_across_tables() -> None:
    made = mapped_image({0: {63: DATA}, 1: {0: DATA + 512}, 3: {0: ZERO}}, virtual_size=4 * COVERAGE)
    assert told(made, COVERAGE - 512, 1024) == [extent(COVERAGE - 512, 1024, DATA_KIND, DATA)]
    assert told(made, COVERAGE + 512, 2 * COVERAGE) == [
        extent(COVERAGE + 512, 2 * COVERAGE - 512, UNALLOCATED),
        extent(3 * COVERAGE, 512, ZERO_KIND),
    ]


def test_what_lies_behind_a_short_l1_table_is_unallocated() -> None:
    made = mapped_image({0: {63: ZERO}}, virtual_size=COVERAGE)
    source = TableSource.of(read_header(made.storage), made.storage, None, allow_damaged=False)
    found = Mapping(Tables(source, 1 << 20))
    assert list(found.runs(COVERAGE - 512, 2 * COVERAGE)) == found.resolve(COVERAGE - 512, 2 * COVERAGE)
    assert found.resolve(COVERAGE, COVERAGE) == [extent(COVERAGE, COVERAGE, UNALLOCATED)]
    assert list(found.runs(5 * COVERAGE, 3)) == [extent(5 * COVERAGE, 3, UNALLOCATED)]


def test_a_long_run_of_data_is_one_extent() -> None:
    made = mapped_image({0: {}}, patterns={0: (1 << 20, 4096)}, virtual_size=512 * 4096, cluster_bits=12, clusters=1024)
    assert told(made, 0, 512 * 4096) == [extent(0, 512 * 4096, DATA_KIND, 1 << 20)]
    assert told(made, 4097, 511 * 4096 - 4) == [extent(4097, 511 * 4096 - 4, DATA_KIND, (1 << 20) + 4097)]


def test_tables_that_l1_entries_share_are_told_at_every_place() -> None:
    words = {0: DATA, 1: COMPRESSED | DATA, 63: ZERO}
    made = mapped_image({0: words}, virtual_size=5 * COVERAGE, shared={1: 0, 2: 0, 4: 0})
    extents = told(made, 0, 5 * COVERAGE)
    assert [each.guest_offset for each in extents if each.kind is DATA_KIND] == [
        0,
        COVERAGE,
        2 * COVERAGE,
        4 * COVERAGE,
    ]
    assert sum(each.length for each in extents) == 5 * COVERAGE


@pytest.mark.parametrize("data_file", [False, True])
def test_a_shared_table_of_one_kind_is_walked_once(data_file: bool) -> None:
    words = {0: {index: ZERO for index in range(64)}}
    made = mapped_image(words, virtual_size=64 * COVERAGE, data_file=data_file)
    shared = {index: made.l2_offsets[0] for index in range(64)}
    made = mapped_image(words, virtual_size=64 * COVERAGE, data_file=data_file, l1_words=shared)
    assert len(list(mapping(made).runs(7, 63 * COVERAGE))) <= 4
    told(made, 7, 63 * COVERAGE)


@pytest.mark.parametrize(("offset", "length"), [(0, 3 * COVERAGE), (700, 2 * COVERAGE), (COVERAGE, COVERAGE + 600)])
def test_shared_compressed_tables_count_what_is_stored(offset: int, length: int) -> None:
    words = {index: COMPRESSED | DATA for index in range(64)}
    made = mapped_image({0: words}, virtual_size=3 * COVERAGE, shared={1: 0, 2: 0})
    made = mapped_image({0: words}, virtual_size=3 * COVERAGE, l1_words=dict.fromkeys(range(3), made.l2_offsets[0]))
    told(made, offset, length)


# ---- subclusters

SIZE = 1 << 14
PART = SIZE // 32


def extended(words: dict[int, tuple[int, int]], *, clusters: int = 64, data_file: bool = False) -> Mapped:
    return mapped_image(
        {0: words},
        virtual_size=1 << 20,
        cluster_bits=14,
        extended_l2=True,
        clusters=clusters,
        data_file=data_file,
    )


def test_subclusters_are_extents_of_their_own() -> None:
    host = 8 * SIZE
    made = extended({0: (host, 0b0111 | 0b1000 << 32), 1: (0, 1 << 63), 2: (COMPRESSED | host, 0)})
    assert told(made, 0, 3 * SIZE) == [
        extent(0, 3 * PART, DATA_KIND, host),
        extent(3 * PART, PART, ZERO_KIND, host + 3 * PART),
        extent(4 * PART, 28 * PART, UNALLOCATED, host + 4 * PART),
        extent(SIZE, 31 * PART, UNALLOCATED),
        extent(SIZE + 31 * PART, PART, ZERO_KIND),
        extent(2 * SIZE, SIZE, PACKED, host, 512),
    ]


def test_ranges_inside_subclusters() -> None:
    host = 8 * SIZE
    made = extended({1: (host, 0b10 | 0b100 << 32)})
    assert told(made, SIZE + PART - 1, PART + 3) == [
        extent(SIZE + PART - 1, 1, UNALLOCATED, host + PART - 1),
        extent(SIZE + PART, PART, DATA_KIND, host + PART),
        extent(SIZE + 2 * PART, 2, ZERO_KIND, host + 2 * PART),
    ]


@pytest.mark.parametrize("position", [0, 7, 31])
def test_one_bad_pair_fails_every_access(position: int) -> None:
    made = extended({1: (8 * SIZE, 1 << position | 1 << 32 + position)})
    for offset in (SIZE, SIZE + 7 * PART, 2 * SIZE - 1):
        with pytest.raises(CorruptImageError, match=r"0x20000 with bitmap 0x[0-9a-f]+ is invalid \(memory\)") as caught:
            mapping(made).resolve(offset, 1)
        assert caught.value.host_offset == made.l2_offsets[0] + 16
        with pytest.raises(CorruptImageError):
            list(mapping(made).runs(offset, 1))


# ---- errors


@pytest.mark.parametrize("word", [0x200, DATA | COMPRESSED | COPIED])
def test_an_invalid_entry_fails_with_its_place(word: int) -> None:
    made = mapped_image({0: {5: word}}, virtual_size=1 << 20, cluster_bits=10)
    told(made, 0, 5 * 1024)
    told(made, 6 * 1024, 1024)
    for ask in (mapping(made).resolve, lambda *asked: list(mapping(made).runs(*asked))):
        with pytest.raises(CorruptImageError, match=rf"L2 entry at host offset .*: {word:#x} is invalid") as caught:
            ask(5 * 1024 + 100, 1)
        assert caught.value.host_offset == made.l2_offsets[0] + 5 * 8


@pytest.mark.parametrize("version", [2, 3])
def test_a_zero_flag_in_version_2_is_corrupt(version: int) -> None:
    made = mapped_image({0: {0: ZERO}}, virtual_size=COVERAGE, version=version)
    if version == 3:
        assert told(made, 0, 512) == [extent(0, 512, ZERO_KIND)]
        return
    with pytest.raises(CorruptImageError, match="is invalid"):
        mapping(made).resolve(0, 512)


def test_what_comes_before_a_bad_entry_is_told_first() -> None:
    """At most one table is looked at ahead of what is told, and nothing sound in it is lost."""
    words = {0: DATA, 1: ZERO, 2: COMPRESSED | COPIED}
    made = mapped_image({0: {0: ZERO}, 1: words}, virtual_size=2 * COVERAGE)
    seen = []
    with pytest.raises(CorruptImageError, match="is invalid"):
        for each in mapping(made).runs(0, 2 * COVERAGE):
            seen.append(each)
    assert sum(each.length for each in seen) == COVERAGE + 2 * CLUSTER
    assert seen[-1].kind is ZERO_KIND


@pytest.mark.parametrize(("missing", "sound"), [(511, True), (512, False), (1024, False)])
@pytest.mark.parametrize("word", [DATA, COMPRESSED | DATA])
def test_a_cluster_must_begin_inside_the_file(word: int, missing: int, sound: bool) -> None:
    made = mapped_image({0: {0: word}}, virtual_size=COVERAGE, cut=DATA + 512 - missing)
    assert len(told(made, 0, 512, allow_damaged=True)) == 1
    if sound:
        assert len(told(made, 0, 512)) == 1
        return
    for ask in (mapping(made).resolve, lambda *asked: list(mapping(made).runs(*asked))):
        with pytest.raises(TruncatedImageError, match=rf"points to {DATA:#x}, past the end of the file") as caught:
            ask(0, 512)
        assert caught.value.host_offset == made.l2_offsets[0]


def test_preallocated_zeros_may_lie_past_the_end_of_the_file() -> None:
    made = mapped_image({0: {0: 1 << 40 | ZERO}}, virtual_size=COVERAGE)
    assert told(made, 0, 512) == [extent(0, 512, ZERO_KIND, 1 << 40)]


def test_a_run_that_leaves_the_file_is_told_up_to_there() -> None:
    made = mapped_image({0: {}}, patterns={0: (DATA, 512)}, virtual_size=COVERAGE, clusters=0, cut=DATA + 5 * 512 + 1)
    assert told(made, 0, 6 * 512) == [extent(0, 6 * 512, DATA_KIND, DATA)]
    with pytest.raises(TruncatedImageError) as caught:
        mapping(made).resolve(0, COVERAGE)
    assert caught.value.host_offset == made.l2_offsets[0] + 8 * 6
    seen = []
    with pytest.raises(TruncatedImageError) as caught:
        for each in mapping(made).runs(0, COVERAGE):
            seen.append(each)
    assert caught.value.host_offset == made.l2_offsets[0] + 8 * 6
    assert sum(each.length for each in seen) == 6 * 512


@pytest.mark.parametrize("offset", range(0, SIZE, PART))
def test_a_truncated_cluster_of_subclusters_is_judged_alike_by_both(offset: int) -> None:
    """Only subcluster 7 has data in the cluster past the end of the file."""
    made = extended({0: (200 * SIZE, 1 << 7)})
    found = mapping(made)

    def outcome(extents: object) -> object:
        try:
            return list(extents() if callable(extents) else ())
        except TruncatedImageError as error:
            return str(error)

    assert outcome(lambda: found.resolve(offset, PART)) == outcome(lambda: found.runs(offset, PART))


def test_places_do_not_run_over_into_reserved_bits() -> None:
    """A damaged image may point anywhere, but not past 2^56, where the offset field ends."""
    made = mapped_image({0: {}}, patterns={0: (2**56 - 1024, 512)}, virtual_size=COVERAGE)
    extents = told(made, 0, COVERAGE, allow_damaged=True)
    assert [(each.kind, each.host_offset) for each in extents] == [
        (DATA_KIND, 2**56 - 1024),
        (UNALLOCATED, None),
        (DATA_KIND, 512),
    ]


# ---- data files


def test_with_a_data_file_host_and_guest_offsets_are_the_same() -> None:
    words = {0: COPIED, 1: 512 | COPIED, 2: 1024 | COPIED | ZERO, 3: ZERO | COPIED}
    made = mapped_image({0: words}, virtual_size=COVERAGE, data_file=True)
    assert told(made, 0, 5 * 512) == [
        extent(0, 1024, DATA_KIND, 0),
        extent(1024, 512, ZERO_KIND, 1024),
        extent(1536, 512, ZERO_KIND),
        extent(2048, 512, UNALLOCATED),
    ]


@pytest.mark.parametrize("word", [512, 512 | ZERO, COPIED])
def test_with_a_data_file_another_host_offset_is_corrupt(word: int) -> None:
    made = mapped_image({0: {4: word}}, virtual_size=COVERAGE, data_file=True)
    for ask in (mapping(made).resolve, lambda *asked: list(mapping(made).runs(*asked))):
        with pytest.raises(CorruptImageError, match=r"points to 0x[02]+0? of the data file instead of 0x800"):
            ask(4 * 512, 1)


def test_with_a_data_file_compressed_clusters_are_corrupt() -> None:
    made = mapped_image({0: {0: COMPRESSED | DATA}}, virtual_size=COVERAGE, data_file=True)
    with pytest.raises(CorruptImageError, match="is invalid"):
        mapping(made).resolve(0, 1)


def test_with_a_data_file_the_end_of_the_image_file_means_nothing() -> None:
    made = mapped_image({40: {0: 40 * COVERAGE}}, virtual_size=41 * COVERAGE, data_file=True, clusters=0)
    assert told(made, 40 * COVERAGE, 512) == [extent(40 * COVERAGE, 512, DATA_KIND, 40 * COVERAGE)]


def test_with_a_data_file_a_shared_table_is_right_only_once() -> None:
    made = mapped_image({1: {0: COVERAGE}}, virtual_size=3 * COVERAGE, shared={2: 1}, data_file=True)
    assert len(told(made, 0, 2 * COVERAGE)) == 3
    with pytest.raises(CorruptImageError, match="of the data file"):
        list(mapping(made).runs(0, 3 * COVERAGE))


def test_subclusters_with_a_data_file() -> None:
    made = extended({0: (COPIED, 1), 1: (SIZE | COPIED, 1 << 33)}, data_file=True)
    assert told(made, 0, 2 * SIZE) == [
        extent(0, PART, DATA_KIND, 0),
        extent(PART, SIZE, UNALLOCATED, PART),
        extent(SIZE + PART, PART, ZERO_KIND, SIZE + PART),
        extent(SIZE + 2 * PART, 30 * PART, UNALLOCATED, SIZE + 2 * PART),
    ]


# ---- long ranges


def test_runs_are_lazy() -> None:
    tables = {index: {0: ZERO} for index in range(1000)}
    tables[999] = {0: COMPRESSED | COPIED}
    made = mapped_image(tables, virtual_size=1000 * COVERAGE)
    assert len(list(itertools.islice(mapping(made).runs(0, 1000 * COVERAGE), 1500))) == 1500


def test_a_table_of_many_runs() -> None:
    words = {index: DATA if index % 2 else ZERO for index in range(64)}
    made = mapped_image({0: words}, virtual_size=2 * COVERAGE, shared={1: 0})
    assert len(told(made, 0, 2 * COVERAGE)) == 128
    assert len(told(made, 100, 2 * COVERAGE - 200)) == 128


def test_a_huge_l1_table_of_nothing_is_walked_quickly() -> None:
    made = mapped_image({}, virtual_size=COVERAGE * 4_000_000, clusters=0)
    assert list(mapping(made).runs(0, COVERAGE * 4_000_000))[-1].kind is UNALLOCATED
    assert len(list(mapping(made).runs(0, COVERAGE * 4_000_000))) < 1000


class Growing(MemoryStorage):
    """A file that is a cluster longer every time somebody asks."""

    def size(self) -> int:
        """Bytes up to the end, for now."""
        self.content += bytes(CLUSTER)
        return super().size()


def test_a_file_that_grows_meanwhile_leaves_no_gap_in_the_map() -> None:
    words = {index: COPIED | (DATA + (64 - index) * CLUSTER) for index in range(64)}
    made = mapped_image({0: words}, virtual_size=COVERAGE)
    end = DATA + 30 * CLUSTER
    growing = Growing(made.storage.content[:end].ljust(end, b"\0"))
    header = read_header(growing)
    tables = Tables(TableSource.of(header, growing, None, allow_damaged=False), 1 << 20)
    covered = 0
    with contextlib.suppress(TruncatedImageError):
        for extent in Mapping(tables).runs(0, COVERAGE):
            assert extent.guest_offset == covered
            covered += extent.length
