"""What a backup must not believe, and what it must not take away from others."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from pathlib import Path

import pytest

from qcow2_plugin import bitmap_health, create_image, remove_bitmap
from qcow2_plugin.adapters.backup.hookspecs import API_LEVEL, hookimpl
from qcow2_plugin.adapters.backup.job import run_backup
from qcow2_plugin.adapters.backup.model import Level, Manifest
from qcow2_plugin.adapters.backup.planning import Settings
from qcow2_plugin.adapters.backup.repository import Repository
from qcow2_plugin.adapters.backup.retention import Rules, plan, prune
from qcow2_plugin.adapters.backup.targets.directory import DirectoryTarget
from qcow2_plugin.adapters.cli import text
from qcow2_plugin.errors import BackupError, LooseEndError, ManifestError, PluginError, TargetError
from qcow2_plugin.storage.file import FileStorage
from tests.support import qemu_bitmaps
from tests.support.backups import Fleet, hooks, member, write
from tests.support.tools import qemu_img

SIZE = 4 << 20
MIB = 1 << 20
AUTOCLEAR_OFFSET = 88


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    fleet = Fleet(tmp_path, ["disk"])
    create_image(fleet.path("disk"), SIZE)
    write(fleet.path("disk"), 0, b"data" * 30000)
    return fleet


@pytest.fixture
def pair(tmp_path: Path) -> Fleet:
    """Two disks in directories of their own, so that a job of either has its own journal."""
    fleet = PairOfDirectories(tmp_path, ["one", "two"])
    for disk in fleet.disks:
        fleet.path(disk).parent.mkdir()
        create_image(fleet.path(disk), SIZE)
        write(fleet.path(disk), 0, disk.encode() * 1000)
    fleet.back_up()
    return fleet


class PairOfDirectories(Fleet):
    def path(self, disk: str) -> Path:
        return self.root / disk / f"{disk}.qcow2"


def reason(point: Manifest) -> str:
    found = member(point, "disk")
    assert found.level is Level.FULL
    return found.reason or ""


# -- bitmaps and files that are not to be believed --


def test_a_disabled_bitmap_is_no_stand_in(fleet: Fleet) -> None:
    qemu_bitmaps.add(fleet.path("disk"), "nightly")
    fleet.back_up()
    remove_bitmap(fleet.path("disk"), fleet.own_bitmaps("disk")[0])
    qemu_img("bitmap", "--disable", fleet.path("disk"), "nightly")
    write(fleet.path("disk"), 2 * MIB, b"nobody has recorded this")
    assert "disabled" in reason(fleet.back_up(Settings(bitmaps={"disk": "nightly"}, sample=0)))


def test_bitmaps_that_another_program_has_disowned_are_replaced(fleet: Fleet) -> None:
    """By one that knows no bitmaps, and clears the bit that says that they are right."""
    fleet.back_up()
    fleet.back_up()
    with open(fleet.path("disk"), "r+b") as image:
        image.seek(AUTOCLEAR_OFFSET)
        image.write(struct.pack(">Q", 0))
    assert "does not know bitmaps" in reason(fleet.back_up())
    assert member(fleet.back_up(), "disk").level is Level.INCREMENTAL
    fleet.check_all()


@pytest.mark.parametrize("how", ["changed", "replaced", "gone"])
def test_another_backing_file_means_full(tmp_path: Path, how: str) -> None:
    fleet = Fleet(tmp_path, ["disk"])
    for name in ("below", "other"):
        create_image(tmp_path / f"{name}.qcow2", SIZE)
        write(tmp_path / f"{name}.qcow2", 0, name.encode() * 1000)
    qemu_img("create", "-f", "qcow2", "-b", "below.qcow2", "-F", "qcow2", fleet.path("disk"))
    fleet.back_up()
    assert member(fleet.back_up(), "disk").level is Level.INCREMENTAL
    if how == "changed":
        write(tmp_path / "below.qcow2", 2 * MIB, b"new")
    else:
        backing = ["-b", "other.qcow2", "-F", "qcow2"] if how == "replaced" else ["-b", ""]
        qemu_img("rebase", "-u", *backing, fleet.path("disk"))
    assert "backing file" in reason(fleet.back_up(Settings(sample=0)))
    assert member(fleet.back_up(), "disk").level is Level.INCREMENTAL


@pytest.mark.parametrize("where", ["data file", "backing file"])
def test_a_write_behind_the_image_while_it_is_judged_ends_the_job(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The point in time makes the image younger than its data file, and would hide it."""
    monkeypatch.chdir(tmp_path)  # where QEMU looks for a data file
    fleet, other = Fleet(tmp_path, ["disk"]), tmp_path / "other.raw"
    if where == "data file":
        create_image(fleet.path("disk"), SIZE, data_file=other.name, data_file_raw=True)
    else:
        other.write_bytes(bytes(SIZE))
        qemu_img("create", "-f", "qcow2", "-b", other.name, "-F", "raw", fleet.path("disk"))
    fleet.back_up()

    class Behind:
        QCOW2_PLUGIN_API = API_LEVEL

        @hookimpl
        def qcow2_select_base(self) -> None:
            with open(other, "r+b") as raw:
                raw.seek(MIB)
                raw.write(b"behind")

    write(fleet.path("disk"), 2 * MIB, b"so that the bitmap marks something")
    with pytest.raises(BackupError, match=r"has written|just changed"):
        fleet.back_up(Settings(sample=0), plugins={"behind": Behind()})
    assert "file" in reason(fleet.back_up(Settings(sample=0)))


