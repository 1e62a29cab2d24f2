"""The runners, on programs that behave and on programs that do not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import nbd
import pytest

from tests.support.builder import ImageBuilder
from tests.support.tools import ToolError, convert_to_raw, nbd_connect, nbdkit, qemu_img, qemu_img_json, qemu_io, run

PLUGIN = """
import errno
import nbdkit
API_VERSION = 2
parameters = {}
def config(key, value):
    parameters[key] = value
def config_complete():
    if "fail" in parameters:
        raise RuntimeError("asked to " + parameters["fail"])
def open(readonly):
    return nbdkit.export_name()
def get_size(h):
    return 1 << 20
def pread(h, buf, offset, flags):
    buf[:] = (h or "default").encode().ljust(len(buf), b".")[:len(buf)]
def can_extents(h):
    return True
def extents(h, count, offset, flags):
    return [(offset, count, nbdkit.EXTENT_HOLE)]
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "plugin.py"
    path.write_text(PLUGIN)
    return path


def test_a_server_is_reached_and_ends_cleanly(plugin: Path) -> None:
    with nbdkit({}, "--verbose", plugin=plugin) as server:
        with nbd_connect(server.uri) as handle:
            assert handle.get_size() == 1 << 20
            assert bytes(handle.pread(9, 0)) == b"default.."
            assert handle.get_export_name() == ""
            flags: list[int] = []
            handle.block_status(1 << 20, 0, lambda _context, _offset, extents, _error: flags.extend(extents))
            assert flags == [1 << 20, nbd.STATE_HOLE]
        with nbd_connect(server.uri, "snapshot=a b/ü") as handle:
            assert bytes(handle.pread(16, 0)).decode() == "snapshot=a b/ü."
        assert "python" in server.stderr_text()
    assert server.process.returncode == 0
    assert not server.socket.parent.exists()


def test_the_uri_is_understood_by_others(plugin: Path) -> None:
    with nbdkit({}, plugin=plugin) as server:
        assert "export-size: 1048576" in run("nbdinfo", server.export_uri("snapshot=1"))
        assert qemu_img_json("info", server.uri)["virtual-size"] == 1 << 20


def test_a_server_that_does_not_start_says_why(plugin: Path) -> None:
    with pytest.raises(ToolError, match="asked to stop"), nbdkit({"fail": "stop"}, plugin=plugin):
        pytest.fail("there is no server")


def test_a_server_that_crashed_is_noticed(plugin: Path) -> None:
    with pytest.raises(ToolError, match="ended with -9"), nbdkit({}, plugin=plugin) as server:
        server.process.kill()
        server.process.wait()


def test_the_error_of_the_test_comes_first(plugin: Path) -> None:
    with pytest.raises(KeyError), nbdkit({}, plugin=plugin) as server:
        raise KeyError
    assert server.process.returncode == 0


def test_a_failing_command_carries_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="No such file") as caught:
        qemu_img("info", tmp_path / "none")
    assert caught.value.returncode == 1
    with pytest.raises(subprocess.TimeoutExpired):
        run("sleep", "5", timeout=0.05)


def test_qemu_io_and_convert(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    ImageBuilder(1 << 20).build(path)
    qemu_io(path, "write -P 7 4k 4k", "read -P 7 4k 4k")
    assert convert_to_raw(path)[4095:8193] == b"\0" + b"\7" * 4096 + b"\0"
    with pytest.raises(ToolError, match="verification failed"):
        qemu_io(path, "read -P 8 4k 4k")
