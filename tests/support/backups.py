"""Disks that live, are backed up, and are held against what qemu-img says they were.

The oracle is qemu-img alone: what a disk holds at a point is what `qemu-img convert` reads of it right before, and a
point is restored by `qemu-img convert` of the member, with what it finds by the names in the files.
"""

from __future__ import annotations

import hashlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qcow2_plugin import open_image
from qcow2_plugin.adapters.backup.job import run_backup
from qcow2_plugin.adapters.backup.manager import Hooks
from qcow2_plugin.adapters.backup.model import DiskRequest, Manifest, Member
from qcow2_plugin.adapters.backup.planning import Settings
from qcow2_plugin.adapters.backup.targets.directory import DirectoryTarget
from tests.support.tools import qemu_img, qemu_img_json

DURABLE_CALLS = ("write", "fsync", "fdatasync", "rename", "replace", "link", "unlink", "ftruncate")


def digest_of(path: Path) -> str:
    """Of the disk, as qemu-img reads it."""
    with tempfile.TemporaryDirectory(prefix="restored-") as directory:
        raw = Path(directory) / "disk.raw"
        qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
        return hashlib.sha256(raw.read_bytes()).hexdigest()


class Fleet:
    """Images in `root`, a repository in `root/repository`, and what each point of it has to restore."""

    def __init__(self, root: Path, disks: Sequence[str]) -> None:
        self.root = root
        self.disks = list(disks)
        self.repository = root / "repository"
        self.expected: dict[str, dict[str, str]] = {}

    def path(self, disk: str) -> Path:
        return self.root / f"{disk}.qcow2"

    def requests(self, disks: Sequence[str] | None = None) -> list[DiskRequest]:
        return [DiskRequest(disk=disk, path=str(self.path(disk))) for disk in disks or self.disks]

    def digests(self) -> dict[str, str]:
        return {disk: digest_of(self.path(disk)) for disk in self.disks}

    def back_up(
        self,
        settings: Settings | None = None,
        *,
        disks: Sequence[str] | None = None,
        target: DirectoryTarget | None = None,
        plugins: dict[str, object] | None = None,
    ) -> Manifest:
        """A point, which restores at once to what the disks hold."""
        with hooks(plugins) as loaded:
            where = target or DirectoryTarget(self.repository)
            point = run_backup(self.requests(disks), where, hooks=loaded, settings=settings)
        held = {each.disk: digest_of(self.path(each.disk)) for each in point.members}
        self.expected[point.point] = held
        self.check_point(point.point)
        return point

    def check_point(self, point: str) -> None:
        """It restores to what the disks were."""
        for disk, digest in self.expected[point].items():
            assert digest_of(self.repository / f"{point}.{disk}.qcow2") == digest, (point, disk)

    def check_all(self) -> None:
        """Every point restores, every member is sound, and nothing else is there."""
        for point in self.expected:
            self.check_point(point)
            self.check_members(point)
        self.check_names()

    def check_names(self) -> None:
        """Nothing is left of what never was."""
        points = {name.split(".")[0] for name in os.listdir(self.repository) if name != "repository.json"}
        assert points == set(self.expected)

    def check_members(self, point: str) -> None:
        """They are sound images."""
        for disk in self.expected[point]:
            found = qemu_img_json("check", self.repository / f"{point}.{disk}.qcow2")
            assert not found.get("corruptions") and not found.get("leaks"), (point, disk, found)

    def check_images(self) -> None:
        """No corruption; a kill may leave leaks."""
        for disk in self.disks:
            qemu_img("check", "-q", "-r", "leaks", self.path(disk))

    def own_bitmaps(self, disk: str) -> list[str]:
        found = qemu_img_json("info", self.path(disk))
        bitmaps = found.get("format-specific", {}).get("data", {}).get("bitmaps", [])
        return sorted(each["name"] for each in bitmaps if each["name"].startswith("qcow2-backup."))


def member(point: Manifest, disk: str) -> Member:
    return next(each for each in point.members if each.disk == disk)


@contextmanager
def hooks(plugins: dict[str, object] | None = None) -> Iterator[Hooks]:
    """Only what is built in, and these."""
    with Hooks.load(use_installed=False, own=plugins or {}, strict=True) as loaded:
        yield loaded


def in_child(work: Callable[[], object]) -> int:
    """Do it in a process of its own; how that ended: 0, 1 for an exception, or the negative number of a signal."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Do it in a process that is killed right before the call number `step` (from 0) that makes something durable or
    changes a name; False if it came to its end before."""

    def run() -> None:
        done = 0

        def counted(call: Callable[..., object]) -> Callable[..., object]:
            def counting(*arguments: object, **named: object) -> object:
                nonlocal done
                if done == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1
                return call(*arguments, **named)

            return counting

        for name in DURABLE_CALLS:
            setattr(os, name, counted(getattr(os, name)))
        work()

    status = in_child(run)
    assert status in (0, -signal.SIGKILL)
    return status != 0


def write(path: Path, offset: int, data: bytes) -> None:
    with open_image(path, writable=True) as image:
        image.pwrite(data, offset)
