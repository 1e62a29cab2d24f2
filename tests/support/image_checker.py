"""Counts the references in a qcow2 image and holds them against its refcounts: a fast `qemu-img check`.

It owns two lists. `corruptions` are counted as `qemu-img check` counts them, so that the numbers can be compared;
`damage` is what that program does not look for: clusters with two owners whose refcounts agree, guest data that lies
elsewhere in a data file than in the guest, bitmaps that no reader could load. Written from the published format with
whole arrays at a time, independent of qcow2_plugin. It refuses to know what the disk should contain.

Source: docs/interop/qcow2.rst.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tests.support import fields

OFFSET_MASK = 0x00FFFFFFFFFFFE00
TABLE_MASK = 0xFFFFFFFFFFFFFE00
L1_RESERVED = 0x7F000000000001FF
L2_RESERVED = 0x3F000000000001FE
DIRTY, CORRUPT, DATA_FILE, EXTENDED_L2 = 1, 2, 4, 16
BITMAPS_CONSISTENT, RAW_DATA_FILE = 1, 2
BITMAP_IN_USE, BITMAP_AUTO = 1, 2
MAX_BLOCKS_BEHIND_END = 256  # refcount blocks that are looked at although the file has not so many clusters
MAX_BITMAP_TABLE = 1 << 20  # entries; more than any test has

Array = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
_VERSION_2 = {
    "incompatible_features": 0, "compatible_features": 0, "autoclear_features": 0, "refcount_order": 4,
    "header_length": 72,
}  # fmt: skip


class UnreadableError(Exception):
    """Not an image that can be checked at all."""


@dataclass(frozen=True)
class HeaderFacts:
    """The header's fields that say what the image is, named as in `HEADER_FIELDS`, its extensions, its backing file."""

    version: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible_features: int
    compatible_features: int
    autoclear_features: int
    refcount_order: int
    compression_type: int
    backing_name: bytes
    extensions: tuple[tuple[int, bytes], ...]

    @classmethod
    def read(cls, content: bytes | bytearray) -> HeaderFacts:
        """Raises UnreadableError unless the fixed fields make sense."""
        if len(content) < 112:
            raise UnreadableError(f"a file of {len(content)} bytes")
        numbers = {
            name: int(struct.unpack_from(">" + code, content, offset)[0])
            for name, (offset, code) in fields.HEADER_FIELDS.items()
        }
        magic, version, bits = numbers.pop("magic"), numbers["version"], numbers["cluster_bits"]
        if magic != fields.MAGIC or version not in (2, 3) or not 9 <= bits <= 21:
            raise UnreadableError(f"magic {magic:#x}, version {version}, cluster bits {bits}")
        if version == 2:
            numbers |= _VERSION_2
        if numbers["header_length"] <= 104:
            numbers["compression_type"] = 0
        start, length = numbers.pop("backing_file_offset"), numbers.pop("backing_file_size")
        extensions = tuple(_extensions(content, numbers.pop("header_length"), start or 1 << bits))
        return cls(
            **numbers, backing_name=bytes(content[start : start + length]) if start else b"", extensions=extensions
        )

    @property
    def data_file(self) -> bool:
        return bool(self.incompatible_features & DATA_FILE)

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible_features & EXTENDED_L2)


