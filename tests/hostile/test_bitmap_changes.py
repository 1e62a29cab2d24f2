"""Bitmaps that lie, in an image whose bitmaps are changed: what they name is freed only if nobody else has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2_plugin import open_image
from qcow2_plugin.errors import BitmapError, Qcow2Error
from qcow2_plugin.operations.bitmaps import add_bitmap, merge_bitmap, remove_bitmap, rotate_bitmap
from tests.support.builder import BuiltImage, ImageBuilder, patch
from tests.support.image_checker import check_image

CLUSTER = 512
SIZE = 128 << 10
IN_USE, AUTO = 1, 2


def disk() -> ImageBuilder:
    image = ImageBuilder(SIZE, 9)
    for cluster in range(0, 40, 2):
        image.data(cluster, bytes([cluster + 1]) * CLUSTER)
    return image


def build(path: Path, words: Callable[[BuiltImage], list[int]], flags: int) -> BuiltImage:
    """An image with a bitmap whose table has these words first."""
    built = disk().bitmap(b"bad", granularity_bits=9, table=[0] * 8, flags=flags).build(path)
    patch(path, built.bitmap_table_offsets[0], b"".join(word.to_bytes(8, "big") for word in words(built)))
    return built


WORDS: dict[str, Callable[[BuiltImage], list[int]]] = {
    "past the end": lambda built: [(built.file_size // CLUSTER + 5) * CLUSTER, 1 << 50],
    "reserved bits": lambda built: [built.data_offsets[0] | 1 << 60, 3, 1 << 9 | 1],
    "free clusters": lambda built: [],
}


@pytest.mark.parametrize("what", WORDS)
def test_what_an_unusable_bitmap_names_is_not_freed(tmp_path: Path, what: str) -> None:
    path = tmp_path / "image"
    build(path, WORDS[what], IN_USE | AUTO)
    with open_image(path, writable=True) as image:
        for cluster in range(1, 120, 2):  # what was past the end belongs to somebody now
            image.pwrite(bytes([cluster]) * CLUSTER, cluster * CLUSTER)
        add_bitmap(image, "good")
        expected = image.pread(SIZE, 0)
        remove_bitmap(image, "bad")
        image.flush()
        image.flush()
        add_bitmap(image, "better", granularity=512)
        for cluster in range(121, 200, 2):
            image.pwrite(bytes([cluster]) * CLUSTER, cluster * CLUSTER)
        assert image.pread(120 * CLUSTER, 0) == expected[: 120 * CLUSTER]
    report = check_image(path.read_bytes())
    assert report.is_sound, [*report.corruptions, *report.damage]


def test_a_cluster_that_nobody_counts_is_not_freed_twice(tmp_path: Path) -> None:
    """The table names a cluster whose refcount is 0: the change goes on, and the image is not marked corrupt."""
    path = tmp_path / "image"
    built = disk().bitmap(b"bad", [(0, SIZE)], literal=True, granularity_bits=9, flags=IN_USE).build(path)
    free = disk().bitmap(b"bad", [(0, SIZE)], literal=True, granularity_bits=9, flags=IN_USE)
    table = built.bitmap_table_offsets[0]
    named = int.from_bytes(path.read_bytes()[table : table + 8], "big")
    free.refcount(named // CLUSTER, 0).build(path)
    remove_bitmap(path, "bad")
    add_bitmap(path, "good")
    report = check_image(path.read_bytes())
    assert report.is_sound, [*report.corruptions, *report.damage]


def test_a_table_that_lies_past_the_end(tmp_path: Path) -> None:
    path = tmp_path / "image"
    built = disk().bitmap(b"bad", [(0, 1)], granularity_bits=9, flags=IN_USE).build(path)
    patch(path, built.bitmap_entry_offsets[0], (1 << 40).to_bytes(8, "big"))
    with open_image(path, writable=True) as image:
        image.pwrite(b"x", 0)
        with pytest.raises(BitmapError):
            merge_bitmap(image, "bad", "bad")
        remove_bitmap(image, "bad")
        add_bitmap(image, "good")
    report = check_image(path.read_bytes())
    assert report.is_sound, [*report.corruptions, *report.damage]


def test_bits_that_are_not_there_change_nothing(tmp_path: Path) -> None:
    """The source of a merge is cut off: an error, and everything is as before."""
    path, source = tmp_path / "image", tmp_path / "source"
    disk().bitmap(b"good", [(0, 1)], granularity_bits=9, flags=AUTO).build(path)
    built = disk().bitmap(b"cut", [(0, 1)], granularity_bits=9, literal=True).build(source)
    patch(source, built.bitmap_table_offsets[0], (1 << 40).to_bytes(8, "big"))
    before = path.read_bytes()
    with pytest.raises(Qcow2Error):
        merge_bitmap(path, "good", "cut", source_image=source)
    assert path.read_bytes() == before
    with open_image(path, writable=True) as image:
        image.pwrite(b"x", 5 * CLUSTER)
        with pytest.raises(Qcow2Error):
            merge_bitmap(image, "good", "cut", source_image=source)
        rotate_bitmap(image, "good", "next")
    marks = {bitmap.name: bitmap.granules for bitmap in check_image(path.read_bytes()).bitmaps}
    assert marks == {b"good": {0, 5}, b"next": frozenset()}
