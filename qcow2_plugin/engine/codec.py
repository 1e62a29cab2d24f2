"""Compressed clusters: from stored bytes to a whole cluster and back, and a small cache of the latest ones.

The output of a decoder is bounded by the cluster size and its memory by a window limit, whatever the stream claims. A
stream must give exactly one cluster; bytes behind its end belong to others and are ignored.

Source: docs/interop/qcow2.rst, "Compressed Clusters Descriptor", and the header's compression type; RFC 1951, RFC 8878.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import zstandard
from isal import igzip_lib

from qcow2_plugin.errors import CorruptImageError, OptionError
from qcow2_plugin.format.header import CompressionType

_IsalError: type[Exception] = igzip_lib.IsalError  # type: ignore[assignment]  # isal's stub calls it an instance
_DEFLATE_WINDOW_BITS = 15
"""Encoders keep to 12 bits; QEMU reads what reaches back further, and so do we."""
_DEFLATE_ENCODER_WINDOW_BITS = 12
_LEVELS = {CompressionType.DEFLATE: range(4), CompressionType.ZSTD: range(1, 20)}
_QUICK_LEVEL = 1
_ZSTD_MAX_WINDOW_SIZE = 8 << 20
"""Bytes; more than any encoder needs for a cluster of at most 2 MiB."""
_ZSTD_STEP = 256
"""Bytes of a stream of unknown length that are decoded at once: less than 64 blocks, which give 8 MiB at most."""
_MAX_ZSTD_FRAMES = 256
"""Frames of one cluster; encoders write one. Each costs a look at all that follows it."""


def decompress(stored: bytes | memoryview, method: CompressionType, cluster_size: int) -> bytes:
    """The cluster of `cluster_size` bytes that `stored` begins with. Raises ValueError if there is none."""
    return _DECODERS[method](stored, cluster_size)


def _inflate(stored: bytes | memoryview, cluster_size: int) -> bytes:
    decoder = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_DEFLATE, _DEFLATE_WINDOW_BITS)
    try:
        cluster = decoder.decompress(stored, cluster_size)
    except _IsalError as error:
        raise ValueError(f"deflate stream: {error}") from error
    if len(cluster) != cluster_size:
        raise ValueError(f"deflate stream of {len(cluster)} instead of {cluster_size} bytes")
    return cluster


class _ZstdDecoders(threading.local):
    """A decoder for each thread, because making one takes a tenth of the time of a cluster."""

    def __init__(self) -> None:
        self.decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_SIZE)


_zstd = _ZstdDecoders()


def _unpack_zstd(stored: bytes | memoryview, cluster_size: int) -> bytes:
    """The usual case is one frame that says that it is a whole cluster."""
    try:
        if _claimed_size(stored) == cluster_size:
            return _zstd.decoder.decompress(stored, max_output_size=cluster_size)
        return _unpack_frames(stored, cluster_size)
    except zstandard.ZstdError as error:
        raise ValueError(f"zstd stream: {error}") from error


def _claimed_size(stored: bytes | memoryview) -> int | None:
    try:
        return zstandard.frame_content_size(stored)
    except zstandard.ZstdError:  # the decoder will say more exactly what is wrong
        return None


def _unpack_frames(stored: bytes | memoryview, cluster_size: int) -> bytes:
    """One frame or several back to back; the last must be complete."""
    pieces: list[bytes] = []
    missing, start = cluster_size, 0
    for _ in range(_MAX_ZSTD_FRAMES):
        frame = _zstd.decoder.decompressobj()
        while not frame.eof:
            piece = frame.decompress(stored[start : start + _ZSTD_STEP])
            if start >= len(stored) or len(piece) > missing:
                raise ValueError(f"zstd frame is incomplete or longer than {cluster_size} bytes")
            pieces.append(piece)
            missing -= len(piece)
            start += _ZSTD_STEP
        start = min(start, len(stored)) - len(frame.unused_data)
        if not missing:
            return b"".join(pieces)
    raise ValueError(f"zstd stream of more than {_MAX_ZSTD_FRAMES} frames")


_DECODERS: dict[CompressionType, Callable[[bytes | memoryview, int], bytes]] = {
    CompressionType.DEFLATE: _inflate,
    CompressionType.ZSTD: _unpack_zstd,
}


class Encoder:
    """Compresses clusters by one method. For any threads."""

    def __init__(self, method: CompressionType, level: int | None = None) -> None:
        """`level` is 0 to 3 for deflate, 1 to 19 for zstd, more for less space; None is a quick one.

        Raises OptionError.
        """
        levels = _LEVELS[method]
        if level is not None and level not in levels:
            raise OptionError(f"the level of compression is {levels[0]} to {levels[-1]} here")
        self.method = method
        self._level = _QUICK_LEVEL if level is None else level
        self._threads = threading.local()

    def compress(self, cluster: memoryview) -> bytes | None:
        """The stored form of a cluster, None if it is none that is shorter."""
        if self.method is CompressionType.ZSTD:
            stored = self._zstd_encoder().compress(cluster)
        else:
            stored = igzip_lib.compress(
                cluster, self._level, igzip_lib.COMP_DEFLATE, hist_bits=_DEFLATE_ENCODER_WINDOW_BITS
            )
        return stored if len(stored) < len(cluster) else None

    def _zstd_encoder(self) -> zstandard.ZstdCompressor:
        """One for each thread, which is how they may be used."""
        encoder: zstandard.ZstdCompressor | None = getattr(self._threads, "encoder", None)
        if encoder is None:
            encoder = self._threads.encoder = zstandard.ZstdCompressor(level=self._level, write_checksum=False)
        return encoder


class ClusterCache:
    """Decompressed clusters, the least recently used forgotten first.

    A cluster is known by where its stored form is: host offset and stored length. The cache has a lock of its own,
    never held while decompressing: two threads that miss the same cluster both work, and one result is kept.
    """

    def __init__(self, method: CompressionType, cluster_size: int, cache_size: int, path: str) -> None:
        """`cache_size` in bytes bounds what is kept, but one cluster always may be."""
        self._method = method
        self._cluster_size = cluster_size
        self._path = path
        self._capacity = max(cache_size // self._cluster_size, 1)
        self._clusters: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, host_offset: int, stored_length: int) -> bytes | None:
        """The cluster stored there, if it is kept."""
        with self._lock:
            cluster = self._clusters.get((host_offset, stored_length))
            if cluster is not None:
                self._clusters.move_to_end((host_offset, stored_length))
            return cluster

    def decompress(self, stored: bytes | memoryview, host_offset: int) -> bytes:
        """Decompress the cluster stored at `host_offset`. Raises CorruptImageError."""
        try:
            return decompress(stored, self._method, self._cluster_size)
        except ValueError as error:
            raise CorruptImageError(
                "compressed cluster", str(error), host_offset=host_offset, file=self._path
            ) from error

    def keep(self, host_offset: int, stored_length: int, cluster: bytes) -> None:
        """Remember a cluster for `find`."""
        with self._lock:
            self._clusters[host_offset, stored_length] = cluster
            if len(self._clusters) > self._capacity:
                self._clusters.popitem(last=False)
