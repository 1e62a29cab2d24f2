"""The names, offsets and widths of what a qcow2 file stores, for tests: tables of fields and nothing that acts on them.

Written from the published format, independent of qcow2_plugin. It packs structures and overwrites fields in finished
files; it refuses to know what a sensible value is.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HEADER_FIELDS: dict[str, tuple[int, str]] = {  # name: (offset in the file, struct code)
    "magic": (0, "I"), "version": (4, "I"), "backing_file_offset": (8, "Q"), "backing_file_size": (16, "I"),
    "cluster_bits": (20, "I"), "size": (24, "Q"), "crypt_method": (32, "I"), "l1_size": (36, "I"),
    "l1_table_offset": (40, "Q"), "refcount_table_offset": (48, "Q"), "refcount_table_clusters": (56, "I"),
    "nb_snapshots": (60, "I"), "snapshots_offset": (64, "Q"), "incompatible_features": (72, "Q"),
    "compatible_features": (80, "Q"), "autoclear_features": (88, "Q"), "refcount_order": (96, "I"),
    "header_length": (100, "I"), "compression_type": (104, "B"),
}  # fmt: skip
SNAPSHOT_FIELDS = {
    "l1_table_offset": "Q", "l1_size": "I", "id_size": "H", "name_size": "H", "date_sec": "I", "date_nsec": "I",
    "vm_clock_nsec": "Q", "vm_state_size": "I", "extra_data_size": "I",
}  # fmt: skip
BITMAP_FIELDS = {
    "table_offset": "Q", "table_size": "I", "flags": "I", "type": "B", "granularity_bits": "B", "name_size": "H",
    "extra_data_size": "I",
}  # fmt: skip
BITMAPS_EXTENSION_FIELDS = {"nb_bitmaps": "I", "reserved": "I", "directory_size": "Q", "directory_offset": "Q"}

MAGIC = 0x514649FB
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1
ALL_PARTS = 0xFFFFFFFF  # a mask of the 32 parts (subclusters, with extended L2) of one cluster
END, BACKING_FORMAT, DATA_FILE = 0, 0xE2792ACA, 0x44415441
FEATURE_NAMES, BITMAPS, ENCRYPTION = 0x6803F857, 0x23852875, 0x0537BE77


def patch(path: str | Path, offset: int, data: bytes) -> None:
    """Overwrites bytes of an existing file in place."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        written = os.pwrite(descriptor, data, offset)
    finally:
        os.close(descriptor)
    assert written == len(data), f"short write to {path}: {written} of {len(data)} bytes"


def set_field(path: str | Path, name: str, value: int) -> None:
    """Overwrites one header field, named as in `HEADER_FIELDS`."""
    offset, code = HEADER_FIELDS[name]
    patch(path, offset, struct.pack(">" + code, value))


def pack(fields: Mapping[str, str], values: Mapping[str, int], overrides: Mapping[str, int]) -> bytes:
    assert overrides.keys() <= fields.keys(), f"no such field: {sorted(overrides.keys() - fields.keys())}"
    merged = {**values, **overrides}
    return struct.pack(">" + "".join(fields.values()), *(merged[name] for name in fields))


def padded(data: bytes, multiple: int, filler: int = 0) -> bytes:
    return data + bytes([filler]) * (-len(data) % multiple)


@dataclass(frozen=True)
class Extension:
    """A header extension; `length` lies about the data's, `padding` is the byte that fills up to a multiple of 8."""

    type: int
    data: bytes
    length: int | None = None
    padding: int = 0

    def packed(self) -> bytes:
        length = len(self.data) if self.length is None else self.length
        return struct.pack(">II", self.type, length) + padded(self.data, 8, self.padding)
