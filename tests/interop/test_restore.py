"""Restoring, verifying and serving points of repositories that qemu-img has made; it judges every disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.adapters.backup import names
from qcow2_plugin.adapters.backup.model import Level
from qcow2_plugin.adapters.backup.repository import Repository
from qcow2_plugin.adapters.backup.restore import Request, restore
from qcow2_plugin.adapters.backup.targets.directory import DirectoryTarget
from qcow2_plugin.adapters.backup.verify import verify
from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import ExportError, ManifestError, OptionError, Qcow2Error
from qcow2_plugin.extent import ExtentKind
from tests.support.backup_chains import ElsewhereTarget, History, changed, compare, history
from tests.support.command import qcow2, qcow2_json
from tests.support.loop import loop_device
from tests.support.tools import qemu_img, qemu_img_json, qemu_io

DISKS = ("root", "data-1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> History:
    """Five points of two disks, two of them full. Nobody changes it."""
    return history(tmp_path_factory.mktemp("backups"), DISKS, "fiifi")


@pytest.fixture
def copy(made: History, tmp_path: Path) -> History:
    """One that may be changed."""
    kept = tmp_path / "kept"
    shutil.copytree(made.directory, kept)
    return History(kept, made.raws, Repository.open(DirectoryTarget(kept)), list(made.points))


@pytest.mark.parametrize("is_near", [True, False], ids=["directory", "elsewhere"])
def test_every_point_is_restored(made: History, tmp_path: Path, is_near: bool) -> None:
    repository = made.again() if is_near else Repository.open(ElsewhereTarget(made.directory))
    for point in made.points:
        for disk in DISKS:
            raw = tmp_path / f"{point}.{disk}.raw"
            restored = restore(repository, point, disk, Request(to=str(raw), form="raw", verify=True))
            assert (restored.format, restored.is_verified) == ("raw", True)
            assert raw.read_bytes() == made.raw(point, disk).read_bytes()


def stored_size(raw: Path, granule: int) -> int:
    """Bytes of the granules that are not all zeros."""
    content = raw.read_bytes()
    granules = (content[at : at + granule] for at in range(0, len(content), granule))
    return sum(len(each) for each in granules if any(each))


@pytest.mark.parametrize("form", ["qcow2", "external-data-file", "saved"])
def test_forms(made: History, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where QEMU looks for data files
    point = made.points[2]
    path = tmp_path / "disk.qcow2"
    restored = restore(made.again(), point, "root", Request(to=str(path), form=form, verify=True))
    assert compare("qcow2", path, made.raw(point, "root"))
    qemu_img("check", "-q", path)
    if form != "external-data-file":
        assert restored.written == stored_size(made.raw(point, "root"), 65536)
    wanted = ["disk.qcow2", "disk.raw"] if form == "external-data-file" else ["disk.qcow2"]
    assert sorted(os.listdir(tmp_path)) == wanted
    if restored.data_file is not None:
        assert Path(restored.data_file).read_bytes() == made.raw(point, "root").read_bytes()


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ({"version": 2}, {"compat": "0.10"}),
        ({"extended_l2": True, "cluster_size": 131072}, {"extended-l2": True}),
        ({"cluster_size": 1 << 20}, {"extended-l2": False}),
        ({"compression_type": "zstd"}, {"compression-type": "zstd"}),
        ({"refcount_bits": 1}, {"refcount-bits": 1}),
        ({"lazy_refcounts": True, "cluster_size": 4096}, {"lazy-refcounts": True}),
        ({"data_file": "x.raw", "data_file_raw": True}, {"data-file-raw": True}),
    ],
)
def test_saved_options_come_back(copy: History, tmp_path: Path, saved: dict[str, Any], told: dict[str, Any]) -> None:
    point = copy.points[0]
    member = copy.repository.member(point, "root")
    changed(copy, point, options={**member.options, **saved})
    path = tmp_path / "disk.qcow2"
    restored = restore(copy.again(), point, "root", Request(to=str(path)))
    info = qemu_img_json("info", path)
    assert info.get("cluster-size") == saved.get("cluster_size", 65536)
    assert told.items() <= info["format-specific"]["data"].items()
    if not saved.get("data_file_raw"):
        granule = saved.get("cluster_size", 65536) // (32 if saved.get("extended_l2") else 1)
        assert restored.written == stored_size(copy.raw(point, "root"), granule)
    assert compare("qcow2", path, copy.raw(point, "root"))


def test_options_of_other_kinds_are_passed_over(copy: History, tmp_path: Path) -> None:
    strange = {"cluster_size": "64k", "policy": "trusted", "backing_file": "/etc/passwd", "data_file": "/etc/shadow"}
    changed(copy, copy.points[0], options=strange)
    path = tmp_path / "disk.qcow2"
    restore(copy.again(), copy.points[0], "root", Request(to=str(path)))
    assert compare("qcow2", path, copy.raw(copy.points[0], "root"))
    assert "backing-filename" not in qemu_img_json("info", path)
    changed(copy, copy.points[0], options={"cluster_size": 7})
    with pytest.raises(OptionError):
        restore(copy.again(), copy.points[0], "root", Request(to=str(tmp_path / "other.qcow2")))
    assert not (tmp_path / "other.qcow2").exists()


def test_zeros_hide_what_is_below(tmp_path: Path) -> None:
    """What a guest has zeroed since the full member must not come back, in a new file or on a device full of bytes."""
    made = history(tmp_path / "h", ["root"], "fi", compressed=False)
    full, increment = (made.directory / names.member_name(point, "root") for point in made.points)
    qemu_io(full, "write -P 9 0 1M")
    qemu_io(increment, "write -z 0 512k", "discard 512k 512k")
    before = qemu_img_json("map", increment)
    assert any(run["zero"] for run in before)
    for point, path in zip(made.points, (full, increment), strict=True):
        changed(made, point, file_size=path.stat().st_size, file_digest=None, content_digest=None)
    raw = tmp_path / "disk.raw"
    restore(made.again(), "latest", None, Request(to=str(raw), form="raw"))
    assert compare("qcow2", increment, raw)
    assert not any(raw.read_bytes()[: 1 << 19])
    volume = tmp_path / "volume"
    volume.write_bytes(b"\xee" * (8 << 20))
    with loop_device(volume, read_only=False) as device:
        with pytest.raises(OptionError, match="overwrite"):
            restore(made.again(), "latest", None, Request(to=device, form="raw"))
        request = Request(to=device, form="raw", overwrite=True)
        restore(made.again(), "latest", None, request)
        disk = raw.read_bytes()
        assert Path(device).read_bytes() == disk + b"\xee" * ((8 << 20) - len(disk))


def test_what_is_there_stays_unless_told(made: History, tmp_path: Path) -> None:
    for form in ("raw", "qcow2"):
        path = tmp_path / f"disk.{form}"
        path.write_bytes(b"mine")
        with pytest.raises(FileExistsError):
            restore(made.again(), "latest", "root", Request(to=str(path), form=form))
        assert path.read_bytes() == b"mine"
        restore(made.again(), "latest", "root", Request(to=str(path), form=form, overwrite=True))
        assert compare(form, path, made.raw(made.points[-1], "root"))
    assert sorted(os.listdir(tmp_path)) == ["disk.qcow2", "disk.raw"]


def swap_disks(copy: History) -> None:
    one, other = (copy.directory / names.member_name(copy.points[1], disk) for disk in DISKS)
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def swap_points(copy: History) -> None:
    one, other = (copy.directory / names.member_name(point, "root") for point in copy.points[1:3])
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def lose_member(copy: History) -> None:
    (copy.directory / names.member_name(copy.points[1], "root")).unlink()


def lose_manifest(copy: History) -> None:
    (copy.directory / names.manifest_name(copy.points[1])).unlink()


def damage_manifest(copy: History) -> None:
    path = copy.directory / names.manifest_name(copy.points[1])
    path.write_bytes(path.read_bytes()[:-20])


def cut(copy: History) -> None:
    path = copy.directory / names.member_name(copy.points[0], "root")
    os.truncate(path, path.stat().st_size - 512)


def flip_a_bit(copy: History) -> None:
    path = copy.directory / names.member_name(copy.points[0], "root")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def lead_elsewhere(copy: History) -> None:
    path = copy.directory / names.member_name(copy.points[1], "root")
    qemu_img("rebase", "-u", "-b", f"{copy.points[0]}.data-1.qcow2", "-F", "qcow2", "-f", "qcow2", path)
    changed(copy, copy.points[1], file_digest=None, file_size=path.stat().st_size)


def drop_the_disk(copy: History) -> None:
    changed(
        copy,
        copy.points[1],
        disk="other",
        file=f"{copy.points[1]}.other.qcow2",
        leaves_file=None,
        level=Level.FULL,
        parent_point=None,
        parent_file=None,
    )


def move_manifest(copy: History) -> None:
    """A manifest under the name of another point."""
    one, other = (copy.directory / names.manifest_name(point) for point in copy.points[1:3])
    one.write_bytes(other.read_bytes())


def other_repository(copy: History) -> None:
    path = copy.directory / names.REPOSITORY_FILE
    path.write_text(path.read_text().replace(copy.repository.id, "00000000"))


@pytest.mark.parametrize(
    "damage",
    [
        swap_disks,
        swap_points,
        lose_member,
        lose_manifest,
        damage_manifest,
        cut,
        flip_a_bit,
        lead_elsewhere,
        drop_the_disk,
        move_manifest,
        other_repository,
    ],
)
def test_a_wrong_chain_is_refused_before_anything_is_written(
    copy: History, tmp_path: Path, damage: Callable[[History], None]
) -> None:
    damage(copy)
    to = tmp_path / "out"
    to.mkdir()
    with pytest.raises(ManifestError):
        restore(copy.again(), copy.points[2], "root", Request(to=str(to / "disk.raw"), form="raw"))
    assert os.listdir(to) == []
    if damage is not other_repository:  # the second full one and what is on it know nothing of it
        restore(copy.again(), copy.points[4], "root", Request(to=str(to / "disk.raw"), form="raw", verify=True))
    assert verify(copy.again(), level=1).findings
    assert qcow2("verify", "--no-plugins", copy.directory).status == 3


def test_a_wrong_digest_of_the_disk_is_noticed(copy: History, tmp_path: Path) -> None:
    changed(copy, copy.points[0], content_digest="00" * 32, leaves_file=None)
    to = tmp_path / "to"
    to.mkdir()
    for form in ("raw", "qcow2", "external-data-file"):
        with pytest.raises(ExportError, match="not the disk"):
            restore(copy.again(), copy.points[0], "root", Request(to=str(to / "disk"), form=form, verify=True))
        assert os.listdir(to) == []
    assert not verify(copy.again(), level=1).findings
    (finding,) = verify(copy.again(), level=2).findings
    assert (finding.point, finding.disk) == (copy.points[0], "root")


def test_wrong_leaves_are_noticed_and_not_needed(copy: History, tmp_path: Path) -> None:
    one, other = (copy.directory / names.leaves_name(copy.points[number], "root") for number in (0, 1))
    one.write_bytes(other.read_bytes())
    other.unlink()
    assert [(each.point, each.file) for each in verify(copy.again()).findings] == [(copy.points[1], other.name)]
    found = verify(copy.again(), level=2).findings
    assert [(each.point, each.file) for each in found] == [(copy.points[0], one.name), (copy.points[1], other.name)]
    restore(copy.again(), copy.points[1], "root", Request(to=str(tmp_path / "disk"), form="raw", verify=True))


def test_what_is_restored_is_not_for_everybody(copy: History, tmp_path: Path) -> None:
    for path in copy.directory.iterdir():
        path.chmod(0o600)
    for form in ("raw", "qcow2", "external-data-file"):
        restore(copy.again(), "latest", "root", Request(to=str(tmp_path / f"{form}.disk"), form=form))
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("*.disk*")} == {
        "raw.disk": 0o600,
        "qcow2.disk": 0o600,
        "external-data-file.disk": 0o644,  # in which there is nothing of the disk
        "external-data-file.disk.raw": 0o600,
    }


def test_verify_against_the_source(made: History, tmp_path: Path) -> None:
    image = tmp_path / "root.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", made.raw(made.points[-1], "root"), image)
    words = ("--no-plugins", made.directory, "--point=latest")
    assert qcow2("verify", *words, "--against", f"root={image}").status == 0
    assert qcow2("verify", *words, "--against", f"root={made.raw(made.points[-1], 'root')}").status == 0
    qemu_io(image, "write -P 77 4k 512")
    ended = qcow2("verify", *words, "--against", f"root={image}")
    assert ended.status == 3
    assert "not that of" in ended.stdout


def test_the_command(made: History, tmp_path: Path) -> None:
    listed = qcow2_json("points", "--no-plugins", made.directory)
    assert [point["point"] for point in listed["points"]] == made.points
    assert listed["damaged"] == {} and listed["leftovers"] == []
    assert made.points[0] in qcow2("points", "--no-plugins", made.directory).stdout
    path = tmp_path / "disk.raw"
    words = ("--no-plugins", "--from", made.directory, "--as=raw")
    told = qcow2_json("restore", *words, "--disk=data-1", "--point", made.points[1], "--verify", path)
    assert (told["point"], told["disk"], told["is_verified"]) == (made.points[1], "data-1", True)
    assert path.read_bytes() == made.raw(made.points[1], "data-1").read_bytes()
    ended = qcow2("restore", *words, tmp_path / "other")
    assert ended.status == 1
    assert "several disks, root, data-1" in ended.stderr
    assert qcow2("restore", *words, "--point=../up", "--disk=root", tmp_path / "other").status == 1
    assert sorted(os.listdir(tmp_path)) == ["disk.raw"]


def test_hooks_are_told_in_order(made: History, tmp_path: Path) -> None:
    class Recorded:
        def __init__(self, refuses: bool = False) -> None:
            self.calls: list[str] = []
            self._refuses = refuses

        def restore_begin(self, told: Any) -> None:
            assert told.format == "raw" and not os.path.exists(told.destination)
            self.calls.append("begin")
            if self._refuses:
                raise OptionError("not now")

        def restore_commit(self, told: Any) -> None:
            assert os.path.exists(told.destination)
            self.calls.append("commit")

        def restore_abort(self, told: Any, error: Any) -> None:
            self.calls.append("abort")

    request = Request(to=str(tmp_path / "disk.raw"), form="raw")
    hooks: Any = Recorded(refuses=True)
    with pytest.raises(Qcow2Error, match="not now"):
        restore(made.again(), "latest", "root", request, hooks=hooks)
    assert hooks.calls == ["begin", "abort"]
    assert os.listdir(tmp_path) == []
    hooks = Recorded()
    restore(made.again(), "latest", "root", request, hooks=hooks)
    assert hooks.calls == ["begin", "commit"]


def test_progress_for_programs(made: History, tmp_path: Path) -> None:
    words = ("--no-plugins", "--progress=json", "-q")
    ended = qcow2("restore", *words, "--from", made.directory, "--disk=root", tmp_path / "disk.qcow2")
    told = [json.loads(line) for line in ended.stderr.splitlines()]
    size = made.repository.member("latest", "root").virtual_size
    assert told[-1] == {"phase": "restore", "done": size, "total": size}
    ended = qcow2("verify", *words, made.directory)
    assert json.loads(ended.stderr.splitlines()[-1]) == {"phase": "verify", "done": 10, "total": 10}
    assert ended.stdout == ""


def test_what_plugins_have_against_a_point(made: History, tmp_path: Path) -> None:
    plugin = tmp_path / "doubter.py"
    plugin.write_text(
        "from qcow2_plugin.adapters.backup.hook_values import Complaint\n"
        "from qcow2_plugin.adapters.backup.hookspecs import hookimpl\n"
        "QCOW2_PLUGIN_API = 1\n"
        "@hookimpl\n"
        "def qcow2_verify(manifest, level):\n"
        "    if manifest.sequence == 3:\n"
        "        yield Complaint(disk='root', text=f'no signature {level}')\n"
    )
    ended = qcow2("verify", "--no-plugins", "--plugin", plugin, "--level=0", made.directory)
    assert ended.status == 3
    assert f"{made.points[2]} root: no signature 0 (plugin " in ended.stdout


@pytest.mark.parametrize("form", ["raw", "qcow2", "external-data-file"])
def test_after_an_error_there_is_nothing(tmp_path: Path, form: str) -> None:
    """A compressed cluster that is no stream, which nobody has a digest of."""
    made = history(tmp_path / "h", ["root"], "f")
    path = made.directory / names.member_name(made.points[0], "root")
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", made.raw(made.points[0], "root"), path)
    with open_image(path) as image:
        clusters = image.clusters(0, image.virtual_size)
    stored = next(each.host_offset for each in reversed(clusters) if each.kind is ExtentKind.COMPRESSED)
    assert stored is not None
    content = path.read_bytes()
    path.write_bytes(content[:stored] + b"\xff" * 8 + content[stored + 8 :])
    changed(made, made.points[0], file_size=path.stat().st_size, file_digest=None, leaves_file=None)
    to = tmp_path / "to"
    to.mkdir()
    with pytest.raises(Qcow2Error, match="compressed"):
        restore(made.again(), "latest", None, Request(to=str(to / "disk"), form=form))
    assert os.listdir(to) == []
    (to / "disk").write_bytes(b"mine")
    with pytest.raises((Qcow2Error, OSError)):
        restore(made.again(), "latest", None, Request(to=str(to / "disk"), form=form, overwrite=True))
    assert (os.listdir(to), (to / "disk").read_bytes()) == (["disk"], b"mine")


def test_without_a_digest_nothing_is_made_that_could_not_be_verified(copy: History, tmp_path: Path) -> None:
    changed(copy, copy.points[0], content_digest=None, leaves_file=None)
    there = tmp_path / "disk.raw"
    there.write_bytes(b"precious")
    request = Request(to=str(there), form="raw", overwrite=True, verify=True)
    with pytest.raises(OptionError, match="no digest"):
        restore(copy.again(), copy.points[0], "root", request)
    assert there.read_bytes() == b"precious"


def test_what_is_wrong_is_removed_behind_a_link(copy: History, tmp_path: Path) -> None:
    changed(copy, copy.points[0], content_digest="00" * 32, leaves_file=None)
    there, link = tmp_path / "disk.raw", tmp_path / "link.raw"
    there.write_bytes(b"old")
    link.symlink_to(there)
    request = Request(to=str(link), form="raw", overwrite=True, verify=True)
    with pytest.raises(ExportError):
        restore(copy.again(), copy.points[0], "root", request)
    assert not there.exists()


def test_a_disk_that_is_not_there_is_not_verified(made: History, tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{"disks": ["typo"]}, {"against": {"typo": str(tmp_path / "x")}}]
    for options in wrong:
        with pytest.raises(ManifestError, match="typo"):
            verify(made.again(), **options)
    ended = qcow2("verify", "--no-plugins", "--disk", "typo", made.directory)
    assert (ended.status, ended.stdout) == (1, "")
