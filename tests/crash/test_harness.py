"""The crash suite itself: its states are those of the model, and its oracles tell right orders of writes from wrong."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Iterator

import pytest

from tests.crash.history import History, text
from tests.crash.kinds import Kind, kind
from tests.crash.oracles import judge
from tests.crash.scenario import Scenario, WrongError
from tests.crash.workloads import workload
from tests.support.crash_states import Crashes, Form, State, sample
from tests.support.crash_states import Kind as Class
from tests.support.faulty import FAULTS, Fault, Faults, FaultyStorage
from tests.support.fields import COPIED
from tests.support.image_checker import OFFSET_MASK, HeaderFacts
from tests.support.recording import Log, RecordingStorage

SECTOR = 512
START = bytes(range(1, 9)) * (SECTOR * 12 // 8)


def storages(*contents: bytes) -> tuple[Log, list[RecordingStorage]]:
    log = Log()
    return log, [RecordingStorage(log, number, content) for number, content in enumerate(contents)]


def contents(crashes: Crashes, *classes: Class) -> set[tuple[bytes, ...]]:
    chosen = [plan for plan in crashes.plans() if not classes or plan.kind in classes]
    return {tuple(bytes(file.content()) for file in crashes.state(plan).files) for plan in chosen}


# ---- states


def some_calls(chance: random.Random, storage: RecordingStorage) -> None:
    """Whole sectors only: what a crash makes of them is easy to tell."""
    for _ in range(chance.randint(1, 5)):
        sector, count = chance.randrange(14), chance.randint(1, 3)
        pick = chance.randrange(6)
        if pick < 3:
            storage.write_from(chance.randbytes(count * SECTOR), sector * SECTOR)
        elif pick == 3:
            storage.write_zeroes(sector * SECTOR, count * SECTOR, may_punch=False)
        elif pick == 4:
            storage.punch(sector * SECTOR, count * SECTOR)
        else:
            storage.truncate(chance.randrange(6, 16) * SECTOR)


def applied(content: bytes, log: Log, calls: list[int]) -> bytes:
    """The file after these calls, byte by byte."""
    after, size = bytearray(content.ljust(64 * SECTOR, b"\0")), len(content)
    for number in calls:
        call = log.calls[number]
        if call.action.value == "truncate":
            after[call.size :] = bytes(64 * SECTOR - call.size)
            size = call.size
            continue
        after[call.offset : call.offset + call.length] = b"".join(call.sectors.values())
        if call.size > call.size_before:
            size = max(size, call.offset + call.length)
    return bytes(after[:size])


@pytest.mark.parametrize("seed", range(30))
def test_subsets_are_all_subsets(seed: int) -> None:
    chance = random.Random(seed)
    log, (storage,) = storages(START)
    expected = set()
    durable = START
    for _ in range(3):
        first = log.now
        some_calls(chance, storage)
        pending = list(range(first, log.now))
        for mask in range(1 << len(pending)):
            there = [number for index, number in enumerate(pending) if mask >> index & 1]
            expected.add((applied(durable, log, there),))
        durable = applied(durable, log, pending)
        assert durable == bytes(storage.content)
        storage.barrier()
    found = contents(Crashes(log, (START,)), Class.SUBSET)
    assert found == expected


def test_states_are_equal_when_their_keys_are() -> None:
    log, (storage,) = storages(START)
    for seed in range(4):
        some_calls(random.Random(seed), storage)
        storage.barrier()
    crashes = Crashes(log, (START,))
    by_key: dict[tuple[int, ...], bytes] = {}
    for plan in crashes.plans():
        state = crashes.state(plan)
        content = bytes(state.files[0].content())
        assert by_key.setdefault(state.key, content) == content
    assert len(set(by_key.values())) == len(by_key)


def test_many_calls_get_bounded_subsets() -> None:
    log, (storage,) = storages(START)
    for number in range(15):
        storage.write_from(bytes([number]) * SECTOR, number * SECTOR)
    plans = [plan for plan in Crashes(log, (START,)).plans() if plan.kind is Class.SUBSET]
    assert len(plans) == 15 + 15 + 15 * 14 // 2 + 32
    chosen = [plan.recipes[0].chosen for plan in plans]
    assert {1 << index for index in range(15)} <= set(chosen)
    assert {(1 << 15) - 1 - (1 << index) for index in range(15)} <= set(chosen)


def test_a_write_is_torn_between_sectors_only() -> None:
    log, (storage,) = storages(START)
    new = b"\xaa" * (4 * SECTOR)
    storage.write_from(new, SECTOR)
    found = contents(Crashes(log, (START,)), Class.TORN)
    patterns = {
        "".join("n" if content[at : at + SECTOR] == new[:SECTOR] else "o" for at in range(SECTOR, 5 * SECTOR, SECTOR))
        for (content,) in found
    }
    assert {"nooo", "onnn", "nnno", "ooon", "nnoo", "oonn"} <= patterns
    assert patterns & {"nonn", "nnon"}
    assert all(
        content[:SECTOR] == START[:SECTOR] and content[5 * SECTOR :] == START[5 * SECTOR :] for (content,) in found
    )


def test_a_sector_is_written_with_what_it_held() -> None:
    """A later write to the same sector cannot arrive without an earlier one to the other half of it."""
    log, (storage,) = storages(START)
    storage.write_from(b"a" * 100, 0)
    storage.write_from(b"b" * 100, 200)
    firsts = {
        (content[:100] == b"a" * 100, content[200:300] == b"b" * 100) for (content,) in contents(Crashes(log, (START,)))
    }
    assert firsts == {(False, False), (True, False), (True, True)}


def test_size_and_data_of_an_append_come_apart() -> None:
    log, (storage,) = storages(START)
    storage.write_from(b"n" * SECTOR, len(START))
    found = contents(Crashes(log, (START,)), Class.SIZE)
    assert found == {(START + bytes(SECTOR),), (START,)}


def test_a_write_behind_the_end_is_not_there_without_the_call_that_moved_it() -> None:
    log, (storage,) = storages(START)
    storage.truncate(len(START) + SECTOR)
    storage.write_from(b"n" * SECTOR, len(START))
    found = contents(Crashes(log, (START,)), Class.SUBSET)
    assert found == {(START,), (START + bytes(SECTOR),), (START + b"n" * SECTOR,)}


def test_a_file_that_ends_inside_a_sector_loses_the_rest_of_it() -> None:
    """The sector is there whole, but the file ends where it ended."""
    start = START[: SECTOR + 100]
    log, (storage,) = storages(start)
    storage.write_from(b"n" * SECTOR, SECTOR)
    assert (start[:SECTOR] + b"n" * 100,) in contents(Crashes(log, (start,)), Class.SIZE)


def test_a_punch_comes_early_late_or_not() -> None:
    log, (storage,) = storages(START)
    storage.write_from(b"1" * SECTOR, 0)
    storage.punch(0, SECTOR)
    storage.write_from(b"2" * SECTOR, 0)
    crashes = Crashes(log, (START,))
    plans = {plan.recipes[0].form: plan for plan in crashes.plans() if plan.kind is Class.PUNCH}
    late = crashes.state(plans[Form.LAST]).files[0].content()
    assert bytes(late[:SECTOR]) == bytes(SECTOR)
    assert bytes(crashes.state(plans[Form.FIRST]).files[0].content()[:SECTOR]) == b"2" * SECTOR


def test_two_files_have_no_order_without_barriers() -> None:
    log, files = storages(START, START)
    for number in range(2):
        for storage in files:
            storage.write_from(bytes([number + 1]) * SECTOR, number * SECTOR)
    found = contents(Crashes(log, (START, START)), Class.FILES)
    assert len(found) == 9  # each file after 0, 1 or 2 of its calls


def test_a_barrier_is_of_one_file() -> None:
    log, files = storages(START, START)
    files[0].write_from(b"n" * SECTOR, 0)
    files[0].barrier()
    files[1].write_from(b"n" * SECTOR, 0)
    files[0].write_from(b"m" * SECTOR, 0)
    files[1].barrier()
    last = len(Crashes(log, (START, START)).intervals) - 1
    states = [state for state in states_of(Crashes(log, (START, START))) if state[0] == last]
    assert {bytes(state.files[1].content()[:1]) for _, state in states} == {b"n"}
    assert {bytes(state.files[0].content()[:1]) for _, state in states} == {b"n", b"m"}


def states_of(crashes: Crashes) -> Iterator[tuple[int, State]]:
    for plan in crashes.plans():
        yield plan.interval, crashes.state(plan)


def test_after_a_failed_barrier_anything_before_may_be_lost() -> None:
    log = Log()
    faults = Faults(next(fault for fault in FAULTS if fault.name == "barrier error"))
    storage = FaultyStorage(log, 0, START, "file", faults)
    storage.write_from(b"1" * SECTOR, 0)
    storage.write_from(b"2" * SECTOR, SECTOR)
    faults.arm(0)
    with pytest.raises(OSError, match="Input/output"):
        storage.barrier()
    storage.write_from(b"3" * SECTOR, 2 * SECTOR)
    storage.barrier()
    crashes = Crashes(log, (START,))
    last = len(crashes.intervals) - 1
    found = {bytes(state.files[0].content()) for number, state in states_of(crashes) if number == last}
    firsts = {
        (content[:1] == b"1", content[SECTOR : SECTOR + 1] == b"2", content[2 * SECTOR : 2 * SECTOR + 1] == b"3")
        for content in found
    }
    assert firsts == {(one, two, True) for one in (False, True) for two in (False, True)}
    assert all(plan.kind is Class.FAILED for plan in crashes.plans() if plan.interval == last)


def test_a_crash_comes_after_the_last_call_that_is_there() -> None:
    log, (storage,) = storages(START)
    for number in range(3):
        storage.write_from(bytes([number]) * SECTOR, number * SECTOR)
    storage.barrier()
    crashes = Crashes(log, (START,))
    by_mask = {
        plan.recipes[0].chosen: crashes.state(plan)
        for plan in crashes.plans()
        if plan.kind is Class.SUBSET and not plan.interval
    }
    assert [by_mask[mask].earliest for mask in (0, 1, 2, 4, 7)] == [0, 1, 2, 3, 3]
    assert {state.latest for state in by_mask.values()} == {3}


def test_plans_are_the_same_in_every_run_and_samples_take_every_class() -> None:
    chosen = workload("small/write_across+discard/each/0")
    runs = []
    for _ in range(2):
        scenario = Scenario.of(chosen.kind)
        scenario.run(chosen.requests)
        runs.append(Crashes(scenario.log, scenario.initial).plans())
    assert runs[0] == runs[1]
    firsts = {plan.kind for _, plan in itertools.islice(sample(runs[0], "seed"), 10)}
    assert firsts == {plan.kind for plan in runs[0]}


# ---- faults


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_hit_the_call_that_they_are_told(fault: Fault) -> None:
    log = Log()
    faults = Faults(fault)
    storage = FaultyStorage(log, 0, START, "file", faults)
    actions = [
        lambda: storage.pread(10, 0),
        lambda: storage.write_from(b"x" * 2 * SECTOR, len(storage.content) - SECTOR),
        lambda: storage.write_zeroes(0, SECTOR, may_punch=True),
        lambda: storage.punch(0, SECTOR),
        lambda: storage.truncate(20 * SECTOR),
        storage.barrier,
    ]
    failed = []
    for at in range(3):
        faults.arm(at)
        failed.append(sum(raises(action, fault.errno) for action in actions * 3))
    assert failed[0] >= 1
    assert all(count == 1 for count in failed) or fault.sticky


def raises(action: object, errno: int) -> bool:
    try:
        action()  # type: ignore[operator] # a callable
    except OSError as error:
        assert error.errno == errno
        return True
    return False


# ---- the model of a disk


def test_what_a_sector_may_hold() -> None:
    history = History(bytes(4 * SECTOR))
    write = history.begin("write", 0)
    history.write(write, SECTOR, b"w" * SECTOR)
    history.end(write, 2)
    flush = history.begin("flush", 2)
    history.flushed(flush, 5)
    again = history.begin("again", 5)
    history.write(again, SECTOR + 100, b"a" * 10)
    history.end(again, 6)

    def disk(sector: bytes) -> bytes:
        return bytes(SECTOR) + sector.ljust(SECTOR, b"\0") + bytes(2 * SECTOR)

    both = b"w" * 100 + b"a" * 10 + b"w" * (SECTOR - 110)
    assert history.violation(disk(b""), 0) is None
    assert history.violation(disk(b"w" * SECTOR), 0) is not None, "not begun yet"
    assert history.violation(disk(b""), 4) is None
    assert history.violation(disk(b"w" * SECTOR), 4) is None
    assert history.violation(disk(both), 5) is not None, "not begun yet"
    assert history.violation(disk(b""), 5) is not None, "was flushed"
    assert history.violation(disk(b"w" * SECTOR), 6) is None
    assert history.violation(disk(both), 6) is None
    assert history.violation(disk(b"w" * 100 + b"a" * 5 + b"w" * (SECTOR - 105)), 6) is not None, "torn"


def test_a_discard_leaves_old_or_zeros_until_it_is_known() -> None:
    old = b"o" * SECTOR
    history = History(old * 2)
    discard = history.begin("discard", 0)
    history.discard(discard, 0, SECTOR)
    history.end(discard, 1)
    assert history.settle(1, bytes(SECTOR) + old) is None
    for view in (old * 2, bytes(SECTOR) + old):
        assert history.violation(view, 1) is None
    assert history.violation(bytes(2 * SECTOR), 1) is not None
    flush = history.begin("flush", 1)
    history.flushed(flush, 2)
    assert history.violation(bytes(SECTOR) + old, 2) is None
    assert history.violation(old * 2, 2) is not None


def test_a_failed_request_leaves_old_or_new() -> None:
    old, new = b"o" * SECTOR, b"n" * SECTOR
    for found, problem in {old + old: False, new + old: False, new + new: False, b"x" * SECTOR + old: True}.items():
        history = History(old * 2)
        request = history.begin("write", 0)
        history.write(request, 0, new * 2)
        assert bool(history.settle(1, found)) is problem


def test_sizes() -> None:
    history = History(bytes(4 * SECTOR))
    shrink = history.begin("shrink", 0)
    history.resize(shrink, 2 * SECTOR)
    for size in (2, 4):
        assert history.violation(bytes(size * SECTOR), 1) is None
    history.end(shrink, 3, durable=True)
    assert history.violation(bytes(4 * SECTOR), 3) is not None
    grow = history.begin("grow", 3)
    history.resize(grow, 6 * SECTOR)
    assert history.violation(bytes(4 * SECTOR) + b"x" * 2 * SECTOR, 4) is not None
    assert history.smallest(6 * SECTOR, 4) == 2 * SECTOR
    assert history.smallest(4 * SECTOR, 4) == 4 * SECTOR


# ---- orders of writes, by hand


class ByHand:
    """A write to a cluster that was not there, each step of it a call to the storage."""

    def __init__(self) -> None:
        self.kind: Kind = kind("small")
        self.scenario = Scenario.of(self.kind)
        self.storage = self.scenario.storages[0]
        header = HeaderFacts.read(self.kind.content)
        self.guest_cluster = self.kind.spots["none"][0]
        self.place = -(-len(self.kind.content) // 512) * 512
        (l1_entry,) = struct.unpack_from(">Q", self.kind.content, header.l1_table_offset)
        self.l2_entry = (l1_entry & OFFSET_MASK) + 8 * self.guest_cluster
        (block,) = struct.unpack_from(">Q", self.kind.content, header.refcount_table_offset)
        self.refcount = block + 2 * (self.place // 512)
        self.offset = self.guest_cluster * 512
        self.data = text("hand", self.offset, 512)
        self.storage.write_from(bytes(8), 88)  # feature bits that are not true any more
        self.storage.barrier()

    def run(self, steps: str) -> None:
        """One letter a step: d data, r refcount, p pointer, | barrier; then it is flushed."""
        history, log = self.scenario.history, self.scenario.log
        number = history.begin("by hand", log.now)
        history.write(number, self.offset, self.data)
        history.end(number, log.now)
        flush = history.begin("flush", log.now)
        for step in steps:
            if step == "d":
                self.storage.write_from(self.data, self.place)
            elif step == "r":
                self.storage.write_from((1).to_bytes(2, "big"), self.refcount)
            elif step == "p":
                self.storage.write_from((self.place | COPIED).to_bytes(8, "big"), self.l2_entry)
            else:
                self.storage.barrier()
        history.flushed(flush, log.now)

    def judge(self) -> str | None:
        """What is wrong after some crash."""
        crashes = Crashes(self.scenario.log, self.scenario.initial)
        for plan in crashes.plans():
            try:
                judge(crashes.state(plan), self.scenario)
            except WrongError as error:
                return str(error)
        return None


def test_the_right_order_passes() -> None:
    hand = ByHand()
    hand.run("dr|p|")
    assert hand.judge() is None


@pytest.mark.parametrize(
    ("steps", "oracle"),
    [
        ("p|dr|", "O2"),
        ("drp|", "O2"),
        ("dp|r|", "O2"),
        ("d|p|r|", "O2"),
        ("r|p|d|", "O2"),  # a pointer past the end of the file
        ("dr|p", "O3"),  # flushed too early
        ("r|p|", "O2"),
    ],
)
def test_wrong_orders_do_not(steps: str, oracle: str) -> None:
    hand = ByHand()
    hand.run(steps)
    problem = hand.judge()
    assert problem is not None
    assert problem.startswith(oracle)


def test_old_data_where_new_was_flushed_is_noticed() -> None:
    hand = ByHand()
    hand.storage.write_from(b"stale" * 102 + b"xx", hand.place)
    hand.storage.barrier()
    hand.run("r|p|d|")
    assert (hand.judge() or "").startswith("O3")
