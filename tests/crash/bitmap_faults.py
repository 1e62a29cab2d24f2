"""Faults while bitmaps are changed: one run of a workload for each storage call that can fail.

The step during which a call fails raises that error, and the image on disk stays sound. A change that failed has not
happened, and happens when it is asked for again. After a failed barrier nothing does any more, and a crash finds the
bitmaps of before or after. It owns these rules and refuses to know the faults.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from qcow2_plugin.engine.dirty_bitmaps.bitmap_plan import BitmapChange, Verb
from qcow2_plugin.errors import BitmapError, Qcow2Error
from qcow2_plugin.operations.bitmaps import change_bitmaps
from tests.crash.bitmap_work import Step, Work
from tests.crash.scenario import WrongError
from tests.support.crash_states import Crashes
from tests.support.faulty import Calls, Fault, Faults, FaultyStorage
from tests.support.recording import Log

CLASS_7_STATES = 6


def run_all(name: str, kind: str, steps: Sequence[Step], fault: Fault) -> int:
    """A fault at every call, one after the other; how many calls it were. Raises WrongError."""
    at = 0
    while True:
        try:
            if not Faulted(kind, fault, at).run(steps):
                return at
        except WrongError as error:
            raise WrongError(f"{name}: {fault.name} at call {at}: {error}") from None
        at += 1


class Faulted:
    """One run, with a fault at the `at`-th call that can fail."""

    def __init__(self, kind: str, fault: Fault, at: int) -> None:
        self.fault, self.at = fault, at
        self.faults = Faults(fault)
        with self.faults.paused():
            self.work = Work(kind, self._storage)
        self.faults.arm(at)

    def _storage(self, log: Log, number: int, content: bytes) -> FaultyStorage:
        return FaultyStorage(log, number, content, "image", self.faults)

    def run(self, steps: Sequence[Step]) -> bool:
        """Raises WrongError; False if there is no such call."""
        for step in steps:
            if step.verb == "close" and self.faults.fired:
                self.faults.clear()  # there is room again, and everything has to come out right
            if not self._step(step):
                return True
        fired = bool(self.faults.fired)
        self.faults.clear()
        if steps[-1].verb == "close":
            self.work.check_closed(is_exact=False)
        self._judge_now()
        return fired

    def _step(self, step: Step) -> bool:
        """One step, and once more if it failed; False if that is the end."""
        if not self._fails(step):
            return True
        self._judge_now()
        if self.fault.calls & Calls.BARRIER:
            self.faults.clear()
            self._check_latched()
            return False
        self.work.forget_unfinished()
        if step.verb == "close":
            return False
        if self.fault.sticky:
            self.work.has_failed = True
            return True
        self.faults.clear()
        if self._fails(step):
            raise WrongError(f"{step} fails again")
        return True

    def _fails(self, step: Step) -> bool:
        """True if the step raised the error that the storage had."""
        try:
            self.work.do(step)
        except OSError as error:
            if error.errno != self.fault.errno or not self.faults.fired:
                raise WrongError(f"{step} raises {error!r}") from error
            return True
        except (KeyError, BitmapError) as error:  # there is no such bitmap, as a change before has failed for good
            if not self.fault.sticky or not self.faults.fired or step.verb != "change":
                raise WrongError(f"{step} raises {error!r}") from error
            self.work.forget_unfinished()
        except Exception as error:
            raise WrongError(f"{step} raises {type(error).__name__}: {error}") from error
        return False

    def _judge_now(self) -> None:
        """The image as it is on disk at this moment."""
        with self.faults.paused():
            crashes = Crashes(self.work.log, self.work.initial)
            state = crashes.state(crashes.nothing_lost)
            if any(left.content() != file.content for left, file in zip(state.files, self.work.files, strict=True)):
                raise WrongError("the log does not tell what is in the file")
            self.work.judge(state)

    def _check_latched(self) -> None:
        image = self.work.image
        changes: list[Callable[[], None]] = [
            lambda: image.write_from(b"x", 0),
            image.flush,
            lambda: change_bitmaps(image, [BitmapChange(Verb.ADD, b"too late", 512)]),
        ]
        for change in changes:
            try:
                change()
            except (Qcow2Error, OSError):
                continue
            raise WrongError("a change succeeds after a failed barrier")
        image.close()
        crashes = Crashes(self.work.log, self.work.initial)
        last = len(crashes.intervals) - 1
        plans = [plan for plan in crashes.plans() if plan.interval == last]
        for plan in random.Random(self.at).sample(plans, min(CLASS_7_STATES, len(plans))):
            state = crashes.state(plan)
            self.work.judge(state)
            self.work.recover(state)
