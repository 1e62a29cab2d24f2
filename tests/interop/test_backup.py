"""Backups of disks that live: levels and their reasons, what the members are, and what others make of the bitmaps."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin import (
    ExtentKind,
    add_bitmap,
    apply_snapshot,
    bitmap_health,
    create_image,
    create_snapshot,
    open_image,
    remove_bitmap,
    resize,
)
from qcow2_plugin.adapters.backup.hook_values import BaseChoice, Batch
from qcow2_plugin.adapters.backup.hookspecs import API_LEVEL, hookimpl
from qcow2_plugin.adapters.backup.job import plan_backup, recover, run_backup
from qcow2_plugin.adapters.backup.model import DiskRequest, Level, Manifest, ProgressEvent
from qcow2_plugin.adapters.backup.planning import Settings
from qcow2_plugin.adapters.backup.repository import Repository
from qcow2_plugin.adapters.backup.target import BackupTarget, exactly
from qcow2_plugin.adapters.backup.targets.directory import DirectoryTarget
from qcow2_plugin.errors import BackupError, ImageLockedError, LooseEndError, PluginError
from tests.support import qemu_bitmaps
from tests.support.backups import Fleet, digest_of, hooks, killed_at, member, write
from tests.support.tools import qemu_img, qemu_img_json, qemu_io

SIZE = 4 << 20
MIB = 1 << 20


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    fleet = Fleet(tmp_path, ["disk"])
    create_image(fleet.path("disk"), SIZE)
    write(fleet.path("disk"), 0, b"data" * 300000)
    return fleet


def levels(*points: Manifest) -> list[Level]:
    return [member(point, "disk").level for point in points]


def reason(point: Manifest) -> str:
    found = member(point, "disk")
    assert found.level is Level.FULL
    return found.reason or ""


# -- levels --


def test_the_first_one_is_full_and_says_so(fleet: Fleet) -> None:
    assert "no point of this disk" in reason(fleet.back_up())


def test_what_follows_is_incremental(fleet: Fleet) -> None:
    first = fleet.back_up()
    write(fleet.path("disk"), 2 * MIB, b"new")
    second = fleet.back_up()
    third = fleet.back_up()
    assert levels(first, second, third) == [Level.FULL, Level.INCREMENTAL, Level.INCREMENTAL]
    info = qemu_img_json("info", fleet.repository / member(second, "disk").file)
    assert info["backing-filename"] == member(first, "disk").file
    assert info["backing-filename-format"] == "qcow2"
    assert member(third, "disk").parent_point == second.point
    fleet.check_all()


def test_a_differential_one_builds_on_the_last_full_one(fleet: Fleet) -> None:
    first = fleet.back_up()
    for number in range(3):
        write(fleet.path("disk"), number * MIB, b"new" * 1000)
        fleet.back_up()
    write(fleet.path("disk"), 3 * MIB, b"new" * 1000)
    point = fleet.back_up(Settings(level=Level.DIFFERENTIAL))
    assert levels(point) == [Level.DIFFERENTIAL]
    assert member(point, "disk").parent_point == first.point
    write(fleet.path("disk"), 7 * MIB // 2, b"more")
    again = fleet.back_up(Settings(level=Level.DIFFERENTIAL))
    assert member(again, "disk").parent_point == first.point
    fleet.check_all()


def test_zeros_and_discarded_ranges_do_not_let_old_data_through(fleet: Fleet) -> None:
    fleet.back_up()
    with open_image(fleet.path("disk"), writable=True) as image:
        image.write_zeroes(0, 131072, may_unmap=False)
        image.discard(262144, 131072)
    qemu_io(fleet.path("disk"), "write -z 512k 64k", "write -P 0 640k 64k")
    point = fleet.back_up()
    assert levels(point) == [Level.INCREMENTAL]
    fleet.check_all()


def test_a_disk_that_grew_is_still_incremental(fleet: Fleet) -> None:
    fleet.back_up()
    resize(fleet.path("disk"), SIZE + 70144)
    write(fleet.path("disk"), SIZE + 70000, b"tail")
    assert levels(fleet.back_up()) == [Level.INCREMENTAL]
    qemu_img("resize", "-q", fleet.path("disk"), str(6 * MIB))
    assert levels(fleet.back_up()) == [Level.INCREMENTAL]


def test_what_a_disk_has_grown_by_is_kept_whatever_the_bitmap_says(fleet: Fleet) -> None:
    fleet.back_up()
    (name,) = fleet.own_bitmaps("disk")
    resize(fleet.path("disk"), SIZE + 131072)
    write(fleet.path("disk"), SIZE + 65536, b"tail")
    qemu_img("bitmap", "--clear", fleet.path("disk"), name)
    assert levels(fleet.back_up()) == [Level.INCREMENTAL]


def test_a_disk_that_shrank_is_full(fleet: Fleet) -> None:
    fleet.back_up()
    qemu_img("resize", "-q", "--shrink", fleet.path("disk"), str(SIZE // 4))
    assert "has shrunk" in reason(fleet.back_up())


def test_a_disk_that_shrank_and_grew_again_is_full(fleet: Fleet) -> None:
    """No bitmap tells of it, QEMU's own neither."""
    fleet.back_up()
    qemu_img("resize", "-q", "--shrink", fleet.path("disk"), str(MIB))
    qemu_img("resize", "-q", fleet.path("disk"), str(SIZE))
    assert qemu_bitmaps.dirty(fleet.path("disk"), fleet.own_bitmaps("disk")[0]) == []
    assert "where no change was recorded" in reason(fleet.back_up(Settings(sample=1)))
    assert levels(fleet.back_up()) == [Level.INCREMENTAL]


