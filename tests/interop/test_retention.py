"""Points that go, and points that stay: with qemu-img alone, whatever was merged, and wherever it was interrupted."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.adapters.backup import merge as merging
from qcow2_plugin.adapters.backup import names, retention
from qcow2_plugin.adapters.backup.repository import Repository, lead_to_merged
from qcow2_plugin.adapters.backup.restore import Request, restore
from qcow2_plugin.adapters.backup.retention import Rules, plan, prune
from qcow2_plugin.adapters.backup.targets.directory import DirectoryTarget
from qcow2_plugin.adapters.backup.verify import verify
from qcow2_plugin.errors import ManifestError, OptionError
from qcow2_plugin.operations.file_digest import file_digest
from tests.support.backup_chains import ElsewhereTarget, History, add_point, changed, history
from tests.support.command import qcow2, qcow2_json

DISKS = ("root", "data-1")


def kept(made: History, rules: Rules, **options: Any) -> list[int]:
    """The numbers of the points that stay."""
    return [number for number, fate in enumerate(plan(made.again(), rules, **options), 1) if fate.is_kept]


def assert_all_there(made: History, points: Iterable[str]) -> None:
    """These points are those that there are, and whole for qemu-img and for us."""
    repository = made.again()
    assert [each.point for each in repository.points()] == list(points)
    for point in points:
        for disk in DISKS:
            made.assert_holds(point, disk)
    assert verify(repository, level=2).findings == []


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> History:
    """Nobody changes it."""
    return history(tmp_path_factory.mktemp("long"), ["root"], "fiiiiiifii")


def test_rules(long: History) -> None:
    assert kept(long, Rules(last=3)) == [8, 9, 10]
    assert kept(long, Rules(last=99)) == list(range(1, 11))
    assert kept(long, Rules(daily=4)) == [7, 8, 9, 10]
    assert kept(long, Rules(weekly=2)) == [3, 10]  # 2025-10-12 was a Sunday, and the tenth point is of the 19th
    assert kept(long, Rules(monthly=5)) == [10]
    assert kept(long, Rules(yearly=1, last=2)) == [9, 10]
    assert kept(long, Rules(weekly=2), may_merge=False) == [1, 2, 3, 8, 9, 10]
    for rules in (Rules(), Rules(last=-1)):
        with pytest.raises(OptionError):
            plan(long.again(), rules)


def test_what_another_is_built_on_stays(tmp_path: Path) -> None:
    made = history(tmp_path, ["root"], "fi")
    assert made.repository.dependents(made.points[0]) == [made.points[1]]
    with pytest.raises(ManifestError, match="must stay"):
        made.repository.remove(made.points[0])
    made.assert_holds(made.points[1], "root")


def test_rules_count_the_points_of_one_job(tmp_path: Path) -> None:
    """Disks that are backed up together count together, whatever others do."""
    made = history(tmp_path, ["root"], "fi")
    add_point(made, ["data-1"], random.Random(1), is_full=True, compressed=False, size=1 << 20)
    add_point(made, DISKS, random.Random(1), is_full=True, compressed=False, size=1 << 20)
    add_point(made, ["root"], random.Random(1), is_full=True, compressed=False, size=1 << 20)
    assert kept(made, Rules(yearly=1)) == [3, 4, 5]
    assert kept(made, Rules(last=2)) == [2, 3, 4, 5]


@pytest.mark.parametrize("compressed", [True, False])
def test_pruning_step_by_step(tmp_path: Path, compressed: bool) -> None:
    made = history(tmp_path, DISKS, "fiifii", compressed=compressed)
    for count in (5, 2, 1):
        repository = made.again()
        prune(repository, plan(repository, Rules(last=count)))
        assert_all_there(made, made.points[-count:])
        assert made.again().leftovers() == []
    stays = made.points[-1]
    wanted = {names.REPOSITORY_FILE, names.manifest_name(stays, 1)}
    wanted |= {names.leaves_name(stays, disk) for disk in DISKS}
    wanted |= {names.member_name(stays, disk, revision) for disk in DISKS for revision in (0, 1)}
    assert set(os.listdir(made.directory)) == wanted
    assert all(member.parent_point is None for member in made.again().points()[0].members)
    assert {path.stat().st_mode & 0o777 for path in made.directory.glob("*.qcow2")} == {0o600}


def test_a_middle_point_goes(tmp_path: Path) -> None:
    """What is above is merged with it, and still builds on what is below."""
    made = history(tmp_path, DISKS, "fiii")
    fates = plan(made.again(), Rules(last=4))
    fates[1] = retention.Fate(point=made.points[1], reasons=(), bases={})
    fates[2] = retention.Fate(point=made.points[2], reasons=("last",), bases=dict.fromkeys(DISKS, made.points[0]))
    prune(made.again(), fates)
    assert_all_there(made, [made.points[0], *made.points[2:]])
    assert [len(made.again().chain(made.points[3], disk)) for disk in DISKS] == [3, 3]
    prune(made.again(), plan(made.again(), Rules(last=1)))
    assert_all_there(made, made.points[3:])


def test_elsewhere_members_are_fetched_to_be_merged(tmp_path: Path) -> None:
    made = history(tmp_path / "made", DISKS, "fiii")
    repository = Repository.open(ElsewhereTarget(made.directory))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    prune(repository, plan(repository, Rules(last=2)), scratch=str(scratch))
    assert os.listdir(scratch) == []
    assert verify(repository, level=2).findings == []
    for point in made.points[2:]:
        for disk in DISKS:
            raw = tmp_path / f"{point}.{disk}"
            restore(repository, point, disk, Request(to=str(raw), form="raw", verify=True))
            assert raw.read_bytes() == made.raw(point, disk).read_bytes()
    assert {name for name in repository.target.names() if ".r1." in name} == {
        names.manifest_name(made.points[2], 1),
        *(names.member_name(made.points[2], disk, 1) for disk in DISKS),
    }
    assert not set(repository.target.names()) & {names.member_name(made.points[2], disk) for disk in DISKS}


class KilledError(BaseException):
    """The process is no more."""


class MortalTarget(DirectoryTarget):
    """A directory that is the last thing somebody sees after some steps."""

    def __init__(self, directory: Path, steps: int) -> None:
        super().__init__(directory)
        self.steps = steps

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise KilledError

    def put_file(self, name: str, path: str) -> None:
        self.step()
        super().put_file(name, path)
        self.step()

    def publish(self, name: str, content: bytes) -> None:
        self.step()
        super().publish(name, content)
        self.step()

    def remove(self, name: str) -> None:
        self.step()
        super().remove(name)


@pytest.mark.parametrize(("levels", "last"), [("fiii", 2), ("fii", 1)])
def test_interrupted_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: str, last: int) -> None:
    """Whatever was done, each point that is there is whole, and the next run brings it to the same end."""
    whole = history(tmp_path / "whole", DISKS, levels, compressed=False, size=1 << 20)
    link = lead_to_merged
    steps = -1
    while True:
        steps += 1
        made = replace(whole, directory=tmp_path / str(steps))
        shutil.copytree(whole.directory, made.directory)
        target = MortalTarget(made.directory, steps)

        def mortal_link(directory: str, member: Any, target: MortalTarget = target) -> None:
            target.step()
            link(directory, member)

        monkeypatch.setattr(merging, "lead_to_merged", mortal_link)
        repository = Repository.open(target)
        try:
            prune(repository, plan(repository, Rules(last=last)))
        except KilledError:
            pass
        else:
            break
        finally:
            monkeypatch.setattr(merging, "lead_to_merged", link)
        there = [each.point for each in made.again().points()]
        assert there[-last:] == made.points[-last:]
        for point in there:  # for qemu-img first: nobody of ours has looked, and put anything right
            for disk in DISKS:
                made.assert_holds(point, disk)
        assert verify(made.again(), level=2).findings == []
        repository = made.again()
        prune(repository, plan(repository, Rules(last=last)))
        assert_all_there(made, made.points[-last:])
        assert made.again().leftovers() == []
    assert steps > 12


def test_what_may_belong_to_a_running_backup_stays(tmp_path: Path) -> None:
    made = history(tmp_path, ["root"], "fi")
    new = made.directory / names.member_name(names.point_id(1_795_612_500, 3), "root")
    old = made.directory / names.member_name(names.point_id(1_700_000_000, 1), "gone")
    foreign = made.directory / "notes.txt"
    for path in (new, old, foreign):
        path.write_bytes(b"x")
    assert set(made.again().leftovers()) == {new.name, old.name}
    removed = prune(made.again(), plan(made.again(), Rules(last=2)))
    assert removed == [old.name]
    assert new.exists() and foreign.exists()


def test_a_manifest_that_cannot_be_read_stops_everything(tmp_path: Path) -> None:
    made = history(tmp_path, ["root"], "fif")
    path = made.directory / names.manifest_name(made.points[1])
    path.write_bytes(b"{}")
    assert made.again().leftovers() == []
    before = sorted(os.listdir(made.directory))
    with pytest.raises(ManifestError, match="nothing is removed"):
        plan(made.again(), Rules(last=1))
    with pytest.raises(ManifestError, match="must stay"):
        made.again().remove(made.points[0])
    assert sorted(os.listdir(made.directory)) == before
    ended = qcow2("points", "--no-plugins", made.directory)
    assert (ended.status, made.points[1] in ended.stderr) == (1, True)


def test_a_damaged_chain_is_not_merged(tmp_path: Path) -> None:
    made = history(tmp_path, ["root"], "fi")
    path = made.directory / names.member_name(made.points[0], "root")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    before = sorted(os.listdir(made.directory))
    with pytest.raises(ManifestError, match="digest"):
        prune(made.again(), plan(made.again(), Rules(last=1)))
    assert sorted(os.listdir(made.directory)) == before


def test_a_parent_without_the_disk_is_no_parent(tmp_path: Path) -> None:
    made = history(tmp_path, ["root"], "fii")
    changed(
        made,
        made.points[1],
        disk="other",
        file=names.member_name(made.points[1], "other"),
        parent_file=names.member_name(made.points[0], "other"),
        leaves_file=None,
    )
    add_point(made, ["other"], random.Random(1), is_full=True, compressed=False, size=1 << 20)
    before = sorted(os.listdir(made.directory))
    with pytest.raises(ManifestError, match="no disk root"):
        prune(made.again(), plan(made.again(), Rules(last=1)))
    assert sorted(os.listdir(made.directory)) == before


def test_no_second_names_no_merging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = history(tmp_path, ["root"], "fi")

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    before = sorted(os.listdir(made.directory))
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OptionError, match="--no-merge"):
        prune(made.again(), plan(made.again(), Rules(last=1)))
    assert sorted(os.listdir(made.directory)) == before


def test_where_nothing_can_be_made_right_it_is_read_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash has left the old name, and the directory is read-only now."""
    made = history(tmp_path, ["root"], "fii")

    def keep(*_: object) -> None:
        """What comes after the publishing is left out, as by a kill."""

    monkeypatch.setattr(merging, "lead_to_merged", keep)
    monkeypatch.setattr(merging, "settle", keep)
    merging.merge(made.again(), made.points[1], {"root": None})
    monkeypatch.undo()

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "link", refuse)
    assert verify(made.again(), level=2).findings == []


