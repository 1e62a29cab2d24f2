"""Requests at the same time: held at a chosen point one by one, then many at random under a checker.

A request that is held has its place already and its bytes are still to come. Whatever others do meanwhile, those bytes
must reach nobody else's cluster and no table, and what others read, write, flush and resize must be as if one had gone
after the other.
"""

from __future__ import annotations

import itertools
import random
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qcow2_plugin.engine.writable import WritableImage
from qcow2_plugin.errors import FailedImageError, OutOfRangeError
from qcow2_plugin.storage import Buffer
from tests.support.builder import ImageBuilder
from tests.support.gated import GatedStorage, Running
from tests.support.image_checker import OFFSET_MASK, check_image
from tests.support.in_memory import open_in_memory
from tests.support.memory_storage import MemoryStorage
from tests.support.registers import Event, violation

CLUSTER = 512
SLICE = CLUSTER * CLUSTER // 8  # guest bytes below one L2 table
SLICES = 64
OLD, NEW, ZEROS = b"old " * 128, b"new!" * 128, bytes(CLUSTER)


def text(number: int, length: int = CLUSTER) -> bytes:
    """Bytes that are like no others."""
    return random.Random(number).randbytes(length)


def disk(cluster_bits: int = 9, slices: int = SLICES, **options: object) -> ImageBuilder:
    """An empty one of so many slices of 512-byte clusters, or as large with other clusters."""
    return ImageBuilder(slices * SLICE, cluster_bits, **options)  # type: ignore[arg-type] # the builder's own


@dataclass
class Opened:
    """An image in memory; `storage` is its file, `data` where guest data goes."""

    image: WritableImage
    storage: GatedStorage
    data: GatedStorage
    backing: bytes | None

    def close(self) -> None:
        """Then nothing is wrong with the file, not even a leak."""
        self.image.close()
        report = check_image(self.storage.content)
        assert not report.corruptions and not report.damage, [*report.corruptions, *report.damage]
        assert not report.all_leaks, f"{report.all_leaks} leaks"

    def again(self) -> WritableImage:
        """The same files, opened anew."""
        data = None if self.data is self.storage else MemoryStorage(self.data.content)
        return open_in_memory(MemoryStorage(self.storage.content), data, self.backing)

    def uses(self, host_offset: int) -> bool:
        """True if the disk, or its L1 table, names the host cluster."""
        header = self.image.header
        words = struct.iter_unpack(">Q", self.storage.pread(8 * header.l1_size, header.l1_table_offset))
        if any(word & OFFSET_MASK == host_offset for (word,) in words):
            return True
        return any(
            extent.host_offset is not None and extent.host_offset <= host_offset < extent.host_offset + extent.length
            for extent in self.image.extents(whole_chain=False)
        )


def opened(
    told: ImageBuilder,
    folder: Path,
    *,
    backing: bytes | None = None,
    cache_size: int = 1 << 20,
    keeper: type[GatedStorage] = GatedStorage,
) -> Opened:
    if backing is not None:
        told.backing(b"backing", b"raw")
    storage = keeper(told.build(folder / "image").path.read_bytes(), "image")
    data = storage if told.data_path is None else keeper(told.data_path.read_bytes(), "data")
    image = open_in_memory(storage, None if data is storage else data, backing, cache_size)
    return Opened(image, storage, data, backing)


# ---- a cluster is given back while somebody still has it: every order of the steps

STEPS = 7


def give_back_and_reuse(files: Opened, step: int) -> None:
    """Step by step: the first cluster of the disk is discarded, and its place becomes somebody else's."""
    if step == 0:
        files.image.discard(0, CLUSTER)
    elif step % 2:
        files.image.flush()
    else:
        for number in (2 * step, 2 * step + 1):  # a table and data each
            files.image.pwrite(text(number), number * SLICE)


def assert_reused(files: Opened, host_offset: int) -> None:
    """By now nobody has it any more; the contents of those who got places are their own."""
    for number in range(4, 2 * STEPS, 4):
        for each in (number, number + 1):
            assert files.image.pread(CLUSTER, each * SLICE) == text(each)
    files.image.flush()
    files.image.pwrite(text(40), 40 * SLICE)
    files.image.pwrite(text(41), 41 * SLICE)
    files.image.flush()
    assert files.uses(host_offset)
    assert files.image.pread(2 * CLUSTER, 40 * SLICE) == text(40) + ZEROS


