"""Images made to do harm, and what must hold for every look at one.

Owns the witnesses: no descriptor or lock stays, no file changes, no message can act on a terminal, time and memory
stay within bounds; and the second opinion of QEMU. It refuses to know what is wrong with an image: the tables in
tests/hostile say that, and what has to come of it.
"""

from __future__ import annotations

import os
import time
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import Qcow2Error
from qcow2_plugin.operations.info import info
from tests.support.lockbytes import locked_bytes
from tests.support.tools import ToolError, convert_to_raw, qemu_img, run
from tests.support.watching import audited_opens, no_descriptor_left

IMAGE = "image.qcow2"
SECONDS = 0.5  # of this thread's own work; that of a busy or shared machine counts several times
MEMORY = 24 << 20  # bytes
READ = 4 << 20  # bytes of a disk that are read at most
_BYTES_COMPARED = 1 << 20


@dataclass(frozen=True)
class Hostile:
    """An image, made at a path by `make`, and what must come of opening it and reading its whole disk.

    `error` None: everything reads. `at` says whether opening refuses it or only reading. `qemu` says how QEMU is asked
    for its opinion; where the two disagree, `differs` tells why, and the test fails if they agree after all.
    """

    name: str
    make: Callable[[Path], object]
    error: type[Qcow2Error] | None = None
    match: str = ""
    at: Literal["open", "read"] = "open"
    qemu: Literal["convert", "read", "info", ""] = "convert"
    differs: str = ""
    seconds: float = SECONDS

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Outcome:
    """What came of a look: the stage that failed and why, or what was read."""

    stage: Literal["open", "read", ""]
    error: Qcow2Error | None
    content: bytes


def look(path: Path, **options: Any) -> Outcome:
    """Opens the image, walks its map and reads (the beginning of) the disk. Errors that are not ours pass."""
    try:
        image = open_image(path, **options)
    except Qcow2Error as error:
        return Outcome("open", error, b"")
    with image:
        length = min(image.virtual_size, READ)
        try:
            for _ in image.extents(0, length):
                pass
            return Outcome("", None, image.pread(length, 0))
        except Qcow2Error as error:
            return Outcome("read", error, b"")


def check(hostile: Hostile, directory: Path) -> None:
    """Everything that must hold for `hostile`, made in `directory`."""
    path = directory / IMAGE
    hostile.make(path)
    with unharmed(directory, seconds=hostile.seconds):
        outcome = look(path)
    if hostile.error is None:
        assert outcome.error is None, outcome.error
    else:
        assert outcome.error is not None, "nothing was refused"
        assert type(outcome.error) is hostile.error, outcome.error
        assert hostile.match in str(outcome.error), outcome.error
        assert outcome.stage == hostile.at, outcome.stage
        assert outcome.error.file is not None, "the message does not name its file"
        assert_harmless_text(str(outcome.error))
    check_info(path)
    if hostile.qemu:
        _compare_with_qemu(hostile, path, outcome)


def check_info(path: Path) -> None:
    """`info` opens the one file, and answers or refuses with an error of ours."""
    with unharmed(path.parent), audited_opens() as names:
        try:
            found = info(path)
        except Qcow2Error as error:
            assert_harmless_text(str(error))
        else:
            for problem in () if found.qcow2 is None else found.qcow2.problems:
                assert_harmless_text(problem)
    others = {name for name in names if not name.startswith("/proc/self/fd/")} - {str(path)}
    assert not others, others


@contextmanager
def unharmed(directory: Path, *, seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Fails if the block leaves descriptors, locks or a changed file in `directory`, or takes more than it may."""
    before = _state(directory)
    with no_descriptor_left(), bounded(seconds=seconds, memory=memory):
        yield
    assert _state(directory) == before


@contextmanager
def bounded(*, seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Fails if the block works longer or has more memory allocated at any time; watching memory makes it slower."""
    tracemalloc.start()
    start = time.thread_time()
    try:
        yield
        worked = time.thread_time() - start
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert worked < seconds, f"{worked:.2f} s of work"
    assert peak < memory, f"{peak >> 10} KiB allocated"


@contextmanager
def quick(seconds: float) -> Iterator[None]:
    """Fails if the block works longer."""
    start = time.thread_time()
    yield
    worked = time.thread_time() - start
    assert worked < seconds, f"{worked:.2f} s of work"


def assert_harmless_text(text: str) -> None:
    """No character that acts on a terminal or misleads whoever reads it."""
    bad = {character for character in text if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert not bad, f"{bad} in {text!r}"


def _state(directory: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns)
        if path.is_file() and not path.is_symlink():
            content = b"" if status.st_size > _BYTES_COMPARED else path.read_bytes()
            found[str(path)] = (status.st_size, status.st_mtime_ns, content, frozenset(locked_bytes(path)))
    return found


def _compare_with_qemu(hostile: Hostile, path: Path, ours: Outcome) -> None:
    theirs = _ask_qemu(hostile, path)
    if theirs is not None and ours.error is None and hostile.qemu == "convert":
        assert ours.content == theirs
    agreed = (ours.error is None) == (theirs is not None)
    if hostile.differs:
        assert not agreed, f"QEMU agrees, although: {hostile.differs}"
    else:
        assert agreed, f"QEMU {'refuses' if theirs is None else 'accepts'} it"


def _ask_qemu(hostile: Hostile, path: Path) -> bytes | None:
    """What QEMU reads ("convert"), or something if it opens the image at all; None if it refuses."""
    try:
        if hostile.qemu == "convert":
            return convert_to_raw(path)
        if hostile.qemu == "read":
            return run("qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512", path).encode()
        return qemu_img("info", "-f", "qcow2", path).encode()
    except ToolError:
        return None


def bytes_of(path: Path, offset: int, length: int) -> bytes:
    """Bytes of a file as they are now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)
