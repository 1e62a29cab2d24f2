"""Images that are amended, and what a crash or a failure in the midst may leave: the same disk and the same snapshots,
refcounts that are not too low, and of every property the old or the new one.

It owns the images, the amendments and that rule; it refuses to know by which steps the engine goes.
"""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from qcow2_plugin.engine.amending import Amendment, amend
from qcow2_plugin.engine.writable import WritableImage
from qcow2_plugin.errors import Qcow2Error
from tests.crash.opening import open_readable, read_disk
from tests.crash.scenario import WrongError
from tests.support.builder import GuestMap, ImageBuilder
from tests.support.crash_states import Crashes, State
from tests.support.image_checker import RAW_DATA_FILE, HeaderFacts, check_image
from tests.support.in_memory import open_in_memory
from tests.support.memory_storage import MemoryStorage
from tests.support.recording import SECTOR, Action, Log, RecordingStorage

KIB = 1 << 10
SIZE = 70 * KIB + 512
UNKNOWN = 0x3F0A11CE
BACKING = b"".join(b"%-16d" % number for number in range(SIZE // 16))


class Told(NamedTuple):
    """An image as it begins, with what the guest sees on its disk and in its snapshots."""

    files: tuple[bytes, ...]
    view: bytes
    snapshots: dict[bytes, bytes]
    backing: bytes | None


def _fill(guest: GuestMap, seed: int, *, has_zeros: bool = True) -> None:
    chance = random.Random(seed)
    for cluster in range(0, SIZE // 512 - 3):
        kind = chance.choice(["data", "data", "zero", "preallocated", "compressed", "nothing", "nothing"])
        if kind == "data" or (kind in ("zero", "preallocated") and not has_zeros):
            guest.data(cluster, b"%d of %d" % (cluster, seed) * 40)
        elif kind == "zero":
            guest.zero(cluster)
        elif kind == "preallocated":
            guest.zero(cluster, preallocated=True, payload=b"hidden" * 80)
        elif kind == "compressed":
            guest.compressed(cluster, b"%d" % seed * 300)


def _told(builder: ImageBuilder, snapshots: dict[bytes, GuestMap | None], backing: bytes | None) -> Told:
    if backing is not None:
        builder.backing(b"backing", b"raw")
    builder.extension(UNKNOWN, b"somebody else's")
    with tempfile.TemporaryDirectory(prefix="amend-") as folder:
        if builder.data_path is not None:
            builder.data_path = Path(folder) / "data"
        builder.build(Path(folder) / "image")
        paths = [Path(folder) / "image"] + ([] if builder.data_path is None else [builder.data_path])
        files = tuple(path.read_bytes() for path in paths)
    views = {name: (guest or builder).expected(backing or b"") for name, guest in snapshots.items()}
    return Told(files, builder.expected(backing or b""), views, backing)


@functools.cache
def _plain(version: int, has_backing: bool, has_zeros: bool) -> Told:
    extra = {} if version > 2 else {"extra": b""}
    compatible = 1 << 40 if version > 2 else 0
    builder = ImageBuilder(SIZE, 9, version=version, compatible=compatible, pack=False)
    _fill(builder, 1, has_zeros=has_zeros)
    other = builder.map()
    _fill(other, 2, has_zeros=has_zeros)
    builder.snapshot(b"1", b"shared", None, **extra).snapshot(b"2", b"other", other, **extra)  # type: ignore[arg-type]
    return _told(builder, {b"1": None, b"2": other}, BACKING if has_backing else None)


@functools.cache
def _with_data_file(is_raw: bool, extended_l2: bool) -> Told:
    bits = 14 if extended_l2 else 12
    builder = ImageBuilder(SIZE if bits == 12 else 10 << bits, bits, extended_l2=extended_l2)
    builder.data_file(Path("data"), b"disk.raw", raw=is_raw)
    for cluster in range(-(-builder.virtual_size >> bits)):
        if is_raw or cluster % 3 == 0:
            builder.data(cluster, b"%d" % cluster * 50)
        elif cluster % 3 == 1:
            builder.zero(cluster)
    told = _told(builder, {}, None)
    return told._replace(files=(told.files[0], told.files[1].ljust(builder.virtual_size, b"\0")))


@functools.cache
def _with_short_data_file() -> Told:
    told = _with_data_file(False, False)
    return told._replace(files=(told.files[0], told.files[1].rstrip(b"\0")))


IMAGES: dict[str, Callable[[], Told]] = {
    "new": lambda: _plain(3, False, True),
    "new overlay": lambda: _plain(3, True, True),
    "old": lambda: _plain(2, False, False),
    "old overlay": lambda: _plain(2, True, False),
    "data file": lambda: _with_data_file(False, False),
    "data file, extended": lambda: _with_data_file(False, True),
    "short data file": _with_short_data_file,
    "raw data file": lambda: _with_data_file(True, False),
    "raw data file, extended": lambda: _with_data_file(True, True),
}
AMENDMENTS: dict[tuple[str, str], Amendment] = {
    ("new", "narrower"): Amendment(refcount_bits=4),
    ("new", "wider"): Amendment(refcount_bits=64),
    ("new", "lazy, wider, larger"): Amendment(lazy_refcounts=True, refcount_bits=32, size=SIZE + 40 * KIB),
    ("new", "downgrade"): Amendment(version=2),
    ("new overlay", "downgrade"): Amendment(version=2),
    ("old", "upgrade"): Amendment(version=3),
    ("old", "upgrade, wider, larger"): Amendment(version=3, refcount_bits=64, size=2 * SIZE),
    ("old overlay", "upgrade, narrower, lazy"): Amendment(version=3, refcount_bits=8, lazy_refcounts=True),
    ("data file", "other name"): Amendment(data_file=b"n" * 700),
    ("data file", "no name"): Amendment(data_file=b""),
    ("data file", "raw"): Amendment(data_file_raw=True),
    ("short data file", "raw"): Amendment(data_file_raw=True),
    ("data file, extended", "raw, wider"): Amendment(data_file_raw=True, refcount_bits=64),
    ("raw data file", "not raw, wider"): Amendment(data_file_raw=False, refcount_bits=32),
    ("data file", "narrower, larger"): Amendment(refcount_bits=8, size=SIZE + 9 * KIB),
    ("raw data file", "other name, larger"): Amendment(data_file=b"n" * 700, size=SIZE + 9 * KIB),
    ("raw data file", "lazy, smaller"): Amendment(lazy_refcounts=True, size=SIZE - 9 * KIB, allow_shrink=True),
    ("raw data file, extended", "wider, larger"): Amendment(refcount_bits=64, size=190 * KIB),
}


class Work:
    """One amendment of one image."""

    def __init__(self, image: str, amendment: str) -> None:
        self.name = f"{image}: {amendment}"
        self.told = IMAGES[image]()
        self.wanted = AMENDMENTS[image, amendment]

    def open(self, files: list[MemoryStorage]) -> WritableImage:
        return open_in_memory(files[0], files[1] if len(files) > 1 else None, self.told.backing)

    def run(self, files: list[MemoryStorage]) -> None:
        """Open, amend, close."""
        image = self.open(files)
        try:
            amend(image, self.wanted)
            if isinstance(files[0], RecordingStorage):
                self._require_durable_header(files[0].log)
        finally:
            image.close()

    def _require_durable_header(self, log: Log) -> None:
        """Whoever is told that the image is amended can rely on it."""
        for call in reversed(log.calls):
            if call.file == 0 and call.action is Action.BARRIER:
                return
            if call.file == 0 and call.offset < SECTOR:
                raise WrongError(f"{self.name}: the header is not durable yet")

    def recorded(self) -> tuple[Log, list[bytes]]:
        """The log of the amendment, and the files after it, which have no leak."""
        log = Log()
        files: list[MemoryStorage] = [
            RecordingStorage(log, number, content) for number, content in enumerate(self.told.files)
        ]
        self.run(files)
        after = [bytes(file.content) for file in files]
        report = check_image(after[0])
        if not report.is_sound or report.all_leaks:
            raise WrongError(f"{self.name}: {report.corruptions} {report.damage}, {report.all_leaks} leaks")
        return log, after

    def crash(self, count: int, seed: int = 0) -> int:
        """Judge so many states, and amend again from there; how many it were. Raises WrongError."""
        log, after = self.recorded()
        self.judge(after, after[0])
        crashes = Crashes(log, self.told.files)
        plans = crashes.plans()
        states: dict[tuple[int, ...], State] = {}
        for number in random.Random(seed).sample(range(len(plans)), len(plans)):
            state = crashes.state(plans[number])
            states.setdefault(state.key, state)
            if len(states) == count:
                break
        for state in states.values():
            content = [bytes(file.content()) for file in state.files]
            self.judge(content, after[0])
            self.do_again(content, after[0])
        return len(states)

    def judge(self, files: list[bytes], after: bytes) -> None:
        """Raises WrongError if these files are not what is promised; `after` is the image file in the end."""
        try:
            report = check_image(files[0])
        except Exception as error:
            raise WrongError(f"{self.name}: {error}") from error
        if not report.is_sound:
            raise WrongError(f"{self.name}: {[*report.corruptions, *report.damage][0]}")
        self._judge_header(report.header, HeaderFacts.read(after))
        try:
            self._judge_disks(files, report.header)
        except Qcow2Error as error:
            raise WrongError(f"{self.name}: {error}") from error

    def _judge_disks(self, files: list[bytes], header: HeaderFacts) -> None:
        storages = [MemoryStorage(content) for content in files]
        image = open_readable(storages[0], storages[-1], self.told.backing)
        view = read_disk(image)
        if header.autoclear_features & RAW_DATA_FILE and files[-1][: len(view)] != view:
            raise WrongError(f"{self.name}: the raw data file is not the disk")
        common = min(len(view), len(self.told.view))
        kept = min(common, self.wanted.size or common)
        cut = {
            (view[start : start + SECTOR], self.told.view[start : start + SECTOR])
            for start in range(kept, common, SECTOR)
        }
        is_cut_wrong = any(now != before and any(now) for now, before in cut)
        if view[:kept] != self.told.view[:kept] or is_cut_wrong or any(view[common:]):
            raise WrongError(f"{self.name}: the disk has changed")
        for wanted, expected in self.told.snapshots.items():
            if read_disk(image.at_snapshot(wanted))[: len(expected)] != expected:
                raise WrongError(f"{self.name}: snapshot {wanted!r} has changed")

    def _judge_header(self, now: HeaderFacts, after: HeaderFacts) -> None:
        before = HeaderFacts.read(self.told.files[0])
        for field in ("version", "size", "compatible_features", "autoclear_features", "refcount_order", "backing_name"):
            if getattr(now, field) not in (getattr(before, field), getattr(after, field)):
                raise WrongError(f"{self.name}: {field} is {getattr(now, field)}")
        for kind in (UNKNOWN, 0x44415441):
            names = [dict(facts.extensions).get(kind) for facts in (now, before, after)]
            if names[0] not in names[1:]:
                raise WrongError(f"{self.name}: extension {kind:#x} is {names[0]!r}")

    def do_again(self, files: list[bytes], after: bytes) -> None:
        """The amendment once more makes of these files what it should."""
        storages = [MemoryStorage(content) for content in files]
        self.run(storages)
        content = [bytes(storage.content) for storage in storages]
        self.judge(content, after)
        now, wanted = HeaderFacts.read(content[0]), HeaderFacts.read(after)
        differing: list[Any] = [
            field
            for field in ("version", "size", "compatible_features", "autoclear_features", "refcount_order")
            if getattr(now, field) != getattr(wanted, field)
        ]
        if differing:
            raise WrongError(f"{self.name}: done again, it does not reach {differing}")
