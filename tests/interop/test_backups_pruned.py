"""Real backups and retention in turn: what is merged is built on, and every point that stays is the disk it was."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path

import pytest

from qcow2_plugin.adapters.backup import names
from qcow2_plugin.adapters.backup.job import run_backup
from qcow2_plugin.adapters.backup.manager import Hooks
from qcow2_plugin.adapters.backup.model import DiskRequest, Level, Manifest
from qcow2_plugin.adapters.backup.planning import Settings
from qcow2_plugin.adapters.backup.repository import Repository
from qcow2_plugin.adapters.backup.retention import Rules, plan, prune
from qcow2_plugin.adapters.backup.targets.directory import DirectoryTarget
from qcow2_plugin.adapters.backup.verify import verify
from tests.support.backup_chains import compare
from tests.support.tools import qemu_img, qemu_io

SIZE = 8 << 20
DISKS = ("root", "data")


def change(rnd: random.Random, path: Path) -> None:
    for _ in range(rnd.randrange(1, 4)):
        offset = rnd.randrange(SIZE // 4096) * 4096
        length = min(rnd.randrange(1, 300) * 4096, SIZE - offset)
        qemu_io(
            path, rnd.choice([f"write -P {rnd.randrange(1, 255)} {offset} {length}", f"write -z {offset} {length}"])
        )


@pytest.mark.parametrize("seed", [1, 2])
def test_backups_go_on_after_points_went(tmp_path: Path, seed: int) -> None:
    rnd = random.Random(seed)
    images = {disk: tmp_path / f"{disk}.qcow2" for disk in DISKS}
    for path in images.values():
        qemu_img("create", "-q", "-f", "qcow2", path, str(SIZE))
    requests = [DiskRequest(disk=disk, path=str(path)) for disk, path in images.items()]
    kept = tmp_path / "kept"
    levels: list[Level] = []
    with closing(DirectoryTarget(kept)) as target, Hooks.load(use_installed=False) as hooks:
        for step in range(8):
            for path in images.values():
                change(rnd, path)
            settings = Settings(
                level=rnd.choice([None, None, Level.DIFFERENTIAL]), compression=rnd.choice([None, "zlib"])
            )
            made = run_backup(requests, target, hooks=hooks, settings=settings)
            levels += [member.level for member in made.members]
            for disk, path in images.items():
                qemu_img("convert", "-f", "qcow2", "-O", "raw", path, tmp_path / f"{made.point}.{disk}.raw")
            if step % 2:
                repository = Repository.open(target)
                prune(repository, plan(repository, Rules(last=rnd.choice([1, 2, 3]))))
            assert_whole(Repository.open(target).points(), kept, tmp_path)
        assert verify(Repository.open(target), level=2).findings == []
        repository = Repository.open(target)
        against = {disk: str(path) for disk, path in images.items()}
        assert verify(repository, ["latest"], level=2, against=against).findings == []
    assert levels.count(Level.FULL) == len(DISKS), "each disk was full once, whatever was merged since"


def assert_whole(points: list[Manifest], kept: Path, raws: Path) -> None:
    """For qemu-img alone."""
    assert points
    for point in points:
        for disk in DISKS:
            assert compare("qcow2", kept / names.member_name(point.point, disk), raws / f"{point.point}.{disk}.raw")
