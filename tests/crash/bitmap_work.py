"""Crashes and faults while bitmaps are changed: what is done to an image, and what its bitmaps must be after a crash.

A workload is steps, some of which are changes of bitmaps. After a crash the directory is that of one moment, before or
after each change and never in between: one that was complete when the crash came, or that was begun. By it is judged
what every bitmap marks:

    frozen    exactly what was written in its time
    enabled   unusable; or everything in which the disk differs from what it was when the bitmap began, and what it
              marked then, but nothing that nobody wrote
    stale     unusable, as it was at first

An enabled bitmap may be unusable only if a write has begun since the last change, or since the image was closed. It
owns the model and the rules, and refuses to know the engine's steps.
"""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qcow2_plugin.engine.dirty_bitmaps.bitmap_plan import BitmapChange, BitmapVerb, Verb, rotating
from qcow2_plugin.operations.bitmaps import change_bitmaps
from tests.crash.history import NEVER, as_sectors, text
from tests.crash.opening import open_readable, read_disk
from tests.crash.scenario import MakeStorage, WrongError, record
from tests.support.builder import ImageBuilder
from tests.support.crash_states import Crashes, State, sample
from tests.support.image_checker import BitmapFacts, Report, check_image
from tests.support.in_memory import open_in_memory
from tests.support.memory_storage import MemoryStorage
from tests.support.recording import SECTOR, Log
from tests.support.tools import qemu_img

KIB = 1 << 10
AUTO = 2
RAW = "raw data file"
_NONE: frozenset[int] = frozenset()
GRANULES = 512  # of bitmaps that are made
Changes = tuple[BitmapChange, ...]


class Step(NamedTuple):
    """ "write", "change", "flush", "reopen" or "close"."""

    verb: str
    offset: int = 0
    length: int = 0
    changes: Changes = ()


