"""The header cluster: fixed fields, feature bits, header extensions, backing file name.

`Header.parse` accepts what the format allows and refuses the rest with a typed error; `Header.pack` gives the same
bytes back, unknown fields, bits, extensions and padding included. Whether the tables that the header points to lie
inside the file is asked separately (`Header.tables`), because only a caller knows the file's size.

Source: docs/interop/qcow2.rst, "Header", "Header extensions", "Feature name table", "String header extensions".
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from qcow2_plugin.errors import CorruptImageError, NotQcow2Error, OptionError, UnsupportedFeatureError
from qcow2_plugin.format import feature_names
from qcow2_plugin.format import geometry as limits
from qcow2_plugin.format.geometry import Geometry
from qcow2_plugin.format.snapshots import MIN_ENTRY_SIZE as MIN_SNAPSHOT_ENTRY_SIZE

MAGIC = 0x514649FB
V2_HEADER_LENGTH = 72
V3_HEADER_LENGTH = 104
NEW_HEADER_LENGTH = 112
"""With the compression type, as QEMU writes it."""

INCOMPATIBLE_DIRTY = 1 << 0
INCOMPATIBLE_CORRUPT = 1 << 1
INCOMPATIBLE_DATA_FILE = 1 << 2
INCOMPATIBLE_COMPRESSION_TYPE = 1 << 3
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
INCOMPATIBLE_KNOWN = (1 << 5) - 1
COMPATIBLE_LAZY_REFCOUNTS = 1 << 0
AUTOCLEAR_BITMAPS = 1 << 0
AUTOCLEAR_DATA_FILE_RAW = 1 << 1

EXTENSION_END = 0x00000000
EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_DATA_FILE = 0x44415441
EXTENSION_FEATURE_NAMES = 0x6803F857
EXTENSION_BITMAPS = 0x23852875
EXTENSION_ENCRYPTION = 0x0537BE77

_ORDER = (EXTENSION_BITMAPS, EXTENSION_DATA_FILE, EXTENSION_BACKING_FORMAT, EXTENSION_ENCRYPTION, None)
"""Of extensions; None stands for those that are not known."""

_COMMON = struct.Struct(">IIQIIQIIQQIIQ")
_VERSION_3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
_BITMAPS = struct.Struct(">IIQQ")
_ENCRYPTION = struct.Struct(">QQ")


class EncryptionMethod(enum.IntEnum):
    """How guest clusters are encrypted."""

    NONE = 0
    AES = 1
    LUKS = 2


class CompressionType(enum.IntEnum):
    """How compressed clusters are stored."""

    DEFLATE = 0
    ZSTD = 1


class _Version3Fields(NamedTuple):
    """The fields that version 3 added, named as in `Header`; the defaults are what holds for version 2."""

    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = V2_HEADER_LENGTH
    compression_type: CompressionType = CompressionType.DEFLATE
    additional_fields: bytes = b""


class HeaderExtension(NamedTuple):
    """One extension as stored; `padding` is what follows `data` up to the next multiple of 8."""

    type: int
    data: bytes
    padding: bytes


class BitmapsPointer(NamedTuple):
    """The bitmaps extension: where the bitmap directory is."""

    bitmap_count: int
    directory_size: int
    directory_offset: int

    def pack(self) -> bytes:
        """The extension's data."""
        return _BITMAPS.pack(self.bitmap_count, 0, self.directory_size, self.directory_offset)

    @property
    def table(self) -> Table:
        """The directory as a structure in the file."""
        return Table("bitmap directory", self.directory_offset, self.directory_size)


class EncryptionPointer(NamedTuple):
    """The encryption extension: where the LUKS header area is."""

    offset: int
    length: int


class Table(NamedTuple):
    """A contiguous structure that the header points to; `length` in bytes."""

    name: str
    host_offset: int
    length: int

    def overlaps(self, host_offset: int, length: int) -> bool:
        """True if it has a byte in common with the `length` bytes at `host_offset`."""
        return host_offset < self.host_offset + self.length and self.host_offset < host_offset + length