def test_a_bitmap_that_was_removed_means_full(fleet: Fleet) -> None:
    fleet.back_up()
    remove_bitmap(fleet.path("disk"), fleet.own_bitmaps("disk")[0])
    assert "has no bitmap of the last point" in reason(fleet.back_up())


def test_a_bitmap_that_was_disabled_means_full(fleet: Fleet) -> None:
    fleet.back_up()
    qemu_img("bitmap", "--disable", fleet.path("disk"), fleet.own_bitmaps("disk")[0])
    write(fleet.path("disk"), 3 * MIB, b"unseen")
    assert "disabled" in reason(fleet.back_up())


def test_an_older_image_is_full(fleet: Fleet) -> None:
    """It has a bitmap of a point that is not the last."""
    fleet.back_up()
    old = fleet.path("disk").read_bytes()
    write(fleet.path("disk"), 3 * MIB, b"newer")
    fleet.back_up()
    fleet.path("disk").write_bytes(old)
    assert "no bitmap of the last point" in reason(fleet.back_up())


def test_a_missing_member_means_full(fleet: Fleet) -> None:
    point = fleet.back_up()
    os.unlink(fleet.repository / member(point, "disk").file)
    fleet.expected.clear()
    assert "missing" in reason(fleet.back_up())


def test_a_chain_has_an_end(fleet: Fleet) -> None:
    made = [fleet.back_up(Settings(max_chain=3)) for _ in range(4)]
    assert levels(*made) == [Level.FULL, Level.INCREMENTAL, Level.INCREMENTAL, Level.FULL]
    assert "as many as it may have" in reason(made[-1])


def test_a_snapshot_that_was_applied_is_in_the_next_one(fleet: Fleet) -> None:
    create_snapshot(fleet.path("disk"), "before")
    write(fleet.path("disk"), 0, b"after" * 100000)
    fleet.back_up()
    apply_snapshot(fleet.path("disk"), "before", mark_bitmaps=True)
    assert levels(fleet.back_up()) == [Level.INCREMENTAL]


def test_one_disks_trouble_is_its_own(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, ["one", "two"])
    for disk in fleet.disks:
        create_image(fleet.path(disk), SIZE)
    fleet.back_up()
    remove_bitmap(fleet.path("one"), fleet.own_bitmaps("one")[0])
    point = fleet.back_up()
    assert [each.level for each in point.members] == [Level.FULL, Level.INCREMENTAL]


