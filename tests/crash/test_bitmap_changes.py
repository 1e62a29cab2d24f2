"""Crashes and faults while bitmaps are changed: the old ones or the new ones are there, and none is clean by mistake.

QCOW2_TEST_DEPTH=deep takes more states of each workload, and more workloads for faults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from qcow2_plugin.engine.allocator import Retired
from qcow2_plugin.engine.dirty_bitmaps import bitmap_changes
from qcow2_plugin.engine.dirty_bitmaps.bitmap_changes import Prepared
from qcow2_plugin.engine.dirty_bitmaps.tracking import BitmapTracker
from qcow2_plugin.engine.writable import WritableImage
from qcow2_plugin.engine.written_tables import WrittenTables
from qcow2_plugin.errors import Qcow2Error
from tests.crash.bitmap_faults import run_all
from tests.crash.bitmap_work import Step, crash, random_work, workloads
from tests.crash.campaign import DEPTH
from tests.crash.mutants import BarrierSite, barrier_sites, skip_barrier
from tests.crash.scenario import WrongError
from tests.support.faulty import FAULTS

IS_DEEP = DEPTH > 1
STATES = 300 if IS_DEEP else 20
FAULTED = (
    "rotate, merge", "several, remove with a data file", "rotate, clear with a raw data file", "add of none",
)  # fmt: skip
Workload = tuple[str, str, list[Step]]
WORKLOADS = {each[0]: each for each in workloads()}
RANDOM = {each[0]: each for each in (random_work(seed, 7) for seed in range(20))}
ALONE = [name for name in WORKLOADS if name.endswith("alone")]
FIRST_OF_PAIRS = sorted({name.partition(",")[0] for name in WORKLOADS if "," in name})

pytestmark = pytest.mark.timeout(3600 if IS_DEEP else 120)


def run(names: Iterable[str], states: int = STATES) -> int:
    """How many states were judged; one that is wrong fails the test with one line."""
    try:
        return sum(crash(*WORKLOADS[name], states) for name in names)
    except WrongError as error:
        line = str(error)
    pytest.fail(line, pytrace=False)


def test_every_change_of_an_image_that_nobody_writes_to() -> None:
    assert run(ALONE, 10_000) > 300


@pytest.mark.parametrize("first", FIRST_OF_PAIRS)
def test_every_pair_with_writes_around_it(first: str) -> None:
    names = [name for name in WORKLOADS if name.startswith(f"{first}, ")]
    assert len(names) >= 16
    assert run(names) > 12 * len(names)


def test_the_first_bitmap_and_the_last() -> None:
    assert run([name for name in WORKLOADS if name.endswith("of none")], 4 * STATES) > 100


def test_changes_as_they_come() -> None:
    for seed in range(300 if IS_DEEP else 12):
        try:
            crash(*random_work(seed), 4 * STATES)
        except WrongError as error:
            pytest.fail(str(error), pytrace=False)


@pytest.mark.parametrize("name", [*WORKLOADS, *RANDOM] if IS_DEEP else FAULTED)
def test_every_call_fails_in_every_way(name: str) -> None:
    _, kind, steps = WORKLOADS.get(name) or RANDOM[name]
    try:
        assert sum(run_all(name, kind, [*steps[:-1], Step("close")], fault) for fault in FAULTS) > 50
    except WrongError as error:
        line = str(error)
    else:
        return
    pytest.fail(line, pytrace=False)


# ---- broken engines

Patch = pytest.MonkeyPatch


def write_lanes_not_forgotten(patch: Patch) -> None:
    """What a bitmap has all of goes on past the next one."""
    patch.setattr(WrittenTables, "forget_write_lanes", lambda self: None)


def not_held_again(patch: Patch) -> None:
    """in_use is not set again after a change."""
    original = WritableImage.settle_bitmaps

    def settle(self: Any) -> None:
        has_begun = self._has_begun
        original(self)
        self._has_begun = has_begun

    patch.setattr(WritableImage, "settle_bitmaps", settle)


def marks_forgotten(patch: Patch) -> None:
    """What is in memory only is not stored before a change."""

    def store_bits(self: Any, allocator: Any) -> None:
        for each in self._kept:
            each.changed.clear()

    patch.setattr(BitmapTracker, "store_bits", store_bits)


def refcounts_after_the_switch(patch: Patch) -> None:
    """The new clusters are counted by the next write-back."""
    patch.setattr(bitmap_changes, "write_refcounts_now", lambda file, allocator: None)


def freed_before_the_switch(patch: Patch) -> None:
    """What only the old directory names is free for the new one."""
    original = Prepared.write

    def write(self: Any) -> None:
        for clusters in self._retired:
            self._image.file.metadata.release(clusters.tolist())
            self._image.allocator.reclaim(Retired(clusters, False))
        self._retired = []
        original(self)

    patch.setattr(Prepared, "write", write)


def old_marks_kept(patch: Patch) -> None:
    """The tracker goes on with the bitmaps of before."""
    original = BitmapTracker.adopt

    def adopt(self: Any, kept: Any) -> None:
        tracked = self._tracked
        original(self, kept)
        self._tracked = tracked

    patch.setattr(BitmapTracker, "adopt", adopt)


def nothing_given_back(patch: Patch) -> None:
    """A change that fails leaves what it had allocated."""
    patch.setattr(Prepared, "abandon", lambda self: None)


MUTANTS: dict[str, tuple[Callable[[Patch], None], bool]] = {
    "write lanes not forgotten": (write_lanes_not_forgotten, False),
    "not held again": (not_held_again, False),
    "marks forgotten": (marks_forgotten, False),
    "refcounts after the switch": (refcounts_after_the_switch, False),
    "freed before the switch": (freed_before_the_switch, False),
    "old marks kept": (old_marks_kept, False),
    "nothing given back": (nothing_given_back, True),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, by_faults = MUTANTS[name]
    break_it(monkeypatch)
    assert caught_by_faults() if by_faults else caught(), "nobody noticed"


def caught(workloads: int = 40) -> str | None:
    for number, name in enumerate(reversed(WORKLOADS)):
        if number == workloads:
            break
        try:
            crash(*WORKLOADS[name], 40)
        except (WrongError, Qcow2Error, OSError) as error:
            return str(error)
    return None


def caught_by_faults() -> str | None:
    for name in FAULTED:
        for fault in FAULTS:
            try:
                run_all(*WORKLOADS[name], fault)
            except (WrongError, Qcow2Error, OSError) as error:
                return str(error)
    return None


@pytest.mark.parametrize("site", [site for site in barrier_sites() if site.module == "bitmap_changes"], ids=str)
def test_no_barrier_can_be_left_out(site: BarrierSite, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_barrier(monkeypatch, site)
    assert caught(), "nobody noticed"


def test_the_engine_itself_is_not_caught() -> None:
    assert caught(10) is None
