"""Health of bitmaps that lie: the answer is always that they are good for nothing, and costs next to nothing."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from qcow2_plugin.errors import Qcow2Error
from qcow2_plugin.operations.bitmap_health import BitmapState, bitmap_health
from qcow2_plugin.operations.bitmap_pruning import drop_bitmaps, prune_bitmaps
from tests.hostile.test_bitmaps import DIRECTORY, ENTRY, NAME, USE
from tests.support.builder import ImageBuilder, patch
from tests.support.fields import BITMAP_FIELDS, pack
from tests.support.hostile import IMAGE, Hostile, assert_harmless_text, unharmed
from tests.support.image_checker import check_image
from tests.support.watching import audited_opens

CLUSTER = 1 << 16
BY_ENTRY = {"table of 2 entries": "wrong-size", "in use": "inconsistent", "all flags": "inconsistent"}


@pytest.mark.parametrize("hostile", [*DIRECTORY, *ENTRY, *USE], ids=str)
def test_no_lie_is_believed(hostile: Hostile, tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    hostile.make(path)
    with unharmed(tmp_path):
        (whole,) = bitmap_health(path)  # whose modules may be loaded now
        with audited_opens() as names:
            (found,) = bitmap_health(path, [NAME])
    assert {name for name in names if not name.startswith("/proc/self/fd/")} <= {str(path)}
    assert found.needs_full
    assert found.state.value == (BY_ENTRY.get(hostile.name, "unknown") if hostile in ENTRY else "damaged")
    assert whole.state is found.state
    assert (whole.name is None) == (hostile in DIRECTORY)
    assert found.reason
    assert found.next_step
    for text in (found.reason, found.next_step):
        assert_harmless_text(text)


@pytest.mark.parametrize("hostile", [*DIRECTORY, *ENTRY, *USE], ids=str)
def test_they_can_be_got_rid_of(hostile: Hostile, tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    hostile.make(path)
    try:
        prune_bitmaps(path, include=["inconsistent", "wrong-size", "stale", "unknown"])
    except Qcow2Error as error:
        assert_harmless_text(str(error))
    drop_bitmaps(path)
    assert bitmap_health(path) == []
    assert check_image(path.read_bytes()).is_sound


@pytest.mark.parametrize(
    "name", [b"\x1b[2J", b"a\r\nb", b"a\0b", b"\x9b", b"\xff\xfe", "\u202e".encode(), b"'; rm -r ~ #", b"n" * 1023]
)
def test_any_name_is_safe_to_print_and_to_paste(name: bytes, tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    ImageBuilder(CLUSTER).bitmap(name, flags=1).build(path)
    (found,) = bitmap_health(path)
    (missing,) = bitmap_health(path, [name + b"!"])
    for each in (found, missing):
        assert_harmless_text(each.next_step or "")
    if b"rm" in name:
        assert (found.next_step or "").endswith("image.qcow2 ''\"'\"'; rm -r ~ #'")


def test_many_large_tables_in_a_sparse_file(tmp_path: Path) -> None:
    """Thousands of bitmaps whose tables would be gigabytes of zeros to read."""
    path = tmp_path / IMAGE
    image = ImageBuilder(1 << 35, cluster_bits=9)
    entries = (1 << 35 >> 9) // 8 // 512
    count = 3000
    names = [b"%06d" % number for number in range(count)]
    directory = b"".join(
        pack(
            BITMAP_FIELDS,
            {
                "table_offset": (1 << 30) + number * 8 * entries,
                "table_size": entries,
                "flags": 0,
                "type": 1,
                "granularity_bits": 9,
                "name_size": 6,
                "extra_data_size": 0,
            },
            {},
        )
        + name
        + bytes(2)
        for number, name in enumerate(names)
    )
    image.bitmap(b"placeholder").bitmaps_extension(
        nb_bitmaps=count, directory_size=len(directory), directory_offset=1 << 29
    ).build(path)
    patch(path, 1 << 29, directory)
    with path.open("r+b") as file:
        file.truncate((1 << 30) + count * 8 * entries + CLUSTER)
    with unharmed(tmp_path, seconds=3, memory=300 << 20):
        found = bitmap_health(path)
    assert len(found) == count
    assert {each.state for each in found} == {BitmapState.USABLE, BitmapState.DAMAGED}
    assert [each for each in found if each.reason and "64 MiB of bitmap tables" in each.reason]


def test_a_table_that_all_bitmaps_share_is_not_read_for_each(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    image = ImageBuilder(1 << 20)
    for number in range(2000):
        image.bitmap(b"%d" % number)
    built = image.build(path)
    for offset in built.bitmap_entry_offsets:
        patch(path, offset, struct.pack(">Q", built.bitmap_table_offsets[0]))
    with unharmed(tmp_path, seconds=1):
        found = bitmap_health(path)
    assert {each.state for each in found} == {BitmapState.DAMAGED}
