"""Keeps an image open in qemu-io, so that its locks are there for as long as a test needs them.

Owns when the program is known to have the image open, and its end. Refuses to know what the locks are.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

TIMEOUT = 30  # seconds until it must have ended


@contextlib.contextmanager
def qemu_io_holding(path: Path, *options: str) -> Iterator[None]:
    """qemu-io has `path` open, read-write unless `options` say otherwise, while the block runs."""
    process = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", *options, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write("length\n")
        answer = process.stdout.readline()
        assert "MiB" in answer, f"qemu-io did not open {path}: {answer}"
        yield
        process.communicate("quit\n", timeout=TIMEOUT)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
