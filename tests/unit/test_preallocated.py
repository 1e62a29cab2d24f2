"""engine/refcounts: is an image preallocated? And format/refcounts.count_used, held against unpack_block."""

from __future__ import annotations

import os
import random
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from qcow2_plugin.engine.header import read_header
from qcow2_plugin.engine.refcounts import is_preallocated
from qcow2_plugin.format.refcounts import count_used, unpack_block
from qcow2_plugin.storage.opener import open_given
from tests.support.builder import ImageBuilder
from tests.support.memory import MemoryStorage

CLUSTER = 512


class SparseStorage(MemoryStorage):
    """Takes as many clusters of disk space as it is told; notes what is read."""

    stored_clusters = 0

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.reads: list[tuple[int, int]] = []

    def allocated_size(self) -> int:
        return self.stored_clusters * CLUSTER

    def pread(self, length: int, host_offset: int) -> bytes:
        self.reads.append((host_offset, length))
        return super().pread(length, host_offset)


def image_of(tmp_path: Path, data_clusters: int, refcount_bits: int = 16) -> tuple[SparseStorage, int]:
    """An image in memory and its clusters in use, which are all of its clusters."""
    told = ImageBuilder(1 << 20, cluster_bits=9, refcount_bits=refcount_bits)
    for cluster in range(data_clusters):
        told.data(cluster, b"x")
    built = told.build(tmp_path / "disk.qcow2")
    return SparseStorage((tmp_path / "disk.qcow2").read_bytes()), built.file_size // CLUSTER


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("data_clusters", [0, 20, 600])
def test_the_threshold(data_clusters: int, refcount_bits: int, tmp_path: Path) -> None:
    """More than a ninth, and at least two clusters, beyond what is stored."""
    storage, used = image_of(tmp_path, data_clusters, refcount_bits)
    header = read_header(storage)
    for stored in range(used + 2):
        storage.stored_clusters = stored
        assert is_preallocated(header, storage) == (used >= stored + 2 and used >= stored * 10 // 9), (stored, used)


def test_a_full_image_is_told_without_reading(tmp_path: Path) -> None:
    storage, used = image_of(tmp_path, 600)
    header = read_header(storage)
    storage.reads.clear()
    storage.stored_clusters = used
    assert not is_preallocated(header, storage)
    assert storage.reads == []


def test_counting_stops_at_the_threshold(tmp_path: Path) -> None:
    storage, _ = image_of(tmp_path, 600)
    header = read_header(storage)
    storage.reads.clear()
    assert is_preallocated(header, storage)
    assert len(storage.reads) == 2, "the refcount table and one block"


def test_clusters_behind_the_end_do_not_count(tmp_path: Path) -> None:
    storage, used = image_of(tmp_path, 20)
    header = read_header(storage)
    block = int.from_bytes(storage.content[header.refcount_table_offset :][:8], "big")
    storage.content[block + 2 * (used - 5) : block + 2 * used] = bytes(10)
    storage.stored_clusters = used - 7
    assert is_preallocated(header, storage)
    storage.stored_clusters = used - 6
    assert not is_preallocated(header, storage)
    storage.content[block + 2 * used : block + 2 * (used + 5)] = b"\1" * 10
    assert not is_preallocated(header, storage)


def test_what_is_no_refcount_block_counts_nothing(tmp_path: Path) -> None:
    storage, _ = image_of(tmp_path, 20)
    header = read_header(storage)
    table = header.refcount_table_offset
    storage.content[table : table + CLUSTER] = b"\xff" * CLUSTER
    assert not is_preallocated(header, storage)
    (tmp_path / "disk.qcow2").write_bytes(storage.content)
    os.truncate(tmp_path / "disk.qcow2", 1 << 20)
    with closing(open_given(tmp_path / "disk.qcow2")) as file:
        assert not is_preallocated(header, file)


@pytest.mark.parametrize("order", range(7))
def test_used_refcounts_are_counted_as_they_are_unpacked(order: int) -> None:
    rng = random.Random(order)
    for _ in range(20):
        block = bytes(rng.choice([0, 0, 0, 1, 0x80, 0x30, 0xFF]) for _ in range(64))
        refcounts = unpack_block(block, order)
        for count in (0, 1, len(refcounts) - 1, len(refcounts), rng.randrange(len(refcounts))):
            assert count_used(block, order, count) == np.count_nonzero(refcounts[:count])
        assert count_used(block[:16], order, len(refcounts)) == np.count_nonzero(unpack_block(block[:16], order))
