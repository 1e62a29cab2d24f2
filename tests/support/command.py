"""Runs the `qcow2` command, in this process or in one of its own, and tells how it ended.

Owns how it is started; refuses to know what it should say.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcow2_plugin.adapters.cli import main

TIMEOUT = 60  # seconds
COMMAND = (sys.executable, "-m", "qcow2_plugin")
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """What a run left."""

    status: int
    stdout: str
    stderr: str


def qcow2(*arguments: str | Path) -> Ended:
    """Runs the command in this process."""
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as wanted:
            status = wanted.code if isinstance(wanted.code, int) else 1
    return Ended(status, *(bytes(stream.buffer.getvalue()).decode() for stream in (stdout, stderr)))


def qcow2_json(*arguments: str | Path) -> Any:
    """The parsed answer of a verb that knows --output=json; it must succeed."""
    verb, *rest = arguments
    ended = qcow2(verb, "--output=json", *rest)
    assert ended.status == 0, ended.stderr
    return json.loads(ended.stdout)


def qcow2_process(
    *arguments: str | Path, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> Ended:
    """Runs the command in a process of its own, with these variables on top of the environment."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT,
        env=process_environment(environment),
        cwd=folder,
        check=False,
    )
    return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())


def process_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a process that finds the package wherever it runs, and buffers as for any user."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**inherited, "PYTHONPATH": str(_ROOT), **(more or {})}
