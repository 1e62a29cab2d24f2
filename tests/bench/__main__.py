"""`python -m tests.bench`: parse the options, run the sections, print the tables, leave nothing behind."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from . import backup, care, export, memory, nbd, report, tools, writes
from .processes import BenchError
from .settings import Settings

SUFFIXES = {"K": 10, "M": 20, "G": 30, "T": 40}
TABLES_SIZE = 512 << 20
"""Room for the images that are only tables."""
FAMILIES = (
    nbd.measure,
    writes.measure,
    tools.creates,
    tools.maps,
    tools.infos,
    tools.opens,
    care.measure,
    export.measure,
    backup.measure,
    memory.measure,
)
"""Each yields its table, then fills it: what was measured before something fails is kept."""


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="tests/bench/run.sh", description="Measure side by side with QEMU's tools.")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds of every comparison (default: 5)")
    parser.add_argument("--seconds", type=int, default=3, metavar="S", help="seconds of each fio run (default: 3)")
    parser.add_argument(
        "--size", type=byte_count, default="1G", metavar="SIZE", help="disk read and written over NBD (default: 1G)"
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help='only measurements with this in their name, such as "fio plain", "write plain", "fresh", "depth 32", '
        '"create", "map", "info", "care", "export", "backup", "memory"',
    )
    parser.add_argument("--json", type=Path, default=Path("bench.json"), metavar="FILE", help="(default: bench.json)")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("/dev/shm"),
        metavar="FOLDER",
        help="where the images go; keep it in memory (default: /dev/shm)",
    )
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 1 or chosen.seconds < 1 or chosen.size < 1 << 20:
        parser.error("--rounds is at least 1, --seconds at least 1, --size at least 1M")
    return chosen


def byte_count(text: str) -> int:
    """A size such as 256M, rounded down to whole clusters."""
    number, shift = (text[:-1], SUFFIXES[text[-1].upper()]) if text[-1:].upper() in SUFFIXES else (text, 0)
    return (int(number) << shift) & -65536


def run(chosen: argparse.Namespace) -> int:
    """Measure and report; 1 if one of the tables could not be filled."""
    header = report.machine()
    sections: list[report.Section] = []
    status = 0
    with tempfile.TemporaryDirectory(prefix="qcow2-bench-", dir=chosen.directory.resolve()) as folder:
        settings = Settings(Path(folder), chosen.rounds, chosen.seconds, chosen.size, chosen.only)
        for measure in FAMILIES:
            try:
                for section in measure(settings):
                    sections.append(section)
            except BenchError as error:
                report.progress(f"not measured: {sections[-1].title}: {error}")
                status = 1
    if not status and not any(section.rows for section in sections):
        raise BenchError(f"no measurement has {chosen.only!r} in its name")
    how = f"Medians of {chosen.rounds} interleaved rounds, {chosen.seconds} s per fio run, files in memory."
    print(report.markdown(header, how, sections))
    options = {"rounds": chosen.rounds, "seconds": chosen.seconds, "size": chosen.size, "only": chosen.only}
    chosen.json.write_text(json.dumps(report.as_json(header, options, sections), indent=1) + "\n")
    report.progress(f"every round: {chosen.json}")
    return status


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    chosen = parsed(arguments)
    needed = 3 * chosen.size + TABLES_SIZE
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        if shutil.disk_usage(chosen.directory).free < needed:
            raise BenchError(
                f"{chosen.directory} needs {needed >> 20} MiB free: choose a smaller --size or a --directory"
            )
        return run(chosen)
    except (BenchError, OSError) as error:
        report.progress(f"bench: {error}")
        return 1
    except KeyboardInterrupt:
        report.progress("stopped")
        return 130


if __name__ == "__main__":
    sys.exit(main())
