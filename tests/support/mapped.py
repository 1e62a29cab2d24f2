"""Images in memory made of L1 and L2 words as the test has them, with every table at a known place.

Packed by the published format, independent of qcow2_plugin. Cluster 0 is the header, 1 the refcount table, then come
the L1 table and the L2 tables; nothing else is there, and `clusters` says how long the file is.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tests.support.headers import header_bytes
from tests.support.memory import MemoryStorage

Words = Mapping[int, int] | Mapping[int, tuple[int, int]]  # by index; with extended L2 entry and bitmap


@dataclass
class Mapped:
    """The file, and the host offsets of its L2 tables by L1 index."""

    storage: MemoryStorage
    l1_offset: int
    l2_offsets: dict[int, int] = field(default_factory=dict)


def mapped_image(
    tables: Mapping[int, Words],
    *,
    virtual_size: int,
    cluster_bits: int = 9,
    version: int = 3,
    extended_l2: bool = False,
    data_file: bool = False,
    l1_size: int | None = None,
    l1_words: Mapping[int, int] | None = None,
    shared: Mapping[int, int] | None = None,
    patterns: Mapping[int, tuple[int, int]] | None = None,
    clusters: int = 64,
    cut: int | None = None,
) -> Mapped:
    """An image with these L2 tables, by L1 index.

    `patterns` fills a table first: entry i is first + i * step. `shared` lets an L1 index point to the table of
    another one, `l1_words` sets L1 entries verbatim. `clusters` is the length of the file behind the tables, `cut`
    its length in bytes, whatever stands there.
    """
    size, entry_words = 1 << cluster_bits, 2 if extended_l2 else 1
    entries = size // (8 * entry_words)
    needed = -(-virtual_size // (size * entries))
    l1_size = needed if l1_size is None else l1_size
    l1_clusters = max(-(-l1_size * 8 // size), 1)
    made = Mapped(MemoryStorage(), 2 * size)
    for position, index in enumerate(sorted(tables)):
        made.l2_offsets[index] = (2 + l1_clusters + position) * size
    content = bytearray((2 + l1_clusters + len(tables) + clusters) * size)
    content[:size] = header_bytes(
        version=version,
        cluster_bits=cluster_bits,
        size=virtual_size,
        l1_size=l1_size,
        l1_table_offset=made.l1_offset,
        incompatible_features=extended_l2 << 4 | data_file << 2,
    )
    for index, offset in made.l2_offsets.items():
        content[offset : offset + size] = _table(tables[index], entries, entry_words, (patterns or {}).get(index))
    words = {index: offset | 1 << 63 for index, offset in made.l2_offsets.items()}
    words |= {index: made.l2_offsets[other] for index, other in (shared or {}).items()} | dict(l1_words or {})
    for index, word in words.items():
        if index < l1_size:
            struct.pack_into(">Q", content, made.l1_offset + 8 * index, word)
    made.storage.content = content if cut is None else content.ljust(cut, b"\0")[:cut]
    return made


def _table(words: Words, entries: int, entry_words: int, pattern: tuple[int, int] | None) -> bytes:
    table = np.zeros((entries, entry_words), dtype=np.uint64)
    if pattern is not None:
        table[:, 0] = np.uint64(pattern[0]) + np.arange(entries, dtype=np.uint64) * np.uint64(pattern[1])
        table[:, 1:] = 0xFFFFFFFF
    for index, word in words.items():
        table[index] = word
    return table.astype(">u8").tobytes()
