"""nbdkit as a child process: found, started with this package's plugin, awaited, ended.

It stays in the foreground and ends with this process. SIGINT, SIGTERM and SIGHUP are passed on. A command to run
meanwhile is started here, because nbdkit's own --run does not end at SIGTERM before the command does.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from urllib.parse import quote

import qcow2_plugin
from qcow2_plugin.errors import Qcow2Error

_PLUGIN_NAME = "nbdkit_plugin"
_POLL_SECONDS = 0.01
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_REACHED_AT = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_INSTALL = (
    "install it with 'apt install nbdkit nbdkit-plugin-python' (Debian, Ubuntu) or "
    "'dnf install nbdkit nbdkit-python-plugin' (Fedora)"
)


class CannotServeError(Qcow2Error):
    """What serving needs is not installed."""


class _Children:
    """nbdkit and the user's command as child processes; `stop` is a signal handler."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stopping = False

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, env={**os.environ, **environment})
        self._processes.append(process)
        if self._stopping:
            process.terminate()
        return process

    def stop(self, _signal: int, _frame: FrameType | None) -> None:
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

    Raises CannotServeError; OSError.
    """
    nbdkit = shutil.which("nbdkit")
    if nbdkit is None:
        raise CannotServeError(f"nbdkit is not installed; {_INSTALL}")
    children = _Children()
    with ExitStack() as resources:
        for number in _STOP_SIGNALS:
            resources.callback(signal.signal, number, signal.signal(number, children.stop))
        directory = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="qcow2-")))
        pid_file = directory / "pid"
        if port is None:
            path = directory / "socket" if socket is None else Path(os.path.abspath(socket))
            listening, uri = [f"--unix={path}"], f"nbd+unix:///?socket={quote(os.fsencode(path))}"
        else:
            path = None
            listening, uri = [f"--ipaddr={address}", f"--port={port}"], _tcp_uri(address, port)
        options = ["--foreground", "--exit-with-parent", f"--threads={threads}", *listening]
        options += () if writable else ("--readonly",)
        server = children.start([nbdkit, *options, f"--pidfile={pid_file}", "python", _plugin_file(), *parameters])
        if not _listens(server, pid_file):
            if not _has_python_plugin(nbdkit):
                raise CannotServeError(f"nbdkit has no Python plugin; {_INSTALL}")
            return _exit_code(server)
        if path is not None:  # nbdkit leaves it
            resources.callback(path.unlink, missing_ok=True)
        if command is None:
            print(_what_next(uri), end="", flush=True)
            return _exit_code(server)
        status = _exit_code(children.start(["sh", "-c", command], uri=uri))
        server.terminate()
        return _exit_code(server) or status


def _listens(server: subprocess.Popen[bytes], pid_file: Path) -> bool:
    """True once nbdkit listens, which is when it has written its process id; False if it has ended instead."""
    while not (pid_file.exists() and pid_file.read_text().endswith("\n")):
        if server.poll() is not None:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    """Waits for the end of a process; told as a shell does, 128 + N for signal N."""
    status = process.wait()
    return status if status >= 0 else 128 - status


def _plugin_file() -> str:
    """`nbdkit_plugin.py` beside the package, as in a checkout, or wherever it is installed."""
    beside = Path(qcow2_plugin.__file__).resolve().parents[1] / f"{_PLUGIN_NAME}.py"
    if beside.is_file():
        return str(beside)
    found = find_spec(_PLUGIN_NAME)
    if found is None or found.origin is None:
        raise CannotServeError(f"{_PLUGIN_NAME}.py is neither beside the package nor installed with it")
    return found.origin


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


def _has_python_plugin(nbdkit: str) -> bool:
    told = subprocess.run([nbdkit, "--dump-config"], capture_output=True, text=True, check=False).stdout
    folders = [line.partition("=")[2] for line in told.splitlines() if line.startswith("plugindir=")]
    return not folders or Path(folders[0], "nbdkit-python-plugin.so").exists()
