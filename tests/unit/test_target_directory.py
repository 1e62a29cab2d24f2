"""A directory as a target: what is durable when, what a failure leaves, and whose files are not touched."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.adapters.backup.secrets import Secret
from qcow2_plugin.adapters.backup.target import is_name
from qcow2_plugin.adapters.backup.targets import open_target
from qcow2_plugin.adapters.backup.targets.directory import DirectoryTarget
from qcow2_plugin.errors import OptionError, TargetError
from qcow2_plugin.storage.blobs import readable_once
from tests.support.full_disk import full_disk
from tests.support.watching import no_descriptor_left

POINT = "20261125t131500z-0007.point.json"


@pytest.fixture
def target(tmp_path: Path) -> DirectoryTarget:
    (tmp_path / "kept").mkdir()
    return DirectoryTarget(tmp_path / "kept")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the system, in order."""
    made: list[str] = []
    for name in ("write", "fsync", "rename", "link", "unlink", "mkdir"):
        original: Callable[..., Any] = getattr(os, name)

        def call(*arguments: Any, name: str = name, original: Callable[..., Any] = original, **more: Any) -> Any:
            is_folder = name == "fsync" and os.path.isdir(f"/proc/self/fd/{arguments[0]}")
            made.append("fsync of the directory" if is_folder else name)
            return original(*arguments, **more)

        monkeypatch.setattr(os, name, call)
    return made


def test_what_is_kept_is_durable_before_it_has_its_name(
    target: DirectoryTarget, calls: list[str], tmp_path: Path
) -> None:
    target.put("blob", [b"a", b"b"], 2)
    assert calls == ["unlink", "write", "write", "fsync", "rename", "fsync of the directory"]
    calls.clear()
    target.publish(POINT, b"{}")
    assert calls == ["write", "fsync", "link", "unlink", "fsync of the directory"]
    staged = tmp_path / "kept" / "staged"
    staged.write_bytes(b"member")
    calls.clear()
    target.put_file("member", str(staged))
    assert calls == ["fsync", "rename", "fsync of the directory"]
    calls.clear()
    target.remove("member")
    assert calls == ["unlink", "fsync of the directory"]
    assert target.names() == [POINT, "blob"]


def test_a_directory_is_made_for_its_first_blob_and_durable(tmp_path: Path, calls: list[str]) -> None:
    target = DirectoryTarget(tmp_path / "new")
    assert target.names() == []
    assert not (tmp_path / "new").exists()
    target.publish(POINT, b"{}")
    assert calls[:2] == ["mkdir", "fsync of the directory"]
    with pytest.raises(FileNotFoundError):
        DirectoryTarget(tmp_path / "not" / "here").put("blob", [b"a"], 1)


def test_nobody_else_may_read_what_is_kept(target: DirectoryTarget, tmp_path: Path) -> None:
    target.put("blob", [b"a"], 1)
    target.publish(POINT, b"{}")
    assert {stat.S_IMODE((tmp_path / "kept" / name).stat().st_mode) for name in target.names()} == {0o600}


