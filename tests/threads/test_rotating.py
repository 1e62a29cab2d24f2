"""Bitmaps are rotated while others write: every write is in the bitmap of its time, and in no other."""

from __future__ import annotations

import itertools
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from qcow2_plugin import Image, open_image
from qcow2_plugin.engine.writable import WritableImage
from qcow2_plugin.operations.bitmaps import add_bitmap, content_of, merge_bitmap, remove_bitmap, rotate_bitmap
from tests.support.builder import ImageBuilder
from tests.support.gated import GatedStorage, Running
from tests.support.image_checker import check_image
from tests.support.in_memory import open_in_memory
from tests.support.tools import qemu_img

KIB, MIB = 1 << 10, 1 << 20
GRANULE = 512


class Written(NamedTuple):
    """A write, and when it was under way."""

    granule: int
    start: int
    end: int
    is_zero: bool
    """Then it may have changed nothing."""


def marks(image: WritableImage, name: bytes) -> set[int]:
    report = check_image(image.file.storage.content)  # type: ignore[attr-defined] # of one in memory
    found = next(bitmap.granules for bitmap in report.bitmaps if bitmap.name == name)
    assert found is not None
    return set(found)


def in_memory() -> tuple[WritableImage, GatedStorage]:
    builder = ImageBuilder(64 * KIB, 9)
    for cluster in range(20):
        builder.data(cluster, b"old " * 128)
    builder.bitmap(b"old", granularity_bits=9, flags=2)
    storage = GatedStorage(_built(builder), "image")
    return open_in_memory(storage), storage


def _built(builder: ImageBuilder) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="rotating-") as folder:
        builder.build(Path(folder) / "image")
        return (Path(folder) / "image").read_bytes()


KINDS_OF_WRITES: dict[str, Callable[[WritableImage], None]] = {
    "in place": lambda image: image.write_from(b"new!" * 128, 0),
    "in the lane": lambda image: image.write_from(b"new!" * 128, 5 * 512),
    "to a new cluster": lambda image: image.write_from(b"new!" * 128, 30 * 512),
}


@pytest.mark.parametrize("kind", KINDS_OF_WRITES)
def test_a_write_under_way_is_before_the_switch(kind: str) -> None:
    """And what begins meanwhile comes after it."""
    image, storage = in_memory()
    image.write_from(b"warm" * 128, 5 * 512)
    image.write_from(b"warm" * 128, 5 * 512)  # now it is in the lane
    gate = storage.hold("write_from", lambda _, data: data == b"new!" * 128)
    writing = Running(KINDS_OF_WRITES[kind], image)
    gate.wait()
    rotating = Running(rotate_bitmap, image, "old", "new")
    assert rotating.waits
    later = Running(image.write_from, b"late" * 128, 10 * 512)
    assert later.waits
    gate.open()
    for each in (writing, rotating, later):
        each.result()
    granule = {"in place": 0, "in the lane": 5, "to a new cluster": 30}[kind]
    assert marks(image, b"old") == {5, granule}
    image.close()
    assert marks(image, b"new") == {10}
    assert not check_image(storage.content).all_leaks


def test_nobody_can_write_until_the_switch_is_durable() -> None:
    image, storage = in_memory()
    image.write_from(b"x" * 512, 0)
    gates = [storage.hold("barrier") for _ in range(1)]
    rotating = Running(rotate_bitmap, image, "old", "new")
    gates[0].wait()
    writing = Running(image.write_from, b"y" * 512, 0)
    reading = Running(image.pread, 512, 0)
    assert writing.waits
    gates[0].open()
    rotating.result()
    writing.result()
    reading.result()
    image.close()
    assert marks(image, b"old") == {0} and marks(image, b"new") == {0}


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize("options", ["cluster_size=4096", "cluster_size=65536"])
def test_every_write_is_in_the_bitmap_of_its_time(tmp_path: Path, options: str) -> None:
    """Some places are written to once, some again and again, as fast as the lane lets them."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(64 * MIB))
    add_bitmap(path, "0", granularity=GRANULE)
    written: list[Written] = []
    rotations: list[tuple[int, int]] = []
    stop = threading.Event()
    fresh = itertools.count(2000)

    with open_image(path, writable=True) as image:

        def write(seed: int) -> None:
            chance = random.Random(seed)
            mine: list[Written] = []
            while not stop.is_set():
                granule = next(fresh) if chance.random() < 0.2 else chance.randrange(400)
                if granule * GRANULE >= image.virtual_size:
                    break
                start = time.monotonic_ns()
                is_zero = granule < 400 and chance.random() < 0.1
                if is_zero:
                    image.write_zeroes(granule * GRANULE, GRANULE)
                else:
                    image.write_from(bytes([seed]) * GRANULE, granule * GRANULE)
                mine.append(Written(granule, start, time.monotonic_ns(), is_zero))
            written.extend(mine)

        def look() -> None:
            while not stop.is_set():
                assert [bitmap.name for bitmap in image.bitmaps()]
                image.pread(4096, 0)
                image.flush()

        threads = [Running(write, seed) for seed in range(1, 4)] + [Running(look)]
        for number in range(8):
            time.sleep(0.015)
            start = time.monotonic_ns()
            rotate_bitmap(image, str(number), str(number + 1))
            rotations.append((start, time.monotonic_ns()))
        stop.set()
        for thread in threads:
            thread.result()
        merge_and_compare(image, len(rotations))
    epochs = [marked(path, str(number)) for number in range(len(rotations) + 1)]
    assert len(written) > 100
    judge(written, rotations, epochs)
    qemu_img("check", path)


def marked(path: Path, name: str) -> set[int]:
    with open_image(path) as image:
        ranges = image.dirty_bitmap(name).ranges(0, image.virtual_size)
        return {granule for start, length in ranges for granule in range(start // GRANULE, (start + length) // GRANULE)}


def merge_and_compare(image: Image, last: int) -> None:
    """A bitmap into which all are merged marks as many as they do together."""
    add_bitmap(image, "all", granularity=GRANULE, enabled=False)
    for number in range(last + 1):
        merge_bitmap(image, "all", str(number))
    assert content_of(image, "all").pieces
    add_bitmap(image, "gone")
    remove_bitmap(image, "gone")


def judge(written: list[Written], rotations: list[tuple[int, int]], epochs: list[set[int]]) -> None:
    """Each write is in a bitmap that was in force while it was under way; nothing else is marked."""
    once = {granule for granule in {each.granule for each in written} if granule >= 2000}
    may: list[set[int]] = [set() for _ in epochs]
    for granule, start, end, is_zero in written:
        first = sum(rotated <= start for _, rotated in rotations)
        last = sum(begun < end for begun, _ in rotations)
        for number in range(first, last + 1):
            may[number].add(granule)
        found = [number for number in range(first, last + 1) if granule in epochs[number]]
        assert found or is_zero, (
            f"granule {granule} was written in epochs {first} to {last}, and none of their bitmaps marks it"
        )
        if granule in once:
            assert len([epoch for epoch in epochs if granule in epoch]) == 1
    for number, epoch in enumerate(epochs):
        assert epoch <= may[number], f"bitmap {number} marks what nobody wrote in its time"
