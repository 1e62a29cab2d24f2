"""What must hold of an image after a crash.

    O1  it opens, without an error of any kind
    O2  no corruption; after a repair by the next writer, if it is marked dirty
    O3  every sector is the last safe value or one that was issued later; in a raw data file too
    O4  an internal snapshot reads as when it was taken
    O5  a bitmap is marked unusable, or marks all that changed
    O6  the header claims what was true at first and nothing else
    O7  qemu-img counts and reads the same (asked for some states)

and the next writer can write to it. Every problem is a WrongError of one line. It refuses to know how the image came
to be as it is.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qcow2_plugin.engine.image import Image
from tests.crash.history import as_sectors, text
from tests.crash.kinds import SNAPSHOT, UNKNOWN_AUTOCLEAR
from tests.crash.opening import open_readable, read_disk
from tests.crash.scenario import Scenario, WrongError
from tests.support import fields
from tests.support.crash_states import FileState, State
from tests.support.image_checker import CORRUPT, DIRTY, BitmapFacts, HeaderFacts, Report, check_image
from tests.support.in_memory import open_in_memory
from tests.support.memory_storage import MemoryStorage
from tests.support.recording import SECTOR
from tests.support.tools import ToolError, convert_to_raw, qemu_img

AUTOCLEAR_BITMAPS = 1
BITMAP_IN_USE = 1
BITMAP_AUTO = 2


@dataclass(frozen=True)
class Judged:
    """A state that has passed, for whoever wants to know more of it."""

    contents: tuple[bytearray, ...]
    view: bytes
    report: Report


def judge(state: State, scenario: Scenario) -> Judged:
    """O1 to O6. Raises WrongError."""
    contents = tuple(file.content() for file in state.files)
    report = _check(contents[0])
    with _opened(contents, scenario) as image:
        view = _read(image)
        if scenario.kind.snapshot_view is not None:
            _check_snapshot(image, scenario.kind.snapshot_view)
    _check_disk(view, contents, state, scenario)
    _check_bitmaps(report, view, state, scenario)
    _check_header(report.header, state.files, scenario, view)
    return Judged(contents, view, report)


def _opened(contents: tuple[bytearray, ...], scenario: Scenario) -> Image:
    storages = [MemoryStorage(content) for content in contents]
    try:
        return open_readable(storages[0], storages[1] if len(storages) > 1 else None, scenario.kind.backing)
    except Exception as error:
        raise WrongError(f"O1: the image does not open: {type(error).__name__}: {error}") from error


def _read(image: Image) -> bytes:
    try:
        return read_disk(image)
    except Exception as error:
        raise WrongError(f"O1: the disk cannot be read: {type(error).__name__}: {error}") from error


def _check(content: bytes | bytearray, *, is_repaired: bool = False) -> Report:
    """O2."""
    is_dirty = bool(content[79] & DIRTY)
    if is_repaired and is_dirty:
        raise WrongError("O2: the image is dirty after a repair")
    report = check_image(content, guess_refcounts=is_dirty)
    if not report.is_sound:
        found = [*report.corruptions, *report.damage]
        raise WrongError(f"O2: {len(found)} corruptions, the first: {found[0]}")
    return report


def _check_disk(view: bytes, contents: tuple[bytearray, ...], state: State, scenario: Scenario) -> None:
    """O3."""
    history = scenario.history
    times = [state.earliest]
    if history.safe_requests(state.earliest) != history.safe_requests(state.latest):
        times.append(state.latest)
    for now in times:
        problem = history.violation(view, now)
        if problem:
            raise WrongError(f"O3: {problem}")
        if scenario.is_raw:
            if len(contents[1]) < len(view):
                raise WrongError(f"O3: the raw data file has {len(contents[1])} bytes, the disk {len(view)}")
            data = bytes(contents[1][: len(view)]).ljust(len(view), b"\0")
            problem = history.violation(data, now)
            if problem:
                raise WrongError(f"O3: in the raw data file, {problem}")
            settled = history.settled(now)[: len(view) // SECTOR]
            wrong = np.flatnonzero((as_sectors(view) != as_sectors(data)).any(axis=1)[: len(settled)] & settled)
            if wrong.size:
                raise WrongError(f"O3: safe sector {wrong[0]} differs between the disk and the raw data file")


def _check_snapshot(image: Image, expected: bytes) -> None:
    """O4."""
    try:
        snapshot = image.at_snapshot(SNAPSHOT)
        view = read_disk(snapshot)
    except Exception as error:
        raise WrongError(f"O4: the snapshot cannot be read: {type(error).__name__}: {error}") from error
    if view != expected:
        wrong = np.flatnonzero((as_sectors(view) != as_sectors(expected)).any(axis=1))
        raise WrongError(f"O4: sector {wrong[0]} of the snapshot has changed")


# ---- bitmaps


def _check_bitmaps(report: Report, view: bytes, state: State, scenario: Scenario) -> None:
    """O5."""
    before = {bitmap.name: bitmap for bitmap in scenario.before.bitmaps}
    if not before or not report.header.autoclear_features & AUTOCLEAR_BITMAPS:
        return
    names = [bitmap.name for bitmap in report.bitmaps]
    if names != list(before):
        raise WrongError(f"O5: the bitmaps are {names} instead of {list(before)}")
    smallest = scenario.history.smallest(len(view), state.latest)
    kept = smallest // SECTOR  # what was cut off and came back is new, and clean, as in QEMU
    changed = {sector for sector in _changed_sectors(view, scenario.view) if sector < kept}
    stored = max((number for number, time in scenario.stored if time <= state.latest), default=-1)
    known = {sector for sector in scenario.history.changed(stored) if sector < min(kept, len(view) // SECTOR)}
    must_mark, may_mark = changed | known, scenario.history.touched(state.latest)
    is_closed = stored >= 0 and not any(later.start < state.latest for later in scenario.history.requests[stored + 1 :])
    for bitmap in report.bitmaps:
        _check_bitmap(bitmap, before[bitmap.name], must_mark, may_mark, smallest)
        if is_closed and bitmap.granules is None and before[bitmap.name].granules is not None:
            raise WrongError(f"O5: bitmap {bitmap.name!r} is stale after the image was closed")


def _check_bitmap(bitmap: BitmapFacts, before: BitmapFacts, must_mark: set[int], may_mark: set[int], size: int) -> None:
    """`must_mark` and `may_mark` are sectors; nothing that was marked before is kept from `size` on."""
    if bitmap.flags & ~BITMAP_IN_USE != before.flags & ~BITMAP_IN_USE:
        raise WrongError(f"O5: the flags of bitmap {bitmap.name!r} are {bitmap.flags:#x}")
    if bitmap.granules is None:
        return
    if before.granules is None:
        raise WrongError(f"O5: bitmap {bitmap.name!r} was stale and claims to be right")
    shift = bitmap.granularity_bits - 9
    kept = {granule for granule in before.granules if granule << bitmap.granularity_bits < size}
    must, may = kept, before.granules
    if bitmap.flags & BITMAP_AUTO:
        must = kept | {sector >> shift for sector in must_mark}
        may = before.granules | {sector >> shift for sector in may_mark}
    if not bitmap.granules >= must:
        raise WrongError(
            f"O5: bitmap {bitmap.name!r} does not mark granule {min(must - bitmap.granules)}, which changed"
        )
    if not bitmap.granules <= may:
        raise WrongError(f"O5: bitmap {bitmap.name!r} marks granule {min(bitmap.granules - may)}, which nobody touched")


def _changed_sectors(view: bytes, before: bytes) -> set[int]:
    length = max(len(view), len(before))
    first, second = (as_sectors(each.ljust(length, b"\0")) for each in (view, before))
    return {sector for sector in np.flatnonzero((first != second).any(axis=1)).tolist() if sector * SECTOR < len(view)}


# ---- the header


def _check_header(header: HeaderFacts, files: tuple[FileState, ...], scenario: Scenario, view: bytes) -> None:
    """O6."""
    before = scenario.before.header
    for name in ("version", "cluster_bits", "crypt_method", "refcount_order", "compression_type", "backing_name",
                 "nb_snapshots", "compatible_features"):  # fmt: skip
        if getattr(header, name) != getattr(before, name):
            raise WrongError(f"O6: {name} is {getattr(header, name)!r} instead of {getattr(before, name)!r}")
    if header.incompatible_features not in (before.incompatible_features, before.incompatible_features & ~DIRTY):
        what = "marked corrupt" if header.incompatible_features & CORRUPT else f"{header.incompatible_features:#x}"
        raise WrongError(f"O6: the incompatible features are {what}")
    if _fixed_extensions(header) != _fixed_extensions(before):
        raise WrongError("O6: the header extensions have changed")
    if header.autoclear_features & ~before.autoclear_features:
        raise WrongError(f"O6: the autoclear features are {header.autoclear_features:#x}")
    if (before.autoclear_features & 2) & ~header.autoclear_features:
        raise WrongError("O6: the raw data file bit is gone")
    covered = header.l1_size * scenario.kind.l2_coverage
    if covered < header.size:
        raise WrongError(f"O6: an L1 table of {header.l1_size} entries for a disk of {header.size} bytes")
    if header.autoclear_features & UNKNOWN_AUTOCLEAR and (view != scenario.view or _has_changed(files, before)):
        raise WrongError("O6: an unknown autoclear feature bit is set, and the image has changed")


def _fixed_extensions(header: HeaderFacts) -> list[tuple[int, bytes]]:
    return [(kind, b"" if kind == fields.BITMAPS else data) for kind, data in header.extensions]


def _has_changed(files: tuple[FileState, ...], before: HeaderFacts) -> bool:
    """Anything but the header's sector, the refcounts of a dirty image, and the flags of bitmaps differs."""
    if before.incompatible_features & DIRTY:
        return False
    directory = next((data for kind, data in before.extensions if kind == fields.BITMAPS), None)
    free = {0}
    if directory is not None:
        start, length = int.from_bytes(directory[16:24], "big"), int.from_bytes(directory[8:16], "big")
        free |= set(range(start // SECTOR, (start + length - 1) // SECTOR + 1))
    return any(
        not free.issuperset(file.sectors) if number == 0 else bool(file.sectors) for number, file in enumerate(files)
    )


# ---- the next writer


def recover(judged: Judged, scenario: Scenario, seed: int) -> None:
    """Somebody opens the image, writes a little and closes it; then it must be sound and read as it should.

    Raises WrongError.
    """
    storages = [MemoryStorage(bytearray(content)) for content in judged.contents]
    data = storages[1] if len(storages) > 1 else None
    expected = bytearray(judged.view)
    try:
        image = open_in_memory(storages[0], data, scenario.kind.backing)
        for number in range(3):
            offset = (seed * 7919 + number * 4999) * SECTOR % len(expected)
            content = text(f"after{number}", offset, min(SECTOR * 3, len(expected) - offset))
            image.write_from(content, offset)
            expected[offset : offset + len(content)] = content
        image.close()
        with open_readable(storages[0], data, scenario.kind.backing) as reader:
            view = _read(reader)
    except WrongError:
        raise
    except Exception as error:
        raise WrongError(f"O2: nobody can write to it: {type(error).__name__}: {error}") from error
    report = _check(storages[0].content, is_repaired=True)
    if report.all_leaks > judged.report.all_leaks:
        raise WrongError(f"O2: the next writer left {report.all_leaks - judged.report.all_leaks} leaks")
    if view != expected:
        wrong = np.flatnonzero((as_sectors(view) != as_sectors(bytes(expected))).any(axis=1))
        raise WrongError(f"O3: the next writer changed sector {wrong[0]}")


def judge_closed(scenario: Scenario) -> None:
    """After a clean end: nothing wrong, no leak that was not there at first, bitmaps usable. Raises WrongError."""
    first = scenario.before
    content = scenario.contents[0]
    report = _check(content, is_repaired=content != scenario.initial[0])
    if report.all_leaks > first.all_leaks:
        raise WrongError(f"O2: {report.all_leaks - first.all_leaks} clusters are leaked by a clean close")
    for bitmap, before in zip(report.bitmaps, first.bitmaps, strict=True):
        if (bitmap.granules is None) != (before.granules is None):
            raise WrongError(f"O5: bitmap {bitmap.name!r} is stale after a clean close")


# ---- qemu-img


def ask_qemu(judged: Judged, scenario: Scenario) -> None:
    """O7. Raises WrongError."""
    with tempfile.TemporaryDirectory(prefix="crash-") as folder:
        names = [Path(folder) / name for name in ("image", "data")]
        for name, content in zip(names, judged.contents, strict=False):
            name.write_bytes(content)
        if scenario.kind.backing is not None:
            (Path(folder) / "backing").write_bytes(scenario.kind.backing)
        options = f"driver=qcow2,file.driver=file,file.filename={names[0]}"
        if len(judged.contents) > 1:
            options += f",data-file.driver=file,data-file.filename={names[1]}"
        counted = _qemu_counts(options)
        report = check_image(judged.contents[0])
        if counted != (len(report.corruptions), report.leaks):
            raise WrongError(f"O7: qemu-img check counts {counted}, not {(len(report.corruptions), report.leaks)}")
        if convert_to_raw(options, extra=("--image-opts",)) != judged.view:
            raise WrongError("O7: qemu-img convert reads something else")


def _qemu_counts(options: str) -> tuple[int, int]:
    try:
        answer = qemu_img("check", "--output=json", "--image-opts", options)
    except ToolError as error:
        if error.returncode not in (2, 3):
            raise WrongError(f"O7: qemu-img check: {error.stderr.strip()}") from error
        answer = error.stdout
    found = json.loads(answer)
    return found.get("corruptions", 0), found.get("leaks", 0)
