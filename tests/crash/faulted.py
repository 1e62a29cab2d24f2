"""Runs a workload while storage calls fail, one run for each call that can, and says what went wrong.

What must hold: the request during which a call fails raises that error and leaves every sector old or new; the image on
disk stays without corruption; once nothing fails any more, the same request succeeds, and so does everything after it.
After a failed barrier no change and no flush succeeds until the image is opened again; reading goes on. It owns these
rules and refuses to know the faults.
"""

from __future__ import annotations

import random

from qcow2_plugin.errors import Qcow2Error
from tests.crash.oracles import Judged, judge, recover
from tests.crash.scenario import Scenario, WrongError
from tests.crash.workloads import Request, Workload
from tests.support.crash_states import Crashes
from tests.support.faulty import Calls, Fault, Faults, FaultyStorage
from tests.support.image_checker import check_image
from tests.support.recording import Log

CLASS_7_STATES = 6  # judged after each failed barrier


def run_all(workload: Workload, fault: Fault) -> tuple[int, int]:
    """One run for every call that `fault` could hit; how many calls were hit, and how many there are without faults.

    Raises WrongError, with the number of the call.
    """
    total = _calls(workload, fault)
    at = 0
    while True:
        try:
            if not Faulted(workload, fault, at).run():
                return at, total
        except WrongError as error:
            raise WrongError(f"{workload.name}: {fault.name} at call {at} of {total}: {error}") from None
        at += 1


def _calls(workload: Workload, fault: Fault) -> int:
    counting = Faulted(workload, fault, None)
    counting.run()
    return counting.faults.seen


class Faulted:
    """One run, with a fault at the `at`-th call that can fail."""

    def __init__(self, workload: Workload, fault: Fault, at: int | None) -> None:
        self.workload, self.fault, self.at = workload, fault, at
        self.faults = Faults(fault)
        self.scenario = Scenario.of(workload.kind, self._storage)

    def _storage(self, log: Log, number: int, content: bytes) -> FaultyStorage:
        return FaultyStorage(log, number, content, "data" if number else "image", self.faults)

    def run(self) -> bool:
        """Raises WrongError; False if there is no such call."""
        self.faults.arm(self.at)
        for request in self.workload.requests:
            if request.verb == "close" and self.faults.fired:
                self.faults.clear()  # there is room again, and everything has to come out right
            if not self._request(request):
                return True
        fired = bool(self.faults.fired)
        self.faults.clear()
        self._check_closed()
        return fired

    def _request(self, request: Request) -> bool:
        """One request, and once more if it failed; False if that is the end."""
        fired = self.faults.fired
        error = self._try(request)
        if error is None:
            if self.faults.fired > fired and not self.fault.calls & Calls.PUNCH:  # giving space back is a hint
                raise WrongError(f"{request} succeeded although a call failed")
            self._check_disk()
            return True
        if self.fault.calls & Calls.BARRIER:
            self.faults.clear()
            self._check_latched()
            return False
        self._check_now(request)
        if request.verb in ("reopen", "close"):
            self.faults.clear()
            self._check_after_failed_close()
            return False
        if self.fault.sticky:
            return True
        self.faults.clear()
        again = self._try(request)
        if again is not None:
            raise WrongError(f"{request} fails again: {again}")
        self._check_disk()
        return True

    def _try(self, request: Request) -> OSError | None:
        """The error that it raised; WrongError if that is none that the storage had."""
        try:
            self.scenario.do(request)
        except OSError as error:
            if error.errno != self.fault.errno or not self.faults.fired:
                raise WrongError(f"{request} raises {error!r}") from error
            return error
        except Exception as error:
            raise WrongError(f"{request} raises {type(error).__name__}: {error}") from error
        return None

    def _check_disk(self, when: str = "") -> None:
        """The disk must read as it should."""
        with self.faults.paused():
            problem = self.scenario.problem()
        if problem:
            raise WrongError(when + problem)

    def _check_now(self, request: Request) -> None:
        """The request has failed: what is on disk now must be sound."""
        content = self.scenario.contents[0]
        report = check_image(content, guess_refcounts=bool(content[79] & 1))
        if not report.is_sound:
            raise WrongError(f"after {request} failed: {[*report.corruptions, *report.damage][0]}")
        if request.verb not in ("reopen", "close"):
            self._check_disk()

    def _check_latched(self) -> None:
        """A barrier has failed."""
        image = self.scenario.image
        if self.scenario.is_open:
            self._check_disk("after a failed barrier, ")
            for name, change in {
                "a write": lambda: image.write_from(b"x", 0),
                "a large write": lambda: image.write_from(bytes(4096), 0),
                "zeroing": lambda: image.write_zeroes(0, 4096),
                "a flush": image.flush,
            }.items():
                self._must_fail(name, change)
            self._check_disk("after a failed barrier, ")
            image.close()
        self._judge_crashes()

    def _must_fail(self, name: str, change: object) -> None:
        try:
            change()  # type: ignore[operator] # a callable
        except (Qcow2Error, OSError):
            return
        raise WrongError(f"{name} succeeds after a failed barrier")

    def _judge_crashes(self) -> None:
        """Whatever became of what the failed barrier was about, what was safe before is still there."""
        scenario = self.scenario
        crashes = Crashes(scenario.log, scenario.initial)
        last = len(crashes.intervals) - 1
        plans = [plan for plan in crashes.plans() if plan.interval == last]
        for plan in random.Random(self.at).sample(plans, min(CLASS_7_STATES, len(plans))):
            try:
                judged = judge(crashes.state(plan), scenario)
                if plan is plans[0]:
                    recover(judged, scenario, self.at or 0)
            except WrongError as error:
                raise WrongError(f"a crash after that: {error}") from error

    def _check_after_failed_close(self) -> None:
        """The image is closed, and what was safe must be there."""
        scenario = self.scenario
        crashes = Crashes(scenario.log, scenario.initial)
        try:
            judge(crashes.state(crashes.nothing_lost), scenario)
        except WrongError as error:
            raise WrongError(f"after the failed close: {error}") from error

    def _check_closed(self) -> None:
        """All is well again, and the image was closed without an error."""
        content = self.scenario.contents[0]
        report = check_image(content, guess_refcounts=bool(content[79] & 1))
        if not report.is_sound:
            raise WrongError(f"at the end: {[*report.corruptions, *report.damage][0]}")
        judged = Judged(
            tuple(bytearray(each) for each in self.scenario.contents), bytes(self.scenario.history.view), report
        )
        recover(judged, self.scenario, 1)
