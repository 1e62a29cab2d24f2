"""`qcow2 map`: what people see, and maps of any length in a steady stream."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qcow2_plugin import open_image
from qcow2_plugin.operations.map import MapEntry, map_image
from tests.support.builder import ImageBuilder, huge_empty, patch, shared_l2_bomb
from tests.support.command import process_environment, qcow2, qcow2_json

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.qcow2"


def test_people_see_what_is_allocated_and_a_summary(path: Path) -> None:
    (path.parent / "base.raw").write_bytes(b"x" * 128 * KIB)
    image = ImageBuilder(MIB).backing(b"base.raw").data(3, b"a").compressed(5, b"b").zero(6)
    built = image.build(path)
    title, *rows, summary = qcow2("map", path).stdout.splitlines()
    assert title.split() == ["START", "LENGTH", "KIND", "STORED", "AT", "FILE"]
    assert [row.split() for row in rows] == [
        ["0x0", "0x20000", "data", "0x0", f"{path.parent}/base.raw"],
        ["0x30000", "0x10000", "data", hex(built.data_offsets[3]), str(path)],
        ["0x50000", "0x10000", "compressed", "-", str(path)],
        ["0x60000", "0x10000", "zeros", "-", str(path)],
    ]
    assert summary == "1 MiB in all: 192 KiB data, 64 KiB compressed, 64 KiB zeros, 704 KiB unallocated (zeros)"


def test_people_see_what_was_never_written(path: Path) -> None:
    told = ImageBuilder(8 * MIB)
    for cluster in range(100):
        told.data(cluster, b"")
    built = told.build(path)
    with open(path, "r+b") as file:  # the data leaves a hole, the tables stay
        end = os.fstat(file.fileno()).st_size
        first = min(built.data_offsets.values())
        kept = os.pread(file.fileno(), first, 0)
        tail = os.pread(file.fileno(), end, max(built.data_offsets.values()) + 65536)
        file.truncate(0)
        file.truncate(end)
        os.pwrite(file.fileno(), kept, 0)
        os.pwrite(file.fileno(), tail, max(built.data_offsets.values()) + 65536)
    assert "data, never written" in qcow2("map", path).stdout


def test_no_name_acts_on_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "\x1b[31m\u202edisk\x9b.qcow2"
    ImageBuilder(MIB).data(0, b"x").build(path)
    shown = qcow2("map", path).stdout
    assert all(character == "\n" or unicodedata.category(character) not in {"Cc", "Cf"} for character in shown)


def test_entries_are_plain_values(path: Path) -> None:
    ImageBuilder(MIB).data(0, b"x").zero(1, preallocated=True).compressed(2, b"x").build(path)
    with open_image(path) as image:
        for entry in map_image(image):
            assert [type(value) for value in entry[:6]] == [int, int, int, bool, bool, bool]
            assert type(entry.offset) in (int, type(None))


def test_an_empty_range_has_one_entry(path: Path) -> None:
    ImageBuilder(MIB).build(path)
    nothing = MapEntry(MIB, 0, 0, False, False, False, None)
    with open_image(path) as image:
        assert list(map_image(image, MIB)) == [nothing]
        assert list(map_image(image, MIB, 0)) == [nothing]


@pytest.mark.parametrize("make", [huge_empty, shared_l2_bomb])
def test_huge_disks_cost_little(make: Callable[[Path], object], path: Path) -> None:
    make(path)
    begin = time.thread_time()
    with open_image(path) as image:
        entries = list(map_image(image))
    assert time.thread_time() - begin < 1
    assert sum(entry.length for entry in entries) == image.virtual_size


def fragmented(path: Path, cluster_count: int) -> None:
    """Every other cluster of 512 bytes allocated: as many entries as clusters."""
    table_entries = 64
    tables = cluster_count // table_entries
    told = ImageBuilder(cluster_count * 512, cluster_bits=9, refcount_bits=16)
    built = told.build(path)
    end = -(-built.file_size // 512) * 512
    entries = np.zeros(cluster_count, dtype=">u8")
    entries[::2] = np.arange(cluster_count // 2, dtype=np.uint64) * 512 + (end + tables * 512) + (1 << 63)
    patch(path, end, entries.tobytes())
    l1 = (np.arange(tables, dtype=np.uint64) * 512 + end) | np.uint64(1 << 63)
    patch(path, built.l1_offset, l1.astype(">u8").tobytes())
    os.truncate(path, end + tables * 512 + cluster_count * 512)


PEAK = """
import sys
from qcow2_plugin.adapters.cli import main
status = main(["map", "--output=json", sys.argv[1]])
print(open("/proc/self/status").read(), file=sys.stderr)
sys.exit(status)
"""


def map_with_peak(path: Path) -> tuple[int, int]:
    """Entries of the map, and the most memory that the command had, in bytes."""
    answer = path.with_suffix(".json")
    with open(answer, "wb") as stdout:
        done = subprocess.run(
            [sys.executable, "-c", PEAK, path],
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=process_environment(),
            check=True,
        )
    peak = next(line for line in done.stderr.decode().splitlines() if line.startswith("VmHWM:"))
    return len(json.loads(answer.read_bytes())), int(peak.split()[1]) << 10


def test_long_maps_take_no_more_memory_than_short_ones(path: Path) -> None:
    """300,000 entries are 30 MB of text."""
    fragmented(path, 64)
    few, least = map_with_peak(path)
    fragmented(path, 300_032)
    many, most = map_with_peak(path)
    assert (few, many) == (64, 300_032)
    assert most < least + 12 * MIB


def test_the_command_fits_in_little_memory(path: Path) -> None:
    shared_l2_bomb(path)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (3, 3))

    done = subprocess.run(
        [sys.executable, "-m", "qcow2_plugin", "map", path],
        preexec_fn=limit,
        capture_output=True,
        env=process_environment({"OPENBLAS_NUM_THREADS": "1"}),
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_truncated_image_is_refused_unless_wanted(path: Path) -> None:
    built = ImageBuilder(MIB).data(0, b"a").data(1, b"b").build(path)
    os.truncate(path, built.data_offsets[0])
    ended = qcow2("map", path)
    assert ended.status == 1
    assert "truncated" in ended.stderr
    assert len(qcow2_json("map", "--allow-damaged", path)) >= 2
