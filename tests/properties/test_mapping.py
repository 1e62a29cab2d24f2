"""`resolve` and `runs` tell the same about arbitrary tables: kinds, places, and the same error at the same place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2_plugin.engine.header import read_header
from qcow2_plugin.engine.mapping import Mapping
from qcow2_plugin.engine.tables import Tables, TableSource
from qcow2_plugin.errors import Qcow2Error, TruncatedImageError
from qcow2_plugin.extent import Extent, ExtentKind, merge
from tests.support.depth import examples
from tests.support.fields import COMPRESSED, COPIED
from tests.support.mapped import Mapped, mapped_image
from tests.support.words import bitmaps, words

CLUSTERS = 24  # host clusters behind the tables that entries point to
FORMS = [
    (cluster_bits, extended, data_file, version)
    for cluster_bits in range(9, 22)
    for extended, data_file, version in [
        (False, False, 3),
        (False, True, 3),
        (False, False, 2),
        (True, False, 3),
        (True, True, 3),
    ]
    if cluster_bits >= 14 or not extended
]


@dataclass(frozen=True)
class Case:
    made: Mapped
    allow_damaged: bool
    cache_size: int
    offset: int
    length: int

    def mapping(self) -> Mapping:
        header = read_header(self.made.storage)
        source = TableSource.of(header, self.made.storage, None, allow_damaged=self.allow_damaged)
        return Mapping(Tables(source, self.cache_size))


@st.composite
def cases(draw: st.DrawFn, form: tuple[int, bool, bool, int]) -> Case:
    """Up to three L2 tables, shared or not, with words in stretches; a file cut anywhere; a range near the stretches.

    Small clusters make disks of many tables, large ones disks of few; the range is at most some hundred clusters.
    """
    cluster_bits, extended, data_file, version = form
    size, entries = 1 << cluster_bits, (1 << cluster_bits) // (16 if extended else 8)
    indexes = draw(st.lists(st.integers(0, 3), max_size=3 if cluster_bits < 20 else 1, unique=True))
    tables: dict[int, dict[int, int] | dict[int, tuple[int, int]]] = {}
    places = []
    for index in indexes:
        table: dict[int, int] | dict[int, tuple[int, int]] = {}
        start = draw(st.sampled_from([0, 0, entries // 2 - 3, entries - 8]))
        for position in range(start, min(start + draw(st.integers(1, 12)), entries)):
            word = draw(words(cluster_bits, CLUSTERS))
            if data_file and draw(st.integers(0, 9)):  # mostly where it must be
                word = ((index * entries + position) << cluster_bits) | word & (COPIED | 1) if word else 0
            if extended:
                table[position] = (word, draw(bitmaps()))  # type: ignore[assignment]
            else:
                table[position] = word  # type: ignore[assignment]
        tables[index] = table
        places.append(index * entries + start)
    patterns = {
        index: draw(st.sampled_from([(1 << 20 | COPIED, size), (1 << 20, 0), (1, 0), (COMPRESSED | 5 << 20, 7)]))
        for index in indexes
        if draw(st.integers(0, 3)) == 0
    }
    if data_file:
        patterns = {index: (index * entries << cluster_bits | COPIED, size) for index in patterns}
    others = [index for index in range(4) if index not in indexes]
    shared = {index: draw(st.sampled_from(indexes)) for index in others if draw(st.booleans()) and indexes}
    odd = st.sampled_from([COPIED, size * 2, 512, 1 << 40, 1 << 56])
    l1_words = {index: draw(odd) for index in others if not draw(st.integers(0, 7))}
    end = 4 * entries << cluster_bits
    virtual_size = draw(st.one_of(st.just(end), st.integers(end // 2, end).map(lambda value: value & ~511)))
    made = mapped_image(
        tables,
        virtual_size=virtual_size,
        cluster_bits=cluster_bits,
        version=version,
        extended_l2=extended,
        data_file=data_file,
        l1_size=4,
        l1_words=l1_words,
        shared=shared,
        patterns=patterns,
        clusters=draw(st.integers(0, CLUSTERS)) if cluster_bits < 18 else 0,
    )
    anchor = draw(st.sampled_from([0, *places])) << cluster_bits
    offset = min(max(anchor + draw(st.integers(-3 * size, 6 * size)), 0), virtual_size)
    length = min(draw(st.integers(0, 300 * size)), virtual_size - offset)
    if cluster_bits < 11 and draw(st.booleans()):
        offset, length = 0, virtual_size
    return Case(made, draw(st.booleans()), draw(st.sampled_from([0, 5000, 1 << 20])), offset, length)


def outcome(error: Qcow2Error) -> str:
    """What the error says; for a table past the end of the file not where, as the two read different pieces of it."""
    if isinstance(error, TruncatedImageError) and error.structure.endswith("table"):
        return f"truncated {error.structure}"
    return f"{type(error).__name__}: {error}"


def gather(extents: Iterator[Extent] | list[Extent]) -> tuple[list[Extent], str | None]:
    """What is told, and the error that ends it."""
    seen: list[Extent] = []
    try:
        seen.extend(extents)
    except Qcow2Error as error:
        return seen, outcome(error)
    return seen, None


def resolved(mapping: Mapping, offset: int, length: int) -> tuple[list[Extent], str | None]:
    try:
        return mapping.resolve(offset, length), None
    except Qcow2Error as error:
        return [], outcome(error)


def normal(extents: list[Extent]) -> list[Extent]:
    """Merged, and without the places of compressed clusters, which `runs` does not tell."""
    return list(
        merge(each._replace(host_offset=None) if each.kind is ExtentKind.COMPRESSED else each for each in extents)
    )


def covers(extents: list[Extent], offset: int, length: int) -> bool:
    ends = [offset, *(each.guest_offset + each.length for each in extents)]
    starts = [*(each.guest_offset for each in extents), offset + length]
    return starts == ends and all(each.length > 0 for each in extents)


def without_places(extents: list[Extent]) -> list[Extent]:
    """What is told, without the bytes of compressed clusters, as the sound part may end inside a shared table."""
    return [each._replace(stored_length=0) for each in normal(extents)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@given(st.data())
@examples(20)
def test_resolve_and_runs_tell_the_same(form: tuple[int, bool, bool, int], data: st.DataObject) -> None:
    case = data.draw(cases(form))
    mapping = case.mapping()
    told, error = resolved(mapping, case.offset, case.length)
    runs, runs_error = gather(mapping.runs(case.offset, case.length))
    assert runs_error == error
    if error is None:
        assert covers(told, case.offset, case.length)
        assert covers(runs, case.offset, case.length)
        assert normal(runs) == normal(told)
        assert resolved(case.mapping(), case.offset, case.length) == (told, None)


@pytest.mark.parametrize("form", FORMS[::7], ids=str)
@given(st.data())
@examples(30)
def test_runs_tell_everything_sound_before_an_error(form: tuple[int, bool, bool, int], data: st.DataObject) -> None:
    case = data.draw(cases(form))
    mapping = case.mapping()
    runs, error = gather(mapping.runs(case.offset, case.length))
    sound = sum(each.length for each in runs)
    assert covers(runs, case.offset, sound)
    told, no_error = resolved(mapping, case.offset, sound)
    assert no_error is None
    assert without_places(runs) == without_places(told)
    if error is not None:
        assert resolved(mapping, case.offset + sound, 1) == ([], error)
    else:
        assert sound == case.length
