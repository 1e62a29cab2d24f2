"""Checking an image in memory: what is kept of findings, when it stops, what it tells of places, what it reads."""

from __future__ import annotations

import errno
import random
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qcow2_plugin.engine.checking import check_tables
from qcow2_plugin.engine.checking.check import check_image, read_header_for_check
from qcow2_plugin.engine.checking.findings import CheckResult, Finding, FindingClass, Findings, StoppedError
from qcow2_plugin.engine.checking.stored_refcounts import StoredRefcounts, unpack_narrow
from qcow2_plugin.errors import CorruptImageError, NotQcow2Error, UnsupportedFeatureError
from qcow2_plugin.format.refcounts import unpack_block
from qcow2_plugin.storage import Storage
from qcow2_plugin.storage.opener import open_given
from tests.support.builder import ImageBuilder
from tests.support.damage import IMAGE, SOUND, plain, rich, with_data_file
from tests.support.damage_ways import DAMAGES, OFFSETS, Fields
from tests.support.fields import COPIED, patch, set_field
from tests.support.memory import MemoryStorage

BUILT = [name for name in DAMAGES if name.endswith(" (built)")]


def look(content: bytes | bytearray | Storage, **options: object) -> CheckResult:
    storage = content if not isinstance(content, bytes | bytearray) else MemoryStorage(content)
    return check_image(storage, read_header_for_check(storage), **options)  # type: ignore[arg-type] # of its own


def finding(kind: str, count: int = 1, *, is_ours: bool = False) -> Finding:
    return Finding(kind, FindingClass.CORRUPTION, "x", None, None, None, "", None, count, is_ours)


# ---- findings


def test_findings_of_a_kind_are_kept_up_to_a_number_and_counted_without_end() -> None:
    findings = Findings(max_findings=2)
    for _ in range(5):
        findings.add(finding("often", 10))
    findings.add(finding("seldom", is_ours=True))
    assert [each.kind for each in findings.kept] == ["often", "often", "seldom"]
    assert findings.kinds == {"often": 50, "seldom": 1}
    assert (findings.counts[FindingClass.CORRUPTION], findings.extra_corruptions) == (50, 1)
    assert Findings(max_findings=None).room("any") > 1 << 40


def test_after_so_many_findings_it_stops() -> None:
    findings = Findings(stop_after=2)
    findings.add(finding("one", 100))
    with pytest.raises(StoppedError):
        findings.add(finding("two"))


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (CheckResult(), 0),
        (CheckResult(leaks=1), 3),
        (CheckResult(leaks=1, corruptions=1), 2),
        (CheckResult(extra_corruptions=1), 2),
        (CheckResult(corruptions=1, check_errors=1), 1),
        (CheckResult(aborted="why"), 1),
    ],
)
def test_exit_codes(result: CheckResult, code: int) -> None:
    assert result.exit_code == code
    assert result.is_sound is (code == 0)


# ---- what is said of places


def test_a_finding_says_where_it_is(tmp_path: Path) -> None:
    built = plain(12).build(tmp_path / IMAGE)
    place = built.l2_entry_offset(512 + 7)
    patch(built.path, place, struct.pack(">Q", built.data_offsets[512 + 7] | COPIED | 1 << 58))
    (found,) = look(built.path.read_bytes()).findings
    assert (found.kind, found.finding_class) == ("l2-entry-reserved", FindingClass.CORRUPTION)
    assert (found.structure, found.host_offset, found.index) == ("L2 table", built.l2_offsets[1], 7)
    assert found.guest_offset == (512 + 7) << 12
    assert found.data[0] == place


def test_clusters_in_a_row_are_one_finding(tmp_path: Path) -> None:
    found = look(DAMAGES["leaked clusters in a row (built)"].make(tmp_path).read_bytes())
    assert found.leaks == 5
    assert [(each.count, each.data[1:]) for each in found.findings] == [(3, (7, 0)), (2, (1, 0))]
    assert found.findings[1].data[0] == found.findings[0].data[0] + 3
    assert found.findings[0].host_offset == found.findings[0].data[0] << 12


def test_clusters_apart_are_findings_of_their_own(tmp_path: Path) -> None:
    fields = Fields(plain(12).build(tmp_path / IMAGE).path)
    start = fields.grow(4)
    for number in (0, 1, 3):
        fields.set_refcount(start + number * fields.size, 5)
    assert [(each.count, each.data[0] - (start >> 12)) for each in look(fields.content).findings] == [(2, 0), (1, 3)]


