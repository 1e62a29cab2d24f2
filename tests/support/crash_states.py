"""What a crash can leave of recorded writes: every state that the model allows, or a fair sample of them.

The model: a barrier of a file makes all its earlier calls durable; of the calls after it, any may be on the disk. A
sector is written whole or not at all, nothing larger is; and the size of a file is on the disk by itself: what was
written past it cannot be seen. So between two barriers (of any file; in between, all that
may be missing only grows) the states of one file are

    prefix   the first calls, as when the program is killed
    subset   any others: all subsets of a few calls; of many, all without one, all alone, pairs, random ones
    torn     a call of several sectors of which only some arrived
    size     an appending write whose size arrived and whose data did not, or the reverse
    punch    space given back before or after everything else, or not
    files    two files: every prefix of the one with every prefix of the other
    failed   after a barrier that failed: its calls may be lost for good, whatever later barriers say

and of two files the states of one with nothing and with everything of the other. A `Plan` names a state in a few
numbers, cheap enough to list them all and choose; `Crashes.state` works it out. States are compared by a digest that
costs what was written, not what the file holds. Same log and seed, same plans in the same order.
"""

from __future__ import annotations

import enum
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tests.support.recording import SECTOR, ZERO_SECTOR, Action, Call, Log, sector_of, touched

ALL_SUBSETS = 8  # calls up to which every subset is taken
ALL_PAIRS = 20
RANDOM_SUBSETS = 32


class Kind(enum.Enum):
    """Which class of states a plan is from."""

    PREFIX = "prefix"
    SUBSET = "subset"
    TORN = "torn"
    SIZE = "size"
    PUNCH = "punch"
    FILES = "files"
    FAILED = "failed"


class Form(enum.Enum):
    """What happens to one of the calls to a file that may be missing."""

    CHOSEN = "chosen"
    """Nothing."""
    TORN = "torn"
    """Of its sectors only those whose bits are set in `sectors` are there."""
    WITHOUT_DATA = "without data"
    """Its size is there, but zeros instead of the data."""
    WITHOUT_SIZE = "without size"
    """Nothing is there past the size that the file had before it."""
    FIRST = "first"
    """It comes before all others."""
    LAST = "last"
    """It comes after all others."""


class Recipe(NamedTuple):
    """What happens to one file. Bit i of `chosen` says that call i is there, of those that may be missing; `form`
    happens to the one with the number `call`."""

    chosen: int
    form: Form = Form.CHOSEN
    call: int = -1
    sectors: int = 0

    def __str__(self) -> str:
        told = f" {self.form.value} {self.call}" if self.call >= 0 else ""
        return f"{self.chosen:#b}{told}" + (f" {self.sectors:#b}" if self.sectors else "")


class Plan(NamedTuple):
    """One state: the interval in which the crash comes, and a recipe for each file."""

    kind: Kind
    interval: int
    recipes: tuple[Recipe, ...]


class FileState:
    """One file: the sectors that differ from `initial`, the size, and a number that tells states apart."""

    __slots__ = ("digest", "initial", "sectors", "size")

    def __init__(self, initial: bytes, sectors: dict[int, bytes], size: int, digest: int) -> None:
        self.initial, self.sectors, self.size, self.digest = initial, sectors, size, digest

    @classmethod
    def of(cls, initial: bytes) -> FileState:
        """The file before any call."""
        return cls(initial, {}, len(initial), 0)

    def copy(self) -> FileState:
        return FileState(self.initial, self.sectors.copy(), self.size, self.digest)

    def content(self) -> bytearray:
        """The bytes of the file."""
        content = bytearray(self.initial[: self.size])
        content.extend(bytes(max(self.size - len(content), 0)))
        for number, data in self.sectors.items():
            start = number * SECTOR
            if start + SECTOR <= self.size:
                content[start : start + SECTOR] = data
            elif start < self.size:
                content[start:] = data[: self.size - start]
        return content

    def put(self, number: int, data: bytes) -> None:
        """Writes one sector."""
        old = self._sector(number)
        self.sectors[number] = data
        self.digest += _digest(number, data) - _digest(number, old)

    def apply(self, call: Call, *, mask: int = -1, without_data: bool = False) -> None:
        """Does what `call` did, to the sectors whose bits are set in `mask`, counted from its first."""
        if call.action is Action.TRUNCATE:
            self.cut(call.size)
            self.size = call.size
            return
        if call.action is Action.PREALLOCATE:
            self.size = max(self.size, call.size)
            return
        end = 0
        for index, (number, data) in enumerate(call.sectors.items()):
            if mask >> index & 1:
                self.put(number, self._zeroed(number, call) if without_data else data)
                end = min((number + 1) * SECTOR, call.offset + call.length)
        if call.size > call.size_before:  # else another call has made the room, if it is there
            self.size = max(self.size, end)

    def cut(self, size: int) -> None:
        """Loses everything from `size` on; the size stays."""
        behind = {number for number in self.sectors if (number + 1) * SECTOR > size}
        for number in behind.union(touched(size, max(self.size - size, 0))):
            keep = max(size - number * SECTOR, 0)
            kept = self._sector(number)[:keep].ljust(SECTOR, b"\0")
            self.put(number, kept if kept != ZERO_SECTOR else ZERO_SECTOR)

    def _zeroed(self, number: int, call: Call) -> bytes:
        """The sector before an appending call: what the file did not hold yet is zero."""
        keep = min(max(call.size_before - number * SECTOR, 0), SECTOR)
        return self._sector(number)[:keep].ljust(SECTOR, b"\0")

    def _sector(self, number: int) -> bytes:
        known = self.sectors.get(number)
        return sector_of(self.initial, number) if known is None else known


