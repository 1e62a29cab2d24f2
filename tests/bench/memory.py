"""Peak memory of reading at random: the same number of reads from a small, a large and a very large image."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from . import fio, servers
from .processes import output_of, peak_memory
from .report import MEBIBYTES, Row, Section, interleave
from .settings import Settings
from .tools import VIRTUAL_SIZES, sized

READS = 100_000

NOTE = (
    f"Peak resident memory of a fresh process after {READS:,} random 4 KiB reads. L2 tables: 128 KiB for 1 GiB, "
    "32 MiB for 256 GiB, as much as is cached by default, 128 MiB for 1 TiB."
)


def measure(settings: Settings) -> Iterator[Section]:
    """The table of peaks; one fresh process per figure."""
    section = Section("Peak memory", NOTE, compared=False)
    yield section
    readers: dict[str, Callable[[Path], float]] = {
        "nbdkit with our plugin": partial(of_server, partial(servers.ours, threads=1)),
        "qemu-nbd": partial(of_server, servers.qemu_nbd),
        "the package in a Python process": of_reader,
    }
    for name, reader in readers.items():
        if settings.wants(f"memory, {name}"):
            runs = {size: partial(reader, sized(settings, size)) for size in VIRTUAL_SIZES}
            section.rows.append(Row(name, MEBIBYTES, interleave(settings.rounds, f"memory, {name}", runs)))


def of_server(serve: Callable[[Path], AbstractContextManager[servers.Server]], image: Path) -> float:
    """MiB of a server that fio reads from. No map of visited blocks: fio's own memory must not matter."""
    with serve(image) as server:
        random_reads = ("--rw=randread", "--bs=4k", "--iodepth=32", "--norandommap")
        fio.report(server.uri, "read", *random_reads, "--random_generator=tausworthe64", f"--number_ios={READS}")
        return peak_memory(server.pid) / 2**20


def of_reader(image: Path) -> float:
    """MiB of a Python that imports the package and reads."""
    told = output_of([sys.executable, "-m", f"{__package__}.in_process", "read", str(image), str(READS)])
    return float(json.loads(told)["peak"]) / 2**20
