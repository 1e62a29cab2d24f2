"""Runs the outside programs that judge this project: qemu-img, qemu-io, nbdkit, libnbd.

It owns how they are started, awaited and ended, always with a time-out and an English locale; a failure carries what
the program said. It refuses to know what the programs are asked, or what a right answer is.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbd

PLUGIN = Path(__file__).resolve().parents[2] / "nbdkit_plugin.py"
TIMEOUT = 60  # seconds for one command
START_TIMEOUT = 30  # seconds until a server listens
STOP_TIMEOUT = 20  # seconds from SIGTERM until it has ended


class ToolError(Exception):
    """An outside program failed. `returncode`, `stdout` and `stderr` are what it left."""

    def __init__(self, command: Sequence[str], returncode: int, stdout: str, stderr: str) -> None:
        super().__init__(f"{' '.join(command)} ended with {returncode}\n{stderr}{stdout}")
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr


def run(*command: str | Path, timeout: float = TIMEOUT) -> str:
    """Runs a command without input and returns its stdout; anything but exit code 0 is a ToolError."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=timeout,
        env=_environment(),
        check=False,
    )
    if done.returncode:
        raise ToolError(words, done.returncode, done.stdout, done.stderr)
    return done.stdout


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C", "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}  # mke2fs


def qemu_img(*arguments: str | Path, timeout: float = TIMEOUT) -> str:
    return run("qemu-img", *arguments, timeout=timeout)


def qemu_img_json(command: str, *arguments: str | Path, timeout: float = TIMEOUT) -> Any:
    """The parsed answer of a qemu-img command that knows --output=json (info, check, map, measure)."""
    return json.loads(qemu_img(command, "--output=json", *arguments, timeout=timeout))


def create_luks(path: str | Path, virtual_size: int, password: str, *, options: str = "", attempts: int = 20) -> None:
    """A LUKS image with a cheap key. `options` are further -o options, comma separated.

    QEMU measures how fast it hashes and gives up when the CPU clock does not advance meanwhile, which a fast machine
    with a coarse clock runs into now and then; only that is tried again.
    """
    luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    words = ["--object", f"secret,id=s,data={password}", "-o", f"{luks},{options}".rstrip(","), path, str(virtual_size)]
    for attempt in range(1, attempts + 1):
        try:
            qemu_img("create", "-q", "-f", "qcow2", *words)
        except ToolError as error:
            if attempt == attempts or "Unable to get accurate CPU usage" not in error.stderr:
                raise
        else:
            return


def qemu_io(path: str | Path, *commands: str, options: Sequence[str] = ("-f", "qcow2")) -> str:
    """Runs qemu-io commands one after the other on one image; a failing command fails the call."""
    return run("qemu-io", *options, *(word for command in commands for word in ("-c", command)), path)


def convert_to_raw(path: str | Path, *, extra: Sequence[str] = (), timeout: float = TIMEOUT) -> bytes:
    """The whole disk as qemu-img convert sees it. `extra` goes before the source; with --image-opts `path` is those."""
    source = () if "--image-opts" in extra else ("-f", "qcow2")
    with tempfile.TemporaryDirectory(prefix="convert-") as directory:
        target = Path(directory) / "disk.raw"
        qemu_img("convert", *source, "-O", "raw", *extra, path, target, timeout=timeout)
        return target.read_bytes()


@dataclass(frozen=True)
class Server:
    """A running nbdkit. `uri` names its default export."""

    socket: Path
    process: subprocess.Popen[bytes]
    stderr_path: Path

    @property
    def uri(self) -> str:
        return self.export_uri("")

    def export_uri(self, export: str) -> str:
        return f"nbd+unix:///{quote(export, safe='')}?socket={quote(str(self.socket))}"

    def stderr_text(self) -> str:
        return self.stderr_path.read_text(errors="replace")


@contextlib.contextmanager
def nbdkit(params: Mapping[str, str | Path], *options: str, plugin: Path = PLUGIN) -> Iterator[Server]:
    """Serves with the plugin until the block ends; then nbdkit must end by itself, at SIGTERM, with exit code 0.

    `params` are the plugin's parameters, `options` nbdkit's own. A server that does not come up is a ToolError with
    its stderr.
    """
    with tempfile.TemporaryDirectory(prefix="nbdkit-") as directory:
        socket, pid_file, stderr_path = (Path(directory) / name for name in ("socket", "pid", "stderr"))
        command = ["nbdkit", "--foreground", "--exit-with-parent", f"--unix={socket}", f"--pidfile={pid_file}"]
        command += [*options, "python", str(plugin), *(f"{name}={value}" for name, value in params.items())]
        with open(stderr_path, "wb") as stderr:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, env=_environment()
            )
        server = Server(socket, process, stderr_path)
        try:
            _wait_until_listening(server, pid_file, command)
            yield server
        except BaseException:
            _end(process)  # what went wrong first is what the test has to report
            raise
        if _end(process) != 0:
            raise ToolError(command, process.returncode, "", server.stderr_text())


def _wait_until_listening(server: Server, pid_file: Path, command: list[str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not (pid_file.exists() and pid_file.read_text().endswith("\n")):
        if server.process.poll() is not None:
            raise ToolError(command, server.process.returncode, "", server.stderr_text())
        if time.monotonic() > deadline:
            raise TimeoutError(f"nbdkit does not listen after {START_TIMEOUT} s: {server.stderr_text()}")
        time.sleep(0.005)


def _end(process: subprocess.Popen[bytes]) -> int:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return -signal.SIGKILL


@contextlib.contextmanager
def nbd_connect(uri: str, export: str = "") -> Iterator[nbd.NBD]:
    """A libnbd handle with base:allocation negotiated; shut down when the block ends.

    `export` replaces the one that `uri` names. Fails when the server does not offer block status.
    """
    handle = nbd.NBD()
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    if export:
        uri = uri.replace(":///?", f":///{quote(export, safe='')}?")
    handle.connect_uri(uri)
    try:
        assert handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION), f"{uri} offers no base:allocation"
        yield handle
    except BaseException:
        with contextlib.suppress(nbd.Error):  # what went wrong first is what the test has to report
            handle.shutdown()
        raise
    handle.shutdown()