def test_the_command(tmp_path: Path) -> None:
    made = history(tmp_path, DISKS, "fiif")
    before = sorted(os.listdir(made.directory))
    words = ("--no-plugins", made.directory, "--keep-last=2")
    told = qcow2_json("prune", *words, "--dry-run")
    assert [(fate["point"], fate["is_kept"]) for fate in told] == list(
        zip(made.points, (False, False, True, True), strict=True)
    )
    assert sorted(os.listdir(made.directory)) == before
    assert qcow2("prune", "--no-plugins", made.directory).status == 1
    assert sorted(os.listdir(made.directory)) == before
    assert qcow2("prune", *words).status == 0
    assert_all_there(made, made.points[2:])


def test_a_manifest_that_is_missing_stops_everything(tmp_path: Path) -> None:
    """What is built on that point is still a disk for any tool, as long as the files are there."""
    made = history(tmp_path, ["root"], "fiif")
    (made.directory / names.manifest_name(made.points[0])).unlink()
    with pytest.raises(ManifestError, match="nothing is removed"):
        plan(made.again(), Rules(last=1))
    prune(made.again(), [])
    made.assert_holds(made.points[2], "root")


def test_two_that_merge_the_same_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is about to keep a merged member, another has published his, which is built on another point."""
    made = history(tmp_path, ["root"], "fiii", size=1 << 20)
    far = Repository.open(ElsewhereTarget(made.directory))
    slower, faster = ({"root": None}, {"root": made.points[0]})

    def overtaken(path: str) -> tuple[str, int]:
        monkeypatch.setattr(merging, "file_digest", file_digest)
        merging.merge(Repository.open(ElsewhereTarget(made.directory)), made.points[3], faster)
        return file_digest(path)

    monkeypatch.setattr(merging, "file_digest", overtaken)
    with pytest.raises(ManifestError, match="meanwhile"):
        merging.merge(far, made.points[3], slower)
    assert verify(Repository.open(ElsewhereTarget(made.directory)), level=2).findings == []
