"""Running programs: their output, their wall-clock time, their peak memory. Knows nothing of images or servers."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PATIENCE_SECONDS = 1800.0
"""No program here takes this long, unless a server that it talks to has stopped answering."""


class BenchError(Exception):
    """A measurement could not be made; the message is one line for the person who runs it."""


def output_of(command: Sequence[str], *, stdin: str | None = None, folder: Path = ROOT) -> str:
    """The standard output of a program that runs in `folder`, the project's where nothing else is said.

    Raises: BenchError with the program's last words when it fails, is not installed, or takes PATIENCE_SECONDS.
    """
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            cwd=folder,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
    except FileNotFoundError as error:
        raise BenchError(f"{command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{shlex.join(command)}: no end after {PATIENCE_SECONDS:g} s") from error
    if done.returncode:
        raise BenchError(f"{shlex.join(command)}: {last_words(done.stderr) or f'exit status {done.returncode}'}")
    return done.stdout


def seconds_of(command: Sequence[str]) -> float:
    """Wall-clock seconds of one whole run, from before the program starts until it has been waited for.

    Its output goes to /dev/null. `posix_spawn` keeps this process's own share small and the same for all.
    """
    silence = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    began = time.perf_counter()
    pid = os.posix_spawnp(command[0], list(command), os.environ, file_actions=silence)
    try:
        _, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    elapsed = time.perf_counter() - began
    if status:
        raise BenchError(f"{shlex.join(command)}: exit status {os.waitstatus_to_exitcode(status)}")
    return elapsed


def peak_memory(pid: int | str = "self") -> int:
    """The most bytes that a running process ever had resident (VmHWM of Linux's /proc/PID/status)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise BenchError(f"/proc/{pid}/status does not tell VmHWM")


def last_words(text: str) -> str:
    """The last lines of a complaint, as one; what matters may stand a little before the end."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines[-3:])
