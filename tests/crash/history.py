"""What a disk may hold after a crash: for every sector the last value that is safe, and each one issued later.

It owns the model of one disk under one client. Values are known when a request begins, because a part of it may be
on the disk before it ends; a request is durable when it was asked to be and has ended, or once a flush that began
after its end has ended. Times are numbers of storage calls, as in `crash_states`. `view` is what the disk reads as
while nothing goes wrong. It refuses to know the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tests.support.recording import SECTOR, ZERO_SECTOR, sector_of, touched

NEVER = 1 << 62
Sectors = npt.NDArray[np.uint64]


@dataclass
class Request:
    """One request: when it began, when it was answered, and since when it is durable."""

    name: str
    start: int
    end: int = NEVER
    durable: int = NEVER


@dataclass
class _Durable:
    """What is safe at some moment: the newest safe value of every sector, and what else each sector may hold instead.

    `last` says, for sectors that were ever touched, which request that value is of.
    """

    sectors: Sectors
    last: dict[int, int]


@dataclass
class History:
    """The requests to one disk, which began as `initial`. `backing` is what shows through where nothing is stored."""

    initial: bytes
    backing: bytes = b""
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.view = bytearray(self.initial)
        self._before: dict[int, bytes] = {}
        self.sizes: list[tuple[int, int]] = [(-1, len(self.initial))]
        self._values: dict[int, list[tuple[int, tuple[bytes, ...]]]] = {}
        self._changed: dict[int, set[int]] = {}
        self._durable: dict[tuple[int, ...], _Durable] = {}

    # ---- requests

    def begin(self, name: str, now: int) -> int:
        """The number of a request that begins now."""
        self._before = {}
        self.requests.append(Request(name, now))
        return len(self.requests) - 1

    def write(self, request: int, offset: int, data: bytes) -> None:
        """The request will put `data` there."""
        before = {sector: sector_of(self.view, sector) for sector in touched(offset, len(data))}
        self.view[offset : offset + len(data)] = data
        for sector, old in before.items():
            self._add(request, sector, old, sector_of(self.view, sector))

    def zero(self, request: int, offset: int, length: int) -> None:
        """The request will put zeros there."""
        self.write(request, offset, bytes(length))

    def discard(self, request: int, offset: int, length: int) -> None:
        """The request will put zeros there, or leave it; `settle` has to tell."""
        after = bytearray(self.view)
        after[offset : offset + length] = bytes(length)
        for sector in touched(offset, length):
            old = sector_of(self.view, sector)
            self._add(request, sector, old, old, sector_of(after, sector))

    def resize(self, request: int, size: int) -> None:
        """The request will give the disk another size."""
        for sector in touched(size, max(len(self.view) - size, 0)):  # cut off, one after the other
            old = sector_of(self.view, sector)
            self._add(request, sector, old, old, ZERO_SECTOR, sector_of(self.backing, sector))
        for sector in touched(len(self.view), max(size - len(self.view), 0)):
            self._add(request, sector, ZERO_SECTOR, ZERO_SECTOR)
        self.sizes.append((request, size))
        del self.view[size:]
        self.view.extend(bytes(size - len(self.view)))

    def end(self, request: int, now: int, *, durable: bool = False) -> None:
        """The request has succeeded."""
        told = self.requests[request]
        told.end = now
        if durable:
            told.durable = now

    def flushed(self, request: int, now: int) -> None:
        """The request was a flush and has succeeded."""
        flush = self.requests[request]
        for told in self.requests[:request]:
            if told.end <= flush.start:
                told.durable = min(told.durable, now)
        flush.end = flush.durable = now

    def settle(self, now: int, found: bytes) -> str | None:
        """The disk reads as `found`, and nothing is in flight; what of it cannot be after the last request.

        A request that failed has left its value or the one before in each sector, so has a discard; from now on the
        model knows which.
        """
        last = len(self.requests) - 1
        has_other_size = len(found) != len(self.view)
        if has_other_size:
            if len(found) not in [size for _, size in self.sizes[-2:]] or self.sizes[-1][0] != last:
                return f"the disk has {len(found)} bytes instead of {len(self.view)}"
            self.sizes.append((last + 1, len(found)))
            self.view = self.view[: len(found)].ljust(len(found), b"\0")
        differing = np.flatnonzero((as_sectors(found) != as_sectors(self.view)).any(axis=1)).tolist()
        values = {sector: sector_of(found, sector) for sector in differing}
        for sector, value in values.items():
            told = [each for request, each in self._values.get(sector, []) if request == last]
            if sector not in self._before or value not in (self._before[sector], *(told[0] if told else ())):
                return f"guest sector {sector} reads {shown(value)} instead of {shown(sector_of(self.view, sector))}"
        if values or has_other_size:
            request = self.begin("what was found", now)
            for sector, value in values.items():
                self._add(request, sector, sector_of(self.view, sector), value)
            self.end(request, now)
        self.view[:] = found
        return None

    def _add(self, request: int, sector: int, before: bytes, *values: bytes) -> None:
        self._before.setdefault(sector, before)
        if before not in values:
            self._changed.setdefault(request, set()).add(sector)
        self._values.setdefault(sector, []).append((request, tuple(dict.fromkeys(values))))

    # ---- after a crash

    def safe_requests(self, now: int) -> tuple[int, ...]:
        """The requests that are durable at that time."""
        return tuple(number for number, told in enumerate(self.requests) if told.durable <= now)

    def violation(self, view: bytes, now: int) -> str | None:
        """What is wrong with a disk that reads as `view` after a crash at that time."""
        size_problem = self._wrong_size(len(view), now)
        if size_problem:
            return size_problem
        durable = self._at(self.safe_requests(now))
        found = as_sectors(view)
        count = min(len(found), len(durable.sectors))
        wrong = np.flatnonzero((found[:count] != durable.sectors[:count]).any(axis=1)).tolist()
        wrong += [sector for sector in range(count, len(found)) if found[sector].any()]
        for sector in wrong:
            value = bytes(view[sector * SECTOR : (sector + 1) * SECTOR])
            if value not in self.allowed(sector, durable, now):
                return self._told(sector, value, durable)
        return None

    def allowed(self, sector: int, durable: _Durable, now: int) -> list[bytes]:
        """What the sector may hold after a crash at that time."""
        last = durable.last.get(sector, -1)
        values = [] if last >= 0 else [sector_of(self.initial, sector)]
        for request, told in self._values.get(sector, []):
            if request >= last and (request == last or self.requests[request].start < now):
                values.extend(told)
        return values

    def settled(self, now: int) -> npt.NDArray[np.bool_]:
        """The sectors whose newest value is safe at that time."""
        durable = self._at(self.safe_requests(now))
        settled = np.ones(len(durable.sectors), dtype=np.bool_)
        for sector, told in self._values.items():
            newest = max((request for request, _ in told if self.requests[request].start < now), default=-1)
            settled[sector] = newest <= durable.last.get(sector, -1)
        return settled

    def touched(self, now: int) -> set[int]:
        """The sectors that requests begun before that time were about."""
        told = self._values.items()
        return {sector for sector, each in told if any(self.requests[request].start < now for request, _ in each)}

    def smallest(self, size: int, now: int) -> int:
        """The smallest size that a disk which has `size` bytes after a crash at that time has ever had."""
        begun = [told for request, told in self.sizes if request < 0 or self.requests[request].start < now]
        last = max(number for number, told in enumerate(begun) if told == size)
        return min(begun[: last + 1])

    def changed(self, last: int) -> set[int]:
        """The sectors that requests up to number `last` have given another value."""
        return set().union(*(sectors for request, sectors in self._changed.items() if request <= last))

    def _wrong_size(self, size: int, now: int) -> str | None:
        safe = self.safe_requests(now)
        last = max((request for request, _ in self.sizes if request == -1 or request in safe), default=-1)
        later = [told for request, told in self.sizes if request > last and self.requests[request].start < now]
        sizes = [told for request, told in self.sizes if request == last] + later
        return None if size in sizes else f"the disk has {size} bytes, not one of {sizes}"

    def _at(self, safe: tuple[int, ...]) -> _Durable:
        known = self._durable.get(safe)
        if known is None:
            known = self._durable[safe] = self._work_out(set(safe))
        return known

    def _work_out(self, safe: set[int]) -> _Durable:
        largest = max(size for _, size in self.sizes)
        sectors = as_sectors(bytes(self.initial).ljust(largest, b"\0")).copy()
        last = {}
        for sector, told in self._values.items():
            for request, values in told:
                if request in safe:
                    last[sector] = request
                    sectors[sector] = np.frombuffer(values[0], dtype=np.uint64)
        return _Durable(sectors, last)

    def _told(self, sector: int, value: bytes, durable: _Durable) -> str:
        last = durable.last.get(sector, -1)
        safe = self.requests[last].name if last >= 0 else "what was there at first"
        return f"guest sector {sector} reads {shown(value)}, neither what is safe ({safe}) nor anything issued later"


def as_sectors(view: bytes | bytearray) -> Sectors:
    """One row for each sector, without copying; the last one must be whole."""
    return np.frombuffer(view, dtype=np.uint64).reshape(-1, SECTOR // 8)


def shown(value: bytes) -> str:
    """The beginning of a sector."""
    return "zeros" if value == ZERO_SECTOR else repr(value[:24])


def text(name: str, offset: int, length: int) -> bytes:
    """Bytes that say in every 16 who wrote them and where."""
    first = offset // 16
    count = (offset + length - 1) // 16 - first + 1
    units = np.zeros(count, dtype=[("who", "S8"), ("where", ">u8")])
    units["who"] = name.encode()
    units["where"] = np.arange(first, first + count)
    return units.tobytes()[offset % 16 : offset % 16 + length]
