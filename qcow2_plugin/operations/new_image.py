"""What a new image is to be: its options judged, its header, and the bytes of all that is in it before any data.

Owns what follows from the options alone. Refuses to know which files there are, and in which order they are written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from qcow2_plugin.errors import OptionError, printable
from qcow2_plugin.format import geometry as limits
from qcow2_plugin.format.fresh import FreshLayout, Places
from qcow2_plugin.format.geometry import SECTOR_SIZE, Geometry
from qcow2_plugin.format.header import (
    AUTOCLEAR_DATA_FILE_RAW,
    COMPATIBLE_LAZY_REFCOUNTS,
    INCOMPATIBLE_COMPRESSION_TYPE,
    INCOMPATIBLE_DATA_FILE,
    INCOMPATIBLE_EXTENDED_L2,
    NEW_HEADER_LENGTH,
    V3_HEADER_LENGTH,
    CompressionType,
    EncryptionMethod,
    Header,
)
from qcow2_plugin.operations.new_files import NewFile, identity_if_any
from qcow2_plugin.storage.directory import absolute_path
from qcow2_plugin.storage.opener import Policy, broken_rule

_PREALLOCATIONS = ("off", "metadata", "falloc", "full")
COMPRESSION_TYPES = {"zlib": CompressionType.DEFLATE, "zstd": CompressionType.ZSTD}


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """What is asked of a new image, by the names of `create_image`, and with its defaults."""

    version: int = 3
    cluster_size: int = 65536
    refcount_bits: int = 16
    lazy_refcounts: bool = False
    extended_l2: bool = False
    compression_type: str = "zlib"
    preallocation: str = "off"
    backing_file: bytes | None = None
    backing_format: str | None = None
    data_file: str | None = None
    data_file_raw: bool = False
    keep_data_file: bool = False
    overwrite_data_file: bool = False
    clip_data_file: bool = False

    @classmethod
    def around(
        cls,
        volume: str | os.PathLike[str],
        *,
        cluster_size: int,
        extended_l2: bool,
        refcount_bits: int = 16,
        lazy_refcounts: bool = False,
        clip: bool = False,
    ) -> ImageOptions:
        """Those of an image that keeps the books of a raw disk which is there, `volume`."""
        return cls(
            cluster_size=cluster_size,
            refcount_bits=refcount_bits,
            lazy_refcounts=lazy_refcounts,
            extended_l2=extended_l2,
            data_file=os.fsdecode(volume),
            data_file_raw=True,
            keep_data_file=True,
            clip_data_file=clip,
        )

    def check(self) -> None:
        """Raises OptionError if a value is none that its option can have, or options contradict each other."""
        self._check_values()
        if self.version == 2:
            self._check_version_2()
        if self.backing_file is not None:
            self._check_backing_file(self.backing_file)
        elif self.backing_format is not None:
            raise OptionError("there is a backing_format, but no backing_file to have it; name the file, too")
        if self.data_file is not None:
            self._check_data_file(self.data_file)
            return
        for option in ("data_file_raw", "keep_data_file", "overwrite_data_file", "clip_data_file"):
            if getattr(self, option):
                raise OptionError(f"{option} is about a data_file, and none is named; name one, or leave it out")

    def _check_values(self) -> None:
        if self.version not in (2, 3):
            raise OptionError(f"there is no version {self.version}; take 3 (compat=1.1) or 2 (compat=0.10)")
        smallest, largest = 1 << limits.MIN_CLUSTER_BITS, 1 << limits.MAX_CLUSTER_BITS
        if not smallest <= self.cluster_size <= largest or self.cluster_size & self.cluster_size - 1:
            raise OptionError(
                f"cluster_size must be a power of two from {smallest} to {largest} bytes, not {self.cluster_size}"
            )
        if self.refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
            raise OptionError(f"refcount_bits must be 1, 2, 4, 8, 16, 32 or 64, not {self.refcount_bits}")
        check_choice("compression_type", self.compression_type, COMPRESSION_TYPES)
        check_choice("preallocation", self.preallocation, _PREALLOCATIONS)
        smallest = 1 << limits.MIN_CLUSTER_BITS_EXTENDED_L2
        if self.extended_l2 and self.cluster_size < smallest:
            raise OptionError(f"extended_l2 needs a cluster_size of {smallest} bytes or more, not {self.cluster_size}")

    def _check_version_2(self) -> None:
        asked = {
            "lazy_refcounts": self.lazy_refcounts,
            "refcount_bits but 16": self.refcount_bits != 16,
            "extended_l2": self.extended_l2,
            "compression_type but zlib": self.compression_type != "zlib",
            "data_file": self.data_file is not None,
        }
        for option in (option for option, is_asked in asked.items() if is_asked):
            raise OptionError(f"version 2 (compat=0.10) has no {option}; leave it out, or take version 3 (compat=1.1)")

    def _check_backing_file(self, name: bytes) -> None:
        if not name or b"\0" in name:
            raise OptionError(f'"{printable(name)}" is no name for a backing_file')
        if len(name) > limits.MAX_NAME_LENGTH:
            raise OptionError(f"the name of the backing_file is longer than {limits.MAX_NAME_LENGTH} bytes")
        if not self.backing_format:
            raise OptionError("say the format of the backing_file (backing_format qcow2 or raw): it is never guessed")
        if len(os.fsencode(self.backing_format)) > limits.MAX_BACKING_FORMAT_LENGTH:
            raise OptionError(f'"{printable(self.backing_format)}" is no backing_format; qcow2 and raw are')
        for option in ("data_file_raw", "keep_data_file"):
            if getattr(self, option):
                raise OptionError(
                    f"{option} means the whole disk, and nothing is left to a backing_file; take one of them"
                )
        if self.preallocation != "off" and not self.extended_l2:
            raise OptionError(
                f"preallocation={self.preallocation} hides the backing_file, other than with extended_l2; add that, or "
                "take one of them"
            )

    def _check_data_file(self, name: str) -> None:
        if not name or "\0" in name:
            raise OptionError(f'"{printable(name)}" is no name for a data_file')
        if self.clip_data_file and not self.keep_data_file:
            raise OptionError("clip_data_file is about a data file that is kept; add keep_data_file, or leave it out")
        if not self.keep_data_file:
            return
        if self.overwrite_data_file:
            raise OptionError("keep_data_file and overwrite_data_file contradict each other; take one of them")
        if self.preallocation in ("falloc", "full"):
            raise OptionError(
                f"a data file that is kept is not written to, so preallocation={self.preallocation} cannot be; take "
                "metadata"
            )
        if not self.is_mapped:
            raise OptionError(
                "nothing of the data file that is kept would be seen; add data_file_raw, or, if it need not stay a raw "
                "image, preallocation=metadata"
            )

    @property
    def is_mapped(self) -> bool:
        """Every guest cluster has its L2 entry from the start, which a raw data file needs to be what it is called."""
        return self.preallocation != "off" or self.data_file_raw

    def layout(self, virtual_size: int) -> FreshLayout:
        """Where everything lies. Raises OptionError if that is too much."""
        return FreshLayout(
            Geometry(self.cluster_size.bit_length() - 1, self.extended_l2),
            self.refcount_bits.bit_length() - 1,
            virtual_size,
            is_mapped=self.is_mapped,
            has_data_file=self.data_file is not None,
        )

    def header(self, layout: Places, data_file: bytes | None) -> Header:
        """The header; `data_file` is the name to store. Raises OptionError if there is no room for the names."""
        compression_type = COMPRESSION_TYPES[self.compression_type]
        incompatible = {
            INCOMPATIBLE_DATA_FILE: data_file is not None,
            INCOMPATIBLE_COMPRESSION_TYPE: compression_type is not CompressionType.DEFLATE,
            INCOMPATIBLE_EXTENDED_L2: self.extended_l2,
        }
        header = Header(
            version=self.version,
            backing_file_offset=0,
            backing_file=None,
            cluster_bits=layout.geometry.cluster_bits,
            size=layout.virtual_size,
            encryption_method=EncryptionMethod.NONE,
            l1_size=layout.l1_size,
            l1_table_offset=layout.l1_table_offset,
            refcount_table_offset=layout.refcount_table_offset,
            refcount_table_clusters=layout.refcount_table_clusters,
            snapshot_count=0,
            snapshots_offset=0,
            incompatible_features=sum(bit for bit, is_set in incompatible.items() if is_set),
            compatible_features=COMPATIBLE_LAZY_REFCOUNTS if self.lazy_refcounts else 0,
            autoclear_features=AUTOCLEAR_DATA_FILE_RAW if self.data_file_raw else 0,
            refcount_order=layout.refcount_order,
            header_length=NEW_HEADER_LENGTH,
            compression_type=compression_type,
            additional_fields=bytes(NEW_HEADER_LENGTH - V3_HEADER_LENGTH - 1),
        )
        return header.with_names(
            backing_file=self.backing_file,
            backing_format=None if self.backing_format is None else os.fsencode(self.backing_format),
            data_file=data_file,
        )


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Raises OptionError if the option cannot have this value."""
    if value not in choices:
        raise OptionError(f'{option} cannot be "{printable(value)}"; it is one of {", ".join(choices)}')


