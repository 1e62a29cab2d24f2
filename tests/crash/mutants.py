"""Broken engines: each does one thing wrong that real ones have done, and the suites here must notice.

A mutant replaces one method of the engine while a test runs. It owns the mistakes and on which images they can show;
whether they are found is asked by test_mutants.py.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from qcow2_plugin import engine
from qcow2_plugin.engine import first_change
from qcow2_plugin.engine.allocator import Allocator, Retired, Run
from qcow2_plugin.engine.dirty_bitmaps.tracking import BitmapTracker
from qcow2_plugin.engine.image_file import ImageFile, Structure
from qcow2_plugin.engine.placement import NO_FILL, WrittenMapping
from qcow2_plugin.engine.repairing import rebuild
from qcow2_plugin.engine.repairing.repair_refcounts import set_refcounts
from qcow2_plugin.engine.writable import WritableImage
from qcow2_plugin.engine.writeback import WriteBack, write_refcounts
from qcow2_plugin.engine.written_tables import WrittenTables
from qcow2_plugin.format.entries import COPIED, OFFSET_MASK
from qcow2_plugin.format.header import INCOMPATIBLE_DIRTY, Header
from qcow2_plugin.storage import WritableStorage
from tests.support.recording import RecordingStorage

Patch = pytest.MonkeyPatch


class Mutant(NamedTuple):
    """`kinds` are the images on which to look for it, `faults` says that it shows only when a call fails."""

    break_it: Callable[[Patch], None]
    kinds: tuple[str, ...] = ("small",)
    operations: tuple[str, ...] = ()
    faults: bool = False


# ---- order


def pointers_before_refcounts(patch: Patch) -> None:
    """The tables first, behind a barrier the refcounts."""

    def write(self: Any, refcounts: Any, tables: Any) -> None:
        for host_offset, data in tables.unpublished:
            self._file.write(Structure.L2_TABLE, data, host_offset)
        self._file.barrier(self._data)
        self._tables.publish(tables)
        for host_offset, data in tables.l1_entries:
            self._file.write(Structure.L1_TABLE, data, host_offset)
        for host_offset, data in tables.slices:
            self._file.write(Structure.L2_TABLE, data, host_offset)
        self._file.barrier()
        write_refcounts(self._file, refcounts)
        self._file.barrier()

    patch.setattr(WriteBack, "_write", write)


def new_l2_table_after_its_pointer(patch: Patch) -> None:
    """The L1 entry is durable before the table that it names."""

    def write(self: Any, refcounts: Any, tables: Any) -> None:
        write_refcounts(self._file, refcounts)
        self._file.barrier(self._data)
        self._file.barrier()
        self._tables.publish(tables)
        for host_offset, data in tables.l1_entries:
            self._file.write(Structure.L1_TABLE, data, host_offset)
        self._file.barrier()
        for host_offset, data in [*tables.unpublished, *tables.slices]:
            self._file.write(Structure.L2_TABLE, data, host_offset)
        self._file.barrier()

    patch.setattr(WriteBack, "_write", write)
    patch.setattr(WrittenTables, "own", _own_without_content(WrittenTables.own))


def _own_without_content(own: Any) -> Any:
    """`own`, but a new table holds what somebody left in its cluster, until it is written back."""

    def without_content(self: Any, key: int) -> Any:
        file, self._file = self._file, _Stale(self._file)
        try:
            found = own(self, key)
        finally:
            self._file = file
        self.changed(key, found)
        return found

    return without_content


class _Stale:
    """An image file that writes something else."""

    def __init__(self, file: ImageFile) -> None:
        self._file = file

    def write(self, structure: Structure, data: bytes, host_offset: int) -> None:
        self._file.write(structure, b"\x55" * len(data), host_offset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def data_after_pointers(patch: Patch) -> None:
    """Guest data waits in memory until the tables are durable: published before the data is there."""
    held: list[tuple[WritableStorage, bytes, int]] = []
    finish, init = WriteBack._finish, WritableImage.__init__

    def late(self: Any, taken: Any) -> None:
        for storage, data, host_offset in held:
            storage.write_from(data, host_offset)
        held.clear()
        self._file.barrier(self._data)
        finish(self, taken)

    def init_without_data(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        self._write_data = lambda buffer, host_offset: held.append((self.data, bytes(buffer), host_offset))

    patch.setattr(WritableImage, "__init__", init_without_data)
    patch.setattr(WriteBack, "_finish", late)


def refcount_lowered_before_the_pointer_is_gone(patch: Patch) -> None:
    """What is retired loses its refcount in the write-back that removes the pointer."""
    original = Allocator.take_retired

    def take_retired(self: Any) -> list[Retired]:
        for retired in original(self):
            self.reclaim(retired)
        return []

    patch.setattr(Allocator, "take_retired", take_retired)


def freed_cluster_reused_at_once(patch: Patch) -> None:
    """What is retired is free."""

    def retire(self: Any, clusters: Any, *, punch: bool = False) -> None:
        if len(clusters):
            self.reclaim(Retired(clusters, punch))

    patch.setattr(Allocator, "retire", retire)


def punched_after_the_next_owner(patch: Patch) -> None:
    """Freed clusters are punched with the next write-back, when they may be somebody else's."""
    original = Allocator.take_writes
    waiting: list[tuple[Any, int]] = []

    def reclaim(self: Any, retired: Retired) -> None:
        waiting.extend((self, int(cluster)) for cluster in self._lower(retired.clusters))

    def take_writes(self: Any) -> Any:
        for allocator, cluster in waiting:
            bits = allocator._cluster_bits
            allocator._file.storage.punch(cluster << bits, 1 << bits)
        waiting.clear()
        return original(self)

    patch.setattr(Allocator, "reclaim", reclaim)
    patch.setattr(Allocator, "take_writes", take_writes)


