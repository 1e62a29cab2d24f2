"""The image checker counts what `qemu-img check` counts, on sound images and on damaged ones."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.builder import ImageBuilder, deflate
from tests.support.fields import COPIED
from tests.support.image_checker import Report, check_image
from tests.support.mixture import fill
from tests.support.tools import ToolError, qemu_img, qemu_io

KIB = 1 << 10
SIZE = 96 * KIB


def counts(path: Path) -> tuple[int, int]:
    """Corruptions and leaks as `qemu-img check` counts them. AssertionError where it gives up."""
    try:
        answer = qemu_img("check", "--output=json", "-f", "qcow2", path)
    except ToolError as error:
        assert error.returncode in (2, 3), error
        answer = error.stdout
    found = json.loads(answer)
    assert not found["check-errors"]
    return found.get("corruptions", 0), found.get("leaks", 0)


def assert_agrees(path: Path) -> Report:
    report = check_image(path.read_bytes())
    assert (len(report.corruptions), report.leaks) == counts(path), report
    return report


def mixed(cluster_bits: int = 9, *, refcount_bits: int = 16, extended_l2: bool = False) -> ImageBuilder:
    size = 1 << cluster_bits
    image = ImageBuilder(max(SIZE, 24 * size), cluster_bits, refcount_bits=refcount_bits, extended_l2=extended_l2)
    chance = random.Random(cluster_bits)
    for cluster in range(image.virtual_size // size):
        kind = chance.randrange(6)
        if kind < 2:
            image.data(cluster, chance.randbytes(size))
        elif kind == 2:
            image.zero(cluster, preallocated=chance.random() < 0.5)
        elif kind == 3 and refcount_bits > 4:
            image.compressed(cluster, chance.randbytes(size // 3))
    if extended_l2:
        image.subclusters(3, chance.randbytes(size), allocated=0x00FF00FF, zero=0xF0000000)
    return image


def with_snapshots() -> ImageBuilder:
    image = mixed()
    own = image.map()
    own.data(1, b"snapshot").data(70, b"another")
    return image.snapshot(b"1", b"shared").snapshot(b"2", b"own", own)


def with_bitmaps() -> ImageBuilder:
    image = mixed(12).bitmap(b"first", [(4096, 8192)], granularity_bits=9, flags=2)
    return image.bitmap(b"second", [(0, SIZE)], granularity_bits=12)


SOUND: dict[str, Callable[[], ImageBuilder]] = {
    "small": mixed,
    "4k": lambda: mixed(12),
    "64k": lambda: mixed(16),
    **{f"width {1 << order}": lambda order=order: mixed(9, refcount_bits=1 << order) for order in range(7)},  # type: ignore[misc] # lambda
    "extended": lambda: mixed(14, extended_l2=True),
    "snapshots": with_snapshots,
    "bitmaps": with_bitmaps,
    "version 2": lambda: ImageBuilder(SIZE, 9, version=2).data(0, b"x").compressed(9, b"y"),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_images(name: str, tmp_path: Path) -> None:
    SOUND[name]().build(tmp_path / "image")
    report = assert_agrees(tmp_path / "image")
    assert report.is_sound
    assert not report.leaks


@pytest.mark.parametrize(
    ("options", "cluster_size"), [("", 65536), ("cluster_size=512", 512), ("extended_l2=on", 65536)]
)
def test_images_of_qemu(options: str, cluster_size: int, tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", *(["-o", options] if options else []), path, "1M")
    for seed in range(2):
        fill(path, 1 << 20, cluster_size, seed=seed, compressed=not seed)
        qemu_img("snapshot", "-c", str(seed), path)
        qemu_img("bitmap", "--add", path, f"bitmap{seed}")
    report = assert_agrees(path)
    assert report.is_sound
    assert [bitmap.name for bitmap in report.bitmaps] == [b"bitmap0", b"bitmap1"]


def test_bitmaps_are_read(tmp_path: Path) -> None:
    with_bitmaps().build(tmp_path / "image")
    first, second = check_image((tmp_path / "image").read_bytes()).bitmaps
    assert (first.name, first.flags, first.granules) == (b"first", 2, frozenset(range(8, 24)))
    assert (second.flags, second.granules) == (0, frozenset(range(24)))


@pytest.mark.parametrize("name", [name for name in SOUND if name != "version 2"])
def test_damaged_tables(name: str, tmp_path: Path) -> None:
    """Entries of every table are overwritten with likely and unlikely words."""
    path = tmp_path / "image"
    built = SOUND[name]().build(path)
    content = path.read_bytes()
    chance = random.Random(name)
    pointing = [built.l1_offset, *(where.l1_offset for where in built.snapshots)]
    strict = [built.refcount_table_offset, *built.bitmap_table_offsets]  # qemu-img gives up on bad words in these
    places = [*built.l2_offsets.values(), *built.refcount_block_offsets.values(), *pointing, *strict]
    corruptions = leaks = 0
    for _ in range(8):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            table = chance.choice(places)
            struct.pack_into(
                ">Q",
                damaged,
                table + 8 * chance.choice([0, 0, 1, chance.randrange(32)]),
                (
                    unlikely_word(chance, len(content), built.cluster_size, reserved=table not in strict)
                    if table in pointing or table in strict
                    else chance.choice([unlikely_word(chance, len(content), 512), chance.getrandbits(64)])
                ),
            )
        path.write_bytes(damaged)
        report = assert_agrees(path)
        corruptions += len(report.corruptions)
        leaks += report.leaks
    assert corruptions
    assert leaks


def unlikely_word(chance: random.Random, file_size: int, alignment: int, *, reserved: bool = True) -> int:
    word = chance.choice([0, chance.randrange(file_size), file_size, 1 << 40]) // alignment * alignment
    if not reserved:
        return word
    return word | chance.choice([0, COPIED, COPIED]) | chance.choice([0, 0, 0, 1, 2, 1 << 60])


def test_a_file_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "image"
    for cut in (SIZE // 2, SIZE // 3 + 100):
        image = mixed()
        image.cut = cut
        image.build(path)
        assert assert_agrees(path).corruptions


def test_an_image_left_dirty(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=512", path, "64k")
    with pytest.raises(ToolError):
        qemu_io(path, "write 0 20k", "write 40k 1k", "flush", "abort")
    assert assert_agrees(path).corruptions
    assert check_image(path.read_bytes(), guess_refcounts=True).is_sound


# ---- what qemu-img does not see


def test_two_guest_clusters_in_one_place(tmp_path: Path) -> None:
    path = tmp_path / "image"
    place = ImageBuilder(SIZE, 9).data(0, b"a").build(path).data_offsets[0]
    ImageBuilder(SIZE, 9).data(0, b"a", host_offset=place).data(1, b"b", host_offset=place).build(path)
    report = assert_agrees(path)
    assert not report.corruptions
    assert report.damage == [f"data cluster {place >> 9} is referenced twice by one map"]


def test_guest_data_in_a_table(tmp_path: Path) -> None:
    path = tmp_path / "image"
    built = ImageBuilder(SIZE, 9).data(0, b"a").build(path)
    image = ImageBuilder(SIZE, 9).data(0, b"a").entry(1, built.l1_offset)
    image.refcount(built.l1_offset >> 9, 2).build(path)
    report = assert_agrees(path)
    assert not report.corruptions
    assert any("belongs to the L1 table and the data" in damage for damage in report.damage)


def test_a_cluster_in_the_wrong_place_of_a_data_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    image = ImageBuilder(SIZE, 9).data_file(tmp_path / "data", b"data").data(0, b"a").data(5, b"b", host_offset=3072)
    image.build(path)
    report = check_image(path.read_bytes())
    assert not report.corruptions
    assert report.damage == ["guest cluster 5 is at 0xc00 of the data file"]


def test_a_lost_copied_flag_in_a_data_file_image(tmp_path: Path) -> None:
    path = tmp_path / "image"
    ImageBuilder(SIZE, 9).data_file(tmp_path / "data", b"data").data(5, b"b", copied=False).build(path)
    assert len(check_image(path.read_bytes()).corruptions) == 1


@pytest.mark.parametrize("table", [[1, 1], [0x1000001], [2], []])
def test_bitmaps_that_no_reader_could_load(table: list[int], tmp_path: Path) -> None:
    path = tmp_path / "image"
    ImageBuilder(SIZE, 12).bitmap(b"b", granularity_bits=12, table=table).build(path)
    assert check_image(path.read_bytes()).damage


def test_a_bitmap_with_bits_behind_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "image"
    ImageBuilder(SIZE, 12).bitmap(b"b", granularity_bits=12, data=deflate(b"noise") * 5).build(path)
    assert check_image(path.read_bytes()).damage == ["bitmap b'b' marks granules behind the disk"]
