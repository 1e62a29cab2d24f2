"""What a disk may hold, judged by a client's journal of what it asked for and when it was answered.

The clients tell the journal about every request before they send it and after it was answered, so it knows which
requests followed each other and which ran at the same time; connections and ranges may overlap as they like. A sector
may hold what some request gave it, unless a later one (sent after the first was answered) must have replaced it.

Which requests *must* show depends on what happened to the server: all that were answered, if it lives or has ended in
order; if it was killed, those answered before a flush was sent that was answered too, and those with FUA. A trim never
must: it leaves what was there, or zeros. A request without an answer may show, in part too.

Every write has contents of its own (`Journal.content`), so a sector tells which write it is from, and which sector.
It refuses to know how requests reach the server.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

SECTOR = 512
UNITS = SECTOR // 16
"""A write fills each sector with so many times its number and its place, 8 bytes each."""
NEVER = 1 << 62
"""A moment after all others."""

Moments = NDArray[np.int64]
"""For each sector of a range: when the last request that must show there was sent; 0 if none must."""


class Kind(Enum):
    WRITE = "write"
    ZERO = "zero"
    TRIM = "trim"


@dataclass(eq=False)
class Request:
    """Moments are those of the journal's clock, which ticks at every event; ranges are in sectors."""

    number: int
    kind: Kind
    first: int
    count: int
    durable: bool
    sent: int
    answered: int = NEVER
    refused: bool = False

    @property
    def range(self) -> slice:
        return slice(self.first, self.first + self.count)

    def __str__(self) -> str:
        told = f"{self.kind.value} {self.number}{' (FUA)' if self.durable else ''}, sent at {self.sent}"
        if self.answered != NEVER:
            return f"{told}, answered at {self.answered}"
        return f"{told}, {'refused' if self.refused else 'not answered'}"


