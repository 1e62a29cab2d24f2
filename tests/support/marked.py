"""An image of 512-byte clusters in memory with one dirty bitmap, all its places known.

Packed by the published format, independent of qcow2_plugin. One cluster of bits covers `COVERED` guest bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from tests.support.fields import BITMAP_FIELDS, BITMAPS, Extension, pack
from tests.support.headers import header_bytes
from tests.support.memory import MemoryStorage

GRANULE = 512
COVERED = 512 * 8 * GRANULE
TABLE, DIRECTORY, BITS = 0x4000, 0x5000, 0x6000
NAME = b"bitmap0"


def marked_image(table: Sequence[int], bits: bytes = b"", size: int = 3 * COVERED, **fields: int) -> MemoryStorage:
    """A bitmap with these table words, `bits` from host offset `BITS` on; `fields` override those of its entry."""
    values = {
        "table_offset": TABLE, "table_size": len(table), "flags": 0, "type": 1, "granularity_bits": 9,
        "name_size": len(NAME), "extra_data_size": 0,
    }  # fmt: skip
    directory = pack(BITMAP_FIELDS, values, fields) + NAME + bytes(1)
    extension = Extension(BITMAPS, struct.pack(">IIQQ", 1, 0, len(directory), DIRECTORY))
    content = bytearray(BITS) + bits
    content[:512] = header_bytes(
        cluster_bits=9, size=size, l1_size=-(-size // 32768), autoclear_features=1, extensions=[extension]
    )
    content[DIRECTORY : DIRECTORY + len(directory)] = directory
    table_offset = max(fields.get("table_offset", TABLE), TABLE)
    content.extend(bytes(max(table_offset + 8 * len(table) - len(content), 0)))
    content[table_offset : table_offset + 8 * len(table)] = struct.pack(f">{len(table)}Q", *table)
    return MemoryStorage(content)
