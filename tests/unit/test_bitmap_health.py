"""What state each bitmap is in, why, and what to do: one test for each state, and how much a bitmap marks."""

from __future__ import annotations

import os
import random
import shlex
from pathlib import Path

import pytest

from qcow2_plugin import create_image, open_image, resize
from qcow2_plugin.adapters.cli import main
from qcow2_plugin.engine.dirty_bitmaps.bitmaps import read_bitmaps
from qcow2_plugin.engine.dirty_bitmaps.dirty import DirtyBitmap
from qcow2_plugin.engine.header import read_header
from qcow2_plugin.errors import ImageLockedError, MissingReferenceError, OptionError
from qcow2_plugin.operations.bitmap_health import BitmapHealth, BitmapState, bitmap_health
from qcow2_plugin.operations.bitmap_pruning import drop_bitmaps, prune_bitmaps
from qcow2_plugin.operations.bitmaps import add_bitmap, disable_bitmap
from qcow2_plugin.storage.opener import open_given
from tests.support.builder import BuiltImage, ImageBuilder, patch
from tests.support.image_checker import check_image

MIB = 1 << 20
CLUSTER = 1 << 16
IN_USE, AUTO = 1, 2


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def disk(virtual_size: int = 4 * MIB) -> ImageBuilder:
    return ImageBuilder(virtual_size).data(0, b"data")


def build(image: ImageBuilder, name: str = "disk.qcow2") -> BuiltImage:
    return image.build(name)


def only(names: list[str] | None = None) -> BitmapHealth:
    (found,) = bitmap_health("disk.qcow2", names)
    return found


def states(path: str = "disk.qcow2") -> dict[str | None, str]:
    return {each.name: each.state.value for each in bitmap_health(path)}


# ---- states


def test_a_usable_bitmap_needs_nothing() -> None:
    build(disk().bitmap(b"b", [(MIB, 2 * CLUSTER)], flags=AUTO))
    assert only() == BitmapHealth("b", BitmapState.USABLE, None, None, True, CLUSTER, 2 * CLUSTER)
    assert not only().needs_full


def test_a_disabled_bitmap_is_usable() -> None:
    build(disk().bitmap(b"b", flags=0))
    assert (only().state, only().enabled) == (BitmapState.USABLE, False)


def test_left_in_use_by_a_writer_that_is_gone() -> None:
    build(disk().bitmap(b"b", [(0, 1)], flags=IN_USE | AUTO))
    found = only()
    assert (found.state, found.needs_full, found.dirty_size) == (BitmapState.INCONSISTENT, True, None)
    assert found.reason
    assert "did not close" in found.reason
    assert found.next_step == "Make a full backup and remove the bitmap: qcow2 bitmap --remove disk.qcow2 b"


def test_in_use_by_a_writer_that_lives() -> None:
    create_image("disk.qcow2", MIB)
    add_bitmap("disk.qcow2", "b")
    with open_image("disk.qcow2", writable=True) as image:
        image.pwrite(b"x", 0)
        with pytest.raises(ImageLockedError):
            bitmap_health("disk.qcow2")
        (found,) = bitmap_health("disk.qcow2", force_share=True)
        assert found.state is BitmapState.IN_USE
        assert found.next_step == "Have that program close the image, then look again."
        (own,) = bitmap_health(image)
        assert own.state is BitmapState.IN_USE
    assert (only().state, only().dirty_size) == (BitmapState.USABLE, CLUSTER)
    (found,) = bitmap_health("disk.qcow2", force_share=True)
    assert found.state is BitmapState.USABLE


def test_what_an_open_image_had_lost_before_is_told_apart() -> None:
    build(disk().bitmap(b"lost", flags=IN_USE | AUTO).bitmap(b"kept", flags=AUTO))
    with open_image("disk.qcow2", writable=True) as image:
        image.pwrite(b"x", 0)
        assert [each.state for each in bitmap_health(image)] == [BitmapState.INCONSISTENT, BitmapState.IN_USE]
    with open_image("disk.qcow2") as image:
        assert [each.state.value for each in bitmap_health(image)] == ["inconsistent", "usable"]


def test_made_for_another_size() -> None:
    build(disk().bitmap(b"b", flags=AUTO, table_size=2))
    assert only().state is BitmapState.WRONG_SIZE
    assert "--remove" in (only().next_step or "")


