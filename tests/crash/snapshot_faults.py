"""Snapshot work while storage calls fail, one run for each call that can.

A request during which a call fails raises that error; the disk and the snapshots are as before, or as after it; what is
on disk is sound. When nothing fails any more the work goes on, and ends with an image in which nothing is wrong but
leaks. After a failed barrier no change is taken, and reading goes on.
"""

from __future__ import annotations

import random

from qcow2_plugin.engine.internal_snapshots.snapshotting import create_snapshot
from qcow2_plugin.errors import FailedImageError
from tests.crash.kinds import Kind
from tests.crash.opening import open_readable, read_disk
from tests.crash.scenario import WrongError
from tests.crash.snapshot_work import Snapshots, SnapshotWork, check, look_at_snapshots
from tests.support.crash_states import Crashes
from tests.support.faulty import Calls, Fault, Faults, FaultyStorage
from tests.support.memory_storage import MemoryStorage
from tests.support.recording import Log

_STATES = 4
"""Judged after each failed barrier."""


def run_all(kind: Kind, word: str, fault: Fault, *, stride: int = 1) -> int:
    """One run for every call, or every so-many-th, that `fault` could hit; how many. Raises WrongError."""
    at = count = 0
    while True:
        try:
            if not _Run(kind, word, fault, at).run():
                return count
        except WrongError as error:
            raise WrongError(f"{kind.name}/{word}: {fault.name} at call {at}: {error}") from error
        count += 1
        at += stride


class _Run:
    """One run, with a fault at the `at`-th call that can fail."""

    def __init__(self, kind: Kind, word: str, fault: Fault, at: int) -> None:
        self.fault, self.faults = fault, Faults(fault)
        self.work = SnapshotWork(kind, word, self._storage)
        self.faults.arm(at)

    def _storage(self, log: Log, number: int, content: bytes) -> FaultyStorage:
        return FaultyStorage(log, number, content, "image", self.faults)

    def run(self) -> bool:
        """False if there is no such call."""
        work = self.work
        for letter in work.word:
            fired = self.faults.fired
            before = bytes(work.view), dict(work.snapshots)
            if self._try(letter):
                if self.faults.fired > fired and not self.fault.calls & Calls.PUNCH:
                    raise WrongError(f"{letter!r} succeeded although a call failed")
                with self.faults.paused():
                    work.look()
                continue
            if self.fault.calls & Calls.BARRIER:
                self._look_at_latched(before)
                return True
            if letter in "wzog":  # their faults are looked at elsewhere
                return True
            self._settle(letter, before)
            if not self.fault.sticky:
                self.faults.clear()
        fired = self.faults.fired
        self.faults.clear()
        work.image.close()
        check(work.storage.content)
        self._look_closed(work.view, work.snapshots)
        return bool(fired)

    def _try(self, letter: str) -> bool:
        try:
            self.work.do(letter)
        except OSError as error:
            if error.errno != self.fault.errno or not self.faults.fired:
                raise WrongError(f"{letter!r} raises {error!r}") from error
            return False
        except Exception as error:
            raise WrongError(f"{letter!r} raises {type(error).__name__}: {error}") from error
        return True

    def _settle(self, letter: str, before: tuple[bytes, Snapshots]) -> None:
        """A request has failed: find out whether it is done, which it must be as a whole or not at all."""
        work = self.work
        after = self._after(letter, before)
        with self.faults.paused():
            check(work.storage.content)
            problem = ""
            for view, snapshots in (before, after):
                try:
                    work.view, work.snapshots = bytearray(view), dict(snapshots)
                    work.look()
                    self._look_closed(None, snapshots)
                    return
                except WrongError as error:
                    problem = str(error)
        raise WrongError(f"after {letter!r} failed: {problem}")

    def _after(self, letter: str, before: tuple[bytes, Snapshots]) -> tuple[bytes, Snapshots]:
        view, snapshots = before[0], dict(before[1])
        if letter == "f":
            return before
        wanted = self.work.expect(letter)
        if letter == "c":
            return view, {**snapshots, wanted: view}
        if letter in "aA":
            return snapshots[wanted], snapshots
        del snapshots[wanted]
        return view, snapshots

    def _look_closed(self, view: bytes | bytearray | None, snapshots: Snapshots) -> None:
        """What somebody else finds in the file."""
        image = open_readable(MemoryStorage(self.work.storage.content), None, self.work.kind.backing)
        look_at_snapshots(image, snapshots)
        if view is not None and read_disk(image) != view:
            raise WrongError("the file has another disk")

    def _look_at_latched(self, before: tuple[bytes, Snapshots]) -> None:
        """A barrier has failed: nothing more is changed, the disk can be read, and crashes leave what they may."""
        work = self.work
        self.faults.clear()
        try:
            create_snapshot(work.image, b"no", 0)
        except FailedImageError:
            pass
        else:
            raise WrongError("a snapshot is made after a failed barrier")
        letter = work.steps[-1].letter
        views = [before[0]] if letter not in "aA" else [before[0], self._after(letter, before)[0]]
        if letter not in "wzog" and read_disk(work.image) not in views:
            raise WrongError("after a failed barrier the disk reads differently")
        work.image.close()
        step = work.steps[-1]
        if letter in "caAdD":
            view, snapshots = self._after(letter, before)
            work.steps[-1] = step._replace(view=view, snapshots=snapshots)
        if letter in "og":
            return
        crashes = Crashes(work.log, (work.kind.content,))
        last = len(crashes.intervals) - 1
        plans = [plan for plan in crashes.plans() if plan.interval == last]
        for plan in random.Random(0).sample(plans, min(_STATES, len(plans))):
            work.judge(crashes.state(plan))