@pytest.mark.parametrize("failing", ["write", "fsync", "rename", "link"])
def test_a_failure_leaves_nothing(failing: str, target: DirectoryTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patched, no_descriptor_left():
        patched.setattr(os, failing, broken)
        with pytest.raises(OSError, match="broken"):
            if failing == "link":
                target.publish("point", b"content")
            target.put("blob", [b"content"], 7)
        assert not os.listdir(target.directory)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    with full_disk(tmp_path / "full", 1 << 16) as disk:
        target = DirectoryTarget(disk.directory)
        with pytest.raises(OSError) as full:
            target.put("blob", (bytes(4096) for _ in range(64)), 64 * 4096)
        assert full.value.errno == disk.errno
        assert not os.listdir(disk.directory)


def test_a_kill_leaves_a_name_that_is_seen(target: DirectoryTarget) -> None:
    def seen() -> Iterator[bytes]:
        yield b"x"
        (left,) = target.names()
        assert left.startswith("blob.")
        assert left.endswith(".partial")
        yield b"y"

    target.put("blob", seen(), 2)
    assert target.names() == ["blob"]


def test_links_and_pipes_are_no_blobs(target: DirectoryTarget, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (tmp_path / "kept" / "link").symlink_to(secret)
    os.mkfifo(tmp_path / "kept" / "pipe")
    (tmp_path / "kept" / "folder").mkdir()
    assert target.names() == []
    for name in ("link", "pipe", "folder"):
        with pytest.raises(OSError), no_descriptor_left():
            list(target.get(name))
    target.put("link", [b"content"], 7)
    assert secret.read_text() == "mine"
    assert target.names() == ["link"]


def test_a_file_of_another_file_system_is_copied(target: DirectoryTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Path(target.directory).with_name("made")
    made.write_bytes(bytes(3 << 20) + b"end")
    rename = os.rename

    def across(source: str, path: str) -> None:
        if source == str(made):
            raise OSError(errno.EXDEV, "cross")
        rename(source, path)

    monkeypatch.setattr(os, "rename", across)
    target.put_file("blob", str(made))
    assert (Path(target.directory) / "blob").read_bytes() == made.read_bytes()


@pytest.mark.parametrize("name", ["a", "0.json", "a" * 201, "20261125t131500z-0007.root-1.qcow2"])
def test_good_names(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "A", "-a", "a b", "a" * 202, "\u0430", "a\n", "a\0"])
def test_names_that_none_can_have(name: str, target: DirectoryTarget) -> None:
    assert not is_name(name)
    with pytest.raises(TargetError, match="cannot be a name"):
        target.publish(name, b"x")


def no_secret(secret_id: str, purpose: str) -> Secret:
    raise AssertionError(f"{secret_id} for {purpose}")


def test_targets_by_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("kept", f"{tmp_path}/kept", "file:kept", f"file://{tmp_path}/kept", "./kept", f"file:{tmp_path}/kept"):
        target = open_target(uri, {}, no_secret)
        assert isinstance(target, DirectoryTarget)
        assert target.directory == f"{tmp_path}/kept", uri
    odd = open_target("./a:b", {}, no_secret)
    assert odd is not None
    assert odd.directory == f"{tmp_path}/a:b"
    assert open_target("tape:1", {}, no_secret) is None
    for uri in ("", "file:", "borg:", "s3://", "s3://key:secret@bucket/x", "s3://bucket?endpoint=x", "s3:bucket"):
        with pytest.raises(OptionError) as refused:
            open_target(uri, {}, no_secret)
        assert "secret" not in str(refused.value), uri
    with pytest.raises(OptionError, match="'endpoint' is no option of borg: targets; these are: passphrase"):
        open_target("borg:x", {"endpoint": "y"}, no_secret)


def test_a_secret_is_asked_for_by_its_id() -> None:
    asked: list[tuple[str, str]] = []

    def secret(secret_id: str, purpose: str) -> Secret:
        asked.append((secret_id, purpose))
        return Secret(b"key:secret")

    for uri, option in (("borg:/x", "passphrase"), ("restic:/x", "passphrase"), ("s3://x/y", "credentials")):
        target = open_target(uri, {option: "file:/id"}, secret)
        assert target is not None
        assert target.uri == uri
    assert asked == [("file:/id", uri) for uri in ("borg:/x", "restic:/x", "s3://x/y")]


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("restic:rest:https://me:secret@host:8000/x", "restic:rest:https://me@host:8000/x"),
        ("restic:sftp://host:22/a:b@c", "restic:sftp://host:22/a:b@c"),
        ("borg:ssh://me@host:22/./x", "borg:ssh://me@host:22/./x"),
        ("borg:/x\x1b", "borg:/x\\x1b"),
    ],
)
def test_no_password_and_no_control_character_is_shown(place: str, shown: str) -> None:
    target = open_target(place, {}, no_secret)
    assert target is not None
    assert target.uri == shown


def test_a_secret_is_read_once_and_has_a_limit() -> None:
    with no_descriptor_left():
        with readable_once(b"s" * 4096) as fd:
            assert os.read(fd, 5000) == b"s" * 4096
            assert os.read(fd, 1) == b""
            assert not os.get_inheritable(fd)
        with pytest.raises(OSError), readable_once(b"s" * 4097):
            pass
