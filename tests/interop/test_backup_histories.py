"""Random histories of several disks: whatever happens to them and to their backups, every point restores.

Each kind of disk has its own ways of changing. What must not be noticed by luck is noticed always: after a write behind
the image's back, a lost bitmap, a disk that shrank, the next member is full, and says why.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin import apply_snapshot, create_image, create_snapshot, delete_snapshot, open_image, resize
from qcow2_plugin.adapters.backup.job import run_backup
from qcow2_plugin.adapters.backup.model import Level
from qcow2_plugin.adapters.backup.planning import Settings
from qcow2_plugin.adapters.backup.targets.directory import DirectoryTarget
from tests.support.backups import Fleet, hooks, in_child, killed_at
from tests.support.tools import qemu_img, qemu_io

SIZE = 3 << 20
STEPS = 150
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small-clusters": {"cluster_size": 4096},
    "raw-data": {"data_file": "raw-data.raw", "data_file_raw": True},
    "overlay": {"backing_file": "base.raw", "backing_format": "raw", "extended_l2": True},
}


class FailingTarget(DirectoryTarget):
    """Fails at its `countdown`-th call, in the middle of a chunk where there are some."""

    def __init__(self, path: Path, countdown: int) -> None:
        super().__init__(path)
        self._countdown = countdown

    def _count(self) -> None:
        self._countdown -= 1
        if self._countdown == 0:
            raise OSError(5, "the network is gone")

    def put(self, name: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        self._count()
        super().put(name, chunks, size)

    def put_file(self, name: str, path: str) -> None:
        self._count()
        super().put_file(name, path)

    def publish(self, name: str, content: bytes) -> None:
        self._count()
        super().publish(name, content)
        self._count()


class History:
    """One random life."""

    def __init__(self, root: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.root = root
        (root / "base.raw").write_bytes(self.random.randbytes(SIZE))
        self.fleet = Fleet(root, [])
        self.must_be_full: set[str] = set()
        self.log: list[str] = []
        for kind in KINDS:
            self.make(kind)

    def make(self, kind: str) -> None:
        path = self.fleet.path(kind)
        for file in (path, path.with_suffix(".raw")):
            file.unlink(missing_ok=True)
        create_image(path, SIZE, **KINDS[kind])
        if kind not in self.fleet.disks:
            self.fleet.disks.append(kind)
        self.must_be_full.add(kind)

    def step(self) -> None:
        changes: dict[Callable[[str], None], int] = {
            self.write: 30, self.write_by_qemu: 10, self.zero: 10, self.discard: 10, self.grow: 3, self.shrink: 2,
            self.shrink_and_grow: 2, self.snapshot: 3, self.lose_bitmaps: 2, self.crash_of_a_writer: 2,
            self.write_behind: 2, self.make: 1,
        }  # fmt: skip
        jobs: dict[Callable[[], None], int] = {self.back_up: 20, self.fail: 5, self.crash: 5}
        if self.random.random() < 0.3:
            (job,) = self.random.choices(list(jobs), list(jobs.values()))
            self.log.append(job.__name__)
            job()
        else:
            (change,) = self.random.choices(list(changes), list(changes.values()))
            disk = self.random.choice(self.fleet.disks)
            self.log.append(f"{change.__name__} {disk}")
            change(disk)

    # -- what happens to a disk --

    def place(self, disk: str) -> tuple[int, int]:
        with open_image(self.fleet.path(disk)) as image:
            size = image.virtual_size
        length = min(self.random.choice((512, 4096, 5000, 65536, 300000)), size)
        offset = self.random.randrange(0, size - length + 1)
        return (offset // 512 * 512, max(length // 512 * 512, 512)) if self.random.random() < 0.8 else (offset, length)

    def write(self, disk: str) -> None:
        offset, length = self.place(disk)
        with open_image(self.fleet.path(disk), writable=True) as image:
            image.pwrite(self.random.randbytes(length), offset)

    def write_by_qemu(self, disk: str) -> None:
        offset, length = self.place(disk)
        qemu_io(
            self.fleet.path(disk), f"write -P {self.random.randrange(256)} {offset // 512 * 512} {length // 512 * 512}"
        )

    def zero(self, disk: str) -> None:
        offset, length = self.place(disk)
        with open_image(self.fleet.path(disk), writable=True) as image:
            image.write_zeroes(offset, length, may_unmap=self.random.random() < 0.5)

    def discard(self, disk: str) -> None:
        offset, length = self.place(disk)
        with open_image(self.fleet.path(disk), writable=True) as image:
            image.discard(offset, length)

    def grow(self, disk: str) -> None:
        by = self.random.choice((512, 65536, 200704))
        with suppress(Exception):  # a disk with snapshots may not
            resize(self.fleet.path(disk), by, is_relative=True)

    def shrink(self, disk: str) -> None:
        with open_image(self.fleet.path(disk)) as image:
            size = image.virtual_size
        if size > SIZE // 2 and disk != "raw-data":
            with suppress(Exception):
                resize(self.fleet.path(disk), size - 66048, allow_shrink=True)

    def shrink_and_grow(self, disk: str) -> None:
        """No bitmap tells of what is lost."""
        with open_image(self.fleet.path(disk)) as image:
            size = image.virtual_size
        if size > SIZE // 2 and disk != "raw-data":
            with suppress(Exception):
                resize(self.fleet.path(disk), size - 300032, allow_shrink=True)
                resize(self.fleet.path(disk), size)

    def snapshot(self, disk: str) -> None:
        if disk == "raw-data":
            return
        path, name = self.fleet.path(disk), str(self.random.randrange(3))
        with suppress(Exception):
            if self.random.random() < 0.4:
                create_snapshot(path, name)
            elif self.random.random() < 0.7:
                apply_snapshot(path, name, mark_bitmaps=True)
            else:
                delete_snapshot(path, name)

    def lose_bitmaps(self, disk: str) -> None:
        for name in self.fleet.own_bitmaps(disk):
            qemu_img("bitmap", "--remove", self.fleet.path(disk), name)
        self.must_be_full.add(disk)

    def crash_of_a_writer(self, disk: str) -> None:
        """Its bitmaps stay marked as in use."""

        def work() -> None:
            image = open_image(self.fleet.path(disk), writable=True)
            image.pwrite(b"crash" * 100, 4096)
            image.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        assert in_child(work) == -signal.SIGKILL
        qemu_img("check", "-q", "-r", "all", self.fleet.path(disk))
        self.must_be_full.add(disk)

    def write_behind(self, disk: str) -> None:
        if disk != "raw-data":
            return
        time.sleep(0.02)  # what a clock of files can tell apart
        with open(self.fleet.path(disk).with_suffix(".raw"), "r+b") as raw:
            raw.seek(self.random.randrange(0, SIZE - 1000))
            raw.write(self.random.randbytes(700))
            os.fsync(raw.fileno())
        self.must_be_full.add(disk)
        if not self.fleet.own_bitmaps(disk):
            return
        with hooks() as loaded, suppress(OSError):  # and a backup that fails does not make it forgotten
            run_backup(self.fleet.requests([disk]), FailingTarget(self.fleet.repository, 1), hooks=loaded)

    # -- backups --

    def settings(self) -> Settings:
        return Settings(
            level=self.random.choice((None, None, None, None, Level.DIFFERENTIAL, Level.FULL)),
            compression=self.random.choice((None, None, "zlib", "zstd")),
            verify=self.random.random() < 0.5,
            max_chain=12,
            sample=4,
        )

    def back_up(self) -> None:
        disks = self.random.sample(self.fleet.disks, self.random.randrange(1, len(self.fleet.disks) + 1))
        settings = self.settings()
        point = self.fleet.back_up(settings, disks=disks)
        for each in point.members:
            if each.disk in self.must_be_full:
                assert each.level is Level.FULL and (each.reason is None) is (settings.level is Level.FULL), each
            self.must_be_full.discard(each.disk)

    def fail(self) -> None:
        target = FailingTarget(self.fleet.repository, self.random.randrange(1, 11))
        before = self.published()
        with hooks() as loaded:
            try:
                point = run_backup(self.fleet.requests(), target, hooks=loaded, settings=self.settings())
            except OSError:
                there = {name.split(".")[0] for name in os.listdir(self.fleet.repository)}
                assert there - {"repository"} == before  # and nothing of what was not made
                return
        self.fleet.expected[point.point] = self.fleet.digests()
        self.must_be_full.clear()

    def crash(self) -> None:
        settings = self.settings()

        def work() -> None:
            with hooks() as loaded:
                run_backup(
                    self.fleet.requests(), DirectoryTarget(self.fleet.repository), hooks=loaded, settings=settings
                )

        before = self.published()
        killed_at(self.random.randrange(90), work)
        for point in self.published() - before:
            self.fleet.expected[point] = self.fleet.digests()
            self.must_be_full.clear()

    def published(self) -> set[str]:
        if not self.fleet.repository.exists():
            return set()
        return {name.split(".")[0] for name in os.listdir(self.fleet.repository) if name.endswith(".point.json")}


@pytest.mark.parametrize("seed", range(2))
def test_every_point_of_a_random_history_restores(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where QEMU looks for a data file
    history = History(tmp_path, seed)
    for _ in range(STEPS):
        try:
            history.step()
        except BaseException as error:
            error.add_note(f"after {history.log}")
            raise
    history.fleet.back_up()
    history.fleet.back_up()
    history.fleet.check_all()
    history.fleet.check_images()
    assert len(history.fleet.expected) > 20