def whole_sectors(size: int | None) -> int:
    """The size of a disk for so many bytes. Raises OptionError if there is no such disk."""
    if size is None:
        raise OptionError("say how large the disk is to be: there is no file to take its size from")
    if size < 0:
        raise OptionError(f"a disk cannot have {size} bytes")
    return -(-size // SECTOR_SIZE) * SECTOR_SIZE


def stored_name(data_file: str, image: str) -> bytes:
    """The name of a data file that `open_image` finds again, by the confined policy if they share a directory."""
    directory, name = os.path.split(data_file)
    is_beside = identity_if_any(directory or os.curdir) == identity_if_any(os.path.dirname(image) or os.curdir)
    if is_beside and broken_rule(os.fsencode(name), Policy.CONFINED) is None:
        return os.fsencode(name)
    return os.fsencode(absolute_path(data_file))


def write_tables(image: NewFile, layout: FreshLayout, header: bytes, *, data_is_there: bool) -> None:
    """Everything but the data and the first sector; the header cluster is filled up with zeros.

    Raises OSError.
    """
    behind_first_sector = header.ljust(layout.geometry.cluster_size, b"\0")[SECTOR_SIZE:]
    front = [behind_first_sector, layout.refcount_table(), *layout.refcount_blocks(), layout.l1_table()]
    image.storage.write_vector(front, SECTOR_SIZE)
    offset = layout.l2_offset
    for piece in layout.l2_tables(data_is_there=data_is_there):
        image.storage.write_from(piece, offset)
        offset += len(piece)


def write_first_sector(image: NewFile, header: bytes) -> None:
    """Make it an image, durably: everything else of it is durable already. Raises OSError."""
    image.storage.write_from(header.ljust(SECTOR_SIZE, b"\0")[:SECTOR_SIZE], 0)
    image.storage.barrier()
