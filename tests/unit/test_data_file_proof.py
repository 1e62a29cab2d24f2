"""Looks at data files: where the first byte is that nobody sees, where two files first differ; holes are not read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qcow2_plugin import create_image, open_image
from qcow2_plugin.engine import data_file_proof
from qcow2_plugin.engine.data_file_proof import difference, first_byte, first_difference, first_hidden
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.opener import open_given
from tests.support.memory_storage import MemoryStorage

MIB = 1 << 20


def test_the_first_byte() -> None:
    content = bytearray(3 * MIB)
    assert first_byte(MemoryStorage(content), 0, 4 * MIB) is None
    for place in (3 * MIB - 1, 2 * MIB, MIB - 1, 1, 0):
        content[place] = 1
        storage = MemoryStorage(content)
        assert first_byte(storage, 0, 4 * MIB) == place
        assert first_byte(storage, place, 1) == place
        assert first_byte(storage, 0, place) is None


def test_the_first_difference() -> None:
    chance = random.Random(1)
    content = chance.randbytes(2 * MIB) + bytes(MIB) + b"end"
    assert first_difference(MemoryStorage(content), MemoryStorage(content + bytes(500)), 0, 5 * MIB) is None
    for place in (0, 5, MIB - 1, MIB, 2 * MIB + 7, 3 * MIB + 2, 3 * MIB + 100):
        changed = bytearray(content.ljust(4 * MIB, b"\0"))
        changed[place] ^= 0x10
        for one, other in ((content, changed), (changed, content)):
            assert first_difference(MemoryStorage(one), MemoryStorage(other), 0, 5 * MIB) == place
            assert first_difference(MemoryStorage(one), MemoryStorage(other), 0, place) is None


def test_a_string_that_is_shorter_goes_on_with_zeros() -> None:
    assert difference(b"abc", b"abc\0\0") is None
    assert difference(b"abc\0x", b"abc") == 4
    assert difference(b"", b"") is None


def test_holes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of 4 TiB with a little of everything, in no time."""
    create_image(tmp_path / "disk.qcow2", 4 << 40, data_file=tmp_path / "disk.raw", cluster_size=2 * MIB)
    with open_image(tmp_path / "disk.qcow2", writable=True) as image:
        image.pwrite(b"x", 3 << 40)
        image.write_zeroes(1 << 40, 1 << 30)
    counts: list[int] = []
    pread = FileStorage.pread

    def counted(storage: FileStorage, length: int, offset: int) -> bytes:
        counts.append(length)
        return pread(storage, length, offset)

    with open_image(tmp_path / "disk.qcow2") as image:
        told: list[tuple[int, int]] = []
        monkeypatch.setattr(FileStorage, "pread", counted)
        assert first_hidden(image, lambda done, total: told.append((done, total))) is None
    assert sum(counts) <= 64 * MIB
    assert told == sorted(told)
    assert told[-1] == (4 << 40, 4 << 40)


def test_a_byte_that_nobody_sees(tmp_path: Path) -> None:
    create_image(tmp_path / "disk.qcow2", 8 * MIB, data_file=tmp_path / "disk.raw")
    with open(tmp_path / "disk.raw", "r+b") as stream:
        stream.seek(5 * MIB + 3)
        stream.write(b"!")
    with open_image(tmp_path / "disk.qcow2") as image:
        assert first_hidden(image) == 5 * MIB + 3
    storage = open_given(tmp_path / "disk.raw")
    assert sum(len(piece) for _, piece in data_file_proof.data_pieces(storage, 0, 8 * MIB)) <= MIB
    storage.close()
