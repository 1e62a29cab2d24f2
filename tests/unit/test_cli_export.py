"""`qcow2 export`: what it says, and how it ends."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from qcow2_plugin.operations.create import create_image
from tests.support.builder import ImageBuilder
from tests.support.command import qcow2, qcow2_json

_SIZE = 4 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    builder = ImageBuilder(_SIZE)
    for cluster in range(0, 64, 2):
        builder.data(cluster, bytes([cluster + 1]) * 65536)
    builder.build(tmp_path / "disk.qcow2")
    return tmp_path / "disk.qcow2"


@pytest.mark.parametrize("verify", [False, True])
def test_progress_goes_up_to_its_end_and_is_told_on_stderr(verify: bool, image: Path, tmp_path: Path) -> None:
    ended = qcow2("export", "-p", *(["--verify"] if verify else []), image, tmp_path / "disk.raw")
    assert ended.status == 0
    told = [int(number) for number in re.findall(r"^(\d+) % exported$", ended.stderr, re.MULTILINE)]
    assert told == sorted(told)
    assert told[-1] == 100
    assert len(told) == len(ended.stderr.splitlines()) > 5
    assert "%" not in ended.stdout


def test_nothing_is_told_unasked_or_if_it_is_to_be_quiet(image: Path, tmp_path: Path) -> None:
    assert qcow2("export", image, tmp_path / "one.raw").stderr == ""
    ended = qcow2("export", "-q", "-p", image, tmp_path / "other.raw")
    assert (ended.status, ended.stdout, ended.stderr) == (0, "", "")


def test_help_has_all_options_and_examples() -> None:
    ended = qcow2("export", "--help")
    assert ended.status == 0
    for word in ("--as", "--new-data-file", "-S", "-C", "--no-reflink", "--verify", "--overwrite", "--threads"):
        assert word in ended.stdout
    assert ended.stdout.count("\n  qcow2 export ") >= 4
    assert "(default: 4k)" in ended.stdout and "(default: 2)" in ended.stdout and "(default: 64k)" in ended.stdout


def test_a_disk_of_nothing(tmp_path: Path) -> None:
    create_image(tmp_path / "empty.qcow2", 0)
    ended = qcow2("export", "-p", "--verify", tmp_path / "empty.qcow2", tmp_path / "empty.raw")
    assert (ended.status, os.path.getsize(tmp_path / "empty.raw")) == (0, 0)


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (["--threads=0"], 1, "threads is 1 to 64"),
        (["--threads=many"], 2, "invalid int"),
        (["-S", "100"], 1, "whole sectors"),
        (["--snapshot=none"], 1, "no internal snapshot"),
        (["--cluster-size=4k"], 1, "only with --as=external-data-file"),
        (["--as=external-data-file", "--cluster-size=1000"], 1, "power of two"),
        (["--as=external-data-file", "--overwrite"], 1, "made anew"),
    ],
)
def test_what_cannot_be_done_leaves_nothing(
    words: list[str], status: int, reason: str, image: Path, tmp_path: Path
) -> None:
    ended = qcow2("export", *words, image, tmp_path / "new")
    assert (ended.status, ended.stdout) == (status, "")
    assert reason in ended.stderr
    assert os.listdir(tmp_path) == [image.name]


def test_names_of_data_files(image: Path, tmp_path: Path) -> None:
    told = qcow2_json("export", "--as=external-data-file", image, tmp_path / "new.qcow2")
    assert told["data-file"] == str(tmp_path / "new.raw")
    (tmp_path / "away").mkdir()
    named = tmp_path / "away" / "data"
    ended = qcow2("export", "--as=external-data-file", "--new-data-file", named, image, tmp_path / "other.qcow2")
    assert ended.status == 0
    assert f'recorded as "{named}"' in ended.stderr
    assert named.read_bytes() == (tmp_path / "new.raw").read_bytes()
    assert qcow2_json("export", image, tmp_path / "disk.raw")["data-file"] is None
