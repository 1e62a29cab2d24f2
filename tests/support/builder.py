"""Builds qcow2 files field by field: what a test says about an image, before it has bytes.

The file owns the vocabulary: clusters by what the guest shall see, and every other structure of the format. Where
the bytes go is layout.py's business. By default the result is an image that `qemu-img check` finds clean: offsets,
refcounts, COPIED bits and feature bits follow from what was placed. Every one of them can be overridden with any
value that fits its width, sensible or not; an override changes only the bytes of that field, never the layout. It
refuses to know the package under test, and it never reads an image.

    built = ImageBuilder(virtual_size=1 << 20).data(0, b"hello").zero(1).backing(b"base.raw", b"raw").build(path)
    patch(path, built.l2_entry_offset(0), bytes(8))
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from tests.support.fields import ALL_PARTS, HEADER_FIELDS, Extension, patch, set_field
from tests.support.layout import Build, BuiltImage, BuiltMap

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = [
    "ALL_PARTS", "HEADER_FIELDS", "BuiltImage", "BuiltMap", "GuestMap", "ImageBuilder", "bits", "deflate", "huge_empty",
    "patch", "set_field", "shared_l2_bomb",
]  # fmt: skip


def deflate(data: bytes) -> bytes:
    """A raw deflate stream with the 4 KiB window that the format asks for."""
    compressor = zlib.compressobj(-1, zlib.DEFLATED, -12, 9)
    return compressor.compress(data) + compressor.flush()


def bits(ranges: Iterable[tuple[int, int]], granularity_bits: int) -> bytes:
    """Bitmap data in which every bit that (offset, length) in `ranges` touches is set."""
    number = 0
    for offset, length in ranges:
        first, last = offset >> granularity_bits, (offset + length - 1) >> granularity_bits
        number |= ((1 << (last - first + 1)) - 1) << first
    return number.to_bytes((number.bit_length() + 7) // 8, "little")


@dataclass(frozen=True)
class Cluster:
    """What one L2 entry says. `allocated` and `zero` are masks of the cluster's 32 parts."""

    payload: bytes = b""
    allocated: int = 0
    zero: int = 0
    stored: bool = False
    stream: bytes | None = None
    sectors: int | None = None
    host_offset: int | None = None
    copied: bool | None = None
    word: int | None = None
    bitmap: int | None = None


