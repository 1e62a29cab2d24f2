"""Compressed clusters: exactly one cluster or an error, whatever the stream says."""

from __future__ import annotations

import itertools
import random
import sys
import tracemalloc
import zlib

import pytest

from qcow2_plugin.engine.codec import ClusterCache, decompress
from qcow2_plugin.errors import CorruptImageError
from qcow2_plugin.format.header import CompressionType
from tests.support.builder import deflate

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

DEFLATE, ZSTD = CompressionType.DEFLATE, CompressionType.ZSTD
METHODS = [DEFLATE, ZSTD]
CLUSTER = 65536
MIXED = random.Random(7).randbytes(20000) + b"text " * 5000 + bytes(CLUSTER - 45000)


def pack(data: bytes, method: CompressionType) -> bytes:
    return deflate(data) if method is DEFLATE else zstd.compress(data)


def with_window(data: bytes, bits: int) -> bytes:
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: bits})
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [512, 4096, CLUSTER, 2 << 20])
@pytest.mark.parametrize("content", [b"\0", b"abc", bytes(range(256))])
def test_what_was_compressed_comes_back(method: CompressionType, size: int, content: bytes) -> None:
    cluster = (content * size)[:size]
    stored = pack(cluster, method)
    assert decompress(stored, method, size) == cluster
    assert decompress(memoryview(stored), method, size) == cluster


@pytest.mark.parametrize("method", METHODS)
def test_bytes_come_back_as_bytes(method: CompressionType) -> None:
    assert type(decompress(pack(MIXED, method), method, CLUSTER)) is bytes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("garbage", [b"\0" * 511, b"\xff" * 511, bytes(range(256)), b"x"])
def test_what_follows_the_stream_belongs_to_others(method: CompressionType, garbage: bytes) -> None:
    assert decompress(pack(MIXED, method) + garbage, method, CLUSTER) == MIXED


@pytest.mark.parametrize("method", METHODS)
def test_another_stream_may_follow(method: CompressionType) -> None:
    assert decompress(pack(MIXED, method) + pack(bytes(CLUSTER), method), method, CLUSTER) == MIXED


def test_a_deflate_stream_may_go_on_behind_the_cluster() -> None:
    stored = deflate(MIXED + b"more than a cluster")
    assert decompress(stored, DEFLATE, CLUSTER) == MIXED


def test_a_deflate_stream_may_lack_its_end() -> None:
    compressor = zlib.compressobj(-1, zlib.DEFLATED, -12, 9)
    stored = compressor.compress(MIXED) + compressor.flush(zlib.Z_SYNC_FLUSH)
    assert decompress(stored, DEFLATE, CLUSTER) == MIXED


def test_stored_and_fixed_deflate_blocks() -> None:
    for level, strategy in ((0, zlib.Z_DEFAULT_STRATEGY), (9, zlib.Z_FIXED), (9, zlib.Z_HUFFMAN_ONLY)):
        compressor = zlib.compressobj(level, zlib.DEFLATED, -12, 9, strategy)
        assert decompress(compressor.compress(MIXED) + compressor.flush(), DEFLATE, CLUSTER) == MIXED


def test_a_zlib_or_gzip_header_is_no_deflate_stream() -> None:
    with pytest.raises(ValueError, match="deflate"):
        decompress(zlib.compress(MIXED), DEFLATE, CLUSTER)
    with pytest.raises(ValueError, match="deflate"):
        decompress(zlib.compress(MIXED, wbits=31), DEFLATE, CLUSTER)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [0, 1, CLUSTER - 1])
def test_less_than_a_cluster_is_an_error(method: CompressionType, size: int) -> None:
    with pytest.raises(ValueError, match=r"deflate|zstd"):
        decompress(pack(MIXED[:size], method), method, CLUSTER)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kept", [0, 1, 2, 0.1, 0.5, 0.9])
def test_a_truncated_stream_is_an_error(method: CompressionType, kept: float) -> None:
    stored = pack(MIXED, method)
    length = int(kept * len(stored)) if isinstance(kept, float) else kept
    with pytest.raises(ValueError, match=r"deflate|zstd"):
        decompress(stored[:length], method, CLUSTER)


@pytest.mark.parametrize("method", METHODS)
def test_nonsense_is_an_error(method: CompressionType) -> None:
    for seed in range(200):
        with pytest.raises(ValueError, match=r"deflate|zstd"):
            decompress(random.Random(seed).randbytes(600), method, CLUSTER)


# ---- zstd frames


def test_zstd_clusters_may_have_several_frames() -> None:
    for cuts in ((1,), (4096,), (100, 200, 60000), (CLUSTER - 1,)):
        edges = (0, *cuts, CLUSTER)
        stored = b"".join(zstd.compress(MIXED[start:end]) for start, end in itertools.pairwise(edges))
        assert decompress(stored, ZSTD, CLUSTER) == MIXED
        assert decompress(stored + b"behind", ZSTD, CLUSTER) == MIXED