def header_torn_in_two(patch: Patch) -> None:
    """Every changed field of the header is a write of its own."""
    original = ImageFile.update_header

    def update_header(self: Any, **fields: Any) -> None:
        for name in sorted(fields):
            original(self, **{name: fields[name]})

    patch.setattr(ImageFile, "update_header", update_header)


def bitmap_settled_before_its_bits(patch: Patch) -> None:
    """in_use is cleared first, behind a barrier the bits are written."""

    def finish_early(self: Any, allocator: Any) -> None:
        for each in self._kept:
            if each.is_held:
                self._write_flags(each, each.bitmap.flags)
        self._file.barrier()
        original(self, allocator)

    original = BitmapTracker.store_bits
    patch.setattr(BitmapTracker, "store_bits", finish_early)


def clean_before_the_refcounts(patch: Patch) -> None:
    """The dirty bit is cleared, and then the refcounts are corrected."""
    original = set_refcounts

    def set_early(file: ImageFile, *arguments: Any) -> None:
        file.update_header(incompatible_features=file.header.incompatible_features & ~INCOMPATIBLE_DIRTY)
        file.barrier()
        original(file, *arguments)

    patch.setattr(rebuild, "set_refcounts", set_early)


def raw_zeros_after_the_tables(patch: Patch) -> None:
    """Zeros reach a raw data file when the tables say zero already, durably."""
    held: list[tuple[RecordingStorage, int, int]] = []
    original, finish = RecordingStorage.write_zeroes, WriteBack._finish

    def write_zeroes(self: RecordingStorage, host_offset: int, length: int, *, may_punch: bool) -> None:
        if self.number:
            held.append((self, host_offset, length))
        else:
            original(self, host_offset, length, may_punch=may_punch)

    def late(self: Any, taken: Any) -> None:
        finish(self, taken)
        for storage, host_offset, length in held:
            original(storage, host_offset, length, may_punch=True)
        held.clear()

    patch.setattr(RecordingStorage, "write_zeroes", write_zeroes)
    patch.setattr(WriteBack, "_finish", late)


