"""`qcow2 bitmap` and `qemu-img bitmap` do the same with the same words, and end the same way."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from qcow2_plugin.operations.bitmap_health import bitmap_health
from tests.support.command import qcow2
from tests.support.tools import qemu_img, qemu_img_json, qemu_io

# Each line is a command on one and the same pair of files, "other" is a second image.
COMMANDS = """\
--add disk a
--add -g 4k disk b
--add disk a
--add -g 1000 disk c
--add -g 256 disk c
--add -g 4G disk c
--add --disable disk c
--enable --disable --enable disk c
--disable disk a
--clear disk a
--merge a disk b
--merge a --merge b disk c
--merge c disk c
--merge nothing disk c
--add --merge a -g 512 disk d
--remove disk d
--remove disk d
--merge x -b other -F qcow2 disk a
--merge x -b other disk b
--merge nothing -b other disk b
--merge x -b nowhere disk b
--remove --add disk c
--clear --clear disk b
-f qcow2 --enable disk a
--granularity 64k --add disk e
--merge x --source-file other --source-format qcow2 disk e
--add disk
disk a
-g 4k --clear disk a
--clear -b other disk a
--merge a -F qcow2 disk b
""".splitlines()


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with the same images."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    for name, bitmap, place in (("disk", "first", "1M"), ("other", "x", "5M")):
        qemu_img("create", "-q", "-f", "qcow2", ours / name, "64M")
        qemu_img("bitmap", "--add", ours / name, bitmap)
        qemu_io(ours / name, f"write {place} 200k")
    shutil.copytree(ours, theirs)
    return ours, theirs


def test_word_for_word(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = folders
    ends = []
    for command in COMMANDS:
        words = command.split()
        monkeypatch.chdir(ours)
        ended = qcow2("bitmap", *words)
        done = subprocess.run(["qemu-img", "bitmap", *words], cwd=theirs, capture_output=True, check=False)
        assert bool(ended.status) == bool(done.returncode), f"{command}: {ended.stderr or done.stderr.decode()}"
        ends.append(ended.status)
    assert listed(ours) == listed(theirs)
    assert marked(ours) == marked(theirs)
    assert {0, 1, 2} == set(ends)
    for folder in folders:
        qemu_img("check", "-q", "-f", "qcow2", folder / "disk")


def listed(folder: Path) -> list[tuple[str, int, list[str]]]:
    bitmaps = qemu_img_json("info", "-f", "qcow2", folder / "disk")["format-specific"]["data"]["bitmaps"]
    return sorted((each["name"], each["granularity"], each["flags"]) for each in bitmaps)


def marked(folder: Path) -> dict[str | None, int | None]:
    return {each.name: each.dirty_size for each in bitmap_health(folder / "disk")}