def _digest(number: int, data: bytes) -> int:
    return 0 if data is ZERO_SECTOR or data == ZERO_SECTOR else hash((number, data))


class _Pending(NamedTuple):
    """One file in one interval: what is durable, and the calls after that; `forced` ones are there in any case."""

    durable: FileState
    calls: tuple[int, ...]
    forced: frozenset[int]
    has_failed: bool

    @property
    def optional(self) -> list[int]:
        return [call for call in self.calls if call not in self.forced]


class _Interval(NamedTuple):
    """From one barrier to the next: numbers of calls, and the files at its end."""

    start: int
    end: int
    files: tuple[_Pending, ...]


class State(NamedTuple):
    """A disk after a crash. The crash came when at least `earliest` and at most `latest` calls had been made."""

    files: tuple[FileState, ...]
    earliest: int
    latest: int

    @property
    def key(self) -> tuple[int, ...]:
        """Equal for states with equal contents."""
        return tuple(number for file in self.files for number in (file.digest, file.size))


@dataclass(frozen=True)
class Crashes:
    """All crash states of a log over files that began as `initial`."""

    log: Log
    initial: tuple[bytes, ...]
    seed: int = 0

    @cached_property
    def intervals(self) -> list[_Interval]:
        """The times between barriers."""
        return list(_intervals(self.log.calls, self.initial))

    def plans(self) -> list[Plan]:
        """Every plan, in an order that depends on the log and the seed alone. Some lead to the same state."""
        plans: list[Plan] = []
        for number, interval in enumerate(self.intervals):
            plans.extend(self._plans(number, interval))
        return plans

    @property
    def nothing_lost(self) -> Plan:
        """The plan of the state in which all calls are there, as when the program is killed at the end."""
        every = tuple(Recipe((1 << len(pending.optional)) - 1) for pending in self.intervals[-1].files)
        return Plan(Kind.PREFIX, len(self.intervals) - 1, every)

    def state(self, plan: Plan) -> State:
        """Works out one state."""
        interval = self.intervals[plan.interval]
        last = interval.start - 1
        files = []
        for pending, recipe in zip(interval.files, plan.recipes, strict=True):
            file, last_call = self._file(pending, recipe)
            files.append(file)
            last = max(last, last_call)
        return State(tuple(files), last + 1, interval.end)

    def _file(self, pending: _Pending, recipe: Recipe) -> tuple[FileState, int]:
        """A file and the last call that left something in it."""
        file = pending.durable.copy()
        optional = {call: index for index, call in enumerate(pending.optional)}
        form, chosen = recipe.form, recipe.chosen
        told = self.log.calls[pending.optional[recipe.call]] if recipe.call >= 0 else None
        last = -1
        if told and form is Form.FIRST:
            file.apply(told)
        for number in pending.calls:
            call = self.log.calls[number]
            place = optional.get(number)
            if place is None or chosen >> place & 1:
                file.apply(call)
            elif place != recipe.call:
                continue
            elif form is Form.TORN:
                file.apply(call, mask=recipe.sectors)
            elif form is Form.WITHOUT_DATA:
                file.apply(call, without_data=True)
            last = number
        if told and form is Form.LAST:
            file.apply(told)
        if told and form is Form.WITHOUT_SIZE:
            file.size = min(file.size, told.size_before)
        file.cut(file.size)
        return file, last

    # ---- plans

    def _plans(self, number: int, interval: _Interval) -> Iterator[Plan]:
        chance = random.Random(f"{self.seed}/{number}")
        everything = [(1 << len(pending.optional)) - 1 for pending in interval.files]
        for file, pending in enumerate(interval.files):
            others = [(0, every) if every and place != file else (every,) for place, every in enumerate(everything)]
            others[file] = (0,)
            for kind, recipe in self._recipes(pending, chance):
                for choice in itertools.product(*others):
                    recipes = [Recipe(mask) for mask in choice]
                    recipes[file] = recipe
                    yield Plan(Kind.FAILED if pending.has_failed else kind, number, tuple(recipes))
        if sum(map(bool, everything)) > 1:
            prefixes = [[(1 << count) - 1 for count in range(every.bit_length() + 1)] for every in everything]
            for choice in itertools.product(*prefixes):
                yield Plan(Kind.FILES, number, tuple(Recipe(mask) for mask in choice))

    def _recipes(self, pending: _Pending, chance: random.Random) -> Iterator[tuple[Kind, Recipe]]:
        optional = pending.optional
        count = len(optional)
        every = (1 << count) - 1
        for length in range(count + 1):
            yield Kind.PREFIX, Recipe((1 << length) - 1)
        for mask in _subsets(count, chance):
            yield Kind.SUBSET, Recipe(mask)
        for index, number in enumerate(optional):
            call = self.log.calls[number]
            before, others = (1 << index) - 1, every & ~(1 << index)
            contexts = sorted({0, before, others})
            for mask in _tears(len(call.sectors), chance):
                for context in contexts:
                    yield Kind.TORN, Recipe(context, Form.TORN, index, mask)
            if call.size > call.size_before:
                for context in sorted({before, others}):
                    yield Kind.SIZE, Recipe(context, Form.WITHOUT_DATA, index)
                yield Kind.SIZE, Recipe(every, Form.WITHOUT_SIZE, index)
            if call.action is Action.TRUNCATE:
                yield from _moved(Kind.SIZE, index, others)
            elif call.action in (Action.PUNCH, Action.PUNCH_ZERO):
                yield from _moved(Kind.PUNCH, index, others)


