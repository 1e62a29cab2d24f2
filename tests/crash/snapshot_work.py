"""Internal snapshots under way: work on an image in memory with a model of its disk and its snapshots, and the judge of
what a crash leaves of it.

Requests are single letters, so that a workload is a word: `w` writes here and there, `z` discards, `f` flushes, `c`
creates a snapshot, `a` and `A` apply the first and the last one, `d` and `D` delete them, `g` gives the disk another
size, `o` closes and opens the image. What is under way when the power goes is left out or done, snapshots and the
switch to another disk as a whole, sectors each by itself.
"""

from __future__ import annotations

import random
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from qcow2_plugin.engine.image import Image
from qcow2_plugin.engine.internal_snapshots.snapshotting import apply_snapshot, create_snapshot, delete_snapshot
from qcow2_plugin.engine.writable import WritableImage
from tests.crash.kinds import Kind
from tests.crash.opening import open_readable, read_disk
from tests.crash.scenario import MakeStorage, WrongError, record
from tests.support.crash_states import Crashes, State, sample
from tests.support.image_checker import Report, check_image
from tests.support.in_memory import open_in_memory
from tests.support.memory_storage import MemoryStorage
from tests.support.recording import SECTOR, ZERO_SECTOR, Log, sector_of
from tests.support.tools import ToolError, convert_to_raw, qemu_img, qemu_img_json

_LACKS_COPIED = re.compile(r"L[12] entry 0x(?![89a-f][0-9a-f]{15},)[0-9a-f]+, but the refcount is 1$")
"""COPIED may lack, which costs no more than a copy; where a cluster is shared it must never be."""
_SWITCHES = "caAdDg"
Written = dict[int, list[bytes]]
"""Everything that was written to a sector."""
Snapshots = dict[bytes, bytes]
"""Disks by ID, in the order of the table."""


class Step(NamedTuple):
    """A request, the calls from its beginning to its end, what it wrote, and how things are when it has ended."""

    letter: str
    start: int
    end: int
    written: Written
    view: bytes
    snapshots: Snapshots

    @property
    def is_durable(self) -> bool:
        return self.letter in "fo" + _SWITCHES


