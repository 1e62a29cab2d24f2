"""Backups of images that claim more than there is: little time and memory before the first byte is moved."""

from __future__ import annotations

import struct
import time
import tracemalloc
from itertools import islice
from pathlib import Path

import pytest

from qcow2_plugin import open_image
from qcow2_plugin.errors import CorruptImageError, OptionError, TruncatedImageError
from qcow2_plugin.operations.changes import ChangeCounts, changes, estimate
from qcow2_plugin.operations.content_digest import content_digest
from qcow2_plugin.operations.write_member import member_chunks, write_member
from tests.support.builder import ImageBuilder, huge_empty, patch, shared_l2_bomb

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hostile.qcow2"


def test_64_tib_in_12_mib(path: Path) -> None:
    """What it claims is what a member would hold; whoever takes only a part of it pays for that."""
    shared_l2_bomb(path)
    tracemalloc.start()
    start = time.process_time()
    with open_image(path) as image:
        assert estimate(image, None) == ChangeCounts(64 * TIB, 0, 0, 0)
        size, chunks = member_chunks(image, changes(image, None), virtual_size=image.virtual_size)
        assert size > 64 * TIB
        assert len(list(islice(chunks, 50))) == 50
        chunks.close()
    assert time.process_time() - start < 10
    assert tracemalloc.get_traced_memory()[1] < 128 * MIB
    tracemalloc.stop()


def test_the_largest_disk_there_is(path: Path, tmp_path: Path) -> None:
    huge_empty(path)
    with open_image(path) as image:
        size = image.virtual_size
        assert estimate(image, None).dirty_hole == size
        with pytest.raises(OptionError, match="larger clusters"):
            write_member(image, changes(image, None), tmp_path / "member", virtual_size=size)
        written = write_member(
            image, changes(image, None), tmp_path / "member", virtual_size=size, cluster_size=2 * MIB
        )
        assert written.read == 0
        with open_image(tmp_path / "member") as member:
            assert content_digest(member).root == content_digest(image).root


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_an_entry_that_cannot_be_leaves_no_member(compression: str | None, path: Path, tmp_path: Path) -> None:
    built = ImageBuilder(MIB).data(1, b"a").data(9, b"b").build(path)
    patch(path, built.l2_entry_offset(9), struct.pack(">Q", 1 << 63 | 0x12345600))
    with open_image(path) as image, pytest.raises((CorruptImageError, TruncatedImageError)):
        write_member(image, changes(image, None), tmp_path / "member", virtual_size=MIB, compression=compression)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_stream_that_is_none_leaves_no_member(compression: str | None, path: Path, tmp_path: Path) -> None:
    """It is met when the data are read, with half of the file written."""
    built = ImageBuilder(MIB).data(1, b"a").compressed(9, b"b").build(path)
    patch(path, built.data_offsets[9], b"\xff" * 16)
    with open_image(path) as image:
        with pytest.raises(CorruptImageError, match="compressed cluster"):
            write_member(image, changes(image, None), tmp_path / "member", virtual_size=MIB, compression=compression)
        with pytest.raises(CorruptImageError, match="compressed cluster"):
            content_digest(image)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
