"""Images that are repaired in memory: the repair, what of a disk can be read, and how much is wrong.

It owns the measures by which a repair is judged, all of them from outside: the reference reader, cluster by cluster,
and the image checker. It refuses to know how an image was damaged.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qcow2_plugin.engine.checking.check import read_header_for_check
from qcow2_plugin.engine.checking.findings import CheckResult
from qcow2_plugin.engine.repairing.repair import Mode, repair_image
from tests.support.image_checker import Report, check_image
from tests.support.recording import Log, RecordingStorage
from tests.support.reference import CorruptError, ReferenceReader

MAX_CLUSTERS = 1 << 15
"""Of each disk that are read; the header of a damaged image may promise many more."""
MAX_SNAPSHOTS = 16

ReadableDisks = dict[tuple[str | None, int], bytes | None]
"""By snapshot (None: the active disk) and guest cluster what is read there, None for an error."""


class Reader(ReferenceReader):
    """Reads an image in memory."""

    def __init__(self, content: bytes | bytearray, data: bytes | None = None, snapshot: str | None = None) -> None:
        self.content, self.data = content, data
        super().__init__(Path("memory"), snapshot=snapshot)

    def _bytes(self, host_offset: int, length: int) -> bytes:
        return bytes(self.content[host_offset : host_offset + length]).ljust(length, b"\0")

    def _stored(self, guest_offset: int, word: int) -> bytes:
        if not self.has_data_file:
            return super()._stored(guest_offset, word)
        self._require_aligned(word)
        host_offset = word & 0x00FFFFFFFFFFFE00
        self._require(host_offset == guest_offset, "not where the guest is")
        assert self.data is not None
        return self.data[host_offset : host_offset + self.cluster_size].ljust(self.cluster_size, b"\0")


def readable(content: bytes | bytearray, data: bytes | None = None) -> ReadableDisks:
    """What can be read of all disks in an image. Clusters past the end of the file cannot."""
    found: ReadableDisks = {}
    for snapshot in (None, *snapshot_ids(content)):
        reader = Reader(content, data, snapshot)
        size = reader.cluster_size
        for cluster in range(min(-(-reader.virtual_size // size), MAX_CLUSTERS)):
            found[snapshot, cluster] = _read(reader, cluster * size, len(content))
    return found


def _read(reader: Reader, guest_offset: int, file_size: int) -> bytes | None:
    length = min(reader.cluster_size, reader.virtual_size - guest_offset)
    try:
        word, _ = reader.l2_entry(guest_offset)
        if word & 0x00FFFFFFFFFFFE00 >= file_size and not word >> 62 & 1 and not reader.has_data_file:
            return None
        return reader.read(guest_offset, length)
    except (CorruptError, AssertionError):
        return None


def snapshot_ids(content: bytes | bytearray) -> Iterator[str]:
    """The IDs in the snapshot table, whose L1 tables are in the file."""
    cluster_bits, (count, offset) = content[23], struct.unpack_from(">IQ", content, 60)
    for _ in range(min(count, MAX_SNAPSHOTS)):
        if offset + 40 > len(content):
            return
        l1_offset, _, id_size, name_size = struct.unpack_from(">QIHH", content, offset)
        (extra_size,) = struct.unpack_from(">I", content, offset + 36)
        if not l1_offset & (1 << cluster_bits) - 1 and l1_offset < len(content):
            yield bytes(content[offset + 40 + extra_size :][:id_size]).decode()
        offset += 40 + extra_size + id_size + name_size + 7 & ~7


def lost(before: ReadableDisks, after: ReadableDisks) -> list[tuple[str | None, int]]:
    """The clusters that could be read and now read otherwise, or not at all."""
    return [place for place, content in before.items() if content is not None and after.get(place) != content]


class Repaired(NamedTuple):
    """An image after a repair; `log` has the calls of it."""

    content: bytes
    result: CheckResult
    log: Log


def repair(content: bytes | bytearray, mode: Mode, *, ours: bool = False, data: bytes | None = None) -> Repaired:
    """Repair an image in memory. Raises what `repair_image` does."""
    log = Log()
    storage = RecordingStorage(log, 0, content)
    result = repair_recorded(storage, mode, ours=ours, data=data)
    return Repaired(bytes(storage.content), result, log)


def repair_recorded(
    storage: RecordingStorage, mode: Mode, *, ours: bool = False, data: bytes | None = None
) -> CheckResult:
    """Repair the image in this storage."""
    data_file = None if data is None else RecordingStorage(Log(), 1, data)
    return repair_image(storage, read_header_for_check(storage), mode=mode, repair_ours=ours, data=data_file)


def missing_references(report: Report) -> int:
    """Clusters that are counted less often than they are referred to: those that a writer may destroy."""
    return sum("has refcount" in found for found in report.corruptions)


def report_of(content: bytes | bytearray) -> Report:
    """What the checker of the tests says."""
    return check_image(content)
