"""The journal of a backup: read as written, and not believed when it is something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qcow2_plugin.adapters.backup.journal import Entry, Journal, default_path
from qcow2_plugin.adapters.backup.model import DiskRequest, Job
from qcow2_plugin.adapters.backup.sources import disk_name, sources_of
from qcow2_plugin.errors import BackupError, OptionError, Qcow2Error
from qcow2_plugin.storage.opener import Policy

JOB = Job(
    job_id="1f", repository_id="0badcafe", point="20261125t131500z-0007",
    disks=(DiskRequest(disk="root", path="/images/root.qcow2"),), level=None,
)  # fmt: skip
ENTRY = Entry.of(JOB, "/backups", 17)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with Journal(str(tmp_path / "journal")) as journal:
        journal.begin(ENTRY)
    with Journal(str(tmp_path / "journal")) as journal:
        assert journal.read() == ENTRY
        journal.end()
    assert not list(tmp_path.iterdir())


def test_nobody_else_reads_it_while_the_job_runs(tmp_path: Path) -> None:
    with Journal(str(tmp_path / "journal")) as journal:
        journal.begin(ENTRY)
        with Journal(str(tmp_path / "journal")) as other, pytest.raises(BackupError, match="is running"):
            other.read()
        with Journal(str(tmp_path / "journal")) as other, pytest.raises(FileExistsError):
            other.begin(ENTRY)
        with Journal(str(tmp_path / "journal")) as other:
            other.end()  # which is not its own
        assert (tmp_path / "journal").exists()


@pytest.mark.parametrize("content", [b"", bytes(4096)])
def test_one_that_was_not_durable_tells_of_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal").write_bytes(content)
    with Journal(str(tmp_path / "journal")) as journal:
        assert journal.read() is None
        journal.end()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changed",
    [
        {"format": 2}, {"repository_id": "x"}, {"point": "../../etc"}, {"disks": [{"disk": "a", "path": 1}]},
        {"disks": [{"disk": "../a", "path": "/a"}]}, {"disks": [{"disk": "a", "path": "/a\0b"}]}, {"disks": 3},
        {"started": "now"}, {"target": None},
    ],
)  # fmt: skip
def test_what_cannot_be_is_not_believed(tmp_path: Path, changed: dict[str, object]) -> None:
    with Journal(str(tmp_path / "journal")) as journal:
        journal.begin(ENTRY)
    content = json.loads((tmp_path / "journal").read_text())
    (tmp_path / "journal").write_text(json.dumps(content | changed))
    with Journal(str(tmp_path / "journal")) as journal, pytest.raises(BackupError, match="no journal"):
        journal.read()


@pytest.mark.parametrize("content", [b"x", b"[" * 100000, b'"' + b"x" * (2 << 20) + b'"', b"{}"])
def test_garbage_is_not_believed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal").write_bytes(content)
    with Journal(str(tmp_path / "journal")) as journal, pytest.raises(BackupError, match="no journal"):
        journal.read()


def test_it_stands_where_it_outlives_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcow2_plugin.adapters.backup.journal.is_device", lambda path: path.startswith("/dev/"))
    name = ".qcow2-backup-0badcafe.journal"
    assert default_path(["/dev/vg/a", "/images/a.qcow2"], "/backups", "0badcafe") == f"/images/{name}"
    assert default_path(["/dev/vg/a"], "/backups", "0badcafe") == f"/backups/{name}"
    with pytest.raises(OptionError, match="option journal"):
        default_path(["/dev/vg/a"], None, "0badcafe")


@pytest.mark.parametrize(
    ("path", "name"), [("/x/Root.QCOW2", "root"), ("vm 1_disk.img", "vm-1-disk"), ("a.b.raw", "a-b"), ("sda", "sda")]
)
def test_disks_are_called_after_their_files(path: str, name: str) -> None:
    assert disk_name(path) == name


def test_disks_need_names_of_their_own(tmp_path: Path) -> None:
    for directory in ("one", "two"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "disk.qcow2").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "one" / "disk.qcow2")
    one, two = (str(tmp_path / name / "disk.qcow2") for name in ("one", "two"))
    for requests, error in (
        ([], OptionError),
        ([("disk", one), ("disk", two)], OptionError),
        ([("a", one), ("b", str(tmp_path / "link"))], OptionError),
        ([("../a", one)], Qcow2Error),
    ):
        with pytest.raises(error):
            sources_of([DiskRequest(disk=disk, path=path) for disk, path in requests], Policy.CONFINED)
    with pytest.raises(OptionError):
        disk_name("/x/.qcow2")
