"""Runs a transaction over several images in memory, writes down what reaches their files and the record, and judges
what a crash leaves of them together.

The record is replaced in one step and durable when that returns; that is what its file is for (tests/unit looks at
that), so here it is a list of contents, each with the number of calls that had been made. In a crash state it is any
that it can have been at a moment that the state allows.

What must hold, with the record as it was:

    T1  each image is sound, before and after it is settled; leaks are allowed
    T2  all images have the bitmaps of before, or all have those of after
    T3  a reader sees what a writer finds after settling
    T4  a bitmap that can be used marks everything that changed since it began
    T5  in the middle of the transaction no bitmap is made unusable by the crash
    T6  settling may crash too
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from qcow2_plugin.engine.dirty_bitmaps import unfinished
from qcow2_plugin.engine.dirty_bitmaps.bitmap_plan import BitmapChange, Verb, rotating
from qcow2_plugin.engine.dirty_bitmaps.bitmaps import read_bitmaps
from qcow2_plugin.engine.header import read_header
from qcow2_plugin.engine.writable import WritableImage
from qcow2_plugin.format.transaction import Record, mark_of
from qcow2_plugin.operations.transaction import Transaction
from tests.crash.history import text
from tests.crash.opening import open_readable, read_disk
from tests.crash.scenario import MakeStorage, WrongError, record
from tests.support.builder import ImageBuilder
from tests.support.crash_states import Crashes, State
from tests.support.image_checker import RAW_DATA_FILE, Report, check_image
from tests.support.in_memory import open_in_memory
from tests.support.memory_storage import MemoryStorage
from tests.support.recording import Log, RecordingStorage

KIB = 1 << 10
GRANULE = 4 * KIB
DISK = 96 * KIB
RECORD = "/directory/bitmaps.transaction"
EITHER = "either"
"""The side of an image in which nothing changes."""


@dataclass
class KeptRecord:
    """A record in memory. `versions` are its contents, None for no file, each with the calls made before."""

    log: Log
    path: str = RECORD
    versions: list[tuple[int, bytes | None]] = field(default_factory=lambda: [(0, None)])
    before: Callable[[str], None] = lambda verb: None
    """Asked before a change by the name of the method; raises what is to go wrong."""
    after: Callable[[str], None] = lambda verb: None

    @property
    def content(self) -> bytes | None:
        return self.versions[-1][1]

    def create(self, told: Record) -> None:
        self._change("create", told.pack())

    def switch(self, told: Record) -> None:
        self._change("switch", told.pack())

    def remove(self) -> None:
        self._change("remove", None)

    def _change(self, verb: str, content: bytes | None) -> None:
        self.before(verb)
        self.versions.append((self.log.now, content))
        self.after(verb)

    def possible(self, state: State) -> list[bytes | None]:
        """What it may be after the crash."""
        ends = [time for time, _ in self.versions[1:]] + [state.latest]
        found: list[bytes | None] = []
        for (start, content), end in zip(self.versions, ends, strict=True):
            if start <= state.latest and end >= state.earliest and content not in found:
                found.append(content)
        return found


def read_kept(content: bytes | None) -> Callable[[bytes], bytes]:
    def read(name: bytes) -> bytes:
        if content is None:
            raise FileNotFoundError(2, "no such file", RECORD)
        return content

    return read


@dataclass(frozen=True)
class Case:
    """Images, as builders, what is changed in each, and the bitmaps before and after: name to enabled."""

    name: str
    builders: tuple[Callable[[], ImageBuilder], ...]
    changes: tuple[list[BitmapChange], ...]
    old: tuple[dict[bytes, bool], ...]
    new: tuple[dict[bytes, bool], ...]
    directory: str = "/directory"


def _disk(cluster_bits: int) -> ImageBuilder:
    image = ImageBuilder(DISK, cluster_bits)
    for cluster in range(0, DISK >> cluster_bits, 3):
        image.data(cluster, text("base", cluster << cluster_bits, 1 << cluster_bits))
    return image


def _on_data_file(make: Callable[[], ImageBuilder], *, raw: bool) -> Callable[[], ImageBuilder]:
    """The same with a data file, which has every cluster of the disk if it is a raw one."""

    def builder() -> ImageBuilder:
        image = make().data_file(Path("data"), b"data", raw=raw)
        for cluster in range(image.virtual_size // image.cluster_size if raw else 0):
            if cluster % 3:
                image.data(cluster, bytes(image.cluster_size))
        return image

    return builder


def _rotated(cluster_bits: int) -> Callable[[], ImageBuilder]:
    return lambda: _disk(cluster_bits).bitmap(b"b0", [(0, GRANULE)], granularity_bits=12, literal=True, flags=2)


def _rotated_and_more(cluster_bits: int) -> Callable[[], ImageBuilder]:
    return lambda: _rotated(cluster_bits)().bitmap(b"gone", [(GRANULE, 2 * GRANULE)], granularity_bits=12)


ROTATE = rotating(b"b0", b"b1", GRANULE)
MORE = [*ROTATE, BitmapChange(Verb.REMOVE, b"gone")]
ADD = [BitmapChange(Verb.ADD, b"b1", GRANULE)]
OLD: tuple[dict[bytes, bool], ...] = ({b"b0": True}, {b"b0": True, b"gone": False}, {})
NEW = ({b"b0": False, b"b1": True}, {b"b0": False, b"b1": True}, {b"b1": True})


def _named(cluster_bits: int, directory: str = "/directory") -> Case:
    builders = (_rotated(cluster_bits), _rotated_and_more(cluster_bits), lambda: _disk(cluster_bits))
    return Case(
        f"{1 << cluster_bits}{'' if len(directory) < 20 else ' far'}",
        builders,
        (ROTATE, MORE, ADD),
        OLD,
        NEW,
        directory,
    )


def _on_data_files() -> Case:
    """Two images with data files, one of them raw, and one without."""
    builders = (
        _on_data_file(_rotated(12), raw=True),
        _on_data_file(_rotated_and_more(12), raw=False),
        lambda: _disk(12),
    )
    return Case("data files", builders, (ROTATE, MORE, ADD), OLD, NEW)


def _last_one_removed() -> Case:
    """An image loses its last bitmap, another gets its first."""
    builders = (_rotated(12), lambda: _disk(12))
    return Case(
        "removed", builders, ([BitmapChange(Verb.REMOVE, b"b0")], ADD), ({b"b0": True}, {}), ({}, {b"b1": True})
    )


def _alone() -> Case:
    """Only one image has anything to do."""
    changes = (ROTATE, [BitmapChange(Verb.ENABLE, b"b0")])
    return Case("alone", (_rotated(12), _rotated(12)), changes, ({b"b0": True},) * 2, (NEW[0], {b"b0": True}))


_FAR = "/far" + "/directory" * 60
"""A mark with so long a name is longer than a sector."""
_ALL = (_named(9), _named(12), _named(12, _FAR), _last_one_removed(), _alone(), _on_data_files())
CASES = {case.name: case for case in _ALL}


@dataclass
class Work:
    """A case under way."""

    case: Case
    make_storage: MakeStorage = record
    log: Log = field(default_factory=Log)
    start: int = 0
    """Calls made before the transaction, and when it had ended."""
    end: int = 0

    def __post_init__(self) -> None:
        built = [_built(make()) for make in self.case.builders]
        count = len(built)
        self.data_numbers = {number: count + place for place, number in enumerate(_with_data(built))}
        """Which file is the data file of an image, in the order of `initial`: all images come first."""
        self.initial = (*(image for image, _ in built), *(data for _, data in built if data is not None))
        files = [self.make_storage(self.log, number, each) for number, each in enumerate(self.initial)]
        self.storages = files[:count]
        self.data = {number: files[place] for number, place in self.data_numbers.items()}
        for number, storage in enumerate(self.storages):
            storage.path = f"{self.case.directory}/{number}.qcow2"
        self.images = [open_in_memory(storage, self.data.get(number)) for number, storage in enumerate(self.storages)]
        self.record = KeptRecord(self.log)
        if self.case.directory != "/directory":
            self.record.path = "/elsewhere" + "/directory" * 60 + "/bitmaps.transaction"
        self.bases = [read_disk(image) for image in self.images]

    def write_before(self) -> None:
        """The guest of the first image writes; the others are opened for the transaction only."""
        self.images[0].write_from(text("before", 5 * GRANULE, 2 * GRANULE), 5 * GRANULE)
        self.start = self.log.now

    def run(self) -> None:
        """The transaction."""
        Transaction.of(dict(zip(self.images, self.case.changes, strict=True)), self.record).run()
        self.end = self.log.now

    def write_after(self) -> None:
        """The guests of the first two images write."""
        for image in self.images[:2]:
            image.write_from(text("after", 9 * GRANULE, GRANULE), 9 * GRANULE)
            image.flush()
            image.write_zeroes(20 * GRANULE, GRANULE)

    def close(self) -> None:
        for image in self.images:
            image.close()

    def do_all(self) -> None:
        self.write_before()
        self.run()
        self.write_after()
        self.close()


def _built(builder: ImageBuilder) -> tuple[bytes, bytes | None]:
    """The image file and the data file."""
    with tempfile.TemporaryDirectory(prefix="transaction-") as folder:
        if builder.data_path is not None:
            builder.data_path = Path(folder) / "data"
        image = builder.build(Path(folder) / "image").path.read_bytes()
        return image, None if builder.data_path is None else builder.data_path.read_bytes().ljust(DISK, b"\0")


def _with_data(built: list[tuple[bytes, bytes | None]]) -> list[int]:
    return [number for number, (_, data) in enumerate(built) if data is not None]


def judge(state: State, work: Work) -> set[str]:
    """T1 to T5, for everything that the record may be; on which sides the images are then. Raises WrongError."""
    found: set[str] = set()
    contents = [bytes(file.content()) for file in state.files]
    for told in work.record.possible(state):
        sides = [
            judge_one(number, contents[number], told, work, _data_of(number, contents, work))
            for number in range(len(work.images))
        ]
        known = set(sides) - {EITHER}
        if len(known) > 1:
            raise WrongError(f"T2: the images are {sides}, the record {told!r}")
        if state.latest < work.start and "new" in known:
            raise WrongError("T2: it has happened before it was asked for")
        if work.end and state.earliest > work.end and "old" in known:
            raise WrongError("T2: it is lost")
        found |= known
    return found


def _data_of(number: int, contents: list[bytes], work: Work) -> bytes | None:
    """The data file of an image among the files that a crash has left, if they are among them."""
    place = work.data_numbers.get(number, len(contents))
    return contents[place] if place < len(contents) else None


def judge_one(number: int, content: bytes, told: bytes | None, work: Work, data: bytes | None = None) -> str:
    """T1, T3, T4, T5 for one image; "old", "new" or EITHER. Its data file, if it has one, is `data`, None for what it
    is now. Raises WrongError."""
    if data is None and number in work.data:
        data = bytes(work.data[number].content)
    _sound(content, f"image {number}")
    is_marked = mark_of(read_header(MemoryStorage(content))) is not None
    seen = _seen(content, told)
    settled = settle(content, told, data=data)
    report = _sound(settled, f"image {number}, settled")
    names = [bitmap.name for bitmap in report.bitmaps]
    if names != seen:
        raise WrongError(f"T3: a reader of image {number} sees {seen}, a writer {names}")
    side = _side(report, number, work.case)
    if is_marked and any(bitmap.granules is None for bitmap in report.bitmaps):
        raise WrongError(f"T5: image {number} is {side} with a bitmap in use")
    view = read_disk(open_readable(MemoryStorage(settled), None if data is None else MemoryStorage(data)))
    if report.header.autoclear_features & RAW_DATA_FILE and (data is None or data[:DISK] != view):
        raise WrongError(f"the raw data file of image {number} is not the disk")
    _check_bits(report, number, side, view, work)
    return side


def _sound(content: bytes, what: str) -> Report:
    """T1."""
    report = check_image(content)
    if not report.is_sound:
        raise WrongError(f"T1: {what}: {[*report.corruptions, *report.damage][0]}")
    return report


def _seen(content: bytes, told: bytes | None) -> list[bytes]:
    storage = MemoryStorage(content)
    try:
        header = unfinished.look_up(read_header(storage), read_kept(told), "image")
        return [bitmap.name for bitmap in read_bitmaps(storage, header)]
    except Exception as error:
        raise WrongError(f"T3: the bitmaps cannot be read: {error!r}") from error


def settle(
    content: bytes, told: bytes | None, storage: MemoryStorage | None = None, data: bytes | None = None
) -> bytes:
    """The image as it is once it has been opened for writing. Raises WrongError."""
    storage = storage or MemoryStorage(content)
    stored = read_header(storage)
    try:
        header = unfinished.look_up(stored, read_kept(told), "image")
        if header is not stored:
            unfinished.store(storage, stored, header)
        open_in_memory(storage, None if data is None else MemoryStorage(data))
    except Exception as error:
        raise WrongError(f"T1: the image cannot be opened: {error!r}") from error
    return bytes(storage.content)


def _side(report: Report, number: int, case: Case) -> str:
    """T2: which of the two lists of bitmaps this is."""
    found = {bitmap.name: bool(bitmap.flags & 2) for bitmap in report.bitmaps}
    if found == case.old[number] == case.new[number]:
        return EITHER
    if found == case.old[number]:
        return "old"
    if found == case.new[number]:
        return "new"
    raise WrongError(f"T2: image {number} has the bitmaps {found}")


def _check_bits(report: Report, number: int, side: str, view: bytes, work: Work) -> None:
    """T4."""
    before = bytearray(work.bases[number])
    if number == 0:
        before[5 * GRANULE : 7 * GRANULE] = text("before", 5 * GRANULE, 2 * GRANULE)
    since_base, since_switch = _changed(view, work.bases[number]), _changed(view, bytes(before))
    for bitmap in report.bitmaps:
        if bitmap.granules is None:
            if not bitmap.flags & 2 or bitmap.name == b"gone":
                raise WrongError(f"T4: {bitmap.name!r} of image {number}, which does not follow the disk, is in use")
            continue
        if bitmap.name == b"b0" and side == "new":
            expected = {0, 5, 6} if number == 0 else {0}
            if bitmap.granules != expected:
                raise WrongError(f"T4: the frozen bitmap of image {number} marks {sorted(bitmap.granules)}")
        elif bitmap.name == b"b0" and not bitmap.granules >= since_base | {0}:
            raise WrongError(f"T4: {bitmap.name!r} of image {number} lacks {sorted(since_base - bitmap.granules)}")
        elif bitmap.name == b"b1" and not bitmap.granules >= since_switch:
            raise WrongError(f"T4: {bitmap.name!r} of image {number} lacks {sorted(since_switch - bitmap.granules)}")


def _changed(view: bytes, base: bytes) -> set[int]:
    return {
        start // GRANULE
        for start in range(0, DISK, GRANULE)
        if view[start : start + GRANULE] != base[start : start + GRANULE]
    }


def judge_settling(state: State, work: Work) -> None:
    """T6: every state that a crash leaves of settling each image settles to the same. Raises WrongError."""
    for told in work.record.possible(state):
        contents = [bytes(file.content()) for file in state.files]
        for number, content in enumerate(contents[: len(work.images)]):
            log, data = Log(), _data_of(number, contents, work)
            settled = settle(content, told, RecordingStorage(log, 0, content), data)
            side = _side(check_image(settled), number, work.case)
            crashes = Crashes(log, (content,))
            for plan in crashes.plans():
                again = judge_one(number, bytes(crashes.state(plan).files[0].content()), told, work, data)
                if again != side:
                    raise WrongError(f"T6: image {number} was {side} and is {again} after another crash")


def judge_recovery(name: str) -> int:
    """Settling all images of a transaction that is committed, then removing the record, crashes too; how many states
    of that were judged. Raises WrongError."""
    work = Work(CASES[name])
    work.write_before()
    stopped: list[tuple[bytes, ...]] = []
    work.record.after = lambda verb: stopped.append(tuple(bytes(each.content) for each in work.storages))
    work.run()
    _, contents, _ = stopped
    decided = work.record.versions[2][1]
    log = Log()
    work.record = KeptRecord(log, versions=[(0, decided)])
    for number, content in enumerate(contents):
        data = bytes(work.data[number].content) if number in work.data else None
        settle(content, decided, RecordingStorage(log, number, content), data)
    work.record.remove()
    work.start = work.end = 0
    crashes = Crashes(log, contents)
    for plan in crashes.plans():
        if judge(crashes.state(plan), work) != {"new"}:
            raise WrongError("T2: it is lost in recovery")
    return len(crashes.plans())


def forgotten(images: list[WritableImage]) -> None:
    """Give back what images hold that failed."""
    for image in images:
        with suppress(Exception):
            image.close()
