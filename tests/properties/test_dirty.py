"""What a dirty bitmap marks, held against a bytearray with one byte per granule."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qcow2_plugin.engine.dirty_bitmaps.bitmaps import read_bitmaps
from qcow2_plugin.engine.dirty_bitmaps.dirty import DirtyBitmap
from qcow2_plugin.engine.header import read_header
from tests.support.depth import examples
from tests.support.marked import BITS, COVERED, GRANULE, marked_image

PER_CLUSTER = COVERED // GRANULE


@st.composite
def clusters_of_bits(draw: st.DrawFn) -> bytes:
    """512 bytes: random ones somewhere, or a few runs."""
    if draw(st.booleans()):
        start = draw(st.integers(0, 500))
        return (bytes(start) + draw(st.binary(max_size=12))).ljust(512, b"\0")
    number = 0
    for _ in range(draw(st.integers(0, 4))):
        first = draw(st.integers(0, 4095))
        number |= (1 << draw(st.integers(first, 4095)) + 1) - (1 << first)
    return number.to_bytes(512, "little")


@given(st.lists(st.one_of(st.sampled_from([0, 1]), clusters_of_bits()), min_size=1, max_size=4), st.data())
@examples(150)
def test_ranges_are_those_of_the_bits(told: list[int | bytes], data: st.DataObject) -> None:
    cut = data.draw(st.one_of(st.just(0), st.integers(0, COVERED // 512 - 1).map(lambda sectors: sectors * 512)))
    size = len(told) * COVERED - cut
    table, stored, marks = [], b"", bytearray()
    for part in told:
        if isinstance(part, int):
            table.append(part)
            marks += bytes([part]) * PER_CLUSTER
        else:
            table.append(BITS + len(stored))
            stored += part
            marks += bytes(part[index // 8] >> index % 8 & 1 for index in range(PER_CLUSTER))
    storage = marked_image(table, stored, size)
    header = read_header(storage)
    dirty = DirtyBitmap(storage, header, read_bitmaps(storage, header)[0])
    for _ in range(3):
        offset = data.draw(st.integers(0, size))
        length = data.draw(st.integers(0, size - offset))
        assert list(dirty.ranges(offset, length)) == expected(marks, offset, offset + length)
    assert list(dirty.ranges(0, size)) == expected(marks, 0, size)


def expected(marks: bytearray, offset: int, end: int) -> list[tuple[int, int]]:
    """The marked ranges, granule by granule."""
    found: list[tuple[int, int]] = []
    for index in range(offset // GRANULE, -(-end // GRANULE)):
        start, stop = max(index * GRANULE, offset), min((index + 1) * GRANULE, end)
        if not marks[index] or start >= stop:
            continue
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], stop - found[-1][0])
        else:
            found.append((start, stop - start))
    return found


def test_the_model_counts_granules() -> None:
    assert expected(bytearray(b"\1\1\0\1"), 100, 4 * 512 - 1) == [(100, 924), (1536, 511)]
