"""Decoders: what was compressed comes back, and no stream gives more than a cluster or anything but a ValueError."""

from __future__ import annotations

import itertools
import sys
import zlib

from hypothesis import given
from hypothesis import strategies as st

from qcow2_plugin.engine.codec import decompress
from qcow2_plugin.format.header import CompressionType
from tests.support.depth import examples

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

METHODS = st.sampled_from(list(CompressionType))


@st.composite
def clusters(draw: st.DrawFn) -> bytes:
    """512 to 8192 bytes, from noise to nothing."""
    size = 1 << draw(st.integers(9, 13))
    parts = draw(st.lists(st.tuples(st.binary(min_size=1, max_size=60), st.integers(1, 40)), max_size=8))
    return b"".join(part * count for part, count in parts)[:size].ljust(size, b"\0")


@st.composite
def streams(draw: st.DrawFn, method: CompressionType, cluster: bytes) -> bytes:
    if method is CompressionType.DEFLATE:
        window = draw(st.integers(9, 12))
        compressor = zlib.compressobj(draw(st.integers(0, 9)), zlib.DEFLATED, -window, draw(st.integers(1, 9)))
        return compressor.compress(cluster) + compressor.flush()
    cuts = sorted(draw(st.lists(st.integers(0, len(cluster)), max_size=3)))
    edges = [0, *cuts, len(cluster)]
    level = draw(st.integers(-5, 10))
    return b"".join(zstd.compress(cluster[start:end], level) for start, end in itertools.pairwise(edges) if start < end)


def decoded(stored: bytes, method: CompressionType, cluster_size: int) -> bytes | None:
    try:
        cluster = decompress(stored, method, cluster_size)
    except ValueError:
        return None
    assert len(cluster) == cluster_size
    return cluster


@given(METHODS, clusters(), st.binary(max_size=40), st.data())
@examples(200)
def test_a_cluster_comes_back_whatever_follows_it(
    method: CompressionType, cluster: bytes, garbage: bytes, data: st.DataObject
) -> None:
    stored = data.draw(streams(method, cluster))
    assert decompress(stored + garbage, method, len(cluster)) == cluster


@given(METHODS, clusters(), st.data())
@examples(200)
def test_a_truncated_stream_gives_no_wrong_cluster(
    method: CompressionType, cluster: bytes, data: st.DataObject
) -> None:
    stored = data.draw(streams(method, cluster))
    cut = stored[: data.draw(st.integers(0, len(stored) - 1))]
    found = decoded(cut, method, len(cluster))
    if method is CompressionType.ZSTD:
        assert found is None
    else:  # what is cut off a deflate stream may be no more than its end marker
        assert found in (None, cluster)
    assert decoded(cut[: len(cut) // 2], method, len(cluster)) in (None, cluster)


@given(METHODS, clusters(), st.integers(1, 4000), st.data())
@examples(150)
def test_a_stream_of_another_length_gives_no_other_length(
    method: CompressionType, cluster: bytes, difference: int, data: st.DataObject
) -> None:
    stored = data.draw(streams(method, cluster))
    assert decoded(stored, method, len(cluster) + difference) is None
    shorter = max(len(cluster) - difference, 1)
    found = decoded(stored, method, shorter)
    assert found in (None, cluster[:shorter])


@given(METHODS, st.binary(max_size=400), st.integers(9, 16))
@examples(200)
def test_arbitrary_streams(method: CompressionType, stored: bytes, cluster_bits: int) -> None:
    decoded(stored, method, 1 << cluster_bits)


@given(METHODS, clusters(), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4), st.data())
@examples(200)
def test_changed_streams(
    method: CompressionType, cluster: bytes, changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    stored = bytearray(data.draw(streams(method, cluster)))
    for position, value in changes:
        stored[position % len(stored)] = value
    decoded(bytes(stored), method, len(cluster))
