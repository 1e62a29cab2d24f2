"""Repairs that are interrupted: whatever a crash or a failed call leaves, nothing is lost, and the next one ends well.

For each kind of damage: crash states of a repair, from every class in turn, some by default and all with
QCOW2_TEST_DEPTH=deep; and every call of a repair failing, one after the other. In each of them what could be read can
be read, no more clusters are counted too low than before, and a second repair leaves what an undisturbed one does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from qcow2_plugin.engine.checking.check import read_header_for_check
from qcow2_plugin.engine.repairing.repair import Mode, repair_image
from qcow2_plugin.errors import Qcow2Error
from tests.crash.campaign import DEPTH
from tests.crash.mutants import BarrierSite, barrier_sites, skip_barrier
from tests.support import broken
from tests.support.broken import BROKEN, Image
from tests.support.crash_states import Crashes, sample
from tests.support.faulty import FAULTS, Calls, Fault, Faults, FaultyStorage
from tests.support.image_checker import check_image
from tests.support.recording import Action, Log, RecordingStorage
from tests.support.repairing import ReadableDisks, lost, missing_references, readable, repair

IS_DEEP = DEPTH > 1
STATES = 100_000 if IS_DEEP else 14
FAULTY = ["several", "block entry lost", "snapshot without disk size", "aliases", "gaps", "raw data file, flags"]
OURS: dict[str, Callable[[Path], Image]] = {
    "in the wrong place": broken.in_the_wrong_place,
    "aliases": broken.with_aliases,
    "odd bits": broken.with_odd_bits,
    "gaps": broken.with_gaps,
    "gaps, extended": partial(broken.with_gaps, extended_l2=True),
    **{f"{name} data file, flags": partial(broken.with_wrong_flags, raw=name == "raw") for name in ("raw", "other")},
    **{
        f"{name} data file, dirty": partial(broken.dirty_with_data_file, raw=name == "raw") for name in ("raw", "other")
    },
}
RAW_BIT = 2

pytestmark = pytest.mark.timeout(3600 if IS_DEEP else 120)


class Subject:
    """One damaged image, and a repair of it that nothing disturbs."""

    def __init__(self, content: bytes, mode: Mode, *, ours: bool = False, data: bytes | None = None) -> None:
        self.content, self.mode, self.ours, self.data = content, mode, ours, data
        self.repaired = repair(content, mode, ours=ours, data=data)
        self.readable: ReadableDisks = readable(content, data)
        self.expected: ReadableDisks = readable(self.repaired.content, data)
        before = check_image(content)
        self.missing, self.marks = missing_references(before), before.header.incompatible_features
        self.left = check_image(self.repaired.content)
        calls = self.repaired.log.calls
        assert not calls or calls[-1].action is Action.BARRIER, "what was repaired is not durable"

    def judge(self, content: bytes, told: str) -> None:
        """The image after a crash."""
        now = readable(content, self.data)
        changed = [place for place in lost(self.readable, now) if now.get(place) != self.expected.get(place)]
        assert not changed, f"{told}: lost {changed[:3]}"
        report = check_image(content)
        if report.header.incompatible_features == self.marks:
            assert missing_references(report) <= self.missing, f"{told}: refcounts are lower than before"
        else:
            assert len(report.corruptions) == len(self.left.corruptions), f"{told}: unmarked, and not repaired"
        if report.header.autoclear_features & ~3:
            assert content == self.content, f"{told}: changed under a promise that nobody here knows"
        if now != self.readable:
            assert all(bitmap.granules is None for bitmap in report.bitmaps), f"{told}: bitmaps are wrong"
        again = repair(content, self.mode, ours=self.ours, data=self.data)
        self.judge_repaired(again.content, told)

    def judge_repaired(self, content: bytes, told: str) -> None:
        """The image after a repair that came to its end."""
        assert readable(content, self.data) == self.expected, f"{told}: the disk is another one after the repair"
        report = check_image(content)
        if self.data is not None and report.header.autoclear_features & RAW_BIT:
            self._judge_raw_data_file(content, told)
        assert len(report.corruptions) == len(self.left.corruptions), f"{told}: {report.corruptions[:3]}"
        assert report.damage == self.left.damage, f"{told}: {report.damage[:3]}"
        assert report.leaks <= self.left.leaks, f"{told}: leaks"
        last = repair(content, self.mode, ours=self.ours, data=self.data)
        assert last.content == content, f"{told}: a repair of what is repaired changes something"
        assert not last.log.calls, f"{told}: a repair of what is repaired writes"

    def _judge_raw_data_file(self, content: bytes, told: str) -> None:
        """It is the disk."""
        assert self.data is not None
        size = 1 << content[23]
        for (_, cluster), stored in readable(content, self.data).items():
            there = self.data[cluster * size : (cluster + 1) * size].ljust(size, b"\0")
            assert stored == there, f"{told}: cluster {cluster} of the raw data file is not that of the disk"


def subject(name: str, mode: Mode, folder: Path) -> Subject:
    """Raises Qcow2Error where this repair is refused."""
    return Subject(bytes(broken.broken(name, folder).content), mode)


def crash_log(chosen: Subject, name: str, limit: int = STATES) -> int:
    """Judge crash states of a repair; how many."""
    crashes = Crashes(chosen.repaired.log, (chosen.content,))
    seen = set()
    for number, plan in sample(crashes.plans(), name):
        state = crashes.state(plan)
        if state.key in seen:
            continue
        seen.add(state.key)
        chosen.judge(bytes(state.files[0].content()), f"{name}, state {number} ({plan.kind.value})")
        if len(seen) == limit:
            break
    return len(seen)


@pytest.mark.parametrize("mode", ["leaks", "all"])
@pytest.mark.parametrize("name", BROKEN)
def test_crashes(name: str, mode: Mode, tmp_path: Path) -> None:
    try:
        chosen = subject(name, mode, tmp_path)
    except Qcow2Error:
        return  # what is refused changes nothing; interop/test_repair.py looks at that
    chosen.judge_repaired(chosen.repaired.content, "without a crash")
    crash_log(chosen, f"{name}/{mode}")


@pytest.mark.parametrize("name", OURS)
def test_crashes_of_what_only_we_repair(name: str, tmp_path: Path) -> None:
    chosen = any_subject(name, tmp_path)
    assert chosen.repaired.result.is_sound
    chosen.judge_repaired(chosen.repaired.content, "without a crash")
    assert crash_log(chosen, name) > 1


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize("name", [*BROKEN, *OURS] if IS_DEEP else FAULTY)
def test_calls_that_fail(name: str, fault: Fault, tmp_path: Path) -> None:
    try:
        chosen = any_subject(name, tmp_path)
    except Qcow2Error:
        return
    data = None if chosen.data is None else RecordingStorage(Log(), 1, chosen.data)
    faults = Faults(fault)
    at = 0
    while True:
        storage = FaultyStorage(Log(), 0, chosen.content, "image", faults)
        header = read_header_for_check(storage)
        faults.arm(at)
        try:
            repair_image(storage, header, mode="all", repair_ours=chosen.ours, data=data)
        except OSError as error:
            assert error.errno == fault.errno
        else:
            assert not faults.fired, f"call {at} failed, and the repair says nothing"
            break
        faults.clear()
        if fault.calls & Calls.BARRIER:
            crashes = Crashes(storage.log, (chosen.content,))
            last = [plan for plan in crashes.plans() if plan.interval == len(crashes.intervals) - 1]
            for number, plan in enumerate(last[:: 1 if IS_DEEP else 9]):
                chosen.judge(bytes(crashes.state(plan).files[0].content()), f"barrier {at}, state {number}")
        chosen.judge(bytes(storage.content), f"call {at}")
        at += 1
    assert at or not fault.calls & Calls.READ


# ---- broken repairs


SITES = [site for site in barrier_sites() if site.module.startswith("repair")]
CAUGHT_BY = {
    "repair._begin-0": "leak and unknown autoclear feature",
    "repair._entries_changed-0": "zero cluster unaligned",
    "repair._raise_refcounts-0": "dirty",
    "repair._lower_refcounts-0": "leak",
    "repair._correct_flags-0": "corrupt and shared clusters flagged",
    "repair._clear_marks-0": "marked corrupt",
    "repair_extra.distrust_bitmaps-0": "in the wrong place",
    "repair_extra.cover_raw_disk-0": "gaps",
    "repair_extra.cover_raw_disk-1": "gaps",
    "repair_extra._move-0": "aliases",
    "repair_extra._move-1": "aliases",
    "repair_refcounts.rebuild_structures-0": "block entry lost",
    "repair_snapshots.write_snapshots-0": "snapshot without disk size",
    "repair_snapshots.write_snapshots-1": "snapshot without disk size",
}
NOT_NEEDED = {"repair_refcounts.rebuild_structures-1": "nobody looks at new blocks before the header names them"}


def any_subject(name: str, folder: Path) -> Subject:
    if name in BROKEN:
        return subject(name, "all", folder)
    image, data = OURS[name](folder), folder / "data"
    return Subject(bytes(image.content), "all", ours=True, data=data.read_bytes() if data.exists() else None)


@pytest.mark.parametrize("site", [site for site in SITES if str(site) not in NOT_NEEDED], ids=str)
def test_no_barrier_can_be_left_out(site: BarrierSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = CAUGHT_BY[str(site)]
    crash_log(any_subject(name, tmp_path), name, 1000)
    skip_barrier(monkeypatch, site)
    with pytest.raises(AssertionError):
        crash_log(any_subject(name, tmp_path), name, 1000)


def test_the_list_of_barriers_is_true() -> None:
    assert {str(site) for site in SITES} == CAUGHT_BY.keys() | NOT_NEEDED.keys()
