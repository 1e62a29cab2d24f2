"""Dirty bitmaps as QEMU's programs make and show them, and ranges of a disk as bitmaps round them."""

from __future__ import annotations

from pathlib import Path

import nbd

from tests.support.tools import qemu_img, qemu_img_json

Ranges = list[tuple[int, int]]


def create(path: Path, size: int, options: str = "cluster_size=65536") -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(size))


def add(path: Path, name: str, granularity: int = 65536, *flags: str) -> None:
    """By qemu-img."""
    qemu_img("bitmap", "--add", *flags, "-g", str(granularity), path, name)


def dirty(path: Path, name: str) -> Ranges:
    """(offset, length) of what qemu-nbd shows as dirty, merged."""
    context = f"qemu:dirty-bitmap:{name}"
    handle = nbd.NBD()
    handle.add_meta_context(context)
    handle.connect_systemd_socket_activation(["qemu-nbd", "-r", "-f", "qcow2", "-B", name, str(path)])
    found: list[tuple[int, int, int]] = []
    offset, size = 0, handle.get_size()
    while offset < size:
        told: list[int] = []
        handle.block_status(min(size - offset, 1 << 31), offset, lambda _c, _o, each, _e, to=told: to.extend(each))
        for length, flags in zip(told[::2], told[1::2], strict=True):
            found.append((offset, min(length, size - offset), flags))
            offset += length
    handle.shutdown()
    return merged([(offset, length) for offset, length, flags in found if flags])


def merged(ranges: Ranges) -> Ranges:
    joined: Ranges = []
    for offset, length in sorted(ranges):
        end = offset + length
        if joined and offset <= sum(joined[-1]):
            start, known = joined[-1]
            joined[-1] = (start, max(start + known, end) - start)
        else:
            joined.append((offset, length))
    return joined


def rounded(ranges: Ranges, granularity: int, size: int) -> Ranges:
    """The ranges as a bitmap of this granularity marks them."""
    wide = [(offset // granularity * granularity, -(-(offset + length) // granularity) * granularity)
            for offset, length in ranges]  # fmt: skip
    return merged([(start, min(end, size) - start) for start, end in wide])


def flags(path: Path, name: str) -> set[str]:
    told = qemu_img_json("info", path)["format-specific"]["data"]["bitmaps"]
    return set(next(each for each in told if each["name"] == name)["flags"])