def header_cluster_size(start: bytes) -> int:
    """Bytes of the header cluster of the image that begins with `start` (its first 24 bytes at least).

    Raises NotQcow2Error, UnsupportedFeatureError (version) or CorruptImageError (cluster bits).
    """
    if len(start) < V2_HEADER_LENGTH or int.from_bytes(start[:4], "big") != MAGIC:
        raise NotQcow2Error("not a qcow2 image: the file does not begin with a qcow2 header")
    version = int.from_bytes(start[4:8], "big")
    if version not in (2, 3):
        raise UnsupportedFeatureError(f"qcow2 version {version} is not supported, only 2 and 3 are")
    cluster_bits = int.from_bytes(start[20:24], "big")
    if not limits.MIN_CLUSTER_BITS <= cluster_bits <= limits.MAX_CLUSTER_BITS:
        raise _corrupt(
            f"cluster_bits is {cluster_bits}, not {limits.MIN_CLUSTER_BITS} to {limits.MAX_CLUSTER_BITS}", 20
        )
    return 1 << cluster_bits


@dataclass(frozen=True, slots=True)
class Header:
    """The header cluster's contents; offsets and sizes in bytes, `l1_size` in entries."""

    version: int
    backing_file_offset: int
    backing_file: bytes | None
    cluster_bits: int
    size: int
    """Virtual size as stored; `virtual_size` is what counts."""
    encryption_method: EncryptionMethod
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshot_count: int
    snapshots_offset: int
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = V2_HEADER_LENGTH
    compression_type: CompressionType = CompressionType.DEFLATE
    additional_fields: bytes = b""
    """Bytes 105 up to `header_length`: padding and fields of later formats, verbatim."""
    extensions: tuple[HeaderExtension, ...] = ()
    has_end_marker: bool = True
    geometry: Geometry = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "geometry", Geometry(self.cluster_bits, self.extended_l2))

    @classmethod
    def parse(cls, cluster: bytes) -> Header:
        """The header in `cluster`, the image's first cluster (shorter where the file ends earlier).

        Raises NotQcow2Error, UnsupportedFeatureError or CorruptImageError. Unknown incompatible feature bits are
        accepted here; see `require_known_features`.
        """
        cluster_size = header_cluster_size(cluster)
        cluster = cluster[:cluster_size]
        (
            _,
            version,
            backing_file_offset,
            backing_file_size,
            cluster_bits,
            size,
            method,
            l1_size,
            l1_table_offset,
            refcount_table_offset,
            refcount_table_clusters,
            snapshot_count,
            snapshots_offset,
        ) = _COMMON.unpack_from(cluster)
        backing_file = _parse_backing_file(cluster, cluster_size, backing_file_offset, backing_file_size)
        version_3 = _parse_version_3(cluster, cluster_size) if version == 3 else _Version3Fields()
        area_end = len(cluster) if backing_file is None else backing_file_offset
        if area_end < version_3.header_length:
            raise _corrupt(f"backing file name at host offset {backing_file_offset:#x} lies inside the header", 8)
        extensions, has_end_marker = _parse_extensions(cluster, version_3.header_length, area_end)
        if method > max(EncryptionMethod):
            raise UnsupportedFeatureError(f"encryption method {method} is not supported")
        header = cls(
            version=version,
            backing_file_offset=backing_file_offset,
            backing_file=backing_file,
            cluster_bits=cluster_bits,
            size=size,
            encryption_method=EncryptionMethod(method),
            l1_size=l1_size,
            l1_table_offset=l1_table_offset,
            refcount_table_offset=refcount_table_offset,
            refcount_table_clusters=refcount_table_clusters,
            snapshot_count=snapshot_count,
            snapshots_offset=snapshots_offset,
            extensions=extensions,
            has_end_marker=has_end_marker,
            **version_3._asdict(),
        )
        header._check_fields()
        header._check_extensions()
        return header

    def pack(self) -> bytes:
        """The header as bytes from offset 0 to the end of the last thing that it holds; the rest of the cluster is
        zeros."""
        fixed = _COMMON.pack(
            MAGIC,
            self.version,
            self.backing_file_offset,
            len(self.backing_file or b""),
            self.cluster_bits,
            self.size,
            self.encryption_method,
            self.l1_size,
            self.l1_table_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.snapshot_count,
            self.snapshots_offset,
        )
        packed = bytearray(fixed)
        if self.version == 3:
            packed += _VERSION_3.pack(
                self.incompatible_features,
                self.compatible_features,
                self.autoclear_features,
                self.refcount_order,
                self.header_length,
            )
            if self.header_length > V3_HEADER_LENGTH:
                packed += bytes([self.compression_type]) + self.additional_fields
        for extension in self.extensions:
            packed += _EXTENSION.pack(extension.type, len(extension.data)) + extension.data + extension.padding
        if self.has_end_marker:
            packed += _EXTENSION.pack(EXTENSION_END, 0)
        if self.backing_file is not None:
            packed += bytes(self.backing_file_offset - len(packed)) + self.backing_file
        return bytes(packed)

    def with_names(
        self, *, backing_file: bytes | None, backing_format: bytes | None, data_file: bytes | None
    ) -> Header:
        """This header with these names as its only extensions, beside the table of feature names.

        In QEMU's order and places: nothing but the end marker is between the extensions and the backing file's name,
        and there is no table of feature names where clusters are so small that it could crowd out a name. Raises
        OptionError if the header cluster has no room for it all.
        """
        extensions = []
        if backing_format is not None:
            extensions.append(_extension(EXTENSION_BACKING_FORMAT, backing_format))
        if data_file is not None:
            extensions.append(_extension(EXTENSION_DATA_FILE, data_file))
        table = self.usual_feature_names
        if table is not None:
            extensions.append(_extension(EXTENSION_FEATURE_NAMES, table))
        named = replace(self, backing_file=backing_file, extensions=tuple(extensions)).laid_out()
        if len(named.pack()) > self.geometry.cluster_size:
            raise OptionError(
                f"a header cluster of {self.geometry.cluster_size} bytes has no room for the names of the other files; "
                "take larger clusters, or shorter names"
            )
        return named

    def with_extension(self, extension_type: int, data: bytes | None) -> Header:
        """This header with `data` as its only extension of this type, where it was or else before those that change
        less often; with none if `data` is None. Nobody has asked whether the header cluster has room for it."""
        place = next((index for index, known in enumerate(self.extensions) if known.type == extension_type), None)
        extensions = [known for known in self.extensions if known.type != extension_type]
        if data is not None:
            if place is None:
                ranks = [extension_rank(known.type) for known in extensions]
                place = sum(rank <= extension_rank(extension_type) for rank in ranks)
            extensions.insert(place, _extension(extension_type, data))
        return replace(self, extensions=tuple(extensions)).laid_out()

    def laid_out(self) -> Header:
        """This header with all that is behind its fields in a row: the extensions, the end marker, the backing file's
        name. It may be longer than the header cluster."""
        extensions = tuple(
            known if len(known.padding) == -len(known.data) % 8 else _extension(known.type, known.data)
            for known in self.extensions
        )
        bare = replace(self, backing_file=None, backing_file_offset=0, has_end_marker=True, extensions=extensions)
        if self.backing_file is None:
            return bare
        return replace(bare, backing_file=self.backing_file, backing_file_offset=len(bare.pack()))

    @property
    def usual_feature_names(self) -> bytes | None:
        """The table of feature names that QEMU gives such an image; None if it gives it none."""
        return feature_names.usual_table(self.version, self.cluster_bits)

    @property
    def virtual_size(self) -> int:
        """Bytes that the guest sees: the stored size rounded down to whole sectors, as QEMU does."""
        return self.size & ~(limits.SECTOR_SIZE - 1)

    @property
    def extended_l2(self) -> bool:
        """L2 entries of 16 bytes, with subcluster bitmaps."""
        return bool(self.incompatible_features & INCOMPATIBLE_EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        """Guest clusters are stored in an external data file."""
        return bool(self.incompatible_features & INCOMPATIBLE_DATA_FILE)

    @property
    def dirty(self) -> bool:
        """Refcounts may be stale; the L1 and L2 tables are right."""
        return bool(self.incompatible_features & INCOMPATIBLE_DIRTY)

    @property
    def corrupt(self) -> bool:
        """Some structure may be damaged; nothing but a repair may write."""
        return bool(self.incompatible_features & INCOMPATIBLE_CORRUPT)

    @property
    def data_file_raw(self) -> bool:
        """The data file by itself is a raw image of the disk."""
        return bool(self.autoclear_features & AUTOCLEAR_DATA_FILE_RAW)

    @property
    def refcount_bits(self) -> int:
        """Width of one refcount."""
        return 1 << self.refcount_order

    @property
    def data_file(self) -> bytes | None:
        """Name of the data file as stored, None if the image does not name one."""
        return self.extension_data(EXTENSION_DATA_FILE)

    @property
    def backing_format(self) -> bytes | None:
        """Name of the backing file's format as stored, None if the image does not name one."""
        return self.extension_data(EXTENSION_BACKING_FORMAT)

    @property
    def bitmaps(self) -> BitmapsPointer | None:
        """Where the bitmap directory is, None without bitmaps or while a program that does not know bitmaps changed
        the image (autoclear bit 0 unset)."""
        data = self.extension_data(EXTENSION_BITMAPS)
        if data is None or not self.autoclear_features & AUTOCLEAR_BITMAPS:
            return None
        if len(data) != _BITMAPS.size:
            raise CorruptImageError("bitmaps header extension", f"is {len(data)} bytes long, not {_BITMAPS.size}")
        bitmap_count, reserved, directory_size, directory_offset = _BITMAPS.unpack(data)
        pointer = BitmapsPointer(bitmap_count, directory_size, directory_offset)
        if reserved:
            raise CorruptImageError("bitmaps header extension", f"reserved field is {reserved:#x}")
        if not 0 < bitmap_count <= limits.MAX_BITMAPS:
            raise CorruptImageError("bitmaps header extension", f"names {bitmap_count} bitmaps")
        if not 0 < directory_size <= limits.MAX_BITMAP_DIRECTORY_SIZE:
            raise CorruptImageError("bitmaps header extension", f"directory of {directory_size} bytes")
        if not self._is_table_offset(directory_offset, directory_size):
            raise CorruptImageError("bitmaps header extension", f"directory at host offset {directory_offset:#x}")
        return pointer

    @property
    def encryption(self) -> EncryptionPointer | None:
        """Where the LUKS header area is; None unless the method is LUKS."""
        data = self.extension_data(EXTENSION_ENCRYPTION)
        return None if data is None else EncryptionPointer(*_ENCRYPTION.unpack(data))

    @property
    def tables(self) -> tuple[Table, ...]:
        """The structures of known length that the header points to, in no special order."""
        tables = [
            Table("L1 table", self.l1_table_offset, self.l1_size * 8),
            Table("refcount table", self.refcount_table_offset, self.refcount_table_clusters << self.cluster_bits),
        ]
        if self.snapshot_count:
            tables.append(Table("snapshot table", self.snapshots_offset, self.snapshot_count * MIN_SNAPSHOT_ENTRY_SIZE))
        return tuple(table for table in tables if table.length)

    def extension_data(self, extension_type: int) -> bytes | None:
        """Data of the first extension of this type."""
        return next((extension.data for extension in self.extensions if extension.type == extension_type), None)

    def require_known_features(self) -> None:
        """Raises UnsupportedFeatureError, naming them, if incompatible feature bits are set that are unknown here."""
        unknown = self.incompatible_features & ~INCOMPATIBLE_KNOWN
        if not unknown:
            return
        names = feature_names.incompatible_names(self.extension_data(EXTENSION_FEATURE_NAMES) or b"")
        bits = [bit for bit in range(64) if unknown >> bit & 1]
        described = ", ".join(names.get(bit) or f"bit {bit}" for bit in bits)
        raise UnsupportedFeatureError(f"the image uses unknown incompatible features ({unknown:#x}): {described}")

    def _is_table_offset(self, offset: int, length: int) -> bool:
        return not offset % self.geometry.cluster_size and offset + length <= limits.MAX_HOST_OFFSET

    def _check_fields(self) -> None:
        if self.extended_l2 and self.cluster_bits < limits.MIN_CLUSTER_BITS_EXTENDED_L2:
            raise _corrupt(f"extended L2 entries need clusters of 16 KiB or more, cluster_bits is {self.cluster_bits}")
        if self.size > limits.MAX_HOST_OFFSET:
            raise _corrupt(f"virtual size {self.size:#x} is too large", 24)
        if self.l1_size > limits.MAX_L1_ENTRIES:
            raise _corrupt(f"L1 table of {self.l1_size} entries is too large", 36)
        if self.l1_size < self.geometry.l1_entries_for(self.virtual_size):
            raise _corrupt(f"L1 table of {self.l1_size} entries is too small for {self.virtual_size} bytes", 36)
        if not self._is_table_offset(self.l1_table_offset, self.l1_size * 8):
            raise _corrupt(f"L1 table at host offset {self.l1_table_offset:#x} is not aligned or out of range", 40)
        refcount_table_size = self.refcount_table_clusters << self.cluster_bits
        if not 0 < refcount_table_size <= limits.MAX_REFCOUNT_TABLE_SIZE:
            raise _corrupt(f"refcount table of {self.refcount_table_clusters} clusters", 56)
        if not self._is_table_offset(self.refcount_table_offset, refcount_table_size):
            raise _corrupt(f"refcount table at host offset {self.refcount_table_offset:#x} is not aligned", 48)
        if self.snapshot_count > limits.MAX_SNAPSHOTS:
            raise _corrupt(f"{self.snapshot_count} internal snapshots are too many", 60)
        if not self._is_table_offset(self.snapshots_offset, limits.MAX_SNAPSHOT_TABLE_SIZE):
            raise _corrupt(f"snapshot table at host offset {self.snapshots_offset:#x} is not aligned", 64)
        if self.refcount_order > 6:
            raise _corrupt(f"refcount_order is {self.refcount_order}, not 0 to 6", 96)
        if bool(self.incompatible_features & INCOMPATIBLE_COMPRESSION_TYPE) != bool(self.compression_type):
            raise _corrupt(f"compression type {self.compression_type} disagrees with the feature bits", 104)

    def _check_extensions(self) -> None:
        if len(self.backing_format or b"") > limits.MAX_BACKING_FORMAT_LENGTH:
            raise CorruptImageError("backing format header extension", "is longer than 15 bytes")
        data = self.extension_data(EXTENSION_ENCRYPTION)
        is_luks = self.encryption_method is EncryptionMethod.LUKS
        if is_luks != (data is not None):
            raise _corrupt("encryption method and encryption header extension do not agree", 32)
        if data is None:
            return
        if len(data) != _ENCRYPTION.size:
            raise CorruptImageError("encryption header extension", f"is {len(data)} bytes long, not 16")
        offset, length = _ENCRYPTION.unpack(data)
        if not offset or not self._is_table_offset(offset, length):
            raise CorruptImageError("encryption header extension", f"points to host offset {offset:#x}")


def extension_rank(extension_type: int) -> int:
    """Where an extension stands among others: the more often it changes, the further in front, in the first sector;
    the table of feature names, which nobody needs, is last."""
    if extension_type == EXTENSION_FEATURE_NAMES:
        return len(_ORDER)
    return _ORDER.index(extension_type if extension_type in _ORDER else None)


def _extension(extension_type: int, data: bytes) -> HeaderExtension:
    return HeaderExtension(extension_type, data, bytes(-len(data) % 8))


def _corrupt(detail: str, host_offset: int | None = None) -> CorruptImageError:
    return CorruptImageError("header", detail, host_offset=host_offset)


def _parse_backing_file(cluster: bytes, cluster_size: int, offset: int, length: int) -> bytes | None:
    if not offset:
        return None
    if length > limits.MAX_NAME_LENGTH:
        raise _corrupt(f"backing file name of {length} bytes is too long", 16)
    if offset + length > cluster_size:
        raise _corrupt(f"backing file name at host offset {offset:#x} does not lie inside the header cluster", 8)
    name = cluster[offset : offset + length]
    if offset + length > len(cluster):
        raise _corrupt("backing file name lies past the end of the file", 8)
    return name


def _parse_version_3(cluster: bytes, cluster_size: int) -> _Version3Fields:
    if len(cluster) < V3_HEADER_LENGTH:
        raise _corrupt("the file ends inside the header")
    incompatible, compatible, autoclear, refcount_order, header_length = _VERSION_3.unpack_from(
        cluster, V2_HEADER_LENGTH
    )
    if not V3_HEADER_LENGTH <= header_length <= cluster_size or header_length % 8:
        raise _corrupt(f"header_length is {header_length}", 100)
    if len(cluster) < header_length:
        raise _corrupt("the file ends inside the header")
    compression_type, additional_fields = 0, b""
    if header_length > V3_HEADER_LENGTH:
        compression_type = cluster[V3_HEADER_LENGTH]
        additional_fields = cluster[V3_HEADER_LENGTH + 1 : header_length]
    if compression_type > max(CompressionType):
        raise UnsupportedFeatureError(f"compression type {compression_type} is not supported")
    return _Version3Fields(
        incompatible,
        compatible,
        autoclear,
        refcount_order,
        header_length,
        CompressionType(compression_type),
        additional_fields,
    )


def _parse_extensions(cluster: bytes, start: int, end: int) -> tuple[tuple[HeaderExtension, ...], bool]:
    """The extensions between `start` and `end`, and whether an end marker closed them."""
    extensions: list[HeaderExtension] = []
    offset = start
    while offset + _EXTENSION.size <= end:
        extension_type, length = _EXTENSION.unpack_from(cluster, offset)
        if extension_type == EXTENSION_END:
            return tuple(extensions), True
        data_start = offset + _EXTENSION.size
        if length > end - data_start:
            raise CorruptImageError(
                "header extension", f"type {extension_type:#x} of {length} bytes is too large", host_offset=offset
            )
        data_end = data_start + length
        offset = min(data_start + (length + 7 & ~7), end)
        extensions.append(HeaderExtension(extension_type, cluster[data_start:data_end], cluster[data_end:offset]))
    return tuple(extensions), False