@dataclass(frozen=True)
class Marked:
    """A bitmap at one moment. `view` is the disk when it began to mark on top of `marks`."""

    granularity: int
    is_enabled: bool
    marks: frozenset[int]
    view: bytes = b""
    is_stale: bool = False

    def widened(self, sectors: set[int]) -> frozenset[int]:
        """The granules of some sectors."""
        return frozenset(sector * SECTOR // self.granularity for sector in sectors)


Bitmaps = dict[bytes, Marked]


Files = tuple[bytes, ...]
"""The contents of an image file and of its data file, if it has one."""


@functools.cache
def image(kind: str) -> tuple[Files, Bitmaps]:
    """An image of a kind, and its bitmaps.

    `small`: five bitmaps, one of them stale, 512-byte clusters. `data file`: the same with a data file, `raw data file`
    with one that has to be the disk. `none`: no bitmap yet, 8 KiB clusters, as QEMU makes it: the header has to be laid
    out anew for the first.
    """
    with tempfile.TemporaryDirectory(prefix="bitmaps-") as folder:
        path = Path(folder) / "image"
        if kind == "none":
            qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=8192", path, str(256 * KIB))
            return (path.read_bytes(),), {}
        builder = ImageBuilder(96 * KIB, 9)
        paths = [path]
        if kind != "small":
            paths.append(Path(folder) / "data")
            builder.data_file(paths[1], b"data", raw=kind == RAW)
        for cluster in range(0, 40, 2):
            builder.data(cluster, text("base", cluster * 512, 512))
        for cluster in range(192 if kind == RAW else 0):
            if cluster >= 40 or cluster % 2:
                builder.data(cluster, bytes(512))
        builder.bitmap(b"a", [(0, 512), (70 * KIB, 512)], granularity_bits=9, flags=AUTO)
        builder.bitmap(b"coarse", [(8 * KIB, 1)], granularity_bits=12, flags=AUTO)
        builder.bitmap(b"off", [(4 * KIB, KIB), (59 * KIB, 20 * KIB)], granularity_bits=9)
        builder.bitmap(b"stale", [(0, KIB)], granularity_bits=9, flags=AUTO | 1)
        builder.bitmap(b"away", [(30 * KIB, KIB)], granularity_bits=9)
        builder.build(path)
        files = tuple(each.read_bytes() for each in paths)
    view = builder.expected()
    return files, {
        bitmap.name: Marked(
            1 << bitmap.granularity_bits,
            bool(bitmap.flags & AUTO),
            bitmap.granules or frozenset(),
            view,
            is_stale=bitmap.granules is None,
        )
        for bitmap in check_image(files[0]).bitmaps
    }


def changed(bitmaps: Bitmaps, changes: Sequence[BitmapChange], view: bytes) -> Bitmaps:
    """What the bitmaps are after some changes."""
    result = dict(bitmaps)
    for verb, name, granularity, is_enabled, source, new_name in changes:
        if verb is Verb.ADD:
            result[name] = Marked(granularity or GRANULES, is_enabled, frozenset(), view)
        elif verb is Verb.REMOVE:
            del result[name]
        elif verb is Verb.CLEAR:
            result[name] = replace(result[name], marks=frozenset(), view=view)
        elif verb in (Verb.ENABLE, Verb.DISABLE):
            result[name] = replace(result[name], is_enabled=verb is Verb.ENABLE, view=view)
        elif verb is Verb.ROTATE:
            result[name] = replace(result[name], is_enabled=False)
            result[new_name] = Marked(granularity or result[name].granularity, True, frozenset(), view)
        else:
            assert isinstance(source, bytes)
            result[name] = merged(result[name], result[source])
    return result


def merged(target: Marked, source: Marked) -> Marked:
    sectors = {
        sector
        for granule in source.marks
        for sector in range(granule * source.granularity // SECTOR, (granule + 1) * source.granularity // SECTOR)
    }
    return replace(target, marks=target.marks | target.widened(sectors))


class Moment(NamedTuple):
    """The bitmaps from the `start` to the `end` of the step that made them so."""

    start: int
    end: int
    bitmaps: Bitmaps


class Written(NamedTuple):
    start: int
    sectors: frozenset[int]


@dataclass
class Work:
    """A workload under way. `moments` are the states of the directory, `rests` the ends of steps that left all bitmaps
    settled."""

    kind: str
    make_storage: MakeStorage = record
    log: Log = field(default_factory=Log)
    writes: list[Written] = field(default_factory=list)
    has_failed: bool = False
    """A write has failed for good, so that it is not known what of it was marked."""

    def __post_init__(self) -> None:
        self.initial, bitmaps = image(self.kind)
        self.files = [self.make_storage(self.log, number, content) for number, content in enumerate(self.initial)]
        self.storage, self.data = self.files[0], self.files[1] if len(self.files) > 1 else None
        self.image = open_in_memory(self.storage, self.data)
        self.view = bytearray(read_disk(self.image))
        self.moments = [Moment(-1, 0, bitmaps)]
        self.rests: list[tuple[int, int]] = [(-1, 0)]
        self.first_leaks = check_image(self.initial[0]).all_leaks
        self._number = 0

    @property
    def bitmaps(self) -> Bitmaps:
        """As they are now, if nothing failed."""
        return self.moments[-1].bitmaps

    def run(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self.do(step)

    def do(self, step: Step) -> None:
        """One step; whatever the engine raises comes through."""
        start = self.log.now
        if step.verb == "write":
            self._write(step.offset, step.length)
        elif step.verb == "change":
            self._change(step.changes)
        elif step.verb == "flush":
            self.image.flush()
        else:
            self.image.close()
            self.rests.append((start, self.log.now))
            if step.verb == "reopen":
                self.image = open_in_memory(self.storage, self.data)

    def _write(self, offset: int, length: int) -> None:
        self._number += 1
        content = text(f"w{self._number}", offset, length)
        sectors = set(range(offset // SECTOR, (offset + length - 1) // SECTOR + 1))
        start = self.log.now
        self.writes.append(Written(start, frozenset(sectors)))
        self._mark(sectors)  # before: a part of it may be there whatever becomes of the rest
        self.image.write_from(content, offset)
        self.view[offset : offset + length] = content

    def _mark(self, sectors: set[int]) -> None:
        start, end, bitmaps = self.moments[-1]
        marked = {
            name: replace(each, marks=each.marks | each.widened(sectors)) if each.is_enabled else each
            for name, each in bitmaps.items()
        }
        self.moments[-1] = Moment(start, end, marked)

    def _change(self, changes: Changes) -> None:
        start = self.log.now
        after = changed(self.bitmaps, changes, bytes(self.view))
        self.moments.append(Moment(start, NEVER, after))
        change_bitmaps(self.image, changes)
        self.moments[-1] = Moment(start, self.log.now, after)
        self.rests.append((start, self.log.now))

    def forget_unfinished(self) -> None:
        """A change that has failed has not happened."""
        if self.moments[-1].end == NEVER:
            self.moments.pop()

    # ---- judging

    def check_closed(self, *, is_exact: bool = True) -> None:
        """The image was closed: nothing is wrong, and the bitmaps are exactly what they should be."""
        report = self._sound(bytes(self.storage.content))
        if report.all_leaks > self.first_leaks:
            raise WrongError(f"{report.all_leaks - self.first_leaks} clusters are leaked by a clean close")
        self._require_names(report, self.bitmaps)
        for bitmap in report.bitmaps:
            told = self.bitmaps[bitmap.name]
            if told.is_stale != (bitmap.granules is None):
                raise WrongError(f"bitmap {bitmap.name!r} is stale after a clean close")
            found = bitmap.granules or frozenset()
            if not told.is_stale and (found != told.marks if is_exact else not found <= told.marks):
                raise WrongError(f"bitmap {bitmap.name!r} marks {sorted(found ^ told.marks)[:5]} wrongly")

    def judge(self, state: State) -> Report:
        """Raises WrongError."""
        storage, data = _stored(state)
        report = self._sound(storage.content)
        try:
            with open_readable(storage, data) as opened:
                view = read_disk(opened)
        except Exception as error:
            raise WrongError(f"the disk cannot be read: {type(error).__name__}: {error}") from error
        if self.kind == RAW and (data is None or data.content[: len(view)] != view):
            raise WrongError("the raw data file is not the disk")
        self.judge_bitmaps(report, view, state.earliest, state.latest)
        return report

    def judge_bitmaps(self, report: Report, view: bytes, earliest: int, latest: int) -> None:
        """By the last directory that was complete, or by one that was begun. Raises WrongError if none fits."""
        done = max(number for number, moment in enumerate(self.moments) if moment.end <= earliest or not number)
        problems = []
        for number in range(done, len(self.moments)):
            if number == done or self.moments[number].start < latest:
                problem = self._problem(number, report, view, (earliest, latest))
                if problem is None:
                    return
                problems.append(problem)
        raise WrongError("; or ".join(problems))

    def _problem(self, number: int, report: Report, view: bytes, times: tuple[int, int]) -> str | None:
        try:
            self._require_names(report, self.moments[number].bitmaps)
            for bitmap in report.bitmaps:
                self._judge_bitmap(number, bitmap, view, times)
        except WrongError as error:
            return f"by directory {number}, {error}"
        return None

    def _require_names(self, report: Report, bitmaps: Bitmaps) -> None:
        found = {bitmap.name: bool(bitmap.flags & AUTO) for bitmap in report.bitmaps}
        wanted = {name: each.is_enabled for name, each in bitmaps.items()}
        if list(found.items()) != list(wanted.items()):
            raise WrongError(f"the bitmaps are {found} instead of {wanted}")

    def _judge_bitmap(self, number: int, bitmap: BitmapFacts, view: bytes, times: tuple[int, int]) -> None:
        told = self.moments[number].bitmaps[bitmap.name]
        if told.is_stale:
            if bitmap.granules is not None:
                raise WrongError(f"bitmap {bitmap.name!r} was stale and claims to be right")
            return
        if bitmap.granules is None:
            if not told.is_enabled or not self._may_be_held(*times):
                raise WrongError(f"bitmap {bitmap.name!r} is unusable")
            return
        differing = set(np.flatnonzero((as_sectors(view) != as_sectors(told.view)).any(axis=1)).tolist())
        may = told.marks
        must = (self._first_marks(number, bitmap.name) | told.widened(differing)) if told.is_enabled else told.marks
        if self.has_failed:
            must = told.widened(differing) if told.is_enabled else _NONE
        if not bitmap.granules >= must:
            raise WrongError(f"bitmap {bitmap.name!r} does not mark granules {sorted(must - bitmap.granules)[:5]}")
        if not bitmap.granules <= may:
            raise WrongError(f"bitmap {bitmap.name!r} marks granules {sorted(bitmap.granules - may)[:5]}")

    def _first_marks(self, number: int, name: bytes) -> frozenset[int]:
        """What a bitmap marked for sure when this directory came into force: what it did before, if it did not begin
        then."""
        told = self.moments[number].bitmaps[name]
        if number == 0:
            return image(self.kind)[1][name].marks
        before = self.moments[number - 1].bitmaps.get(name)
        if before is None or before.view is not told.view or not before.is_enabled:
            return frozenset()
        return before.marks & told.marks

    def _may_be_held(self, earliest: int, latest: int) -> bool:
        """True if a write has begun since all bitmaps were settled for sure."""
        rest = max(start for start, end in self.rests if end <= earliest)
        return any(rest <= written.start < latest for written in self.writes)

    def _sound(self, content: bytes | bytearray) -> Report:
        report = check_image(content)
        if not report.is_sound:
            raise WrongError(f"not sound: {[*report.corruptions, *report.damage][0]}")
        return report

    def recover(self, state: State) -> None:
        """The next writer can go on: it writes, adds a bitmap and closes."""
        storage, data = _stored(state)
        before = {bitmap.name: bitmap for bitmap in check_image(storage.content).bitmaps}
        leaks = check_image(storage.content).all_leaks
        try:
            with open_in_memory(storage, data) as opened:
                opened.write_from(b"x" * 512, 9 * SECTOR)
                change_bitmaps(opened, [BitmapChange(Verb.ADD, b"after all", GRANULES)])
                opened.write_from(b"x" * 512, 10 * SECTOR)
        except Exception as error:
            raise WrongError(f"nobody can go on: {type(error).__name__}: {error}") from error
        report = self._sound(storage.content)
        if report.all_leaks > leaks:
            raise WrongError(f"whoever goes on leaves {report.all_leaks - leaks} leaks")
        after = {bitmap.name: bitmap.granules for bitmap in report.bitmaps}
        if after.pop(b"after all") != frozenset({10}) or after.keys() != before.keys():
            raise WrongError("whoever goes on loses bitmaps, or marks")
        for name, bitmap in before.items():
            kept = after[name]
            if (kept is None) != (bitmap.granules is None) or not (bitmap.granules or _NONE) <= (kept or _NONE):
                raise WrongError(f"bitmap {name!r} is not what the one before has left")


def _stored(state: State) -> tuple[MemoryStorage, MemoryStorage | None]:
    """The image file and the data file, if there is one, that a crash has left."""
    storage, *others = [MemoryStorage(file.content()) for file in state.files]
    return storage, others[0] if others else None


# ---- workloads

CHANGES: dict[str, Changes] = {
    "add": (BitmapChange(Verb.ADD, b"new", GRANULES),),
    "add disabled": (BitmapChange(Verb.ADD, b"idle", GRANULES, is_enabled=False),),
    "remove": (BitmapChange(Verb.REMOVE, b"coarse"),),
    "remove stale": (BitmapChange(Verb.REMOVE, b"stale"),),
    "clear": (BitmapChange(Verb.CLEAR, b"a"),),
    "enable": (BitmapChange(Verb.ENABLE, b"off"),),
    "disable": (BitmapChange(Verb.DISABLE, b"a"),),
    "merge": (BitmapChange(Verb.MERGE, b"off", source=b"a"),),
    "merge into": (BitmapChange(Verb.MERGE, b"a", source=b"coarse"),),
    "rotate": tuple(rotating(b"a", b"next")),
    "several": (
        BitmapChange(Verb.CLEAR, b"coarse"), BitmapChange(Verb.MERGE, b"coarse", source=b"away"),
        BitmapChange(Verb.REMOVE, b"away"),
    ),
}  # fmt: skip
CHANGES_OF_NONE: dict[str, Changes] = {
    "add": (BitmapChange(Verb.ADD, b"a", GRANULES),),
    "rotate": tuple(rotating(b"a", b"next")),
    "remove": (BitmapChange(Verb.REMOVE, b"a"),),
    "remove next": (BitmapChange(Verb.REMOVE, b"next"),),
}
IMPOSSIBLE = {("disable", "rotate"), ("remove", "merge into"), ("remove", "several")}
FIRST = {"add": (), "rotate": ("add",), "remove": ("add",), "remove next": ("add", "rotate", "remove")}


def workloads() -> Iterator[tuple[str, str, list[Step]]]:
    """(name, kind, steps): every change alone, on an image that nobody writes to and on one that is in use, and in
    pairs, with data files too."""
    for name, change in CHANGES.items():
        yield f"{name} alone", "small", [_step(change), Step("close")]
    for first, change in CHANGES.items():
        for second, other in CHANGES.items():
            if first != second and (first, second) not in IMPOSSIBLE:
                kinds = ["small", "data file", *([RAW] if second in ("add", "clear", "rotate") else [])]
                for kind in kinds:
                    tail = "" if kind == "small" else f" with a {kind}"
                    steps = list(_mixed(f"{first}/{second}{tail}", (change, other), 96 * KIB))
                    yield f"{first}, {second}{tail}", kind, steps
    for name, before in FIRST.items():
        told = [CHANGES_OF_NONE[each] for each in (*before, name)]
        yield f"{name} of none alone", "none", [*map(_step, told), Step("close")]
        yield f"{name} of none", "none", list(_mixed(name, told, 256 * KIB))


def _step(changes: Changes) -> Step:
    return Step("change", changes=changes)


def _mixed(seed: str, changes: Sequence[Changes], size: int) -> Iterator[Step]:
    """The changes with writes before, between and after, to the same places again and again; some are flushed."""
    chance = random.Random(seed)
    places = [chance.randrange(0, size - 2048, 256) for _ in range(3)]
    for change in changes:
        yield from _writes(chance, places)
        yield _step(change)
    yield from _writes(chance, places)
    yield Step(chance.choice(["close", "reopen", "flush"]))


def _writes(chance: random.Random, places: list[int]) -> Iterator[Step]:
    for _ in range(chance.choice([1, 2, 3])):
        yield Step("write", chance.choice(places), chance.choice([256, 512, 1500]))
        if chance.random() < 0.4:
            yield Step("flush")


def random_work(seed: int, count: int = 14) -> tuple[str, str, list[Step]]:
    """As `workloads`: changes that can be, one or two at once, and writes, as they come."""
    chance = random.Random(seed)
    kind = chance.choice(["small", "data file", "none"])
    bitmaps, size = image(kind)[1], 96 * KIB
    places = [chance.randrange(0, size - 2048, 256) for _ in range(4)]
    steps: list[Step] = []
    for number in range(count):
        if chance.random() < 0.5:
            steps += _writes(chance, places)
            continue
        changes: Changes = ()
        for part in range(chance.choice([1, 1, 2, 3])):
            more = _random_change(bitmaps, f"{number}/{part}".encode(), chance)
            bitmaps, changes = changed(bitmaps, more, b""), changes + more
        steps.append(_step(changes))
        if chance.random() < 0.15:
            steps.append(Step("reopen"))
    return f"random {seed}", kind, [*steps, Step("close")]


def _random_change(bitmaps: Bitmaps, new: bytes, chance: random.Random) -> Changes:
    usable = [name for name, each in bitmaps.items() if not each.is_stale]
    enabled = [name for name in usable if bitmaps[name].is_enabled]
    verb = chance.choice([*BitmapVerb, BitmapVerb.ROTATE, BitmapVerb.ADD])
    if verb is BitmapVerb.ROTATE and enabled:
        return tuple(rotating(chance.choice(enabled), new, chance.choice([None, 512, 4096])))
    if verb in (BitmapVerb.ADD, BitmapVerb.ROTATE) or not usable:
        return (BitmapChange(Verb.ADD, new, chance.choice([512, 2048]), is_enabled=chance.random() < 0.7),)
    return (BitmapChange(verb, chance.choice(usable), source=chance.choice(usable)),)


def crash(name: str, kind: str, steps: Sequence[Step], states: int) -> int:
    """Runs a workload and judges so many of its states; how many it were. Raises WrongError of one line."""
    work = Work(kind)
    work.run(steps)
    if steps[-1].verb in ("close", "reopen"):
        work.check_closed()
    crashes = Crashes(work.log, work.initial)
    seen: set[tuple[object, ...]] = set()
    for number, plan in sample(crashes.plans(), name):
        state = crashes.state(plan)
        what = (state.key, state.earliest, state.latest)
        if what in seen:
            continue
        seen.add(what)
        try:
            work.judge(state)
            if len(seen) % 10 == 0:
                work.recover(state)
        except WrongError as error:
            raise WrongError(f"{name}: {plan.kind.value} state {number} of interval {plan.interval}: {error}") from None
        if len(seen) == states:
            break
    return len(seen)
