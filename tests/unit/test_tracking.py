"""Dirty bitmaps that follow their disk: the bits, what a crash at any moment leaves of them, and other sizes."""

from __future__ import annotations

import errno
import itertools
import random
import struct
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest

from qcow2_plugin.engine.allocator import Allocator
from qcow2_plugin.engine.dirty_bitmaps.bitmaps import read_bitmaps
from qcow2_plugin.engine.dirty_bitmaps.tracking import BitmapTracker
from qcow2_plugin.engine.header import read_header
from qcow2_plugin.engine.image_file import ImageFile
from qcow2_plugin.engine.metadata import read_metadata
from qcow2_plugin.engine.writeback import write_refcounts
from qcow2_plugin.errors import ResizeError, TruncatedImageError
from qcow2_plugin.storage import Buffer
from tests.support.builder import BuiltImage, ImageBuilder
from tests.support.crash_states import Crashes
from tests.support.image_checker import BitmapFacts, check_image
from tests.support.in_memory import open_in_memory
from tests.support.recording import Action, Log, RecordingStorage

CLUSTER = 512
GRANULE = 512
COVERED = 8 * CLUSTER * GRANULE
"""Guest bytes below one cluster of bits: 2 MiB."""
DISK = 3 * COVERED - 1024
IN_USE, AUTO = 1, 2


class Session:
    """An image whose bitmaps are kept, without the disk itself. `is_full` makes writes fail."""

    def __init__(self, content: bytes) -> None:
        self.log = Log()
        self.storage = _Storage(self.log, 0, content)
        header = read_header(self.storage)
        self.file = ImageFile(self.storage, header, read_metadata(self.storage, header))
        self.allocator = Allocator(self.file)
        self.tracker = BitmapTracker(self.file, read_bitmaps(self.storage, header))

    def begin(self) -> None:
        if self.tracker.begin():
            self.file.barrier()

    def change(self, offset: int, length: int) -> None:
        self.begin()
        self.tracker.mark(offset, length)

    def resize(self, size: int) -> None:
        self.begin()
        self.tracker.resize(size, self.allocator)
        self.file.update_header(size=size)
        self.file.barrier()

    def write_back(self) -> None:
        retired = self.allocator.take_retired()
        write_refcounts(self.file, self.allocator.take_writes())
        self.file.barrier()
        self.allocator.written()
        for each in retired:
            self.allocator.reclaim(each)

    def close(self) -> None:
        if self.tracker.has_held:
            self.tracker.store_bits(self.allocator)
            self.write_back()
            self.tracker.store_tables()
            self.file.barrier()
            self.tracker.finish()
            self.file.barrier()
        self.write_back()
        self.write_back()

    def reopened(self) -> Session:
        return Session(bytes(self.storage.content))

    def bitmaps(self) -> dict[str, BitmapFacts]:
        """What is on disk, by somebody else's account; nothing is wrong with it and nothing is lost."""
        report = check_image(self.storage.content)
        assert report.is_sound and not report.all_leaks, report
        return {bitmap.name.decode(): bitmap for bitmap in report.bitmaps}


class _Storage(RecordingStorage):
    is_full = False
    writes_left: int | None = None
    """Until one fails."""

    def write_from(self, buffer: Buffer, host_offset: int) -> None:
        if self.writes_left is not None:
            self.writes_left -= 1
        if self.is_full or self.writes_left == -1:
            raise OSError(errno.ENOSPC, "full")
        super().write_from(buffer, host_offset)


numbers = frozenset[int]


