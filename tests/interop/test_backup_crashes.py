"""A backup that is killed, at every step and by every failure: afterwards the chain is right, and the next one is."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from qcow2_plugin import bitmap_health, create_image
from qcow2_plugin.adapters.backup.hookspecs import API_LEVEL, hookimpl
from qcow2_plugin.adapters.backup.job import recover, run_backup
from qcow2_plugin.adapters.backup.model import Level
from qcow2_plugin.adapters.backup.planning import Settings
from qcow2_plugin.adapters.backup.targets.directory import DirectoryTarget
from tests.support.backups import Fleet, hooks, in_child, killed_at, member, write
from tests.support.tools import qemu_img

SIZE = 2 << 20


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    """Two disks with two points, and changes since."""
    fleet = Fleet(tmp_path, ["a", "b"])
    for number, disk in enumerate(fleet.disks):
        create_image(fleet.path(disk), SIZE)
        write(fleet.path(disk), 65536 * number, b"first" * 20000)
    fleet.back_up()
    for disk in fleet.disks:
        write(fleet.path(disk), 500000, b"second" * 10000)
    fleet.back_up()
    write(fleet.path("a"), 70000, b"third" * 20000)
    write(fleet.path("b"), 1 << 20, b"third" * 20000)
    return fleet


def copied(fleet: Fleet, to: Path) -> Fleet:
    shutil.copytree(fleet.root, to, ignore=shutil.ignore_patterns("copies"))
    for journal in to.glob(".*.journal"):
        journal.write_text(journal.read_text().replace(str(fleet.root), str(to)))
    copy = Fleet(to, fleet.disks)
    copy.expected = dict(fleet.expected)
    return copy


def run(fleet: Fleet) -> None:
    with hooks() as loaded:
        run_backup(fleet.requests(), DirectoryTarget(fleet.repository), hooks=loaded)


def recover_it(fleet: Fleet) -> None:
    with hooks() as loaded:
        recover(DirectoryTarget(fleet.repository), hooks=loaded, disks=fleet.requests())


def go_on(fleet: Fleet) -> None:
    """What was killed is over, and the next backup is a small one. The disks are as they were at the kill."""
    with hooks() as loaded:
        point = run_backup(fleet.requests(), DirectoryTarget(fleet.repository), hooks=loaded)
    assert [each.level for each in point.members] == [Level.INCREMENTAL] * 2
    for made in published(fleet) - set(fleet.expected):
        for disk in fleet.disks:
            qemu_img("compare", "-q", fleet.path(disk), fleet.repository / f"{made}.{disk}.qcow2")
        fleet.expected[made] = dict.fromkeys(fleet.disks, "compared")
    fleet.check_members(point.point)
    fleet.check_names()
    fleet.check_images()
    for disk in fleet.disks:
        states = [(each.enabled, each.needs_full) for each in bitmap_health(fleet.path(disk))]
        assert states == [(False, False), (True, False)]
    assert not [name for name in os.listdir(fleet.root) if "journal" in name or "transaction" in name]


def test_killed_at_every_step(fleet: Fleet, tmp_path: Path) -> None:
    step = 0
    is_killed = True
    while is_killed:
        here = copied(fleet, tmp_path / "copies" / str(step))
        is_killed = killed_at(step, partial(run, here))
        go_on(here)
        shutil.rmtree(here.root)
        step += 1
    assert step > 40


def test_recovery_is_killed_at_every_step(fleet: Fleet, tmp_path: Path) -> None:
    """After a kill in the middle of writing, and after one right after publishing."""

    for first in _two_kinds(fleet, tmp_path):
        step, is_killed = 0, True
        while is_killed:
            here = copied(first, tmp_path / "copies" / f"{first.root.name}-{step}")
            is_killed = killed_at(step, partial(recover_it, here))
            go_on(here)
            shutil.rmtree(here.root)
            step += 1
        assert step > 5


class Killer:
    """A plugin that kills its process in one of the hooks."""

    QCOW2_PLUGIN_API = API_LEVEL

    def __init__(self, hook: str) -> None:
        self._hook = hook

    def _reach(self, hook: str) -> None:
        if hook == self._hook:
            os.kill(os.getpid(), signal.SIGKILL)

    @hookimpl
    def qcow2_backup_begin(self) -> None:
        self._reach("begin")

    @hookimpl
    def qcow2_select_base(self) -> None:
        self._reach("select")

    @hookimpl
    def qcow2_backup_plan(self) -> None:
        self._reach("plan")

    @hookimpl
    def qcow2_backup_prepare(self) -> None:
        self._reach("prepare")

    @hookimpl
    def qcow2_backup_commit(self) -> None:
        self._reach("commit")


def _two_kinds(fleet: Fleet, tmp_path: Path) -> Iterator[Fleet]:
    for hook in ("prepare", "commit"):
        here = copied(fleet, tmp_path / "copies" / hook)
        assert killed_in(hook, here)
        yield here


def killed_in(hook: str, fleet: Fleet) -> bool:
    def work() -> None:
        with hooks({"killer": Killer(hook)}) as loaded:
            run_backup(fleet.requests(), DirectoryTarget(fleet.repository), hooks=loaded)

    return in_child(work) == -signal.SIGKILL


@pytest.mark.parametrize("hook", ["begin", "select", "plan", "prepare", "commit"])
@pytest.mark.parametrize("journal", ["kept", "lost"])
def test_killed_in_a_plugin(fleet: Fleet, hook: str, journal: str) -> None:
    assert killed_in(hook, fleet)
    (left,) = (name for name in os.listdir(fleet.root) if name.endswith(".journal"))
    if journal == "lost":
        os.unlink(fleet.root / left)
        for name in os.listdir(fleet.repository):  # what the journal alone leads to
            if name.startswith("2") and name.split(".")[0] not in fleet.expected and hook != "commit":
                os.unlink(fleet.repository / name)
    go_on(fleet)


def test_a_kill_and_then_a_backup_of_one_disk_only(fleet: Fleet) -> None:
    assert killed_in("prepare", fleet)
    point = fleet.back_up(disks=["b"])
    assert member(point, "b").level is Level.INCREMENTAL
    point = fleet.back_up()
    assert [each.level for each in point.members] == [Level.INCREMENTAL] * 2
    fleet.check_all()


def test_an_image_that_is_gone_does_not_stand_in_the_way(fleet: Fleet) -> None:
    for step in range(8, 40, 3):
        killed_at(step, partial(run, fleet))
        if list(fleet.root.glob("*.bitmaps")):
            break
    os.unlink(fleet.path("b"))
    fleet.disks.remove("b")
    assert member(fleet.back_up(), "a").level is Level.INCREMENTAL
    fleet.back_up()


def test_a_full_one_that_is_killed_loses_nothing(fleet: Fleet) -> None:
    def work() -> None:
        with hooks({"killer": Killer("prepare")}) as loaded:
            full = Settings(level=Level.FULL)
            run_backup(fleet.requests(), DirectoryTarget(fleet.repository), hooks=loaded, settings=full)

    assert in_child(work) == -signal.SIGKILL
    go_on(fleet)


@pytest.mark.parametrize("hook", ["begin", "plan", "commit"])
def test_a_write_behind_the_image_is_seen_before_recovery_hides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    monkeypatch.chdir(tmp_path)  # where QEMU looks for a data file
    fleet = Fleet(tmp_path, ["a"])
    create_image(fleet.path("a"), SIZE, data_file="a.raw", data_file_raw=True)
    write(fleet.path("a"), 0, b"data" * 10000)
    fleet.back_up()
    write(fleet.path("a"), 100000, b"data" * 10000)
    held = fleet.digests()
    assert killed_in(hook, fleet)
    for point in published(fleet) - set(fleet.expected):
        fleet.expected[point] = held
    time.sleep(0.02)  # what a clock of files can tell apart
    with open(tmp_path / "a.raw", "r+b") as raw:
        raw.seek(SIZE // 2)
        raw.write(b"behind")
    assert member(fleet.back_up(Settings(sample=0)), "a").level is Level.FULL
    fleet.check_all()


def test_killed_at_random_times(fleet: Fleet) -> None:
    """Again and again, without a successful one in between."""
    chance = random.Random(1)
    killed = 0
    for number in range(15):
        write(fleet.path("a"), 65536 * number, bytes([number]) * 70000)
        held, before = fleet.digests(), published(fleet)
        child = os.fork()
        if not child:
            try:
                run(fleet)
            finally:
                os._exit(0)
        time.sleep(chance.random() * 0.15)
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
        for point in published(fleet) - before:
            fleet.expected[point] = held
    assert killed > 3
    last = fleet.back_up()
    assert [each.level for each in last.members] == [Level.INCREMENTAL] * 2
    fleet.check_all()
    fleet.check_images()


def published(fleet: Fleet) -> set[str]:
    return {name.split(".")[0] for name in os.listdir(fleet.repository) if name.endswith(".point.json")}
