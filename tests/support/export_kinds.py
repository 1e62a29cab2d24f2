"""Images of every kind, small, made by QEMU's tools or field by field, for whoever has to read them all.

Owns how each is made and how it is to be opened. What the guest sees is asked of qemu-img.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.builder import ImageBuilder
from tests.support.mixture import fill
from tests.support.tools import qemu_img, qemu_io

_SIZE = 5 << 20


class Kind(NamedTuple):
    """An image, what `qemu-img convert` has to be told about it, and what `open_image` has to."""

    path: Path
    extra: tuple[str, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012  # never changed


def _made(directory: Path, options: str = "", size: int = _SIZE, *, compress: bool = True) -> Path:
    path = directory / "image.qcow2"
    words = ["-o", options] if options else []
    qemu_img("create", "-q", "-f", "qcow2", *words, path, str(size))
    _filled(path, size, compress=compress)
    return path


def _filled(path: Path, size: int, *, seed: int = 1, compress: bool = False) -> None:
    step = size // 16 // 512 * 512
    commands = []
    for number in range(0, 16, 2):
        at = number * step
        commands.append(f"write -q -P {seed + number} {at + 512} {step // 2}")
        commands.append(f"write -q -z {at + step} {step // 3 // 512 * 512}")
        commands.append(f"write -q -P 0 {at + step // 4 // 512 * 512} 8192")
    if compress:
        commands.append("write -q -c -P 77 3145728 65536")
        commands.append("write -q -c -P 78 3211264 65536")
    commands.append(f"write -q -P 99 {size - 512} 512")
    qemu_io(path, *commands)


def active(directory: Path) -> Kind:
    """A disk that has lived, with compressed clusters among others."""
    return Kind(_made(directory))


def odd_size(directory: Path) -> Kind:
    """Its end is in the middle of a cluster, and of a granule."""
    return Kind(_made(directory, size=_SIZE + 512 * 3))


def version_2(directory: Path) -> Kind:
    """For old programs."""
    path = directory / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", path, str(_SIZE))
    qemu_io(path, "write -q -P 5 1M 300k", "write -q -c -P 6 3M 64k", "write -q -P 7 4M 512")
    return Kind(path)


def snapshot(directory: Path) -> Kind:
    """What an internal snapshot keeps."""
    path = _made(directory)
    qemu_img("snapshot", "-c", "then", path)
    _filled(path, _SIZE, seed=40)
    return Kind(path, ("-l", "then"), {"snapshot": "then"})


def three_layers(directory: Path) -> Kind:
    """Each has parts of its own."""
    base = directory / "base.qcow2"
    _made(directory).rename(base)
    middle, top = directory / "middle.qcow2", directory / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", middle)
    qemu_io(middle, "write -q -P 50 1M 700k", "write -q -z 2M 300k")
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "middle.qcow2", "-o", "cluster_size=4k", top)
    qemu_io(top, "write -q -P 51 1100k 50k", "discard -q 4M 100k", "write -q -z 1500k 20k")
    return Kind(top)


def raw_backing(directory: Path) -> Kind:
    """Over a raw file with holes, zeros, and an end that is no sector's."""
    with (directory / "base.raw").open("wb") as file:
        file.write(bytes(range(256)) * 1000 + bytes(100_000))
        file.seek(2 << 20)
        file.write(b"x" * 200_001)
        file.seek((3 << 20) + 5)
        file.write(b"the end")
    path = directory / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw", path, str(_SIZE))
    qemu_io(path, "write -q -P 3 100k 10k", "write -q -z 2100k 30k", "write -q -P 4 4M 1M")
    return Kind(path)


def shorter_backing(directory: Path) -> Kind:
    """The disk goes on where the backing file has ended."""
    base = directory / "base.qcow2"
    _made(directory, size=2 << 20, compress=False).rename(base)
    path = directory / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", path, str(_SIZE))
    qemu_io(path, "write -q -P 3 1900k 300k")
    return Kind(path)


def longer_backing(directory: Path) -> Kind:
    """The backing file goes on where the disk has ended, in the middle of a cluster."""
    base = directory / "base.qcow2"
    _made(directory).rename(base)
    path = directory / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", path, str((3 << 20) + 512 * 37))
    qemu_io(path, "write -q -P 3 1900k 300k")
    return Kind(path)


def _compressed(directory: Path, method: str) -> Kind:
    lived, path = _made(directory), directory / "compressed.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", "-o", f"compression_type={method}", lived, path)
    qemu_io(path, "write -q -P 9 1M 100k")
    return Kind(path)


