"""A block device of a test's own: a file seen through a loop device, where this user may make one."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def loop_device(path: Path, *, read_only: bool = True) -> Iterator[str]:
    """The name of a block device with the content of `path`; skips the test without the privilege."""
    try:
        made = subprocess.run(
            ["losetup", "--find", "--show", *(["--read-only"] if read_only else []), str(path)],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this user cannot make a loop device: {error}")
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
