"""`qcow2 resize`: how sizes are told, and wrong usage."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcow2_plugin import create_image, info
from tests.support.command import qcow2

MIB = 1 << 20


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("disk.qcow2 20M", 20),
        ("disk.qcow2 20971520", 20),
        ("disk.qcow2 +5M", 15),
        ("disk.qcow2 +0", 10),
        ("--shrink disk.qcow2 -5M", 5),
        ("disk.qcow2 -5M --shrink", 5),
        ("--shrink disk.qcow2 -1048576", 9),
        ("--shrink disk.qcow2 -1.5M", 8.5),
        ("-f qcow2 --shrink -- disk.qcow2 -5M", 5),
    ],
)
def test_a_size_is_absolute_or_a_difference(words: str, size: float) -> None:
    create_image("disk.qcow2", 10 * MIB)
    ended = qcow2("resize", *words.split())
    assert (ended.status, ended.stdout, ended.stderr) == (0, "Image resized.\n", "")
    assert info("disk.qcow2").virtual_size == size * MIB
    assert qcow2("resize", "-q", "disk.qcow2", "20M").stdout == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "required: IMAGE, [+|-]SIZE"),
        ("disk.qcow2", "required: [+|-]SIZE"),
        ("disk.qcow2 1q", "argument [+|-]SIZE: invalid size value: '1q'"),
        ("disk.qcow2 +-1M", "invalid size value: '+-1M'"),
        ("disk.qcow2 --1M", "required: [+|-]SIZE"),
        ("disk.qcow2 -M", "required: [+|-]SIZE"),
        ("disk.qcow2 +", "invalid size value: '+'"),
        ("disk.qcow2 1M 2M", "unrecognized arguments: 2M"),
        ("--preallocation=some disk.qcow2 1M", "invalid choice: 'some'"),
        ("-f raw disk.qcow2 1M", "invalid choice: 'raw'"),
        ("--policy=any disk.qcow2 1M", "invalid choice: 'any'"),
    ],
)
def test_wrong_usage_says_what_is_wrong(words: str, message: str) -> None:
    create_image("disk.qcow2", MIB)
    ended = qcow2("resize", *words.split())
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.startswith("usage: qcow2")
    assert message in ended.stderr
    assert info("disk.qcow2").virtual_size == MIB


def test_help_shows_examples() -> None:
    ended = qcow2("resize", "--help")
    assert ended.status == 0
    assert "examples:\n  qcow2 resize disk.qcow2 +10G" in ended.stdout
