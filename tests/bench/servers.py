"""NBD servers on a Unix socket, started for a measurement and ended with it.

The settings that are compared stand here, at the top. Read-only unless `writable`. Refuses to know what is asked of
the servers.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .processes import ROOT, BenchError, last_words

OURS = "qcow2-plugin"
QEMU = "qemu-nbd"
FLOOR = "pass-through"

OUR_PARAMETERS: tuple[str, ...] = ()
"""Our plugin's parameters beside `file=`, e.g. `cache-size=64M`: the fastest known."""

START_SECONDS = 20.0
STOP_SECONDS = 5.0


class Server(NamedTuple):
    """A server that answers."""

    uri: str
    pid: int


@contextmanager
def ours(image: Path, threads: int, *, writable: bool = False) -> Iterator[Server]:
    """This project's plugin in nbdkit, `threads` requests of one connection at once."""
    plugin = ROOT / "nbdkit_plugin.py"
    options = [f"--threads={threads}", *access(writable)]
    with nbdkit(options, plugin, [f"file={image}", *OUR_PARAMETERS], image.parent) as server:
        yield server


@contextmanager
def pass_through(raw: Path, *, writable: bool = False) -> Iterator[Server]:
    """The floor: a plugin that only calls `preadv` and `pwritev` on a raw file."""
    plugin = Path(__file__).with_name("passthrough_plugin.py")
    with nbdkit(access(writable), plugin, [f"file={raw}"], raw.parent) as server:
        yield server


@contextmanager
def qemu_nbd(image: Path, *options: str, writable: bool = False) -> Iterator[Server]:
    """qemu-nbd with its defaults and these `options`, and still there after the first client."""
    with socket_folder(image.parent) as folder:
        socket, ready = folder / "socket", folder / "pid"
        mode = "--cache=writeback" if writable else "--read-only"
        command = ["qemu-nbd", mode, "--persistent", "--format=qcow2", *options]
        command += [f"--socket={socket}", f"--pid-file={ready}", str(image)]
        with running(command, ready, image.parent) as pid:
            yield Server(uri_of(socket), pid)


def access(writable: bool) -> list[str]:
    """nbdkit's options for it."""
    return [] if writable else ["--readonly"]


@contextmanager
def nbdkit(options: Sequence[str], plugin: Path, parameters: Sequence[str], parent: Path) -> Iterator[Server]:
    """A Python plugin in nbdkit; it ends when this process does, however that happens."""
    if not plugin.exists():
        raise BenchError(f"{plugin.name} is missing")
    with socket_folder(parent) as folder:
        socket, ready = folder / "socket", folder / "pid"
        command = ["nbdkit", "--foreground", "--exit-with-parent", *options]
        command += [f"--unix={socket}", f"--pidfile={ready}", "python", str(plugin), *parameters]
        with running(command, ready, parent) as pid:
            yield Server(uri_of(socket), pid)


@contextmanager
def socket_folder(parent: Path) -> Iterator[Path]:
    """A folder of its own for a server's socket and pid file."""
    with tempfile.TemporaryDirectory(prefix="server-", dir=parent) as folder:
        yield Path(folder)


def uri_of(socket: Path) -> str:
    """The address that fio's nbd engine takes."""
    return f"nbd+unix:///?socket={socket}"


@contextmanager
def running(command: Sequence[str], ready: Path, folder: Path) -> Iterator[int]:
    """A server's pid once it has written its pid file; the server is ended afterwards.

    It runs in the image's folder, because QEMU looks for a data file named in an image in the current one.

    Raises: BenchError with what the server said when it ends early or does not get ready.
    """
    complaints = ready.with_name("stderr")
    with complaints.open("w") as stderr:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, cwd=folder)
        except FileNotFoundError as error:
            raise BenchError(f"{command[0]} is not installed") from error
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (ready.exists() and ready.read_text().strip()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{command[0]} did not start: {last_words(complaints.read_text()) or 'no message'}")
            time.sleep(0.01)
        yield process.pid
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to stop, insist after a while."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
