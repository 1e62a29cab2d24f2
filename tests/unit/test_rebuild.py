"""Refcounts counted anew from the tables, and dirty images that are put right by them, in spite of crashes."""

from __future__ import annotations

import errno
import itertools
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qcow2_plugin.engine.allocator import Allocator
from qcow2_plugin.engine.checking import references as references_module
from qcow2_plugin.engine.header import read_header
from qcow2_plugin.engine.image_file import ImageFile
from qcow2_plugin.engine.metadata import read_metadata
from qcow2_plugin.engine.repairing import repair_refcounts
from qcow2_plugin.engine.repairing.rebuild import count_references, rebuild_refcounts
from qcow2_plugin.errors import CorruptImageError, TruncatedImageError, UnsupportedFeatureError
from qcow2_plugin.storage import Buffer
from tests.support.builder import BuiltImage, ImageBuilder, shared_l2_bomb
from tests.support.crash_states import Crashes
from tests.support.fields import COPIED
from tests.support.image_checker import check_image
from tests.support.recording import Action, Log, RecordingStorage

NOISE = random.Random(1).randbytes(1 << 16)


class Storage(RecordingStorage):
    """`writes_left` until one fails."""

    writes_left: int | None = None

    def write_from(self, buffer: Buffer, host_offset: int) -> None:
        if self.writes_left is not None:
            self.writes_left -= 1
            if self.writes_left < 0:
                raise OSError(errno.ENOSPC, "full")
        super().write_from(buffer, host_offset)


def build(tmp_path: Path, told: ImageBuilder) -> tuple[bytes, BuiltImage]:
    built = told.build(tmp_path / "image.qcow2")
    return built.path.read_bytes(), built


def stored(content: bytes) -> Storage:
    return Storage(Log(), 0, content)


def file_of(storage: Storage) -> ImageFile:
    header = read_header(storage)
    return ImageFile(storage, header, read_metadata(storage, header))


def rebuild(storage: Storage) -> None:
    file = file_of(storage)
    rebuild_refcounts(file, Allocator(file))
    assert file.header == read_header(storage)


def plain(cluster_bits: int, refcount_bits: int = 16, *, extended_l2: bool = False) -> ImageBuilder:
    size = 1 << cluster_bits
    image = ImageBuilder(200 * size, cluster_bits, refcount_bits=refcount_bits, extended_l2=extended_l2)
    image.data(0, b"a").data(70, b"b").data(199, b"c").zero(3).zero(4, preallocated=True).l2_table(1)
    if extended_l2:
        image.subclusters(9, NOISE[:size], allocated=0xFF, zero=0xF00).subclusters(10, b"", allocated=0, zero=1)
    return image


