"""Repositories of backups whose members qemu-img has made, and what it says that each disk was at each point.

Owns the histories; refuses to know what is done with the repositories.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qcow2_plugin.adapters.backup import manifest as manifests
from qcow2_plugin.adapters.backup import names
from qcow2_plugin.adapters.backup.model import Level, Manifest, Member
from qcow2_plugin.adapters.backup.repository import Repository
from qcow2_plugin.adapters.backup.target import BackupTarget
from qcow2_plugin.adapters.backup.targets.directory import DirectoryTarget
from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.operations.content_digest import content_digest
from qcow2_plugin.operations.file_digest import file_digest
from tests.support.tools import qemu_img

MIB = 1 << 20
CLUSTER = 65536
DAY = 86400
FIRST = 1_760_000_000
"""When the first point is made, in seconds since 1970."""
SAVED: dict[str, Any] = {
    "version": 3,
    "cluster_size": CLUSTER,
    "refcount_bits": 16,
    "lazy_refcounts": False,
    "extended_l2": False,
    "compression_type": "zlib",
    "data_file": None,
    "data_file_raw": False,
}


@dataclass
class History:
    """A repository in `directory`, and raw images of every disk at every point, in another directory."""

    directory: Path
    raws: Path
    repository: Repository
    points: list[str] = field(default_factory=list)

    def raw(self, point: str, disk: str) -> Path:
        """What the disk was."""
        return self.raws / f"{point}.{disk}.raw"

    def assert_holds(self, point: str, disk: str) -> None:
        """qemu-img alone finds the disk in the directory."""
        path = self.directory / names.member_name(point, disk)
        assert compare("qcow2", path, self.raw(point, disk))

    def again(self) -> Repository:
        """The repository as another process would find it."""
        return Repository.open(DirectoryTarget(self.directory))


class ElsewhereTarget(BackupTarget):
    """A directory that nobody can see into, as far away as any other target."""

    def __init__(self, directory: Path) -> None:
        self.uri = "elsewhere:"
        self._there = DirectoryTarget(directory)

    def put(self, name: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        self._there.put(name, chunks, size)

    def publish(self, name: str, content: bytes) -> None:
        self._there.publish(name, content)

    def remove(self, name: str) -> None:
        self._there.remove(name)

    def names(self) -> list[str]:
        return self._there.names()

    def get(self, name: str) -> Iterator[bytes]:
        return self._there.get(name)


def compare(image_format: str, path: Path, raw: Path) -> bool:
    """qemu-img finds no difference."""
    words = ["qemu-img", "compare", "-f", image_format, "-F", "raw", str(path), str(raw)]
    done = subprocess.run(words, capture_output=True, check=False, timeout=60, cwd=path.parent)  # where data files are
    return done.returncode == 0


def history(
    directory: Path, disks: Sequence[str], levels: str, *, seed: int = 1, compressed: bool = True, size: int = 4 * MIB
) -> History:
    """Points of the disks, a day apart: a letter of `levels` each, "f" for full and "i" for incremental. Disks grow."""
    kept, raws = directory / "kept", directory / "raws"
    raws.mkdir(parents=True)
    made = History(kept, raws, Repository.open_or_create(DirectoryTarget(kept)))
    rnd = random.Random(seed)
    for number, letter in enumerate(levels, 1):
        add_point(made, disks, rnd, is_full=letter == "f", compressed=compressed, size=size + number * 1536)
    return made


def add_point(
    made: History,
    disks: Sequence[str],
    rnd: random.Random,
    *,
    is_full: bool,
    compressed: bool,
    size: int,
) -> None:
    """One point more; what a full one has is what was there before, too."""
    number = len(made.points) + 1
    created = FIRST + number * DAY
    point = names.point_id(created, number)
    members = []
    for disk in disks:
        parent = None if is_full or not made.points else made.points[-1]
        path = made.directory / names.member_name(point, disk)
        _make_member(made, path, disk, parent, size=size, rnd=rnd, compressed=compressed)
        qemu_img("convert", "-f", "qcow2", "-O", "raw", path, made.raw(point, disk))
        members.append(_member(path, disk, point, parent))
    manifest = Manifest(
        repository_id=made.repository.id, point=point, sequence=number, created=created, members=tuple(members)
    )
    made.repository.publish(manifest)
    made.points.append(point)


def _make_member(
    made: History, path: Path, disk: str, parent: str | None, *, size: int, rnd: random.Random, compressed: bool
) -> None:
    options = ["-q", "-f", "qcow2", "-o", f"cluster_size={CLUSTER}"]
    if parent is not None:
        options += ["-b", names.member_name(parent, disk), "-F", "qcow2"]
    elif made.points and made.raw(made.points[-1], disk).exists():
        before = made.raw(made.points[-1], disk)
        kept = before.stat().st_size
        os.truncate(before, size)
        qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={CLUSTER}", before, path)
        os.truncate(before, kept)
        return
    qemu_img("create", *options, path, str(size))
    commands = [word for _ in range(rnd.randrange(4, 12)) for word in _command(rnd, size, compressed=compressed)]
    # a compressed write to a cluster that this layer has already fails, and nothing happened
    subprocess.run(["qemu-io", *commands, str(path)], capture_output=True, check=False, timeout=60)


def _command(rnd: random.Random, size: int, *, compressed: bool) -> list[str]:
    kind = rnd.choice("wwzc" if compressed else "wwz")
    if kind == "c":
        offset = rnd.randrange(size // CLUSTER) * CLUSTER
        return ["-c", f"write -c -P {rnd.randrange(1, 255)} {offset} {CLUSTER}"]
    offset = rnd.randrange(size // 512) * 512
    length = min(512 * rnd.randrange(1, 1500), size - offset)
    return ["-c", f"write {'-z' if kind == 'z' else f'-P {rnd.randrange(1, 255)}'} {offset} {length}"]


def _member(path: Path, disk: str, point: str, parent: str | None) -> Member:
    digest, file_size = file_digest(path)
    with open_image(path) as image:
        (content, leaves), virtual_size = content_digest(image), image.virtual_size
    leaves_path = path.with_name(names.leaves_name(point, disk))
    leaves_path.write_bytes(leaves.pack())
    return Member(
        disk=disk,
        level=Level.FULL if parent is None else Level.INCREMENTAL,
        reason=None,
        virtual_size=virtual_size,
        file=path.name,
        file_size=file_size,
        file_digest=digest,
        parent_point=parent,
        parent_file=None if parent is None else names.member_name(parent, disk),
        bitmap=None,
        content_digest=content,
        leaves_file=leaves_path.name,
        options=dict(SAVED),
        source=f"/images/{disk}.qcow2",
        fingerprint=None,
    )


def changed(made: History, point: str, **fields: Any) -> None:
    """Publish the manifest of a point anew, with other fields in its first member: damage that has a right digest."""
    manifest = made.repository.point(point)
    first, *others = manifest.members
    other = replace(manifest, members=(replace(first, **fields), *others))
    (made.directory / names.manifest_name(point)).write_bytes(manifests.pack(other))
