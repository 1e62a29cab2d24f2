"""Faults: every storage call of some workloads fails once, in every way, on every kind of image.

The request says so with that error and leaves old or new data; nothing is corrupt; it succeeds when asked again. After
a failed barrier nothing is written any more, and what was flushed is there after a crash. QCOW2_TEST_DEPTH=deep takes
more workloads. How many calls were covered is printed at the end.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.storage import file
from tests.crash.campaign import DEPTH, FAULT_TALLIES, FaultTally
from tests.crash.faulted import run_all
from tests.crash.kinds import KINDS, kind
from tests.crash.oracles import judge_closed
from tests.crash.scenario import Scenario, WrongError
from tests.crash.workloads import RESIZING, Request, workload
from tests.support.faulty import FAULTS, Faults, FaultyStorage
from tests.support.in_memory import open_in_memory
from tests.support.recording import Log

IS_DEEP = DEPTH > 1
OPERATIONS = (
    "write_across", "zero_unmap+write_part", "discard+write_cluster", "write_durable+grow", "shrink+grow",
    "write_part+reopen+write_cluster",
)  # fmt: skip
DEEP_OPERATIONS = (
    "write_cluster+write_cluster", "zero_keep+write_part", "discard+discard", "grow+write_across",
    "write_across+shrink", "reopen+zero_unmap", "write_part+write_durable+discard+write_cluster",
)  # fmt: skip

pytestmark = pytest.mark.timeout(1800 if IS_DEEP else 120)


@pytest.mark.parametrize("kind_name", KINDS)
def test_every_call_fails_in_every_way(kind_name: str) -> None:
    tally = FAULT_TALLIES.setdefault(kind_name, FaultTally())
    problem = None
    for operations in OPERATIONS + DEEP_OPERATIONS * IS_DEEP:
        if not kind(kind_name).sizes and set(operations.split("+")) & set(RESIZING):
            continue
        for form in ("each", "late") if IS_DEEP else ("each",):
            chosen = workload(f"{kind_name}/{operations}/{form}/0")
            tally.workloads += 1
            for fault in FAULTS:
                try:
                    covered, total = run_all(chosen, fault)
                except WrongError as error:
                    problem = problem or str(error)
                    continue
                tally.covered[fault.name] += covered
                tally.total += total
                assert covered == total
    if problem:
        pytest.fail(problem, pytrace=False)


@pytest.mark.parametrize("kind_name", KINDS)
def test_opening_fails_at_every_read(kind_name: str) -> None:
    """The error comes through, nothing changes, and the next attempt succeeds."""
    files = kind(kind_name).files
    read_error = next(fault for fault in FAULTS if fault.name == "read error")
    at = 0
    while True:
        faults = Faults(read_error, at)
        log = Log()
        storages = [FaultyStorage(log, number, content, "file", faults) for number, content in enumerate(files)]
        data = storages[1] if len(storages) > 1 else None
        try:
            open_in_memory(storages[0], data, kind(kind_name).backing)
        except OSError as error:
            assert error.errno == errno.EIO
        else:
            assert not faults.fired
            break
        open_in_memory(storages[0], data, kind(kind_name).backing).close()
        assert not log.calls
        at += 1
    assert at >= 4


def test_a_full_disk_stops_nothing_that_needs_no_room() -> None:
    chosen = kind("small")
    faults = Faults(next(fault for fault in FAULTS if fault.name == "no room to grow"))
    scenario = Scenario.of(chosen, lambda log, number, content: FaultyStorage(log, number, content, "image", faults))
    there, nowhere = (chosen.spots[what][0] * chosen.cluster_size for what in ("data", "none"))
    scenario.do(Request("write", there, 512))
    faults.arm(0)
    for _ in range(3):
        scenario.do(Request("write", there, 512))
        scenario.do(Request("flush"))
        scenario.do(Request("zero", there, 512))
        assert scenario.problem() is None
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            scenario.do(Request("write", nowhere, 4096))
        assert scenario.problem() is None
    faults.clear()
    scenario.run([Request("write", nowhere, 4096), Request("flush"), Request("close")])
    judge_closed(scenario)


def test_calls_that_do_a_part_of_their_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system writes and reads less than it was asked to, and the files are those of a run in which it does not."""
    chosen = workload("small/write_across+discard+write_part/late/0")
    expected = Scenario.of(chosen.kind)
    expected.run(chosen.requests)
    path = tmp_path / "image"
    path.write_bytes(chosen.kind.content)
    real_write, real_read = os.pwritev, os.preadv

    def write_some(fd: int, buffers: list[memoryview], offset: int) -> int:
        return real_write(fd, [b"".join(buffers)[:100]], offset)

    def read_some(fd: int, buffers: list[memoryview], offset: int) -> int:
        return real_read(fd, [memoryview(buffers[0])[:100]], offset)

    monkeypatch.setattr(file, "pwritev", write_some)
    monkeypatch.setattr(file, "preadv", read_some)
    with open_image(path, writable=True) as image:
        scenario = Scenario.of(chosen.kind)
        for number, request in enumerate(chosen.requests[:-1]):
            clipped = scenario.clipped(request)
            scenario.history.begin("", 0)
            scenario.announce(number, clipped)
            scenario.image = image  # type: ignore[assignment] # one over a real file
            scenario.ask(clipped, number)
        assert image.pread(image.virtual_size, 0) == bytes(scenario.history.view)
    assert path.read_bytes() == expected.contents[0]