def test_empty_and_skippable_frames_are_passed_over() -> None:
    skippable = (0x184D2A50).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"12345"
    assert decompress(zstd.compress(b"") + skippable + zstd.compress(MIXED), ZSTD, CLUSTER) == MIXED
    with pytest.raises(ValueError, match="zstd"):
        decompress(zstd.compress(b"") * 50, ZSTD, CLUSTER)


def test_the_last_zstd_frame_must_be_complete() -> None:
    options: dict[int, int] = {zstd.CompressionParameter.checksum_flag: 1}
    compressor = zstd.ZstdCompressor(options=options)
    stored = compressor.compress(MIXED) + compressor.flush()
    assert decompress(stored, ZSTD, CLUSTER) == MIXED
    for missing in range(1, 5):
        with pytest.raises(ValueError, match="zstd"):
            decompress(stored[:-missing], ZSTD, CLUSTER)
    with pytest.raises(ValueError, match="zstd"):
        decompress(stored[:-1] + bytes([stored[-1] ^ 1]), ZSTD, CLUSTER)


@pytest.mark.parametrize("more", [1, 2, 1000, 1 << 20])
def test_a_zstd_frame_longer_than_the_cluster_is_an_error(more: int) -> None:
    with pytest.raises(ValueError, match="longer than 65536 bytes"):
        decompress(zstd.compress(MIXED + bytes(more)), ZSTD, CLUSTER)


def test_frames_that_pass_the_end_of_the_cluster_are_an_error() -> None:
    with pytest.raises(ValueError, match="longer than"):
        decompress(zstd.compress(MIXED[:-1]) + zstd.compress(b"ab"), ZSTD, CLUSTER)


def test_a_zstd_frame_without_content_size() -> None:
    compressor = zstd.ZstdCompressor()
    stored = compressor.compress(MIXED[:5000], mode=compressor.FLUSH_BLOCK) + compressor.compress(MIXED[5000:])
    assert decompress(stored + compressor.flush(), ZSTD, CLUSTER) == MIXED


@pytest.mark.parametrize(("bits", "sound"), [(22, True), (23, True), (24, False), (27, False)])
def test_a_zstd_window_has_a_limit(bits: int, sound: bool) -> None:
    header = (0xFD2FB528).to_bytes(4, "little") + bytes([0x00, (bits - 10) << 3])
    raw_block = (1 | CLUSTER << 3).to_bytes(3, "little") + MIXED
    stored = header + raw_block
    if sound:
        assert decompress(stored, ZSTD, CLUSTER) == MIXED
    else:
        with pytest.raises(ValueError, match="zstd"):
            decompress(stored, ZSTD, CLUSTER)


def test_a_promise_of_gigabytes_takes_no_memory() -> None:
    liar = (0xFD2FB528).to_bytes(4, "little") + bytes([0xE0]) + (1 << 31).to_bytes(8, "little") + bytes(100)
    bomb = deflate(bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="zstd"):
            decompress(liar, ZSTD, CLUSTER)
        assert decompress(bomb, DEFLATE, CLUSTER) == bytes(CLUSTER)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


# ---- the cache


def test_the_cache_says_where_the_bad_cluster_is() -> None:
    cache = ClusterCache(DEFLATE, CLUSTER, 1 << 20, "disk.qcow2")
    assert cache.decompress(deflate(MIXED), 0x50000) == MIXED
    with pytest.raises(CorruptImageError, match=r"compressed cluster at host offset 0x52435: deflate.*\(disk\.qcow2\)"):
        cache.decompress(b"", 0x52435)


def test_the_cache_finds_what_it_keeps() -> None:
    cache = ClusterCache(DEFLATE, CLUSTER, 1 << 20, "x")
    assert cache.find(7, 512) is None
    cache.keep(7, 512, MIXED)
    assert cache.find(7, 512) is MIXED
    assert cache.find(8, 512) is None
    assert cache.find(7, 1024) is None


@pytest.mark.parametrize(("cluster_size", "capacity"), [(65536, 128), (2 << 20, 4), (512, 16384)])
def test_the_cache_is_bounded_and_forgets_the_least_used(cluster_size: int, capacity: int) -> None:
    cache = ClusterCache(DEFLATE, cluster_size, 8 << 20, "x")
    for place in range(capacity):
        cache.keep(place, 512, b"")
    assert cache.find(0, 512) is not None
    cache.keep(capacity, 512, b"")
    assert cache.find(1, 512) is None
    assert cache.find(0, 512) is not None
    cache.keep(0, 512, b"again")
    assert [place for place in range(capacity + 1) if cache.find(place, 512) is None] == [1]