def test_an_image_of_version_2_is_full_each_time(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, ["disk"])
    create_image(fleet.path("disk"), SIZE, version=2)
    write(fleet.path("disk"), 0, b"old")
    for _ in range(2):
        assert "version 2" in reason(fleet.back_up())


def test_a_plugin_chooses_the_level(fleet: Fleet) -> None:
    class Sunday:
        QCOW2_PLUGIN_API = API_LEVEL

        @hookimpl
        def qcow2_select_base(self, candidates: tuple[str, ...]) -> BaseChoice:
            return BaseChoice(point=None, reason="it is Sunday")

    fleet.back_up()
    assert reason(fleet.back_up(plugins={"sunday": Sunday()})) == "it is Sunday"
    assert levels(fleet.back_up()) == [Level.INCREMENTAL]


# -- raw data files --


@pytest.fixture
def around_raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    monkeypatch.chdir(tmp_path)  # where QEMU looks for a data file
    fleet = Fleet(tmp_path, ["disk"])
    create_image(fleet.path("disk"), SIZE, data_file="disk.raw", data_file_raw=True)
    write(fleet.path("disk"), 0, b"data" * 1000)
    return fleet


def write_behind(fleet: Fleet) -> None:
    time.sleep(0.02)  # what a clock of files can tell apart
    with open(fleet.root / "disk.raw", "r+b") as raw:
        raw.seek(MIB)
        raw.write(b"behind")


def test_a_write_behind_the_image_means_full_until_there_is_one(around_raw: Fleet) -> None:
    around_raw.back_up()
    write(around_raw.path("disk"), 2 * MIB, b"by the book")
    assert levels(around_raw.back_up()) == [Level.INCREMENTAL]
    write(around_raw.path("disk"), 2 * MIB, b"so that the bitmap marks something")
    write_behind(around_raw)
    with pytest.raises(PluginError), hooks({"no": Refuser()}) as loaded:
        run_backup(around_raw.requests(), DirectoryTarget(around_raw.repository), hooks=loaded)
    write(around_raw.path("disk"), 3 * MIB, b"by the book")  # the image is younger now
    assert reason(around_raw.back_up())
    assert levels(around_raw.back_up()) == [Level.INCREMENTAL]


def test_a_write_behind_the_image_alone_is_seen_too(around_raw: Fleet) -> None:
    """The image is younger again, but no bitmap explains what has changed."""
    around_raw.back_up()
    write_behind(around_raw)
    time.sleep(0.02)
    os.utime(around_raw.path("disk"))
    assert "marks nothing" in reason(around_raw.back_up(Settings(sample=0)))


def test_another_data_file_means_full(around_raw: Fleet) -> None:
    around_raw.back_up()
    content = (around_raw.root / "disk.raw").read_bytes()
    os.rename(around_raw.root / "disk.raw", around_raw.root / "old.raw")
    (around_raw.root / "disk.raw").write_bytes(content)
    assert "another one" in reason(around_raw.back_up())


class Refuser:
    QCOW2_PLUGIN_API = API_LEVEL

    @hookimpl
    def qcow2_backup_prepare(self) -> None:
        raise RuntimeError("not today")


def test_a_refused_one_never_happened(fleet: Fleet) -> None:
    fleet.back_up()
    write(fleet.path("disk"), 3 * MIB, b"kept in the bitmap")
    before = sorted(os.listdir(fleet.repository)), fleet.own_bitmaps("disk")
    with pytest.raises(PluginError, match="not today"):
        fleet.back_up(plugins={"no": Refuser()})
    assert (sorted(os.listdir(fleet.repository)), fleet.own_bitmaps("disk")) == before
    assert levels(fleet.back_up()) == [Level.INCREMENTAL]
    assert not list(fleet.root.glob(".*journal*"))


# -- bitmaps of others, and ours for others --


