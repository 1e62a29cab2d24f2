"""The record of a transaction as a file: when it is durable, and what is left when a call fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.errors import CorruptImageError, UnfinishedTransactionError
from qcow2_plugin.format.transaction import Record
from qcow2_plugin.operations.transaction_record import RecordFile
from qcow2_plugin.storage import directory

PREPARED = Record(bytes(16), False, ("a", "b"), "now")
COMMITTED = Record(bytes(16), True, ("a", "b"), "now")


@pytest.fixture
def file(tmp_path: Path) -> RecordFile:
    return RecordFile(str(tmp_path / "record"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the system, in order."""
    made: list[str] = []
    for name in ("write", "fsync", "replace", "unlink"):
        original: Callable[..., Any] = getattr(os, name)

        def call(*arguments: Any, name: str = name, original: Callable[..., Any] = original) -> Any:
            is_folder = name == "fsync" and os.path.isdir(f"/proc/self/fd/{arguments[0]}")
            made.append(f"{name} of the directory" if is_folder else name)
            return original(*arguments)

        monkeypatch.setattr(os, name, call)
    return made


def test_a_record_lives(file: RecordFile, calls: list[str], tmp_path: Path) -> None:
    file.create(PREPARED)
    assert file.read() == PREPARED
    assert calls == ["write", "fsync", "unlink", "fsync of the directory"]
    assert os.listdir(tmp_path) == ["record"]
    calls.clear()
    file.switch(COMMITTED)
    assert file.read() == COMMITTED
    assert calls == ["write", "fsync", "replace", "fsync of the directory"]
    calls.clear()
    (tmp_path / "record.new").touch()  # where a crash came before the replacement
    file.remove()
    assert calls == ["unlink", "unlink", "fsync of the directory"]
    assert not os.listdir(tmp_path)


def test_it_has_its_name_only_when_it_is_whole_and_durable(file: RecordFile, monkeypatch: pytest.MonkeyPatch) -> None:
    was_there: list[bool] = []
    original = os.fsync

    def fsync(fd: int) -> None:
        was_there.append(os.path.lexists(file.path))
        original(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    file.create(PREPARED)
    assert was_there == [False, True]


def test_what_a_crash_has_left_of_a_record_that_was_not_whole_goes(file: RecordFile, tmp_path: Path) -> None:
    Path(f"{file.path}.new").write_text("half a rec")
    file.create(PREPARED)
    assert file.read() == PREPARED
    assert os.listdir(tmp_path) == ["record"]


def test_nothing_is_written_over(file: RecordFile, tmp_path: Path) -> None:
    Path(file.path).write_text("mine")
    with pytest.raises(FileExistsError, match="record"):
        file.create(PREPARED)
    assert Path(file.path).read_text() == "mine"
    with pytest.raises(CorruptImageError, match="record"):
        file.read()
    (tmp_path / "record.new").write_text("mine too")
    with pytest.raises(FileExistsError):
        file.switch(COMMITTED)
    assert Path(file.path).read_text() == "mine"


def broken(*_: object) -> None:
    raise OSError(errno.EIO, "broken")


@pytest.mark.parametrize("name", ["write", "fsync"])
def test_one_that_cannot_be_made_is_not_there(
    file: RecordFile, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, name, broken)
    with pytest.raises(OSError, match="broken"):
        file.create(PREPARED)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["write", "fsync", "replace"])
def test_one_that_cannot_be_replaced_is_as_before(
    file: RecordFile, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.create(PREPARED)
    with monkeypatch.context() as patched:
        patched.setattr(os, name, broken)
        with pytest.raises(OSError, match="broken"):
            file.switch(COMMITTED)
    assert file.read() == PREPARED
    assert os.listdir(tmp_path) == ["record"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_once_it_is_replaced_a_failure_leaves_it_in_doubt(
    file: RecordFile, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.create(PREPARED)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(directory, "make_names_durable", fail)
    with pytest.raises(UnfinishedTransactionError, match="not known"):
        file.switch(COMMITTED)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "no answer"), KeyboardInterrupt()])
def test_a_replacement_that_happens_and_fails_leaves_it_in_doubt(
    file: RecordFile, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over a network: done, but the answer is lost."""
    file.create(PREPARED)
    replace = os.replace

    def fail(*names: str) -> None:
        replace(*names)
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UnfinishedTransactionError, match="not known"):
        file.switch(COMMITTED)


def test_a_write_may_be_done_in_parts(file: RecordFile, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    file.create(PREPARED)
    assert file.read() == PREPARED