def test_an_l2_table_that_the_file_ends_in(tmp_path: Path) -> None:
    """QEMU reads zeros for the rest of it."""
    fields = Fields(plain(12).build(tmp_path / IMAGE).path)
    old, new = fields.word(fields.l1()) & OFFSETS, fields.grow()
    fields.content[new:] = fields.content[old : old + fields.size]
    fields.put(fields.l1(), new | COPIED)
    fields.set_refcount(old, 0)
    fields.set_refcount(new, 1)
    assert look(fields.content).is_sound
    found = look(fields.content[:-1])
    assert (found.kinds, found.is_complete) == ({"table-cut-off": 1}, False)
    assert found.findings[0].host_offset == new


def test_a_fault_in_a_shared_table_counts_for_each_that_names_it(tmp_path: Path) -> None:
    image = plain(12)
    for number in range(7):
        image.snapshot(b"%d" % number, b"")
    built = image.build(tmp_path / IMAGE)
    patch(built.path, built.l2_entry_offset(0), struct.pack(">Q", built.data_offsets[0] | 1 << 58))
    found = look(built.path.read_bytes())
    assert found.corruptions == 8
    assert [each.count for each in found.findings] == [8]


@pytest.mark.parametrize("name", [name for name in BUILT if DAMAGES[name].kinds])
def test_every_number_is_the_sum_of_what_is_told(tmp_path: Path, name: str) -> None:
    content = DAMAGES[name].make(tmp_path).read_bytes()
    found = look(content, max_findings=None)
    for finding_class, number in (
        (FindingClass.CORRUPTION, found.corruptions),
        (FindingClass.LEAK, found.leaks),
        (FindingClass.CHECK_ERROR, found.check_errors),
    ):
        told = [each for each in found.findings if each.finding_class is finding_class and not each.is_ours]
        assert sum(each.count for each in told) == number
    bounded = look(content, max_findings=1)
    assert (bounded.corruptions, bounded.leaks, bounded.kinds) == (found.corruptions, found.leaks, found.kinds)


@pytest.mark.parametrize("name", BUILT)
def test_tables_one_by_one_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    content = DAMAGES[name].make(tmp_path).read_bytes()
    found = look(content)
    monkeypatch.setattr(check_tables, "_BATCH", 1)
    assert replace(look(content), findings=()) == replace(found, findings=())


def test_a_host_cluster_in_two_tables_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = plain(12).build(tmp_path / IMAGE)
    word = built.path.read_bytes()[built.l2_entry_offset(1) :][:8]
    patch(built.path, built.l2_entry_offset(512 + 99), word)
    patch(built.path, built.l2_entry_offset(512 + 98), word)
    for batch in (1 << 20, 1):
        monkeypatch.setattr(check_tables, "_BATCH", batch)
        found = look(built.path.read_bytes())
        assert found.kinds["guest-aliased"] == found.extra_corruptions == 2


def test_the_check_stops_when_it_was_asked_to(tmp_path: Path) -> None:
    content = DAMAGES["no refcount block (built)"].make(tmp_path).read_bytes()
    found = look(content, stop_after=1)
    assert found.stopped and found.references is None and not found.is_complete
    assert sum(found.kinds.values()) == 1
    assert not look(content, stop_after=10**6).stopped


