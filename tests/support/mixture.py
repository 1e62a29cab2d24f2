"""Fills images through qemu-io with a mixture of everything a guest does: the same in every run.

It owns which requests are made and where: at both ends, at borders of clusters and of L2 tables, and anywhere. It
refuses to know what a reader should see; that is asked of qemu-img.
"""

from __future__ import annotations

import random
from pathlib import Path

from tests.support.tools import qemu_io

_PATTERN_LENGTHS = (3, 509, 4093, 65521, 131071)
_MAX_LENGTH = 6 << 20


def pattern_files(directory: Path) -> list[Path]:
    """Files of bytes to write: no two places of them look alike, yet they compress well."""
    paths = []
    for number, length in enumerate(_PATTERN_LENGTHS):
        path = directory / f"pattern-{number}"
        if not path.exists():
            letters = random.Random(length).choices(b"qcow2 data\xff\x01", k=length)
            path.write_bytes(bytes(letters))
        paths.append(path)
    return paths


def fill(
    path: Path,
    virtual_size: int,
    cluster_size: int,
    *,
    seed: int,
    l2_coverage: int = 0,
    compressed: bool = False,
    count: int = 24,
    options: tuple[str, ...] = (),
) -> None:
    """About `count` requests to the image at `path`; compressed writes, if wanted, come before them.

    `l2_coverage` is what one L2 table maps, if its borders are to be hit; `options` are further ones of qemu-io.
    """
    if not virtual_size:
        return
    rng = random.Random(seed)
    patterns = pattern_files(path.parent)
    commands = _compressed_writes(rng, patterns, virtual_size, cluster_size) if compressed else []
    while len(commands) < count:
        offset, length = _range(rng, virtual_size, cluster_size, l2_coverage)
        verb = rng.choice(["write", "write", "write", "write -z", "write -z -u", "discard"])
        if verb == "write":
            verb = f"write -s {rng.choice(patterns)}"
        commands.append(f"{verb} {offset} {length}")
    qemu_io(path, *commands, options=("-f", "qcow2", "-t", "unsafe", "-d", "unmap", *options))


def _compressed_writes(rng: random.Random, patterns: list[Path], virtual_size: int, cluster_size: int) -> list[str]:
    """One cluster or several, discarded before: a cluster that is there already cannot be written compressed."""
    commands = []
    free = 0
    for _ in range(6):
        first = free + rng.randrange(3)
        offset = first * cluster_size
        if offset >= virtual_size:
            break
        free = first + rng.randint(1, 3)
        length = min(free * cluster_size, virtual_size) - offset
        commands.append(f"discard {offset} {length}")
        commands.append(f"write -c -s {rng.choice(patterns)} {offset} {length}")
    return commands


def _range(rng: random.Random, virtual_size: int, cluster_size: int, l2_coverage: int) -> tuple[int, int]:
    """Where a request goes: (offset, length), not empty, inside the disk."""
    borders = [0, virtual_size - 1, rng.randrange(virtual_size), cluster_size * rng.randrange(8)]
    if l2_coverage and l2_coverage < virtual_size:
        borders.append(l2_coverage)
    sizes = [1, 512, cluster_size // 32, cluster_size, cluster_size * 5 // 2]
    offset = max(rng.choice(borders) - rng.choice([0, 0, 1, 511, rng.choice(sizes)]), 0) % virtual_size
    length = rng.choice(sizes) + rng.choice([0, 0, 1, 511])
    return offset, max(min(length, _MAX_LENGTH, virtual_size - offset), 1)