def test_a_member_that_was_cut_off_is_not_built_on(fleet: Fleet) -> None:
    first = fleet.back_up()
    os.truncate(fleet.repository / member(first, "disk").file, 70000)
    assert "bytes, and its manifest says" in reason(fleet.back_up())


# -- disks that have no usual bitmap --


def test_a_disk_of_no_bytes_is_backed_up(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, ["disk"])
    create_image(fleet.path("disk"), 0)
    assert [member(fleet.back_up(), "disk").bitmap for _ in range(2)] == [None, None]


def test_a_disk_too_large_for_the_usual_bitmap_has_a_coarser_one(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, ["disk"])
    create_image(fleet.path("disk"), 300 << 40)
    target = DirectoryTarget(fleet.repository)
    with hooks() as loaded:
        points = [run_backup(fleet.requests(), target, hooks=loaded) for _ in range(2)]
    assert [member(point, "disk").level for point in points] == [Level.FULL, Level.INCREMENTAL]
    assert {each.granularity for each in bitmap_health(fleet.path("disk"))} == {128 << 10}


# -- others who use the repository at the same time --


def test_a_job_that_fails_leaves_the_files_of_another_one_of_the_same_second(
    pair: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time() + 5
    monkeypatch.setattr(time, "time", lambda: now)
    both, one_is_ready, two_is_over = threading.Barrier(2), threading.Event(), threading.Event()

    class One:
        QCOW2_PLUGIN_API = API_LEVEL

        @hookimpl
        def qcow2_backup_begin(self) -> None:
            both.wait(10)

        @hookimpl
        def qcow2_backup_prepare(self) -> None:
            one_is_ready.set()
            assert two_is_over.wait(10)

    class Two:
        QCOW2_PLUGIN_API = API_LEVEL

        @hookimpl
        def qcow2_backup_begin(self) -> None:
            both.wait(10)

        @hookimpl
        def qcow2_backup_plan(self) -> None:
            assert one_is_ready.wait(10)
            raise RuntimeError("no")

    def fail() -> None:
        try:
            with hooks({"two": Two()}) as loaded, pytest.raises(PluginError):
                run_backup(pair.requests(["two"]), DirectoryTarget(pair.repository), hooks=loaded)
        finally:
            two_is_over.set()

    other = threading.Thread(target=fail)
    other.start()
    point = pair.back_up(disks=["one"], plugins={"one": One()})
    other.join()
    leaves_file = member(point, "one").leaves_file
    assert leaves_file is not None and (pair.repository / leaves_file).exists()


def test_of_two_jobs_with_one_point_the_loser_goes_on_where_it_was(
    pair: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time() + 5
    monkeypatch.setattr(time, "time", lambda: now)

    class Other:
        QCOW2_PLUGIN_API = API_LEVEL

        @hookimpl
        def qcow2_backup_begin(self) -> None:
            pair.back_up(disks=["one"])

    with pytest.raises(BackupError, match="same second"), hooks({"other": Other()}) as loaded:
        run_backup(pair.requests(["two"]), DirectoryTarget(pair.repository), hooks=loaded)
    write(pair.path("two"), MIB, b"new")
    assert member(pair.back_up(disks=["two"]), "two").level is Level.INCREMENTAL
    pair.check_all()


def test_no_point_is_made_of_files_that_were_removed(pair: Fleet) -> None:
    """By a prune, which took them for leftovers because a later job was faster."""

    class Meanwhile:
        QCOW2_PLUGIN_API = API_LEVEL

        @hookimpl
        def qcow2_backup_prepare(self) -> None:
            pair.back_up(disks=["two"])
            repository = Repository.open(DirectoryTarget(pair.repository))
            prune(repository, plan(repository, Rules(last=7)))

    with pytest.raises(ManifestError, match="removed"), hooks({"meanwhile": Meanwhile()}) as loaded:
        run_backup(pair.requests(["one"]), DirectoryTarget(pair.repository), hooks=loaded)
    pair.check_all()


def test_a_journal_that_cannot_be_written_does_not_stay(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = FileStorage.barrier

    def full(storage: FileStorage) -> None:
        if storage.path.endswith(".journal"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), storage.path)
        barrier(storage)

    monkeypatch.setattr(FileStorage, "barrier", full)
    with pytest.raises(OSError, match="No space left"):
        fleet.back_up()
    assert not list(fleet.root.glob(".*journal*"))


# -- what is told --


def test_a_target_that_goes_away_after_publishing_leaves_a_loose_end(fleet: Fleet) -> None:
    class Target(DirectoryTarget):
        is_gone = False

        def publish(self, name: str, content: bytes) -> None:
            super().publish(name, content)
            self.is_gone = "point" in name

        def names(self) -> list[str]:
            if self.is_gone:
                raise TargetError("the network is gone")
            return super().names()

    with pytest.raises(LooseEndError), hooks() as loaded:
        run_backup(fleet.requests(), Target(fleet.repository), hooks=loaded)
    assert len(Repository.open(DirectoryTarget(fleet.repository)).points()) == 1


def test_whoever_interrupts_after_publishing_is_told_of_the_point(fleet: Fleet) -> None:
    class Interrupted:
        QCOW2_PLUGIN_API = API_LEVEL

        @hookimpl
        def qcow2_backup_commit(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(LooseEndError, match="is made"):
        fleet.back_up(plugins={"interrupted": Interrupted()})
    assert member(fleet.back_up(), "disk").level is Level.INCREMENTAL


def test_what_is_left_to_do_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    error = BackupError("it failed")
    error.add_note("and the bitmaps are not as they should be")
    text.fail(error)
    assert capsys.readouterr().err.splitlines() == [
        "qcow2: error: it failed",
        "qcow2: note: and the bitmaps are not as they should be",
    ]
