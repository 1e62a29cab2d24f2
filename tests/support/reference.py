"""A slow and obvious qcow2 reader: what the guest must see, one function per rule of the format.

A second oracle, for images that QEMU cannot make or misreads. It owns the rules for reading and nothing else: it
opens the files that the test names and no others, reads every word from the file each time it needs it, and keeps
nothing between calls. It does not decrypt, and it does not check what reading does not need.
"""

from __future__ import annotations

import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

OFFSET_MASK = 0x00FFFFFFFFFFFE00  # bits 9 to 55
ALL_SUBCLUSTERS = 0xFFFFFFFF


class CorruptError(Exception):
    """The format forbids what was found where the guest wanted to read."""


@dataclass(frozen=True)
class _Table:
    """The L1 table in force, and the disk size that goes with it."""

    offset: int
    entries: int
    virtual_size: int


class ReferenceReader:
    """Reads one image. `backing` is the content below it, `snapshot` the ID of an internal snapshot."""

    def __init__(
        self,
        path: str | Path,
        *,
        data_file: str | Path | None = None,
        backing: bytes | ReferenceReader = b"",
        snapshot: str | None = None,
    ) -> None:
        self.path, self.data_file, self.backing = path, data_file, backing
        self.version = self._word(4, "I")
        self.cluster_bits = self._word(20, "I")
        self.cluster_size = 1 << self.cluster_bits
        self.encrypted = self._word(32, "I") != 0
        incompatible = self._word(72, "Q") if self.version >= 3 else 0
        self.has_data_file = bool(incompatible & 1 << 2)
        self.extended_l2 = bool(incompatible & 1 << 4)
        self.zstd = bool(incompatible & 1 << 3) and self._word(104, "B") == 1
        self.table = self._active_table() if snapshot is None else self._snapshot_table(snapshot.encode())
        self.virtual_size = self.table.virtual_size

    def read(self, offset: int, length: int) -> bytes:
        """The guest bytes of a range inside the disk. Raises CorruptError as soon as one cluster cannot be read."""
        if offset < 0 or length < 0 or offset + length > self.virtual_size:
            raise ValueError(f"{length} bytes at {offset} are not inside a disk of {self.virtual_size} bytes")
        pieces = []
        while length:
            within = offset % self.cluster_size
            count = min(length, self.cluster_size - within)
            pieces.append(self._read_cluster(offset - within)[within : within + count])
            offset, length = offset + count, length - count
        return b"".join(pieces)

    # ---- tables

    def _active_table(self) -> _Table:
        return _Table(self._word(40, "Q"), self._word(36, "I"), self._word(24, "Q") // 512 * 512)

    def _snapshot_table(self, wanted: bytes) -> _Table:
        offset = self._word(64, "Q")
        for _ in range(self._word(60, "I")):
            id_size, name_size = self._word(offset + 12, "H"), self._word(offset + 14, "H")
            extra_size = self._word(offset + 36, "I")
            if self._bytes(offset + 40 + extra_size, id_size) == wanted:
                size = self._word(offset + 48, "Q") if extra_size >= 16 else self._word(24, "Q")
                return _Table(self._word(offset, "Q"), self._word(offset + 8, "I"), size // 512 * 512)
            entry_size = 40 + extra_size + id_size + name_size
            offset += (entry_size + 7) // 8 * 8
        raise LookupError(f"no snapshot with the ID {wanted!r}")

    def l2_entry(self, guest_offset: int) -> tuple[int, int]:
        """The entry's word and its subcluster bitmap (0 without extended L2)."""
        entry_size = 16 if self.extended_l2 else 8
        per_table = self.cluster_size // entry_size
        l1_index, l2_index = divmod(guest_offset // self.cluster_size, per_table)
        if l1_index >= self.table.entries:
            return 0, 0
        l2_offset = self._word(self.table.offset + 8 * l1_index, "Q") & OFFSET_MASK
        if l2_offset == 0:
            return 0, 0
        self._require(l2_offset % self.cluster_size == 0, f"L2 table at {l2_offset:#x} is not aligned")
        entry_offset = l2_offset + l2_index * entry_size
        return self._word(entry_offset, "Q"), self._word(entry_offset + 8, "Q") if self.extended_l2 else 0

    # ---- clusters

    def _read_cluster(self, guest_offset: int) -> bytes:
        word, bitmap = self.l2_entry(guest_offset)
        if word >> 62 & 1:
            return self._compressed(word, bitmap)
        if self.extended_l2:
            return self._extended(guest_offset, word, bitmap)
        return self._standard(guest_offset, word)

    def _standard(self, guest_offset: int, word: int) -> bytes:
        if word & 1:
            self._require(self.version >= 3, "zero flag in a version 2 image")
            self._require_aligned(word)
            return bytes(self.cluster_size)
        if not self._is_allocated(word):
            return self._below(guest_offset)
        return self._stored(guest_offset, word)

    def _extended(self, guest_offset: int, word: int, bitmap: int) -> bytes:
        allocated, zero = bitmap & ALL_SUBCLUSTERS, bitmap >> 32
        self._require(not allocated & zero, f"subclusters {allocated & zero:#x} are both allocated and zero")
        stored = self._is_allocated(word)
        self._require(stored or not allocated, f"subclusters {allocated:#x} are allocated in no cluster")
        self._require_aligned(word)
        below = self._below(guest_offset)
        here = self._stored(guest_offset, word) if allocated else b""
        size = self.cluster_size // 32
        pieces = []
        for index in range(32):
            if allocated >> index & 1:
                pieces.append(here[index * size : (index + 1) * size])
            elif zero >> index & 1:
                pieces.append(bytes(size))
            else:
                pieces.append(below[index * size : (index + 1) * size])
        return b"".join(pieces)

    def _is_allocated(self, word: int) -> bool:
        """With a data file, offset 0 is a place like any other, and COPIED tells it from "nowhere"."""
        return word & OFFSET_MASK != 0 or (self.has_data_file and word >> 63 == 1)

    def _stored(self, guest_offset: int, word: int) -> bytes:
        self._require(not self.encrypted, "the reference reader does not decrypt")
        self._require_aligned(word)
        host_offset = word & OFFSET_MASK
        if not self.has_data_file:
            return self._bytes(host_offset, self.cluster_size)
        self._require(host_offset == guest_offset, f"{guest_offset:#x} is at {host_offset:#x} in the data file")
        assert self.data_file is not None, "the image has a data file and the test named none"
        return _file_bytes(self.data_file, host_offset, self.cluster_size)

    def _below(self, guest_offset: int) -> bytes:
        """A cluster of the backing file, with zeros past its end and past ours."""
        below = self.backing
        if isinstance(below, ReferenceReader):
            length = max(0, min(self.cluster_size, below.virtual_size - guest_offset))
            content = below.read(guest_offset, length) if length else b""
        else:
            content = below[guest_offset : guest_offset + self.cluster_size]
        return content.ljust(self.cluster_size, b"\0")

    # ---- compressed clusters

    def _compressed(self, word: int, bitmap: int) -> bytes:
        self._require(not self.has_data_file, "compressed cluster in an image with a data file")
        self._require(bitmap == 0, f"compressed cluster with the subcluster bitmap {bitmap:#x}")
        offset_bits = 70 - self.cluster_bits
        host_offset = word & ((1 << offset_bits) - 1)
        self._require(host_offset < 1 << 56, f"compressed data at {host_offset:#x}")
        sectors = (word & (1 << 62) - 1) >> offset_bits
        stream = self._bytes(host_offset, (sectors + 1) * 512 - host_offset % 512)
        return self._inflated(stream) if not self.zstd else self._zstd_decoded(stream)

    def _inflated(self, stream: bytes) -> bytes:
        try:
            content = zlib.decompressobj(-12).decompress(stream, self.cluster_size)
        except zlib.error as error:
            raise CorruptError(f"deflate stream: {error}") from error
        self._require(len(content) == self.cluster_size, f"deflate stream of {len(content)} bytes")
        return content

    def _zstd_decoded(self, stream: bytes) -> bytes:
        """Frames one after the other until the cluster is full; the last one has to end there."""
        content = b""
        while len(content) < self.cluster_size:
            frame = zstd.ZstdDecompressor()
            try:
                piece = frame.decompress(stream, self.cluster_size - len(content) + 1)
            except zstd.ZstdError as error:
                raise CorruptError(f"zstd frame: {error}") from error
            content, stream = content + piece, frame.unused_data
            self._require(frame.eof, f"zstd frame that does not end by byte {len(content)}")
        self._require(len(content) == self.cluster_size, f"zstd frames of more than {self.cluster_size} bytes")
        return content

    # ---- bytes

    def _require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise CorruptError(f"{self.path}: {otherwise}")

    def _require_aligned(self, word: int) -> None:
        self._require((word & OFFSET_MASK) % self.cluster_size == 0, f"L2 entry {word:#x} is not aligned")

    def _word(self, host_offset: int, code: str) -> int:
        word: int
        (word,) = struct.unpack(">" + code, self._bytes(host_offset, struct.calcsize(">" + code)))
        return word

    def _bytes(self, host_offset: int, length: int) -> bytes:
        return _file_bytes(self.path, host_offset, length)


def _file_bytes(path: str | Path, host_offset: int, length: int) -> bytes:
    """Bytes past the end of a file read as zeros."""
    with open(path, "rb") as stream:
        stream.seek(host_offset)
        return stream.read(length).ljust(length, b"\0")