@pytest.mark.parametrize("landing", range(STEPS + 1))
@pytest.mark.parametrize("way", ["placed", "straight"])
def test_a_late_write_lands_in_nobody_elses_cluster(tmp_path: Path, way: str, landing: int) -> None:
    told = disk().data(0, OLD).data(1, text(1))
    files = opened(told, tmp_path)
    host_offset = told.build(tmp_path / "image").data_offsets[0]
    files.image.pwrite(text(2), CLUSTER)  # the image has begun to change
    if way == "straight":
        files.image.pwrite(OLD, 0)
    gate = files.storage.hold("write_from", lambda offset, _: offset == host_offset)
    late = Running(files.image.pwrite, NEW, 0)
    gate.wait()
    for step in range(STEPS):
        if step == landing:
            gate.open()
            late.result()
        give_back_and_reuse(files, step)
        if step < landing:
            assert not files.uses(host_offset) or step == 0
    gate.open()
    late.result()
    assert files.image.pread(CLUSTER, 0) in (ZEROS, NEW)
    assert files.image.pread(CLUSTER, CLUSTER) == text(2)
    assert_reused(files, host_offset)
    files.close()
    with files.again() as image:
        assert image.pread(CLUSTER, 40 * SLICE) == text(40)


@pytest.mark.parametrize("landing", range(1, STEPS + 1))
@pytest.mark.parametrize("way", ["planned", "straight"])
def test_a_late_read_sees_nobody_elses_bytes(tmp_path: Path, way: str, landing: int) -> None:
    told = disk().data(0, OLD).data(1, text(1))
    files = opened(told, tmp_path)
    host_offset = told.build(tmp_path / "image").data_offsets[0]
    files.image.pwrite(text(2), CLUSTER)
    if way == "straight":
        assert files.image.pread(CLUSTER, 0) == OLD
    gate = files.storage.hold("read_into", lambda offset, _: offset == host_offset)
    late = Running(files.image.pread, CLUSTER, 0)
    gate.wait()
    for step in range(STEPS):
        if step == landing:
            gate.open()
            assert late.result() == OLD
        give_back_and_reuse(files, step)
    gate.open()
    assert late.result() == OLD
    assert_reused(files, host_offset)
    files.close()


def test_what_a_late_copy_reads_from_is_nobody_elses_meanwhile(tmp_path: Path) -> None:
    """The source of a copy on write is given back by another write, through the other name that it has."""
    told = disk().compressed(0, OLD).compressed(1, text(1))
    files = opened(told, tmp_path)
    gate = files.storage.hold("write_from", lambda _, data: b"part" in data)
    late = Running(files.image.pwrite, b"part", 8)
    gate.wait()
    files.image.discard(CLUSTER, CLUSTER)
    files.image.flush()
    files.image.pwrite(text(9), 9 * SLICE)
    files.image.flush()
    gate.open()
    late.result()
    assert files.image.pread(CLUSTER, 0) == OLD[:8] + b"part" + OLD[12:]
    files.close()


# ---- one cluster, several requests


