"""Compressed clusters that lie: a stream gives exactly one cluster, in bounded time and memory, or an error."""

from __future__ import annotations

import random
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import CorruptImageError, TruncatedImageError
from tests.support.builder import ImageBuilder, deflate
from tests.support.fields import COMPRESSED, COPIED
from tests.support.hostile import IMAGE, Hostile, check, look, unharmed
from tests.support.tools import convert_to_raw

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MIB = 1 << 20
CLUSTER = 1 << 16
TEXT = bytes(random.Random(1).choices(b"abcd", k=CLUSTER))
FAR_APART = random.Random(2).randbytes(20_000) * 4
RLE_BLOCK = 1  # the block type
EMPTY_FRAME = zstd.compress(b"")
SKIPPABLE_FRAME = struct.pack("<II", 0x184D2A50, 0)


def stream(data: bytes, *, cluster_bits: int = 16, compression: str = "deflate", **options: Any) -> ImageBuilder:
    image = ImageBuilder(1 << max(cluster_bits, 20), cluster_bits, compression=compression)
    image.compressed(0, b"", stream=data, **options)
    return image.data(3, b"other") if cluster_bits == 16 else image


def zstd_stream(data: bytes, **options: Any) -> Callable[[Path], object]:
    return stream(data, compression="zstd", **options).build


def entry(word: int, **options: Any) -> Callable[[Path], object]:
    return ImageBuilder(MIB, **options).entry(0, word).data(3, b"other").build


def deflate_with_window(data: bytes, window_bits: int) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -window_bits, 9)
    return compressor.compress(data) + compressor.flush()


def frame(length: int, *, window_log: int = 20, claimed: int | None = None) -> bytes:
    """A zstd frame of `length` times "A" that asks for a window, and may claim another content size."""
    window = window_log - 10 << 3
    head = struct.pack("<IBB", 0xFD2FB528, 0 if claimed is None else 0xC0, window)
    if claimed is not None:
        head += struct.pack("<Q", claimed)
    blocks = []
    while length:
        count = min(length, 1 << 16)
        length -= count
        blocks.append(struct.pack("<I", count << 3 | RLE_BLOCK << 1 | (not length))[:3] + b"A")
    return head + b"".join(blocks)


