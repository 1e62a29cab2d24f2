"""Every change to a header is whole after a crash, a torn write or a failure, or has not happened."""

from __future__ import annotations

import errno

import pytest

from qcow2_plugin.engine import header_rewrite
from qcow2_plugin.engine.header_rewrite import Step
from qcow2_plugin.engine.image_file import ImageFile
from qcow2_plugin.errors import HeaderFullError
from qcow2_plugin.format.header import Header
from tests.crash.header_work import CASES, LONGER, SHAPES, Said, Work
from tests.crash.scenario import WrongError
from tests.support.faulty import FAULTS, Calls, Fault, Faults, FaultyStorage
from tests.support.fields import FEATURE_NAMES
from tests.support.headers import header_bytes
from tests.support.memory_storage import MemoryStorage
from tests.support.recording import Log, RecordingStorage, touched


@pytest.mark.parametrize("shape", SHAPES)
def test_a_crash_leaves_the_old_header_or_the_new_one(shape: str) -> None:
    states = {change: Work(shape, change).crash() for kind, change in CASES if kind == shape}
    assert sum(states.values()) >= 2 * len(states) - (8 if "small" in shape else 0), states


def test_no_write_that_matters_is_of_two_sectors() -> None:
    """Of each change: what the header in force makes use of changes by writes inside one sector."""
    for shape, change in CASES:
        try:
            log, _ = Work(shape, change).recorded()
        except HeaderFullError:
            continue
        content = bytearray(SHAPES[shape])
        for call in log.calls:
            if not call.length:
                continue
            said = Said.by(content)
            for number, data in call.sectors.items():
                content[512 * number : 512 * number + 512] = data
            if Said.by(content) != said:
                assert len(touched(call.offset, call.length)) == 1, (shape, change)


def test_a_change_of_one_sector_is_one_write() -> None:
    for shape in ("bitmaps behind the first sector", "bitmaps across the first sector", "everything"):
        log, _ = Work(shape, "bitmaps").recorded()
        assert sum(call.length > 0 for call in log.calls) == 1, shape
    log, after = Work("as QEMU makes it", "bitmaps").recorded()
    assert sum(call.length > 0 for call in log.calls) > 1
    assert after.index(b"\x23\x85\x28\x75") == 112  # so that the next change is one


def _merged(steps: list[Step], first: int) -> list[Step]:
    """Two steps without a barrier between them, if there are so many."""
    if first + 1 >= len(steps):
        return steps
    writes = [*steps[first].writes, *steps[first + 1].writes]
    return [*steps[:first], Step(writes, steps[first + 1].header or steps[first].header), *steps[first + 2 :]]


@pytest.mark.parametrize("missing", range(4))
def test_every_barrier_is_needed(missing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a detour: bridged header > switch > tidy header > switch."""
    plan = header_rewrite.plan_rewrite
    monkeypatch.setattr("qcow2_plugin.engine.image_file.plan_rewrite", lambda *told: _merged(plan(*told), missing))
    with pytest.raises(WrongError, match=r"a mixture|cannot be read"):
        Work("overlay, long name", "long name").crash()


def test_a_header_in_one_write_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(stored: bytes, old: Header, new: Header) -> list[Step]:
        packed = new.laid_out().pack()
        return [Step([(0, packed)], new.laid_out())]

    monkeypatch.setattr("qcow2_plugin.engine.image_file.plan_rewrite", at_once)
    with pytest.raises(WrongError, match=r"a mixture|cannot be read"):
        Work("overlay, long name", "long name").crash()


# ---- failures


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_after_a_failed_call_the_header_is_known_or_the_image_takes_no_more(fault: Fault) -> None:
    hits = 0
    for shape, change in CASES:
        work, at = Work(shape, change), 0
        while _fails_soundly(work, fault, at):
            at += 1
        hits += at
    assert hits > 50 or fault.calls & (Calls.PUNCH) or fault.grows


def _fails_soundly(work: Work, fault: Fault, at: int) -> bool:
    """With a fault at the `at`-th call; False if there is none."""
    faults = Faults(fault)
    storage = FaultyStorage(Log(), 0, SHAPES[work.shape], "image", faults)
    file = work.open(storage)
    old = Said.by(storage.content)
    faults.arm(at)
    error = _error_of(work, file)
    if not faults.fired:
        return False
    faults.clear()
    said = Said.by(storage.content)
    if error is None or file.failure is None:
        assert Said.by(file.header.pack().ljust(len(storage.content), b"\0")) == said, "memory and disk disagree"
    if error is not None and file.failure is None:
        assert said == old, "an error, and a new header"
        again = _error_of(work, file)
        assert again is None or isinstance(again, HeaderFullError)
    elif error is None:
        work.apply(work.open(storage))
        assert Said.by(storage.content) == said
    return True


def _error_of(work: Work, file: ImageFile) -> OSError | HeaderFullError | None:
    try:
        work.apply(file)
    except (OSError, HeaderFullError) as error:
        return error
    return None


# ---- no room


@pytest.mark.parametrize(
    ("cluster_bits", "old", "new"),
    [(9, b"base.raw", LONGER), (9, None, LONGER), (9, b"b" * 300, b"c" * 400), (10, b"b" * 700, b"c" * 700)],
)
def test_a_header_without_room_is_refused_and_nothing_changes(cluster_bits: int, old: bytes | None, new: bytes) -> None:
    before = header_bytes(cluster_bits=cluster_bits, backing=old)
    storage = RecordingStorage(Log(), 0, before, "image")
    file = Work("", "").open(storage)
    header = file.header
    with pytest.raises(HeaderFullError, match=r"no room for the new header beside the old one.*\(image\)") as caught:
        file.update_header(backing_file=new)
    assert caught.value.errno == errno.ENOSPC
    assert (file.header, file.failure, bytes(storage.content), storage.log.calls) == (header, None, before, [])


def test_the_names_of_features_go_where_they_leave_no_room() -> None:
    extensions = [(FEATURE_NAMES, bytes(48 * 50))]
    before = header_bytes(cluster_bits=12)
    storage = MemoryStorage(before)
    file = Work("", "").open(storage)
    for kind, data in extensions:
        file.update_header(extensions=file.header.with_extension(kind, data).extensions)
    file.update_header(backing_file=b"b" * 700)
    file.update_header(backing_file=b"c" * 800, size=1 << 18)
    assert file.header.extension_data(FEATURE_NAMES) is None
    assert Header.parse(bytes(storage.content)).backing_file == b"c" * 800
