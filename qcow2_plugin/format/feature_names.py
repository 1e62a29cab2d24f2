"""The table of feature names: what the bits of the feature words are called, for programs that do not know them.

Source: docs/interop/qcow2.rst, "Feature name table".
"""

from __future__ import annotations

import struct

from qcow2_plugin.errors import printable

ENTRY_SIZE = 48

_ENTRY = struct.Struct(">BB46s")
_INCOMPATIBLE = 0
_MIN_CLUSTER_BITS = 13
_NAMES = (
    (0, 0, b"dirty bit"),
    (0, 1, b"corrupt bit"),
    (0, 2, b"external data file"),
    (0, 3, b"compression type"),
    (0, 4, b"extended L2 entries"),
    (1, 0, b"lazy refcounts"),
    (2, 0, b"bitmaps"),
    (2, 1, b"raw external data"),
)
"""Kind (incompatible, compatible, autoclear), bit, name."""


def usual_table(version: int, cluster_bits: int) -> bytes | None:
    """The table that QEMU gives such an image; None where it gives none, because the version has no features, or
    because clusters are so small that the table could crowd out a name."""
    if version < 3 or cluster_bits < _MIN_CLUSTER_BITS:
        return None
    return b"".join(_ENTRY.pack(*name) for name in _NAMES)


def incompatible_names(table: bytes) -> dict[int, str]:
    """Names of incompatible features by bit, safe to print."""
    entries = _ENTRY.iter_unpack(table[: len(table) // ENTRY_SIZE * ENTRY_SIZE])
    return {bit: printable(name.split(b"\0", 1)[0]) for kind, bit, name in entries if kind == _INCOMPATIBLE}
