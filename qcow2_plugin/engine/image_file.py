"""The image file as a writer sees it: every write says what it is, and goes nowhere else.

**The firewall.** `MetadataMap` knows which clusters hold which structure: those the header names, the refcount blocks,
the L2 tables, the tables of snapshots, the bitmaps. A write of a structure must lie inside clusters of that
structure, and no cluster of the map is ever handed out or written as guest data. Whatever refcounts an image claims,
its tables cannot be overwritten through it. A violation marks the image corrupt.

**The latch.** After a failed barrier nothing that was written since the one before is known to be durable, and the
system may already have forgotten which of it is not. So the handle takes no change any more, for good; reading goes on.
The same holds for an image that was found corrupt, and for a file that others cut short.

Header fields are changed by one narrow write inside the first sector, which a crash cannot tear. Where names or
extensions change, `header_rewrite` says by which steps.

**Lock.** The caller's, for everything that changes the map or the header.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.distinct import distinct
from qcow2_plugin.engine.header_rewrite import Step, plan_rewrite
from qcow2_plugin.errors import CorruptImageError, FailedImageError, TruncatedImageError, about_file
from qcow2_plugin.format.geometry import SECTOR_SIZE
from qcow2_plugin.format.header import INCOMPATIBLE_CORRUPT, Header
from qcow2_plugin.storage import WritableStorage

Clusters = npt.NDArray[np.int64]

_MAX_CHANGES = 4096
"""Changes of the map kept beside its arrays."""


class Structure(enum.IntEnum):
    """What a cluster of the image file holds, guest data apart."""

    HEADER = 1
    L1_TABLE = 2
    L2_TABLE = 3
    REFCOUNT_TABLE = 4
    REFCOUNT_BLOCK = 5
    SNAPSHOT_TABLE = 6
    SNAPSHOT_L1_TABLE = 7
    SNAPSHOT_L2_TABLE = 8
    """One that the active L1 table does not name."""
    BITMAP = 9
    CONTESTED = 10
    """Structures that overlap, in an image under repair: nothing is written there."""

    @property
    def title(self) -> str:
        """As in messages."""
        return self.name.replace("_", " ").lower().replace("l1", "L1").replace("l2", "L2")


class MetadataMap:
    """Which clusters hold which structure; clusters are numbers, not offsets."""

    def __init__(self, parts: Iterable[tuple[Structure, Clusters]], snapshot_l2_tables: Clusters | None = None) -> None:
        """`snapshot_l2_tables` are those of snapshots, also where the active disk shares them: they stay structures
        when it does no longer. Raises ValueError if a cluster belongs to two structures."""
        arrays = [(structure, distinct(clusters)) for structure, clusters in parts]
        clusters = np.concatenate([each for _, each in arrays])
        owners = np.concatenate([np.full(len(each), structure, dtype=np.uint8) for structure, each in arrays])
        order = np.argsort(clusters, kind="stable")
        clusters, owners = clusters[order], owners[order]
        twice = np.flatnonzero(clusters[1:] == clusters[:-1])
        if twice.size:
            first, second = (Structure(int(owners[twice[0] + step])).title for step in (0, 1))
            raise ValueError(f"cluster {int(clusters[twice[0]])} belongs to the {first} and the {second}")
        self._settled = clusters, owners
        self._changes: dict[int, int] = {}
        self._kept = distinct(np.zeros(0, dtype=np.int64) if snapshot_l2_tables is None else snapshot_l2_tables)

    def owner(self, cluster: int) -> int:
        """The `Structure` in this cluster, 0 for none. Lock: none."""
        changed = self._changes.get(cluster)
        if changed is not None:
            return changed
        clusters, owners = self._settled
        place = _place_of(cluster, clusters)
        return 0 if place is None else int(owners[place])

    def clusters_of(self, structure: Structure) -> Clusters:
        """The clusters that hold this structure, ascending."""
        clusters, owners = self._settled
        changed = np.array(list(self._changes), dtype=np.int64)
        claimed = [cluster for cluster, owner in self._changes.items() if owner == structure]
        settled = np.setdiff1d(clusters[owners == structure], changed, assume_unique=True)
        return np.sort(np.concatenate((settled, np.array(claimed, dtype=np.int64))))

    def is_of_snapshot(self, cluster: int) -> bool:
        """True if an L2 table of a snapshot is in this cluster, whoever else refers to it."""
        return _place_of(cluster, self._kept) is not None

    def first_in(self, first: int, count: int) -> int | None:
        """The first cluster of a run that holds a structure, None if none does."""
        clusters, _ = self._settled
        low, high = np.searchsorted(clusters, (first, first + count))
        known = [cluster for cluster in clusters[low:high].tolist() if self.owner(cluster)]
        known += [cluster for cluster, owner in self._changes.items() if owner and first <= cluster < first + count]
        return min(known, default=None)

    def among(self, clusters: Clusters) -> npt.NDArray[np.bool_]:
        """For each of these clusters whether it holds a structure."""
        known, _ = self._settled
        places = np.minimum(np.searchsorted(known, clusters), len(known) - 1)
        found: npt.NDArray[np.bool_] = known[places] == clusters
        if self._changes:
            changes = self._changes
            for index, cluster in enumerate(clusters.tolist()):
                if cluster in changes:
                    found[index] = changes[cluster] != 0
        return found

    def claim(self, structure: Structure, first: int, count: int) -> None:
        """These clusters hold `structure` from now on."""
        for cluster in range(first, first + count):
            self._changes[cluster] = structure
        self._settle()

    def claim_all(self, structure: Structure, clusters: Clusters) -> None:
        """`claim` for clusters that need not be in line."""
        self._changes.update(dict.fromkeys(clusters.tolist(), structure))
        self._settle()

    def keep(self, snapshot_l2_tables: Clusters) -> None:
        """The L2 tables of snapshots are these now, also where the active disk shares them; one that nobody has any
        more is no structure."""
        kept = distinct(snapshot_l2_tables)
        dropped = np.setdiff1d(self._kept, kept, assume_unique=True).tolist()
        self._kept = kept
        self.release(cluster for cluster in dropped if self.owner(cluster) == Structure.SNAPSHOT_L2_TABLE)

    @property
    def kept(self) -> Clusters:
        """The L2 tables of snapshots, ascending."""
        return self._kept

    def any_in(self, clusters: Clusters) -> bool:
        """True if one of these ascending clusters holds a structure."""
        if not len(clusters):
            return False
        known, _ = self._settled
        places = np.minimum(np.searchsorted(known, clusters), len(known) - 1)
        changes = self._changes
        if any(changes.get(cluster, 1) for cluster in clusters[known[places] == clusters].tolist()):
            return True
        claimed = np.array([cluster for cluster, owner in changes.items() if owner], dtype=np.int64)
        places = np.minimum(np.searchsorted(clusters, claimed), len(clusters) - 1)
        return bool((clusters[places] == claimed).any())

    def release(self, clusters: Iterable[int]) -> None:
        """These clusters hold no structure of the active disk any more."""
        for cluster in clusters:
            if self.owner(cluster):
                self._changes[cluster] = 0 if _place_of(cluster, self._kept) is None else Structure.SNAPSHOT_L2_TABLE
        self._settle()

    def _settle(self) -> None:
        if len(self._changes) <= _MAX_CHANGES:
            return
        changed = np.fromiter(self._changes.keys(), dtype=np.int64, count=len(self._changes))
        changed_owners = np.fromiter(self._changes.values(), dtype=np.uint8, count=len(self._changes))
        clusters, owners = self._settled
        kept = ~np.isin(clusters, changed)
        clusters = np.concatenate((clusters[kept], changed[changed_owners != 0]))
        owners = np.concatenate((owners[kept], changed_owners[changed_owners != 0]))
        order = np.argsort(clusters)
        self._settled = clusters[order], owners[order]  # before the changes go: `owner` looks there first
        self._changes = {}


def _place_of(cluster: int, clusters: Clusters) -> int | None:
    """Where it is among ascending `clusters`, None if it is not."""
    place = int(np.searchsorted(clusters, cluster))
    return place if place < len(clusters) and clusters[place] == cluster else None


def _rest_of(header: Header) -> tuple[object, ...]:
    """What of a header is behind its fixed fields, or moves that."""
    return header.version, header.header_length, header.additional_fields, header.extensions, header.backing_file


class ImageFile:
    """The image file, its header as it is on disk or about to be, and whether changes are still taken."""

    def __init__(self, storage: WritableStorage, header: Header, metadata: MetadataMap) -> None:
        self.storage = storage
        self.header = header
        self.metadata = metadata
        self.failure: str | None = None
        """Why no change is taken any more."""
        self._cluster_bits = header.cluster_bits
        self._least_size = storage.size()

    def write(self, structure: Structure, data: bytes, host_offset: int) -> None:
        """Write a part of `structure`. Raises CorruptImageError if it does not own the place; OSError."""
        first, last = host_offset >> self._cluster_bits, host_offset + len(data) - 1 >> self._cluster_bits
        for cluster in range(first, last + 1):
            owner = self.metadata.owner(cluster)
            if owner != structure:
                other = Structure(owner).title if owner else "guest data"
                raise self.corrupt(structure.title, f"would be written over {other}", host_offset)
        self.storage.write_from(data, host_offset)

    def update_header(self, **fields: Any) -> None:
        """Change the header: fields, extensions, names, the version. A crash leaves the old one or the new one.

        What it names is durable before, by a barrier of the caller's; so is the new header itself after the next
        one. Where the backing file's name is follows from the rest. Raises HeaderFullError, and OSError; then the
        header is as before, or the image takes no more changes.
        """
        updated = replace(self.header, **fields)
        if _rest_of(updated) != _rest_of(self.header):
            stored = self.storage.pread(1 << self._cluster_bits, 0).ljust(1 << self._cluster_bits, b"\0")
            with about_file(self.storage.path):
                steps = plan_rewrite(stored, self.header, updated)
            self._take_steps(stored, steps)
            return
        before, after = self.header.pack(), updated.pack()
        different = [index for index in range(min(len(before), SECTOR_SIZE)) if before[index] != after[index]]
        if different:
            first, end = different[0], different[-1] + 1
            self._switch_header(before, after[first:end], first)
        self.header = updated

    def _take_steps(self, stored: bytes, steps: list[Step]) -> None:
        """Carry out what was planned for the header cluster `stored`.

        Once a header with the new contents is in force, an error only means that it is less tidy than it could be.
        """
        has_switched = False
        for number, step in enumerate(steps):
            if number:
                self.barrier()
            try:
                for place, data in step.writes:
                    if step.header is None:
                        self.write(Structure.HEADER, data, place)
                    else:
                        self._switch_header(stored, data, place)
            except OSError:
                if has_switched and self.failure is None:
                    return
                raise
            for place, data in step.writes:
                stored = stored[:place] + data + stored[place + len(data) :]
            if step.header is not None:
                self.header = step.header
                has_switched = True

    def _switch_header(self, before: bytes, data: bytes, host_offset: int) -> None:
        """Write inside one sector of the header cluster, which began with `before`."""
        try:
            self.write(Structure.HEADER, data, host_offset)
        except OSError as error:
            self._require_header(before[host_offset : host_offset + len(data)], host_offset, error)
            raise

    def _require_header(self, expected: bytes, host_offset: int, error: OSError) -> None:
        """After a failed write: take no more changes unless the old header is still there."""
        with suppress(OSError):  # what cannot be read is not known
            if self.storage.pread(len(expected), host_offset) == expected:
                return
        self.fail(f"the header could not be written ({error.strerror})")

    def barrier(self, storage: WritableStorage | None = None) -> None:
        """Everything written to the image file, or to `storage`, before is durable after. A failure is final.

        Raises OSError.
        """
        try:
            (storage or self.storage).barrier()
        except OSError as error:
            self.fail(f"data could not be made durable ({error.strerror})")
            raise

    def require_writable(self) -> None:
        """Raises FailedImageError after a failure."""
        if self.failure is not None:
            raise FailedImageError(
                f"no change is taken any more, since {self.failure}; close the image, check it and open it again",
                file=self.storage.path,
            )

    def require_uncut(self) -> None:
        """Raises TruncatedImageError, and takes no more changes, if somebody else has cut the file short."""
        size = self.storage.size()
        if size < self._least_size:
            self.fail("another program has cut the file short")
            raise TruncatedImageError(
                "image file", f"is {size} bytes long now and was {self._least_size}", file=self.storage.path
            )
        self._least_size = size

    def truncate(self, size: int) -> None:
        """Cut or extend the file. Raises OSError."""
        self.storage.truncate(size)
        self._least_size = size

    def fail(self, reason: str) -> None:
        """Take no more changes; the first reason stays."""
        self.failure = self.failure or reason

    def corrupt(self, structure: str, detail: str, host_offset: int | None = None) -> CorruptImageError:
        """The error to raise about a structure that a change would have damaged or relied on; the image is marked
        corrupt, as well as that goes, and takes no more changes."""
        if self.failure is None:
            self.fail(f"it is corrupt: {structure} {detail}")
            if self.header.version > 2:  # version 2 has no place for the mark
                with suppress(OSError):  # the error that is about to be raised says more
                    features = self.header.incompatible_features | INCOMPATIBLE_CORRUPT
                    self.storage.write_from(features.to_bytes(8, "big"), 72)
                    self.storage.barrier()
        return CorruptImageError(structure, detail, host_offset=host_offset, file=self.storage.path)
