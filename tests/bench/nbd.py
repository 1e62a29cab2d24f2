"""Reads over NBD: fio's nbd engine against our plugin, qemu-nbd and the pass-through plugin, for each kind of image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from . import fio, images, servers
from .fio import Workload
from .report import MEBIBYTES_PER_SECOND, REQUESTS, Row, Section, interleave, progress
from .settings import Settings

WARM_UP_SECONDS = 1


class Subject(NamedTuple):
    """One kind of image; `floor` where the same bytes also lie there as a raw file; nbdkit's `threads` for ours."""

    name: str
    make: Callable[[Path, Path], None]
    floor: bool
    threads: int


WORKLOADS = (
    Workload("4 KiB random, depth 1", "read", ("--rw=randread", "--bs=4k", "--iodepth=1"), REQUESTS),
    Workload("4 KiB random, depth 32", "read", ("--rw=randread", "--bs=4k", "--iodepth=32"), REQUESTS),
    Workload("1 MiB sequential, depth 8", "read", ("--rw=read", "--bs=1m", "--iodepth=8"), MEBIBYTES_PER_SECOND),
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
                timed(uri, WORKLOADS[1], WARM_UP_SECONDS)
            for workload in chosen:
                name = f"{subject.name}, {workload.name}"
                runs = {who: partial(timed, uri, workload, settings.seconds) for who, uri in uris.items()}
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


def timed(uri: str, workload: Workload, seconds: int) -> float:
    """One run of `seconds`."""
    return fio.rate(uri, workload, "--time_based", f"--runtime={seconds}")
