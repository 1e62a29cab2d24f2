"""What has changed of a disk, held against a byte for each sector."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcow2_plugin import add_bitmap, create_image, disable_bitmap, open_image
from qcow2_plugin.engine.image import Image
from qcow2_plugin.errors import CorruptImageError, MissingReferenceError
from qcow2_plugin.operations.changes import Change, ChangeCounts, RangeKind, _union, changes, count, estimate
from tests.support.builder import ImageBuilder

KIB, MIB = 1 << 10, 1 << 20
DATA, ZERO, HOLE, CLEAN = RangeKind.DIRTY_DATA, RangeKind.DIRTY_ZERO, RangeKind.DIRTY_HOLE, RangeKind.CLEAN


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A MiB of data, and then what changed of it."""
    path = tmp_path / "disk.qcow2"
    create_image(path, 4 * MIB)
    with open_image(path, writable=True) as image:
        image.pwrite(b"x" * MIB, 0)
    add_bitmap(path, "first")
    with open_image(path, writable=True) as image:
        image.pwrite(b"y", 70 * KIB)
        image.write_zeroes(256 * KIB, 64 * KIB)
    disable_bitmap(path, "first")
    add_bitmap(path, "second")
    with open_image(path, writable=True) as image:
        image.pwrite(b"z" * 100, 128 * KIB)
        image.pwrite(b"z" * 64 * KIB, 2 * MIB)
        image.discard(2 * MIB, 64 * KIB)
        image.pwrite(b"e" * 64 * KIB, 4 * MIB - 64 * KIB)  # whole: what of a cluster was never written may be a hole
    return path


def told(image: Image, *bitmaps: str, **how: int) -> list[tuple[int, int, RangeKind]]:
    return [(*change[:2], change[2]) for change in changes(image, bitmaps, with_clean=False, **how)]


def test_one_bitmap(disk: Path) -> None:
    with open_image(disk) as image:
        assert told(image, "first") == [(64 * KIB, 64 * KIB, DATA), (256 * KIB, 64 * KIB, ZERO)]


def test_several_bitmaps_are_taken_together(disk: Path) -> None:
    with open_image(disk) as image:
        both = told(image, "first", "second")
        assert both == told(image, "second", "first") == told(image, "second", "first", "second")
        kinds = [each for each in both if each[0] != 2 * MIB]
        assert kinds == [
            (64 * KIB, 128 * KIB, DATA),
            (256 * KIB, 64 * KIB, ZERO),
            (4 * MIB - 64 * KIB, 64 * KIB, DATA),
        ]
        discarded = next(each for each in both if each[0] == 2 * MIB)
        assert discarded[2] in (ZERO, HOLE)


def test_without_bitmaps_everything_is_dirty(disk: Path) -> None:
    with open_image(disk) as image:
        found = list(changes(image, None))
        counts = estimate(image, None)
    assert {change.kind for change in found} <= {DATA, ZERO, HOLE}
    assert sum(change.length for change in found) == 4 * MIB
    assert counts.clean == 0
    assert counts == count(found, 4 * MIB)


def test_no_bitmap_in_a_list_of_none_marks_nothing(disk: Path) -> None:
    with open_image(disk) as image:
        assert list(changes(image, [])) == [Change(0, 4 * MIB, CLEAN)]


def test_clean_ranges_fill_the_gaps(disk: Path) -> None:
    with open_image(disk) as image:
        found = list(changes(image, ["first"]))
        assert [change for change in found if change.kind is not CLEAN] == list(
            changes(image, ["first"], with_clean=False)
        )
        assert estimate(image, ["first"]) == ChangeCounts(64 * KIB, 64 * KIB, 0, 4 * MIB - 128 * KIB)
    end = 0
    for change in found:
        assert change.guest_offset == end
        assert change.length > 0
        end += change.length
    assert end == 4 * MIB
    assert all(first.kind is not second.kind for first, second in pairwise(found))


def test_what_the_disk_has_grown_by_is_dirty(disk: Path) -> None:
    with open_image(disk) as image:
        assert told(image, "first", base_size=3 * MIB + 512)[2:] == [
            (3 * MIB + 512, MIB - 64 * KIB - 512, HOLE),
            (4 * MIB - 64 * KIB, 64 * KIB, DATA),
        ]
        assert told(image, "first", base_size=4 * MIB) == told(image, "first")
        assert told(image, "first", base_size=5 * MIB) == told(image, "first")