# ---- forgotten


def flush_forgotten(patch: Patch) -> None:
    """A flush returns at once."""
    patch.setattr(WritableImage, "flush", lambda self: None)


def in_use_forgotten(patch: Patch) -> None:
    """Bitmaps are not marked in use before the first change."""
    patch.setattr(BitmapTracker, "_write_flags", lambda self, each, flags: None)


def change_not_tracked(patch: Patch) -> None:
    """A bitmap does not hear of zeroes and discards."""
    original = WritableImage._clear

    def clear(self: Any, *arguments: Any) -> None:
        tracker, self.tracker = self.tracker, _Deaf(self.tracker)
        try:
            original(self, *arguments)
        finally:
            self.tracker = tracker

    patch.setattr(WritableImage, "_clear", clear)


class _Deaf:
    """A tracker that hears of nothing."""

    def __init__(self, tracker: BitmapTracker) -> None:
        self._tracker = tracker

    def mark(self, offset: int, length: int) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tracker, name)


def copy_forgotten(patch: Patch) -> None:
    """What surrounds a write in a new cluster is not filled in."""
    patch.setattr(WrittenMapping, "_fill", lambda self, *arguments: NO_FILL)


def autoclear_bit_left(patch: Patch) -> None:
    """Autoclear features that nobody here knows are kept."""

    def kept(header: Header) -> int:
        return header.autoclear_features

    patch.setattr(first_change, "kept_autoclear_features", kept)


def refcount_of_new_clusters_forgotten(patch: Patch) -> None:
    """What is handed out is not counted on disk."""
    original = Allocator._hand_out

    def hand_out(self: Any, runs: list[Run], first: int, count: int) -> None:
        dirty = set(self._dirty)
        original(self, runs, first, count)
        self._dirty = dirty

    patch.setattr(Allocator, "_hand_out", hand_out)


def failed_barrier_forgotten(patch: Patch) -> None:
    """After a failed barrier everything goes on."""
    patch.setattr(ImageFile, "fail", lambda self, reason: None)


def failed_write_forgotten(patch: Patch) -> None:
    """Tables whose writing failed count as written."""
    patch.setattr(WrittenTables, "put_back", lambda self: self._being_written.clear())


def failed_data_published(patch: Patch) -> None:
    """A placement whose data could not be written is committed instead of abandoned."""

    def abandon(self: Any, placement: Any) -> None:
        self.written.commit(placement, may_write=False)
        self.requests.release(placement.first, placement.end)

    patch.setattr(WritableImage, "_abandon", abandon)


# ---- shared


def shared_cluster_written_in_place(patch: Patch) -> None:
    """Neither COPIED nor the refcount is looked at."""

    def own_cluster(self: Any, entry: int, entry_offset: int, kind: Any) -> int | None:
        has_space = kind.name in ("NORMAL", "ZERO_ALLOCATED", "UNALLOCATED_ALLOCATED")
        return entry & OFFSET_MASK if has_space else None

    patch.setattr(WrittenMapping, "_own_cluster", own_cluster)


def shared_l2_table_written_in_place(patch: Patch) -> None:
    """An L2 table of a snapshot is taken for ours."""
    original = WrittenTables.read_l1

    def read_l1(self: Any, index: int, count: int) -> Any:
        entries = original(self, index, count)
        return np.where(entries != 0, entries | np.uint64(COPIED), entries)

    patch.setattr(WrittenTables, "read_l1", read_l1)
    patch.setattr(Allocator, "refcount", lambda self, cluster: 1)


