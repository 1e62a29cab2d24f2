"""The image file as a writer sees it: no structure is written into another's place, and some failures are final."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import numpy as np
import pytest

from qcow2_plugin.engine import image_file as module
from qcow2_plugin.engine.header import read_header
from qcow2_plugin.engine.image_file import ImageFile, MetadataMap, Structure
from qcow2_plugin.engine.metadata import read_metadata
from qcow2_plugin.errors import CorruptImageError, FailedImageError, TruncatedImageError
from qcow2_plugin.storage import Buffer
from tests.support.builder import BuiltImage, ImageBuilder
from tests.support.recording import Action, Log, RecordingStorage


class Storage(RecordingStorage):
    """Fails where a test wants it."""

    fails_barriers = False
    written_before_error: int | None = None
    """Bytes of the next write that arrive before it fails; None lets it pass."""
    fails_reads = False

    def write_from(self, buffer: Buffer, host_offset: int) -> None:
        if self.written_before_error is None:
            super().write_from(buffer, host_offset)
            return
        super().write_from(bytes(buffer)[: self.written_before_error], host_offset)
        raise OSError(errno.EIO, "broken")

    def pread(self, length: int, host_offset: int) -> bytes:
        if self.fails_reads:
            raise OSError(errno.EIO, "broken")
        return super().pread(length, host_offset)

    def barrier(self) -> None:
        if self.fails_barriers:
            raise OSError(errno.EIO, "broken")
        super().barrier()


def opened(tmp_path: Path, told: ImageBuilder | None = None) -> tuple[ImageFile, Storage, BuiltImage]:
    built = (told or ImageBuilder(1 << 20, 9).data(0, b"x").data(100, b"y")).build(tmp_path / "image.qcow2")
    storage = Storage(Log(), 0, built.path.read_bytes(), "image.qcow2")
    header = read_header(storage)
    return ImageFile(storage, header, read_metadata(storage, header)), storage, built


# ---- the firewall


def test_a_structure_is_written_where_it_is(tmp_path: Path) -> None:
    file, storage, built = opened(tmp_path)
    file.write(Structure.L2_TABLE, b"abc", built.l2_offsets[0] + 509)
    assert storage.content[built.l2_offsets[0] + 509 : built.l2_offsets[0] + 512] == b"abc"
    file.write(Structure.L2_TABLE, b"", 0)
    assert file.failure is None


@pytest.mark.parametrize("length", [4, 5])
@pytest.mark.parametrize("structure", list(Structure))
def test_a_structure_is_not_written_over_anything_else(tmp_path: Path, structure: Structure, length: int) -> None:
    """A write that reaches over the end of an L2 table by one byte, and one that does not begin there."""
    file, storage, built = opened(tmp_path)
    content = bytes(storage.content)
    place = max(built.l2_offsets.values()) + 508
    if structure is Structure.L2_TABLE and length == 4:
        file.write(structure, b"1234", place)
        return
    with pytest.raises(CorruptImageError, match=rf"{structure.title} at host offset {place:#x}: would be written over"):
        file.write(structure, b"12345"[:length], place)
    assert storage.content[:72] + storage.content[80:] == content[:72] + content[80:]
    assert storage.content[79] == content[79] | 2
    assert read_header(storage).corrupt
    assert storage.log.calls[-1].action is Action.BARRIER
    with pytest.raises(FailedImageError, match=r"since it is corrupt: .* would be written over .*\(image.qcow2\)"):
        file.require_writable()


def test_an_image_is_marked_once_and_keeps_its_first_reason(tmp_path: Path) -> None:
    file, storage, _ = opened(tmp_path)
    first = file.corrupt("L2 table", "is bad", 512)
    second = file.corrupt("L1 table", "is worse")
    assert (str(first), str(second)) == (
        "L2 table at host offset 0x200: is bad (image.qcow2)",
        "L1 table: is worse (image.qcow2)",
    )
    assert file.failure == "it is corrupt: L2 table is bad"
    assert [call.offset for call in storage.log.calls if call.length] == [72]


def test_an_error_while_marking_does_not_hide_what_is_wrong(tmp_path: Path) -> None:
    file, storage, _ = opened(tmp_path)
    storage.written_before_error = 0
    assert isinstance(file.corrupt("L2 table", "is bad"), CorruptImageError)
    assert file.failure is not None


# ---- the header


def test_header_fields_change_in_one_narrow_write(tmp_path: Path) -> None:
    file, storage, _ = opened(tmp_path)
    before = bytes(storage.content)
    file.update_header(size=3 << 20)
    file.update_header(l1_size=1 << 20, l1_table_offset=1 << 30)
    file.update_header(refcount_table_offset=1 << 31, refcount_table_clusters=77)
    file.update_header(autoclear_features=1 << 40)
    file.update_header(size=3 << 20)
    calls = [(call.offset, call.offset + call.length) for call in storage.log.calls]
    bounds = [(24, 32), (36, 48), (48, 60), (88, 96)]
    assert len(calls) == len(bounds)
    assert all(start <= first < end <= stop for (first, end), (start, stop) in zip(calls, bounds, strict=True))
    assert read_header(storage) == file.header
    assert (file.header.size, file.header.l1_size, file.header.refcount_table_clusters) == (3 << 20, 1 << 20, 77)
    assert storage.content[104:] == before[104:]


def test_the_header_of_an_old_image_has_no_feature_bits(tmp_path: Path) -> None:
    file, storage, _ = opened(tmp_path, ImageBuilder(1 << 20, 9, version=2).data(0, b"x"))
    before = bytes(storage.content)
    file.update_header(size=3 << 10)
    assert storage.content[:24] + storage.content[32:] == before[:24] + before[32:]
    assert read_header(storage) == file.header


@pytest.mark.parametrize(("arrived", "is_final"), [(0, False), (1, True)])
def test_a_header_that_may_be_half_written_is_final(tmp_path: Path, arrived: int, is_final: bool) -> None:
    file, storage, _ = opened(tmp_path)
    header = file.header
    storage.written_before_error = arrived
    with pytest.raises(OSError, match="broken"):
        file.update_header(size=0x123456789A00)
    assert file.header == header
    assert (file.failure is not None) == is_final


def test_a_header_that_cannot_be_looked_at_after_an_error_is_final(tmp_path: Path) -> None:
    file, storage, _ = opened(tmp_path)
    storage.written_before_error, storage.fails_reads = 0, True
    with pytest.raises(OSError, match="broken"):
        file.update_header(size=1024)
    assert file.failure == "the header could not be written (broken)"


# ---- the latch


def test_a_failed_barrier_is_final(tmp_path: Path) -> None:
    file, storage, _ = opened(tmp_path)
    file.require_writable()
    file.barrier()
    storage.fails_barriers = True
    with pytest.raises(OSError, match="broken"):
        file.barrier()
    storage.fails_barriers = False
    file.barrier()
    with pytest.raises(FailedImageError, match=r"could not be made durable \(broken\); close the image, check it"):
        file.require_writable()


def test_a_failed_barrier_of_the_data_file_is_final_too(tmp_path: Path) -> None:
    file, _, _ = opened(tmp_path)
    data = Storage(Log(), 0, b"")
    file.barrier(data)
    assert [call.action for call in data.log.calls] == [Action.BARRIER]
    data.fails_barriers = True
    with pytest.raises(OSError, match="broken"):
        file.barrier(data)
    assert file.failure is not None


def test_a_file_that_others_cut_short_takes_no_more_changes(tmp_path: Path) -> None:
    file, storage, _ = opened(tmp_path)
    size = storage.size()
    file.require_uncut()
    storage.content.extend(bytes(512))
    file.require_uncut()
    file.truncate(size)
    file.require_uncut()
    file.truncate(size + 512)
    del storage.content[-1:]
    with pytest.raises(TruncatedImageError, match=f"is {size + 511} bytes long now and was {size + 512}"):
        file.require_uncut()
    with pytest.raises(FailedImageError, match="another program has cut the file short"):
        file.require_writable()


# ---- the map


def test_a_cluster_belongs_to_one_structure() -> None:
    parts = [
        (Structure.HEADER, np.array([0])),
        (Structure.L2_TABLE, np.array([5, 7])),
        (Structure.BITMAP, np.array([7])),
    ]
    with pytest.raises(ValueError, match="cluster 7 belongs to the L2 table and the bitmap"):
        MetadataMap(parts)


@pytest.mark.parametrize("limit", [0, 3, 4096])
def test_the_map_is_a_dictionary(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(module, "_MAX_CHANGES", limit)
    chance = random.Random(limit)
    initial = sorted(chance.sample(range(1, 100), 30))
    kept = [*initial[:5], 200]
    known = MetadataMap(
        [
            (Structure.HEADER, np.array([0])),
            (Structure.L2_TABLE, np.array(initial)),
            (Structure.SNAPSHOT_L2_TABLE, np.array([200])),
        ],
        np.array(kept),
    )
    expected: dict[int, int] = {0: 1, 200: Structure.SNAPSHOT_L2_TABLE, **dict.fromkeys(initial, Structure.L2_TABLE)}
    for _ in range(300):
        first, count = chance.randrange(1, 100), chance.randrange(1, 8)
        if chance.random() < 0.5:
            structure = chance.choice([Structure.L1_TABLE, Structure.BITMAP])
            known.claim(structure, first, count)
            expected |= dict.fromkeys(range(first, first + count), structure)
        else:
            known.release(range(first, first + count))
            for cluster in range(first, first + count):
                if expected.pop(cluster, 0) and cluster in kept:
                    expected[cluster] = Structure.SNAPSHOT_L2_TABLE
        assert [known.owner(cluster) for cluster in range(250)] == [expected.get(cluster, 0) for cluster in range(250)]
        asked = np.array(chance.sample(range(250), 20))
        assert known.among(asked).tolist() == [cluster in expected for cluster in asked.tolist()]
        first, count = chance.randrange(250), chance.randrange(30)
        found = [cluster for cluster in range(first, first + count) if cluster in expected]
        assert known.first_in(first, count) == min(found, default=None)