def test_a_bitmap_of_qemu_stands_in_for_one_that_is_lost(fleet: Fleet) -> None:
    qemu_bitmaps.add(fleet.path("disk"), "nightly")
    fleet.back_up()
    remove_bitmap(fleet.path("disk"), fleet.own_bitmaps("disk")[0])
    qemu_io(fleet.path("disk"), "write -P 5 2M 128k")
    with hooks() as loaded:
        settings = Settings(bitmaps={"disk": "nightly"})
        (plan,) = plan_backup(fleet.requests(), DirectoryTarget(fleet.repository), hooks=loaded, settings=settings)
    assert (plan.level, plan.estimate.dirty_data) == (Level.INCREMENTAL, 131072)
    point = fleet.back_up(settings)
    assert levels(point) == [Level.INCREMENTAL]
    write(fleet.path("disk"), 3 * MIB, b"next")
    assert levels(fleet.back_up()) == [Level.INCREMENTAL]
    assert "nightly" in {each.name for each in bitmap_health(fleet.path("disk"))}
    fleet.check_all()


def test_an_adopted_bitmap_is_not_lost_by_a_failure(fleet: Fleet) -> None:
    qemu_bitmaps.add(fleet.path("disk"), "nightly")
    fleet.back_up()
    remove_bitmap(fleet.path("disk"), fleet.own_bitmaps("disk")[0])
    write(fleet.path("disk"), 2 * MIB, b"before")
    with pytest.raises(PluginError):
        fleet.back_up(Settings(bitmaps={"disk": "nightly"}), plugins={"no": Refuser()})
    write(fleet.path("disk"), 3 * MIB, b"after")
    assert levels(fleet.back_up(Settings(bitmaps={"disk": "nightly"}))) == [Level.INCREMENTAL]


def test_a_bitmap_that_is_not_there_is_no_stand_in(fleet: Fleet) -> None:
    fleet.back_up()
    assert "nightly" in reason(fleet.back_up(Settings(bitmaps={"disk": "nightly"})))


def test_qemu_reads_our_bitmaps(fleet: Fleet) -> None:
    fleet.back_up()
    write(fleet.path("disk"), 2 * MIB, b"x" * 70000)
    name = fleet.own_bitmaps("disk")[0]
    assert qemu_bitmaps.dirty(fleet.path("disk"), name) == [(2 * MIB, 131072)]
    qemu_io(fleet.path("disk"), "write -P 1 3M 64k")  # and goes on with them
    assert levels(fleet.back_up()) == [Level.INCREMENTAL]


def test_bitmaps_of_others_stay(fleet: Fleet) -> None:
    add_bitmap(fleet.path("disk"), "qcow2-backup.0badcafe.20200101t000000z-0007")
    add_bitmap(fleet.path("disk"), "theirs")
    for level in (None, None, Level.FULL):
        fleet.back_up(Settings(level=level))
    names = {each.name for each in bitmap_health(fleet.path("disk"))}
    assert {"theirs", "qcow2-backup.0badcafe.20200101t000000z-0007"} <= names


def test_two_repositories_do_not_disturb_each_other(fleet: Fleet) -> None:
    other = Fleet(fleet.root, fleet.disks)
    other.repository = fleet.root / "other"
    for number, one in enumerate((fleet, other, fleet, other, other, fleet)):
        write(fleet.path("disk"), number * 300000, b"change" * 100)
        one.back_up()
    assert [levels(*_points(one)) for one in (fleet, other)] == [[Level.FULL, *[Level.INCREMENTAL] * 2]] * 2
    fleet.check_all()
    other.check_all()


def _points(fleet: Fleet) -> list[Manifest]:
    return Repository.open(DirectoryTarget(fleet.repository)).points()


# -- the rest --


def test_an_image_in_use_is_left_alone(fleet: Fleet) -> None:
    fleet.back_up()
    before = fleet.path("disk").read_bytes()
    with open_image(fleet.path("disk"), writable=True), pytest.raises(ImageLockedError):
        fleet.back_up()
    assert fleet.path("disk").read_bytes() == before
    assert not list(fleet.root.glob(".*journal*"))


