"""Repositories over any target: what counts as a point, which chains are refused, and what is left over."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.adapters.backup import levels, names
from qcow2_plugin.adapters.backup import manifest as manifests
from qcow2_plugin.adapters.backup.model import Level, Manifest, Member
from qcow2_plugin.adapters.backup.repository import Repository
from qcow2_plugin.adapters.backup.target import BackupTarget
from qcow2_plugin.adapters.backup.targets.directory import DirectoryTarget
from qcow2_plugin.engine.files import MAX_DEPTH
from qcow2_plugin.errors import ManifestError, Qcow2Error
from qcow2_plugin.operations.create import create_image

MIB = 1 << 20


class MemoryTarget(BackupTarget):
    """A target that lives as long as the test."""

    uri = "memory:"

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.removed: list[str] = []

    def put(self, name: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        self.blobs[name] = b"".join(map(bytes, chunks))

    def publish(self, name: str, content: bytes) -> None:
        if name in self.blobs:
            raise FileExistsError(name)
        self.blobs[name] = content

    def names(self) -> list[str]:
        return sorted(self.blobs)

    def get(self, name: str) -> Iterator[bytes]:
        if name not in self.blobs:
            raise FileNotFoundError(name)
        yield self.blobs[name]

    def remove(self, name: str) -> None:
        self.removed.append(name)
        self.blobs.pop(name, None)


def member(point: str, parent: str | None, disk: str = "root", **fields: Any) -> Member:
    made = Member(
        disk=disk,
        level=Level.INCREMENTAL if parent else Level.FULL,
        reason=None,
        virtual_size=MIB,
        file=names.member_name(point, disk),
        file_size=1,
        file_digest=None,
        parent_point=parent,
        parent_file=names.member_name(parent, disk) if parent else None,
        bitmap=None,
        content_digest=None,
        leaves_file=None,
        options={},
        source="root.qcow2",
        fingerprint=None,
    )
    return replace(made, **fields)


def add(repository: Repository, number: int, parent: str | None, *more: Member, **fields: Any) -> str:
    """A point with a member of the disk "root", and others."""
    point = names.point_id(1_760_000_000 + number, number)
    members = (member(point, parent, **fields), *more)
    for each in members:
        repository.target.put(each.file, [b"x"], 1)
    repository.publish(
        Manifest(repository_id=repository.id, point=point, sequence=number, created=number, members=members)
    )
    return point


@pytest.fixture
def target() -> MemoryTarget:
    return MemoryTarget()


@pytest.fixture
def repository(target: MemoryTarget) -> Repository:
    return Repository.open_or_create(target)


def test_it_is_made_once(target: MemoryTarget, repository: Repository) -> None:
    assert Repository.open_or_create(target).id == repository.id == Repository.open(target).id
    target.blobs[names.REPOSITORY_FILE] = b'{"format": 2, "repository": "01234567"}'
    with pytest.raises(ManifestError, match="newer version"):
        Repository.open(target)
    target.blobs[names.REPOSITORY_FILE] = json.dumps({"format": 1, "repository": "../up"}).encode()
    with pytest.raises(ManifestError, match="no id"):
        Repository.open(target)
    target.blobs[names.REPOSITORY_FILE] = b'{"x": "' + b"x" * 100_000
    with pytest.raises(ManifestError, match="longer"):
        Repository.open(target)
    with pytest.raises(ManifestError, match="no repository"):
        Repository.open(MemoryTarget())


def test_somebody_else_was_faster(target: MemoryTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Repository.open_or_create(target)
    monkeypatch.setattr(target, "names", list)
    assert Repository.open_or_create(target).id == other.id


def test_points_by_their_order(repository: Repository) -> None:
    with pytest.raises(ManifestError, match="no point yet"):
        repository.point("latest")
    made = [add(repository, number, None) for number in (10_000, 2, 30)]
    assert [each.point for each in repository.points()] == [made[1], made[2], made[0]]
    assert repository.point("latest").point == made[0]
    assert repository.next_point(1_795_612_500) == ("20261125t131500z-10001", 10_001)
    with pytest.raises(ManifestError, match="is no point"):
        repository.point("../up")


def test_leftovers_count_for_the_next_number(target: MemoryTarget, repository: Repository) -> None:
    add(repository, 3, None)
    target.blobs[names.member_name(names.point_id(1, 7), "root")] = b""
    assert repository.next_point(0)[1] == 8


def test_the_newest_revision_counts(target: MemoryTarget, repository: Repository) -> None:
    full = add(repository, 1, None)
    point = add(repository, 2, full)
    manifest = repository.point(point)
    for revision in (9, 10):
        file = names.member_name(point, "root", revision)
        target.blobs[file] = b"x"
        repository.publish(replace(manifest, revision=revision, members=(member(point, None, file=file),)))
    assert repository.point(point).revision == 10
    assert [each.file for each in repository.chain(point, "root")] == [names.member_name(point, "root", 10)]
    assert repository.leftovers() == sorted(
        [
            names.manifest_name(point),
            names.manifest_name(point, 9),
            names.member_name(point, "root"),
            names.member_name(point, "root", 9),
        ]
    )
    repository.remove(point)
    manifests_removed = [name for name in target.removed if names.manifest_of(name)]
    assert manifests_removed == [names.manifest_name(point, revision) for revision in (0, 9, 10)]
    assert [name for name in target.blobs if names.point_of(name) == point] == []


def test_chains(target: MemoryTarget, repository: Repository) -> None:
    first = add(repository, 1, None)
    second = add(repository, 2, first, member(names.point_id(1_760_000_002, 2), None, "data"))
    third = add(repository, 3, second)
    assert [each.file for each in repository.chain("latest", "root")] == [
        names.member_name(point, "root") for point in (first, second, third)
    ]
    assert repository.dependents(first) == [second]
    assert repository.member(second, "data").disk == "data"
    assert repository.member(third, None).disk == "root"
    for disk, told in (("boot", "no disk boot"), (None, "several disks")):
        with pytest.raises(ManifestError, match=told):
            repository.member(second, disk)
    with pytest.raises(ManifestError, match="no disk data"):
        repository.chain(third, "data")
    for name, told in (
        (names.member_name(first, "root"), "is missing"),
        (names.manifest_name(second), f"{second} is missing"),
    ):
        kept = target.blobs.pop(name)
        with pytest.raises(ManifestError, match=told):
            repository.chain(third, "root")
        target.blobs[name] = kept
    assert len(repository.chain(third, "root")) == 3


def test_a_damaged_manifest_is_told_and_nothing_of_it_is_left_over(
    target: MemoryTarget, repository: Repository
) -> None:
    first = add(repository, 1, None)
    second = add(repository, 2, first)
    target.blobs[names.manifest_name(first)] = target.blobs[names.manifest_name(second)]
    again = Repository.open(target)
    assert [each.point for each in again.points()] == [second]
    assert list(again.damaged()) == [first]
    assert again.leftovers() == []
    for point in (first, second):
        with pytest.raises(ManifestError, match="another point"):
            again.chain(point, "root")
    with pytest.raises(ManifestError, match="must stay"):
        again.remove(second)


def test_points_of_others_are_not_published(repository: Repository) -> None:
    point = names.point_id(1, 1)
    other = Manifest(repository_id="76543210", point=point, sequence=1, created=1, members=(member(point, None),))
    with pytest.raises(ManifestError, match="76543210"):
        repository.publish(other)
    repository.target.publish(names.manifest_name(point), manifests.pack(other))
    assert list(repository.damaged()) == [point]
    mine = add(repository, 2, None)
    with pytest.raises(FileExistsError):
        repository.publish(repository.point(mine))


def test_what_lost_its_parent_is_not_published(target: MemoryTarget, repository: Repository) -> None:
    """Somebody has removed it meanwhile."""
    first = add(repository, 1, None)
    repository.remove(first)
    before = dict(target.blobs)
    with pytest.raises(ManifestError, match=f"{first} is missing"):
        add(repository, 2, first)
    assert [name for name in target.blobs if name not in before] == [
        names.member_name(names.point_id(1_760_000_002, 2), "root")
    ]


def test_other_names_are_nobodys_leftovers(target: MemoryTarget, repository: Repository) -> None:
    for name in ("notes.txt", "disk.qcow2", "repository.json.bak"):
        target.blobs[name] = b""
    assert repository.leftovers() == []


@pytest.fixture
def near(tmp_path: Path) -> Repository:
    return Repository.open_or_create(DirectoryTarget(tmp_path / "kept"))


@pytest.mark.parametrize("wrong", ["size", "virtual_size", "data_file", "raw"])
def test_headers_are_looked_at(near: Repository, tmp_path: Path, wrong: str) -> None:
    assert near.target.directory is not None
    point = names.point_id(1, 1)
    path = Path(near.target.directory) / names.member_name(point, "root")
    options: dict[str, Any] = {"data_file": path.with_suffix(".data")} if wrong == "data_file" else {}
    if wrong == "raw":
        path.write_bytes(bytes(MIB))
    else:
        create_image(path, MIB + (512 if wrong == "virtual_size" else 0), **options)
    size = path.stat().st_size + (wrong == "size")
    near.publish(
        Manifest(
            repository_id=near.id, point=point, sequence=1, created=1, members=(member(point, None, file_size=size),)
        )
    )
    with pytest.raises(Qcow2Error, match=r"bytes|by itself|qcow2"), near.local(near.chain(point, "root")):
        pass
    assert os.listdir(tmp_path) == ["kept"]


def test_a_point_whose_files_somebody_has_removed_is_not_published(
    target: MemoryTarget, repository: Repository
) -> None:
    """Of two backups one was made, and retention has taken the files of the other for leftovers."""
    point = names.point_id(1, 1)
    made = Manifest(repository_id=repository.id, point=point, sequence=1, created=1, members=(member(point, None),))
    with pytest.raises(ManifestError, match="was removed by somebody else"):
        repository.publish(made)
    assert repository.points() == []


def test_the_format_of_what_is_below_is_looked_at(near: Repository) -> None:
    assert near.target.directory is not None
    below, above = names.point_id(1, 1), names.point_id(2, 2)
    kinds: list[tuple[str, str | None, dict[str, Any]]] = [
        (below, None, {}),
        (above, below, {"backing_file": names.member_name(below, "root"), "backing_format": "raw"}),
    ]
    for point, parent, options in kinds:
        path = Path(near.target.directory) / names.member_name(point, "root")
        create_image(path, MIB, check_backing_file=False, **options)
        made = member(point, parent, file_size=path.stat().st_size)
        near.publish(
            Manifest(
                repository_id=near.id,
                point=point,
                sequence=names.sequence_of(point),
                created=1,
                members=(made,),
            )
        )
    with pytest.raises(ManifestError, match="another format"), near.local(near.chain(above, "root")):
        pass


def test_what_others_are_built_on_is_not_left_over_without_its_manifest(
    target: MemoryTarget, repository: Repository
) -> None:
    first = add(repository, 1, None)
    add(repository, 2, first)
    target.remove(names.manifest_name(first))
    assert repository.leftovers() == []


def test_no_chain_becomes_longer_than_what_can_be_opened(repository: Repository) -> None:
    last = add(repository, 1, None)
    for number in range(2, MAX_DEPTH):
        assert levels._upon_last(repository, last, "root", 1000, ())[0] is not None
        last = add(repository, number, last)
    base, reason = levels._upon_last(repository, last, "root", 1000, ())
    assert (base, reason) == (None, f"The chain has {MAX_DEPTH - 1} members, as many as it may have.")
