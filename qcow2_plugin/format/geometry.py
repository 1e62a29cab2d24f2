"""The sizes that follow from cluster bits and entry width, and the limits on counts read from a file.

Source: docs/interop/qcow2.rst, "Header" and "Cluster mapping"; the limits are those that QEMU enforces.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MIN_CLUSTER_BITS_EXTENDED_L2 = 14
SUBCLUSTERS = 32
SECTOR_SIZE = 512

MAX_HOST_OFFSET = (1 << 63) - 1
MAX_L1_ENTRIES = 4 << 20
MAX_REFCOUNT_TABLE_SIZE = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_TABLE_SIZE = 64 << 20
MAX_SNAPSHOT_EXTRA_SIZE = 1024
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY_SIZE = 1024 * MAX_BITMAPS
MAX_BITMAP_TABLE_ENTRIES = 128 << 20
MAX_BITMAP_DATA_SIZE = 512 << 20
MAX_NAME_LENGTH = 1023
MAX_BACKING_FORMAT_LENGTH = 15


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes in bytes unless named otherwise; `entries` are table entries."""

    cluster_bits: int
    extended_l2: bool = False
    cluster_size: int = field(init=False)
    l2_entry_size: int = field(init=False)
    l2_entries: int = field(init=False)
    l2_coverage_bits: int = field(init=False)
    l2_coverage: int = field(init=False)
    """Guest bytes below one L1 entry."""
    subcluster_size: int = field(init=False)
    """The unit of allocation: a 32nd of a cluster with extended L2, else the cluster."""

    def __post_init__(self) -> None:
        entry_bits = 4 if self.extended_l2 else 3
        derive = object.__setattr__
        derive(self, "cluster_size", 1 << self.cluster_bits)
        derive(self, "l2_entry_size", 1 << entry_bits)
        derive(self, "l2_entries", 1 << (self.cluster_bits - entry_bits))
        derive(self, "l2_coverage_bits", 2 * self.cluster_bits - entry_bits)
        derive(self, "l2_coverage", 1 << self.l2_coverage_bits)
        derive(self, "subcluster_size", self.cluster_size // SUBCLUSTERS if self.extended_l2 else self.cluster_size)

    def l1_entries_for(self, virtual_size: int) -> int:
        """L1 entries that a disk of this size needs."""
        return -(-virtual_size // self.l2_coverage)
