"""Holds an open image against what qemu-img says about the same file: its bytes and its map.

It owns the comparison; whatever differs is an AssertionError that says where. It refuses to make images.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcow2_plugin.extent import Extent, ExtentKind, GuestDisk
from tests.support.tools import qemu_img

_CHUNK = 4 << 20
_MAX_WHOLE = 64 << 20
"""Disks up to this size are read whole, of larger ones what either side calls data."""
STORED = (ExtentKind.DATA, ExtentKind.COMPRESSED)


@dataclass(frozen=True)
class RawDisk:
    """A disk as qemu-img writes it out: a sparse file, open for reading."""

    fd: int
    size: int

    def pread(self, length: int, offset: int) -> bytes:
        data = os.pread(self.fd, length, offset)
        assert len(data) == length, "the comparison asks for bytes behind the disk"
        return data

    def data_ranges(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of what may hold other bytes than zeros."""
        offset = 0
        while offset < self.size:
            try:
                start = os.lseek(self.fd, offset, os.SEEK_DATA)
            except OSError:  # no data from here on
                return
            offset = os.lseek(self.fd, start, os.SEEK_HOLE)
            yield start, offset - start


@contextlib.contextmanager
def converted(source: str | Path, *extra: str) -> Iterator[RawDisk]:
    """What `qemu-img convert` reads from `source`; `extra` goes before it."""
    form = () if "--image-opts" in extra else ("-f", "qcow2")
    with tempfile.TemporaryDirectory(prefix="converted-") as directory:
        path = Path(directory) / "disk.raw"
        qemu_img("convert", *form, "-O", "raw", *extra, source, path)
        with open(path, "rb") as raw:
            yield RawDisk(raw.fileno(), path.stat().st_size)


def assert_reads_as(disk: GuestDisk, expected: RawDisk, *, near: Sequence[int] = (), seed: int = 0) -> None:
    """`disk` reads as `expected`: whole, and in odd pieces, among them some around every offset in `near`."""
    assert disk.virtual_size == expected.size
    for offset, length in odd_ranges(expected.size, near=near, seed=seed):
        _assert_same(disk, expected, offset, length)
    if expected.size <= _MAX_WHOLE:
        _assert_same(disk, expected, 0, expected.size)
        return
    stored = ((extent.guest_offset, extent.length) for extent in disk.extents() if extent.kind in STORED)
    for start, whole_length in (*stored, *expected.data_ranges()):
        for offset in range(start, start + whole_length, _CHUNK):
            _assert_same(disk, expected, offset, min(_CHUNK, start + whole_length - offset))


def odd_ranges(size: int, *, near: Sequence[int] = (), seed: int = 0, count: int = 60) -> Iterator[tuple[int, int]]:
    """(offset, length) of ranges inside a disk that respect no border."""
    if not size:
        return
    rng = random.Random(seed)
    near = [offset for offset in (*near, size) if offset <= size]
    for number in range(count):
        if number % 3:
            offset = rng.randrange(size)
        else:
            offset = min(max(rng.choice(near) - rng.choice([1, 2, 513, 70001]), 0), size - 1)
        length = rng.choice([1, 2, 511, 513, 4097, 65537, rng.randrange(1, 300_000)])
        yield offset, min(length, size - offset)


def assert_extents_agree(extents: Iterable[Extent], qemu_map: list[dict[str, Any]], expected: RawDisk) -> None:
    """`extents` tile the disk and say what qemu-img map says of every byte; what they call zero reads as zeros."""
    found = list(extents)
    told = [entry for entry in qemu_map if entry["length"]]
    assert_tiles(found, expected.size)
    assert sum(entry["length"] for entry in told) == expected.size
    for ours, theirs, offset in _overlay(found, told):
        where = f"at {offset:#x}: {ours} and {theirs}"
        assert (ours.kind in STORED) == theirs["data"], where
        assert ours.kind in STORED or theirs["zero"], where
        if ours.kind is ExtentKind.DATA:
            assert ours.depth == theirs["depth"], where
            assert ours.host_offset is not None, where
            assert ours.host_offset + offset - ours.guest_offset == theirs["offset"] + offset - theirs["start"], where
    empty = [(extent.guest_offset, extent.length) for extent in found if extent.kind not in STORED]
    for start, length in expected.data_ranges():
        for hole_start, hole_length in empty:
            offset, end = max(start, hole_start), min(start + length, hole_start + hole_length)
            if offset < end:
                assert not any(expected.pread(end - offset, offset)), f"{offset:#x} to {end:#x} does not read as zeros"


def assert_tiles(extents: Sequence[Extent], size: int) -> None:
    """`extents` cover a disk once: ascending, none empty, no gap."""
    end = 0
    for extent in extents:
        assert extent.guest_offset == end, f"{extent} does not begin at {end:#x}"
        assert extent.length > 0, extent
        end += extent.length
    assert end == size


def _overlay(ours: Sequence[Extent], theirs: Sequence[dict[str, Any]]) -> Iterator[tuple[Extent, dict[str, Any], int]]:
    """Both descriptions of every range in which neither changes, and where it begins."""
    our_starts = [extent.guest_offset for extent in ours]
    their_starts = [int(entry["start"]) for entry in theirs]
    for offset in sorted({*our_starts, *their_starts}):
        yield ours[bisect_right(our_starts, offset) - 1], theirs[bisect_right(their_starts, offset) - 1], offset


def _assert_same(disk: GuestDisk, expected: RawDisk, offset: int, length: int) -> None:
    found = bytearray(b"\xa5" * length)
    disk.read_into(memoryview(found), offset)
    wanted = expected.pread(length, offset)
    if found != wanted:
        first = next(index for index in range(length) if found[index] != wanted[index])
        difference = f"is {found[first]:#x} instead of {wanted[first]:#x}"
        raise AssertionError(f"{length} bytes at {offset:#x}: byte {offset + first:#x} {difference}")
