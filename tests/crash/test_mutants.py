"""The suites notice broken engines: each mutant, and each barrier left out, is caught by a few workloads."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from qcow2_plugin.errors import Qcow2Error
from tests.crash import long_bitmaps
from tests.crash.campaign import CrashError, Effort, Tally, crash, run
from tests.crash.faulted import run_all
from tests.crash.mutants import MUTANTS, BarrierSite, Mutant, barrier_sites, skip_barrier, watch_barriers
from tests.crash.scenario import WrongError
from tests.crash.workloads import ALPHABET, singles_and_pairs, workload
from tests.support.faulty import FAULTS

WORKLOADS = 60  # that a mutant may survive
EFFORT = Effort(states=30, recover_every=4)
FAULTED = ("write_across", "discard+write_cluster", "write_part+write_durable")
BARRIER_KINDS = ("small", "raw_data_file", "data_file", "bitmap", "growth", "dirty", "snapshot")

# What is freed waits for the next write-back, whose barrier comes before the refcount falls; and a dirty bit that comes
# back means one more repair. These are for runs in which a call fails in between, or for good measure.
NOT_NEEDED = {
    ("rebuild", "rebuild_refcounts", 1): "what follows has a barrier before the first change",
    ("resizing", "_lengthen_l1", 0): "the old table is freed later",
    ("tracking", "_publish", 1): "the old table is freed later",
    ("tracking", "_shrink", 0): "what falls away is freed later",
}

OTHER_SUITES = {
    "amending": "test_amend.py",
    "refcount_width": "test_amend.py",
    "zero_expansion": "test_amend.py",
    "bitmap_changes": "test_bitmap_changes.py",
    "recounting": "test_snapshots.py",
    "snapshotting": "test_snapshots.py",
    "unfinished": "test_transaction.py",
    "repair": "test_repair.py",
    "repair_extra": "test_repair.py",
    "repair_refcounts": "test_repair.py",
    "repair_snapshots": "test_repair.py",
}
"""Modules that the workloads here do not come to, and who leaves their barriers out instead."""


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    mutant.break_it(monkeypatch)
    assert caught_by_faults(mutant) if mutant.faults else caught(names_for(mutant), EFFORT), "nobody noticed"


def names_for(mutant: Mutant) -> Iterable[str]:
    for kind in mutant.kinds:
        for name in singles_and_pairs(kind, 0, both_forms=False):
            if not mutant.operations or set(mutant.operations) & set(name.split("/")[1].split("+")):
                yield name


def caught(names: Iterable[str], effort: Effort) -> str | None:
    """What gave a broken engine away, if anything did."""
    for number, name in enumerate(names):
        if number == WORKLOADS:
            break
        try:
            crash(name, effort, Tally())
        except CrashError as error:
            return str(error)
        except (Qcow2Error, OSError) as error:
            return f"{name}: {error}"
    return None


def caught_by_faults(mutant: Mutant) -> str | None:
    for kind in mutant.kinds:
        for operations in FAULTED:
            for fault in FAULTS:
                try:
                    run_all(workload(f"{kind}/{operations}/each/0"), fault)
                except (WrongError, Qcow2Error, OSError) as error:
                    return str(error)
    return None


def test_the_engine_itself_is_not_caught() -> None:
    assert caught([f"small/{word}/each/1" for word in ALPHABET], EFFORT) is None


# ---- barriers


@pytest.fixture(scope="module")
def reached() -> dict[BarrierSite, list[str]]:
    """The workloads that come to each place where the engine asks for a barrier."""
    found: dict[BarrierSite, list[str]] = {}
    for kind in BARRIER_KINDS:
        for name in singles_and_pairs(kind, 0, both_forms=False):
            operations = name.split("/")[1].split("+")
            if len(operations) > 1 and operations[0] not in ("shrink", "write_durable", "reopen", "discard"):
                continue
            with pytest.MonkeyPatch.context() as patch:
                sites = watch_barriers(patch)
                run(workload(name))
            for site in sites:
                found.setdefault(site, []).append(name)
    return found


@pytest.mark.parametrize("site", [site for site in barrier_sites() if site.module not in OTHER_SUITES], ids=str)
def test_no_barrier_can_be_left_out(
    site: BarrierSite, reached: dict[BarrierSite, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(reached.get(site, []))
    random.Random(0).shuffle(names)
    skip_barrier(monkeypatch, site)
    noticed = caught(names, Effort(states=60, recover_every=2)) or caught_on_long_bitmaps()
    if (site.module, site.function, site.number) in NOT_NEEDED:
        assert noticed is None, "it is needed after all"
    else:
        assert noticed, f"nobody noticed, in {len(names)} workloads that come there"


def caught_on_long_bitmaps() -> str | None:
    try:
        long_bitmaps.crash(1000)
    except (WrongError, Qcow2Error, OSError) as error:
        return str(error)
    return None


def test_the_list_of_barriers_that_are_not_needed_is_true() -> None:
    known = {(site.module, site.function, site.number) for site in barrier_sites()}
    assert NOT_NEEDED.keys() <= known