def test_a_part_of_the_disk(disk: Path) -> None:
    with open_image(disk) as image:
        assert told(image, "first", offset=100 * KIB, length=160 * KIB) == [
            (100 * KIB, 28 * KIB, DATA),
            (256 * KIB, 4 * KIB, ZERO),
        ]
        assert told(image, "first", offset=MIB, length=0) == []
        assert list(changes(image, None, offset=4 * MIB)) == []
        assert list(changes(image, ["first"], offset=100 * KIB, length=KIB)) == [Change(100 * KIB, KIB, DATA)]


def test_errors_about_bitmaps_come_at_once(disk: Path, tmp_path: Path) -> None:
    with open_image(disk) as image, pytest.raises(MissingReferenceError):
        changes(image, ["third"])
    with open_image(disk, writable=True) as writing:
        writing.pwrite(b"1", 0)
        with open_image(disk, force_share=True) as image, pytest.raises(CorruptImageError, match="in use"):
            changes(image, ["second"])


def test_what_shows_through_is_looked_up_below(tmp_path: Path) -> None:
    below, above = tmp_path / "below.qcow2", tmp_path / "above.qcow2"
    ImageBuilder(MIB).data(1, b"a").zero(2).compressed(3, b"b").build(below)
    create_image(above, MIB, backing_file="below.qcow2", backing_format="qcow2")
    add_bitmap(above, "since")
    with open_image(above, writable=True) as image:
        for cluster in (1, 2, 3, 4, 8):
            image.pwrite(b"", cluster * 64 * KIB)
        image.pwrite(b"c", 9 * 64 * KIB)
    with open_image(above) as image:
        full = [(*change[:2], change[2]) for change in changes(image, None)]
        assert full == [
            (0, 64 * KIB, HOLE),
            (64 * KIB, 64 * KIB, DATA),
            (128 * KIB, 64 * KIB, ZERO),
            (192 * KIB, 64 * KIB, DATA),
            (256 * KIB, 320 * KIB, HOLE),
            (576 * KIB, 64 * KIB, DATA),
            (640 * KIB, 384 * KIB, HOLE),
        ]
        assert [
            (*change[:2], change[2])
            for offset in range(0, MIB, 64 * KIB)
            for change in changes(image, None, offset=offset, length=64 * KIB)
        ] == [(start + step, 64 * KIB, kind) for start, length, kind in full for step in range(0, length, 64 * KIB)]


def test_holes_of_a_raw_data_file_are_holes(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, 4 * MIB, data_file=tmp_path / "disk.raw", data_file_raw=True)
    with open_image(path, writable=True) as image:
        image.pwrite(b"x" * 64 * KIB, MIB)
    with open_image(path) as image:
        counts = estimate(image, None)
    assert counts == ChangeCounts(64 * KIB, 0, 4 * MIB - 64 * KIB, 0)


def test_a_huge_disk_costs_what_its_changes_do(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, 64 << 40, cluster_size=2 * MIB)
    add_bitmap(path, "since", granularity=64 * MIB)
    with open_image(path, writable=True) as image:
        image.pwrite(b"far away" * (256 << 10), 63 << 40)
    with open_image(path) as image:
        start = time.process_time()
        assert len(list(changes(image, ["since"]))) == 4
        assert time.process_time() - start < 1


_Ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=12)


@given(st.lists(_Ranges, max_size=4))
@settings(max_examples=200)
def test_a_union_is_what_any_part_has(parts: list[list[tuple[int, int]]]) -> None:
    ascending = []
    for part in parts:
        marked = sorted({place for start, length in part for place in range(start, start + length)})
        ascending.append(iter([(place, place + 1) for place in marked]))
    wanted = {place for part in parts for start, length in part for place in range(start, start + length)}
    found = list(_union(ascending))
    assert {place for start, end in found for place in range(start, end)} == wanted
    if len(parts) > 1:
        assert all(first[1] < second[0] for first, second in pairwise(found))
