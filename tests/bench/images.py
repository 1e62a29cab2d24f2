"""The disks and images that are measured: made by qemu-img, or written as bare tables where 1 TiB must cost nothing.

Two kinds:

* Images with content (`write_disk` and what qemu-img makes of it) for reading. The content is what disks hold: the
  files below /usr of the machine that runs this, one after the other; deflate shrinks them to about 40 %.
* Images of any size without content (`write_tables`, `preallocated`) for `map`, `open` and memory. All L2 tables are
  there and every cluster is mapped, while the data area is a hole of a sparse file: 1 TiB costs 128 MiB of tables.

QEMU, before it answers `map`, counts refcounts and compares them with the space that the file really takes. Many more
clusters in use than space taken means "preallocated", and from then on it asks the file system about every run. That is
other work than walking tables, so both are measured: `preallocated` has true refcounts and triggers it. `write_tables`
counts its own metadata only and leaves data clusters at refcount 0, which `qemu-img check` would call corrupt and no
reader looks at; so nothing is detected and the tables alone speak, as in an image that is really full. An image with an
external data file (`preallocated(..., data_file=...)`) is right in every respect and is not detected either, because
its refcounts never count data.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .processes import BenchError, output_of

CLUSTER_SIZE = 64 * 1024
ENTRIES_PER_TABLE = CLUSTER_SIZE // 8
REFCOUNTS_PER_BLOCK = CLUSTER_SIZE // 2
COPIED = 1 << 63


def write_disk(path: Path, size: int) -> None:
    """A raw disk of `size` bytes: programs, libraries and documents of this machine, from the start again if few."""
    with path.open("wb") as disk:
        while disk.tell() < size:
            before = disk.tell()
            for file in system_files():
                disk.write(file.read_bytes())
                if disk.tell() >= size:
                    break
            if disk.tell() == before:
                raise BenchError("there are no readable files below /usr to fill a disk with")
        disk.truncate(size)


def system_files() -> Iterator[Path]:
    """The regular files below /usr that we may read, always in the same order."""
    for folder, folders, names in os.walk("/usr"):
        folders.sort()
        for name in sorted(names):
            file = Path(folder, name)
            if file.is_file() and not file.is_symlink() and os.access(file, os.R_OK):
                yield file


def convert(raw: Path, image: Path, *options: str) -> None:
    """What `qemu-img convert` makes: with no options, clusters in guest order, one run from start to end."""
    output_of(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, str(raw), str(image)])


def scatter(raw: Path, image: Path) -> None:
    """The same content in clusters allocated one by one in random order, as in an image that has lived."""
    size = raw.stat().st_size
    create(image, size)
    offsets = list(range(0, size, CLUSTER_SIZE))
    random.Random(20).shuffle(offsets)
    lines = (f"write -q {offset} {min(CLUSTER_SIZE, size - offset)}\n" for offset in offsets)
    output_of(["qemu-io", "-t", "writeback", "-f", "qcow2", str(image)], stdin="".join(lines))
    output_of(["qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", str(raw), str(image)])


def link_data_file(raw: Path, image: Path) -> None:
    """An image with the raw disk itself (a hard link to it) as external data file, raw bit set."""
    data_file = image.with_suffix(".data")
    preallocated(image, raw.stat().st_size, data_file=data_file)
    data_file.unlink()
    data_file.hardlink_to(raw)


def preallocated(image: Path, virtual_size: int, *, data_file: Path | None = None) -> None:
    """An image of qemu-img with all tables and no content; with a data file, that one raw (and sparse)."""
    option = "preallocation=metadata" if data_file is None else f"data_file={data_file.name},data_file_raw=on"
    create(image, virtual_size, option)


def create(image: Path, virtual_size: int, options: str = "") -> None:
    """An empty image of qemu-img; `options` are its -o options, comma separated."""
    words = ["-o", options] if options else []
    output_of(["qemu-img", "create", "-f", "qcow2", *words, image.name, str(virtual_size)], folder=image.parent)


def write_tables(image: Path, virtual_size: int, *, run_clusters: int | None = None) -> None:
    """Header, refcounts, L1 and L2 tables of a full image, then a hole where its data would be.

    Data clusters follow each other in guest order or, with `run_clusters`, in runs of so many clusters whose order is
    shuffled. The virtual size is a multiple of the run, and of the cluster size.

    Source: docs/interop/qcow2.rst, "Header", "Host cluster management", "Cluster mapping".
    """
    cluster_count = virtual_size // CLUSTER_SIZE
    table_count = -(-cluster_count // ENTRIES_PER_TABLE)
    l1_clusters = -(-table_count // ENTRIES_PER_TABLE)
    first_l1, first_l2 = 3, 3 + l1_clusters
    first_data = first_l2 + table_count
    if first_data > REFCOUNTS_PER_BLOCK:
        raise BenchError(f"a virtual size of {virtual_size} needs more than one refcount block here")
    order = shuffled_runs(cluster_count, run_clusters or cluster_count)
    with image.open("wb") as file:
        for cluster, content in (
            (0, header(virtual_size, table_count, first_l1)),
            (1, np.array([2 * CLUSTER_SIZE], ">u8").data),
            (2, np.ones(first_data, ">u2").data),
            (first_l1, entries(np.arange(first_l2, first_data, dtype=np.uint64))),
            (first_l2, entries(order + np.uint64(first_data))),
        ):
            file.seek(cluster * CLUSTER_SIZE)
            file.write(content)
        file.truncate((first_data + cluster_count) * CLUSTER_SIZE)


def shuffled_runs(cluster_count: int, run_clusters: int) -> NDArray[np.uint64]:
    """For each guest cluster, its place among the data clusters."""
    runs = np.random.default_rng(seed=20).permutation(cluster_count // run_clusters).astype(np.uint64)
    within = np.arange(run_clusters, dtype=np.uint64)
    return (runs[:, np.newaxis] * np.uint64(run_clusters) + within).ravel()


def entries(clusters: NDArray[np.uint64]) -> memoryview:
    """L1 or L2 entries that own the given host clusters."""
    return ((clusters * np.uint64(CLUSTER_SIZE)) | np.uint64(COPIED)).astype(">u8").data


def header(virtual_size: int, l1_size: int, first_l1: int) -> bytes:
    """A version 3 header without extensions; refcount table in cluster 1, one refcount block in cluster 2."""
    return struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        b"QFI\xfb",
        3,
        0,
        0,
        CLUSTER_SIZE.bit_length() - 1,
        virtual_size,
        0,
        l1_size,
        first_l1 * CLUSTER_SIZE,
        CLUSTER_SIZE,
        1,
        0,
        0,
        0,
        0,
        0,
        4,
        104,
    )
