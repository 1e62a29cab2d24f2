"""Targets in real stores: Borg's, restic's and an S3 server's, held to the contract and to what is said of secrets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcow2_plugin.adapters.backup import targets
from qcow2_plugin.adapters.backup.secrets import Secret
from qcow2_plugin.errors import TargetError
from qcow2_plugin.testing import check_target
from tests.support.stores import (
    PASSPHRASE,
    SECRET,
    Store,
    borg_repository,
    keep_to,
    restic_repository,
    s3_server,
    s3_store,
)

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_to(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("weed")) as running:
        yield running


@pytest.fixture(params=[borg_repository, restic_repository])
def programs_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    store: Store = request.param(tmp_path)
    return store


def test_repositories_of_programs_are_targets(programs_store: Store) -> None:
    check_target(programs_store.open)


def test_s3_is_a_target(endpoint: str) -> None:
    check_target(s3_store(endpoint, "some/where").open)


def test_large_objects_come_in_parts(endpoint: str) -> None:
    store = s3_store(endpoint, "large")
    content = os.urandom(MIB)
    store.open().put("large", (content for _ in range(40)), 40 * MIB)
    chunks = list(store.open().get("large"))
    assert b"".join(chunks) == content * 40
    assert max(map(len, chunks)) <= 9 * MIB


def test_prefixes_do_not_see_each_other(endpoint: str) -> None:
    outer, inner, whole = (s3_store(endpoint, prefix).open() for prefix in ("a", "a/b", ""))
    outer.put("blob", [b"outer"], 5)
    inner.put("blob", [b"inner"], 5)
    inner.remove("blob")
    assert b"".join(outer.get("blob")) == b"outer"
    assert (outer.names(), inner.names()) == (["blob"], [])
    assert "blob" not in whole.names()


def test_a_wrong_key_for_s3_is_not_shown(endpoint: str) -> None:
    with pytest.raises(TargetError, match="store says") as denied:
        s3_store(endpoint, "x", secret="wrong-" + SECRET).open().names()
    assert SECRET not in str(denied.value)
    assert "\n" not in str(denied.value)


def test_a_bucket_that_is_not_there_is_named(endpoint: str) -> None:
    missing = s3_store(endpoint, "x")._replace(uri="s3://not-here/x").open()
    for use in (missing.names, lambda: missing.put("blob", [b"x"], 1), lambda: missing.remove("blob")):
        with pytest.raises(TargetError, match="not-here"):
            use()


def test_passphrases_are_seen_nowhere(programs_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the arguments or the environment of any process that runs while a blob is stored, nor in errors. What the
    environment says of another repository is in nobody's way."""
    for name in ("BORG_PASSPHRASE", "BORG_PASSCOMMAND", "RESTIC_PASSWORD", "RESTIC_PASSWORD_COMMAND"):
        monkeypatch.setenv(name, "echo of-another")
    seen: list[bytes] = []

    def looking() -> Iterator[bytes]:
        yield bytes(MIB)
        time.sleep(0.7)  # until the command that Borg starts runs
        for process in Path("/proc").glob("[0-9]*"):
            for file in ("cmdline", "environ"):
                try:
                    seen.append((process / file).read_bytes())
                except OSError:  # it has ended, or is not ours
                    continue
        yield bytes(MIB)

    target = programs_store.open()
    target.put("blob", looking(), 2 * MIB)
    assert any(b"blob" in text for text in seen)
    assert not any(PASSPHRASE.encode() in text for text in seen)
    assert PASSPHRASE not in repr(vars(target))
    wrong = programs_store._replace(options={"passphrase": "wrong-" + PASSPHRASE})
    with pytest.raises(TargetError, match=r"(list|snapshots) failed \(exit status") as refused:
        wrong.open().names()
    assert PASSPHRASE not in str(refused.value)


def test_a_killed_backup_leaves_no_half_archive_in_borg(tmp_path: Path) -> None:
    store = borg_repository(tmp_path)
    _put_and_be_killed(store)
    target = store.open()
    assert target.names() == []  # waits for Borg, which has the lock until it has given up
    target.put("blob", [b"whole"], 5)
    assert b"".join(target.get("blob")) == b"whole"