KINDS: dict[str, tuple[Callable[[], ImageBuilder], bytes | None]] = {
    "plain": (lambda: disk(12), None),
    "backing": (lambda: disk(12), text(77, 3 << 14)),
    "subclusters": (lambda: disk(14, extended_l2=True), text(77, 3 << 14)),
    "snapshot": (lambda: disk(12).data(0, text(8, 4096)).snapshot(b"1", b"then"), None),
    "compressed": (lambda: disk(12).compressed(0, text(8, 2000)), None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_writes_to_one_cluster_that_has_no_place_yet(tmp_path: Path, kind: str) -> None:
    tell, backing = KINDS[kind]
    told = tell()
    files = opened(told, tmp_path, backing=backing)
    before = files.image.pread(4096, 0)
    gate = files.storage.hold("write_from", lambda _, data: NEW[:300] in data)
    first = Running(files.image.pwrite, NEW[:300], 100)
    gate.wait()
    second = Running(files.image.pwrite, OLD[:200], 300)
    assert second.waits
    assert files.image.pread(4096, 0) == before, "a read does not wait, and sees nothing of it"
    gate.open()
    first.result()
    second.result()
    expected = before[:100] + NEW[:200] + OLD[:200] + before[500:]
    assert files.image.pread(4096, 0) == expected
    if kind == "snapshot":
        assert files.image.at_snapshot("1").pread(4096, 0) == before
    files.close()
    with files.again() as image:
        assert image.pread(4096, 0) == expected


def test_writes_to_other_clusters_do_not_wait(tmp_path: Path) -> None:
    files = opened(disk(), tmp_path)
    gate = files.storage.hold("write_from", lambda _, data: data == NEW)
    first = Running(files.image.pwrite, NEW, 0)
    gate.wait()
    files.image.pwrite(OLD, CLUSTER)
    files.image.pwrite(OLD, SLICE)
    files.image.flush()
    assert files.image.pread(2 * CLUSTER, 0) == ZEROS + OLD
    gate.open()
    first.result()
    assert files.image.pread(2 * CLUSTER, 0) == NEW + OLD
    files.close()


@pytest.mark.parametrize("verb", ["zero", "keep", "discard"])
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("landing", [0, 1, 2])
def test_a_late_write_and_zeros_in_a_data_file(tmp_path: Path, verb: str, raw: bool, landing: int) -> None:
    told = disk().data_file(tmp_path / "data", b"data", raw=raw).data(0, OLD).data(1, text(1))
    files = opened(told, tmp_path)
    files.image.pwrite(OLD, 0)
    files.image.pwrite(text(1), CLUSTER)
    gate = files.data.hold("write_from", lambda offset, _: offset == 0)
    late = Running(files.image.pwrite, NEW, 0)
    gate.wait()
    if landing == 0:
        gate.open()
        late.result()
    zeros = Running(clear, files.image, verb, 0, CLUSTER)
    if landing == 1:
        assert zeros.waits in (False, True)
        gate.open()
        late.result()
        zeros.result()
    elif zeros.waits:  # then for the late write
        gate.open()
    zeros.result()
    gate.open()
    late.result()
    seen = files.image.pread(CLUSTER, 0)
    assert seen == ZEROS if landing == 0 else seen in (ZEROS, NEW)
    if raw:
        assert files.data.content[:CLUSTER] == seen, "a raw data file holds what the guest sees"
    files.image.pwrite(b"later", 0)
    assert files.image.pread(CLUSTER, 0) == b"later" + seen[5:]
    files.close()


def clear(image: WritableImage, verb: str, offset: int, length: int) -> None:
    if verb == "discard":
        image.discard(offset, length)
    else:
        image.write_zeroes(offset, length, may_unmap=verb == "zero")


@pytest.mark.parametrize("verb", ["zero", "discard"])
def test_a_raw_data_file_follows_whatever_the_caches_forget(tmp_path: Path, verb: str) -> None:
    """A table that is forgotten and read again while a discard is on its way must not let writes slip past it."""
    told = disk().data_file(tmp_path / "data", b"data", raw=True).data(0, OLD).data(1, text(1))
    for number in range(1, 5):
        told.data(number * SLICE // CLUSTER, text(number))
    files = opened(told, tmp_path, cache_size=0)
    files.image.pwrite(OLD, CLUSTER)
    files.image.flush()
    gate = files.data.hold("write_zeroes", done=True)
    zeros = Running(clear, files.image, verb, 0, CLUSTER)
    gate.wait()
    for number in range(1, 5):
        assert files.image.pread(CLUSTER, number * SLICE) == text(number)
    files.image.pwrite(NEW[:200], CLUSTER)
    late = Running(files.image.pwrite, NEW, 0)
    assert late.waits in (True, False)
    gate.open()
    zeros.result()
    late.result()
    assert files.data.content[:CLUSTER] == files.image.pread(CLUSTER, 0)
    files.close()


# ---- flush, failure, close


def test_a_flush_does_not_count_for_writes_that_came_after_its_beginning(tmp_path: Path) -> None:
    files = opened(disk(), tmp_path)
    files.image.pwrite(OLD, 0)
    gate = files.storage.hold("barrier", nth(2), done=True)  # its last one
    first = Running(files.image.flush)
    gate.wait()
    files.image.pwrite(NEW, 0)
    others = [Running(files.image.flush) for _ in range(3)]
    assert all(each.waits for each in others)
    barriers = files.storage.barriers
    gate.open()
    first.result()
    for each in others:
        each.result()
    assert files.storage.barriers == barriers + 1, "one barrier for all of them, and not none"
    files.close()


@pytest.mark.parametrize("way", ["new place", "in place"])
def test_a_barrier_fails_while_a_write_is_on_its_way(tmp_path: Path, way: str) -> None:
    told = disk().data(0, OLD)
    files = opened(told, tmp_path)
    files.image.pwrite(text(1), SLICE)
    offset = 0 if way == "in place" else 2 * SLICE
    gate = files.storage.hold("write_from", lambda _, data: data == NEW)
    late = Running(files.image.pwrite, NEW, offset)
    gate.wait()
    files.storage.barrier = failing  # type: ignore[method-assign] # fails from now on
    with pytest.raises(OSError, match="not durable"):
        files.image.flush()
    gate.open()
    with suppress(FailedImageError):
        late.result()
    assert_takes_no_changes(files.image)
    assert files.image.pread(CLUSTER, SLICE) == text(1)
    del files.storage.barrier  # it would succeed again
    assert_takes_no_changes(files.image)
    files.image.close()


def failing() -> None:
    raise OSError(5, "not durable")


def assert_takes_no_changes(image: WritableImage) -> None:
    changes: list[Callable[[], object]] = [
        lambda: image.pwrite(b"x" * CLUSTER, 0),
        lambda: image.pwrite(b"x", SLICE),
        lambda: image.write_zeroes(0, CLUSTER),
        lambda: image.discard(0, CLUSTER),
        lambda: image.resize(image.virtual_size + SLICE),
        image.flush,
    ]
    for change in changes:
        with pytest.raises(FailedImageError):
            change()


def test_what_many_threads_wrote_is_there_after_close(tmp_path: Path) -> None:
    files = opened(disk(slices=256), tmp_path)
    writers = [Running(write_every, files.image, start) for start in range(6)]
    for each in writers:
        each.result()
    files.close()
    files.image.close()
    with files.again() as image:
        for number in range(6 * 40):
            assert image.pread(CLUSTER, number * SLICE) == text(number)


def write_every(image: WritableImage, start: int) -> None:
    for number in range(start, 6 * 40, 6):
        image.pwrite(text(number), number * SLICE)
        if number % 50 == 0:
            image.flush()


# ---- another size of the disk


def test_a_long_write_that_needs_room_does_not_meet_a_resize_for_ever(tmp_path: Path) -> None:
    """It writes back in its middle, while the resize waits for it to end."""
    told = disk(slices=3000).data(63, OLD)
    files = opened(told, tmp_path)
    files.image.pwrite(OLD, 63 * CLUSTER)
    host_offset = told.build(tmp_path / "image").data_offsets[63]
    gate = files.storage.hold("write_from", lambda offset, _: offset == host_offset)
    late = Running(files.image.pwrite, NEW + NEW, 63 * CLUSTER)  # the first cluster in place, the second in a new table
    gate.wait()
    for number in range(2, 2051):
        files.image.pwrite(b"x" * CLUSTER, number * SLICE)
    assert files.image.tables.changed_size > 1 << 20, "the long write will not need room"
    growing = Running(files.image.resize, 3001 * SLICE)
    assert growing.waits
    gate.open()
    late.result()
    growing.result()
    assert files.image.pread(2 * CLUSTER, 63 * CLUSTER) == NEW + NEW
    files.close()


def test_the_first_write_to_a_raw_data_file_does_not_meet_a_resize_for_ever(tmp_path: Path) -> None:
    """It has clusters to itself while it writes back, and the resize waits for those with write-backs stopped."""
    told = disk().data_file(tmp_path / "data", b"data", raw=True).data(0, OLD)
    files = opened(told, tmp_path)
    gate = files.data.hold("write_zeroes")
    first = Running(files.image.pwrite, NEW, 3 * CLUSTER)
    if not gate.holds_after(1):
        gate = files.data.hold("write_from", done=True)
    growing = Running(files.image.resize, 2 * SLICES * SLICE)
    assert growing.waits in (True, False)
    gate.open()
    first.result()
    growing.result()
    assert files.image.pread(CLUSTER, 3 * CLUSTER) == NEW == files.data.content[3 * CLUSTER : 4 * CLUSTER]
    files.close()


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("verb", ["zero", "keep", "discard"])
def test_zeros_to_the_end_of_a_disk_that_grows_meanwhile(tmp_path: Path, verb: str, extended: bool) -> None:
    """The end of the range lies inside a cluster, and is the end of the disk when the request comes."""
    told = ImageBuilder(4 * 16384 + 512, 14, extended_l2=extended).data(1, OLD).data(4, OLD)
    files = opened(told, tmp_path)
    files.image.pwrite(OLD, 0)
    gate = files.storage.hold("barrier")
    growing = Running(files.image.resize, 4096 * SLICE)  # which needs a longer L1 table
    gate.wait()
    zeros = Running(clear, files.image, verb, 16384, 3 * 16384 + 512)
    assert zeros.waits
    gate.open()
    growing.result()
    zeros.result()
    view = files.image.pread(16 * 16384, 0)
    assert view[:16384] == OLD.ljust(16384, b"\0")
    assert view[16384 : 4 * 16384] == bytes(3 * 16384)
    assert view[4 * 16384 :] in (bytes(12 * 16384), OLD.ljust(12 * 16384, b"\0"))
    files.close()


@pytest.mark.parametrize("moment", range(1, 6))
def test_a_write_behind_the_new_end_of_a_disk_that_shrinks(tmp_path: Path, moment: int) -> None:
    told = disk()
    for number in range(8):
        told.data(number * SLICE // CLUSTER, text(number))
    files = opened(told, tmp_path)
    files.image.pwrite(text(1), SLICE)
    files.image.flush()
    gate = files.storage.hold("barrier", nth(moment))
    shrinking = Running(files.image.resize, 2 * SLICE, allow_shrink=True)
    gate.holds_after(1)  # there may be fewer barriers
    late = Running(files.image.pwrite, NEW, 5 * SLICE)
    if not late.waits:
        with suppress(OutOfRangeError):
            late.result()
    gate.open()
    shrinking.result()
    with suppress(OutOfRangeError):
        late.result()
    files.image.pwrite(NEW, CLUSTER)
    assert files.image.virtual_size == 2 * SLICE
    assert files.image.pread(2 * SLICE, 0) == (text(0) + NEW).ljust(SLICE, b"\0") + text(1).ljust(SLICE, b"\0")
    files.image.resize(8 * SLICE)
    assert files.image.pread(6 * SLICE, 2 * SLICE) == bytes(6 * SLICE)
    files.close()


def nth(moment: int) -> Callable[[int, bytes], bool]:
    """Fits the call with this number, counted from 1."""
    calls = itertools.count(1)
    return lambda host_offset, data: next(calls) == moment


@pytest.mark.parametrize("moment", range(1, 4))
def test_a_write_behind_the_old_end_of_a_disk_that_grows(tmp_path: Path, moment: int) -> None:
    """It is refused, or it is there afterwards and the bitmaps know of it."""
    told = ImageBuilder(4 << 16).data(0, OLD).bitmap(b"bitmap", [], flags=2)
    files = opened(told, tmp_path)
    files.image.pwrite(OLD, 0)
    gate = files.storage.hold("barrier", nth(moment))
    growing = Running(files.image.resize, 16 << 16)
    gate.holds_after(1)  # there may be fewer barriers
    late = Running(files.image.pwrite, NEW, 9 << 16)
    accepted = True
    if not late.waits:
        accepted = ends_well(late)
    gate.open()
    growing.result()
    accepted = accepted and ends_well(late)
    assert files.image.pread(CLUSTER, 9 << 16) == (NEW if accepted else ZEROS)
    files.close()
    (bitmap,) = check_image(files.storage.content).bitmaps
    assert bitmap.granules is not None
    assert ({0, 9} if accepted else {0}) <= bitmap.granules


def ends_well(late: Running[None]) -> bool:
    try:
        late.result()
    except OutOfRangeError:
        return False
    return True


@pytest.mark.parametrize("sizes", [(8, 16), (16, 8), (8, 2)])
def test_two_resizes(tmp_path: Path, sizes: tuple[int, int]) -> None:
    told = ImageBuilder(4 << 16).data_file(tmp_path / "data", b"data").data(0, OLD)
    files = opened(told, tmp_path)
    files.image.pwrite(OLD, 0)
    gate = files.data.hold("truncate")
    first = Running(files.image.resize, sizes[0] << 16)
    gate.wait()
    second = Running(files.image.resize, sizes[1] << 16, allow_shrink=True)
    assert second.waits in (True, False)
    gate.open()
    first.result()
    second.result()
    assert files.image.virtual_size in [size << 16 for size in sizes]
    assert files.image.header.virtual_size == files.image.virtual_size
    files.image.pwrite(NEW, files.image.virtual_size - CLUSTER)
    files.close()
    with files.again() as image:
        assert image.virtual_size == files.image.virtual_size
        assert image.pread(CLUSTER, image.virtual_size - CLUSTER) == NEW


# ---- many at random

SECONDS = 1.5
"""For what has no other end."""
THREADS = 6
REQUESTS = 800
"""Of each thread."""
GROUP = 8  # registers, one sector each, that lie side by side
GROUPS = 10


@dataclass
class Clients:
    """Threads that work on the registers of one disk, and what they saw. `stride` is the distance of two groups."""

    files: Opened
    stride: int
    histories: list[list[Event]] = field(default_factory=lambda: [[] for _ in range(GROUP * GROUPS)])
    problems: list[str] = field(default_factory=list)
    clock: Iterator[int] = field(default_factory=itertools.count)
    values: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def run(self, seed: str) -> None:
        chance = random.Random(seed)
        verbs = [self.write, self.read, self.zero, self.discard, self.flush, self.walk]
        try:
            for _ in range(REQUESTS):
                chance.choices(verbs, weights=(40, 34, 10, 10, 4, 2))[0](chance)
        except Exception as error:  # whatever it is, the test has to hear of it
            self.problems.append(repr(error))

    def place(self, chance: random.Random) -> tuple[int, int, int]:
        """First register, how many, guest offset."""
        group, first = chance.randrange(GROUPS), chance.randrange(GROUP)
        return group * GROUP + first, chance.randint(1, GROUP - first), group * self.stride + first * 512

    def write(self, chance: random.Random) -> None:
        first, count, offset = self.place(chance)
        values = [next(self.values) for _ in range(count)]
        data = b"".join(value.to_bytes(8, "big") * 64 for value in values)
        start = next(self.clock)
        self.files.image.write_from(memoryview(data), offset)
        self.note("write", first, values, start)

    def read(self, chance: random.Random) -> None:
        first, count, offset = self.place(chance)
        start = next(self.clock)
        data = self.files.image.pread(count * 512, offset)
        values = [self.value(data[index * 512 : (index + 1) * 512]) for index in range(count)]
        self.note("read", first, values, start)

    def value(self, sector: bytes) -> int:
        if sector != sector[:8] * 64:
            self.problems.append(f"a sector of several values: {sector.hex()}")
        return int.from_bytes(sector[:8], "big")

    def zero(self, chance: random.Random) -> None:
        first, count, offset = self.place(chance)
        length = count * 512
        if chance.random() < 0.4:  # all clusters that the group lies in
            first, count, offset, length = first - first % GROUP, GROUP, offset - offset % self.stride, self.stride
        start = next(self.clock)
        self.files.image.write_zeroes(offset, length, may_unmap=chance.random() < 0.6)
        self.note("write", first, [0] * count, start)

    def discard(self, chance: random.Random) -> None:
        group = chance.randrange(GROUPS)
        start = next(self.clock)
        self.files.image.discard(group * self.stride, self.stride)
        for register in range(group * GROUP, (group + 1) * GROUP):
            self.histories[register].append(Event("discard", 0, start, next(self.clock)))

    def flush(self, chance: random.Random) -> None:
        self.files.image.flush()
        time.sleep(chance.random() / 500)

    def walk(self, chance: random.Random) -> None:
        assert sum(extent.length for extent in self.files.image.extents()) >= GROUPS * self.stride

    def note(self, kind: str, first: int, values: list[int], start: int) -> None:
        end = next(self.clock)
        for register, value in enumerate(values, first):
            self.histories[register].append(Event(kind, value, start, end))  # type: ignore[arg-type] # one of the three

    def final(self) -> dict[int, int]:
        """What is in the registers when nobody works any more."""
        for first in range(0, GROUP * GROUPS, GROUP):
            start = next(self.clock)
            data = self.files.image.pread(GROUP * 512, first // GROUP * self.stride)
            values = [self.value(data[index * 512 : (index + 1) * 512]) for index in range(GROUP)]
            self.note("read", first, values, start)
        return {register: history[-1].value for register, history in enumerate(self.histories)}


class Jittery(GatedStorage):
    """Lets other threads go first now and then, in the middle of a request."""

    chance = random.Random(3)

    def _pass(self, call: object, host_offset: int = 0, data: Buffer = b"", *, done: bool = False) -> None:
        if self.chance.random() < 0.2:
            time.sleep(self.chance.random() / 5000)


WORLDS: dict[str, Callable[[Path], tuple[ImageBuilder, int, int]]] = {
    "512-byte clusters": lambda _: (disk(), SLICE, 0),
    "4 KiB clusters, backing": lambda _: (disk(12, slices=256), 1 << 17, 8000),
    "subclusters, backing": lambda _: (disk(14, slices=256, extended_l2=True), 1 << 14, 1 << 20),
    "bitmap": lambda _: (disk(12, slices=256).bitmap(b"bitmap", [], granularity_bits=9, flags=2), 1 << 14, 8000),
    "data file": lambda folder: (disk().data_file(folder / "data", b"data"), SLICE, 0),
    "raw data file": lambda folder: (disk().data_file(folder / "data", b"data", raw=True), SLICE, 0),
}


@contextmanager
def switching_often() -> Iterator[None]:
    """Threads take turns a hundred times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("world", WORLDS)
def test_requests_at_random_are_as_if_one_had_gone_after_the_other(tmp_path: Path, world: str, seed: int) -> None:
    told, stride, cache_size = WORLDS[world](tmp_path)
    backing = b"" if "backing" in world else None
    files = opened(told, tmp_path, backing=backing, cache_size=cache_size, keeper=Jittery)
    clients = Clients(files, stride)
    with switching_often():
        for each in [Running(clients.run, f"{seed}/{number}") for number in range(THREADS)]:
            each.result()
    assert not clients.problems
    last = clients.final()
    for register, history in enumerate(clients.histories):
        assert history, f"nobody used register {register}"
        assert violation(history) is None, f"register {register}: {violation(history)}"
    if world == "raw data file":
        for register, value in last.items():
            offset = register // GROUP * stride + register % GROUP * 512
            assert bytes(files.data.content[offset : offset + 8]) == value.to_bytes(8, "big")
    files.close()
    if world == "bitmap":
        (bitmap,) = check_image(files.storage.content).bitmaps
        written = {
            number for number, history in enumerate(clients.histories) if any(e.kind == "write" for e in history)
        }
        assert bitmap.granules is not None
        assert {register // GROUP * (stride >> 9) + register % GROUP for register in written} <= bitmap.granules
    with files.again() as image:
        clients.files.image = image
        assert clients.final() == last


def test_random_requests_while_the_disk_grows_and_shrinks(tmp_path: Path) -> None:
    """The registers stay inside; another client works on what comes and goes behind them."""
    files = opened(disk(), tmp_path, cache_size=8000)
    clients = Clients(files, SLICE)
    end = time.monotonic() + SECONDS
    sizes = itertools.cycle([GROUPS * SLICE + 512, 40 * SLICE, 12 * SLICE + 700 * 512, 4200 * SLICE])

    def resize() -> None:
        for size in sizes:
            if time.monotonic() > end:
                return
            files.image.resize(size, allow_shrink=True)
            time.sleep(0.002)

    def work_behind() -> None:
        chance = random.Random(8)
        while time.monotonic() < end:
            offset = (GROUPS * SLICE // 512 + chance.randrange(4000)) * 512
            try:
                match chance.randrange(3):
                    case 0:
                        files.image.pwrite(b"tail" * 300, offset)
                    case 1:
                        files.image.discard(offset, files.image.virtual_size - offset)
                    case 2:
                        files.image.pread(3000, offset)
            except OutOfRangeError:
                pass

    with switching_often():
        work = [Running(clients.run, f"{number}") for number in range(3)] + [Running(resize), Running(work_behind)]
        for each in work:
            each.result()
    assert not clients.problems
    clients.final()
    for register, history in enumerate(clients.histories):
        assert violation(history) is None, f"register {register}: {violation(history)}"
    files.image.resize(4200 * SLICE)
    files.close()