def many_frames(one: bytes, cluster_bits: int) -> bytes:
    """A cluster in one frame, behind as many useless ones as fit."""
    last = zstd.compress(bytes(1 << cluster_bits))
    return one * (((1 << cluster_bits) - len(last) - 512) // len(one)) + last


DEFLATE = [
    Hostile("half a stream", stream(deflate(TEXT)[: len(deflate(TEXT)) // 2]).build, CorruptImageError, "deflate",
            "read"),
    Hostile("without its last byte", stream(deflate(TEXT)[:-1]).build),
    Hostile("one byte too few", stream(deflate(TEXT[:-1])).build, CorruptImageError, "65535", "read"),
    Hostile("one byte too many", stream(deflate(TEXT + b"x")).build),
    Hostile("a thousand clusters", stream(deflate(bytes(1000 * CLUSTER))).build),
    Hostile("bytes behind the end", stream(deflate(TEXT) + b"junk" * 100).build),
    Hostile("no deflate at all", stream(b"\xff" * 100).build, CorruptImageError, "deflate", "read"),
    Hostile("with a zlib header", stream(zlib.compress(TEXT)).build, CorruptImageError, "deflate", "read"),
    Hostile("an empty stream", stream(b"\x03\x00").build, CorruptImageError, "deflate stream of 0", "read"),
    Hostile("zeros", stream(bytes(512)).build, CorruptImageError, "deflate", "read"),
    Hostile("too few sectors", stream(deflate(TEXT), sectors=0).build, CorruptImageError, "deflate", "read"),
    Hostile("as many sectors as the field holds", stream(deflate(TEXT), sectors=255).build),
    Hostile("distances beyond 4 KiB", stream(deflate_with_window(FAR_APART[:CLUSTER], 15)).build),
]  # fmt: skip
ZSTD = [
    Hostile("without its last bytes", zstd_stream(zstd.compress(TEXT)[:-4]), CorruptImageError, "zstd", "read"),
    Hostile("one byte too few", zstd_stream(zstd.compress(TEXT[:-1])), CorruptImageError, "zstd", "read"),
    Hostile("one byte too many", zstd_stream(zstd.compress(TEXT + b"x")), CorruptImageError, "zstd", "read"),
    Hostile("one byte too many, unannounced", zstd_stream(frame(CLUSTER + 1)), CorruptImageError, "zstd", "read"),
    Hostile("a thousand clusters", zstd_stream(frame(1000 * CLUSTER)), CorruptImageError, "zstd", "read"),
    Hostile("bytes behind the end", zstd_stream(zstd.compress(TEXT) + b"junk" * 100)),
    Hostile("no zstd at all", zstd_stream(b"\xff" * 100), CorruptImageError, "zstd", "read"),
    Hostile("deflate", zstd_stream(deflate(TEXT)), CorruptImageError, "zstd", "read"),
    Hostile("nothing but empty frames", zstd_stream(EMPTY_FRAME * 100), CorruptImageError, "zstd", "read"),
    Hostile("too few sectors", zstd_stream(zstd.compress(TEXT), sectors=0), CorruptImageError, "zstd", "read"),
    Hostile("content size of 2 GiB", zstd_stream(frame(CLUSTER, claimed=2 << 30)), CorruptImageError, "zstd", "read"),
    Hostile("content size of 2^63", zstd_stream(frame(CLUSTER, claimed=1 << 63)), CorruptImageError, "zstd", "read"),
    Hostile("content size of 2^64-1, which means unknown", zstd_stream(frame(CLUSTER, claimed=2**64 - 1))),
    Hostile("content size one too small", zstd_stream(frame(CLUSTER, claimed=CLUSTER - 1)), CorruptImageError, "zstd",
            "read"),
    *(Hostile(f"window of 2^{bits}", zstd_stream(frame(CLUSTER, window_log=bits))) for bits in (16, 21, 23)),
    *(
        Hostile(f"window of 2^{bits}", zstd_stream(frame(CLUSTER, window_log=bits)), CorruptImageError,
                "too much memory", "read", differs="QEMU allocates what the stream asks for, up to 128 MiB")
        for bits in (24, 27)
    ),
    *(
        Hostile(f"window of 2^{bits}", zstd_stream(frame(CLUSTER, window_log=bits)), CorruptImageError,
                "too much memory", "read")
        for bits in (28, 31, 41)
    ),
]  # fmt: skip
PLACES = [
    Hostile("past the end", entry(COMPRESSED | 1 << 50), TruncatedImageError, "past the end", "read"),
    Hostile("at the last byte of all", entry(COMPRESSED | (1 << 54) - 1), TruncatedImageError, "past the end", "read"),
    Hostile("in the header", entry(COMPRESSED | 104), CorruptImageError, "compressed cluster", "read"),
    Hostile("at 0", entry(COMPRESSED), CorruptImageError, "compressed cluster", "read"),
    Hostile("COPIED", entry(COPIED | COMPRESSED | 3 * CLUSTER), CorruptImageError, "is invalid", "read"),
    Hostile("all other bits", entry(2**63 - 1), TruncatedImageError, "past the end", "read"),
    Hostile("above bit 55 with 512-byte clusters", entry(COMPRESSED | 1 << 60 | 512, cluster_bits=9),
            CorruptImageError, "is invalid", "read"),
]  # fmt: skip
IMAGES = [*DEFLATE, *ZSTD, *PLACES]


@pytest.mark.parametrize("hostile", DEFLATE, ids=str)
def test_deflate_stream(hostile: Hostile, tmp_path: Path) -> None:
    check(hostile, tmp_path)


@pytest.mark.parametrize("hostile", ZSTD, ids=str)
def test_zstd_stream(hostile: Hostile, tmp_path: Path) -> None:
    check(hostile, tmp_path)


@pytest.mark.parametrize("hostile", PLACES, ids=str)
def test_entry(hostile: Hostile, tmp_path: Path) -> None:
    check(hostile, tmp_path)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("useless", [SKIPPABLE_FRAME, EMPTY_FRAME], ids=["skippable frames", "empty frames"])
def test_a_cluster_full_of_useless_frames_costs_what_its_bytes_cost(useless: bytes, tmp_path: Path) -> None:
    """Whether such a cluster is read or refused: it must not keep a server busy for seconds."""
    path = tmp_path / IMAGE
    zstd_stream(many_frames(useless, 20), cluster_bits=20)(path)
    with unharmed(tmp_path, seconds=2):
        outcome = look(path)
    assert outcome.error or outcome.content == bytes(MIB)


@pytest.mark.parametrize("hostile", [hostile for hostile in (*DEFLATE, *ZSTD, *PLACES) if hostile.error], ids=str)
def test_a_bad_stream_spoils_its_own_cluster_only(hostile: Hostile, tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    hostile.make(path)
    with unharmed(tmp_path), open_image(path) as image:
        cluster_size = image.header.geometry.cluster_size
        for offset in (0, cluster_size - 1):
            with pytest.raises(CorruptImageError):
                image.pread(1, offset)
        assert image.pread(5, 3 * cluster_size) == b"other"
        image.pread(MIB - cluster_size, cluster_size)


def test_neighbours_of_a_bad_stream_are_read(tmp_path: Path) -> None:
    """They are fetched together with it, in one piece."""
    path = tmp_path / IMAGE
    image = ImageBuilder(MIB)
    for cluster in range(6):
        payload = TEXT[cluster:] + TEXT[:cluster]
        image.compressed(cluster, payload, stream=b"\xff" * 700 if cluster == 2 else None)
    image.build(path)
    with unharmed(tmp_path), open_image(path) as opened:
        for cluster in (0, 1, 3, 4, 5):
            assert opened.pread(CLUSTER, cluster * CLUSTER) == TEXT[cluster:] + TEXT[:cluster]
        assert opened.pread(3 * CLUSTER, 3 * CLUSTER) == image.expected()[3 * CLUSTER : 6 * CLUSTER]
        with pytest.raises(CorruptImageError):
            opened.pread(6 * CLUSTER, 0)


def test_what_a_stream_shows_does_not_depend_on_what_was_read_before(tmp_path: Path) -> None:
    """Two entries name one stream, one of them too little of it."""
    path = tmp_path / IMAGE
    built = ImageBuilder(MIB).compressed(0, TEXT).build(path)
    host_offset = built.data_offsets[0]
    sectors = (host_offset + len(deflate(TEXT)) - 1) // 512 - host_offset // 512
    image = ImageBuilder(MIB).compressed(0, TEXT).entry(1, COMPRESSED | (sectors - 8) << 54 | host_offset)
    assert image.build(path).data_offsets[0] == host_offset
    for first in (0, 1):
        with open_image(path) as opened:
            for offset in (first * CLUSTER, (1 - first) * CLUSTER):
                if offset:
                    with pytest.raises(CorruptImageError):
                        opened.pread(512, offset)
                else:
                    assert opened.pread(512, offset) == TEXT[:512]


def test_no_encoder_needs_a_larger_window(tmp_path: Path) -> None:
    """A window up to 8 MiB is accepted: more than any encoder needs, for clusters of at most 2 MiB."""
    path = tmp_path / IMAGE
    content = random.Random(3).randbytes(MIB) * 2
    packed = zstd.compress(content, options={zstd.CompressionParameter.compression_level: 22})
    ImageBuilder(2 * MIB, 21, compression="zstd").compressed(0, content, stream=packed).build(path)
    assert look(path).content == content == convert_to_raw(path)
