"""Whole commands, start of the interpreter included, and opening an image in a running Python.

The commands: `qcow2 create`, `qcow2 map`, `qcow2 info`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from . import images
from .processes import output_of, seconds_of
from .report import MILLISECONDS, Row, Section, interleave, progress
from .settings import Settings

LARGE = 1 << 40
VIRTUAL_SIZES = {"1 GiB": 1 << 30, "256 GiB": 1 << 38, "1 TiB": LARGE}
SIZES = ("1 GiB", "1 TiB")

OURS = "qcow2-plugin"
QEMU = "qemu-img"
START = "`python3 -c pass`"
RUN_CLUSTERS = 256
REPEATS = 200

MAPPED: dict[str, Callable[[Path], None]] = {
    "one run": partial(images.write_tables, virtual_size=LARGE),
    "runs of 16 MiB": partial(images.write_tables, virtual_size=LARGE, run_clusters=RUN_CLUSTERS),
    "external data file": lambda image: images.preallocated(image, LARGE, data_file=image.with_suffix(".data")),
    "preallocated": partial(images.preallocated, virtual_size=LARGE),
}

MAP_NOTE = (
    "Whole processes, JSON to /dev/null. Every cluster of 1 TiB is mapped (128 MiB of L2 tables): data in *one run*, "
    "in 65,536 shuffled *runs of 16 MiB*, in a raw *external data file*, and *preallocated* by qemu-img, where QEMU "
    "notices that the file is sparse and asks the file system too."
)
CREATE_NOTE = "Whole processes; 160 MiB of tables are written, into memory as everything here."
INFO_NOTE = "Whole processes; a fresh Python that does nothing is shown for scale."
OPEN_NOTE = (
    f"In a running Python with the package imported, median of {REPEATS}; *qemu-img* is a whole `qemu-img info`, for "
    "orientation only."
)


def creates(settings: Settings) -> Iterator[Section]:
    """`qcow2 create` and `qemu-img create` of a 1 TiB image with all its tables."""
    section = Section("`create -o preallocation=metadata` of a 1 TiB image", CREATE_NOTE)
    yield section
    name = "create, preallocation=metadata, 1 TiB"
    if not settings.wants(name):
        return
    image = settings.folder / "created.qcow2"
    options = ["-o", "preallocation=metadata", str(image), str(LARGE)]
    tools = command_lines()
    commands = {OURS: [*tools[OURS], "create", *options], QEMU: [*tools[QEMU], "create", "-f", "qcow2", *options]}
    runs = {who: partial(milliseconds_of_new, command, image) for who, command in commands.items()}
    section.rows.append(Row("preallocation=metadata, 1 TiB", MILLISECONDS, interleave(settings.rounds, name, runs)))


def milliseconds_of_new(command: list[str], image: Path) -> float:
    """Wall-clock milliseconds of one whole run that makes `image`, which goes again."""
    try:
        return milliseconds_of(command)
    finally:
        image.unlink(missing_ok=True)


def maps(settings: Settings) -> Iterator[Section]:
    """`qcow2 map` and `qemu-img map` of 1 TiB images; both must give the same answer before they are timed."""
    section = Section("`map --output=json` of a fully allocated 1 TiB image", MAP_NOTE)
    yield section
    image = settings.folder / "mapped.qcow2"
    for kind, make in MAPPED.items():
        name = f"map, {kind}"
        if not settings.wants(name):
            continue
        progress(f"making the image: 1 TiB, {kind}")
        try:
            make(image)
            commands = {who: [*tool, "map", "--output=json", str(image)] for who, tool in command_lines().items()}
            same_answer(name, commands, settings.folder)
            with contextlib.chdir(settings.folder):  # where QEMU looks for a data file that an image names
                section.rows.append(timed(settings, kind, name, commands))
        finally:
            image.unlink(missing_ok=True)
            image.with_suffix(".data").unlink(missing_ok=True)


def infos(settings: Settings) -> Iterator[Section]:
    """`qcow2 info` and `qemu-img info`, and what starting Python alone takes."""
    section = Section("`info --output=json`", INFO_NOTE)
    yield section
    for size in SIZES:
        name = f"info, {size}"
        if not settings.wants(name):
            continue
        image = sized(settings, size)
        commands = {who: [*tool, "info", "--output=json", str(image)] for who, tool in command_lines().items()}
        commands[START] = [sys.executable, "-c", "pass"]
        for command in commands.values():
            output_of(command)
        section.rows.append(timed(settings, size, name, commands))


def opens(settings: Settings) -> Iterator[Section]:
    """`open_image` with `close`, and `info`, as calls."""
    section = Section("Opening an image in process", OPEN_NOTE)
    yield section
    for verb in ("open", "info"):
        for size in SIZES:
            name = f"in process {verb}, {size}"
            if not settings.wants(name):
                continue
            image = sized(settings, size)
            reference = partial(milliseconds_of, [QEMU, "info", "--output=json", str(image)])
            runs = {OURS: partial(in_process, verb, image), QEMU: reference}
            section.rows.append(Row(f"{verb}, {size}", MILLISECONDS, interleave(settings.rounds, name, runs)))


def timed(settings: Settings, label: str, name: str, commands: dict[str, list[str]]) -> Row:
    """A row of whole processes."""
    runs = {who: partial(milliseconds_of, command) for who, command in commands.items()}
    return Row(label, MILLISECONDS, interleave(settings.rounds, name, runs))


def sized(settings: Settings, size: str) -> Path:
    """The full image of that size, written when it is first asked for."""
    image = settings.folder / f"{size.replace(' ', '')}.qcow2"
    if not image.exists():
        images.write_tables(image, VIRTUAL_SIZES[size])
    return image


def command_lines() -> dict[str, list[str]]:
    """How a user starts each tool: our command as installed, or as a module where it is not."""
    installed = Path(sys.executable).with_name("qcow2")
    return {OURS: [str(installed)] if installed.exists() else [sys.executable, "-m", "qcow2_plugin"], QEMU: [QEMU]}


def same_answer(name: str, commands: dict[str, list[str]], folder: Path) -> None:
    """Compare what the commands print, which also warms the caches of both."""
    answers = [json.loads(output_of(command, folder=folder)) for command in commands.values()]
    if any(answer != answers[0] for answer in answers):
        progress(f"{name}: WARNING, the two answers differ; the times compare different work")


def milliseconds_of(command: list[str]) -> float:
    """Wall-clock milliseconds of one whole run."""
    return 1000 * seconds_of(command)


def in_process(verb: str, image: Path) -> float:
    """Median milliseconds of one call in a fresh Python."""
    told = output_of([sys.executable, "-m", f"{__package__}.in_process", verb, str(image), str(REPEATS)])
    return float(json.loads(told)["milliseconds"])
