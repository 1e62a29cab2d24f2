"""The care of an image: whole commands on a fully allocated 1 TiB image, start of the interpreter included.

`check` reads; the others change the image, so each run gets a copy of its own, made before its clock starts. All tables
are there, written by `create -o preallocation=metadata`; the data are a hole, so a copy is its tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from . import images
from .processes import output_of
from .report import MILLISECONDS, Row, Section, interleave, progress
from .settings import Settings
from .tools import LARGE, QEMU, command_lines, milliseconds_of

SNAPSHOT = "before"
SOURCE, TARGET = "source", "target"
WRITES = 256
"""Places that the bitmap to merge has marked, far from each other."""

NOTE = (
    "Whole processes. 1 TiB, every cluster allocated: 128 MiB of L2 tables, 32 MiB of refcounts. What changes the "
    f"image does so in a fresh copy; the bitmap that is merged has {WRITES} marks all over the disk."
)


class Verb(NamedTuple):
    """One row: how the image is made ready, and what both tools are told, with the image in place of None."""

    name: str
    prepare: Callable[[Path], None]
    words: tuple[str | None, ...]
    changes: bool = True


def take_snapshot(image: Path) -> None:
    """An internal snapshot, which shares every cluster."""
    output_of([QEMU, "snapshot", "-c", SNAPSHOT, str(image)])


def mark(image: Path) -> None:
    """Two bitmaps; the one that is merged has marks."""
    output_of([QEMU, "bitmap", "--add", str(image), SOURCE])
    lines = (f"write -q {number * (LARGE // WRITES)} 64k\n" for number in range(WRITES))
    output_of(["qemu-io", "-t", "writeback", "-f", "qcow2", str(image)], stdin="".join(lines))
    output_of([QEMU, "bitmap", "--add", str(image), TARGET])


def leave(image: Path) -> None:
    """As it is."""


VERBS = (
    Verb("check", leave, ("check", None), changes=False),
    Verb("snapshot -c", leave, ("snapshot", "-c", SNAPSHOT, None)),
    Verb("snapshot -d", take_snapshot, ("snapshot", "-d", SNAPSHOT, None)),
    Verb("bitmap --add", leave, ("bitmap", "--add", None, TARGET)),
    Verb("bitmap --merge", mark, ("bitmap", "--merge", SOURCE, None, TARGET)),
)


def measure(settings: Settings) -> Iterator[Section]:
    """The table; the images come and go."""
    section = Section("The care of a fully allocated 1 TiB image", NOTE)
    yield section
    wanted = [verb for verb in VERBS if settings.wants(f"care {verb.name}")]
    if not wanted:
        return
    plain, ready, copy = (settings.folder / f"{name}.qcow2" for name in ("care", "care-ready", "care-copy"))
    try:
        progress("making the image: 1 TiB, preallocation=metadata")
        images.preallocated(plain, LARGE)
        for verb in wanted:
            image = plain
            if verb.prepare is not leave:
                image = ready
                duplicate(plain, ready)
                verb.prepare(ready)
            section.rows.append(row(verb, settings, image, copy))
    finally:
        for image in (plain, ready, copy):
            image.unlink(missing_ok=True)


def row(verb: Verb, settings: Settings, image: Path, copy: Path) -> Row:
    """One verb, both tools in turn."""
    used = copy if verb.changes else image
    words = [str(used) if word is None else word for word in verb.words]
    commands = {who: [*tool, *words] for who, tool in command_lines().items()}
    if not verb.changes:
        for command in commands.values():
            output_of(command)
    run = partial(milliseconds_of_copy, image, copy) if verb.changes else milliseconds_of
    runs = {who: partial(run, command) for who, command in commands.items()}
    return Row(verb.name, MILLISECONDS, interleave(settings.rounds, f"care {verb.name}", runs))


def milliseconds_of_copy(image: Path, copy: Path, command: list[str]) -> float:
    """Wall-clock milliseconds of one whole run on a fresh copy."""
    duplicate(image, copy)
    return milliseconds_of(command)


def duplicate(image: Path, copy: Path) -> None:
    """A copy with the same holes."""
    copy.unlink(missing_ok=True)
    output_of(["cp", "--sparse=always", "--reflink=auto", str(image), str(copy)])
