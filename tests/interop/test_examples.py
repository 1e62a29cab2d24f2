"""The examples, run as their first lines say, on images that are thrown away."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop import test_guestfs as guestfs
from tests.support.command import process_environment
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


class TestWithLibguestfs:
    pytestmark = guestfs.pytestmark

    def test_a_guest_is_inspected(self, guest: Path) -> None:
        done = subprocess.run(
            [sys.executable, EXAMPLES / "inspect_guest.py", guest],
            capture_output=True,
            text=True,
            env=process_environment(),
            timeout=guestfs.TIMEOUT,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        first, system, space, *release = done.stdout.splitlines()
        assert first == f"{guest}: 2 partitions, read as nbd"
        assert system == "  /dev/sda1: debian 12 shown x86_64"
        assert space.startswith("  /dev/sda1: ext4, ")
        assert "  | ID=debian" in release


def test_the_quickstart_says_why_it_does_not_look_inside(tmp_path: Path) -> None:
    said = run("bash", EXAMPLES / "quickstart.sh")
    (line,) = [line for line in said.splitlines() if line.startswith("skipped: ")]
    assert line.startswith(("skipped: libguestfs is not installed", "skipped: there is no guest"))
