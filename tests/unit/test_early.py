"""Writing early changes nothing but when it happens, and is asked for where it pays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcow2_plugin.storage import early
from qcow2_plugin.storage.early import EarlyWriting
from qcow2_plugin.storage.file import FileStorage

MIB = 1 << 20


@pytest.fixture
def storage(tmp_path: Path) -> FileStorage:
    return FileStorage(os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT), "file")


def test_some_at_a_time_is_asked_for(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(early, "_sync_file_range", lambda _fd, start, length, _how: asked.append((start, length)))
    writing = EarlyWriting(storage)
    for offset in (0, 4, 5, 40, 100):
        writing.wrote(offset * MIB, 3 * MIB)
    assert asked == [(0, 8 * MIB)]
    writing.wrote(103 * MIB, 20 * MIB)
    assert asked == [(0, 8 * MIB), (40 * MIB, 83 * MIB)]
    storage.close()


def test_what_was_written_is_there(storage: FileStorage) -> None:
    writing = EarlyWriting(storage)
    for offset in range(0, 24 * MIB, MIB):
        storage.write_from(b"x" * MIB, offset)
        writing.wrote(offset, MIB)
    storage.barrier()
    assert storage.pread(24 * MIB, 0) == b"x" * 24 * MIB
    storage.close()


def test_it_is_a_hint_that_never_fails(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.close()
    EarlyWriting(storage).wrote(0, 8 * MIB)
    monkeypatch.setattr(early, "_sync_file_range", None)
    EarlyWriting(storage).wrote(0, 8 * MIB)