def _moved(kind: Kind, index: int, others: int) -> Iterator[tuple[Kind, Recipe]]:
    """A call before all others, after all others, and not at all."""
    for form in (Form.FIRST, Form.LAST):
        yield kind, Recipe(others, form, index)
    yield kind, Recipe(others)


def _subsets(count: int, chance: random.Random) -> list[int]:
    """Masks of calls that are there."""
    if count <= ALL_SUBSETS:
        return list(range(1 << count))
    every = (1 << count) - 1
    alone = [1 << index for index in range(count)]
    masks = [every & ~mask for mask in alone] + alone
    if count <= ALL_PAIRS:
        masks += [first | second for first, second in itertools.combinations(alone, 2)]
    return masks + [chance.getrandbits(count) for _ in range(RANDOM_SUBSETS)]


def _tears(count: int, chance: random.Random) -> list[int]:
    """Masks of the sectors of one call that are there: cut in several places, either part kept; a hole inside."""
    if count < 2:
        return []
    every = (1 << count) - 1
    cuts = {1, count // 2, count - 1, chance.randrange(1, count)} - {0}
    heads = [(1 << cut) - 1 for cut in sorted(cuts)]
    masks = heads + [every & ~head for head in heads]
    if count > 2:
        masks.append(every & ~(1 << chance.randrange(1, count - 1)))
    return masks


def _intervals(calls: Sequence[Call], initial: Sequence[bytes]) -> Iterator[_Interval]:
    durable = [FileState.of(content) for content in initial]
    pending: list[list[int]] = [[] for _ in initial]
    forced: list[set[int]] = [set() for _ in initial]
    doubtful: list[set[int]] = [set() for _ in initial]
    start = 0

    def interval(end: int) -> _Interval:
        files = zip(durable, pending, forced, doubtful, strict=True)
        return _Interval(
            start, end, tuple(_Pending(d.copy(), tuple(p), frozenset(f), bool(lost)) for d, p, f, lost in files)
        )

    for number, call in enumerate(calls):
        file = call.file
        if call.action is not Action.BARRIER:
            pending[file].append(number)
            continue
        yield interval(number)
        start = number + 1
        if call.failed:
            doubtful[file].update(set(pending[file]) - forced[file])
        elif doubtful[file]:
            forced[file].update(set(pending[file]) - doubtful[file])
        else:
            for done in pending[file]:
                durable[file].apply(calls[done])
            pending[file].clear()
    yield interval(len(calls))


def sample(plans: Iterable[Plan], seed: str) -> Iterator[tuple[int, Plan]]:
    """The plans with their numbers, shuffled, those of every class in turn."""
    chance = random.Random(seed)
    by_kind: dict[Kind, list[tuple[int, Plan]]] = {}
    for number, plan in enumerate(plans):
        by_kind.setdefault(plan.kind, []).append((number, plan))
    for group in by_kind.values():
        chance.shuffle(group)
    while by_kind:
        for kind in list(by_kind):
            yield by_kind[kind].pop()
            if not by_kind[kind]:
                del by_kind[kind]
