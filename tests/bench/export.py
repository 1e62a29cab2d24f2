"""Exports of whole disks as raw files, beside `qemu-img convert -O raw`: whole processes, start of the interpreter too.

What is exported holds no zeros worth a hole, so each byte of it is moved. The copy is removed before the clock of the
next one starts. Where blocks can be shared (XFS on a loop device, for whoever may mount one), that is one more row.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from . import images
from .processes import BenchError, output_of
from .report import MILLISECONDS, Row, Section, interleave, progress
from .settings import Settings
from .tools import OURS, QEMU, command_lines, milliseconds_of

TIMES = 4
"""The disk has so many times `--size`."""
KINDS = ("plain", "deflate", "zstd", "raw data file", "raw data file, shared blocks")
NOTE = "Whole processes, `qcow2 export IMAGE TARGET`; a disk of {size} GiB that is full."


def measure(settings: Settings) -> Iterator[Section]:
    """The table; the files come and go."""
    size = min(TIMES * settings.size, shutil.disk_usage(settings.folder).free // 4 & -65536)
    section = Section("Exporting a disk as a raw file", NOTE.format(size=round(size / 2**30, 1)))
    yield section
    wanted = [kind for kind in KINDS if settings.wants(f"export {kind}")]
    if not wanted:
        return
    raw, image = settings.folder / "export.raw", settings.folder / "export.qcow2"
    try:
        progress(f"making the disk to export: {size >> 20} MiB")
        images.write_disk(raw, size)
        for kind in wanted:
            with contextlib.suppress(Unavailable), prepared(kind, raw, image, settings.folder) as ready:
                section.rows.append(row(kind, settings, ready))
    finally:
        for path in (raw, image):
            path.unlink(missing_ok=True)


class Unavailable(Exception):
    """This machine cannot measure that."""


@contextlib.contextmanager
def prepared(kind: str, raw: Path, image: Path, folder: Path) -> Iterator[Path]:
    """An image of this kind with the content of `raw`."""
    if kind == KINDS[-1]:
        with xfs(folder, 2 * raw.stat().st_size) as directory:
            shutil.copyfile(raw, directory / raw.name)
            images.link_data_file(directory / raw.name, directory / image.name)
            yield directory / image.name
        return
    try:
        if kind == "raw data file":
            images.link_data_file(raw, image)
        elif kind == "plain":
            images.convert(raw, image)
        else:
            images.convert(raw, image, "-c", "-o", f"compression_type={'zlib' if kind == 'deflate' else kind}")
        yield image
    finally:
        image.unlink(missing_ok=True)
        image.with_suffix(".data").unlink(missing_ok=True)


@contextlib.contextmanager
def xfs(folder: Path, size: int) -> Iterator[Path]:
    """A file system that shares blocks."""
    disk, mounted = folder / "xfs.disk", folder / "xfs"
    mounted.mkdir()
    try:
        with disk.open("wb") as file:
            file.truncate(size + (512 << 20))
        try:
            output_of(["mkfs.xfs", "-q", "-m", "reflink=1", str(disk)])
            output_of(["mount", "-o", "loop", str(disk), str(mounted)])
        except BenchError as error:
            progress(f"not measured: export {KINDS[-1]}: {error}")
            raise Unavailable from error
        try:
            yield mounted
        finally:
            output_of(["umount", str(mounted)])
    finally:
        disk.unlink(missing_ok=True)
        mounted.rmdir()


def row(kind: str, settings: Settings, image: Path) -> Row:
    """One kind, each tool in turn."""
    target = image.with_name("exported.raw")
    tools = command_lines()
    convert = [*tools[QEMU], "convert", "-f", "qcow2", "-O", "raw"]
    commands = {
        OURS: [*tools[OURS], "export", "-q", str(image), str(target)],
        "qemu-img convert": [*convert, str(image), str(target)],
        "qemu-img convert -m 16 -W": [*convert, "-m", "16", "-W", str(image), str(target)],
    }
    runs = {who: partial(milliseconds_of_export, target, command) for who, command in commands.items()}
    try:
        with contextlib.chdir(image.parent):  # where QEMU looks for a data file that an image names
            runs["qemu-img convert"]()  # memory that a virtual machine uses for the first time is slow for one and all
            return Row(kind, MILLISECONDS, interleave(settings.rounds, f"export {kind}", runs))
    finally:
        target.unlink(missing_ok=True)


def milliseconds_of_export(target: Path, command: list[str]) -> float:
    """Wall-clock milliseconds of one export to a file that is not there."""
    target.unlink(missing_ok=True)
    return milliseconds_of(command)
