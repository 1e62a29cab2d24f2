"""The `qcow2` command as a whole: exit codes, usage, streams that go away, and what it imports."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qcow2_plugin.extent import ExtentKind
from tests.support.builder import ImageBuilder
from tests.support.command import COMMAND, process_environment, qcow2, qcow2_process
from tests.support.watching import no_descriptor_left

VERBS = ("info", "map", "serve", "vet")
MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    ImageBuilder(MIB).data(0, b"x").snapshot(b"1", b"one").bitmap(b"bitmap", [(0, 1)]).build(path)
    return path


@pytest.fixture
def long_map(tmp_path: Path) -> Path:
    path = tmp_path / "long.qcow2"
    told = ImageBuilder(16 * MIB, cluster_bits=9)
    for cluster in range(0, 32768, 2):
        told.data(cluster, b"")
    told.build(path)
    return path


def test_reading_starts_no_thread(image: Path) -> None:
    """Nor does a library that is loaded for it."""
    program = (
        "import os, sys; from qcow2_plugin.adapters.cli import main; "
        f"main(['map', {str(image)!r}]); print(len(os.listdir('/proc/self/task')))"
    )
    environment = process_environment()
    environment.pop("OPENBLAS_NUM_THREADS", None)
    said = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert said.stdout.splitlines()[-1] == "1"


@pytest.mark.parametrize("arguments", [("--help",), *((verb, "--help") for verb in VERBS)], ids="-".join)
def test_help_shows_examples(arguments: tuple[str, ...]) -> None:
    ended = qcow2(*arguments)
    assert ended.status == 0
    assert "examples:\n  qcow2 " in ended.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("unheard-of",),
        ("info",),
        ("info", "--policy=none", "x"),
        ("map", "--output=xml", "x"),
        ("map", "-s", "1q", "x"),
        ("serve", "--port=0", "x"),
        ("serve", "--port=65536", "x"),
        ("serve", "--threads=0", "x"),
        ("serve", "--port=1", "--socket=s", "x"),
        ("serve", "--address=0.0.0.0", "x"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(arguments: tuple[str, ...]) -> None:
    ended = qcow2(*arguments)
    assert ended.status == 2
    assert ended.stderr.startswith("usage: qcow2")


@pytest.mark.parametrize("verb", ["info", "map"])
def test_a_failure_is_1_and_one_line(verb: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no image")
    for path in (tmp_path / "none", tmp_path / "text", tmp_path, Path("/dev/zero")):
        with no_descriptor_left():
            ended = qcow2(verb, path)
        assert (ended.status, ended.stdout) == (1, "")
        assert ended.stderr.startswith("qcow2: error: ")
        assert ended.stderr.count("\n") == 1
        assert str(path) in ended.stderr


def test_it_is_a_module_too(image: Path) -> None:
    ended = qcow2_process("info", "--output=json", image)
    assert ended.status == 0
    assert json.loads(ended.stdout)["virtual-size"] == MIB


@pytest.mark.parametrize("output", ["human", "json"])
def test_a_reader_that_goes_away_is_no_error(output: str, long_map: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "map", f"--output={output}", long_map],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=process_environment(),
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (141, b"")


def test_a_full_disk_is_an_error(image: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "info", image], stdout=full, stderr=subprocess.PIPE, env=process_environment(), check=False
        )
    assert done.returncode == 1
    assert b"qcow2: error: No space left on device" in done.stderr


def test_an_interrupt_ends_it_quietly(long_map: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "map", "--output=json", long_map],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=process_environment(),
    )
    assert process.stdout is not None
    process.stdout.readline()  # by now it works, and soon waits for somebody to read
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, b"")


def test_any_character_can_be_printed_anywhere(tmp_path: Path) -> None:
    ImageBuilder(MIB).backing("ünïcode".encode()).build(tmp_path / "disk.qcow2")
    ended = qcow2_process("info", tmp_path / "disk.qcow2", environment={"PYTHONIOENCODING": "ascii:strict"})
    assert ended.status == 0
    assert "\\xfcn\\xefcode" in ended.stdout


IMPORTED = (
    "import sys; from qcow2_plugin.adapters.cli import main; main({arguments!r}); print(*sys.modules, file=sys.stderr)"
)


def modules_after(*arguments: str) -> set[str]:
    script = IMPORTED.format(arguments=list(arguments))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env=process_environment(), timeout=60, check=True
    )
    return set(done.stderr.decode().split())


def test_info_starts_without_what_it_does_not_need(image: Path) -> None:
    modules = modules_after("info", str(image))
    assert "qcow2_plugin.operations.info" in modules
    assert not {"numpy", "isal", "subprocess", "tempfile", "qcow2_plugin.engine.image"} & modules


def test_map_starts_without_what_it_does_not_need(image: Path) -> None:
    modules = modules_after("map", str(image))
    assert "numpy" in modules
    assert not {"subprocess", "qcow2_plugin.adapters.nbd", "pluggy"} & modules


def test_the_package_gives_its_public_names_when_asked() -> None:
    import qcow2_plugin

    assert qcow2_plugin.ExtentKind is ExtentKind
    assert set(qcow2_plugin.__all__) <= set(dir(qcow2_plugin))
    for name in qcow2_plugin.__all__:
        assert getattr(qcow2_plugin, name) is not None
    with pytest.raises(AttributeError, match="'nothing'"):
        qcow2_plugin.nothing  # type: ignore[attr-defined] # noqa: B018  there is none
