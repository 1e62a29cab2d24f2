"""A crash during a change of bitmaps on several images leaves all of them changed or none, and no change is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qcow2_plugin.engine.dirty_bitmaps import unfinished
from qcow2_plugin.engine.dirty_bitmaps.bitmap_changes import Prepared
from qcow2_plugin.engine.dirty_bitmaps.unfinished import Decided
from qcow2_plugin.engine.image_file import ImageFile
from qcow2_plugin.engine.writable import WritableImage
from qcow2_plugin.errors import Qcow2Error
from qcow2_plugin.format.transaction import committed, unmarked
from qcow2_plugin.operations.transaction import Transaction
from tests.crash.campaign import DEPTH
from tests.crash.scenario import WrongError
from tests.crash.transactions import CASES, Case, KeptRecord, Work, judge, judge_recovery, judge_settling
from tests.support.crash_states import Crashes, sample

IS_DEEP = DEPTH > 1
STATES = 100_000 if IS_DEEP else 500
AGAIN_EVERY = 5 if IS_DEEP else 40
Patch = pytest.MonkeyPatch


def crash(case: Case, states: int = STATES, again_every: int = AGAIN_EVERY) -> tuple[int, set[str]]:
    """How many different states were judged, and on which sides they were. Raises WrongError."""
    work = Work(case)
    work.do_all()
    if work.record.content is not None:
        raise WrongError("the record is left")
    crashes = Crashes(work.log, work.initial)
    seen: set[object] = set()
    sides: set[str] = set()
    for _, plan in sample(crashes.plans(), case.name):
        state = crashes.state(plan)
        what = state.key, tuple(work.record.possible(state))
        if what in seen:
            continue
        seen.add(what)
        sides |= judge(state, work)
        if len(seen) % again_every == 0:
            judge_settling(state, work)
        if len(seen) == states:
            break
    return len(seen), sides


@pytest.mark.parametrize("name", CASES)
def test_all_or_none(name: str) -> None:
    count, sides = crash(CASES[name])
    assert count > (30 if name == "alone" else 100)
    assert sides == {"old", "new"}


@pytest.mark.parametrize("name", [name for name in CASES if name != "alone"])
def test_recovery_may_crash(name: str) -> None:
    assert judge_recovery(name) > 20


# ---- broken transactions


def without_barriers(owner: Any, method: str) -> Callable[[Patch], None]:
    """A method during which nobody waits until something is durable."""

    def break_it(patch: Patch) -> None:
        original = getattr(owner, method)

        def broken(self: Any, *arguments: Any, **fields: Any) -> None:
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(ImageFile, "barrier", lambda self, storage=None: None)
                original(self, *arguments, **fields)

        patch.setattr(owner, method, broken)

    return break_it


def committed_before_the_marks(patch: Patch) -> None:
    original = KeptRecord.create

    def create(self: KeptRecord, told: Any) -> None:
        original(self, told)
        original(self, type(told)(told.id, True, told.images, told.begun))

    patch.setattr(KeptRecord, "create", create)


def recorded_after_the_marks(patch: Patch) -> None:
    patch.setattr(KeptRecord, "create", lambda self, told: None)


def record_removed_before_the_switches(patch: Patch) -> None:
    original = Transaction._publish

    def publish(self: Transaction) -> None:
        self._remove_record()
        original(self)

    patch.setattr(Transaction, "_publish", publish)


def first_image_switched_before_the_commit(patch: Patch) -> None:
    original = KeptRecord.switch

    def decide(self: Transaction) -> None:
        def switch(record: KeptRecord, told: Any) -> None:
            self._active[0].publish()
            original(record, told)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(KeptRecord, "switch", switch)
            original_decide(self)

    original_decide = Transaction._decide
    patch.setattr(Transaction, "_decide", decide)


def always_back(patch: Patch) -> None:
    patch.setattr(unfinished, "decide", lambda header, mark, record, path: Decided(unmarked(header), False))


def always_forward(patch: Patch) -> None:
    patch.setattr(unfinished, "decide", lambda header, mark, record, path: Decided(committed(header, mark), True))


def old_bitmaps_left_in_use(patch: Patch) -> None:
    original = WritableImage.settle_bitmaps

    def settle(self: WritableImage) -> None:
        original(self)
        self.tracker.begin()

    patch.setattr(WritableImage, "settle_bitmaps", settle)


def begun_images_stay_begun(patch: Patch) -> None:
    original = Prepared.publish

    def publish(self: Prepared, **fields: Any) -> None:
        original(self, **fields)
        self._image._has_begun = True

    patch.setattr(Prepared, "publish", publish)


def new_pointer_forgotten(patch: Patch) -> None:
    original = Prepared.publish

    def publish(self: Prepared, **fields: Any) -> None:
        self._image.file.update_header(**fields)
        self._image.file.barrier()
        original(self)

    patch.setattr(Prepared, "publish", publish)


MUTANTS: dict[str, Callable[[Patch], None]] = {
    "marks not durable before the commit": without_barriers(Transaction, "_decide"),
    "switches not durable before the record goes": without_barriers(Prepared, "publish"),
    "committed before the marks": committed_before_the_marks,
    "recorded after the marks": recorded_after_the_marks,
    "record removed before the switches": record_removed_before_the_switches,
    "first image switched before the commit": first_image_switched_before_the_commit,
    "always back": always_back,
    "always forward": always_forward,
    "old bitmaps left in use": old_bitmaps_left_in_use,
    "begun images stay begun": begun_images_stay_begun,
    "mark off before the pointer": new_pointer_forgotten,
}


def test_headers_that_are_not_durable_before_the_record_goes(monkeypatch: Patch) -> None:
    without_barriers(ImageFile, "update_header")(monkeypatch)  # which has some of its own
    judge_recovery("4096")
    monkeypatch.setattr(ImageFile, "barrier", lambda self, storage=None: None)
    with pytest.raises(WrongError):
        judge_recovery("4096")


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_transactions_are_caught(name: str, monkeypatch: Patch) -> None:
    MUTANTS[name](monkeypatch)
    with pytest.raises((WrongError, Qcow2Error, OSError)):
        for case in CASES.values():
            crash(case)