def test_what_a_killed_backup_leaves_in_restic_is_replaced(tmp_path: Path) -> None:
    store = restic_repository(tmp_path)
    _put_and_be_killed(store)
    target = store.open()
    target.put("blob", [b"whole"], 5)
    assert b"".join(target.get("blob")) == b"whole"
    assert target.names() == ["blob"]


def _put_and_be_killed(store: Store) -> None:
    """In the middle of a blob."""
    code = (
        "import os, signal, time, sys\n"
        "from tests.support.stores import Store\n"
        "def chunks():\n"
        "    yield bytes(1 << 20)\n"
        "    time.sleep(1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Store(*eval(sys.stdin.read())).open().put('blob', chunks(), 2 << 20)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code], input=repr(tuple(store)), text=True, cwd=ROOT, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def test_restic_leaves_no_lock_when_the_disk_cannot_be_read(tmp_path: Path) -> None:
    store = restic_repository(tmp_path)

    def failing() -> Iterator[bytes]:
        yield bytes(MIB)
        time.sleep(1)
        raise KeyError("unreadable")

    with pytest.raises(KeyError, match="unreadable"):
        store.open().put("blob", failing(), 2 * MIB)
    assert not os.listdir(tmp_path / "restic" / "locks")
    assert not os.listdir(tmp_path / "restic" / "snapshots")


def test_a_warning_of_borg_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here from a Borg that stores everything and has something to say about it."""
    store = borg_repository(tmp_path)
    wrapper = tmp_path / "bin" / "borg"
    wrapper.parent.mkdir()
    warning = 'if [ "$3" = create ]; then echo "file changed" >&2; exit 1; fi'
    wrapper.write_text(f'#!/bin/sh\nPATH="${{PATH#*:}}"\nborg "$@" || exit\n{warning}\n')
    wrapper.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
        with pytest.raises(TargetError, match=r"borg create failed \(exit status 1\): file changed"):
            store.open().put("blob", [b"content"], 7)
        with pytest.raises(TargetError, match=r"borg create failed \(exit status 1\): file changed"):
            store.open().publish("blob", b"content")
    assert store.open().names() == []


def test_other_archives_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = borg_repository(tmp_path)
    with monkeypatch.context() as patched:
        patched.setenv("BORG_PASSPHRASE", PASSPHRASE)
        subprocess.run(["borg", "create", f"{tmp_path}/borg::home", __file__], check=True, capture_output=True)
    store.open().remove("home")
    assert store.open().names() == []
    with monkeypatch.context() as patched:
        patched.setenv("BORG_PASSPHRASE", PASSPHRASE)
        listed = subprocess.run(["borg", "list", "--short", f"{tmp_path}/borg"], capture_output=True, check=True)
    assert listed.stdout == b"home\n"


@pytest.mark.parametrize("scheme", ["borg", "restic"])
def test_a_program_that_is_not_here_is_named(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetError, match=f"the program {scheme} is not installed here"):
        Store(f"{scheme}:{tmp_path}", {}).open().names()


def test_vendor_like_targets_are_short() -> None:
    for name in ("directory", "borg", "restic", "s3"):
        lines = Path(targets.__file__).with_name(f"{name}.py").read_text().splitlines()
        assert len(lines) < 100, name


def test_a_password_in_a_place_is_no_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As arguments everybody would see it. restic reads it, once, from where it is told to."""
    said, fake = tmp_path / "said", tmp_path / "restic"
    fake.write_text(f'#!/bin/sh\necho "$@" > {said}\ncat "${{2#--repository-file=}}" >> {said}\necho []\n')
    fake.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    target = targets.open_target("restic:rest:https://me:hunter2@host/", {}, lambda *_: Secret(b"x"))
    assert target is not None
    assert target.names() == []
    arguments, place = said.read_text().splitlines()
    assert "hunter2" not in arguments
    assert place == "rest:https://me:hunter2@host/"
