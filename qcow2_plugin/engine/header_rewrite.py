"""Another header in the place of the old one, so that a crash leaves the one or the other: the plan, without any I/O.

A sector of 512 bytes is written whole or not at all, nothing larger is. The fixed fields lie in the first sector, and
with them the place and length of the backing file's name. What is behind them may be anywhere in the header cluster:
the chain of extensions, the end marker, the name.

**Direct.** If all that differs, of what the old header makes use of, lies in one sector, then everything else is
written first: nobody looks there yet. After a barrier the one sector switches.

**Detour.** Else the new extensions and the new name are laid far behind: where neither the old header has anything nor
the new one will. The switch is the first sector with the new fields, and behind them an extension that bridges what
lies between: a table of feature names that is as long as that takes. Every reader passes over it, because it only
names bits that the reader does not know. From there the tidy layout is reached directly: what lies under the bridge is
free. So the states in between are two, and both are whole headers:

    old       fields | extensions | end | name
    bridged   fields | bridge ........................ | extensions | end | name
    new       fields | extensions | end | name

A bridge is no multiple of an entry long, by which it is known where a crash has left one; the next change of the
extensions puts a table of feature names in its place.

Extensions that change more often come further in front (`extension_rank`). The next change of those is then one write.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcow2_plugin.engine.distinct import distinct
from qcow2_plugin.errors import HeaderFullError
from qcow2_plugin.format.feature_names import ENTRY_SIZE as FEATURE_NAME_SIZE
from qcow2_plugin.format.geometry import SECTOR_SIZE
from qcow2_plugin.format.header import EXTENSION_FEATURE_NAMES, Header, HeaderExtension, extension_rank

_EXTENSION_START_SIZE = 8


class Step(NamedTuple):
    """Writes between two barriers, as (place, bytes). If they are a switch, it is one inside one sector (or none is
    needed), and `header` is in force after it; else the header in force makes no use of the places."""

    writes: list[tuple[int, bytes]]
    header: Header | None


def plan_rewrite(stored: bytes, old: Header, new: Header) -> list[Step]:
    """The steps from `old`, which is in the header cluster `stored`, to `new`.

    The extensions of `new` count, not their order, and not where the backing file's name is. Raises HeaderFullError if
    the cluster has no room for that, or for the detour.
    """
    before = _Cluster.of(stored, old)
    steps = _direct_as_is(before, new)
    for tidy in _tidy_layouts(new):
        steps = steps or _direct(before, tidy) or _detour(before, tidy)
    if steps is None:
        raise HeaderFullError(
            f"the header cluster of {len(stored)} bytes has no room for the new header beside the old one; larger "
            "clusters or shorter names would have it (convert the image)"
        )
    return steps


def rehearse(stored: bytes, old: Header, new: Header) -> tuple[bytes, Header]:
    """The header cluster and the header in it, as the steps from `old` to `new` will leave them.

    Raises HeaderFullError if there is no room for those.
    """
    cluster, header = bytearray(stored), old
    for step in plan_rewrite(stored, old, new):
        for place, data in step.writes:
            cluster[place : place + len(data)] = data
        header = step.header or header
    return bytes(cluster), header


class _Cluster(NamedTuple):
    """The bytes of the header cluster, which of them its header makes use of, and where the last of these ends."""

    content: npt.NDArray[np.uint8]
    is_used: npt.NDArray[np.bool_]
    end: int

    @classmethod
    def of(cls, stored: bytes, header: Header) -> _Cluster:
        is_used = np.zeros(len(stored), dtype=np.bool_)
        for start, end in _used_ranges(header):
            is_used[start:end] = True
        if not header.has_end_marker and header.backing_file is None:
            is_used[len(header.pack()) :] = True
        used = np.flatnonzero(is_used)
        return cls(np.frombuffer(stored, dtype=np.uint8), is_used, int(used[-1]) + 1)

    def after(self, steps: list[Step], header: Header) -> _Cluster:
        content = bytearray(self.content.tobytes())
        for step in steps:
            for place, data in step.writes:
                content[place : place + len(data)] = data
        return _Cluster.of(bytes(content), header)


def _used_ranges(header: Header) -> Iterator[tuple[int, int]]:
    yield 0, header.header_length
    place = header.header_length
    for extension in header.extensions:
        end = place + _EXTENSION_START_SIZE
        yield place, end
        place = end + len(extension.data) + len(extension.padding)
        if not _is_bridge(extension):
            yield end, place
    if header.has_end_marker:
        yield place, place + _EXTENSION_START_SIZE
    if header.backing_file is not None:
        yield header.backing_file_offset, header.backing_file_offset + len(header.backing_file)


def _is_bridge(extension: HeaderExtension) -> bool:
    return extension.type == EXTENSION_FEATURE_NAMES and len(extension.data) % FEATURE_NAME_SIZE != 0


def _tidy_layouts(new: Header) -> Iterator[Header]:
    """`new` with its extensions in order; then, if there is one, without the table of feature names."""
    if any(map(_is_bridge, new.extensions)):
        new = new.with_extension(EXTENSION_FEATURE_NAMES, new.usual_feature_names)
    ordered = sorted(new.extensions, key=lambda extension: extension_rank(extension.type))
    yield replace(new, extensions=tuple(ordered)).laid_out()
    if new.extension_data(EXTENSION_FEATURE_NAMES) is not None:
        nameless = [extension for extension in ordered if extension.type != EXTENSION_FEATURE_NAMES]
        yield replace(new, extensions=tuple(nameless)).laid_out()


def _direct_as_is(before: _Cluster, new: Header) -> list[Step] | None:
    """Straight to `new` with its extensions in the order that they have, unless that keeps a bridge."""
    return None if any(map(_is_bridge, new.extensions)) else _direct(before, new.laid_out())


def _direct(before: _Cluster, header: Header) -> list[Step] | None:
    """Straight to `header`; None if no single sector makes the difference, or if it is too long."""
    switch = _switch(before, header)
    return None if switch is None else switch + _clearing(before, switch, len(header.pack()))


def _detour(before: _Cluster, header: Header) -> list[Step] | None:
    """By way of a bridge; None if there is no room for that."""
    start = header.header_length + _EXTENSION_START_SIZE
    far = max(-(-max(before.end, len(header.pack())) // 8) * 8, SECTOR_SIZE)
    far += 8 if (far - start) % FEATURE_NAME_SIZE == 0 else 0
    if start > SECTOR_SIZE or far > len(before.content):
        return None
    bridge = HeaderExtension(EXTENSION_FEATURE_NAMES, before.content[start:far].tobytes(), b"")
    others = [extension for extension in header.extensions if extension.type != EXTENSION_FEATURE_NAMES]
    bridged = replace(header, extensions=(bridge, *others)).laid_out()
    there = _switch(before, bridged)
    if there is None:
        return None
    back = _switch(before.after(there, bridged), header)
    assert back is not None, "what lies under the bridge is free, and nothing of the header is behind it"
    return there + back + _clearing(before, there + back, len(header.pack()))


def _switch(before: _Cluster, header: Header) -> list[Step] | None:
    after = header.pack()
    if len(after) > len(before.content):
        return None
    different = np.flatnonzero(before.content[: len(after)] != np.frombuffer(after, dtype=np.uint8))
    sectors = distinct(different // SECTOR_SIZE).tolist()
    used = distinct(different[before.is_used[different]] // SECTOR_SIZE).tolist()
    if len(used) > 1:
        return None
    switch = used or sectors[:1]
    others = [sector for sector in sectors if sector not in switch]
    first = [_write(after, different, run) for run in _consecutive(others)]
    last = Step([_write(after, different, switch)] if switch else [], header)
    return [Step(first, None), last] if first else [last]


def _consecutive(numbers: list[int]) -> Iterator[list[int]]:
    for _, run in groupby(enumerate(numbers), key=lambda place: place[1] - place[0]):
        yield [number for _, number in run]


def _write(after: bytes, different: npt.NDArray[np.int64], sectors: list[int]) -> tuple[int, bytes]:
    """What differs in consecutive sectors, as one write."""
    low, high = sectors[0] * SECTOR_SIZE, (sectors[-1] + 1) * SECTOR_SIZE
    here = different[(different >= low) & (different < high)]
    first, end = int(here[0]), int(here[-1]) + 1
    return first, after[first:end]


def _clearing(before: _Cluster, steps: list[Step], end: int) -> list[Step]:
    """The step that leaves zeros where earlier headers were, behind `end` where the new one is."""
    ends = [place + len(data) for step in steps for place, data in step.writes]
    length = max(before.end, *ends, end) - end
    return [Step([(end, bytes(length))], None)] if length else []
