"""nbdkit in the foreground of a terminal: started, told of, ended by signals.

It ends with this process. SIGINT, SIGTERM and SIGHUP are passed on. A command to run meanwhile is started here,
because nbdkit's own --run does not end at SIGTERM before the command does.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from urllib.parse import quote

from qcow2_plugin.adapters import nbdkit_process

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_REACHED_AT = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class Children:
    """Child processes, nbdkit or the user's command, that signals to this one end."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stopping = False

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[bytes]:
        """With these variables on top of the environment; ended at once if that was asked for already."""
        process = subprocess.Popen(command, env={**os.environ, **environment})
        self._processes.append(process)
        if self._stopping:
            process.terminate()
        return process

    def stop(self, _signal: int, _frame: FrameType | None) -> None:
        """A signal handler."""
        self._stopping = True
        for process in self._processes:
            process.terminate()


def serve(
    parameters: Sequence[str],
    *,
    writable: bool,
    socket: str | None,
    port: int | None,
    address: str,
    threads: int,
    command: str | None,
) -> int:
    """Serve what the plugin's `parameters` ("file=...") say until nbdkit ends, or the shell `command` if there is one.

    Unless `writable`, nbdkit refuses every write, whatever the parameters say.
    Listens on a TCP `port` of `address`, or on the Unix socket at `socket`, by default a new private one that is
    removed at the end. Prints the URI and what to type next, unless there is a `command`, which finds the URI in $uri.
    The exit code is nbdkit's, or else the command's. nbdkit itself says on stderr why it does not start.

    Raises nbdkit_process.CannotServeError; OSError.
    """
    children = Children()
    with ExitStack() as resources:
        for number in STOP_SIGNALS:
            resources.callback(signal.signal, number, signal.signal(number, children.stop))
        directory = resources.enter_context(nbdkit_process.private_directory())
        pid_file = directory / "pid"
        if port is None:
            path = directory / "socket" if socket is None else Path(os.path.abspath(socket))
            listening, uri = [f"--unix={path}"], f"nbd+unix:///?socket={quote(os.fsencode(path))}"
        else:
            path = None
            listening, uri = [f"--ipaddr={address}", f"--port={port}"], _tcp_uri(address, port)
        server = children.start(
            nbdkit_process.command_line(parameters, listening, writable=writable, threads=threads, pid_file=pid_file)
        )
        if not nbdkit_process.listens(server, pid_file):
            return exit_code(server)
        if path is not None:  # nbdkit leaves it
            resources.callback(path.unlink, missing_ok=True)
        if command is None:
            print(_what_next(uri), end="", flush=True)
            return exit_code(server)
        status = exit_code(children.start(["sh", "-c", command], uri=uri))
        server.terminate()
        return exit_code(server) or status


def exit_code(process: subprocess.Popen[bytes]) -> int:
    """Waits for the end of a process; told as a shell does, 128 + N for signal N."""
    status = process.wait()
    return status if status >= 0 else 128 - status


def _tcp_uri(address: str, port: int) -> str:
    host = _REACHED_AT.get(address, address)
    return f"nbd://{f'[{host}]' if ':' in host else host}:{port}/"


def _what_next(uri: str) -> str:
    word = shlex.quote(uri)
    return (
        f"{uri}\n"
        "Until Ctrl-C, for example, in another terminal:\n"
        f"  nbdinfo --list {word}\n"
        f"  nbdcopy {word} disk.raw\n"
        f"  qemu-img convert -f raw -O qcow2 {word} copy.qcow2\n"
    )
