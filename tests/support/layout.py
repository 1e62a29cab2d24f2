"""Turns what an `ImageBuilder` was told into the bytes of a file.

The file owns where each structure lies, how often each cluster is referenced, and the words that follow from that
(refcounts, COPIED bits). It takes every override as it is and refuses to judge any of them.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import fields

if TYPE_CHECKING:
    from tests.support.builder import Bitmap, Cluster, GuestMap, ImageBuilder


@dataclass
class BuiltMap:
    """Where the tables and clusters of one L1 lie. All offsets are bytes in the file that stores them."""

    cluster_size: int
    l2_entry_size: int
    l1_offset: int = 0
    l1_size: int = 0
    l2_offsets: dict[int, int] = field(default_factory=dict)  # by L1 index
    data_offsets: dict[int, int] = field(default_factory=dict)  # by guest cluster; compressed: the first byte

    def l1_entry_offset(self, index: int) -> int:
        return self.l1_offset + 8 * index

    def l2_entry_offset(self, cluster: int) -> int:
        table, index = divmod(cluster, self.cluster_size // self.l2_entry_size)
        return self.l2_offsets[table] + index * self.l2_entry_size


@dataclass
class BuiltImage(BuiltMap):
    """Where everything lies. Lists are in the order in which the builder was told."""

    path: Path = Path()
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    refcount_block_offsets: dict[int, int] = field(default_factory=dict)  # by index in the refcount table
    extension_offsets: list[tuple[int, int]] = field(default_factory=list)  # (type, offset of the type field)
    backing_name_offset: int = 0
    snapshots_offset: int = 0
    snapshot_entry_offsets: list[int] = field(default_factory=list)
    snapshots: list[BuiltMap] = field(default_factory=list)
    bitmap_directory_offset: int = 0
    bitmap_entry_offsets: list[int] = field(default_factory=list)
    bitmap_table_offsets: list[int] = field(default_factory=list)
    bitmap_data_offsets: list[list[int]] = field(default_factory=list)  # allocated clusters only
    luks_offset: int = 0
    file_size: int = 0


class _Layout:
    """The file while it grows: pieces of bytes, clusters handed out, references counted."""

    def __init__(self, cluster_size: int) -> None:
        self.cluster_size = cluster_size
        self.pieces: list[tuple[int, bytes]] = []
        self.references: Counter[int] = Counter()  # by cluster index
        self.taken: set[int] = set()  # cluster indexes that the caller chose
        self.next_cluster = 0

    def clusters(self, host_offset: int, length: int) -> range:
        return range(host_offset // self.cluster_size, (host_offset + max(length, 1) - 1) // self.cluster_size + 1)

    def allocate(self, length: int) -> int:
        count = len(self.clusters(0, length))
        while blocked := self.taken.intersection(range(self.next_cluster, self.next_cluster + count)):
            self.next_cluster = max(blocked) + 1
        self.next_cluster += count
        return (self.next_cluster - count) * self.cluster_size

    def refer(self, host_offset: int, length: int, times: int = 1) -> None:
        for cluster in self.clusters(host_offset, length):
            self.references[cluster] += times

    def place(self, data: bytes, length: int | None = None) -> int:
        """Allocates, counts and writes one structure; `length` when it is longer than its bytes."""
        length = max(length or 0, len(data))
        host_offset = self.allocate(length)
        self.refer(host_offset, length)
        self.write(host_offset, data)
        return host_offset

    def write(self, host_offset: int, data: bytes) -> None:
        self.pieces.append((host_offset, data))

    def end(self) -> int:
        last = max((offset + len(data) for offset, data in self.pieces), default=0)
        return max(-(-last // self.cluster_size), self.next_cluster) * self.cluster_size


class Build:
    """One run of a builder: places everything, then counts, then writes the words that depend on the counts."""

    def __init__(self, told: ImageBuilder, path: Path) -> None:
        self.told = told
        self.layout = _Layout(told.cluster_size)
        self.data_pieces: list[tuple[int, bytes]] = []
        self.built = BuiltImage(told.cluster_size, told.l2_entry_size, path=path)
        self.stream_cursor = 0
        self.words: dict[int, int] = {}  # L2 entries without COPIED, by the id of what was told
        self.extents: dict[int, tuple[int, int]] = {}  # host offset and length, likewise

    def run(self) -> BuiltImage:
        told, built, layout = self.told, self.built, self.layout
        own_maps = [told, *(snapshot.guest for snapshot in told.snapshots if snapshot.guest)]
        if told.data_path is None:
            chosen = [c for guest in own_maps for c in guest.told.values() if c.host_offset is not None]
            for cluster in chosen:
                length = told.cluster_size if cluster.stream is None else len(cluster.stream)
                layout.taken.update(layout.clusters(cluster.host_offset or 0, length))
        header_clusters = layout.clusters(0, len(self._header()))
        layout.allocate(len(header_clusters) * told.cluster_size)
        layout.refer(0, len(header_clusters) * told.cluster_size)
        self._place_map(told, built)
        self._place_snapshots()
        self._place_bitmaps()
        if told.luks_told:
            built.luks_offset = layout.place(told.luks_told[0])
        self._place_refcounts()
        for guest, where in zip(own_maps, [built, *self._own_snapshots()], strict=True):
            self._write_tables(guest, where)
        for snapshot, where in zip(told.snapshots, built.snapshots, strict=True):
            if snapshot.guest is None:
                self._write_l1(told, where)
        layout.write(0, self._header())
        if told.backing_told:
            layout.write(built.backing_name_offset, told.backing_told[0])
        self._write_files()
        return built

    def _own_snapshots(self) -> list[BuiltMap]:
        pairs = zip(self.told.snapshots, self.built.snapshots, strict=True)
        return [where for snapshot, where in pairs if snapshot.guest is not None]

    def _place_map(self, guest: GuestMap, where: BuiltMap) -> None:
        where.l1_size = guest.l1_length()
        if where.l1_size:
            where.l1_offset = self.layout.place(b"", where.l1_size * 8)
        for index in sorted(guest.l2_tables):
            where.l2_offsets[index] = self.layout.allocate(self.told.cluster_size)
        for cluster, told in sorted(guest.told.items()):
            host_offset = self._place_cluster(cluster, told)
            if host_offset is not None:
                where.data_offsets[cluster] = host_offset
        self._refer_map(guest, where)

    def _refer_map(self, guest: GuestMap, where: BuiltMap) -> None:
        for l2_offset in where.l2_offsets.values():
            self.layout.refer(l2_offset, self.told.cluster_size)
        for told in guest.told.values():
            if id(told) in self.extents:
                self.layout.refer(*self.extents[id(told)])

    def _place_cluster(self, cluster: int, told: Cluster) -> int | None:
        size = self.told.cluster_size
        if told.word is not None:
            self.words[id(told)] = told.word
            return None
        if told.stream is not None:
            return self._place_stream(told, told.stream)
        flag = fields.ZERO if told.zero and not self.told.extended_l2 else 0
        if not told.stored:
            self.words[id(told)] = flag
            return None
        if self.told.data_path is not None:
            host_offset = cluster * size if told.host_offset is None else told.host_offset
            self.data_pieces.append((host_offset, told.payload))
        else:
            host_offset = self.layout.allocate(size) if told.host_offset is None else told.host_offset
            self.extents[id(told)] = (host_offset, size)
            self.layout.write(host_offset, told.payload)
        self.words[id(told)] = host_offset | flag
        return host_offset

    def _place_stream(self, told: Cluster, stream: bytes) -> int:
        host_offset = self._pack_stream(len(stream)) if told.host_offset is None else told.host_offset
        first = host_offset // 512
        sectors = (host_offset + len(stream) - 1) // 512 - first
        self.extents[id(told)] = (first * 512, (sectors + 1) * 512)
        stored_sectors = sectors if told.sectors is None else told.sectors
        self.words[id(told)] = fields.COMPRESSED | stored_sectors << (70 - self.told.cluster_bits) | host_offset
        self.layout.write(host_offset, stream)
        return host_offset

    def _pack_stream(self, length: int) -> int:
        """Continues behind the last stream if the room there, or the next free clusters, allow it."""
        layout, size = self.layout, self.told.cluster_size
        room = -self.stream_cursor % size
        host_offset = self.stream_cursor
        if not self.told.pack or not host_offset:
            host_offset = layout.allocate(length)
        elif length > room:
            host_offset = self._spill(room, length)
        self.stream_cursor = host_offset + length
        return host_offset

    def _spill(self, room: int, length: int) -> int:
        next_cluster = self.layout.next_cluster
        if self.layout.allocate(length - room) == self.stream_cursor + room:
            return self.stream_cursor
        self.layout.next_cluster = next_cluster
        return self.layout.allocate(length)

    def _place_snapshots(self) -> None:
        entries = b""
        offsets = []
        for snapshot in self.told.snapshots:
            where = BuiltMap(self.told.cluster_size, self.told.l2_entry_size)
            if snapshot.guest is not None:
                self._place_map(snapshot.guest, where)
            else:
                where.l1_size, where.l2_offsets = self.built.l1_size, dict(self.built.l2_offsets)
                where.data_offsets = dict(self.built.data_offsets)
                where.l1_offset = self.layout.place(b"", where.l1_size * 8)
                self._refer_map(self.told, where)
            self.built.snapshots.append(where)
            values = {
                "l1_table_offset": where.l1_offset, "l1_size": where.l1_size, "id_size": len(snapshot.id),
                "name_size": len(snapshot.name), "date_sec": 1_700_000_000, "date_nsec": 0, "vm_clock_nsec": 0,
                "vm_state_size": 0, "extra_data_size": len(snapshot.extra),
            }  # fmt: skip
            entries = fields.padded(entries, 8)
            offsets.append(len(entries))
            entries += (
                fields.pack(fields.SNAPSHOT_FIELDS, values, snapshot.fields)
                + snapshot.extra
                + snapshot.id
                + snapshot.name
            )
        if entries:
            self.built.snapshots_offset = self.layout.place(entries)
            self.built.snapshot_entry_offsets = [self.built.snapshots_offset + offset for offset in offsets]

    def _place_bitmaps(self) -> None:
        directory = b""
        offsets = []
        for bitmap in self.told.bitmaps:
            table = self._bitmap_table(bitmap)
            self.built.bitmap_table_offsets.append(self.layout.place(struct.pack(f">{len(table)}Q", *table)))
            values = {
                "table_offset": self.built.bitmap_table_offsets[-1], "table_size": len(table), "flags": 0, "type": 1,
                "name_size": len(bitmap.name), "extra_data_size": len(bitmap.extra),
            }  # fmt: skip
            offsets.append(len(directory))
            directory += fields.padded(
                fields.pack(fields.BITMAP_FIELDS, values, bitmap.fields) + bitmap.extra + bitmap.name, 8
            )
        if directory:
            self.built.bitmap_directory_offset = self.layout.place(directory)
            self.built.bitmap_entry_offsets = [self.built.bitmap_directory_offset + offset for offset in offsets]

    def _bitmap_table(self, bitmap: Bitmap) -> list[int]:
        size = self.told.cluster_size
        placed: list[int] = []
        self.built.bitmap_data_offsets.append(placed)
        covered = size * 8 << bitmap.fields["granularity_bits"]  # guest bytes per cluster of bits
        count = max(-(-self.told.virtual_size // covered), -(-len(bitmap.data) // size), 1)
        table = []
        for index in range(count):
            chunk = bitmap.data[index * size : (index + 1) * size].ljust(size, b"\0")
            if not bitmap.literal and chunk in (b"\0" * size, b"\xff" * size):
                table.append(chunk[0] & 1)
            else:
                placed.append(self.layout.place(chunk))
                table.append(placed[-1])
        return table if bitmap.table is None else bitmap.table

    def _place_refcounts(self) -> None:
        """Adds blocks and the table until they cover everything, themselves included; then writes them."""
        layout, size, blocks = self.layout, self.told.cluster_size, self.built.refcount_block_offsets
        per_block = size * 8 // self.told.refcount_bits
        table_offset = table_clusters = 0
        while True:
            counted = {cluster for cluster, count in layout.references.items() if count} | self.told.refcounts.keys()
            missing = {cluster // per_block for cluster in counted} - blocks.keys()
            for index in missing:
                blocks[index] = layout.place(b"", size)
            needed = -(-(max(blocks) + 1) * 8 // size)
            if needed > table_clusters:
                if table_clusters:  # too small after all: give its references back and leave a hole
                    layout.refer(table_offset, table_clusters * size, -1)
                table_clusters = needed
                table_offset = layout.place(b"", table_clusters * size)
            elif not missing:
                break
        self.built.refcount_table_offset, self.built.refcount_table_clusters = table_offset, table_clusters
        for index, block_offset in blocks.items():
            layout.write(table_offset + index * 8, struct.pack(">Q", block_offset))
            counts = self._refcount_block(range(index * per_block, (index + 1) * per_block))
            layout.write(block_offset, counts.rstrip(b"\0"))  # what was never written stays a hole

    def _refcount_block(self, clusters: range) -> bytes:
        width = self.told.refcount_bits
        counts = [self.told.refcounts.get(cluster, self.layout.references.get(cluster, 0)) for cluster in clusters]
        if max(counts) >> width:
            raise ValueError(f"a refcount of {max(counts)} does not fit in {width} bits")
        if width >= 8:
            return b"".join(count.to_bytes(width // 8, "big") for count in counts)
        each = 8 // width
        return bytes(
            sum(count << (position * width) for position, count in enumerate(counts[start : start + each]))
            for start in range(0, len(counts), each)
        )

    def _copied(self, host_offset: int, told: bool | None = None) -> int:
        if told is None:
            told = self.layout.references[host_offset // self.told.cluster_size] == 1
        return fields.COPIED if told else 0

    def _write_tables(self, guest: GuestMap, where: BuiltMap) -> None:
        self._write_l1(guest, where)
        for cluster, told in guest.told.items():
            word = self.words[id(told)]
            if told.stored:
                owned = True if self.told.data_path is not None and told.copied is None else told.copied
                word |= self._copied(where.data_offsets[cluster], owned)
            entry = struct.pack(">Q", word)
            if guest.extended_l2:
                bitmap = told.allocated | told.zero << 32 if told.bitmap is None else told.bitmap
                entry += struct.pack(">Q", bitmap)
            self.layout.write(where.l2_entry_offset(cluster), entry)

    def _write_l1(self, guest: GuestMap, where: BuiltMap) -> None:
        words = {index: offset | self._copied(offset) for index, offset in where.l2_offsets.items()} | guest.l1_words
        for index, word in words.items():
            if index < where.l1_size:
                self.layout.write(where.l1_entry_offset(index), struct.pack(">Q", word))

    def _usual_extensions(self) -> list[fields.Extension]:
        told, built = self.told, self.built
        usual: list[fields.Extension] = []
        if told.backing_told and told.backing_told[1] is not None:
            usual.append(fields.Extension(fields.BACKING_FORMAT, told.backing_told[1]))
        if told.data_name is not None:
            usual.append(fields.Extension(fields.DATA_FILE, told.data_name))
        if told.luks_told:
            area, offset, length = told.luks_told
            offset = built.luks_offset if offset is None else offset
            usual.append(
                fields.Extension(fields.ENCRYPTION, struct.pack(">QQ", offset, len(area) if length is None else length))
            )
        if told.name_table is not None:
            usual.append(fields.Extension(fields.FEATURE_NAMES, told.name_table))
        if told.bitmaps or told.bitmaps_fields:
            count = len(told.bitmaps)
            values = {
                "nb_bitmaps": count, "reserved": 0, "directory_offset": built.bitmap_directory_offset,
                "directory_size": sum(24 + len(fields.padded(b.extra + b.name, 8)) for b in told.bitmaps),
            }  # fmt: skip
            usual.append(
                fields.Extension(
                    fields.BITMAPS, fields.pack(fields.BITMAPS_EXTENSION_FIELDS, values, told.bitmaps_fields)
                )
            )
        return usual

    def _header(self) -> bytes:
        """The header and its extensions, with the offsets known so far; its length never depends on them."""
        told, built = self.told, self.built
        extensions = [*told.extensions[0], *self._usual_extensions(), *told.extensions[1]]
        if told.end_marker:
            extensions.append(fields.Extension(fields.END, b""))
        area = b""
        built.extension_offsets.clear()
        for extension in extensions:
            built.extension_offsets.append((extension.type, told.header_length + len(area)))
            area += extension.packed()
        length = told.header_length + len(area)
        values = {
            "magic": fields.MAGIC, "version": told.version, "cluster_bits": told.cluster_bits,
            "size": told.virtual_size, "crypt_method": 2 if told.luks_told else 0, "l1_size": built.l1_size,
            "l1_table_offset": built.l1_offset,
            "refcount_table_offset": built.refcount_table_offset,
            "refcount_table_clusters": built.refcount_table_clusters, "nb_snapshots": len(told.snapshots),
            "snapshots_offset": built.snapshots_offset, "incompatible_features": told.incompatible,
            "compatible_features": told.compatible, "autoclear_features": told.autoclear,
            "refcount_order": told.refcount_bits.bit_length() - 1, "header_length": told.header_length,
            "compression_type": int(told.compression == "zstd"),
        }  # fmt: skip
        if told.backing_told:
            name, _, offset = told.backing_told
            built.backing_name_offset = length if offset is None else offset
            length = length + len(name) if offset is None else length
            values |= {"backing_file_offset": built.backing_name_offset, "backing_file_size": len(name)}
        assert told.header.keys() <= fields.HEADER_FIELDS.keys(), f"no such header field in {sorted(told.header)}"
        fixed = bytearray(112)
        for name_of_field, value in (values | told.header).items():
            place, code = fields.HEADER_FIELDS[name_of_field]
            struct.pack_into(">" + code, fixed, place, value)
        fixed = (fixed + told.header_tail).ljust(told.header_length, b"\0")[: told.header_length]
        return (bytes(fixed) + area).ljust(length, b"\0")

    def _write_files(self) -> None:
        end = self.layout.end() if self.told.cut is None else self.told.cut
        self.built.file_size = end
        _write_pieces(self.built.path, self.layout.pieces, end)
        if self.told.data_path is not None:
            _write_pieces(self.told.data_path, self.data_pieces, self.told.virtual_size)


def _write_pieces(path: Path, pieces: Iterable[tuple[int, bytes]], length: int) -> None:
    with open(path, "wb") as stream:
        for offset, data in pieces:
            stream.seek(offset)
            stream.write(data)
        stream.truncate(length)
