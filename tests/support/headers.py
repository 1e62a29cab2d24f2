"""Header clusters as bytes, field by field, for tests that need no file.

It packs what it is told, sensible or not, and refuses to know what the fields mean.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from tests.support.fields import HEADER_FIELDS, MAGIC, Extension

V3_FIXED = 104  # bytes up to header_length; compression_type and what follows are optional


def header_bytes(
    *,
    version: int = 3,
    cluster_bits: int = 16,
    extensions: Iterable[Extension] = (),
    end_marker: bool = True,
    backing: bytes | None = None,
    header_length: int = 112,
    tail: bytes = b"",
    length: int | None = None,
    **fields: int,
) -> bytes:
    """One header cluster. `tail` fills the bytes behind the 112 known ones up to `header_length`.

    The backing name stands right behind the extensions. `fields` override any header field by name, `length` cuts the
    cluster (or says how long it is where `cluster_bits` makes no sense).
    """
    shown_length = fields.pop("header_length_field", header_length)
    start = 72 if version == 2 else header_length
    area = b"".join(extension.packed() for extension in extensions)
    area += bytes(8) if end_marker else b""
    values = {
        "magic": MAGIC, "version": version, "cluster_bits": cluster_bits, "l1_table_offset": 3 << cluster_bits,
        "size": 1 << 20, "l1_size": 1 << 12, "refcount_table_offset": 1 << cluster_bits, "refcount_table_clusters": 1,
        "refcount_order": 4, "header_length": shown_length,
    }  # fmt: skip
    if backing is not None:
        values |= {"backing_file_offset": start + len(area), "backing_file_size": len(backing)}
    fixed = bytearray(112)
    for name, value in (values | fields).items():
        offset, code = HEADER_FIELDS[name]
        if version != 2 or offset < 72:
            struct.pack_into(">" + code, fixed, offset, value)
    head = (bytes(fixed) + tail).ljust(start, b"\0")[:start]
    cluster = head + area + (backing or b"")
    return cluster.ljust(1 << cluster_bits, b"\0") if length is None else cluster.ljust(length, b"\0")[:length]
