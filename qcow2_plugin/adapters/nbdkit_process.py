"""nbdkit as a child process: found, told what to serve, started, awaited, ended.

Both `qcow2 serve` and the drives of libguestfs start it here. Refuses to know what its clients do.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import qcow2_plugin
from qcow2_plugin.errors import Qcow2Error, printable
from qcow2_plugin.storage.directory import absolute_path

_THREADS = 4
"""Requests worked on at once for a client that seldom has more than a few under way."""
_PLUGIN_NAME = "nbdkit_plugin"
_PATHS = frozenset({"data_file", "backing_file", "base_directory"})
_POLL_SECONDS = 0.01
_STOP_SECONDS = 600.0
"""For storing what was written, which a slow disk may take long over."""
_SAID_LIMIT = 2000
_LONGEST_SOCKET = 100
"""Bytes of a socket's path; the kernel takes 107."""
_PLUGIN_SAYS = re.compile(rb"^nbdkit: (?:error: .{,4096}?/nbdkit_plugin\.py: \w+: error: (?:[\w.]+: )?)?")
"""What nbdkit puts before the words of an exception in the plugin."""
_INSTALL = (
    "install it with 'apt install nbdkit nbdkit-plugin-python' (Debian, Ubuntu) or "
    "'dnf install nbdkit nbdkit-python-plugin' (Fedora)"
)


class CannotServeError(Qcow2Error):
    """What serving needs is not installed, or nbdkit failed; the message has its words."""


def plugin_parameters(
    image: str | os.PathLike[str], *, writable: bool, policy: str, **options: str | os.PathLike[str] | bool | None
) -> list[str]:
    """The plugin's part of nbdkit's command line. `options` are its other parameters; None and False are left out.

    Raises CannotServeError for a name that is not UTF-8: nbdkit hands none to a plugin in Python.
    """
    parameters = [f"file={absolute_path(image)}", f"policy={policy}", f"readonly={'false' if writable else 'true'}"]
    for name, value in options.items():
        key = name.replace("_", "-")
        if value is True:
            parameters.append(f"{key}=true")
        elif value is not None and value is not False:
            parameters.append(f"{key}={absolute_path(value) if name in _PATHS else value}")
    for parameter in parameters:
        if not is_utf8(parameter):
            raise CannotServeError(
                f"nbdkit's Python plugin takes only names in UTF-8, which this is not: {printable(parameter)}; give it "
                "another name, or a link to it"
            )
    return parameters


def is_utf8(name: str) -> bool:
    """False if a name of a file holds bytes that are no UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def command_line(
    parameters: Sequence[str], listening: Sequence[str], *, writable: bool, threads: int, pid_file: Path
) -> list[str]:
    """The words that start nbdkit, in the foreground and to end with this process. `listening` are its options that
    say where.

    Unless `writable`, nbdkit refuses every write, whatever the plugin's `parameters` say. Raises CannotServeError if
    there is no nbdkit.
    """
    nbdkit = shutil.which("nbdkit")
    if nbdkit is None:
        raise CannotServeError(f"nbdkit is not installed; {_INSTALL}")
    options = ["--foreground", "--exit-with-parent", f"--threads={threads}", *listening]
    options += () if writable else ("--readonly",)
    return [nbdkit, *options, f"--pidfile={pid_file}", "python", _plugin_file(), *parameters]


def listens(server: subprocess.Popen[bytes], pid_file: Path) -> bool:
    """True once nbdkit listens, which is when it has written its process id; False if it has ended instead.

    Raises CannotServeError if it has ended because it cannot run the plugin.
    """
    while not (pid_file.exists() and pid_file.stat().st_size):
        if server.poll() is not None:
            if not _has_python_plugin(str(server.args[0])):  # type: ignore[index] # a list: `command_line`
                raise CannotServeError(f"nbdkit has no Python plugin; {_INSTALL}")
            return False
        time.sleep(_POLL_SECONDS)
    return True


@contextmanager
def serving(parameters: Sequence[str], *, writable: bool) -> Iterator[Path]:
    """nbdkit with the plugin's `parameters` on a new private Unix socket, whose path this is, until the block ends.

    It is out of reach of Ctrl-C, which is for those who use it: they end first. What was written is stored when the
    block has ended without an error.

    Raises CannotServeError with what nbdkit says if it does not start, or could not store what was written; OSError.
    """
    with private_directory() as folder, tempfile.TemporaryFile() as said:
        socket, pid_file = folder / "socket", folder / "pid"
        command = command_line(parameters, [f"--unix={socket}"], writable=writable, threads=_THREADS, pid_file=pid_file)
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)
        try:
            if not listens(server, pid_file):
                raise CannotServeError(_reason(said))
            yield socket
        finally:
            status = _end(server)
        if status:
            raise CannotServeError(f"nbdkit ended with {status}: {_reason(said)}")


@contextmanager
def private_directory() -> Iterator[Path]:
    """A new directory that only this user can enter, with a name that does for sockets; removed in the end."""
    wanted = tempfile.gettempdir()
    fits = len(os.fsencode(wanted)) + len("/qcow2-12345678/libguestfs123456/guestfsd.sock") <= _LONGEST_SOCKET
    parent = wanted if fits and is_utf8(wanted) else "/tmp"
    with tempfile.TemporaryDirectory(prefix="qcow2-", dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _end(server: subprocess.Popen[bytes]) -> int:
    server.terminate()
    try:
        return server.wait(_STOP_SECONDS)
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def _reason(said: IO[bytes]) -> str:
    """The end of what nbdkit said, safe to print."""
    length = said.seek(0, os.SEEK_END)
    said.seek(max(0, length - _SAID_LIMIT))
    lines = [line.strip() for line in said.read(_SAID_LIMIT).splitlines() if line.strip()]
    return "; ".join(printable(_PLUGIN_SAYS.sub(b"", line)) for line in lines) or "nbdkit says no more"


def _plugin_file() -> str:
    """`nbdkit_plugin.py` beside the package, as in a checkout, or wherever it is installed."""
    beside = Path(qcow2_plugin.__file__).resolve().parents[1] / f"{_PLUGIN_NAME}.py"
    if beside.is_file():
        return str(beside)
    found = find_spec(_PLUGIN_NAME)
    if found is None or found.origin is None:
        raise CannotServeError(f"{_PLUGIN_NAME}.py is neither beside the package nor installed with it")
    return found.origin


def _has_python_plugin(nbdkit: str) -> bool:
    told = subprocess.run([nbdkit, "--dump-config"], capture_output=True, text=True, check=False).stdout
    folders = [line.partition("=")[2] for line in told.splitlines() if line.startswith("plugindir=")]
    return not folders or Path(folders[0], "nbdkit-python-plugin.so").exists()
