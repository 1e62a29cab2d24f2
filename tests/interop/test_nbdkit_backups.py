"""Points of backups in a real nbdkit, read by qemu-img, and written to through a scratch image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from qcow2_plugin.adapters.backup.serving import opened_point
from tests.support.backup_chains import History, history
from tests.support.tools import Server, ToolError, nbdkit, qemu_img, qemu_img_json, qemu_io

DISKS = ("root", "data-1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> History:
    return history(tmp_path_factory.mktemp("backups"), DISKS, "fii")


def served(server: Server) -> str:
    return f"nbd+unix:///?socket={server.socket}"


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("disk", DISKS)
def test_any_point_is_read(made: History, number: int, disk: str) -> None:
    before = digests(made.directory)
    point = made.points[number]
    with nbdkit({"backup": made.directory, "point": point, "disk": disk}) as server:
        qemu_img("compare", "-f", "raw", "-F", "raw", served(server), made.raw(point, disk))
        with pytest.raises(ToolError):
            qemu_io(served(server), "write -P 1 0 512", options=("-f", "raw"))
    assert digests(made.directory) == before


def test_a_map_is_served(made: History) -> None:
    point = made.points[-1]
    with nbdkit({"backup": made.directory, "disk": "root"}) as server:
        runs = qemu_img_json("map", "-f", "raw", served(server))
        holes = sum(run["length"] for run in runs if not run["data"])
    raw = made.raw(point, "root").read_bytes()
    assert 0 < holes <= sum(65536 for at in range(0, len(raw), 65536) if not any(raw[at : at + 65536])) + 3 * 65536


def test_a_scratch_image_takes_what_is_written(made: History, tmp_path: Path) -> None:
    before = digests(made.directory)
    scratch = tmp_path / "scratch.qcow2"
    words: dict[str, str | Path] = {"backup": made.directory, "disk": "root", "scratch": scratch}
    with nbdkit(words) as server:
        qemu_io(served(server), "write -P 77 1000k 300k", options=("-f", "raw"))
    assert digests(made.directory) == before
    wanted = bytearray(made.raw(made.points[-1], "root").read_bytes())
    wanted[1000 << 10 : 1300 << 10] = bytes([77]) * (300 << 10)
    raw = tmp_path / "wanted.raw"
    raw.write_bytes(wanted)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", scratch, raw)
    with nbdkit(words, "--readonly") as server:  # what is there is used again
        qemu_img("compare", "-f", "raw", "-F", "raw", served(server), raw)
    with pytest.raises(ToolError, match="not of"), nbdkit({**words, "disk": "data-1"}):
        pass
    qemu_img("compare", "-f", "qcow2", "-F", "raw", scratch, raw)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({}, "has several disks, root, data-1"),
        ({"disk": "boot"}, "no disk boot"),
        ({"disk": "root", "point": "../up"}, "is no point"),
        ({"disk": "root", "point": "20200101t000000z-0001"}, "no point 20200101t000000z-0001"),
        ({"disk": "root", "readonly": "false"}, "is for reading only"),
        ({"disk": "root", "file": "disk.qcow2"}, "leave one of them out"),
        ({"disk": "root", "snapshot": "1"}, "leave one of them out"),
    ],
)
def test_what_cannot_be_served(made: History, words: Mapping[str, str], told: str) -> None:
    with pytest.raises(ToolError, match=told), nbdkit({"backup": made.directory, **words}):
        pass


def test_no_directory_is_made(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="no repository"), nbdkit({"backup": tmp_path / "typo"}):
        pass
    with pytest.raises(ToolError, match="add backup=DIR"), nbdkit({"file": tmp_path / "x", "point": "latest"}):
        pass
    assert os.listdir(tmp_path) == []


def test_a_scratch_image_is_for_its_owner_alone(tmp_path: Path) -> None:
    """What is written to a part of a cluster brings the rest of it from the backup."""
    made = history(tmp_path, ["root"], "f")
    scratch = tmp_path / "scratch.qcow2"
    with opened_point(str(made.directory), "latest", None, scratch=str(scratch), writable=True):
        assert scratch.stat().st_mode & 0o777 == 0o600
