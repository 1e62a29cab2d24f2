"""Clusters compressed and back, the words that say where they are, and where they are put."""

from __future__ import annotations

import random
import threading
import zlib
from itertools import pairwise

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from qcow2_plugin.engine.codec import Encoder, decompress
from qcow2_plugin.engine.packing import _Space
from qcow2_plugin.errors import OptionError
from qcow2_plugin.format.entries import compressed_entry, compressed_location
from qcow2_plugin.format.geometry import Geometry
from qcow2_plugin.format.header import CompressionType

DEFLATE, ZSTD = CompressionType.DEFLATE, CompressionType.ZSTD


def clusters(size: int) -> list[bytes]:
    rng = random.Random(size)
    far = rng.randbytes(size // 3)
    return [
        b"a" * size,
        (far * 4)[:size],
        rng.randbytes(size // 2) + bytes(size - size // 2),
        bytes(rng.choice(b"abcdef ") for _ in range(size)),
    ]


@pytest.mark.parametrize(
    ("method", "level", "size"),
    [
        *((DEFLATE, level, size) for level in range(4) for size in (512, 65536, 2 << 20)),
        *((ZSTD, 1, size) for size in (512, 65536, 2 << 20)),
        (ZSTD, 19, 65536),
    ],
)
def test_what_is_compressed_comes_back(method: CompressionType, level: int, size: int) -> None:
    encoder = Encoder(method, level)
    shorter = 0
    for cluster in clusters(size):
        stored = encoder.compress(memoryview(cluster))
        if stored is None:
            continue
        shorter += 1
        assert len(stored) < size
        assert decompress(stored, method, size) == cluster
        if method is DEFLATE:
            assert zlib.decompressobj(-12).decompress(stored) == cluster
        else:
            assert zstandard.frame_content_size(stored) == size
    assert shorter >= 2


@pytest.mark.parametrize("method", [DEFLATE, ZSTD])
def test_what_gets_no_shorter_is_left_alone(method: CompressionType) -> None:
    assert Encoder(method).compress(memoryview(random.Random(1).randbytes(65536))) is None


@pytest.mark.parametrize(("method", "level"), [(DEFLATE, 4), (DEFLATE, -1), (ZSTD, 0), (ZSTD, 20)])
def test_other_levels_are_refused(method: CompressionType, level: int) -> None:
    with pytest.raises(OptionError, match="level"):
        Encoder(method, level)


def test_many_threads_share_an_encoder() -> None:
    encoder, wrong = Encoder(ZSTD), []
    given = clusters(65536)

    def work() -> None:
        for cluster in given * 20:
            stored = encoder.compress(memoryview(cluster))
            if stored is not None and decompress(stored, ZSTD, 65536) != cluster:
                wrong.append(cluster)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@given(st.integers(9, 21), st.integers(0, 1 << 48), st.data())
def test_an_entry_says_where_the_stream_is(cluster_bits: int, host_offset: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, (1 << cluster_bits) - 1))
    found, to_fetch = compressed_location(compressed_entry(host_offset, length, cluster_bits), cluster_bits)
    assert found == host_offset
    assert length <= to_fetch < length + 512
    assert (host_offset + to_fetch) % 512 == 0


@given(st.integers(9, 12), st.lists(st.one_of(st.none(), st.floats(0, 1, exclude_max=True)), max_size=60))
def test_no_two_things_get_one_place(cluster_bits: int, wishes: list[float | None]) -> None:
    """Clusters (None) and streams of a part of one; refcounts are how many of them are in a cluster."""
    size = 1 << cluster_bits
    space = _Space(Geometry(cluster_bits))
    taken: list[tuple[int, int]] = [(0, size)]
    for wish in wishes:
        if wish is None:
            taken.append((space.take_clusters(1), size))
        else:
            length = max(int(wish * size), 1)
            taken.append((space.take_packed(length), length))
    ordered = sorted(taken)
    assert all(first[0] + first[1] <= second[0] for first, second in pairwise(ordered))
    counts = [0] * (space.end // size)
    for offset, length in taken:
        for cluster in range(offset // size, (offset + length - 1) // size + 1):
            counts[cluster] += 1
    assert counts == list(space.refcounts)
    assert all(counts)
