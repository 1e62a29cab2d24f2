"""Snapshots made, applied and deleted while threads write and read.

Each writer counts upwards in registers of its own, one request after the other. In a snapshot of one moment the values
of a writer are those after one of its requests, and not older than what it had finished, or newer than what it had
begun, when the snapshot was made.
"""

from __future__ import annotations

import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcow2_plugin import Image, apply_snapshot, create_snapshot, delete_snapshot, list_snapshots, open_image
from qcow2_plugin.engine.writable import WritableImage
from qcow2_plugin.errors import ImageClosedError, MissingReferenceError
from tests.support.builder import ImageBuilder
from tests.support.depth import examples
from tests.support.gated import GatedStorage, Running
from tests.support.image_checker import check_image
from tests.support.in_memory import open_in_memory

KIB = 1 << 10
CLUSTER = 512
REGISTERS = 24
WRITERS = 3
ROUNDS = 12 * examples(1).max_examples


class Writer:
    """Writes 1, 2, 3, ... to its registers in turn, with some zeroes and flushes in between.

    Value n goes to register n modulo their number; each register is a block of bytes somewhere on the disk.
    """

    def __init__(self, image: Image, number: int) -> None:
        self.image, self.number = image, number
        self.begun = self.done = 0
        self.places = [(number * REGISTERS + register) * 5 * KIB + register % 3 * 100 for register in range(REGISTERS)]

    def step(self) -> None:
        value = self.begun + 1
        self.begun = value
        self.image.pwrite(struct.pack(">Q", value) * (1 + value % 3 * 100), self.places[value % REGISTERS])
        self.done = value

    def last_in(self, disk: Image) -> int:
        """The value that was written last, by what a disk says. Fails if its registers are not of one moment."""
        values = [int.from_bytes(disk.pread(8, place), "big") for place in self.places]
        last = max(values)
        for register, value in enumerate(values):
            expected = last - (last - register) % REGISTERS
            assert value == max(expected, 0), f"writer {self.number}: {values}"
        return last


@contextmanager
def at_work(work: list[Callable[[], None]]) -> Iterator[None]:
    """Each again and again in a thread of its own, until the end."""
    stopped = threading.Event()
    errors: list[BaseException] = []

    def run(step: Callable[[], None]) -> None:
        try:
            while not stopped.is_set():
                step()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(each,), daemon=True) for each in work]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        for thread in threads:
            thread.join(20)
    if errors:
        raise errors[0]


def new(folder: Path, **options: object) -> Path:
    path = folder / "disk.qcow2"
    ImageBuilder(800 * KIB, 9, **options).build(path)  # type: ignore[arg-type] # the builder's own
    return path


def check(path: Path) -> None:
    report = check_image(path.read_bytes())
    assert report.is_sound and not report.all_leaks, [*report.corruptions, *report.damage, report.all_leaks]


def test_a_snapshot_is_of_one_moment(tmp_path: Path) -> None:
    path = new(tmp_path)
    chance = random.Random(1)
    with open_image(path, writable=True, cache_size=20000) as image:
        writers = [Writer(image, number) for number in range(WRITERS)]
        kept: dict[str, list[int]] = {}

        def flush_now_and_then() -> None:
            time.sleep(0.01)
            image.flush()

        with at_work([*(writer.step for writer in writers), flush_now_and_then]):
            for _ in range(ROUNDS):
                time.sleep(chance.random() * 0.02)
                before = [writer.done for writer in writers]
                made = create_snapshot(image, "moment")
                after = [writer.begun for writer in writers]
                shown = image.at_snapshot(made.id)
                kept[made.id] = [writer.last_in(shown) for writer in writers]
                assert all(low <= found <= high for low, found, high in zip(before, kept[made.id], after, strict=True))
                if len(kept) > 4:
                    gone = chance.choice(list(kept))
                    delete_snapshot(image, gone)
                    del kept[gone]
                for each, expected in kept.items():
                    disk = image.at_snapshot(each)
                    assert [writer.last_in(disk) for writer in writers] == expected
                list_snapshots(image, with_sizes=True)
        for writer in writers:
            assert writer.last_in(image) == writer.done
    check(path)
    with open_image(path) as image:
        for each, expected in kept.items():
            assert [writer.last_in(image.at_snapshot(each)) for writer in writers] == expected


def test_readers_see_the_disk_before_or_after_an_apply(tmp_path: Path) -> None:
    """Two disks full of two values: whatever is read in one request is of one of them."""
    path = new(tmp_path)
    size = 800 * KIB
    with open_image(path, writable=True, cache_size=20000) as image:
        for value in (b"1", b"2"):
            image.pwrite(value * size, 0)
            create_snapshot(image, value.decode())
        image.pwrite(b"3" * size, 0)

        def read() -> None:
            offset = random.randrange(size - 9000)
            found = set(image.pread(random.choice([3, 700, 9000]), offset))
            assert found <= set(b"123"), found
            assert not found >= set(b"12"), found  # but it may be half overwritten

        with at_work([read, read, read]):
            for number in range(2 * ROUNDS):
                apply_snapshot(image, "12"[number % 2])
                assert image.pread(size, 0) == b"12"[number % 2 : number % 2 + 1] * size
                image.pwrite(b"3" * size, 0)  # to whatever is free
    check(path)