@pytest.mark.parametrize("fields", [{"type": 3}, {"flags": 8}, {"granularity_bits": 40}, {"granularity_bits": 3}])
def test_of_a_kind_that_is_unknown(fields: dict[str, int]) -> None:
    build(disk().bitmap(b"b", **fields))  # type: ignore[arg-type] # of the directory entry
    assert only().state is BitmapState.UNKNOWN
    assert (only().reason or "").startswith("Its ")


def test_of_before_another_program_wrote() -> None:
    build(disk().bitmap(b"a", flags=AUTO).bitmap(b"b"))
    patch("disk.qcow2", 88, bytes(8))
    assert states() == {"a": "stale", "b": "stale"}
    assert only(["b"]).next_step == "Make a full backup and drop all bitmaps of the image: " + (
        "qcow2 bitmap prune --drop-all disk.qcow2"
    )


def test_missing() -> None:
    build(disk().bitmap(b"b"))
    found = bitmap_health("disk.qcow2", ["x y", "b", b"\xff"])
    assert [each.state.value for each in found] == ["missing", "usable", "missing"]
    assert found[0].next_step == "Start one and make a full backup: qcow2 bitmap --add disk.qcow2 'x y'"
    assert found[2].name == "\udcff"


def test_an_image_without_bitmaps() -> None:
    build(disk())
    assert bitmap_health("disk.qcow2") == []
    assert only(["b"]).state is BitmapState.MISSING
    ImageBuilder(MIB, version=2).build("old.qcow2")
    assert bitmap_health("old.qcow2") == []


def test_a_name_that_looks_like_an_option() -> None:
    build(disk().bitmap(b"--add", flags=IN_USE | AUTO), "-disk")
    (found,) = bitmap_health("-disk")
    assert (found.next_step or "").endswith(": qcow2 bitmap --remove -- -disk --add")
    assert main(shlex.split(found.next_step or "")[-5:]) == 0
    assert bitmap_health("-disk") == []


def test_a_directory_that_cannot_be_read_speaks_for_every_name() -> None:
    build(disk().bitmap(b"b").bitmaps_extension(nb_bitmaps=2))
    assert (only().name, only().state) == (None, BitmapState.DAMAGED)
    found = only(["x"])
    assert (found.name, found.state, found.needs_full) == ("x", BitmapState.DAMAGED, True)
    assert "--drop-all" in (found.next_step or "")


@pytest.mark.parametrize("where", ["header", "L1 table", "directory", "other table", "other bits"])
def test_a_table_or_bits_in_a_place_that_is_not_theirs(where: str) -> None:
    built = build(disk().bitmap(b"a", [(0, 1)], literal=True).bitmap(b"b", [(0, 1)], literal=True))
    place = {
        "header": 0,
        "L1 table": built.l1_offset,
        "directory": built.bitmap_directory_offset,
        "other table": built.bitmap_table_offsets[0],
        "other bits": built.bitmap_data_offsets[0][0],
    }[where]
    if place:
        patch("disk.qcow2", built.bitmap_table_offsets[1], place.to_bytes(8, "big"))
        assert states()["b"] == "damaged"
    if where != "other bits":
        assert states()["a"] == "usable"
        if place:
            patch("disk.qcow2", built.bitmap_entry_offsets[1], place.to_bytes(8, "big"))
            assert states()["b"] == "damaged"
    else:
        assert states() == {"a": "damaged", "b": "damaged"}


def test_tables_that_overlap_are_of_neither() -> None:
    built = build(disk().bitmap(b"a", [(0, 1)]).bitmap(b"b", [(0, 1)]).bitmap(b"c"))
    patch("disk.qcow2", built.bitmap_entry_offsets[1], built.bitmap_table_offsets[0].to_bytes(8, "big"))
    assert states() == {"a": "damaged", "b": "damaged", "c": "usable"}


# ---- how much is marked