def test_a_job_that_runs_is_not_recovered(fleet: Fleet) -> None:
    fleet.back_up()

    class Second:
        QCOW2_PLUGIN_API = API_LEVEL

        @hookimpl
        def qcow2_backup_begin(self) -> None:
            with hooks() as loaded, pytest.raises(BackupError, match="is running"):
                run_backup(fleet.requests(), DirectoryTarget(fleet.repository), hooks=loaded)

    assert levels(fleet.back_up(plugins={"second": Second()})) == [Level.INCREMENTAL]


def test_a_write_right_after_the_point_in_time_ends_the_job(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcow2_plugin.operations.transaction import bitmap_transaction

    def and_then_a_write(*arguments: Any, **named: Any) -> None:
        changes = dict(arguments[0])
        bitmap_transaction(changes, **named)
        for image in changes:
            image.close()
        write(fleet.path("disk"), MIB, b"too late")

    fleet.back_up()
    monkeypatch.setattr("qcow2_plugin.adapters.backup.job.bitmap_transaction", and_then_a_write)
    with pytest.raises(BackupError, match="just after the point in time"):
        fleet.back_up()
    monkeypatch.undo()
    assert levels(fleet.back_up()) == [Level.INCREMENTAL]


def test_a_dry_run_tells_what_would_be_and_changes_nothing(fleet: Fleet) -> None:
    fleet.back_up()
    write(fleet.path("disk"), 2 * MIB, b"x" * 65536)
    with open_image(fleet.path("disk"), writable=True) as image:
        image.write_zeroes(3 * MIB, 65536)
    before = fleet.path("disk").read_bytes(), sorted(os.listdir(fleet.repository))
    with hooks() as loaded:
        (plan,) = plan_backup(fleet.requests(), DirectoryTarget(fleet.repository), hooks=loaded)
    assert plan.level is Level.INCREMENTAL
    assert (plan.estimate.dirty_data, plan.estimate.clean) == (65536, SIZE - 131072)
    assert (fleet.path("disk").read_bytes(), sorted(os.listdir(fleet.repository))) == before


def test_a_dry_run_needs_no_repository(fleet: Fleet) -> None:
    target = MemoryTarget()
    with hooks() as loaded:
        (plan,) = plan_backup(fleet.requests(), target, hooks=loaded)
    assert (plan.level, plan.base, target.blobs) == (Level.FULL, None, {})


@pytest.mark.parametrize("compression", [None, "zlib", "zstd"])
def test_members_are_compressed_as_asked_and_verified(fleet: Fleet, compression: Any) -> None:
    events: list[ProgressEvent] = []
    for _ in range(2):
        write(fleet.path("disk"), 2 * MIB, b"z" * 300000)
        with hooks() as loaded:
            settings = Settings(compression=compression, verify=True)
            target = DirectoryTarget(fleet.repository)
            run_backup(fleet.requests(), target, hooks=loaded, settings=settings, progress=events.append)
    assert {event.phase for event in events} == {"write", "verify"}
    for point in _points(fleet):
        found = qemu_img_json("check", fleet.repository / member(point, "disk").file)
        assert bool(found.get("compressed-clusters")) is (compression is not None)


class MemoryTarget(BackupTarget):
    """Streams only: no directory. `fails` is told the name of each call, and may raise."""

    uri = "memory:"

    def __init__(self, fails: Callable[[str, str], None] = lambda call, name: None) -> None:
        self.blobs: dict[str, bytes] = {}
        self.fails = fails

    def put(self, name: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        taken = iter(exactly(chunks, size))
        first = bytes(next(taken, b""))
        self.fails("put", name)
        self.blobs[name] = first + b"".join(map(bytes, taken))

    def publish(self, name: str, content: bytes) -> None:
        self.fails("publish", name)
        if name in self.blobs:
            raise FileExistsError(name)
        self.blobs[name] = content
        self.fails("published", name)

    def names(self) -> list[str]:
        self.fails("names", "")
        return sorted(self.blobs)

    def get(self, name: str) -> Iterator[bytes]:
        if name not in self.blobs:
            raise FileNotFoundError(name)
        yield self.blobs[name]

    def remove(self, name: str) -> None:
        self.blobs.pop(name, None)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_target_that_is_no_directory(fleet: Fleet, tmp_path: Path, compression: Any) -> None:
    target = MemoryTarget()
    copies = tmp_path / "copies"
    copies.mkdir()
    for number in range(3):
        write(fleet.path("disk"), number * MIB, b"change" * 9999)
        with hooks() as loaded:
            settings = Settings(compression=compression, verify=True)
            point = run_backup(fleet.requests(), target, hooks=loaded, settings=settings)
        assert levels(point) == [Level.INCREMENTAL if number else Level.FULL]
        for name, content in target.blobs.items():
            (copies / name).write_bytes(content)
        assert digest_of(copies / member(point, "disk").file) == digest_of(fleet.path("disk"))
        assert len(target.blobs[member(point, "disk").file]) == member(point, "disk").file_size
    assert not list(fleet.root.glob(".*journal*"))


@pytest.mark.parametrize("where", ["put", "publish"])
def test_a_target_that_fails_leaves_everything_as_it_was(fleet: Fleet, where: str) -> None:
    target = MemoryTarget()

    def fail(call: str, name: str) -> None:
        if call == where and not name.startswith("repository"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    with hooks() as loaded:
        run_backup(fleet.requests(), target, hooks=loaded)
        write(fleet.path("disk"), 2 * MIB, b"change")
        before = sorted(target.blobs), fleet.own_bitmaps("disk")
        target.fails = fail
        with pytest.raises(OSError, match="No space"):
            run_backup(fleet.requests(), target, hooks=loaded)
        assert (sorted(target.blobs), fleet.own_bitmaps("disk")) == before
        target.fails = lambda call, name: None
        assert levels(run_backup(fleet.requests(), target, hooks=loaded)) == [Level.INCREMENTAL]


def test_an_answer_that_is_lost_after_publishing_is_no_failure(fleet: Fleet) -> None:
    def lose(call: str, name: str) -> None:
        if call == "published":
            raise ConnectionResetError("the answer is lost")

    target = MemoryTarget()
    with hooks() as loaded:
        Repository.open_or_create(target)
        target.fails = lose
        made = [run_backup(fleet.requests(), target, hooks=loaded) for _ in range(2)]
    assert levels(*made) == [Level.FULL, Level.INCREMENTAL]


def test_if_nobody_can_tell_what_was_published_all_stays(fleet: Fleet) -> None:
    """Until somebody can."""
    is_gone = False

    def lose(call: str, name: str) -> None:
        nonlocal is_gone
        is_gone = is_gone or (call == "published" and "point" in name)
        if is_gone:
            raise ConnectionResetError("the network is gone")

    target = MemoryTarget()
    with hooks() as loaded:
        run_backup(fleet.requests(), target, hooks=loaded)
        write(fleet.path("disk"), 2 * MIB, b"change")
        target.fails = lose
        with pytest.raises(BackupError, match="is not known"):
            run_backup(fleet.requests(), target, hooks=loaded)
        assert list(fleet.root.glob(".*journal"))
        target.fails = lambda call, name: None
        assert recover(target, hooks=loaded, disks=fleet.requests()) == "commit"
        assert not list(fleet.root.glob(".*journal"))
        assert levels(*Repository.open(target).points()) == [Level.FULL, Level.INCREMENTAL]
        assert levels(run_backup(fleet.requests(), target, hooks=loaded)) == [Level.INCREMENTAL]


def test_a_plugin_that_fails_after_publishing_is_told_again(fleet: Fleet) -> None:
    told: list[str] = []

    class Catalogue:
        QCOW2_PLUGIN_API = API_LEVEL

        @hookimpl
        def qcow2_backup_commit(self, manifest: Manifest) -> None:
            told.append(manifest.point)
            if len(told) == 1:
                raise RuntimeError("the catalogue is closed")

    first = fleet.back_up(plugins={"catalogue": Catalogue()})
    second = fleet.back_up(plugins={"catalogue": Catalogue()})
    assert told == [first.point, first.point, second.point]
    assert levels(second) == [Level.INCREMENTAL]


def test_an_image_that_cannot_be_settled_is_a_loose_end(fleet: Fleet) -> None:
    fleet.back_up()

    class Holder:
        QCOW2_PLUGIN_API = API_LEVEL

        @hookimpl
        def qcow2_backup_commit(self) -> None:
            held.append(open_image(fleet.path("disk")))  # so nobody can write to it

    held: list[Any] = []
    fleet.back_up()
    with pytest.raises(LooseEndError, match="is made, but"):
        fleet.back_up(plugins={"holder": Holder()})
    held[0].close()
    assert levels(fleet.back_up()) == [Level.INCREMENTAL]
    assert len(fleet.own_bitmaps("disk")) == 2


def test_an_increment_costs_what_has_changed(tmp_path: Path) -> None:
    """1 % of 16 GiB, all of which is mapped."""
    fleet = Fleet(tmp_path, ["disk"])
    size, cluster = 16 << 30, 65536
    create_image(fleet.path("disk"), size, preallocation="metadata")
    places = random.Random(0).sample(range(size // cluster), size // cluster // 100)
    with hooks() as loaded:
        target = DirectoryTarget(fleet.repository)
        run_backup(fleet.requests(), target, hooks=loaded, settings=Settings(digest=False))
        with open_image(fleet.path("disk"), writable=True) as image:
            for place in places:
                image.pwrite(place.to_bytes(8, "big") * (cluster // 8), place * cluster)
        before = _read_by_this_process()
        point = run_backup(fleet.requests(), target, hooks=loaded, settings=Settings(digest=False))
    read, dirty = _read_by_this_process() - before, len(places) * cluster
    print(f"{dirty} bytes dirty, {read} read, member of {member(point, 'disk').file_size}")
    assert levels(point) == [Level.INCREMENTAL]
    assert dirty <= read < 1.05 * dirty


def _read_by_this_process() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def run_qcow2(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qcow2_plugin", *map(str, words), "--no-plugins"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command(fleet: Fleet) -> None:
    image, place = fleet.path("disk"), fleet.repository
    made = run_qcow2("backup", image, "--to", place, "--output=json", "--label", "why=test", "--progress=json")
    assert made.returncode == 0, made.stderr
    first = json.loads(made.stdout)
    assert (first["members"][0]["level"], first["labels"]) == ("full", {"why": "test"})
    assert json.loads(made.stderr.splitlines()[-1])["disk"] == "disk"
    dry = run_qcow2("backup", image, "--to", place, "--dry-run", "--output=json")
    assert (dry.returncode, json.loads(dry.stdout)[0]["base"]) == (0, first["point"])
    human = run_qcow2("backup", f"disk={image}", "--to", place, "-c", "--verify")
    assert human.returncode == 0 and "incremental" in human.stdout
    assert run_qcow2("backup", image, "--to", place, "--recover").stdout == "no backup was interrupted\n"


def test_the_command_says_what_went_wrong(fleet: Fleet, tmp_path: Path) -> None:
    place = fleet.repository
    with open_image(fleet.path("disk"), writable=True):
        locked = run_qcow2("backup", fleet.path("disk"), "--to", place)
    assert locked.returncode == 1 and len(locked.stderr.splitlines()) == 1
    assert run_qcow2("backup", tmp_path / "none.qcow2", "--to", place).returncode == 1
    assert run_qcow2("backup", fleet.path("disk"), "--to", place, "--compression-type=zstd").returncode == 2
    twice = run_qcow2("backup", fleet.path("disk"), f"other={fleet.path('disk')}", "--to", place)
    assert twice.returncode == 1 and "twice" in twice.stderr


def plugin(tmp_path: Path, body: str) -> Path:
    """A file with these hooks."""
    path = tmp_path / "plugin_of_test.py"
    head = "import os, signal\nfrom qcow2_plugin.adapters.backup.hookspecs import hookimpl\nQCOW2_PLUGIN_API = 1\n"
    path.write_text(head + body)
    return path


def test_the_command_is_told_to_end(fleet: Fleet, tmp_path: Path) -> None:
    fleet.back_up()
    before = sorted(os.listdir(fleet.repository)), fleet.own_bitmaps("disk")
    ending = plugin(
        tmp_path,
        """
from qcow2_plugin.adapters.backup.targets.directory import DirectoryTarget
class Target(DirectoryTarget):
    def put_file(self, name, path):
        os.kill(os.getpid(), signal.SIGTERM)
        super().put_file(name, path)
@hookimpl
def qcow2_open_target(uri):
    return Target(uri)
""",
    )
    ended = run_qcow2("backup", fleet.path("disk"), "--to", fleet.repository, "--plugin", ending)
    assert ended.returncode == 128 + signal.SIGTERM
    assert (sorted(os.listdir(fleet.repository)), fleet.own_bitmaps("disk")) == before
    assert not list(fleet.root.glob(".*journal*"))


@pytest.mark.parametrize("hook", ["begin", "plan", "prepare"])
def test_the_command_is_told_to_end_inside_a_hook(fleet: Fleet, tmp_path: Path, hook: str) -> None:
    fleet.back_up()
    before = sorted(os.listdir(fleet.repository)), fleet.own_bitmaps("disk")
    body = f"@hookimpl\ndef qcow2_backup_{hook}(job):\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    ending = plugin(tmp_path, body)
    ended = run_qcow2("backup", fleet.path("disk"), "--to", fleet.repository, "--plugin", ending)
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    assert (sorted(os.listdir(fleet.repository)), fleet.own_bitmaps("disk")) == before


def test_the_command_tells_of_a_loose_end(fleet: Fleet, tmp_path: Path) -> None:
    fleet.back_up()
    fleet.back_up()
    holding = plugin(
        tmp_path,
        """
from qcow2_plugin import open_image
held = []
@hookimpl
def qcow2_backup_commit(job):
    held.append(open_image(job.disks[0].path))
""",
    )
    ended = run_qcow2("backup", fleet.path("disk"), "--to", fleet.repository, "--plugin", holding)
    assert (ended.returncode, "is made, but" in ended.stderr) == (3, True)
    assert len(_points(fleet)) == 3
    assert run_qcow2("backup", fleet.path("disk"), "--to", fleet.repository, "--recover").returncode == 0
    assert len(fleet.own_bitmaps("disk")) == 2


def test_plugins_are_told_of_all_that_is_written(fleet: Fleet) -> None:
    batches: list[Batch] = []

    class Meter:
        QCOW2_PLUGIN_API = API_LEVEL

        @hookimpl
        def qcow2_batch_written(self, batch: Batch) -> None:
            batches.append(batch)

    fleet.back_up(plugins={"meter": Meter()})
    assert [batch.guest_offset for batch in batches] == [0, *(each.guest_offset + each.length for each in batches[:-1])]
    assert sum(batch.length for batch in batches) == SIZE
    with open_image(fleet.path("disk")) as image:
        stored = sum(extent.length for extent in image.extents() if extent.kind is ExtentKind.DATA)
    assert sum(batch.stored for batch in batches) == stored


def test_images_in_several_directories_are_of_one_moment(tmp_path: Path) -> None:
    """And a kill between them is recovered from the journal beside the first."""
    fleet = Fleet(tmp_path, ["one/a", "two/b"])
    for disk in fleet.disks:
        fleet.path(disk).parent.mkdir()
        create_image(fleet.path(disk), SIZE)
    requests = [DiskRequest(disk=disk[-1], path=str(fleet.path(disk))) for disk in fleet.disks]
    target = DirectoryTarget(fleet.repository)

    def back_up() -> Manifest:
        with hooks() as loaded:
            return run_backup(requests, target, hooks=loaded)

    back_up()
    for step in range(10, 34):
        for disk in fleet.disks:
            write(fleet.path(disk), step * 32768, b"change")
        killed_at(step, back_up)
        with hooks() as loaded:
            recover(target, hooks=loaded, disks=requests)  # so that they can be written to
    for each in back_up().members:
        assert each.level is Level.INCREMENTAL
        qemu_img("compare", f"{tmp_path}/{'one' if each.disk == 'a' else 'two'}/{each.disk}.qcow2",
                 fleet.repository / each.file)  # fmt: skip