class Journal:
    """The journal of a disk that held `base` at first. Any thread may call it.

    `name` tells the contents of one journal from those of another that wrote to the same disk before.
    """

    def __init__(self, base: bytes, name: int = 0) -> None:
        self.sector_count = len(base) // SECTOR
        self.requests: list[Request] = []
        self._base = np.frombuffer(base, np.uint64).reshape(self.sector_count, UNITS, 2)
        self._name = name
        self._clock = 0
        self._answered = np.zeros(self.sector_count, np.int64)
        self._durable = np.zeros(self.sector_count, np.int64)
        self._zeroed = np.zeros(self.sector_count, np.int64)
        """When the last request that left zeros there was answered."""
        self._open_zeroing: set[Request] = set()
        """Requests that leave zeros, not answered yet."""
        self._not_durable: list[Request] = []
        """Answered, and no flush has followed yet."""
        self._last_flush = 0
        self._lock = threading.Lock()

    # -- events --

    def send(self, kind: Kind, first: int, count: int, *, durable: bool = False) -> Request:
        """A request is about to be sent; `durable` means FUA."""
        with self._lock:
            request = Request(len(self.requests) + 1, kind, first, count, durable, self._tick())
            self.requests.append(request)
            if kind is not Kind.WRITE:
                self._open_zeroing.add(request)
            return request

    def answer(self, request: Request) -> None:
        """It was answered: done."""
        with self._lock:
            request.answered = self._tick()
            if request.kind is not Kind.WRITE:
                self._open_zeroing.discard(request)
                _raise(self._zeroed, request, request.answered)
            if request.kind is Kind.TRIM:
                return
            _raise(self._answered, request, request.sent)
            if request.durable:
                _raise(self._durable, request, request.sent)
            else:
                self._not_durable.append(request)

    def refuse(self, request: Request) -> None:
        """It was answered: nothing has been done."""
        with self._lock:
            request.refused = True
            self._open_zeroing.discard(request)

    def send_flush(self) -> int:
        """A flush is about to be sent; returns the moment."""
        with self._lock:
            return self._tick()

    def answer_flush(self, sent: int) -> None:
        """The flush that was sent then was answered: done."""
        with self._lock:
            if sent <= self._last_flush:
                return
            self._last_flush = sent
            for request in self._not_durable:
                if request.answered < sent:
                    _raise(self._durable, request, request.sent)
            self._not_durable = [request for request in self._not_durable if request.answered > sent]

    def content(self, request: Request) -> bytes:
        """What a write writes: each sector tells its journal, its request and its place, over and over."""
        units = np.empty((request.count, UNITS, 2), np.uint64)
        units[:, :, 0] = self._name << 32 | request.number
        units[:, :, 1] = np.arange(request.first, request.first + request.count, dtype=np.uint64)[:, np.newaxis]
        return units.tobytes()

    # -- judgement --

    def answered(self, first: int, count: int) -> Moments:
        """What must show in a range from now on, for `objections` to a read that is sent after this."""
        with self._lock:
            return self._answered[first : first + count].copy()

    def objections_after_kill(self, disk: bytes) -> list[str]:
        """What is wrong with the disk of a server that was killed; empty if nothing."""
        return self.objections(0, disk, self._durable)

    def objections_after_shutdown(self, disk: bytes) -> list[str]:
        """What is wrong with the disk of a server that has ended in order; empty if nothing."""
        return self.objections(0, disk, self._answered)

    def objections(self, first: int, data: bytes, must_show: Moments, *, torn: bool = False) -> list[str]:
        """One for each sector that holds what it must not, in the range that starts at sector `first`.

        With `torn`, a sector may be a mixture of what it may hold, as when it is read while it is written.
        """
        units = np.frombuffer(data, np.uint64).reshape(-1, UNITS, 2)
        must_show = must_show[:, np.newaxis]
        with self._lock:
            base = (units == self._base[first : first + len(units)]).all(axis=2) & (must_show == 0)
            zero = (units == 0).all(axis=2) & (self._zeroed_by_now(first, len(units))[:, np.newaxis] >= must_show)
            written = self._written(first, units) >= must_show
        allowed = base.all(axis=1) | zero.all(axis=1) | (written.all(axis=1) & (units == units[:, :1]).all(axis=(1, 2)))
        if torn:
            allowed |= (base | zero | written).all(axis=1)
        return [
            self._objection(first + int(index), units[index], int(must_show[index, 0]))
            for index in np.flatnonzero(~allowed)
        ]

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _zeroed_by_now(self, first: int, count: int) -> Moments:
        """When the last zeros came; -1 where none did."""
        moments = np.where(self._zeroed == 0, -1, self._zeroed)
        for request in self._open_zeroing:
            moments[request.range] = NEVER
        return moments[first : first + count]

    def _written(self, first: int, units: NDArray[np.uint64]) -> Moments:
        """For each unit, when the write that it holds was answered; -1 if it holds no write of this journal."""
        sectors = np.arange(first, first + len(units))[:, np.newaxis]
        numbers = (units[:, :, 0] & np.uint64(0xFFFF_FFFF)).astype(np.int64)
        ours = (units[:, :, 0] >> np.uint64(32) == self._name) & (units[:, :, 1] == sectors)
        moments = np.full(numbers.shape, -1, np.int64)
        for number in np.unique(numbers[ours]):
            if not 0 < number <= len(self.requests):
                continue
            request = self.requests[number - 1]
            inside = (sectors >= request.first) & (sectors < request.first + request.count)
            if request.kind is Kind.WRITE:
                moments[ours & (numbers == number) & inside] = request.answered
        return moments

    def _objection(self, sector: int, units: NDArray[np.uint64], must_show: int) -> str:
        covering = [each for each in self.requests if each.first <= sector < each.first + each.count]
        history = "; ".join(str(each) for each in covering[-8:])
        told = ", ".join(_told(unit) for unit in np.unique(units, axis=0)[:3].tolist())
        return f"sector {sector} holds {told}; what was sent at {must_show} must show. Its requests: {history}"


def _told(unit: list[int]) -> str:
    name, number = divmod(unit[0], 1 << 32)
    return f"write {number} of journal {name} to sector {unit[1]}" if any(unit) else "zeros"


def _raise(moments: Moments, request: Request, moment: int) -> None:
    np.maximum(moments[request.range], moment, out=moments[request.range])
