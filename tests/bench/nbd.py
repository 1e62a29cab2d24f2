"""Reads over NBD: fio's nbd engine against our plugin, qemu-nbd and the pass-through plugin, for each kind of image."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from . import images, servers
from .processes import BenchError, output_of
from .report import MEBIBYTES_PER_SECOND, REQUESTS, Row, Section, Unit, interleave, progress
from .settings import Settings

WARM_UP_SECONDS = 1


class Workload(NamedTuple):
    """One way of reading."""

    name: str
    fio: tuple[str, ...]
    unit: Unit


class Subject(NamedTuple):
    """One kind of image; `floor` where the same bytes also lie there as a raw file; nbdkit's `threads` for ours."""

    name: str
    make: Callable[[Path, Path], None]
    floor: bool
    threads: int


WORKLOADS = (
    Workload("4 KiB random, depth 1", ("--rw=randread", "--bs=4k", "--iodepth=1"), REQUESTS),
    Workload("4 KiB random, depth 32", ("--rw=randread", "--bs=4k", "--iodepth=32"), REQUESTS),
    Workload("1 MiB sequential, depth 8", ("--rw=read", "--bs=1m", "--iodepth=8"), MEBIBYTES_PER_SECOND),
)


def compress(method: str, raw: Path, image: Path) -> None:
    """Every cluster compressed by qemu-img."""
    images.convert(raw, image, "-c", "-o", f"compression_type={method}")


SUBJECTS = (
    Subject("plain", images.convert, True, 1),
    Subject("scattered", images.scatter, True, 1),
    Subject("external data file", images.link_data_file, True, 1),
    Subject("compressed, deflate", partial(compress, "zlib"), False, 4),
    Subject("compressed, zstd", partial(compress, "zstd"), False, 4),
)

NOTE = (
    "fio's nbd engine, one connection over a Unix socket, programs and documents as content. *plain* is what "
    "`qemu-img convert` makes (one run from start to end), *scattered* the same clusters allocated in random order, "
    "*external data file* a raw one. qemu-nbd runs with its defaults, read-only; *pass-through* is an nbdkit Python "
    "plugin that only calls `preadv` on the raw disk. Ours runs with what is fastest for files in memory: "
    "`--threads=1`, and `--threads=4` for compressed images."
)


def measure(settings: Settings) -> Iterator[Section]:
    """The table of reads; the images come and go one after the other."""
    section = Section("Reading over NBD", NOTE)
    yield section
    raw = settings.folder / "disk.raw"
    for subject in SUBJECTS:
        chosen = [workload for workload in WORKLOADS if settings.wants(f"fio {subject.name}, {workload.name}")]
        if not chosen:
            continue
        if not raw.exists():
            progress("writing the disk")
            images.write_disk(raw, settings.size)
        with contenders(subject, raw, settings) as uris:
            for uri in uris.values():
                fio(uri, WORKLOADS[1], WARM_UP_SECONDS)
            for workload in chosen:
                name = f"{subject.name}, {workload.name}"
                runs = {who: partial(fio, uri, workload, settings.seconds) for who, uri in uris.items()}
                section.rows.append(Row(name, workload.unit, interleave(settings.rounds, name, runs)))
    raw.unlink(missing_ok=True)


@contextmanager
def contenders(subject: Subject, raw: Path, settings: Settings) -> Iterator[dict[str, str]]:
    """All servers of one image at once (idle ones cost nothing); the image goes when they have gone."""
    image = settings.folder / "disk.qcow2"
    progress(f"making the image: {subject.name}")
    try:
        subject.make(raw, image)
        with ExitStack() as stack:
            uris = {
                servers.OURS: stack.enter_context(servers.ours(image, subject.threads)).uri,
                servers.QEMU: stack.enter_context(servers.qemu_nbd(image)).uri,
            }
            if subject.floor:
                uris[servers.FLOOR] = stack.enter_context(servers.pass_through(raw)).uri
            yield uris
    finally:
        image.unlink(missing_ok=True)
        image.with_suffix(".data").unlink(missing_ok=True)


def fio(uri: str, workload: Workload, seconds: int) -> float:
    """One run of `seconds`; requests per second, or MiB per second, as the workload's unit says."""
    report = read(uri, *workload.fio, "--time_based", f"--runtime={seconds}")
    return report["iops"] if workload.unit is REQUESTS else report["bw_bytes"] / 2**20


def read(uri: str, *options: str) -> dict[str, float]:
    """The `read` part of fio's report on one job."""
    told = output_of(
        ["fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", *options, "--eta=never", "--output-format=json"]
    )
    job = json.loads(told[told.index("{") :])["jobs"][0]
    if job["error"]:
        raise BenchError(f"fio ended with error {job['error']}")
    reads: dict[str, float] = job["read"]
    return reads
