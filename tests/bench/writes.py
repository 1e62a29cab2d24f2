"""Writes over NBD: fio's nbd engine against our plugin, qemu-nbd and the pass-through plugin.

Two families. *Allocated*: every cluster is there, fio writes for so many seconds and all servers of an image stand side
by side, each with a copy of its own. *Fresh*: each run begins with a new image, writes a fixed number of requests and
ends with a flush, so that everybody stores the same clusters and the metadata that makes them readable. The disk is so
large that few random requests meet a cluster that the run has already allocated.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from . import fio, images, servers
from .fio import Workload
from .report import MEBIBYTES_PER_SECOND, REQUESTS, Row, Section, interleave, progress
from .settings import Settings

MIB = 1 << 20
WARM_UP_SECONDS = 1
FRESH_DISK = 64 << 30
"""Bytes of a disk whose clusters are not there yet."""

Create = Callable[[Path], None]
Serve = Callable[[Path], AbstractContextManager[servers.Server]]


class Allocated(NamedTuple):
    """A kind of image, made from a raw disk with all clusters allocated."""

    name: str
    make: Callable[[Path, Path], None]


class Fresh(NamedTuple):
    """A kind of new image; `raw` where its data file is one, so that the floor can take part."""

    name: str
    create: Create
    raw: bool


DEPTH_1 = Workload("4 KiB random, depth 1", "write", ("--rw=randwrite", "--bs=4k", "--iodepth=1"), REQUESTS)
DEPTH_32 = Workload("4 KiB random, depth 32", "write", ("--rw=randwrite", "--bs=4k", "--iodepth=32"), REQUESTS)
SEQUENTIAL = Workload(
    "1 MiB sequential, depth 8", "write", ("--rw=write", "--bs=1m", "--iodepth=8"), MEBIBYTES_PER_SECOND
)
WORKLOADS = (DEPTH_1, DEPTH_32, SEQUENTIAL)


def convert(raw: Path, image: Path) -> None:
    """Every cluster allocated, those full of zeros too."""
    images.convert(raw, image, "-S", "0")


def copy_data_file(raw: Path, image: Path) -> None:
    """An image with a copy of the raw disk as external data file, raw bit set."""
    data_file = image.with_suffix(".data")
    images.preallocated(image, raw.stat().st_size, data_file=data_file)
    shutil.copyfile(raw, data_file)


ALLOCATED = (Allocated("plain", convert), Allocated("external data file", copy_data_file))
FRESH = (
    Fresh("plain", partial(images.create, virtual_size=FRESH_DISK), False),
    Fresh(
        "external data file",
        lambda image: images.create(image, FRESH_DISK, f"data_file={image.with_suffix('.data').name}"),
        False,
    ),
    Fresh(
        "raw external data file",
        lambda image: images.preallocated(image, FRESH_DISK, data_file=image.with_suffix(".data")),
        True,
    ),
)

NOTE = (
    "fio's nbd engine, one connection over a Unix socket. *allocated*: all clusters are there; the external data file "
    "is a raw one. *fresh*: a new image for every run, a fixed number of requests (random ones each to a cluster of "
    "its own, as far as chance has it) and a flush at the end; in a raw external data file only the file's own blocks "
    "are fresh, because QEMU makes all tables with the image. qemu-nbd runs with `--cache=writeback`; *pass-through* "
    "is an nbdkit Python plugin that only calls `pwritev` on a raw file. Ours runs with `--threads=1`."
)


def measure(settings: Settings) -> Iterator[Section]:
    """The table of writes; the images come and go one after the other."""
    section = Section("Writing over NBD", NOTE)
    yield section
    section.rows.extend(allocated_rows(settings))
    section.rows.extend(fresh_rows(settings))


def allocated_rows(settings: Settings) -> Iterator[Row]:
    """Rows of writes in place."""
    raw = settings.folder / "disk.raw"
    for subject in ALLOCATED:
        kind = f"{subject.name}, allocated"
        chosen = wanted(settings, kind)
        if not chosen:
            continue
        with contenders(subject, raw, settings) as uris:
            for uri in uris.values():
                fio.rate(uri, DEPTH_32, "--time_based", f"--runtime={WARM_UP_SECONDS}")
            for name, workload in chosen.items():
                duration = ("--time_based", f"--runtime={settings.seconds}")
                runs = {who: partial(fio.rate, uri, workload, *duration) for who, uri in uris.items()}
                yield Row(name, workload.unit, interleave(settings.rounds, f"write {name}", runs))
    raw.unlink(missing_ok=True)


def wanted(settings: Settings, kind: str) -> dict[str, Workload]:
    """The workloads to measure on this kind of image, by the names of their rows."""
    named = {f"{kind}, {workload.name}": workload for workload in WORKLOADS}
    return {name: workload for name, workload in named.items() if settings.wants(f"write {name}")}


@contextmanager
def contenders(subject: Allocated, raw: Path, settings: Settings) -> Iterator[dict[str, str]]:
    """All servers at once (idle ones cost nothing), each with its own copy of the disk; the copies go with them."""
    if not raw.exists():
        progress("writing the disk")
        images.write_disk(raw, settings.size)
    progress(f"making the images: {subject.name}")
    copies = {servers.OURS: settings.folder / "ours.qcow2", servers.QEMU: settings.folder / "qemu.qcow2"}
    try:
        for image in copies.values():
            subject.make(raw, image)
        served = {**copies, servers.FLOOR: raw}
        with ExitStack() as stack:
            yield {who: stack.enter_context(serve(served[who])).uri for who, serve in SERVE.items()}
    finally:
        for image in copies.values():
            remove(image)


SERVE: dict[str, Serve] = {
    servers.OURS: partial(servers.ours, threads=1, writable=True),
    servers.QEMU: partial(servers.qemu_nbd, writable=True),
    servers.FLOOR: partial(servers.pass_through, writable=True),
}


def fresh_rows(settings: Settings) -> Iterator[Row]:
    """Rows of writes that allocate."""
    lengths = request_counts(settings.size)
    touched = False
    for subject in FRESH:
        creates = {servers.OURS: subject.create, servers.QEMU: subject.create}
        if subject.raw:
            creates[servers.FLOOR] = create_raw
        for name, workload in wanted(settings, f"{subject.name}, fresh").items():
            bounded = workload._replace(options=(*workload.options, *lengths[workload]))
            image = settings.folder / "fresh.qcow2"
            if not touched:
                touch_memory(image, 2 * settings.size)
                touched = True
            runs = {who: partial(fresh_run, create, SERVE[who], bounded, image) for who, create in creates.items()}
            yield Row(name, workload.unit, interleave(settings.rounds, f"write {name}", runs))


def touch_memory(file: Path, size: int) -> None:
    """Use so much memory once: in a virtual machine the first touch of a page is slow, whoever it is."""
    images.write_disk(file, size)
    file.unlink()


def request_counts(size: int) -> dict[Workload, tuple[str, ...]]:
    """fio's options that bound each workload: at most 2 * `size` bytes of clusters, a second or more of work."""
    scattered = (f"--blockalign={images.CLUSTER_SIZE}", "--norandommap")
    clusters = size // images.CLUSTER_SIZE
    return {
        DEPTH_1: (*scattered, f"--number_ios={clusters}"),
        DEPTH_32: (*scattered, f"--number_ios={2 * clusters}"),
        SEQUENTIAL: (f"--number_ios={2 * size // MIB}",),
    }


def create_raw(disk: Path) -> None:
    """A raw disk that is one hole."""
    with disk.open("wb") as file:
        file.truncate(FRESH_DISK)


def fresh_run(create: Create, serve: Serve, workload: Workload, image: Path) -> float:
    """One run into a new image."""
    try:
        create(image)
        with serve(image) as server:
            return fio.rate(server.uri, workload, "--end_fsync=1")
    finally:
        remove(image)


def remove(image: Path) -> None:
    """An image and its data file, if there."""
    image.unlink(missing_ok=True)
    image.with_suffix(".data").unlink(missing_ok=True)
