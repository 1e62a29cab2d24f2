"""Crashes while bitmaps whose tables no longer fit their clusters follow the disk to another size.

Such disks are too large to be read for every state, so only structures, sizes and marks are judged here. It owns one
workload and its rules.
"""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path

from tests.crash.scenario import WrongError
from tests.support.builder import ImageBuilder
from tests.support.crash_states import Crashes, State
from tests.support.image_checker import check_image
from tests.support.in_memory import open_in_memory
from tests.support.recording import Log, RecordingStorage

MIB = 1 << 20
SIZES = (100 * MIB, 150 * MIB, 90 * MIB)  # 64 entries, for 128 MiB, are one cluster of a bitmap table
MARKS = frozenset({0, 95 * MIB // 512, 95 * MIB // 512 + 1})
WRITTEN = 3 * MIB // 512
ENABLED, DISABLED = b"enabled " * 60, b"disabled"
"""The name lets the entry behind it begin 8 bytes before a sector ends: its fields are torn apart most easily."""


def _marks(size: int) -> dict[bytes, frozenset[int]]:
    """What settled bitmaps of a disk of this size mark."""
    kept = frozenset(sector for sector in MARKS if sector < size // 512)
    return {ENABLED: kept if size == SIZES[0] else kept | {WRITTEN}, DISABLED: kept}


@functools.cache
def image() -> bytes:
    """512-byte clusters, two bitmaps of 512-byte granules."""
    builder = ImageBuilder(SIZES[0], 9, l1_size=2 * SIZES[1] // (32 << 10))
    marks = [(sector * 512, 512) for sector in sorted(MARKS)]
    builder.bitmap(ENABLED, marks, granularity_bits=9, flags=2).bitmap(DISABLED, marks, granularity_bits=9)
    with tempfile.TemporaryDirectory(prefix="bitmaps-") as folder:
        built = builder.build(Path(folder) / "image")
        assert built.bitmap_entry_offsets[1] % 512 == 504
        return (Path(folder) / "image").read_bytes()


def crash(states: int, seed: int = 0) -> int:
    """Grows and shrinks the disk, crashes, and judges so many states; how many it were. Raises WrongError."""
    log = Log()
    storage = RecordingStorage(log, 0, image())
    sizes = [(0, 0, SIZES[0])]
    for size in SIZES[1:]:
        disk = open_in_memory(storage)
        start = log.now
        disk.resize(size, allow_shrink=True)
        sizes.append((start, log.now, size))
        disk.write_from(b"x" * 512, WRITTEN * 512)
        disk.close()
        _judge_content(bytes(storage.content), [size], is_closed=True)
    crashes = Crashes(log, (image(),))
    plans = crashes.plans()
    chosen = random.Random(seed).sample(range(len(plans)), min(states, len(plans)))
    for number in chosen:
        state = crashes.state(plans[number])
        try:
            _judge_content(state.files[0].content(), _possible(sizes, state), is_closed=False)
        except WrongError as error:
            raise WrongError(f"long bitmaps, state {number}: {error}") from None
    return len(chosen)


def _possible(sizes: list[tuple[int, int, int]], state: State) -> list[int]:
    last = max(number for number, (_, end, _) in enumerate(sizes) if end <= state.earliest)
    return [
        size
        for number, (start, _, size) in enumerate(sizes)
        if number == last or (last < number and start < state.latest)
    ]


def _judge_content(content: bytes | bytearray, sizes: list[int], *, is_closed: bool) -> None:
    report = check_image(content)
    if not report.is_sound:
        raise WrongError(f"O2: {[*report.corruptions, *report.damage][0]}")
    if report.header.size not in sizes:
        raise WrongError(f"O3: the disk has {report.header.size} bytes, not one of {sizes}")
    expected = _marks(report.header.size)
    if [bitmap.name for bitmap in report.bitmaps] != list(expected):
        raise WrongError("O5: a bitmap is gone")
    for bitmap in report.bitmaps:
        if (bitmap.granules is not None or is_closed) and bitmap.granules != expected[bitmap.name]:
            found = sorted(bitmap.granules or ())
            raise WrongError(f"O5: bitmap {bitmap.name[:8]!r} marks {found} instead of {sorted(expected[bitmap.name])}")