@pytest.mark.parametrize("seed", range(12))
def test_what_is_counted_is_what_is_marked(seed: int) -> None:
    chance = random.Random(seed)
    size = chance.choice([512, 5 * MIB, 5 * MIB + 512, 64 * MIB + 1024, 300 * MIB])
    ranges = [(chance.randrange(size), chance.randrange(1, 1 + size // 4)) for _ in range(chance.randrange(6))]
    ranges = [(start, min(length, size - start)) for start, length in ranges]
    if seed % 3 == 0:
        ranges.append((size - 1, 1))
    image = ImageBuilder(size, chance.choice([9, 12, 16])).bitmap(
        b"b", ranges, granularity_bits=chance.choice([9, 12, 16]), literal=bool(seed % 2)
    )
    build(image)
    storage = open_given("disk.qcow2")
    header = read_header(storage)
    (bitmap,) = read_bitmaps(storage, header)
    expected = sum(length for _, length in DirtyBitmap(storage, header, bitmap).ranges(0, size))
    storage.close()
    assert only().dirty_size == expected


def test_all_ones_without_data_reach_to_the_end_of_the_disk() -> None:
    build(ImageBuilder(5 * MIB + 512).bitmap(b"b", table=[1], data=bytes(11)))
    assert only().dirty_size == 5 * MIB + 512


@pytest.mark.parametrize("size", [64 * 1024 - 512, 64 * 1024, 5 * MIB, 5 * MIB + 512, 7 * MIB + 512])
def test_bits_behind_the_end_of_the_disk_mark_nothing(size: int) -> None:
    build(ImageBuilder(size).bitmap(b"b", data=b"\xff" * 20))
    assert only().dirty_size == size


# ---- pruning


def test_prune_removes_what_nobody_can_use_and_nothing_else() -> None:
    image = disk().bitmap(b"good", [(0, 1)], flags=AUTO).bitmap(b"lost", flags=IN_USE | AUTO)
    build(image.bitmap(b"odd", type=7).bitmap(b"small", table_size=2))
    assert prune_bitmaps("disk.qcow2") == ["lost", "small"]
    assert states() == {"good": "usable", "odd": "unknown"}
    assert prune_bitmaps("disk.qcow2") == []
    assert prune_bitmaps("disk.qcow2", include=["unknown"]) == ["odd"]
    assert states() == {"good": "usable"}
    report = check_image(Path("disk.qcow2").read_bytes())
    assert report.is_sound


def test_prune_of_an_open_image_keeps_what_it_holds() -> None:
    build(disk().bitmap(b"good", flags=AUTO).bitmap(b"lost", flags=IN_USE | AUTO))
    with open_image("disk.qcow2", writable=True) as image:
        image.pwrite(b"x", MIB)
        assert prune_bitmaps(image) == ["lost"]
        image.pwrite(b"x", 2 * MIB)
    assert (only().state, only().dirty_size) == (BitmapState.USABLE, 2 * CLUSTER)
    resize("disk.qcow2", 8 * MIB)


def test_prune_drops_stale_ones() -> None:
    build(disk().bitmap(b"a", flags=AUTO))
    patch("disk.qcow2", 88, bytes(8))
    assert prune_bitmaps("disk.qcow2", include=["wrong-size"]) == []
    assert states() == {"a": "stale"}
    assert prune_bitmaps("disk.qcow2") == ["a"]
    assert bitmap_health("disk.qcow2") == []
    add_bitmap("disk.qcow2", "a")
    disable_bitmap("disk.qcow2", "a")
    assert states() == {"a": "usable"}


@pytest.mark.parametrize("state", ["usable", "in-use", "missing", "damaged", "unfinished", "bad\x1b"])
def test_prune_takes_no_other_states(state: str) -> None:
    build(disk().bitmap(b"a"))
    with pytest.raises(OptionError) as caught:
        prune_bitmaps("disk.qcow2", include=[state])
    assert "\x1b" not in str(caught.value)
    assert states() == {"a": "usable"}


def test_drop_takes_all_of_them_by_the_header_alone() -> None:
    build(disk().bitmap(b"a").bitmaps_extension(nb_bitmaps=2))
    with pytest.raises(Exception, match="exactly 2 entries"):
        open_image("disk.qcow2", writable=True)
    (dropped,) = drop_bitmaps("disk.qcow2")
    assert dropped.state is BitmapState.DAMAGED
    assert bitmap_health("disk.qcow2") == []
    report = check_image(Path("disk.qcow2").read_bytes())
    assert report.is_sound
    assert report.leaks == 2
    with open_image("disk.qcow2", writable=True) as image:
        image.pwrite(b"x", 0)
    assert drop_bitmaps("disk.qcow2") == []


def test_a_missing_file_is_an_error_of_the_system() -> None:
    with pytest.raises(FileNotFoundError):
        bitmap_health("nowhere")
    with pytest.raises((FileNotFoundError, MissingReferenceError)):
        prune_bitmaps("nowhere")
    assert not os.listdir()