MUTANTS: dict[str, Mutant] = {
    "pointers before refcounts": Mutant(pointers_before_refcounts),
    "new L2 table after its pointer": Mutant(new_l2_table_after_its_pointer, operations=("write_across",)),
    "data after pointers": Mutant(data_after_pointers, ("small", "data_file")),
    "refcount lowered before the pointer is gone": Mutant(refcount_lowered_before_the_pointer_is_gone),
    "freed cluster reused at once": Mutant(freed_cluster_reused_at_once, operations=("discard", "write_cluster")),
    "punched after the next owner": Mutant(punched_after_the_next_owner, operations=("discard", "write_cluster")),
    "header torn in two": Mutant(header_torn_in_two, ("small", "growth"), ("grow", "write_across")),
    "bitmap settled before its bits": Mutant(bitmap_settled_before_its_bits, ("bitmap",)),
    "clean before the refcounts": Mutant(clean_before_the_refcounts, ("dirty",)),
    "raw zeros after the tables": Mutant(raw_zeros_after_the_tables, ("raw_data_file",)),
    "flush forgotten": Mutant(flush_forgotten),
    "in_use forgotten": Mutant(in_use_forgotten, ("bitmap",)),
    "change not tracked": Mutant(change_not_tracked, ("bitmap",), ("zero_keep", "discard")),
    "copy forgotten": Mutant(copy_forgotten, ("backing",), ("write_part",)),
    "autoclear bit left": Mutant(autoclear_bit_left),
    "refcount of new clusters forgotten": Mutant(refcount_of_new_clusters_forgotten),
    "shared cluster written in place": Mutant(shared_cluster_written_in_place, ("snapshot",)),
    "shared L2 table written in place": Mutant(shared_l2_table_written_in_place, ("snapshot",)),
    "failed barrier forgotten": Mutant(failed_barrier_forgotten, faults=True),
    "failed write forgotten": Mutant(failed_write_forgotten, faults=True),
    "failed data published": Mutant(failed_data_published, faults=True),
}


# ---- barriers


class BarrierSite(NamedTuple):
    """A place where the engine asks for a barrier: the how-many-th call in which function, from 0, and its line."""

    module: str
    function: str
    number: int
    line: int

    def __str__(self) -> str:
        return f"{self.module}.{self.function}-{self.number}"


@functools.cache
def barrier_sites() -> list[BarrierSite]:
    """All such places, but for the one that carries it out."""
    folder = Path(engine.__file__ or "").parent
    sites = []
    for path in sorted(folder.rglob("*.py")):
        if path.stem != ImageFile.__module__.rpartition(".")[2]:
            for function in ast.walk(ast.parse(path.read_text())):
                if isinstance(function, ast.FunctionDef):
                    lines = sorted(_barrier_lines(function))
                    sites += [BarrierSite(path.stem, function.name, number, line) for number, line in enumerate(lines)]
    return sites


def _barrier_lines(function: ast.FunctionDef) -> Iterator[int]:
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "barrier":
            yield node.lineno


def watch_barriers(patch: Patch) -> set[BarrierSite]:
    """The places that are come to from now on."""
    original = ImageFile.barrier
    found: set[BarrierSite] = set()

    def barrier(self: ImageFile, storage: WritableStorage | None = None) -> None:
        site = _caller()
        if site is not None:
            found.add(site)
        original(self, storage)

    patch.setattr(ImageFile, "barrier", barrier)
    return found


def skip_barrier(patch: Patch, site: BarrierSite) -> None:
    """Nothing happens at this place any more."""
    original = ImageFile.barrier

    def barrier(self: ImageFile, storage: WritableStorage | None = None) -> None:
        if _caller() != site:
            original(self, storage)

    patch.setattr(ImageFile, "barrier", barrier)


def _caller() -> BarrierSite | None:
    """The place that asked the caller of this function, if it is one of those."""
    frame = sys._getframe(2)
    module = frame.f_globals["__name__"].rpartition(".")[2]
    return next((site for site in barrier_sites() if (site.module, site.line) == (module, frame.f_lineno)), None)