def deflate(directory: Path) -> Kind:
    """Compressed by deflate."""
    return _compressed(directory, "zlib")


def zstd(directory: Path) -> Kind:
    """Compressed by zstd."""
    return _compressed(directory, "zstd")


def subclusters(directory: Path) -> Kind:
    """Parts of clusters, over a backing file."""
    (directory / "base.raw").write_bytes(b"below" * 400_000)
    path = directory / "image.qcow2"
    options = "extended_l2=on,cluster_size=64k"
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw", "-o", options, path, str(_SIZE))
    qemu_io(path, *[f"write -q -P {1 + n} {n * 70_000 // 512 * 512} 3k" for n in range(40)], "write -q -z 1M 6k")
    return Kind(path)


def data_file(directory: Path) -> Kind:
    """With an external data file that is no raw image."""
    path = _made(directory, f"data_file={directory / 'data'}", compress=False)
    return Kind(path, options={"data_file": directory / "data"})


def raw_data_file(directory: Path) -> Kind:
    """With a data file that is the disk."""
    path = _made(directory, f"data_file={directory / 'data'},data_file_raw=on", _SIZE + 512, compress=False)
    return Kind(path, options={"data_file": directory / "data"})


def shorter_data_file(directory: Path) -> Kind:
    """With a data file that ends in the middle of a cluster, long before the disk."""
    path = _made(directory, f"data_file={directory / 'data'}", compress=False)
    os.truncate(directory / "data", 1_500_001)
    return Kind(path, options={"data_file": directory / "data"})


def longer_data_file(directory: Path) -> Kind:
    """With a data file that goes on where the disk has ended."""
    path = _made(directory, f"data_file={directory / 'data'},data_file_raw=on", _SIZE + 512, compress=False)
    with (directory / "data").open("ab") as file:
        file.write(b"behind" * 50_000)
    return Kind(path, options={"data_file": directory / "data"})


def zero_clusters(directory: Path) -> Kind:
    """Zeros that keep old bytes where they stand, which nobody may see."""
    builder = ImageBuilder(_SIZE).data(1, b"shown" * 100).zero(2).zero(3, preallocated=True, payload=b"hidden" * 1000)
    path = directory / "image.qcow2"
    builder.data(4, b"x" * 65536).zero(5, preallocated=True, payload=b"y" * 65536).data(70, b"tail").build(path)
    return Kind(path)


def preallocated(directory: Path) -> Kind:
    """All clusters are mapped, few are there."""
    return Kind(_made(directory, "preallocation=metadata", compress=False))


def large_subclusters(directory: Path) -> Kind:
    """Of 64 KiB, over a raw file whose end is in the middle of one."""
    (directory / "base.raw").write_bytes(b"below" * 800_000)
    path = directory / "image.qcow2"
    options = "extended_l2=on,cluster_size=2M"
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw", "-o", options, path, str(_SIZE))
    qemu_io(path, *[f"write -q -P {1 + n} {n * 700_000 // 512 * 512} 3k" for n in range(7)], "write -q -z 1M 70k")
    return Kind(path)


def small_clusters(directory: Path) -> Kind:
    """Smaller than a granule."""
    return Kind(_made(directory, "cluster_size=512", 1 << 20, compress=False))


def large_clusters(directory: Path) -> Kind:
    """Larger than a chunk, some compressed."""
    source = _made(directory)
    path = directory / "large.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", "-o", "cluster_size=2M", source, path)
    qemu_io(path, "write -q -P 9 1M 100k")
    return Kind(path)


def mixture(directory: Path) -> Kind:
    """A mixture of everything a guest does."""
    path = directory / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "24M")
    fill(path, 24 << 20, 4096, seed=6, l2_coverage=512 * 4096, compressed=True, count=60)
    return Kind(path)


def empty(directory: Path) -> Kind:
    """Nothing was written."""
    path = directory / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "3M")
    return Kind(path)


KINDS: tuple[Callable[[Path], Kind], ...] = (
    active,
    odd_size,
    version_2,
    snapshot,
    three_layers,
    raw_backing,
    shorter_backing,
    longer_backing,
    deflate,
    zstd,
    subclusters,
    data_file,
    raw_data_file,
    shorter_data_file,
    longer_data_file,
    zero_clusters,
    preallocated,
    large_subclusters,
    small_clusters,
    large_clusters,
    mixture,
    empty,
)
