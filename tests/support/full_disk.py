"""A disk that is soon full, for tests of what then happens.

Root gets a file system of its own, in memory, which says ENOSPC. Others get a limit on the size of files, which says
EFBIG; it holds for this whole process while the block runs.
"""

from __future__ import annotations

import contextlib
import errno
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class FullDisk(NamedTuple):
    """`directory` takes `size` bytes of one file, and then says `errno`."""

    directory: Path
    size: int
    errno: int


@contextlib.contextmanager
def full_disk(directory: Path, size: int) -> Iterator[FullDisk]:
    """Makes `directory`, which is there and empty, a disk of `size` bytes (whole pages)."""
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if mounting.returncode == 0:
        try:
            yield FullDisk(directory, size, errno.ENOSPC)
        finally:
            subprocess.run(["umount", str(directory)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield FullDisk(directory, size, errno.EFBIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
