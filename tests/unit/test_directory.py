"""storage/directory: whose a name is, and taking it back."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qcow2_plugin.storage.directory import absolute_path, identity_of, make_names_durable, remove, temporary_name
from tests.support.watching import no_descriptor_left


def test_an_identity_is_that_of_the_file_whatever_its_name(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.touch()
    other.touch()
    os.link(path, tmp_path / "link")
    (tmp_path / "symlink").symlink_to("file")
    identity = identity_of(path)
    assert identity is not None
    assert identity == identity_of(tmp_path / "link") == identity_of(tmp_path / "symlink")
    assert identity != identity_of(other)
    for missing in (tmp_path / "none", path / "below"):
        assert identity_of(missing) is None


def test_an_absolute_path_leads_to_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ ".." behind a link is the parent of where it leads; a link that nothing depends on is kept."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/away")
    for name in ("file", "far/file", "far/away/file"):
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    for path, absolute in (
        ("file", "file"),
        ("./far//file", "far/file"),
        ("far/../file", "file"),
        ("link/file", "link/file"),
        ("link/../file", "far/file"),
        ("link/../away/./file", "far/away/file"),
        (f"{tmp_path}/link/../file", "far/file"),
        ("gone/../new", "new"),
        ("link/../new", "far/new"),
        ("a..b", "a..b"),
    ):
        assert absolute_path(path) == f"{tmp_path}/{absolute}"
        assert identity_of(path) in (identity_of(absolute_path(path)), None)


@pytest.mark.parametrize("name", ["disk.qcow2", "x" * 255, "\u00e4" * 127, "\udcff" * 255], ids=ascii)
def test_a_temporary_name_is_never_too_long(name: str, tmp_path: Path) -> None:
    temporary = temporary_name(f"{tmp_path}/{name}")
    (tmp_path / name).touch()
    with open(temporary, "x"):
        assert os.path.dirname(temporary) == str(tmp_path)
    assert temporary.endswith(".partial")
    assert os.path.basename(temporary).startswith(name[:10])
    assert temporary != temporary_name(f"{tmp_path}/{name}")


def test_a_name_is_removed_only_if_it_is_still_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    identity = identity_of(path)
    assert identity is not None
    path.rename(tmp_path / "renamed")
    path.write_text("of somebody else")
    remove(path, identity)
    assert path.read_text() == "of somebody else"
    path.unlink()
    remove(path, identity)
    remove(tmp_path / "renamed", identity)
    assert not list(tmp_path.iterdir())


def test_names_become_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    monkeypatch.chdir(tmp_path)
    with no_descriptor_left():
        make_names_durable("")
        make_names_durable("/")
    assert synced == [str(tmp_path), "/"]


@pytest.mark.parametrize(("number", "is_told"), [(errno.EINVAL, False), (errno.EIO, True), (errno.ENOSPC, True)])
def test_only_a_file_system_without_such_a_thing_is_forgiven(
    number: int, is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with no_descriptor_left():
        if not is_told:
            make_names_durable(str(tmp_path))
            return
        with pytest.raises(OSError) as caught:
            make_names_durable(str(tmp_path))
    assert caught.value.errno == number
