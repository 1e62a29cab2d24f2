"""`qcow2 serve`: nbdkit with our plugin, reached and ended as a user would."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

from tests.support.builder import ImageBuilder
from tests.support.command import COMMAND, process_environment, qcow2_process
from tests.support.lockbytes import QEMU_READER, QEMU_WRITER, locked_bytes
from tests.support.tools import convert_to_raw, nbd_connect, qemu_img, run

MIB = 1 << 20
TIMEOUT = 30  # seconds


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    then = ImageBuilder(2 * MIB).map().data(0, b"then")
    ImageBuilder(2 * MIB).data(0, b"now").data(9, b"clean").snapshot(b"7", b"old", then).bitmap(
        b"backup", [(0, 1)]
    ).build(path)
    return path


@contextlib.contextmanager
def served(*arguments: str | Path, folder: Path | None = None) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A running `qcow2 serve` and what it printed; ended by SIGTERM unless the block did that."""
    process = subprocess.Popen(
        [*COMMAND, "serve", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=process_environment(),
        cwd=folder,
    )
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline().rstrip("\n") for _ in range(5)]
        yield process, lines
    finally:
        process.terminate()
        process.communicate(timeout=TIMEOUT)


def test_it_prints_a_uri_that_works_and_what_to_type(image: Path) -> None:
    with served(image) as (_, lines):
        uri, note, *commands = lines
        with nbd_connect(uri) as handle:
            assert handle.get_size() == 2 * MIB
            assert handle.is_read_only()
            assert bytes(handle.pread(3, 0)) == b"now"
        with nbd_connect(uri, "snapshot=7") as handle:
            assert bytes(handle.pread(4, 0)) == b"then"
        assert "Ctrl-C" in note
        for command in commands:
            words = shlex.split(command)
            run(
                *words[:-1],
                *[
                    word.replace("copy.qcow2", "").replace("disk.raw", "") or image.parent / "copy"
                    for word in words[-1:]
                ],
            )
        assert (image.parent / "copy").exists()


def test_it_takes_no_writes_unless_asked_to(image: Path) -> None:
    before = image.read_bytes()
    with served(image) as (_, lines), nbd_connect(lines[0]) as handle:
        handle.set_strict_mode(0)
        with pytest.raises(nbd.Error) as refused:
            handle.pwrite(b"new", 0)
        assert refused.value.errno == "EPERM"
        assert locked_bytes(image) == set(QEMU_READER)
    assert image.read_bytes() == before