class GuestMap:
    """What one L1 table maps: guest clusters by index, as told. `ImageBuilder` is the map of the active disk."""

    def __init__(
        self,
        virtual_size: int,
        cluster_bits: int = 16,
        *,
        extended_l2: bool = False,
        compression: str = "deflate",
        l1_size: int | None = None,
    ) -> None:
        self.virtual_size, self.cluster_bits, self.cluster_size = virtual_size, cluster_bits, 1 << cluster_bits
        self.extended_l2, self.compression, self.l1_size = extended_l2, compression, l1_size
        self.l2_entry_size = 16 if extended_l2 else 8
        self.l2_entries = self.cluster_size // self.l2_entry_size
        self.told: dict[int, Cluster] = {}
        self.l1_words: dict[int, int] = {}
        self.l2_tables: set[int] = set()

    def _tell(self, cluster: int, told: Cluster) -> Self:
        if len(told.payload) > self.cluster_size:
            raise ValueError(f"payload of {len(told.payload)} bytes in a cluster of {self.cluster_size}")
        if not self.extended_l2 and (told.zero not in (0, ALL_PARTS) or told.allocated not in (0, ALL_PARTS)):
            raise ValueError("subclusters need extended_l2=True")
        self.told[cluster] = replace(told, payload=told.payload.ljust(self.cluster_size, b"\0"))
        self.l2_tables.add(cluster // self.l2_entries)
        return self

    def data(self, cluster: int, payload: bytes, *, host_offset: int | None = None, copied: bool | None = None) -> Self:
        """A normal cluster; short payloads are filled up with zeros. `copied` None: as the refcount says."""
        told = Cluster(payload, ALL_PARTS, stored=True, host_offset=host_offset, copied=copied)
        return self._tell(cluster, told)

    def zero(
        self,
        cluster: int,
        *,
        preallocated: bool = False,
        payload: bytes = b"",
        host_offset: int | None = None,
        copied: bool | None = None,
    ) -> Self:
        """A zero cluster; preallocated ones own a host cluster that holds `payload`, which no guest may see."""
        told = Cluster(payload, 0, ALL_PARTS, preallocated, host_offset=host_offset, copied=copied)
        return self._tell(cluster, told)

    def subclusters(
        self,
        cluster: int,
        payload: bytes,
        *,
        allocated: int,
        zero: int = 0,
        stored: bool = True,
        host_offset: int | None = None,
        copied: bool | None = None,
    ) -> Self:
        """Extended L2 only: masks of 32 bits. `payload` is the whole host cluster, hidden parts included."""
        told = Cluster(payload, allocated, zero, stored, host_offset=host_offset, copied=copied)
        return self._tell(cluster, told)

    def compressed(
        self,
        cluster: int,
        payload: bytes,
        *,
        stream: bytes | None = None,
        host_offset: int | None = None,
        sectors: int | None = None,
    ) -> Self:
        """A compressed cluster. `stream` replaces the compressed bytes, `sectors` the additional-sectors field."""
        whole = payload.ljust(self.cluster_size, b"\0")
        if stream is None:
            stream = zstd.compress(whole) if self.compression == "zstd" else deflate(whole)
        told = Cluster(payload, ALL_PARTS, stream=stream, sectors=sectors, host_offset=host_offset, bitmap=0)
        return self._tell(cluster, told)

    def entry(self, cluster: int, word: int, bitmap: int = 0) -> Self:
        """An L2 entry verbatim; nothing is placed or counted for it."""
        return self._tell(cluster, Cluster(word=word, bitmap=bitmap))

    def l2_table(self, index: int) -> Self:
        """An L2 table for this L1 index even when it stays empty."""
        self.l2_tables.add(index)
        return self

    def l1_entry(self, index: int, word: int) -> Self:
        """An L1 entry verbatim; a table placed for the same index stays in the file, counted but unreferenced."""
        self.l1_words[index] = word
        return self

    def expected(self, backing: bytes = b"") -> bytes:
        """The guest's view of the whole disk, from what was told alone. Not for maps with verbatim entries."""
        view = bytearray(backing[: self.virtual_size].ljust(self.virtual_size, b"\0"))
        part = self.cluster_size // 32
        for cluster, told in self.told.items():
            assert told.word is None, f"guest cluster {cluster} is a verbatim L2 entry"
            for index in range(32):
                start, within = cluster * self.cluster_size + index * part, index * part
                if told.allocated >> index & 1:
                    view[start : start + part] = told.payload[within : within + part]
                elif told.zero >> index & 1:
                    view[start : start + part] = bytes(part)
        return bytes(view[: self.virtual_size])

    def l1_length(self) -> int:
        if self.l1_size is not None:
            return self.l1_size
        needed = -(-self.virtual_size // (self.cluster_size * self.l2_entries))
        return max([needed, *(index + 1 for index in (*self.l2_tables, *self.l1_words))])


@dataclass(frozen=True)
class Snapshot:
    id: bytes
    name: bytes
    guest: GuestMap | None
    extra: bytes
    fields: Mapping[str, int]


@dataclass(frozen=True)
class Bitmap:
    name: bytes
    data: bytes
    literal: bool
    table: list[int] | None
    extra: bytes
    fields: Mapping[str, int]


class ImageBuilder(GuestMap):
    """One image. Its methods return the builder; `build` may be called again, with the same result.

    `header` overrides fields of the header by name; `incompatible`, `compatible` and `autoclear` add feature bits to
    those that follow from what is placed. `header_length` moves the extensions, `header_tail` fills the bytes from
    112 to there. `end_marker=False` leaves the extension area without its end: it then runs into the backing name,
    or into the zeros (which look like a marker) of the first cluster. `pack=False` gives every compressed stream host
    clusters of its own. `cut` truncates the finished file, in bytes.
    """

    def __init__(
        self,
        virtual_size: int,
        cluster_bits: int = 16,
        *,
        version: int = 3,
        refcount_bits: int = 16,
        extended_l2: bool = False,
        compression: str = "deflate",
        l1_size: int | None = None,
        pack: bool = True,
        header: Mapping[str, int] | None = None,
        header_length: int = 112,
        header_tail: bytes = b"",
        incompatible: int = 0,
        compatible: int = 0,
        autoclear: int = 0,
        end_marker: bool = True,
        cut: int | None = None,
    ) -> None:
        super().__init__(virtual_size, cluster_bits, extended_l2=extended_l2, compression=compression, l1_size=l1_size)
        self.version, self.refcount_bits, self.pack = version, refcount_bits, pack
        self.end_marker, self.cut = end_marker, cut
        self.header, self.header_tail = dict(header or {}), header_tail
        self.header_length = 72 if version == 2 else header_length
        self.incompatible = incompatible | (compression == "zstd") << 3 | extended_l2 << 4
        self.compatible, self.autoclear = compatible, autoclear
        self.backing_told: tuple[bytes, bytes | None, int | None] | None = None
        self.data_path: Path | None = None
        self.data_name: bytes | None = None
        self.extensions: tuple[list[Extension], list[Extension]] = ([], [])  # before and after the usual ones
        self.name_table: bytes | None = None
        self.refcounts: dict[int, int] = {}
        self.snapshots: list[Snapshot] = []
        self.bitmaps: list[Bitmap] = []
        self.bitmaps_fields: Mapping[str, int] = {}
        self.luks_told: tuple[bytes, int | None, int | None] | None = None

    def backing(self, name: bytes, format: bytes | None = b"raw", *, offset: int | None = None) -> Self:
        """A backing file name, right after the extensions unless `offset` says where. `format` None: none recorded."""
        self.backing_told = (name, format, offset)
        return self

    def data_file(self, path: Path, name: bytes | None, *, raw: bool = False) -> Self:
        """Puts guest data at its guest offset into `path`; `name` goes into the header extension unless None."""
        self.data_path, self.data_name = path, name
        self.incompatible |= 1 << 2
        self.autoclear |= raw << 1
        return self

    def extension(
        self, type: int, data: bytes, *, length: int | None = None, padding: int = 0, first: bool = False
    ) -> Self:
        """A header extension after (or before) the usual ones; `length` lies about it, `padding` is the filler byte."""
        self.extensions[0 if first else 1].append(Extension(type, data, length, padding))
        return self

    def feature_names(self, names: Iterable[tuple[int, int, bytes]]) -> Self:
        """The feature name table: (kind, bit, name of up to 46 bytes)."""
        self.name_table = b"".join(struct.pack("BB46s", *name) for name in names)
        return self

    def refcount(self, cluster: int, value: int) -> Self:
        """The refcount of one host cluster verbatim. COPIED bits still follow the true number of references."""
        self.refcounts[cluster] = value
        return self

    def map(self, virtual_size: int | None = None, l1_size: int | None = None) -> GuestMap:
        """An empty map with this image's geometry, for `snapshot`."""
        return GuestMap(
            self.virtual_size if virtual_size is None else virtual_size,
            self.cluster_bits,
            extended_l2=self.extended_l2,
            compression=self.compression,
            l1_size=l1_size,
        )

    def snapshot(
        self, id: bytes, name: bytes, guest: GuestMap | None = None, *, extra: bytes | None = None, **fields: int
    ) -> Self:
        """An internal snapshot with a map of its own, or (None) sharing all L2 tables of the active disk.

        `extra` defaults to 24 bytes: VM state size 0, the map's disk size, icount unknown. `fields` override
        `SNAPSHOT_FIELDS`.
        """
        if extra is None:
            extra = struct.pack(">QQQ", 0, (guest or self).virtual_size, 2**64 - 1)
        self.snapshots.append(Snapshot(id, name, guest, extra, fields))
        return self

    def bitmap(
        self,
        name: bytes,
        dirty: Iterable[tuple[int, int]] = (),
        *,
        granularity_bits: int = 16,
        data: bytes | None = None,
        literal: bool = False,
        table: list[int] | None = None,
        extra: bytes = b"",
        **fields: int,
    ) -> Self:
        """A bitmap with the bits of the `dirty` guest ranges (offset, length), or with these bytes of `data`.

        Clusters of all zeros or all ones become table words without data unless `literal`. `table` replaces the
        words of the bitmap table; `fields` override `BITMAP_FIELDS`, e.g. `flags=2`.
        """
        fields = {"granularity_bits": granularity_bits, **fields}
        stored = bits(dirty, granularity_bits) if data is None else data
        self.bitmaps.append(Bitmap(name, stored, literal, table, extra, fields))
        self.autoclear |= 1
        return self

    def bitmaps_extension(self, **fields: int) -> Self:
        """Overrides fields of the bitmaps extension, named as in `BITMAPS_EXTENSION_FIELDS`."""
        self.bitmaps_fields = fields
        return self

    def luks(self, area: bytes, *, offset: int | None = None, length: int | None = None) -> Self:
        """A LUKS header area, its extension and crypt_method 2. `offset` and `length` lie in the extension."""
        self.luks_told = (area, offset, length)
        return self

    def build(self, path: str | Path) -> BuiltImage:
        """Writes the image (and its data file) and says where everything lies."""
        return Build(self, Path(path)).run()


def shared_l2_bomb(path: str | Path, virtual_size: int = 64 << 40) -> BuiltImage:
    """A 12 MiB file whose single 2 MiB L2 table is shared by every L1 entry, all naming one small deflate stream."""
    cluster_bits = 21
    entries = (1 << cluster_bits) // 8
    tables = virtual_size // (entries << cluster_bits)
    image = ImageBuilder(virtual_size, cluster_bits, refcount_bits=64).compressed(0, b"")
    built = image.build(path)
    stream_cluster, l2_cluster = (o >> cluster_bits for o in (built.data_offsets[0], built.l2_offsets[0]))
    built = image.refcount(stream_cluster, tables * entries).refcount(l2_cluster, tables).build(path)
    with open(path, "rb") as file:
        file.seek(built.l2_entry_offset(0))
        word = file.read(8)
    patch(path, built.l2_offsets[0], word * entries)
    patch(path, built.l1_offset, struct.pack(">Q", built.l2_offsets[0]) * tables)
    return built


def huge_empty(path: str | Path) -> BuiltImage:
    """An empty sparse image of 2 EiB, the largest disk there is: 2 MiB clusters and an L1 table of 32 MiB."""
    return ImageBuilder(2 << 60, cluster_bits=21).build(path)
