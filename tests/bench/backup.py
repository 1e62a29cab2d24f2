"""Backups to a directory, beside what a script around QEMU's tools does: whole processes, start of Python included.

A full one is compared with `qemu-img convert`, an increment with a copy of the dirty ranges that `qemu-nbd -B` tells
of (`dirty_copy`). The repository is made anew, and bitmaps of earlier rounds removed, while the clock stands. Content
digests are left out where the other side makes none, and shown as a row of their own.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from . import images
from .processes import output_of, seconds_of
from .report import MILLISECONDS, Row, Section, interleave, progress
from .servers import qemu_nbd
from .settings import Settings
from .tools import OURS, QEMU, command_lines

TIMES = 4
"""The disk has so many times `--size`."""
LARGE = 64 << 30
SHARE = 100
"""One cluster in so many is dirty in an increment."""
CONVERT = "qemu-img convert"
CONVERT_BEST = "qemu-img convert -m 16 -W"
DIRTY_COPY = "qemu-nbd -B, libnbd"
FULL_NOTE = "Whole processes, `qcow2 backup IMAGE --to DIRECTORY --full`; a disk of {size} GiB that is full."
INCREMENT_NOTE = (
    "Whole processes; 1 % of the clusters of the disk are dirty, at random. The other side starts qemu-nbd, asks it "
    "for the map of the bitmap and copies what is dirty into a sparse raw file."
)


def measure(settings: Settings) -> Iterator[Section]:
    """The two tables; the files come and go."""
    size = min(TIMES * settings.size, shutil.disk_usage(settings.folder).free // 5 & -65536)
    full = Section("Full backup", FULL_NOTE.format(size=round(size / 2**30, 1)))
    yield full
    increment = Section("Incremental backup", INCREMENT_NOTE)
    yield increment
    names = ("full plain", "full deflate", "full with digest", "increment", "increment of 64 GiB")
    wanted = [name for name in names if settings.wants(f"backup {name}")]
    if not wanted:
        return
    raw, image = settings.folder / "backup.raw", settings.folder / "backup.qcow2"
    try:
        progress(f"making the disk to back up: {size >> 20} MiB")
        images.write_disk(raw, size)
        images.convert(raw, image)
        raw.unlink()
        for name, options in (
            ("full plain", ["--no-digest"]),
            ("full deflate", ["--no-digest", "--compress"]),
            ("full with digest", []),
        ):
            if name in wanted:
                full.rows.append(full_row(name, options, settings, image))
        if "increment" in wanted:
            increment.rows.append(increment_row("increment", size, settings, image))
        image.unlink()
        if "increment of 64 GiB" in wanted:
            images.create(image, LARGE)
            increment.rows.append(increment_row("increment of 64 GiB", LARGE, settings, image))
    finally:
        for path in (raw, image):
            path.unlink(missing_ok=True)


def full_row(name: str, options: list[str], settings: Settings, image: Path) -> Row:
    """One kind of full backup, each tool in turn."""
    target, repository = image.with_name("copy.qcow2"), image.with_name("repository")
    tools = command_lines()
    convert = [*tools[QEMU], "convert", "-f", "qcow2", "-O", "qcow2", *(["-c"] if "--compress" in options else [])]
    ours = [*tools[OURS], "backup", str(image), "--to", str(repository), "--full", "-q", *options]

    def anew(command: list[str]) -> float:
        target.unlink(missing_ok=True)
        forget(image, repository)
        return 1000 * seconds_of(command)

    runs = {
        OURS: partial(anew, ours),
        CONVERT: partial(anew, [*convert, str(image), str(target)]),
        CONVERT_BEST: partial(anew, [*convert, "-m", "16", "-W", str(image), str(target)]),
    }
    try:
        return Row(name, MILLISECONDS, interleave(settings.rounds, f"backup {name}", runs))
    finally:
        target.unlink(missing_ok=True)
        forget(image, repository)


def increment_row(name: str, size: int, settings: Settings, image: Path) -> Row:
    """One per cent of the disk, written anew before each backup of it."""
    repository, copied = image.with_name("repository"), image.with_name("dirty.raw")
    tools = command_lines()
    ours = [*tools[OURS], "backup", str(image), "--to", str(repository), "--incremental", "-q", "--no-digest"]
    output_of([*tools[OURS], "backup", str(image), "--to", str(repository), "--full", "-q", "--no-digest"])
    chance = random.Random(6)
    runs: dict[str, Callable[[], float]] = {
        DIRTY_COPY: partial(milliseconds_of_dirty_copy, image, copied),
        OURS: lambda: 1000 * seconds_of(ours),
    }
    try:
        figures: dict[str, list[float]] = {OURS: [], DIRTY_COPY: []}
        for _ in range(settings.rounds):
            write_some(image, size, chance)
            for who, values in interleave(1, f"backup {name}", runs).items():
                figures[who] += values
        return Row(name, MILLISECONDS, figures)
    finally:
        copied.unlink(missing_ok=True)
        forget(image, repository)


def milliseconds_of_dirty_copy(image: Path, copied: Path) -> float:
    """Server and client, from the start of the one to the end of the other."""
    copied.unlink(missing_ok=True)
    bitmap = next(each["name"] for each in bitmaps_of(image) if "auto" in each["flags"])
    script = Path(__file__).with_name("dirty_copy.py")
    began = time.perf_counter()
    with qemu_nbd(image, f"--bitmap={bitmap}") as server:
        output_of([sys.executable, "-P", str(script), server.uri, bitmap, str(copied)])
        return 1000 * (time.perf_counter() - began)


def write_some(image: Path, size: int, chance: random.Random) -> None:
    """Write one cluster in `SHARE`, at random."""
    clusters = size // images.CLUSTER_SIZE
    chosen = sorted(chance.sample(range(clusters), clusters // SHARE))
    lines = (f"write -q -P {chance.randrange(1, 256)} {each * images.CLUSTER_SIZE} 64k\n" for each in chosen)
    output_of(["qemu-io", "-t", "writeback", "-f", "qcow2", str(image)], stdin="".join(lines))


def forget(image: Path, repository: Path) -> None:
    """Neither a repository nor a bitmap."""
    shutil.rmtree(repository, ignore_errors=True)
    for each in bitmaps_of(image):
        output_of(["qemu-img", "bitmap", "--remove", str(image), each["name"]])


def bitmaps_of(image: Path) -> list[dict[str, Any]]:
    """As qemu-img tells them."""
    told = json.loads(output_of(["qemu-img", "info", "--output=json", str(image)]))
    return list(told["format-specific"]["data"].get("bitmaps", []))