@pytest.mark.parametrize("option", ["-w", "--writable"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_was_written_is_stored_when_it_ends(number: signal.Signals, option: str, image: Path) -> None:
    with served(option, image) as (process, lines):
        with nbd_connect(lines[0]) as handle:
            assert not handle.is_read_only()
            handle.pwrite(b"new" * 1000, MIB - 1)
        with nbd_connect(lines[0], "snapshot=7") as handle:
            assert handle.is_read_only()
        assert locked_bytes(image) == set(QEMU_WRITER)
        process.send_signal(number)
        assert process.wait(TIMEOUT) == 0
    qemu_img("check", image)
    assert convert_to_raw(image)[MIB - 1 :].startswith(b"new" * 1000 + bytes(1))


def test_it_fails_if_what_was_written_cannot_be_stored(image: Path) -> None:
    ended = qcow2_process("serve", "--writable", "--run", f'nbdcopy {image} "$uri"; truncate -s 512 {image}', image)
    assert ended.status == 1
    assert "what was written after the last flush may be lost" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("option", ["--snapshot=7", "--bitmap=backup", "--allow-damaged", "-U"])
def test_what_is_for_reading_does_not_go_with_writing(option: str, image: Path) -> None:
    ended = qcow2_process("serve", "--writable", option, "--run", "true", image)
    assert ended.status == 2
    assert "is for reading only, it does not go with --writable" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_leaves_nothing(number: signal.Signals, image: Path) -> None:
    with served(image) as (process, lines):
        path = Path(lines[0].partition("socket=")[2])
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        process.send_signal(number)
        assert process.wait(TIMEOUT) == 0
        assert not path.parent.exists()


def test_the_server_ends_with_the_command(image: Path) -> None:
    with served(image) as (process, lines):
        folder = Path(lines[0].partition("socket=")[2]).parent
        server = Path("/proc", (folder / "pid").read_text().strip())
        assert server.exists()
        process.kill()
        process.wait()
        deadline = time.monotonic() + TIMEOUT
        while server.exists():
            assert time.monotonic() < deadline, "nbdkit lives on"
            time.sleep(0.01)
        shutil.rmtree(folder)  # nobody was left to do it


def test_a_socket_of_ones_own(image: Path) -> None:
    path = image.parent / "my socket"
    with served("--socket=my socket", image.name, folder=image.parent) as (process, lines):
        assert lines[0] == f"nbd+unix:///?socket={str(path).replace(' ', '%20')}"
        with nbd_connect(lines[0]) as handle:
            assert handle.get_size() == 2 * MIB
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 0
        assert not path.exists()


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def test_a_port_is_open_to_this_machine_only(image: Path) -> None:
    port = free_port()
    with served(f"--port={port}", image) as (_, lines):
        assert lines[0] == f"nbd://127.0.0.1:{port}/"
        with nbd_connect(lines[0]) as handle:
            assert handle.get_size() == 2 * MIB
        listening = Path("/proc/net/tcp").read_text()
        assert re.search(rf": 0100007F:{port:04X} 00000000:0000 0A", listening)
        assert not re.search(rf": 00000000:{port:04X} 00000000:0000 0A", listening)


def test_run_has_the_uri_and_gives_its_exit_code(image: Path) -> None:
    ended = qcow2_process("serve", "--run", 'nbdinfo --size "$uri"; exit 7', image)
    assert (ended.status, ended.stdout, ended.stderr) == (7, f"{2 * MIB}\n", "")
    assert qcow2_process("serve", "--run", "true", image).status == 0


def test_run_ends_with_a_signal(image: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "serve", "--run", "echo started; exec sleep 60", image],
        stdout=subprocess.PIPE,
        text=True,
        env=process_environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.terminate()
        assert process.wait(TIMEOUT) == 128 + signal.SIGTERM


def test_options_reach_the_plugin(image: Path) -> None:
    size = 'nbdinfo --size "$uri"'
    read = 'nbdcopy "$uri" - | head -c 4'
    (image.parent / "elsewhere").mkdir()
    (image.parent / "elsewhere" / "base.raw").write_bytes(b"base" * 512)
    overlay = image.parent / "overlay.qcow2"
    ImageBuilder(MIB).backing(b"base.raw", None).build(overlay)

    def answer(*arguments: str | Path) -> str:
        ended = qcow2_process("serve", *arguments, folder=image.parent)
        assert ended.status == 0, ended.stderr
        return ended.stdout

    assert answer("--run", read, "--snapshot=old", "--cache-size=1M", "--threads=2", image) == "then"
    dirty = answer("--run", 'nbdinfo --map --totals "$uri"', "--bitmap=backup", image)
    assert [line.split()[0] for line in dirty.splitlines() if line.endswith("data")] == ["65536"]
    assert answer("--run", read, "--base-directory=elsewhere", "--backing-format=raw", overlay) == "base"
    ImageBuilder(MIB).backing(bytes(image.parent / "elsewhere" / "base.raw")).build(image.parent / "absolute.qcow2")
    assert answer("--run", read, "--policy=trusted", "absolute.qcow2") == "base"
    named = ("--backing-file=elsewhere/base.raw", "--backing-format=raw", "--policy=inspect", "-U", "--allow-damaged")
    assert answer("--run", size, *named, overlay) == f"{MIB}\n"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [(("none.qcow2",), "none.qcow2"), (("--snapshot=none", "disk.qcow2"), "no internal snapshot")],
)
def test_what_cannot_be_served_is_said_by_nbdkit(arguments: tuple[str, ...], match: str, image: Path) -> None:
    ended = qcow2_process("serve", *arguments, folder=image.parent)
    assert (ended.status, ended.stdout) == (1, "")
    assert match in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_missing_nbdkit_is_said_with_what_to_install(image: Path, tmp_path: Path) -> None:
    ended = qcow2_process("serve", image, environment={"PATH": str(tmp_path)})
    assert ended.status == 1
    assert "nbdkit is not installed" in ended.stderr
    assert "nbdkit-plugin-python" in ended.stderr


def test_a_missing_python_plugin_is_said_with_what_to_install(image: Path, tmp_path: Path) -> None:
    """nbdkit as it is where only its core is installed."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stand_in = folder / "nbdkit"
    stand_in.write_text(f'#!/bin/sh\n[ "$1" != --dump-config ] || echo plugindir={folder}\n[ "$1" = --dump-config ]\n')
    stand_in.chmod(0o755)
    ended = qcow2_process("serve", image, environment={"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"})
    assert ended.status == 1
    assert "nbdkit has no Python plugin" in ended.stderr
