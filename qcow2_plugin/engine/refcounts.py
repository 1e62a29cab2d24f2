"""Refcounts as they are in an image file: how many host clusters are in use.

Source: docs/interop/qcow2.rst, "Host cluster management".
"""

from __future__ import annotations

import numpy as np

from qcow2_plugin.format.header import Header
from qcow2_plugin.format.refcounts import REFCOUNT_TABLE_OFFSET_MASK, count_used
from qcow2_plugin.storage import Storage


def is_preallocated(header: Header, storage: Storage) -> bool:
    """True if clearly more clusters of the image file are in use than it takes disk space for.

    Then clusters were handed out before anything was written to them, and asking the file system which of them are
    holes pays. The rule is QEMU's: more than a ninth, and at least two clusters, beyond what the space holds. Stops
    counting where the answer is known. A refcount block that is not in the file counts nothing. Raises OSError.
    """
    cluster_size = header.geometry.cluster_size
    stored_clusters = storage.allocated_size() // cluster_size
    threshold = max(stored_clusters * 10 // 9, stored_clusters + 2)
    remaining = -(-storage.size() // cluster_size)
    if remaining < threshold:
        return False
    per_block = cluster_size * 8 // header.refcount_bits
    table_size = min(header.refcount_table_clusters << header.cluster_bits, 8 * -(-remaining // per_block))
    stored = storage.pread(table_size, header.refcount_table_offset)
    table = np.frombuffer(stored[: len(stored) & ~7], dtype=">u8")
    used_count = 0
    for index in np.flatnonzero(table).tolist():
        block_offset = int(table[index]) & REFCOUNT_TABLE_OFFSET_MASK
        if block_offset >= storage.size():
            continue
        count = min(per_block, remaining - index * per_block)
        used_count += count_used(
            storage.pread(-(-count * header.refcount_bits // 8), block_offset), header.refcount_order, count
        )
        if used_count >= threshold:
            return True
        if used_count + remaining - (index + 1) * per_block < threshold:
            return False
    return False
