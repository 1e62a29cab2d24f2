"""An amendment that is cut off anywhere, or in which a call fails, leaves the image sound and can be done again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.engine import amending, refcount_width, zero_expansion
from qcow2_plugin.engine.allocator import Allocator
from qcow2_plugin.errors import Qcow2Error
from tests.crash.amend_work import AMENDMENTS, Work
from tests.crash.mutants import BarrierSite, barrier_sites, skip_barrier
from tests.crash.scenario import WrongError
from tests.support.depth import examples
from tests.support.faulty import FAULTS, Calls, Fault, Faults, FaultyStorage
from tests.support.image_checker import check_image
from tests.support.recording import Log
from tests.support.tools import qemu_img

STATES = 40
CASES = list(AMENDMENTS)


def name_of(case: tuple[str, str]) -> str:
    return ": ".join(case)


def depth(count: int) -> int:
    return int(examples(count).max_examples)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_crash_leaves_the_old_or_the_new(case: tuple[str, str]) -> None:
    states = Work(*case).crash(depth(STATES))
    assert states >= 2


@pytest.mark.parametrize("case", [("new", "downgrade"), ("new overlay", "downgrade")], ids=name_of)
def test_a_downgrade_that_gives_back_places_in_between(case: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcow2_plugin.engine.allocator._MAX_RETIRED", 0)
    monkeypatch.setattr(zero_expansion, "_BATCH", 1)
    assert Work(*case).crash(depth(STATES)) >= 2


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_qemu_reads_what_comes_out(case: tuple[str, str], tmp_path: Path) -> None:
    work = Work(*case)
    _, after = work.recorded()
    if len(after) > 1:  # its data file has a name that leads nowhere
        qemu_img("info", _written(tmp_path / "image", after[0]))
        return
    (tmp_path / "backing").write_bytes(work.told.backing or b"")
    qemu_img("check", _written(tmp_path / "image", after[0]))
    qemu_img("convert", "-O", "raw", tmp_path / "image", tmp_path / "raw")
    raw = (tmp_path / "raw").read_bytes()
    assert raw[: len(work.told.view)] == work.told.view
    for wanted, view in work.told.snapshots.items():
        qemu_img("convert", "-l", f"snapshot.id={wanted.decode()}", "-O", "raw", tmp_path / "image", tmp_path / "raw")
        assert (tmp_path / "raw").read_bytes()[: len(view)] == view


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# ---- failures


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_after_a_failed_call_the_image_is_sound(case: tuple[str, str], fault: Fault) -> None:
    work = Work(*case)
    _, after = work.recorded()
    total = _calls(work, fault)
    step = max(total // depth(12), 1)
    for at in range(0, total, step):
        _fail(work, fault, at, after[0])


def _storages(work: Work, faults: Faults) -> list[FaultyStorage]:
    log = Log()
    return [FaultyStorage(log, number, content, "file", faults) for number, content in enumerate(work.told.files)]


def _calls(work: Work, fault: Fault) -> int:
    faults = Faults(fault)
    work.run(list(_storages(work, faults)))
    return faults.seen


def _fail(work: Work, fault: Fault, at: int, after: bytes) -> None:
    faults = Faults(fault)
    storages = _storages(work, faults)
    with faults.paused():
        image = work.open(list(storages))
    faults.arm(at)
    failure: Exception | None = None
    try:
        amending.amend(image, work.wanted)
    except (OSError, Qcow2Error) as error:
        failure = error
    faults.clear()
    contents = [bytes(storage.content) for storage in storages]
    work.judge(contents, after)
    with faults.paused():
        assert image.pread(512, 1024) == work.told.view[1024:1536]
        if image.file.failure is None:
            image.write_from(work.told.view[1024:1536], 1024)  # it goes on
            amending.amend(image, work.wanted)
            image.close()
            contents = [bytes(storage.content) for storage in storages]
            work.judge(contents, after)
            report = check_image(contents[0])
            assert report.header.version == check_image(after).header.version
            assert report.leaks == 0 or failure is not None
        else:
            assert failure is not None or fault.calls & Calls.PUNCH
            image.close()
            work.judge([bytes(storage.content) for storage in storages], after)


# ---- broken engines


MODULES = ("amending", "refcount_width", "zero_expansion")
NOT_NEEDED = {
    ("amending", "_record_sizes", 1): "the old table is freed later",
    ("refcount_width", "change_refcount_width", 1): "the old refcounts are freed later",
    ("zero_expansion", "_expand", 1): "another barrier comes before the version changes",
}


@pytest.mark.parametrize("site", [site for site in barrier_sites() if site.module in MODULES], ids=str)
def test_no_barrier_can_be_left_out(site: BarrierSite, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_barrier(monkeypatch, site)
    noticed = any(_is_wrong(case) for case in CASES)
    assert noticed is ((site.module, site.function, site.number) not in NOT_NEEDED)


def _is_wrong(case: tuple[str, str]) -> bool:
    try:
        Work(*case).crash(100)
    except WrongError:
        return True
    return False


def test_new_refcounts_that_do_not_count_themselves_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refcount_width, "_blocks", _blocks_without_themselves)
    with pytest.raises(WrongError):
        Work("new", "wider").crash(10)


def _blocks_without_themselves(allocator: Allocator, plan: Any, order: int) -> Any:
    plan = plan._replace(first=plan.first, table_clusters=-len(plan.slots))
    return _BLOCKS(allocator, plan, order)


_BLOCKS = refcount_width._blocks
