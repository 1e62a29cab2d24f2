"""The examples of backups, run as their first lines say, on disks that are thrown away."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.stores import ACCESS, SECRET, keep_to, s3_server
from tests.support.tools import ToolError, qemu_img, qemu_io, run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QCOW2 = str(Path(sys.executable).with_name("qcow2"))
DISKS = ("root", "data", "logs")


@pytest.fixture(autouse=True)
def _kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_to(tmp_path, monkeypatch)


def let_restic_make_weak_keys(directory: Path, patch: pytest.MonkeyPatch) -> None:
    """As those of other tests, so that each call takes half a second less."""
    weaken = (
        "import pathlib as p; from tests.support.restic_key import weaken; "
        "weaken(p.Path('repository'), p.Path('passphrase').read_text().strip())"
    )
    directory.mkdir()
    wrapper = directory / "restic"
    wrapper.write_text(
        '#!/bin/sh\nPATH="${PATH#*:}"\nrestic "$@" || exit\n'
        f'[ "$1" != init ] || PYTHONPATH="{EXAMPLES.parent}" "{sys.executable}" -c "{weaken}"\n'
    )
    wrapper.chmod(0o755)
    patch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


@pytest.mark.parametrize("program", ["borg", "restic"])
def test_backups_in_the_repository_of_a_program(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    let_restic_make_weak_keys(tmp_path / "bin", monkeypatch)
    said = run("bash", EXAMPLES / f"backup_{program}.sh", tmp_path / "work")
    assert said.count("Images are identical.") == 3
    assert "incremental" in said
    assert qemu_img("compare", tmp_path / "work" / "disk.qcow2", tmp_path / "work" / "restored.qcow2")


def test_backups_in_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("work", "weed"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with s3_server(tmp_path / "weed") as endpoint:
        said = run("bash", EXAMPLES / "backup_s3.sh", "s3://tests/guest", endpoint, tmp_path / "work")
    assert said.count("Images are identical.") == 1
    assert "incremental" in said
    with pytest.raises(ToolError, match="ENDPOINT") as wrong:
        run("bash", EXAMPLES / "backup_s3.sh")
    assert wrong.value.returncode == 2


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What nightly.sh is called with: three disks with something in them."""
    monkeypatch.setenv("QCOW2", QCOW2)
    for name in DISKS:
        qemu_img("create", "-f", "qcow2", tmp_path / f"{name}.qcow2", "16M")
        qemu_io(tmp_path / f"{name}.qcow2", "write -P 1 0 1M")
    return [f"{name}={tmp_path}/{name}.qcow2" for name in DISKS]


def test_nights(tmp_path: Path, disks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEP", "--keep-last 2")
    for night in range(1, 4):
        for name in DISKS:
            qemu_io(tmp_path / f"{name}.qcow2", f"write -P {night} {night}M 64k")
        assert run("bash", EXAMPLES / "nightly.sh", tmp_path / "kept", *disks) == ""
    members = sorted(path.name for path in (tmp_path / "kept").glob("*.qcow2"))
    assert {name.split("-")[1].split(".")[0] for name in members} == {"0002", "0003"}
    for name in DISKS:
        (newest,) = (tmp_path / "kept").glob(f"*-0003.{name}.qcow2")
        qemu_img("compare", "-f", "qcow2", "-F", "qcow2", tmp_path / f"{name}.qcow2", newest)


def test_a_night_that_fails_says_so(tmp_path: Path, disks: list[str]) -> None:
    with pytest.raises(ToolError, match="no point was made") as failed:
        run("bash", EXAMPLES / "nightly.sh", tmp_path / "kept", *disks, f"gone={tmp_path}/gone.qcow2")
    assert failed.value.returncode == 1
    with (tmp_path / "root.qcow2").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused = subprocess.run(
            ["bash", EXAMPLES / "nightly.sh", tmp_path / "kept", *disks], capture_output=True, text=True, check=False
        )
    assert refused.returncode == 75
    assert "still runs" in refused.stderr