def test_writers_go_on_over_an_apply(tmp_path: Path) -> None:
    path = new(tmp_path)
    with open_image(path, writable=True, cache_size=20000) as image:
        writers = [Writer(image, number) for number in range(WRITERS)]
        for writer in writers:
            for _ in range(40):
                writer.step()
        create_snapshot(image, "forty")
        with at_work([writer.step for writer in writers]):
            for _ in range(ROUNDS):
                time.sleep(0.005)
                apply_snapshot(image, "forty")
        disk = image.at_snapshot("forty")
        assert [writer.last_in(disk) for writer in writers] == [40] * WRITERS
    check(path)


# ---- one moment held


class Held:
    """An image in memory whose storage can be held."""

    def __init__(self, folder: Path) -> None:
        built = ImageBuilder(800 * KIB, 9)
        for cluster in range(64):
            built.data(cluster, b"old " * 128)
        self.storage = GatedStorage(built.build(folder / "image").path.read_bytes(), "image")
        self.image: WritableImage = open_in_memory(self.storage)

    def close(self) -> None:
        self.image.close()
        report = check_image(self.storage.content)
        assert report.is_sound and not report.all_leaks, [*report.corruptions, *report.damage]


@pytest.fixture
def held(tmp_path: Path) -> Held:
    return Held(tmp_path)


def test_a_snapshot_waits_for_writes_that_are_under_way(held: Held) -> None:
    held.image.pwrite(b"x", 0)
    gate = held.storage.hold("write_from", lambda _, data: data == b"new!" * 128)
    writing = Running(held.image.pwrite, b"new!" * 128, 512)
    gate.wait()
    making = Running(create_snapshot, held.image, "then")
    assert making.waits
    later = Running(held.image.pwrite, b"late" * 128, 1024)
    assert later.waits
    gate.open()
    writing.result()
    made = making.result()
    later.result()
    shown = held.image.at_snapshot(made.id)
    assert shown.pread(1536, 0) == b"x" + (b"old " * 128)[1:] + b"new!" * 128 + b"old " * 128
    assert held.image.pread(512, 1024) == b"late" * 128
    held.close()


def test_what_a_reader_still_reads_is_not_reused(held: Held) -> None:
    """The snapshot is deleted, and the old disk given up, while somebody reads of them."""
    image = held.image
    create_snapshot(image, "then")
    image.pwrite(b"new!" * 128 * 64, 0)
    image.flush()
    for reader, change in (
        (image.at_snapshot("then"), lambda: delete_snapshot(image, "then")),
        (image, lambda: apply_snapshot(image, "empty")),
    ):
        if reader is image:
            image.write_zeroes(0, 64 * 512)
            create_snapshot(image, "empty")
            image.pwrite(b"old " * 128 * 64, 0)
        gate = held.storage.hold("read_into")
        reading = Running(reader.pread, 512, 5 * 512)
        gate.wait()
        changing = Running(change)
        assert changing.waits
        gate.open()
        assert reading.result() == b"old " * 128
        changing.result()
        image.pwrite(b"none" * 128 * 600, 100 * KIB)
    assert image.pread(512, 0) == bytes(512)
    held.close()


@pytest.mark.parametrize("verb", ["apply", "delete"])
def test_who_begins_to_read_under_way_is_waited_for(verb: str, held: Held) -> None:
    """Just before the header changes somebody finds old places, and is still reading there afterwards."""
    image = held.image
    create_snapshot(image, "then")
    image.pwrite(b"new!" * 128 * 64, 0)
    reader, content = (image, b"new!") if verb == "apply" else (image.at_snapshot("then"), b"old ")
    assert reader.pread(512, 5 * 512) == content * 128
    switch = held.storage.hold("write_from", lambda host_offset, _: host_offset < 104)
    changing = Running(apply_snapshot if verb == "apply" else delete_snapshot, image, "then")
    switch.wait()
    gate = held.storage.hold("read_into")
    reading = Running(reader.pread, 512, 5 * 512)
    gate.wait()
    switch.open()
    assert changing.waits
    gate.open()
    assert reading.result() == content * 128
    changing.result()
    image.pwrite(b"none" * 128 * 600, 100 * KIB)
    held.close()


def test_the_disk_of_a_deleted_snapshot_is_closed(held: Held) -> None:
    image = held.image
    create_snapshot(image, "then")
    other = create_snapshot(image, "other")
    shown, kept = image.at_snapshot("then"), image.at_snapshot(other.id)
    (snapshot, _) = image.snapshots()
    assert shown.pread(4, 0) == b"old "
    delete_snapshot(image, "then")
    for read in (lambda: shown.pread(4, 0), lambda: list(shown.extents())):
        with pytest.raises(ImageClosedError):
            read()
    with pytest.raises(MissingReferenceError):
        image.at_snapshot(snapshot)
    assert kept.pread(4, 0) == b"old "
    assert [each.length for each in kept.extents()] == [64 * 512, 800 * KIB - 64 * 512]
    held.close()
