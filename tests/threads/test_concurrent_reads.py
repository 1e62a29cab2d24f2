"""Many threads read one image while its small caches turn over; each must see the bytes of the disk, always."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.engine.image import Image
from tests.support.builder import ImageBuilder

THREADS = 8
SECONDS = 1.5
CLUSTER = 512
CLUSTERS = 4000  # 63 L2 tables, a slice each


def build(place: Path, *, snapshot: bool) -> bytes:
    chance = random.Random(5)
    base = chance.randbytes(CLUSTERS * CLUSTER * 3 // 4)
    (place / "base").write_bytes(base)
    image = ImageBuilder(CLUSTERS * CLUSTER, 9).backing(b"base", b"raw")
    for cluster in range(CLUSTERS):
        kind = chance.randrange(5)
        if kind < 2:
            image.data(cluster, chance.randbytes(CLUSTER))
        elif kind == 2:
            image.compressed(cluster, chance.randbytes(30) * 5)
        elif kind == 3:
            image.zero(cluster)
    if snapshot:
        image.snapshot(b"1", b"then")
    image.build(place / "image")
    return image.expected(base)


def read_for_a_while(disk: Image, expected: bytes, seed: int, end: float, problems: list[str]) -> None:
    chance = random.Random(seed)
    reads = 0
    while time.monotonic() < end and not problems:
        offset = chance.randrange(len(expected))
        length = min(chance.choice([1, 300, 512, 4096, 60000]), len(expected) - offset)
        buffer = bytearray(length)
        try:
            disk.read_into(memoryview(buffer), offset)
        except Exception as error:  # whatever it is, the test has to hear of it
            problems.append(f"{length} bytes at {offset}: {error!r}")
            return
        if buffer != expected[offset : offset + length]:
            problems.append(f"{length} bytes at {offset} are wrong")
        reads += 1
    if not reads:
        problems.append("a thread read nothing")


@pytest.mark.parametrize("cache_size", [0, 8000, 1 << 20])
def test_threads_see_the_disk(tmp_path: Path, cache_size: int) -> None:
    expected = build(tmp_path, snapshot=False)
    problems: list[str] = []
    with open_image(tmp_path / "image", cache_size=cache_size) as disk:
        end = time.monotonic() + SECONDS
        threads = [
            threading.Thread(target=read_for_a_while, args=(disk, expected, seed, end, problems))
            for seed in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        walks = 0
        while time.monotonic() < end:
            assert sum(extent.length for extent in disk.extents()) == len(expected)
            walks += 1
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
    assert not problems
    assert walks


def test_a_snapshot_and_the_disk_are_read_together(tmp_path: Path) -> None:
    expected = build(tmp_path, snapshot=True)
    problems: list[str] = []
    with open_image(tmp_path / "image", cache_size=4000) as disk, disk.at_snapshot("1") as old:
        end = time.monotonic() + SECONDS
        threads = [
            threading.Thread(target=read_for_a_while, args=(view, expected, seed, end, problems))
            for seed in range(THREADS)
            for view in [disk if seed % 2 else old]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert not problems