@dataclass
class SnapshotWork:
    """A workload on an image of some kind."""

    kind: Kind
    word: str
    make_storage: MakeStorage = record
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        self.chance = random.Random(f"{self.kind.name}/{self.word}")
        self.view = bytearray(self.kind.view)
        self.snapshots: Snapshots = {}
        if self.kind.snapshot_view is not None:
            self.snapshots[b"1"] = self.kind.snapshot_view
        self.steps = [Step("o", -1, 0, {}, bytes(self.view), dict(self.snapshots))]
        self.storage = self.make_storage(self.log, 0, self.kind.content)
        self.image = self.opened()
        self.created = 0

    def opened(self) -> WritableImage:
        return open_in_memory(self.storage, None, self.kind.backing)

    def run(self) -> None:
        """All of it; the image is closed in the end, and nothing may be wrong. Raises WrongError."""
        for letter in self.word:
            self.do(letter)
            self.look()
        self.image.close()
        report = check(self.storage.content)
        if report.corruptions or report.all_leaks > check_image(self.kind.content).all_leaks:
            raise WrongError(f"after closing: {report.corruptions[:1]}, {report.all_leaks} leaks")

    def do(self, letter: str) -> None:
        """One request, if there is a snapshot for it; what the engine raises comes through, and the model is as
        before."""
        if letter in "aAdD" and not self.snapshots:
            return
        start = self.log.now
        written: Written = {}
        view, snapshots = bytearray(self.view), dict(self.snapshots)
        self.steps.append(Step(letter, start, 1 << 62, written, bytes(view), dict(snapshots)))
        self._ask(letter, view, snapshots, written)
        self.view, self.snapshots = view, snapshots
        self.steps[-1] = Step(letter, start, self.log.now, written, bytes(view), dict(snapshots))

    def _ask(self, letter: str, view: bytearray, snapshots: Snapshots, written: Written) -> None:
        image = self.image
        if letter == "w":
            for _ in range(4):
                self._write(view, written)
        elif letter == "z":
            self._discard(view, written)
        elif letter == "f":
            image.flush()
        elif letter == "o":
            image.close()
            self.image = self.opened()
        elif letter == "g":
            size = self.chance.choice([each for each in self.kind.sizes if each != len(view)])
            view[:] = bytes(view[:size]).ljust(size, b"\0")
            image.resize(size, allow_shrink=True)
        elif letter == "c":
            found = self.expect(letter)
            snapshots.update({found: bytes(view)})
            made = create_snapshot(image, b"name", 10**18)
            assert made.id == found
        else:
            wanted = self.expect(letter)
            if letter in "aA":
                view[:] = snapshots[wanted]
                apply_snapshot(image, wanted, mark_bitmaps=True)
            else:
                del snapshots[wanted]
                delete_snapshot(image, wanted)

    def expect(self, letter: str) -> bytes:
        """The ID that a request is about."""
        known = list(self.snapshots)
        if letter == "c":
            return str(max(map(int, known), default=0) + 1).encode()
        return known[0 if letter in "ad" else -1]

    def _write(self, view: bytearray, written: Written) -> None:
        count = len(view) // SECTOR
        first = self.chance.randrange(count)
        length = min(self.chance.choice([1, 3, 40]), count - first)
        data = self.chance.randbytes(length * SECTOR)
        for number in range(length):
            written.setdefault(first + number, []).append(data[number * SECTOR : (number + 1) * SECTOR])
        view[first * SECTOR : (first + length) * SECTOR] = data
        self.image.write_from(data, first * SECTOR)

    def _discard(self, view: bytearray, written: Written) -> None:
        size = self.kind.cluster_size
        first = self.chance.randrange(max(len(view) // size - 4, 1)) * size
        end = min(first + self.chance.choice([1, 4]) * size, len(view) // SECTOR * SECTOR)
        for number in range(first // SECTOR, end // SECTOR):
            written.setdefault(number, []).append(ZERO_SECTOR)
        view[first:end] = bytes(end - first)
        self.image.write_zeroes(first, end - first)

    def look(self) -> None:
        """The disk and all snapshots read as they should. Raises WrongError."""
        view = read_disk(self.image)
        if view != self.view:
            raise WrongError(f"the disk differs in {first_difference(view, self.view)}")
        look_at_snapshots(self.image, self.snapshots)

    # ---- after a crash

    def judge(self, state: State) -> tuple[bytes, Snapshots, Report]:
        """What is left, if it is as it may be. Raises WrongError."""
        content = state.files[0].content()
        report = check(content)
        if report.header.incompatible_features & 2:
            raise WrongError("the image is marked corrupt")
        image = open_readable(MemoryStorage(content), None, self.kind.backing)
        view = read_disk(image)
        ids = [snapshot.id for snapshot in image.snapshots()]
        problem = f"the snapshots are {ids}, as at no such time"
        safe = self._safe(state.earliest)
        for number in range(safe, len(self.steps)):
            step = self.steps[number]
            if step.start >= state.latest and number > safe:
                break
            if not step.is_durable:
                continue
            if list(step.snapshots) != ids:
                continue
            told = self._differs(view, number, state.latest)
            if told is None:
                look_at_snapshots(image, step.snapshots)
                self._look_at_bitmaps(report, view)
                return view, step.snapshots, report
            problem = told
        raise WrongError(problem)

    def _safe(self, now: int) -> int:
        """The last step that was durable by then."""
        return max(number for number, step in enumerate(self.steps) if step.is_durable and step.end <= now)

    def _differs(self, view: bytes, number: int, latest: int) -> str | None:
        """What is wrong with a disk that is as after this step, or some of what came later is done."""
        base = self.steps[number].view
        later: list[Written] = []
        for step in self.steps[number + 1 :]:
            if step.start >= latest or step.letter in _SWITCHES:
                if step.letter == "g" and step.start < latest:
                    return None  # what a resize leaves is judged elsewhere
                break
            later.append(step.written)
        if len(view) != len(base):
            return f"the disk has {len(view)} bytes, not {len(base)}"
        for sector in range(-(-len(view) // SECTOR)):
            found = sector_of(view, sector)
            if found != sector_of(base, sector) and all(found not in each.get(sector, ()) for each in later):
                return f"sector {sector} is as it was at no such time"
        return None

    def _look_at_bitmaps(self, report: Report, view: bytes) -> None:
        """What follows the disk is in use, or marks all that differs from the beginning."""
        if len(view) != len(self.kind.view):
            return
        changed = {
            sector for sector in range(len(view) // SECTOR)
            if sector_of(view, sector) != sector_of(self.kind.view, sector)
        }  # fmt: skip
        for bitmap in report.bitmaps:
            must_mark = {sector >> bitmap.granularity_bits - 9 for sector in changed if bitmap.flags & 2}
            if bitmap.granules is not None and not must_mark <= bitmap.granules:
                raise WrongError(f"bitmap {bitmap.name!r} does not mark all that has changed")

    def recover(self, content: bytes | bytearray, view: bytes, snapshots: Snapshots, seed: int) -> None:
        """Somebody goes on with what is left. Raises WrongError."""
        storage = MemoryStorage(bytearray(content))
        leaks = check(content).all_leaks
        chance = random.Random(seed)
        try:
            image = open_in_memory(storage, None, self.kind.backing)
            model, kept = bytearray(view), dict(snapshots)
            for _ in range(3):
                place = chance.randrange(len(model) // SECTOR) * SECTOR
                data = chance.randbytes(SECTOR)
                image.write_from(data, place)
                model[place : place + SECTOR] = data
            made = create_snapshot(image, b"after", 0)
            kept[made.id] = bytes(model)
            if len(kept) > 1:
                wanted = chance.choice(list(kept))
                if len(kept[wanted]) == len(model):
                    apply_snapshot(image, wanted, mark_bitmaps=True)
                    model[:] = kept[wanted]
                wanted = chance.choice(list(kept))
                delete_snapshot(image, wanted)
                del kept[wanted]
            image.close()
        except Exception as error:
            raise WrongError(f"nobody can go on: {type(error).__name__}: {error}") from error
        report = check(storage.content)
        if report.all_leaks > leaks:
            raise WrongError(f"who went on left {report.all_leaks - leaks} leaks")
        image_read = open_readable(storage, None, self.kind.backing)
        if read_disk(image_read) != model:
            raise WrongError("who went on changed the disk")
        look_at_snapshots(image_read, kept)

    def ask_qemu(self, content: bytes | bytearray, view: bytes, snapshots: Snapshots, report: Report) -> None:
        """qemu-img counts and reads the same. Raises WrongError."""
        with tempfile.TemporaryDirectory(prefix="crash-") as folder:
            path = Path(folder) / "image"
            path.write_bytes(content)
            if self.kind.backing is not None:
                (Path(folder) / "backing").write_bytes(self.kind.backing)
            try:
                counted = qemu_img_json("check", path)
            except ToolError as error:
                if error.returncode not in (2, 3):
                    raise WrongError(f"qemu-img check: {error.stderr.strip()}") from error
                counted = {}
                if "ERROR" in error.stderr and not report.corruptions:
                    raise WrongError(f"qemu-img check: {error.stderr.strip()}") from error
            if counted and counted.get("leaks", 0) != report.leaks:
                raise WrongError(f"qemu-img check counts {counted}, not {report.leaks} leaks")
            if convert_to_raw(path) != view:
                raise WrongError("qemu-img convert reads something else")
            for wanted, expected in snapshots.items():
                found = convert_to_raw(path, extra=("-l", f"snapshot.id={wanted.decode()}"))
                common = min(len(found), len(expected))
                if found[:common] != expected[:common]:
                    raise WrongError(f"qemu-img reads snapshot {wanted!r} differently")
            listed = qemu_img("snapshot", "-l", path)
            if len(listed.splitlines()) != (len(snapshots) + 2 if snapshots else 0):
                raise WrongError(f"qemu-img lists {listed}")


def check(content: bytes | bytearray) -> Report:
    """Nothing is wrong, but that COPIED may lack. Raises WrongError."""
    report = check_image(content)
    found = [each for each in report.corruptions if not _LACKS_COPIED.match(each)]
    if found or report.damage:
        raise WrongError([*found, *report.damage][0])
    return report


def look_at_snapshots(image: Image, expected: Snapshots) -> None:
    """Each is there and reads as when it was taken. Raises WrongError."""
    listed = image.snapshots()
    if [each.id for each in listed] != list(expected):
        raise WrongError(f"the snapshots are {[each.id for each in listed]}, not {list(expected)}")
    for each in listed:
        view = read_disk(image.at_snapshot(each))
        if view != expected[each.id]:
            raise WrongError(f"snapshot {each.id!r} differs in {first_difference(view, expected[each.id])}")


def first_difference(view: bytes, expected: bytes | bytearray) -> str:
    """Where, in words."""
    if len(view) != len(expected):
        return f"size: {len(view)} bytes, not {len(expected)}"
    places = (sector for sector in range(-(-len(view) // SECTOR))
              if sector_of(view, sector) != sector_of(expected, sector))  # fmt: skip
    return f"sector {next(places)}"


def crash(kind: Kind, word: str, count: int, *, recover_every: int = 4, qemu_every: int = 0) -> int:
    """Run a workload and judge some of its crash states; how many. Raises WrongError, with the number of the state."""
    work = SnapshotWork(kind, word)
    work.run()
    crashes = Crashes(work.log, (kind.content,))
    seen = set()
    for number, plan in sample(crashes.plans(), f"{kind.name}/{word}"):
        state = crashes.state(plan)
        if state.key in seen:
            continue
        seen.add(state.key)
        try:
            view, snapshots, report = work.judge(state)
            content = state.files[0].content()
            if recover_every and len(seen) % recover_every == 0:
                work.recover(content, view, snapshots, number)
            if qemu_every and len(seen) % qemu_every == 0:
                work.ask_qemu(content, view, snapshots, report)
        except WrongError as error:
            raise WrongError(f"{kind.name}/{word} state {number} ({plan.kind.value}): {error}") from error
        if len(seen) == count:
            break
    return len(seen)
