"""The examples, run as their first lines say, on images that are thrown away. `test_guestfs` runs inspect_guest.py."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.support.guest import MIB, TinyGuest
from tests.support.tools import ToolError, qemu_img, run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    raw = TinyGuest("shown").build(tmp_path / "guest.raw", tmp_path / "tree")
    qemu_img("convert", "-c", "-O", "qcow2", raw, tmp_path / "a guest.qcow2")
    return tmp_path / "a guest.qcow2"


def test_a_volume_is_adopted_and_backed_up(tmp_path: Path) -> None:
    said = run("bash", EXAMPLES / "adopt_volume.sh", tmp_path)
    assert "not one byte of the volume has changed" in said
    assert "the backup equals the volume" in said
    volume = (tmp_path / "volume.raw").read_bytes()
    assert volume == (tmp_path / "backup.raw").read_bytes()
    assert volume[5 * MIB : 5 * MIB + 204800] == b"\x63" * 204800
    marked = [line.split()[:2] for line in (tmp_path / "changed").read_text().splitlines() if line.endswith("data")]
    assert marked == [[str(2 * MIB), "65536"], [str(5 * MIB), str(4 * 65536)]]


def test_an_image_becomes_one_that_guestfish_reads_without_a_server(guest: Path) -> None:
    folder = guest.parent / "out"
    folder.mkdir()
    said = run("bash", EXAMPLES / "export_for_guestfish.sh", guest, folder)
    assert (folder / "a guest.raw").read_bytes() == (guest.parent / "guest.raw").read_bytes()
    (line,) = [line for line in said.splitlines() if line.startswith("guestfish ")]
    assert shlex.split(line) == ["guestfish", "--ro", "--format=raw", "-a", str(folder / "a guest.raw"), "-i"]
    with pytest.raises(ToolError) as wrong:
        run("bash", EXAMPLES / "export_for_guestfish.sh")
    assert wrong.value.returncode == 2


def test_the_quickstart_says_why_it_does_not_look_inside() -> None:
    said = run("bash", EXAMPLES / "quickstart.sh")
    (line,) = [line for line in said.splitlines() if line.startswith("skipped: ")]
    assert line.startswith(("skipped: libguestfs is not installed", "skipped: there is no guest"))
