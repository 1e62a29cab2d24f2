"""Storage calls and the record fail, one after the other, during a change of bitmaps on several images.

Whatever fails: all images are changed or none, as soon as each is opened again; images that go on are on that side
already, and the same change succeeds once nothing fails any more.
"""

from __future__ import annotations

import errno
import os

import pytest

from qcow2_plugin.errors import Qcow2Error, UnfinishedTransactionError
from tests.crash.campaign import DEPTH
from tests.crash.scenario import WrongError
from tests.crash.transactions import CASES, EITHER, GRANULE, Case, Work, forgotten, judge_one
from tests.support.faulty import FAULTS, Calls, Fault, Faults, FaultyStorage
from tests.support.image_checker import check_image
from tests.support.recording import Log

NAMES = CASES if DEPTH > 1 else ("4096", "removed", "alone", "data files")
NO_ROOM = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Faulted:
    """One run of a case with a fault at the `at`-th call that can fail."""

    def __init__(self, case: Case, fault: Fault, at: int | None) -> None:
        self.faults = Faults(fault)
        self.work = Work(case, self._storage)
        self.work.write_before()
        self.faults.arm(at)
        self.error: Exception | None = None

    def _storage(self, log: Log, number: int, content: bytes) -> FaultyStorage:
        return FaultyStorage(log, number, content, str(number), self.faults)

    def run(self) -> bool:
        """False if there is no such call. Raises WrongError."""
        self._try()
        fired = bool(self.faults.fired)
        self.faults.clear()
        if fired and self.error is None and not self.faults.fault.calls & Calls.PUNCH:
            self._check_goes_on("new")  # less tidy than it could be, or removing the record failed
        elif self.error is None:
            self._check_goes_on("new")
        else:
            self._check_failed()
        return fired

    def _try(self) -> None:
        self.error = None
        try:
            self.work.run()
        except (Qcow2Error, OSError) as error:
            self.error = error

    def _check_failed(self) -> None:
        work = self.work
        if any(image.file.failure for image in work.images):
            return self._check_latched()
        if isinstance(self.error, UnfinishedTransactionError):
            raise WrongError(f"{self.error!r}, and no image knows of it")
        if work.record.content is not None:
            raise WrongError(f"the record is left after {self.error!r}")
        self._check_names("old")
        self._try()
        if self.error is not None:
            raise WrongError(f"it fails again: {self.error!r}")
        return self._check_goes_on("new")

    def _check_latched(self) -> None:
        """Some images take no changes any more; the next look at each decides by the record."""
        has_happened = isinstance(self.error, UnfinishedTransactionError)
        forgotten(self.work.images)
        is_alone = not any(content for _, content in self.work.record.versions)
        self._check_sides("new" if has_happened else "old", is_alone=is_alone)

    def _check_goes_on(self, side: str) -> None:
        """All images are on this side, can be written to, and are so on disk when they are closed."""
        self._check_names(side)
        try:
            self.work.write_after()
            self.work.close()
        except (Qcow2Error, OSError) as error:
            raise WrongError(f"an image does not go on: {error!r}") from error
        self._check_sides(side)
        for number, storage in enumerate(self.work.storages):
            if check_image(storage.content).all_leaks:
                raise WrongError(f"image {number} has leaks")

    def _check_names(self, side: str) -> None:
        work = self.work
        for number, image in enumerate(work.images):
            expected = (work.case.new if side == "new" else work.case.old)[number]
            if {bitmap.name: bitmap.auto for bitmap in image.bitmaps()} != expected:
                raise WrongError(f"image {number} has the bitmaps {image.bitmaps()}")

    def _check_sides(self, side: str, *, is_alone: bool = False) -> None:
        """All images are on this side; if there is but one to change, on either."""
        work = self.work
        sides = {
            judge_one(number, bytes(storage.content), work.record.content, work)
            for number, storage in enumerate(work.storages)
        }
        if sides - {EITHER} != {side} and not (is_alone and len(sides - {EITHER}) == 1):
            raise WrongError(f"the images are {sides}, not {side}, after {self.error!r}")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize("name", NAMES)
def test_faults_at_every_call(name: str, fault: Fault) -> None:
    at = 0
    try:
        while Faulted(CASES[name], fault, at).run():
            at += 1
    except WrongError as error:
        pytest.fail(f"{name}: {fault.name} at call {at}: {error}", pytrace=False)
    assert at > 5 or fault.calls & (Calls.PUNCH | Calls.READ) or fault.grows


# ---- the record


def fail(verb: str, error: BaseException, *, after: bool = False) -> Work:
    """The work, with the record failing at this."""
    work = Work(CASES["4096"])
    work.write_before()

    def refuse(asked: str) -> None:
        if asked == verb:
            raise error

    if after:
        work.record.after = refuse
    else:
        work.record.before = refuse
    return work


def sides(work: Work, content: bytes | None) -> set[str]:
    contents = [bytes(storage.content) for storage in work.storages]
    return {judge_one(number, each, content, work) for number, each in enumerate(contents)}


@pytest.mark.parametrize("verb", ["create", "switch"])
def test_a_record_that_cannot_be_written_takes_everything_back(verb: str) -> None:
    work = fail(verb, NO_ROOM)
    with pytest.raises(OSError, match="No space"):
        work.run()
    assert work.record.content is None
    assert [set(map(lambda bitmap: bitmap.name, image.bitmaps())) for image in work.images] == [
        set(each) for each in work.case.old
    ]
    work.record.before = lambda verb: None
    work.run()
    work.write_after()
    work.close()
    assert sides(work, None) == {"new"}


@pytest.mark.parametrize("after", [False, True])
def test_a_record_in_doubt_stops_all_images(after: bool) -> None:
    work = fail("switch", UnfinishedTransactionError("nobody knows"), after=after)
    with pytest.raises(UnfinishedTransactionError):
        work.run()
    for image in work.images:
        with pytest.raises(Qcow2Error, match="no change is taken"):
            image.write_from(bytes(GRANULE), 0)
        assert image.pread(GRANULE, 0)
    forgotten(work.images)
    assert work.record.content is not None
    assert sides(work, work.record.content) == {"new" if after else "old"}
    contents = [content for _, content in work.record.versions if content is not None]
    for content in contents:
        assert len(sides(work, content)) == 1


@pytest.mark.parametrize("after", [False, True])
def test_a_record_that_cannot_be_removed_does_no_harm(after: bool) -> None:
    work = fail("remove", OSError(errno.EIO, "broken"), after=after)
    work.run()
    work.write_after()
    work.close()
    assert sides(work, work.record.content) == {"new"}


def test_interrupted_by_the_user() -> None:
    work = fail("create", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        work.run()
    work.record.before = lambda verb: None
    work.run()
    work.close()
    assert sides(work, None) == {"new"}


@pytest.mark.parametrize("after", [False, True])
def test_interrupted_at_the_commit_takes_nothing_back(after: bool) -> None:
    """What has been decided is not known here, and with some marks off and some not the images would differ."""
    work = fail("switch", KeyboardInterrupt(), after=after)
    with pytest.raises(KeyboardInterrupt):
        work.run()
    assert all(image.file.failure for image in work.images)
    forgotten(work.images)
    assert work.record.content is not None
    assert sides(work, work.record.content) == {"new" if after else "old"}