def granules(ranges: Iterable[tuple[int, int]], granule: int = GRANULE) -> frozenset[int]:
    return numbers(
        number for offset, length in ranges for number in range(offset // granule, (offset + length - 1) // granule + 1)
    )


def image(size: int = DISK, cluster_bits: int = 9) -> ImageBuilder:
    """A disk with room in its L1 table for several times its size."""
    l1_size = -(-32 * COVERED // (CLUSTER * CLUSTER // 8)) if cluster_bits == 9 else None
    return ImageBuilder(size, cluster_bits, l1_size=l1_size)


def build(tmp_path: Path, told: ImageBuilder) -> tuple[bytes, BuiltImage]:
    built = told.build(tmp_path / "image.qcow2")
    return built.path.read_bytes(), built


def session(tmp_path: Path, told: ImageBuilder) -> Session:
    return Session(build(tmp_path, told)[0])


# ---- marking and storing


def test_what_changes_is_marked_in_place_and_in_new_clusters(tmp_path: Path) -> None:
    before = [(0, 512), (COVERED - 512, 512)]
    opened = session(tmp_path, image().bitmap(b"b", before, granularity_bits=9, flags=AUTO))
    changes = [(1024, 512), (COVERED + 7, 1), (2 * COVERED - 1, 2), (DISK - 1, 1)]
    for offset, length in changes:
        opened.change(offset, length)
    assert opened.bitmaps()["b"].granules is None
    opened.close()
    found = opened.bitmaps()["b"]
    assert found.granules == granules(before + changes)
    assert found.flags == AUTO


@pytest.mark.parametrize(
    ("cluster_bits", "granularity_bits", "size"),
    [
        (9, 9, 5 << 20),
        (9, 12, (5 << 20) + 512),
        (10, 16, 5 << 20),
        (12, 9, 40 << 20),
        (14, 9, (100 << 20) + 512),  # a cluster of bits is kept in 4 chunks
        (16, 16, 5 << 20),
        (9, 31, 5 << 20),
    ],
)
def test_any_ranges_of_any_granularity(tmp_path: Path, cluster_bits: int, granularity_bits: int, size: int) -> None:
    chance = random.Random(granularity_bits)
    told = image(size, cluster_bits).bitmap(b"b", granularity_bits=granularity_bits, flags=AUTO)
    opened = session(tmp_path, told)
    changes: list[tuple[int, int]] = []
    for _ in range(3):
        for _ in range(20):
            offset = chance.randrange(size)
            changes.append((offset, min(chance.choice([1, 511, 4096, 1 << 20]), size - offset)))
            opened.change(*changes[-1])
        opened.close()
        assert opened.bitmaps()["b"].granules == granules(changes, 1 << granularity_bits)
        opened = opened.reopened()


def test_several_bitmaps_each_with_its_granularity(tmp_path: Path) -> None:
    told = image().bitmap(b"fine", granularity_bits=9, flags=AUTO)
    told.bitmap(b"off", [(0, 512)], granularity_bits=9)
    told.bitmap(b"a name of another length", granularity_bits=20, flags=AUTO, extra=b"").bitmap(
        b"extra", granularity_bits=16, flags=AUTO | 4, extra=b"unknown"
    )
    opened = session(tmp_path, told)
    opened.change(COVERED + 100, 2000)
    opened.close()
    found = opened.bitmaps()
    assert found["fine"].granules == granules([(COVERED + 100, 2000)])
    assert found["a name of another length"].granules == granules([(COVERED + 100, 2000)], 1 << 20)
    assert found["extra"].granules == granules([(COVERED + 100, 2000)], 1 << 16)
    assert found["extra"].flags == AUTO | 4
    assert found["off"] == BitmapFacts(b"off", 0, 9, frozenset({0}))


def test_all_ones_stay_a_word_in_the_table(tmp_path: Path) -> None:
    told = image().bitmap(b"b", granularity_bits=9, flags=AUTO, table=[1, 0, 0])
    content, built = build(tmp_path, told)
    opened = Session(content)
    opened.change(512, 4096)
    opened.close()
    table = opened.storage.pread(24, built.bitmap_table_offsets[0])
    assert struct.unpack(">3Q", table) == (1, 0, 0)
    assert len(opened.bitmaps()["b"].granules or ()) == 4096


def test_nothing_new_writes_nothing_but_flags(tmp_path: Path) -> None:
    told = image().bitmap(b"b", [(512, 512)], granularity_bits=9, flags=AUTO)
    content, built = build(tmp_path, told)
    opened = Session(content)
    opened.change(512, 512)
    opened.close()
    writes = [(call.offset, call.length) for call in opened.log.calls if call.length]
    assert writes == [(built.bitmap_entry_offsets[0] + 12, 4)] * 2
    assert opened.storage.content == content


def test_without_a_change_nothing_is_written(tmp_path: Path) -> None:
    opened = session(tmp_path, image().bitmap(b"b", granularity_bits=9, flags=AUTO))
    assert not opened.tracker.has_held
    opened.close()
    assert not any(call.length for call in opened.log.calls)


def test_an_image_without_bitmaps(tmp_path: Path) -> None:
    opened = session(tmp_path, image())
    assert opened.tracker.is_empty
    assert not opened.tracker.begin()
    opened.tracker.mark(0, 512)
    assert opened.tracker.covers(0, 512)
    opened.tracker.require_resizable(7 * DISK)
    opened.resize(DISK // 1024 * 512)
    opened.close()
    assert {call.offset // 8 for call in opened.log.calls if call.length} == {3}  # the size


# ---- which ones are kept


def test_enabled_bitmaps_alone_are_held(tmp_path: Path) -> None:
    told = image().bitmap(b"off", granularity_bits=9).bitmap(b"on", granularity_bits=9, flags=AUTO)
    opened = session(tmp_path, told)
    assert not opened.tracker.is_empty
    assert opened.tracker.begin()
    assert not opened.tracker.begin()
    assert opened.tracker.has_held
    found = opened.bitmaps()
    assert (found["off"].flags, found["on"].flags) == (0, AUTO | IN_USE)
    opened.close()
    assert opened.bitmaps()["on"].flags == AUTO
    assert not opened.tracker.has_held
    assert opened.tracker.begin()


@pytest.mark.parametrize(
    "fields",
    [{"type": 2}, {"flags": AUTO | 8}, {"extra": b"x"}, {"table_size": 1}, {"granularity_bits": 8}, {"flags": 3}],
)
def test_an_enabled_bitmap_that_cannot_be_kept_is_told_to_be_stale(tmp_path: Path, fields: dict[str, int]) -> None:
    told = image().bitmap(b"b", **{"granularity_bits": 9, "flags": AUTO, **fields})  # type: ignore[arg-type]
    content, built = build(tmp_path, told)
    opened = Session(content)
    assert opened.tracker.is_empty
    flags = int.from_bytes(content[built.bitmap_entry_offsets[0] + 12 : built.bitmap_entry_offsets[0] + 16], "big")
    assert opened.tracker.begin() == (not flags & IN_USE)
    opened.tracker.mark(0, 512)
    assert not opened.tracker.has_held
    opened.close()
    expected = bytearray(content)
    expected[built.bitmap_entry_offsets[0] + 15] |= IN_USE
    assert opened.storage.content == expected


def test_a_disabled_bitmap_that_is_unknown_is_left_alone(tmp_path: Path) -> None:
    content, _ = build(tmp_path, image().bitmap(b"b", granularity_bits=9, flags=8, type=7))
    opened = Session(content)
    opened.change(0, 512)
    opened.close()
    assert opened.storage.content == content


# ---- covers


def test_what_is_marked_is_covered(tmp_path: Path) -> None:
    told = image().bitmap(b"a", granularity_bits=9, flags=AUTO).bitmap(b"b", granularity_bits=12, flags=AUTO)
    tracker = session(tmp_path, told).tracker
    assert tracker.covers(77, 0)
    assert not tracker.covers(0, 1)
    tracker.mark(COVERED - 5000, 10000)
    for offset, length, expected in [
        (COVERED - 5000, 10000, True),
        (COVERED - 5120, 10240, True),
        (COVERED - 5121, 2, False),
        (COVERED + 5119, 1, True),
        (COVERED + 5120, 1, False),  # b has it
        (COVERED - 1, 2, True),
        (COVERED - 6000, 100, False),
        (0, DISK, False),
    ]:
        assert tracker.covers(offset, length) == expected, (offset, length)


@pytest.mark.parametrize("seed", range(4))
def test_covers_agrees_with_a_plain_set(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    tracker = session(tmp_path, image().bitmap(b"a", granularity_bits=9, flags=AUTO)).tracker
    marked = numbers()

    def somewhere() -> tuple[int, int]:
        offset = min(chance.choice([0, COVERED, 2 * COVERED]) + chance.randrange(30000), DISK - 1)
        return offset, min(chance.randrange(1, 20000), DISK - offset)

    for _ in range(200):
        asked = somewhere()
        assert tracker.covers(*asked) == (granules([asked]) <= marked)
        changed = somewhere()
        tracker.mark(*changed)
        marked |= granules([changed])


def test_what_lies_behind_the_disk_is_new_and_never_covered(tmp_path: Path) -> None:
    opened = session(tmp_path, image(COVERED).bitmap(b"a", granularity_bits=9, flags=AUTO))
    opened.change(COVERED - 512, 5120)
    assert opened.tracker.covers(COVERED - 512, 512)
    assert not opened.tracker.covers(COVERED - 512, 1024)
    assert not opened.tracker.covers(COVERED, 512)
    opened.resize(2 * COVERED)
    assert not opened.tracker.covers(COVERED, 512)
    opened.close()
    assert opened.bitmaps()["a"].granules == numbers([COVERED // 512 - 1])


# ---- when it fails


def test_a_full_disk_leaves_the_bitmap_held_until_it_can_be_stored(tmp_path: Path) -> None:
    told = image().bitmap(b"b", [(0, 512)], granularity_bits=9, flags=AUTO)
    opened = session(tmp_path, told)
    opened.change(512, 512)
    opened.change(COVERED, 512)
    opened.storage.is_full = True
    with pytest.raises(OSError, match="full"):
        opened.close()
    assert opened.bitmaps()["b"].flags & IN_USE
    opened.storage.is_full = False
    opened.close()
    assert opened.bitmaps()["b"].granules == granules([(0, 1024), (COVERED, 512)])


def test_new_clusters_are_given_back_if_they_cannot_be_written(tmp_path: Path) -> None:
    opened = session(tmp_path, image().bitmap(b"b", granularity_bits=9, flags=AUTO))
    opened.change(0, DISK)
    opened.storage.is_full = True
    with pytest.raises(OSError, match="full"):
        opened.tracker.store_bits(opened.allocator)
    opened.storage.is_full = False
    opened.write_back()
    assert opened.bitmaps()["b"].flags == AUTO | IN_USE  # and not a cluster is lost
    opened.close()
    assert opened.bitmaps()["b"].granules == numbers(range(DISK // 512))


def test_bits_that_were_cut_off_by_others_are_not_replaced(tmp_path: Path) -> None:
    content, built = build(tmp_path, image().bitmap(b"b", [(0, 512)], granularity_bits=9, flags=AUTO))
    opened = Session(content)
    opened.change(512, 512)
    del opened.storage.content[built.bitmap_data_offsets[0][0] :]
    with pytest.raises(TruncatedImageError, match="lies past the end of the file"):
        opened.tracker.store_bits(opened.allocator)


def test_a_bitmap_is_not_settled_before_it_is_stored(tmp_path: Path) -> None:
    opened = session(tmp_path, image().bitmap(b"b", granularity_bits=9, flags=AUTO))
    opened.change(512, 512)
    opened.tracker.finish()
    assert opened.tracker.has_held
    opened.tracker.store_bits(opened.allocator)
    opened.tracker.finish()
    assert opened.tracker.has_held
    opened.write_back()
    opened.tracker.store_tables()
    opened.tracker.finish()
    assert not opened.tracker.has_held
    assert opened.bitmaps()["b"].granules == numbers([1])


# ---- another size

SIZES = [
    512,
    COVERED - 512,
    COVERED,
    COVERED + 512,
    2 * COVERED + 1024,
    DISK,
    DISK + 512,
    3 * COVERED,
    20 * COVERED - 512,
    21 * COVERED + 4096,
]
"""A table of 64 entries, for 20 and more of the finest granules of all bitmaps, does not move; see below."""


def many(size: int) -> tuple[ImageBuilder, dict[str, tuple[int, frozenset[int]]]]:
    """Bitmaps of all kinds over a disk, and what they mark: granularity and granules."""
    middle = [(size // 2 // 512 * 512, 512), (0, 512), (size - 512, 512)]
    told = image(size).bitmap(b"enabled", middle, granularity_bits=9, flags=AUTO)
    told.bitmap(b"disabled", middle, granularity_bits=9)
    told.bitmap(b"coarse", middle, granularity_bits=13, flags=AUTO)
    told.bitmap(b"ones", granularity_bits=9, table=[1] * -(-size // COVERED), flags=AUTO)
    told.bitmap(b"disabled ones", granularity_bits=9, table=[1] * -(-size // COVERED))
    told.bitmap(b"none", granularity_bits=9)
    return told, {
        "enabled": (512, granules(middle)),
        "disabled": (512, granules(middle)),
        "coarse": (8192, granules(middle, 8192)),
        "ones": (512, numbers(range(size // 512))),
        "disabled ones": (512, numbers(range(size // 512))),
        "none": (512, numbers()),
    }


@pytest.mark.parametrize("old_size", SIZES)
@pytest.mark.parametrize("new_size", SIZES)
def test_all_bitmaps_follow_the_disk(tmp_path: Path, old_size: int, new_size: int) -> None:
    told, marked = many(old_size)
    opened = session(tmp_path, told)
    opened.change(old_size // 3 // 512 * 512, 512)
    opened.resize(new_size)
    changed = new_size - 512
    opened.change(changed, 512)
    opened.close()
    found = opened.bitmaps()
    assert not any(bitmap.flags & IN_USE for bitmap in found.values())
    for name, (granule, before) in marked.items():
        is_enabled = found[name].flags & AUTO
        expected = before | granules([(old_size // 3 // 512 * 512, 512)], granule) if is_enabled else before
        expected &= numbers(range(-(-new_size // granule)))
        assert found[name].granules == (expected | granules([(changed, 512)], granule) if is_enabled else expected)


@pytest.mark.parametrize("sizes", [(64, 65), (65, 64), (63, 64), (1, 200), (200, 1), (65, 200, 64, 128, 129, 1)])
def test_tables_of_several_clusters(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """64 table entries fill a cluster; sizes are in clusters of bits."""
    told = ImageBuilder(sizes[0] * COVERED, 9, l1_size=200 * COVERED // 32768)
    told.bitmap(b"b", [(0, 512), ((sizes[0] - 1) * COVERED, 512)], granularity_bits=9, flags=AUTO)
    told.bitmap(b"c", [(0, 512)], granularity_bits=9)
    opened = session(tmp_path, told)
    expected = granules([(0, 512), ((sizes[0] - 1) * COVERED, 512)])
    for size in sizes[1:]:
        opened.resize(size * COVERED)
        opened.change((size - 1) * COVERED + 512, 512)
        expected = expected & numbers(range(size * COVERED // 512)) | {(size - 1) * 4096 + 1}
    opened.close()
    assert opened.bitmaps()["b"].granules == expected
    assert opened.bitmaps()["c"].granules == numbers([0])


MEBI = 1 << 20


@pytest.mark.parametrize("old_size", [5 * MEBI, 16 * MEBI, 40 * MEBI, 40 * MEBI + 512, 64 * MEBI, 70 * MEBI])
@pytest.mark.parametrize("new_size", [3 * MEBI, 16 * MEBI, 16 * MEBI + 512, 41 * MEBI, 64 * MEBI, 100 * MEBI])
def test_bits_that_are_kept_in_several_chunks_follow_the_disk(tmp_path: Path, old_size: int, new_size: int) -> None:
    """A chunk covers 16 MiB, a cluster of bits 64 MiB."""
    marked = [(0, 512), (old_size // 2, 512), (old_size - 512, 512)]
    told = ImageBuilder(old_size, 14, l1_size=4).bitmap(b"b", marked, granularity_bits=9, flags=AUTO)
    told.bitmap(b"ones", granularity_bits=9, table=[1] * -(-old_size // (64 * MEBI)), flags=AUTO)
    told.bitmap(b"new", granularity_bits=9, flags=AUTO)
    opened = session(tmp_path, told)
    changed = [(1024, 512), (old_size * 3 // 4 // 512 * 512, 512), (old_size - 1024, 512)]
    for offset, length in changed:
        opened.change(offset, length)
    opened.resize(new_size)
    assert not opened.tracker.covers(new_size - 2048, 512)
    opened.change(new_size - 2048, 512)
    opened.close()
    kept, last = numbers(range(new_size // 512)), granules([(new_size - 2048, 512)])
    found = opened.bitmaps()
    assert found["b"].granules == granules(marked + changed) & kept | last
    assert found["new"].granules == granules(changed) & kept | last
    assert found["ones"].granules == numbers(range(old_size // 512)) & kept | last


def test_memory_follows_what_is_marked(tmp_path: Path) -> None:
    """Clusters of 2 MiB do not make every bitmap take as much for its first bit."""
    told = ImageBuilder(1 << 30, 21)
    for number in range(50):
        told.bitmap(b"%d" % number, granularity_bits=9, flags=AUTO)
    tracker = session(tmp_path, told).tracker
    tracemalloc.start()
    tracker.mark(1 << 29, 512)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_stale_bits_behind_the_end_do_not_come_back(tmp_path: Path) -> None:
    """A careless writer left ones there, in the last cluster of bits and behind the last entry of the table."""
    told = image(COVERED + 512).bitmap(b"b", data=b"\xff" * 1024, granularity_bits=9, literal=True)
    content, built = build(tmp_path, told)
    damaged = bytearray(content)
    damaged[built.bitmap_table_offsets[0] + 16 : built.bitmap_table_offsets[0] + 512] = b"\xaa" * 496
    opened = Session(bytes(damaged))
    opened.resize(4 * COVERED)
    opened.close()
    assert opened.bitmaps()["b"].granules == numbers(range(COVERED // 512 + 1))


def test_back_and_forth_loses_what_was_cut(tmp_path: Path) -> None:
    opened = session(tmp_path, image().bitmap(b"b", granularity_bits=9, flags=AUTO))
    opened.change(0, DISK)
    opened.resize(COVERED + 512)
    opened.resize(DISK)
    for offset in (COVERED + 512, 2 * COVERED, DISK - 512):
        assert not opened.tracker.covers(offset, 512)
        opened.change(offset, 512)
    opened.close()
    expected = granules([(0, COVERED + 1024), (2 * COVERED, 512), (DISK - 512, 512)])
    assert opened.bitmaps()["b"].granules == expected


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"flags": IN_USE}, "it is in use"), ({"type": 2}, "its type 2"), ({"flags": 8}, "its flags")],
)
def test_a_bitmap_that_cannot_follow_refuses_another_size(tmp_path: Path, fields: dict[str, int], reason: str) -> None:
    told = image().bitmap(b"good", granularity_bits=9)
    told.bitmap(b"bad", granularity_bits=9, **fields)  # type: ignore[arg-type]
    content, _ = build(tmp_path, told)
    opened = Session(content)
    message = rf'bitmap "bad" cannot follow the disk to another size: {reason} .*; remove the bitmap first \(memory\)'
    for attempt in (opened.tracker.require_resizable, lambda size: opened.tracker.resize(size, opened.allocator)):
        with pytest.raises(ResizeError, match=message):
            attempt(COVERED)
    assert opened.storage.content == content


@pytest.mark.parametrize("size", [0, ((512 << 20) // CLUSTER + 1) * COVERED])
def test_sizes_that_no_bitmap_can_have(tmp_path: Path, size: int) -> None:
    opened = session(tmp_path, image().bitmap(b"b", granularity_bits=9))
    with pytest.raises(ResizeError, match=f'"b" cannot follow the disk to another size: it cannot describe {size} b'):
        opened.tracker.require_resizable(size)


def test_the_largest_size_that_a_bitmap_can_have(tmp_path: Path) -> None:
    opened = session(tmp_path, image().bitmap(b"b", granularity_bits=9))
    opened.tracker.require_resizable((512 << 20) // CLUSTER * COVERED)


def test_a_full_disk_leaves_the_old_size(tmp_path: Path) -> None:
    told = ImageBuilder(COVERED, 9, l1_size=200 * COVERED // 32768)
    told.bitmap(b"b", [(0, 512)], granularity_bits=9).bitmap(b"c", granularity_bits=9, flags=AUTO)
    opened = session(tmp_path, told)
    opened.change(512, 512)
    opened.tracker.resize(COVERED, opened.allocator)  # holds them all
    opened.storage.is_full = True
    with pytest.raises(OSError, match="full"):
        opened.resize(100 * COVERED)
    opened.storage.is_full = False
    opened.close()
    found = opened.bitmaps()
    assert (found["b"].granules, found["c"].granules) == (numbers([0]), numbers([1]))


# ---- crashes


def assert_survives(opened: Session, before: bytes, truths: list[dict[str, frozenset[int]]]) -> int:
    """In every crash state all is well formed, nothing is counted too low, and what is not in use is true: all bits
    that the bitmap of this name had at one of the times are there, and no others. How many states there were."""
    crashes = Crashes(opened.log, (before,))
    seen = set()
    for plan in crashes.plans():
        state = crashes.state(plan)
        if state.key in seen:
            continue
        seen.add(state.key)
        report = check_image(state.files[0].content())
        assert report.is_sound, (plan, report)
        for bitmap in report.bitmaps:
            if bitmap.granules is not None:
                assert any(bitmap.granules == truth[bitmap.name.decode()] for truth in truths), (plan, bitmap)
    return len(seen)


def test_a_crash_at_any_time_leaves_a_bitmap_right_or_in_use(tmp_path: Path) -> None:
    told = image().bitmap(b"x" * 480, [(0, 512)], granularity_bits=9)  # the next entry lies across a sector
    told.bitmap(b"b", [(0, 512)], granularity_bits=9, flags=AUTO).bitmap(b"c", granularity_bits=9, flags=AUTO)
    content, built = build(tmp_path, told)
    assert built.bitmap_entry_offsets[1] % 512 == 504
    opened = Session(content)
    opened.change(512, 512)
    opened.change(2 * COVERED, 512)
    opened.close()
    name, first = "x" * 480, numbers([0])
    old = {name: first, "b": first, "c": numbers()}
    changed = granules([(512, 512), (2 * COVERED, 512)])
    new = {name: first, "b": first | changed, "c": changed}
    assert assert_survives(opened, content, [old, new]) > 20


RESIZES = [(1, 2), (1, 70), (60, 63), (63, 70), (70, 63), (63, 60), (2, 1), (70, 1), (1, 0.5), (0.5, 1)]
"""In clusters of bits."""


def resizable(tmp_path: Path, old: float, new: float) -> tuple[Session, bytes, list[dict[str, frozenset[int]]], int]:
    """A session, its image, what the bitmaps mark before and after it, and the new size."""
    old_size, new_size = (int(count * COVERED) - 1024 for count in (old, new))
    told = ImageBuilder(old_size, 9, l1_size=100 * COVERED // 32768)
    marked = [(0, 512), (COVERED // 4, 512), (old_size - 512, 512)]
    told.bitmap(b"x" * 480, marked, granularity_bits=9)
    told.bitmap(b"b", marked, granularity_bits=9, flags=AUTO)
    told.bitmap(b"y", marked, granularity_bits=9)  # its bits lie behind b's table
    told.bitmap(b"ones", granularity_bits=9, table=[1] * -(-old_size // COVERED))
    content, built = build(tmp_path, told)
    assert built.bitmap_entry_offsets[1] % 512 == 504  # an entry that lies across a sector
    before = {name: granules(marked) for name in ("x" * 480, "b", "y")}
    before["ones"] = numbers(range(old_size // 512))
    after = {name: known & numbers(range(new_size // 512)) for name, known in before.items()}
    return Session(content), content, [before, after | {"b": after["b"] | {1}}], new_size


@pytest.mark.parametrize(("old", "new"), RESIZES)
def test_a_crash_while_bitmaps_follow_the_disk(tmp_path: Path, old: float, new: float) -> None:
    opened, content, truths, new_size = resizable(tmp_path, old, new)
    opened.change(512, 512)
    opened.resize(new_size)
    opened.close()
    assert assert_survives(opened, content, truths) > 20
    assert {name: bitmap.granules for name, bitmap in opened.bitmaps().items()} == truths[1]


@pytest.mark.parametrize(("old", "new"), RESIZES)
def test_pointers_have_changed_durably_when_bitmaps_have_followed(tmp_path: Path, old: float, new: float) -> None:
    """What they pointed to before may then be reused."""
    opened, _, _, new_size = resizable(tmp_path, old, new)
    opened.tracker.resize(new_size, opened.allocator)
    pointer = opened.file.header.bitmaps
    assert pointer is not None
    calls = list(enumerate(opened.log.calls))
    last_barrier = max(number for number, call in calls if call.action is Action.BARRIER)
    last_pointer = max(number for number, call in calls if call.offset >> 9 == pointer.directory_offset >> 9)
    assert last_pointer < last_barrier


@pytest.mark.parametrize(("old", "new"), RESIZES)
def test_a_write_that_fails_while_bitmaps_follow_the_disk(tmp_path: Path, old: float, new: float) -> None:
    """Whichever it is, no bitmap that may be wrong is settled afterwards."""
    for count in itertools.count():
        opened, _, (before, _), new_size = resizable(tmp_path, old, new)
        opened.begin()
        opened.storage.writes_left = count
        try:
            opened.tracker.resize(new_size, opened.allocator)
        except OSError as error:
            assert error.errno == errno.ENOSPC
        else:
            break
        opened.storage.writes_left = None
        opened.close()
        report = check_image(opened.storage.content)
        assert report.is_sound, (count, report)
        for bitmap in report.bitmaps:
            assert bitmap.granules in (None, before[bitmap.name.decode()]), (count, bitmap)
    assert count > 1


@pytest.mark.parametrize("then", [60 << 10, 96 << 10, 200 << 10])
def test_marks_behind_a_cut_that_was_not_to_be_are_not_taken_for_clean(tmp_path: Path, then: int) -> None:
    """The bitmaps have followed to a smaller disk, the disk has not, and later goes to another size."""
    told = ImageBuilder(96 << 10, 9).data(80, b"old")
    told.bitmap(b"on", [(70 << 10, 512)], granularity_bits=9, flags=AUTO).bitmap(
        b"off", [(50 << 10, 512)], granularity_bits=9
    )
    content, _ = build(tmp_path, told)
    storage = _Storage(Log(), 0, content)
    disk = open_in_memory(storage)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="broken"):
        patch.setattr(disk.file, "update_header", _broken)
        disk.resize(40 << 10, allow_shrink=True)
    disk.write_from(b"new" * 512, 45 << 10)
    disk.resize(then, allow_shrink=True)
    disk.close()
    report = check_image(storage.content)
    assert report.is_sound
    assert [bitmap.granules for bitmap in report.bitmaps] == [None, None]


def _broken(**_: object) -> None:
    raise OSError(errno.EIO, "broken")
