"""A file system of a test's own whose files can share blocks, where this user may mount one."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def xfs(directory: Path) -> Iterator[Path]:
    """A file system that shares blocks; skips the test where it cannot be had."""
    if shutil.which("mkfs.xfs") is None:
        pytest.skip("mkfs.xfs (package xfsprogs) is not installed, so that blocks cannot be shared for real")
    disk, mounted = directory / "xfs.disk", directory / "xfs"
    with disk.open("wb") as file:
        file.truncate(512 << 20)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", disk], check=True, capture_output=True)
    mounted.mkdir()
    done = subprocess.run(["mount", "-o", "loop", disk, mounted], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this user or kernel cannot mount XFS, so that blocks cannot be shared for real: {done.stderr}")
    try:
        yield mounted
    finally:
        subprocess.run(["umount", mounted], check=True)
