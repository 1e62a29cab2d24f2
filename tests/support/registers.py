"""Says whether what clients saw of a disk could have happened one request after the other.

A register is one word of the disk. Clients write it, zero it, discard it and read it at the same time, and note when
each request began and ended. The history is linearisable if every request can be given one moment between its
beginning and its end so that each read finds what was written last. No value but zero is written twice, and then it
is enough to look at zones (Gibbons and Korach, "Testing shared memories", 1997): from the first moment at which a
value must have been there to the last at which it must be there still, nothing else can have been. What is said here
of zeros is necessary, not sufficient, and a discard may leave the old value or zero.

It owns the judgement and refuses to know where the history comes from.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Literal, NamedTuple

ZERO = 0


class Event(NamedTuple):
    """One request to one register: `start` and `end` on one clock, `value` as written or as read."""

    kind: Literal["write", "read", "discard"]
    value: int
    start: int
    end: int


def violation(history: Iterable[Event]) -> str | None:
    """What cannot have happened in this order, None if all of it can. The register is zero at first."""
    events = list(history)
    writes = {event.value: event for event in events if event.kind == "write" and event.value != ZERO}
    assert len(writes) == sum(event.kind == "write" and event.value != ZERO for event in events), "a value came twice"
    reads = [event for event in events if event.kind == "read"]
    for read in reads:
        if read.value != ZERO and (read.value not in writes or writes[read.value].start > read.end):
            return f"{read} found what was not written before"
    zones = []
    others = [Event("write", ZERO, event.start, event.end) for event in events if _must_be_zero(event)]
    for value, write in writes.items():
        seen = [write, *(read for read in reads if read.value == value)]
        first_there, last_there = min(event.end for event in seen), max(event.start for event in seen)
        if first_there < last_there:
            zones.append((first_there, last_there, value))
        else:
            others.append(Event("write", value, last_there, first_there))
    return _overlap(zones, others) or _lost_zero(events, reads, list(writes.values()))


def _must_be_zero(event: Event) -> bool:
    return event.value == ZERO and event.kind != "discard"


def _overlap(zones: list[tuple[int, int, int]], others: list[Event]) -> str | None:
    for (_, end, value), (start, _, next_value) in pairwise(sorted(zones)):
        if start < end:
            return f"{value:#x} and {next_value:#x} were there at the same time"
    for start, end, value in zones:
        for other in others:
            if start < other.start and other.end < end:
                return f"{other.value:#x} was there while {value:#x} was"
    return None


def _lost_zero(events: list[Event], reads: list[Event], writes: list[Event]) -> str | None:
    sources = [event for event in events if event.value == ZERO and event.kind != "read"]
    sources.append(Event("write", ZERO, -1, -1))
    for read in reads:
        if read.value == ZERO and not any(_can_be_read(source, read, writes) for source in sources):
            return f"{read} found zeros that were overwritten before"
    return None


def _can_be_read(source: Event, read: Event, writes: list[Event]) -> bool:
    if source.start > read.end:
        return False
    return not any(source.end < write.start and write.end < read.start for write in writes)