def compressed(cluster_bits: int, refcount_bits: int = 16) -> ImageBuilder:
    image = plain(cluster_bits, refcount_bits)
    for cluster in range(20, 40):
        image.compressed(cluster, NOISE[cluster : cluster + (1 << cluster_bits) * 2 // 3])
    return image


def rich(cluster_bits: int) -> ImageBuilder:
    """Everything that can refer to a cluster, some of it twice."""
    image = compressed(cluster_bits)
    own = image.map(virtual_size=100 << cluster_bits)
    own.data(1, b"own").compressed(2, NOISE[:300]).zero(5, preallocated=True)
    image.snapshot(b"1", b"shares everything").snapshot(b"2", b"has its own", own).snapshot(b"3", b"shares again")
    image.bitmap(b"usable", [(0, 1), (150 << cluster_bits, 1)], granularity_bits=9, flags=2)
    return image.bitmap(b"in use", [(0, 1)], granularity_bits=9, flags=3)


KINDS: dict[str, Callable[[], ImageBuilder]] = {
    "plain": lambda: plain(9),
    "large clusters": lambda: plain(16),
    "1 bit": lambda: plain(9, 1),
    "4 bits": lambda: plain(9, 4),
    "64 bits": lambda: plain(9, 64),
    "subclusters": lambda: plain(14, extended_l2=True),
    "compressed": lambda: compressed(12),
    "compressed, small": lambda: compressed(9),
    "compressed, 8 bits": lambda: compressed(12, 8),
    "one stream alone": lambda: ImageBuilder(1 << 20, 12).compressed(3, b"y"),
    "everything": lambda: rich(9),
    "everything, 4 KiB": lambda: rich(12),
    "version 2": lambda: ImageBuilder(1 << 20, 9, version=2).data(0, b"x").compressed(7, b"y"),
}


def refcounts(content: bytes, built: BuiltImage, refcount_bits: int) -> list[int]:
    """What the blocks say, by the format alone."""
    per_block = built.cluster_size * 8 // refcount_bits
    counts = [0] * -(-len(content) // built.cluster_size)
    for slot, place in built.refcount_block_offsets.items():
        block = int.from_bytes(content[place : place + built.cluster_size], "little")
        for index in range(min(per_block, len(counts) - slot * per_block)):
            bits = block >> index * refcount_bits & (1 << refcount_bits) - 1
            wide = bits.to_bytes(max(refcount_bits // 8, 1), "little")
            counts[slot * per_block + index] = int.from_bytes(wide, "big")
    return counts


# ---- counting


@pytest.mark.parametrize("kind", KINDS)
def test_references_are_those_that_the_refcounts_of_a_sound_image_tell(tmp_path: Path, kind: str) -> None:
    told = KINDS[kind]()
    content, built = build(tmp_path, told)
    storage = stored(content)
    found = count_references(storage, read_header(storage))
    assert found.tolist() == refcounts(content, built, told.refcount_bits)
    assert found.max() > 1 or "everything" not in kind


def test_a_data_file_is_not_counted(tmp_path: Path) -> None:
    image = ImageBuilder(1 << 20, 9).data_file(tmp_path / "data", b"data").data(0, b"x").data(70, b"y")
    content, built = build(tmp_path, image)
    storage = stored(content)
    assert count_references(storage, read_header(storage)).tolist() == refcounts(content, built, 16)


def test_one_table_for_all_is_counted_as_often_as_it_is_named(tmp_path: Path) -> None:
    built = shared_l2_bomb(tmp_path / "bomb.qcow2", 16 << 40)
    storage = stored(built.path.read_bytes())
    header = read_header(storage)
    references = count_references(storage, header)
    assert references[built.l2_offsets[0] >> 21] == header.l1_size == 32
    assert references[built.data_offsets[0] >> 21] == 32 << 18


def test_an_entry_between_clusters_counts_for_both(tmp_path: Path) -> None:
    content, built = build(tmp_path, plain(12))
    before = stored(content)
    place = built.data_offsets[0] + 512
    struct.pack_into(">Q", before.content, built.l2_entry_offset(50), place)
    found = count_references(before, read_header(before))
    expected = refcounts(content, built, 16)
    expected[place >> 12] += 1
    expected[(place >> 12) + 1] += 1
    assert found.tolist() == expected


@pytest.mark.parametrize("word", [1 << 40, 1 << 62 | 1 << 40, 1 << 62 | 15 << 58 | 0x10000])
def test_references_past_the_end_of_the_file_cannot_be_counted(tmp_path: Path, word: int) -> None:
    content, built = build(tmp_path, plain(12))
    storage = stored(content)
    if word & 0x10000:  # a stream that begins in the last cluster and runs past it
        word += len(content) - 4096 - 0x10000
    struct.pack_into(">Q", storage.content, built.l2_entry_offset(50), word)
    message = r"L2 table at host offset 0x[0-9a-f]+: .* past the end of the file \(memory\)"
    with pytest.raises(TruncatedImageError, match=message):
        count_references(storage, read_header(storage))


def test_a_last_cluster_that_the_file_ends_in_is_counted(tmp_path: Path) -> None:
    """As a compressed cluster leaves it."""
    image = ImageBuilder(1 << 20, 12).data(0, b"x")
    place = len(build(tmp_path, image)[0])
    content, built = build(tmp_path, image.compressed(7, b"y", host_offset=place))
    storage = stored(content[: place + 512])
    assert built.data_offsets[7] == place
    assert count_references(storage, read_header(storage))[place >> 12] == 1


def test_files_that_are_too_large_to_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = stored(build(tmp_path, plain(12))[0])
    monkeypatch.setattr(references_module, "MAX_CLUSTERS", storage.size() >> 12)
    count_references(storage, read_header(storage))
    storage.content.append(0)
    with pytest.raises(UnsupportedFeatureError, match=r"too many to count the references to them \(memory\)"):
        count_references(storage, read_header(storage))


# ---- rebuilding


def scrambled(content: bytes, built: BuiltImage, refcount_bits: int, *, flags: bool = True) -> bytes:
    """A dirty image with noise for refcounts, and with COPIED flags that are all the other way round."""
    damaged = bytearray(content)
    damaged[79] |= 1
    for place in built.refcount_block_offsets.values():
        damaged[place : place + built.cluster_size] = random.Random(place).randbytes(built.cluster_size)
    if flags:
        flip(damaged, [built.l1_entry_offset(index) for index in built.l2_offsets])
        normal = [cluster for cluster, place in built.data_offsets.items() if place % built.cluster_size == 0]
        flip(damaged, [place for place in map(built.l2_entry_offset, normal) if not damaged[place] & 0x40])
    return bytes(damaged)


def flip(content: bytearray, places: list[int]) -> None:
    for place in places:
        content[place] ^= 0x80


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "version 2"])
def test_a_rebuild_makes_a_damaged_image_what_it_was(tmp_path: Path, kind: str) -> None:
    told = KINDS[kind]()
    content, built = build(tmp_path, told)
    storage = stored(scrambled(content, built, told.refcount_bits))
    rebuild(storage)
    assert storage.content == content


def test_a_rebuild_of_what_is_right_clears_the_dirty_bit_and_no_more(tmp_path: Path) -> None:
    content, _ = build(tmp_path, rich(9))
    storage = stored(content[:79] + b"\x01" + content[80:])
    rebuild(storage)
    assert storage.content == content
    assert [(call.action, call.offset) for call in storage.log.calls if call.length] == [(Action.WRITE, 79)]
    assert storage.log.calls[-1].action is Action.BARRIER


def test_a_data_file_keeps_its_flags(tmp_path: Path) -> None:
    """There COPIED says that a cluster is allocated; that of guest cluster 0 says nothing else."""
    image = ImageBuilder(1 << 20, 9).data_file(tmp_path / "data", b"data").data(0, b"x").data(70, b"y")
    content, built = build(tmp_path, image)
    damaged = bytearray(scrambled(content, built, 16, flags=False))
    flip(damaged, [built.l1_entry_offset(1)])
    storage = stored(bytes(damaged))
    rebuild(storage)
    assert storage.content == content


def test_refcounts_of_what_lies_behind_the_file_are_cleared(tmp_path: Path) -> None:
    image = plain(9, 64)
    content, built = build(
        tmp_path, plain(9, 64).refcount(3000, 7).refcount(len(build(tmp_path, image)[0]) // 512 + 5, 1)
    )
    assert check_image(content).leaks_behind_end
    storage = stored(content[:79] + b"\x01" + content[80:])
    rebuild(storage)
    report = check_image(storage.content)
    assert report.is_sound and not report.all_leaks
    assert len(built.refcount_block_offsets) > 1


def test_a_missing_refcount_block_is_added(tmp_path: Path) -> None:
    content, built = build(tmp_path, plain(9, 64).data(150, b"far", host_offset=400 * 512))
    damaged = bytearray(scrambled(content, built, 64))
    struct.pack_into(">Q", damaged, built.refcount_table_offset + 8 * (400 // 64), 0)
    storage = stored(bytes(damaged))
    rebuild(storage)
    report = check_image(storage.content)
    assert report.is_sound and not report.all_leaks
    assert len(storage.content) <= len(content)


def test_shared_tables_lose_their_flags(tmp_path: Path) -> None:
    """Two L1 entries for one L2 table: neither it nor anything in it may be written in place."""
    content, built = build(tmp_path, ImageBuilder(4 << 15, 9).data(0, b"x").data(1, b"y"))
    damaged = bytearray(content)
    damaged[79] |= 1
    struct.pack_into(">Q", damaged, built.l1_entry_offset(1), built.l2_offsets[0] | COPIED)
    storage = stored(bytes(damaged))
    rebuild(storage)
    entries = [*range(built.l1_offset, built.l1_offset + 16, 8), *map(built.l2_entry_offset, (0, 1))]
    assert not any(storage.content[place] & 0x80 for place in entries)
    allocator = Allocator(file_of(storage))
    places = np.array([built.l2_offsets[0], *built.data_offsets.values()]) >> 9
    assert allocator.refcounts_of(places).tolist() == [2, 2, 2]


@pytest.mark.parametrize("refcount_bits", [1, 2])
def test_more_references_than_a_refcount_can_say_change_nothing(tmp_path: Path, refcount_bits: int) -> None:
    content, built = build(tmp_path, ImageBuilder(4 << 15, 9, refcount_bits=refcount_bits).data(0, b"x"))
    damaged = bytearray(content)
    damaged[79] |= 1
    for index in range(4):
        struct.pack_into(">Q", damaged, built.l1_entry_offset(index), built.l2_offsets[0])
    storage = stored(bytes(damaged))
    with pytest.raises(
        CorruptImageError,
        match=r"refers to cluster \d+, which has the [13] references already that a refcount can count.*\(memory\)",
    ):
        rebuild(storage)
    assert storage.content == damaged


def test_data_is_not_taken_for_a_table_whose_flags_are_wrong(tmp_path: Path) -> None:
    content, built = build(tmp_path, ImageBuilder(2 << 15, 9).data(0, bytes(512)))
    damaged = bytearray(content)
    damaged[79] |= 1
    struct.pack_into(">Q", damaged, built.l1_entry_offset(1), built.data_offsets[0])
    storage = stored(bytes(damaged))
    with pytest.raises(CorruptImageError, match="is where something else is, too"):
        rebuild(storage)
    assert storage.content == damaged


def test_an_image_that_cannot_be_counted_is_left_alone(tmp_path: Path) -> None:
    content, built = build(tmp_path, rich(9))
    damaged = bytearray(scrambled(content, built, 16))
    struct.pack_into(">Q", damaged, built.snapshots[1].l2_entry_offset(4), 1 << 40)
    storage = stored(bytes(damaged))
    with pytest.raises(TruncatedImageError):
        rebuild(storage)
    assert storage.content == damaged


def test_many_blocks_are_written_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair_refcounts, "_BLOCKS_AT_ONCE", 2)
    content, built = build(tmp_path, plain(9, 64).data(150, b"far", host_offset=400 * 512))
    storage = stored(scrambled(content, built, 64))
    rebuild(storage)
    assert storage.content == content


@pytest.mark.parametrize("kind", ["plain", "everything", "64 bits"])
def test_a_crash_at_any_time_leaves_an_image_that_can_be_rebuilt(tmp_path: Path, kind: str) -> None:
    told = KINDS[kind]()
    content, built = build(tmp_path, told)
    damaged = scrambled(content, built, told.refcount_bits)
    storage = stored(damaged)
    rebuild(storage)
    crashes = Crashes(storage.log, (damaged,))
    seen = set()
    for plan in crashes.plans():
        state = crashes.state(plan)
        if state.key in seen:
            continue
        seen.add(state.key)
        left = stored(bytes(state.files[0].content()))
        if read_header(left).dirty:
            rebuild(left)
        assert left.content == content, plan
    assert len(seen) > 20


def test_a_write_that_fails_leaves_the_image_dirty(tmp_path: Path) -> None:
    told = rich(9)
    content, built = build(tmp_path, told)
    for count in itertools.count():
        storage = stored(scrambled(content, built, told.refcount_bits))
        storage.writes_left = count
        file = file_of(storage)
        allocator = Allocator(file)
        try:
            rebuild_refcounts(file, allocator)
        except OSError:
            assert read_header(storage).dirty
            assert file.header.dirty
        else:
            break
        storage.writes_left = None
        rebuild_refcounts(file, allocator)  # with the same allocator, as the next request does
        assert storage.content == content
    assert count > 5