def _extensions(content: bytes | bytearray, start: int, end: int) -> list[tuple[int, bytes]]:
    found = []
    end = min(end, len(content))
    while start + 8 <= end:
        kind, length = struct.unpack_from(">II", content, start)
        if kind == fields.END:
            break
        if start + 8 + length > end:
            raise UnreadableError(f"header extension {kind:#x} of {length} bytes at {start}")
        found.append((kind, bytes(content[start + 8 : start + 8 + length])))
        start += 8 + -(-length // 8) * 8
    return found


class BitmapFacts(NamedTuple):
    """A persistent bitmap. `granules` are the numbers of the marked ones, None for bitmaps in use."""

    name: bytes
    flags: int
    granularity_bits: int
    granules: frozenset[int] | None


@dataclass
class Report:
    """What a check found."""

    header: HeaderFacts
    corruptions: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    leaks: int = 0
    leaks_behind_end: int = 0
    """Clusters past the end of the file that have a refcount, which `qemu-img check` does not count."""
    bitmaps: list[BitmapFacts] = field(default_factory=list)

    @property
    def all_leaks(self) -> int:
        """Clusters whose refcount is too high, wherever they are."""
        return self.leaks + self.leaks_behind_end

    @property
    def is_sound(self) -> bool:
        return not self.corruptions and not self.damage


def check_image(content: bytes | bytearray, *, guess_refcounts: bool = False) -> Report:
    """Checks the image file `content`; raises UnreadableError if there is no looking into it.

    With `guess_refcounts` the refcounts are taken to be what they should be, as in an image whose dirty bit is set.
    """
    return _Check(content, guess_refcounts=guess_refcounts).run()


class _Check:
    def __init__(self, content: bytes | bytearray, *, guess_refcounts: bool) -> None:
        self.header = header = HeaderFacts.read(content)
        self.report = Report(header)
        self.guess_refcounts = guess_refcounts
        self.file_size = len(content)
        self.bits, self.size = header.cluster_bits, 1 << header.cluster_bits
        self.cluster_count = -(-len(content) >> self.bits)
        self.bytes = np.zeros(self.cluster_count << self.bits, dtype=np.uint8)
        self.bytes[: len(content)] = np.frombuffer(content, dtype=np.uint8)
        self.view = self.bytes.data
        self.words = self.bytes.view(">u8")
        self.rows = self.words.reshape(self.cluster_count, -1)
        self.max_refcount = (1 << min(1 << header.refcount_order, 63)) - 1
        self.references: list[Array] = []
        self.owners: dict[str, list[Array]] = {}

    def run(self) -> Report:
        header = self.header
        self._refer("header", 0, self.size)
        active = self._count_map(header.l1_table_offset, header.l1_size, is_active=True)
        self._count_snapshots()
        if header.refcount_table_clusters:
            self._refer("refcount table", header.refcount_table_offset, header.refcount_table_clusters << self.bits)
        self._count_encryption()
        self._count_bitmaps()
        stored = self._count_refcount_blocks()
        counted = self._counted()
        for cluster in np.repeat(*_excess(counted, self.max_refcount)).tolist():
            self._corrupt(f"cluster {cluster} has one more reference than its refcount can count")
        counted = np.minimum(counted, self.max_refcount)
        if self.guess_refcounts:
            stored = counted
        self._compare(stored, counted)
        self._check_copied(active, stored)
        self._check_owners()
        return self.report

    # ---- what is referenced

    def _refer(self, owner: str, host_offset: int, length: int) -> None:
        """One structure of `length` bytes."""
        if length <= 0:
            return
        if host_offset + length - self.file_size >= self.size:
            self._corrupt(f"{owner} at {host_offset:#x} lies past the end of the file")
            return
        first, last = host_offset >> self.bits, host_offset + length - 1 >> self.bits
        self._own(owner, np.arange(first, last + 1, dtype=np.int64))

    def _refer_clusters(self, owner: str, host_offsets: Array) -> Array:
        """One cluster at each offset; returns the numbers of those that are in the file."""
        outside = host_offsets >= self.file_size
        for host_offset in host_offsets[outside].tolist():
            self._corrupt(f"{owner} at {host_offset:#x} lies past the end of the file")
        inside = host_offsets[~outside]
        first, last = inside >> self.bits, inside + (self.size - 1) >> self.bits
        clusters = np.concatenate((first, last[last != first]))
        self._own(owner, clusters)
        return clusters

    def _own(self, owner: str, clusters: Array) -> None:
        clusters = clusters[clusters <= self.cluster_count]  # the file may end inside a structure
        self.references.append(clusters)
        self.owners.setdefault(owner, []).append(clusters)

    def _counted(self) -> Array:
        """How often each cluster is referenced."""
        return np.bincount(np.concatenate(self.references), minlength=self.cluster_count + 1).astype(np.int64)

    def _table(self, host_offset: int, count: int) -> Words:
        """`count` words; those past the end of the file are 0."""
        found = np.zeros(count, dtype=np.uint64)
        present = self.words[host_offset // 8 : host_offset // 8 + count]
        found[: len(present)] = present
        return found

    # ---- L1 and L2 tables

    def _count_map(self, l1_offset: int, l1_size: int, *, is_active: bool) -> tuple[Words, Words]:
        """Counts everything below an L1 table; returns its entries, and the words of its standard L2 entries."""
        self._refer("L1 table" if is_active else "snapshot L1 table", l1_offset, 8 * l1_size)
        l1 = self._table(l1_offset, l1_size)
        for index in np.flatnonzero((l1 & np.uint64(L1_RESERVED)) != 0).tolist():
            self._corrupt(f"L1 entry {index} has reserved bits: {int(l1[index]):#x}")
        indexes = np.flatnonzero(l1)
        offsets = (l1[indexes] & np.uint64(OFFSET_MASK)).astype(np.int64)
        self._refer_clusters("L2 table", offsets)
        unaligned = (offsets & self.size - 1) != 0
        for offset in offsets[unaligned].tolist():
            self._corrupt(f"L2 table at {offset:#x} is not aligned")
        self._find_twice("L2 table", offsets >> self.bits)
        usable = ~unaligned & (offsets < self.file_size)
        tables = self.rows[offsets[usable] >> self.bits].astype(np.uint64)
        entries, bitmaps = (tables[:, ::2], tables[:, 1::2]) if self.header.extended_l2 else (tables, None)
        rows, columns = np.nonzero(entries if bitmaps is None else entries | bitmaps)
        guest_clusters = indexes[usable][rows] * entries.shape[1] + columns
        found = entries[rows, columns]
        found_bitmaps = np.zeros_like(found) if bitmaps is None else bitmaps[rows, columns]
        owned, owners = self._count_entries(found, found_bitmaps, guest_clusters)
        is_real = (l1[owners // entries.shape[1]] & np.uint64(OFFSET_MASK)) != 0
        return l1, owned[is_real]

    def _count_entries(self, entries: Words, bitmaps: Words, guest_clusters: Array) -> tuple[Words, Array]:
        """Counts what L2 entries point to; returns those with a host cluster, and their guest clusters."""
        compressed = (entries & np.uint64(fields.COMPRESSED)) != 0
        if compressed.any():
            self._count_compressed(entries[compressed], bitmaps[compressed])
            entries, bitmaps, guest_clusters = entries[~compressed], bitmaps[~compressed], guest_clusters[~compressed]
        for entry in entries[(entries & np.uint64(L2_RESERVED)) != 0].tolist():
            self._corrupt(f"L2 entry {entry:#x} has reserved bits")
        zero = (entries & np.uint64(fields.ZERO)) != 0
        if zero.any() and (self.header.version == 2 or self.header.extended_l2):
            self.report.damage.append(f"L2 entry {int(entries[zero][0]):#x} has a zero flag where there is none")
        offsets = (entries & np.uint64(OFFSET_MASK)).astype(np.int64)
        allocated = offsets != 0
        if self.header.data_file:
            allocated |= ((entries & np.uint64(fields.COPIED)) != 0) & (~zero | self.header.extended_l2)
        if self.header.extended_l2:
            self._check_bitmaps_of(bitmaps, allocated)
        kept = offsets[allocated]
        for offset in kept[(kept & self.size - 1) != 0].tolist():
            self._corrupt(f"data cluster at {offset:#x} is not aligned")
        if self.header.data_file:
            self._check_places(kept, guest_clusters[allocated])
        else:
            self._find_twice("data cluster", self._refer_clusters("data", kept))
        return entries[allocated], guest_clusters[allocated]

    def _check_bitmaps_of(self, bitmaps: Words, allocated: npt.NDArray[np.bool_]) -> None:
        data, zero = bitmaps & np.uint64(0xFFFFFFFF), bitmaps >> np.uint64(32)
        for bitmap in bitmaps[(data != 0) & ~allocated | ((data & zero) != 0) & allocated].tolist():
            self._corrupt(f"subcluster bitmap {bitmap:#x} is invalid")

    def _count_compressed(self, entries: Words, bitmaps: Words) -> None:
        offset_bits = np.uint64(70 - self.bits)
        mask = np.uint64((1 << (70 - self.bits)) - 1)
        for entry, bitmap in zip(entries.tolist(), bitmaps.tolist(), strict=True):
            if entry & fields.COPIED:
                self._corrupt(f"compressed cluster {entry:#x} is marked as copied")
            if self.header.data_file or bitmap:
                self._corrupt(f"compressed cluster {entry:#x} with bitmap {bitmap:#x} cannot be here")
        if self.header.data_file:
            return
        entries = entries[bitmaps == 0] & np.uint64((1 << 62) - 1)
        offsets = (entries & mask).astype(np.int64)
        lengths = ((entries >> offset_bits).astype(np.int64) + 1) * 512 - offsets % 512
        outside = offsets + lengths - self.file_size >= self.size
        for offset in offsets[outside].tolist():
            self._corrupt(f"compressed cluster at {offset:#x} lies past the end of the file")
        first = offsets[~outside] >> self.bits
        last = offsets[~outside] + lengths[~outside] - 1 >> self.bits
        while first.size:
            self._own("compressed data", first)
            first, last = first[first < last] + 1, last[first < last]

    def _check_places(self, offsets: Array, guest_clusters: Array) -> None:
        wrong = offsets != guest_clusters << self.bits
        for offset, cluster in zip(offsets[wrong].tolist(), guest_clusters[wrong].tolist(), strict=True):
            self.report.damage.append(f"guest cluster {cluster} is at {offset:#x} of the data file")

    def _find_twice(self, what: str, clusters: Array) -> None:
        """Nothing may be referenced twice from one map."""
        ordered = np.sort(clusters)
        for cluster in np.unique(ordered[1:][ordered[1:] == ordered[:-1]]).tolist():
            self.report.damage.append(f"{what} {cluster} is referenced twice by one map")

    def _check_copied(self, active: tuple[Words, Words], stored: Array) -> None:
        l1, entries = active
        tables = (l1 & np.uint64(OFFSET_MASK)).astype(np.int64)
        self._compare_copied("L1", l1[tables != 0], self._refcounts_at(tables[tables != 0], stored))
        offsets = (entries & np.uint64(OFFSET_MASK)).astype(np.int64)
        refcounts = np.ones_like(offsets) if self.header.data_file else self._refcounts_at(offsets, stored)
        self._compare_copied("L2", entries, refcounts)

    def _compare_copied(self, table: str, entries: Words, refcounts: Array) -> None:
        wrong = ((entries & np.uint64(fields.COPIED)) != 0) != (refcounts == 1)
        for entry, refcount in zip(entries[wrong].tolist(), refcounts[wrong].tolist(), strict=True):
            self._corrupt(f"{table} entry {entry:#x}, but the refcount is {refcount}")

    def _refcounts_at(self, host_offsets: Array, stored: Array) -> Array:
        clusters = host_offsets >> self.bits
        inside = clusters < len(stored)
        return np.where(inside, stored[np.where(inside, clusters, 0)], 0)

    # ---- everything else

    def _count_snapshots(self) -> None:
        header = self.header
        if header.nb_snapshots and header.data_file:
            self._corrupt("snapshots in an image with a data file")
        offset = header.snapshots_offset
        for index in range(header.nb_snapshots):
            if index:
                offset += -(offset - header.snapshots_offset) % 8
            if offset + 40 > len(self.bytes):
                self._corrupt(f"snapshot table entry {index} lies past the end of the file")
                return
            l1_offset, l1_size, id_size, name_size = struct.unpack_from(">QIHH", self.view, offset)
            (extra_size,) = struct.unpack_from(">I", self.view, offset + 36)
            offset += 40 + extra_size + id_size + name_size
            if l1_offset % self.size or l1_size > 4194304:
                self._corrupt(f"snapshot {index} has {l1_size} L1 entries at {l1_offset:#x}")
            else:
                self._count_map(l1_offset, l1_size, is_active=False)
        self._refer("snapshot table", header.snapshots_offset, offset - header.snapshots_offset)

    def _count_encryption(self) -> None:
        for kind, data in self.header.extensions:
            if kind == fields.ENCRYPTION:
                self._refer("encryption header", *struct.unpack(">QQ", data))

    def _count_bitmaps(self) -> None:
        extension = next((data for kind, data in self.header.extensions if kind == fields.BITMAPS), None)
        if extension is None or not self.header.autoclear_features & BITMAPS_CONSISTENT:
            return
        count, _, length, start = struct.unpack(">IIQQ", extension)
        self._refer("bitmap directory", start, length)
        offset = start
        for index in range(count):
            if offset + 24 > len(self.bytes):
                self.report.damage.append(f"bitmap {index} of {count} lies past the end of the file")
                return
            entry_size = self._count_bitmap(offset)
            if not entry_size:
                return
            offset += entry_size
        if offset != start + length:
            self.report.damage.append(f"the bitmap directory has {length} bytes, its entries {offset - start}")

    def _count_bitmap(self, offset: int) -> int:
        """Counts the bitmap whose directory entry is at `offset`; returns the entry's size, 0 if it is no good."""
        table_offset, table_size, flags, kind, granularity_bits, name_size, extra_size = struct.unpack_from(
            ">QIIBBHI", self.view, offset
        )
        name_offset = offset + 24 + extra_size
        name = self.bytes[name_offset : name_offset + name_size].tobytes()
        if kind != 1 or table_offset % self.size or not table_offset or not 0 < table_size < MAX_BITMAP_TABLE:
            self.report.damage.append(f"bitmap {name!r} of kind {kind} has {table_size} entries at {table_offset:#x}")
            return 0
        self._refer("bitmap table", table_offset, 8 * table_size)
        table = self._table(table_offset, table_size)
        stored = (table & np.uint64(OFFSET_MASK)).astype(np.int64)
        self._refer_clusters("bitmap", stored[stored != 0])
        granules = None if flags & BITMAP_IN_USE else self._granules(name, table, stored, granularity_bits)
        self.report.bitmaps.append(BitmapFacts(name, flags, granularity_bits, granules))
        return 24 + -(-(int(extra_size) + int(name_size)) // 8) * 8

    def _granules(self, name: bytes, table: Words, stored: Array, granularity_bits: int) -> frozenset[int]:
        """The marked granules of a bitmap that is not in use. It must then cover the disk, and no more."""
        granule_count = -(-self.header.size >> granularity_bits)
        if len(table) != max(-(-granule_count // (8 * self.size)), 1):
            self.report.damage.append(f"bitmap {name!r} has {len(table)} clusters for {granule_count} granules")
        pieces = np.zeros((len(table), self.size), dtype=np.uint8)
        by_cluster = self.bytes.reshape(self.cluster_count, -1)
        for index, (word, host_offset) in enumerate(zip(table.tolist(), stored.tolist(), strict=True)):
            if word & 1 and not host_offset:
                pieces[index] = 0xFF
            elif word & ~OFFSET_MASK or host_offset % self.size:
                self.report.damage.append(f"bitmap {name!r} has the table entry {word:#x}")
            elif host_offset and host_offset < self.file_size:
                pieces[index] = by_cluster[host_offset >> self.bits]
        marked = np.flatnonzero(np.unpackbits(pieces.reshape(-1), bitorder="little"))
        beyond = marked[marked >= granule_count]
        if any(stored[cluster // (8 * self.size)] for cluster in beyond.tolist()):
            self.report.damage.append(f"bitmap {name!r} marks granules behind the disk")
        return frozenset(marked[marked < granule_count].tolist())

    # ---- refcounts

    def _count_refcount_blocks(self) -> Array:
        """The stored refcount of every cluster in the file, and of one behind it."""
        header = self.header
        table = self._table(header.refcount_table_offset, (header.refcount_table_clusters << self.bits) // 8)
        per_block = (8 << self.bits) >> header.refcount_order
        described = max(self.cluster_count // per_block, *np.flatnonzero(table).tolist(), 0) + 1
        if described > self.cluster_count + MAX_BLOCKS_BEHIND_END:
            described = self.cluster_count // per_block + 1
        stored = np.zeros(described * per_block, dtype=np.int64)
        before = self._counted()
        for index in np.flatnonzero(table).tolist():
            word = int(table[index])
            block = (word & TABLE_MASK) >> self.bits
            if word & ~TABLE_MASK:
                self._corrupt(f"refcount table entry {index} has reserved bits: {word:#x}")
            if word & TABLE_MASK & self.size - 1:
                self._corrupt(f"refcount block {index} is not aligned")
                continue
            if block >= self.cluster_count:
                self._corrupt(f"refcount block {index} lies outside the file")
                continue
            self._own("refcount block", np.array([block], dtype=np.int64))
            before[block] = min(before[block] + 1, self.max_refcount)
            if before[block] != 1:
                self._corrupt(f"refcount block {index} is referenced more than once")
            if (index + 1) * per_block <= len(stored):
                stored[index * per_block : (index + 1) * per_block] = self._refcounts(block)
        known: Array = stored[: self.cluster_count + 1]
        self.report.leaks_behind_end = int(np.count_nonzero(stored[self.cluster_count + 1 :]))
        return known

    def _refcounts(self, block: int) -> Array:
        order = self.header.refcount_order
        raw = self.bytes[block << self.bits : block + 1 << self.bits]
        if order >= 3:
            whole: Array = np.minimum(raw.view(f">u{1 << order - 3}"), np.uint64(2**63 - 1)).astype(np.int64)
            return whole
        width = 1 << order
        shifts = np.arange(0, 8, width, dtype=np.uint8)
        return (raw[:, np.newaxis] >> shifts & np.uint8((1 << width) - 1)).reshape(-1).astype(np.int64)

    def _compare(self, stored: Array, counted: Array) -> None:
        length = self.cluster_count + bool(counted[self.cluster_count])
        self.report.leaks_behind_end += int((stored[length:] > counted[length:]).sum())
        stored, counted = stored[:length], counted[:length]
        self.report.leaks = int((stored > counted).sum())
        for cluster in np.flatnonzero(stored < counted).tolist():
            self._corrupt(f"cluster {cluster} has refcount {stored[cluster]} and {counted[cluster]} references")

    def _check_owners(self) -> None:
        """No cluster may belong to two structures, and only L2 tables and data to several maps."""
        kinds = np.zeros(self.cluster_count + 1, dtype=np.int8)
        for number, (owner, parts) in enumerate(self.owners.items(), 1):
            clusters = np.concatenate(parts)
            if owner not in ("L2 table", "data", "compressed data"):
                self._find_twice(owner, clusters)
            for cluster in np.unique(clusters[kinds[clusters] != 0]).tolist():
                other = list(self.owners)[kinds[cluster] - 1]
                self.report.damage.append(f"cluster {cluster} belongs to the {other} and the {owner}")
            kinds[clusters] = number

    def _corrupt(self, what: str) -> None:
        self.report.corruptions.append(what)


def _excess(counted: Array, limit: int) -> tuple[Array, Array]:
    """The clusters that are counted more often than `limit`, and by how much."""
    clusters = np.flatnonzero(counted > limit)
    return clusters, counted[clusters] - limit
