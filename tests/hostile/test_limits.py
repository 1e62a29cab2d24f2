"""What looking at an image may cost, whatever the image says: work, memory, and how much is answered at once."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import TruncatedImageError
from qcow2_plugin.extent import ExtentKind
from qcow2_plugin.operations.info import info
from tests.hostile.test_bitmaps import IMAGES as BITMAPS
from tests.hostile.test_compressed import IMAGES as COMPRESSED
from tests.hostile.test_header import IMAGES as HEADERS
from tests.hostile.test_snapshots import IMAGES as SNAPSHOTS
from tests.hostile.test_tables import IMAGES as TABLES
from tests.support.builder import ImageBuilder, huge_empty, patch, shared_l2_bomb
from tests.support.fields import COPIED
from tests.support.hostile import IMAGE, Hostile, bounded, look, quick, unharmed
from tests.support.tools import nbd_connect, nbdkit

MIB = 1 << 20
CLUSTER = 1 << 16
PROJECT = Path(__file__).parents[2]
FAMILIES = {
    "headers": HEADERS,
    "tables": TABLES,
    "compressed clusters": COMPRESSED,
    "snapshots": SNAPSHOTS,
    "bitmaps": BITMAPS,
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_no_image_costs_more_than_little(family: list[Hostile], tmp_path: Path) -> None:
    paths = []
    for number, hostile in enumerate(family):
        (tmp_path / str(number)).mkdir()
        paths.append(tmp_path / str(number) / IMAGE)
        hostile.make(paths[-1])
    for told in limited(paths):
        name = family[paths.index(Path(told["name"]))].name
        assert told["status"] == 0, f"{name}: {told}"
        assert told["memory"] < 64 << 20, f"{name}: {told}"


def limited(paths: list[Path], *, memory: int = 256 << 20, seconds: int = 2) -> list[dict[str, Any]]:
    """What each image cost in a process of its own (see `tests.support.limited`)."""
    command = [sys.executable, "-m", "tests.support.limited", str(memory), str(seconds), *map(str, paths)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=100, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(paths), done.stderr
    if any(told["status"] for told in found):
        print(done.stderr)
    return found


# Maps.


def test_the_largest_disk_there_is(tmp_path: Path) -> None:
    """2 EiB of nothing, and an L1 table of 32 MiB that says so."""
    path = tmp_path / IMAGE
    huge_empty(path)
    with unharmed(tmp_path):
        assert info(path).virtual_size == 2 << 60
    with unharmed(tmp_path, seconds=2), open_image(path) as image:
        (extent,) = image.extents()
        assert extent == (0, 2 << 60, ExtentKind.UNALLOCATED, None, 0, 0)
        assert image.pread(512, (2 << 60) - 512) == bytes(512)
        assert not any(image.pread(MIB, 1 << 60))
    (told,) = limited([path])
    assert told["status"] == 0
    assert told["memory"] < 64 << 20


def test_a_table_shared_by_every_l1_entry_is_mapped_once(tmp_path: Path) -> None:
    """12 MiB that claim to be 64 TiB of compressed clusters."""
    path = tmp_path / IMAGE
    shared_l2_bomb(path)
    with open_image(path) as image, bounded(seconds=2):
        (extent,) = image.extents()
        assert (extent.length, extent.kind) == (64 << 40, ExtentKind.COMPRESSED)
        first = next(image.extents(5 << 40, 1 << 40))
        assert first.guest_offset == 5 << 40
        image.pread(512, (64 << 40) - 512)
    (told,) = limited([path])
    assert told["status"] == 0


def alternating(path: Path, virtual_size: int, cluster_bits: int = 16) -> None:
    """One L2 table of clusters that are there and are not, in turn, below every L1 entry."""
    image = ImageBuilder(virtual_size, cluster_bits).data(0, b"x")
    built = image.build(path)
    entries = (1 << cluster_bits) // 8
    patch(path, built.l2_offsets[0], struct.pack(">QQ", built.data_offsets[0], 0) * (entries // 2))
    patch(path, built.l1_offset, struct.pack(">Q", built.l2_offsets[0]) * built.l1_size)


def test_a_million_extents_are_told_in_constant_memory(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    alternating(path, 10**6 * CLUSTER)
    with open_image(path) as image:
        with bounded(seconds=1):  # lazily: the first ones cost no more than they are
            assert len(list(islice(image.extents(), 1000))) == 1000
        with bounded(seconds=30, memory=8 << 20):
            kinds = [0, 0]
            for extent in image.extents(0, 10**5 * CLUSTER):
                kinds[extent.kind is ExtentKind.DATA] += 1
        assert kinds == [50_000, 50_000]
        count = 0
        start = time.monotonic()
        for count, extent in enumerate(image.extents(), 1):  # noqa: B007
            continue
        assert count == 10**6
        assert extent.guest_offset + extent.length == image.virtual_size
        assert time.monotonic() - start < 60


def test_a_block_status_reply_is_never_long(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    alternating(path, 10**5 * CLUSTER)
    replies: list[list[int]] = []

    def collect(context: str, start: int, entries: list[int], error: object) -> int:
        replies.append(entries)
        return 0

    with nbdkit({"file": path}) as server, nbd_connect(server.uri) as handle:
        offset = 0
        while offset < 10_000 * CLUSTER:
            handle.block_status(4 * 1024 * MIB - CLUSTER, offset, collect)
            length = sum(replies[-1][::2])
            assert length > 0
            offset += length
    assert all(len(entries) // 2 <= 4096 for entries in replies)
    assert {entry for entries in replies for entry in entries[1::2]} == {0, 3}


# Proofs that an image is complete.


def doubtful(path: Path, virtual_size: int, cluster_bits: int) -> None:
    """As `alternating`, and a refcount that names a cluster past the end of the file: is the image truncated?"""
    alternating(path, virtual_size, cluster_bits)
    refcounts = int.from_bytes(path.read_bytes()[48:56], "big")
    patch(path, refcounts + 8 * 60, struct.pack(">Q", int.from_bytes(path.read_bytes()[refcounts:][:8], "big")))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("virtual_size", "cluster_bits"),
    [(16_000 << 29, 16), (8 << 30, 12), (1 << 30, 9)],
    ids=["64 KiB clusters", "4 KiB clusters", "512-byte clusters"],
)
def test_a_doubtful_image_is_not_pondered_for_long(virtual_size: int, cluster_bits: int, tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    doubtful(path, virtual_size, cluster_bits)
    (told,) = limited([path])
    assert told["status"] == 0, f"it worked {told['seconds']} s"


def test_a_doubtful_image_of_ordinary_size_is_proven(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    doubtful(path, 1 << 30, 16)
    with unharmed(tmp_path, seconds=1):
        outcome = look(path)
    assert outcome.error is None
    assert outcome.content[:1] == b"x"


def test_too_much_to_prove_is_said_so(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    built = huge_empty(path)
    offsets = range(1 << 30, (1 << 30) + 1024 * (2 << 20), 2 << 20)
    patch(path, built.l1_offset, b"".join(struct.pack(">Q", offset | COPIED) for offset in offsets))
    patch(path, built.refcount_table_offset + 8 * 1000, struct.pack(">Q", built.refcount_block_offsets[0]))
    with unharmed(tmp_path, seconds=1):
        outcome = look(path)
    assert isinstance(outcome.error, TruncatedImageError)
    assert "too large to prove" in str(outcome.error)


# Headers.


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(ImageBuilder(MIB, 21).build(path).path.read_bytes()[:120] + b"\1" * (2 * MIB)),
        lambda path: fill_header(path, struct.pack(">II", 0x11111111, 0)),
        lambda path: fill_header(path, struct.pack(">II", 0x11111111, 1) + bytes(8)),
    ],
    ids=["one huge extension", "262000 empty extensions", "131000 short extensions"],
)
def test_a_header_cluster_of_2_mib_is_parsed_in_time(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    make(path)
    with quick(1.5):
        look(path)
    (told,) = limited([path])
    assert told["status"] == 0
    assert told["memory"] < 64 << 20


def fill_header(path: Path, extension: bytes) -> None:
    """An image whose header cluster is full of one extension, over and over."""
    ImageBuilder(MIB, 21).data(0, b"x").build(path)
    patch(path, 112, extension * ((2 * MIB - 128) // len(extension)))
