"""Runs workloads, crashes them and counts: how many different states were judged, of which kinds and classes.

A state is named by its workload and a number, `KIND/OPERATIONS/FORM/SEED NUMBER`, and a failure is one line with the
command that makes it again. It owns the numbers that the suite prints.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from hypothesis import settings

from tests.crash import oracles
from tests.crash.scenario import Scenario, WrongError
from tests.crash.workloads import Workload, workload
from tests.support.crash_states import Crashes, Plan, State, sample

DEPTH = settings().max_examples / 100
"""How much more than by default is tried; see tests/conftest.py."""


class CrashError(AssertionError):
    """A state, or a run before any crash, that is not as it must be; the message is one line."""


@dataclass
class Tally:
    """What one kind of image went through."""

    workloads: int = 0
    calls: int = 0
    judged: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    recovered: int = 0
    asked_qemu: int = 0
    second_crashes: int = 0
    leaking: int = 0
    wrong: int = 0
    seen: set[tuple[int, ...]] = field(default_factory=set)

    @property
    def unique(self) -> int:
        """Different contents of the files."""
        return len(self.seen)


@dataclass
class FaultTally:
    """The calls of one kind of image that were made to fail."""

    workloads: int = 0
    total: int = 0
    covered: Counter[str] = field(default_factory=Counter)


TALLIES: dict[str, Tally] = {}
FAULT_TALLIES: dict[str, FaultTally] = {}


@dataclass(frozen=True)
class Effort:
    """How much is done with each workload: states that are judged, and with every so many-th of them something more.

    0 is never.
    """

    states: int
    recover_every: int = 0
    qemu_every: int = 0
    again_every: int = 0


def crash(name: str, effort: Effort, tally: Tally) -> None:
    """Runs the workload of this name and judges some of its states. Raises CrashError.

    Contents that were seen before are judged again only where more is asked of them: after something became safe.
    """
    chosen = workload(name)
    scenario, crashes = run(chosen)
    tally.workloads += 1
    tally.calls += scenario.log.now
    asked: set[tuple[object, ...]] = set()
    judged = 0
    for number, plan in sample(crashes.plans(), name):
        state = crashes.state(plan)
        safe = [scenario.history.safe_requests(now) for now in (state.earliest, state.latest)]
        what = (state.key, *safe)
        is_new = state.key not in tally.seen
        if what in asked or not (is_new or safe[1]):
            continue
        asked.add(what)
        tally.seen.add(state.key)
        judged += is_new
        _judge(chosen, scenario, (number, plan, state), effort, tally)
        if judged == effort.states:
            return


def run(chosen: Workload) -> tuple[Scenario, Crashes]:
    """The workload without a crash, and its crash states. Raises CrashError."""
    scenario = Scenario.of(chosen.kind)
    try:
        scenario.run(chosen.requests)
        oracles.judge_closed(scenario)
    except WrongError as error:
        raise CrashError(f"python -m tests.crash {chosen.name}: {error}") from None
    return scenario, Crashes(scenario.log, scenario.initial)


def judge_one(chosen: Workload, number: int) -> Plan:
    """State `number` of a workload, with everything that is ever asked of one. Raises CrashError."""
    scenario, crashes = run(chosen)
    plan = crashes.plans()[number]
    _judge(chosen, scenario, (number, plan, crashes.state(plan)), Effort(1, 1, 1, 1), Tally())
    return plan


def _judge(chosen: Workload, scenario: Scenario, which: tuple[int, Plan, State], effort: Effort, tally: Tally) -> None:
    number, plan, state = which
    tally.judged += 1
    tally.classes[plan.kind.value] += 1
    try:
        judged = oracles.judge(state, scenario)
        tally.leaking += judged.report.leaks > scenario.before.leaks
        is_dirty = judged.report.header.incompatible_features & 1
        if is_dirty or _is_due(tally.judged, effort.recover_every):
            tally.recovered += 1
            oracles.recover(judged, scenario, number)
        if _is_due(tally.judged, effort.qemu_every):
            tally.asked_qemu += 1
            oracles.ask_qemu(judged, scenario)
        if _is_due(tally.judged, effort.again_every):
            tally.second_crashes += _crash_again(judged, chosen, number)
    except WrongError as error:
        tally.wrong += 1
        raise CrashError(f"python -m tests.crash {chosen.name} {number}: {plan.kind.value}: {error}") from None


def _is_due(count: int, every: int) -> bool:
    return bool(every) and count % every == 0


SECOND_STATES = 5
SECOND_REQUESTS = 8


def _crash_again(judged: oracles.Judged, chosen: Workload, number: int) -> int:
    """The next writer crashes too; how many states of that were judged. Raises WrongError."""
    initial = tuple(bytes(content) for content in judged.contents)
    scenario = Scenario(chosen.kind, initial, judged.view)
    if scenario.problem():  # a raw data file may hold more than the disk where nothing was safe
        return 0
    name = f"{chosen.name.split('/')[0]}/random+{SECOND_REQUESTS}/{chosen.name.split('/')[1]}/{number}"
    has_stale_bitmap = any(bitmap.granules is None for bitmap in scenario.before.bitmaps)  # such disks keep their size
    requests = [each for each in workload(name).requests if each.verb != "resize" or not has_stale_bitmap]
    try:
        scenario.run(requests)
        oracles.judge_closed(scenario)
        crashes = Crashes(scenario.log, initial)
        plans = crashes.plans()
        for plan in random.Random(name).sample(plans, min(SECOND_STATES, len(plans))):
            oracles.judge(crashes.state(plan), scenario)
    except WrongError as error:
        raise WrongError(f"after a second crash: {error}") from error
    return SECOND_STATES


def crash_all(tally: Tally, names: Iterable[str], effort: Effort) -> int:
    """All of these workloads, of one kind; how many states were judged that were new to `tally`. Raises CrashError."""
    before = tally.unique
    for name in names:
        crash(name, effort, tally)
    return tally.unique - before