def test_progress_ends_with_everything(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    look(rich(12).build(tmp_path / IMAGE).path.read_bytes(), progress=lambda done, total: told.append((done, total)))
    assert told
    assert told[-1][0] == told[-1][1]


def test_a_table_that_begins_in_a_hole_is_read(tmp_path: Path) -> None:
    """And one that ends in one."""
    image = ImageBuilder(2 << 29, 16).data(8191, b"x").data(8192, b"y")
    built = image.build(tmp_path / IMAGE)
    content = built.path.read_bytes()
    with open(tmp_path / "sparse", "wb") as file:
        for place in range(0, len(content), 4096):
            if any(content[place : place + 4096]):
                file.seek(place)
                file.write(content[place : place + 4096])
        file.truncate(len(content))
    storage = open_given(tmp_path / "sparse")
    try:
        found = look(storage)
    finally:
        storage.close()
    assert found.is_sound and found.allocated_clusters == 2


# ---- what repairs rely on


@pytest.mark.parametrize("name", [name for name in SOUND if "data file" not in name and not name.startswith("QEMU")])
def test_references_are_the_refcounts_of_a_sound_image(tmp_path: Path, name: str) -> None:
    storage = MemoryStorage(SOUND[name](tmp_path).read_bytes())
    header = read_header_for_check(storage)
    found = check_image(storage, header)
    assert found.references is not None and found.is_complete and not found.has_overflow
    stored = StoredRefcounts(storage, header).of(np.arange(len(found.references)))
    assert found.references.tolist() == stored.tolist()
    assert found.end_of_references <= len(found.references) << header.cluster_bits


@pytest.mark.parametrize(
    ("name", "is_complete"),
    [
        ("refcount missing (built)", True),
        ("data cluster outside the file (built)", True),
        ("refcount table outside the file (built)", True),
        ("L2 table unaligned (built)", False),
        ("L2 table outside the file (built)", False),
        ("snapshot L1 table unaligned (built)", False),
        ("L1 table outside the file (built)", False),
        ("bitmap directory unreadable (built)", False),
        ("too many snapshots (built)", False),
    ],
)
def test_a_lost_table_makes_the_count_incomplete(tmp_path: Path, name: str, is_complete: bool) -> None:
    assert look(DAMAGES[name].make(tmp_path).read_bytes()).is_complete is is_complete


def test_the_end_of_references_may_be_past_the_end_of_the_file(tmp_path: Path) -> None:
    path = DAMAGES["data cluster outside the file (built)"].make(tmp_path)
    assert look(path.read_bytes()).end_of_references > path.stat().st_size + 7 * 4096


def test_a_snapshot_table_can_be_taken_as_a_repair_would_leave_it(tmp_path: Path) -> None:
    content = DAMAGES["snapshot with too much extra data (built)"].make(tmp_path).read_bytes()
    assert look(content).aborted
    found = look(content, as_repaired=True)
    assert found.aborted is None
    assert found.kinds == {"snapshot-extra-too-large": 1}
    path = plain(12).snapshot(b"1", b"").build(tmp_path / "many").path
    set_field(path, "nb_snapshots", 65536 + 3)
    found = look(path.read_bytes(), as_repaired=True)
    assert found.kinds["snapshots-too-many"] == 3


@pytest.mark.parametrize("order", range(7))
def test_narrow_refcounts_are_the_same_refcounts(order: int) -> None:
    block = random.Random(order).randbytes(512)
    assert unpack_narrow(block, order).tolist() == unpack_block(block, order).tolist()


# ---- data files


def raw_image(folder: Path) -> tuple[bytearray, bytearray]:
    """An image whose data file of 64 KiB promises to be the whole disk, and that file."""
    image = ImageBuilder(1 << 16, 12).data_file(folder / "data", b"data", raw=True).l2_table(0)
    for cluster in (0, 1, 2, 3, 8):
        image.data(cluster, b"x")
    image.zero(4).zero(5, preallocated=True)
    built = image.build(folder / IMAGE)
    return bytearray(built.path.read_bytes()), bytearray((folder / "data").read_bytes())


def test_what_is_not_mapped_must_be_zeros_in_a_raw_data_file(tmp_path: Path) -> None:
    content, data = raw_image(tmp_path)
    assert look(content, data=MemoryStorage(data)).is_sound
    data[0x6FFF] = data[0x7000] = data[0xF123] = 1
    found = look(content, data=MemoryStorage(data))
    assert (found.corruptions, found.extra_corruptions) == (0, 3)
    assert [(each.kind, each.guest_offset, each.count) for each in found.findings] == [
        ("raw-not-covered", 0x6000, 2), ("raw-not-covered", 0xF000, 1)
    ]  # fmt: skip


def test_what_says_zeros_is_looked_at_by_a_deep_check_only(tmp_path: Path) -> None:
    content, data = raw_image(tmp_path)
    data[0x4001] = data[0x5FFF] = 1
    assert look(content, data=MemoryStorage(data)).is_sound
    found = look(content, data=MemoryStorage(data), deep=True)
    assert [(each.kind, each.guest_offset, each.count) for each in found.findings] == [("raw-not-zero", 0x4000, 2)]


def test_ranges_that_go_on_in_the_next_table_are_one(tmp_path: Path) -> None:
    image = ImageBuilder(1 << 17, 9).data_file(tmp_path / "data", b"data", raw=True)
    for cluster in range(256):
        if cluster not in (63, 64):
            image.data(cluster, b"")
    content = image.build(tmp_path / IMAGE).path.read_bytes()
    data = bytearray(1 << 17)
    data[63 * 512 + 511] = data[64 * 512] = 1
    found = look(content, data=MemoryStorage(data))
    assert [(each.guest_offset, each.count) for each in found.findings] == [(63 * 512, 2)]


def test_the_end_of_the_disk_is_the_end_of_the_promise(tmp_path: Path) -> None:
    content, data = raw_image(tmp_path)
    assert look(content, data=MemoryStorage(data + b"behind the disk")).is_sound
    assert look(content, data=MemoryStorage(data[:0x2000])).is_sound


def test_without_the_promise_a_data_file_may_hold_anything(tmp_path: Path) -> None:
    content = with_data_file(tmp_path).build(tmp_path / IMAGE).path.read_bytes()
    assert look(content, data=MemoryStorage(b"\1" * (1 << 20)), deep=True).is_sound


def test_subclusters_without_data_are_part_of_the_promise(tmp_path: Path) -> None:
    image = ImageBuilder(1 << 20, 16, extended_l2=True).data_file(tmp_path / "data", b"data", raw=True)
    for cluster in range(16):
        image.data(cluster, b"")
    image.subclusters(3, b"", allocated=0x0000_00FF, zero=0x0000_FF00)
    content = image.build(tmp_path / IMAGE).path.read_bytes()
    data = bytearray(1 << 20)
    data[3 << 16] = 1
    assert look(content, data=MemoryStorage(data)).is_sound
    data[(3 << 16) + 8 * 2048] = 1
    assert look(content, data=MemoryStorage(data)).is_sound
    assert look(content, data=MemoryStorage(data), deep=True).kinds == {"raw-not-zero": 1}
    data[(3 << 16) + 16 * 2048] = 1
    assert look(content, data=MemoryStorage(data)).kinds == {"raw-not-covered": 1}


# ---- headers


def test_a_header_for_a_check_may_name_tables_that_cannot_be(tmp_path: Path) -> None:
    path = rich(12).build(tmp_path / IMAGE).path
    header = read_header_for_check(MemoryStorage(path.read_bytes()))
    assert header.snapshot_count == 2
    for field, value in (("nb_snapshots", 2**32 - 1), ("snapshots_offset", 2**64 - 1), ("refcount_table_clusters", 0)):
        set_field(path, field, value)
    header = read_header_for_check(MemoryStorage(path.read_bytes()))
    assert (header.snapshot_count, header.snapshots_offset) == (2**32 - 1, 2**64 - 1)
    assert header.refcount_table_clusters == 0


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("magic", 0, NotQcow2Error),
        ("incompatible_features", 1 << 40, UnsupportedFeatureError),
        ("autoclear_features", 2, CorruptImageError),
        ("l1_table_offset", 1, CorruptImageError),
        ("refcount_table_clusters", 1 << 20, CorruptImageError),
    ],
)
def test_other_headers_cannot_be_checked(tmp_path: Path, field: str, value: int, error: type[Exception]) -> None:
    path = plain(12).build(tmp_path / IMAGE).path
    set_field(path, field, value)
    with pytest.raises(error):
        read_header_for_check(MemoryStorage(path.read_bytes()))


# ---- errors of the file


class FailingStorage(MemoryStorage):
    """Reads `remaining` times."""

    remaining = 1 << 60

    def read_into(self, buffer: memoryview, host_offset: int) -> None:
        self.count()
        buffer[:] = super().pread(len(buffer), host_offset).ljust(len(buffer), b"\0")

    def pread(self, length: int, host_offset: int) -> bytes:
        self.count()
        return super().pread(length, host_offset)

    def count(self) -> None:
        self.remaining -= 1
        if self.remaining < 0:
            raise OSError(errno.EIO, "a bad sector")


def test_errors_of_the_file_come_through(tmp_path: Path) -> None:
    content = rich(12).build(tmp_path / IMAGE).path.read_bytes()
    storage = FailingStorage(content)
    assert look(storage).is_sound
    count = (1 << 60) - storage.remaining
    assert count > 10
    for remaining in range(count):
        storage.remaining = remaining
        with pytest.raises(OSError, match="bad sector"):
            look(storage)
