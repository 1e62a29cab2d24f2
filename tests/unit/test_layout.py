"""Is the file all there? Tables in place, and nothing cut off that the disk needs."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest

from qcow2_plugin.engine.header import read_header
from qcow2_plugin.engine.layout import check_complete, check_tables
from qcow2_plugin.errors import CorruptImageError, TruncatedImageError
from qcow2_plugin.storage.opener import open_given
from tests.support.builder import BuiltImage, ImageBuilder
from tests.support.headers import header_bytes
from tests.support.memory import MemoryStorage

CLUSTER = 65536


def tables(length: int = 8 * CLUSTER, **fields: int) -> MemoryStorage:
    """L1 table at cluster 3, refcount table at cluster 1, snapshot table (if any) at cluster 5."""
    header = header_bytes(**{"l1_size": 1, "snapshots_offset": 5 * CLUSTER, **fields})  # type: ignore[arg-type]
    return MemoryStorage(header.ljust(length, b"\0")[:length])


def check(storage: MemoryStorage) -> None:
    check_tables(read_header(storage), storage)


def test_tables_in_place() -> None:
    check(tables())
    check(tables(nb_snapshots=3))
    check(tables(size=0, l1_size=0, l1_table_offset=0))


@pytest.mark.parametrize("field", ["l1_table_offset", "refcount_table_offset", "snapshots_offset"])
def test_tables_do_not_lie_in_the_header(field: str) -> None:
    with pytest.raises(CorruptImageError, match=r"table at host offset 0x0: lies inside the header cluster \(memory\)"):
        check(tables(nb_snapshots=1, **{field: 0}))


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({"l1_table_offset": 7 * CLUSTER, "l1_size": 100}, 7 * CLUSTER + 800),
        ({"refcount_table_offset": 7 * CLUSTER}, 8 * CLUSTER),
        ({"snapshots_offset": 7 * CLUSTER, "nb_snapshots": 10}, 7 * CLUSTER + 400),
    ],
)
def test_tables_lie_inside_the_file(fields: dict[str, int], end: int) -> None:
    check(tables(end, **fields))
    with pytest.raises(TruncatedImageError, match=r"table at host offset 0x70000: lies past the end.*\(memory\)"):
        check(tables(end - 1, **fields))


@pytest.mark.parametrize(
    ("fields", "sound"),
    [
        ({"l1_table_offset": CLUSTER}, False),
        ({"l1_table_offset": 2 * CLUSTER}, True),
        ({"l1_table_offset": 5 * CLUSTER}, False),
        ({"refcount_table_offset": 5 * CLUSTER}, False),
        ({"refcount_table_clusters": 2}, True),
        ({"refcount_table_clusters": 3}, False),
        ({"l1_size": 2 * CLUSTER // 8}, True),
        ({"l1_size": 2 * CLUSTER // 8 + 1}, False),
    ],
)
def test_tables_do_not_overlap(fields: dict[str, int], sound: bool) -> None:
    storage = tables(nb_snapshots=1, **fields)
    if sound:
        check(storage)
    else:
        with pytest.raises(CorruptImageError, match="overlaps the"):
            check(storage)


# ---- is it complete?

NOISE = bytes(range(256)) * 256


def build(tmp_path: Path, image: ImageBuilder, *, cut: int = 0) -> tuple[MemoryStorage, BuiltImage]:
    built = image.build(tmp_path / "image.qcow2")
    content = built.path.read_bytes()
    return MemoryStorage(content[: len(content) - cut]), built


def complete(storage: MemoryStorage) -> None:
    check_complete(read_header(storage), storage)


def plain(**told: object) -> ImageBuilder:
    return ImageBuilder(1 << 20, **told).data(0, NOISE).data(5, NOISE)  # type: ignore[arg-type] # passed on


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
def test_a_whole_image_is_complete(tmp_path: Path, refcount_bits: int) -> None:
    storage, _ = build(tmp_path, plain(refcount_bits=refcount_bits))
    complete(storage)


def test_a_whole_image_needs_few_reads(tmp_path: Path) -> None:
    storage, built = build(tmp_path, plain())
    del storage.content[built.l1_offset : built.l1_offset + 8]
    storage.content[built.l1_offset : built.l1_offset] = b"\xff" * 8  # whoever followed it would stumble
    complete(storage)


def data_at_the_end() -> ImageBuilder:
    return ImageBuilder(1 << 20).data(0, NOISE).data(5, NOISE, host_offset=20 * CLUSTER)


@pytest.mark.parametrize(("cut", "sound"), [(0, True), (1, True), (CLUSTER - 1, True), (CLUSTER, False)])
def test_only_a_whole_missing_cluster_is_missing(tmp_path: Path, cut: int, sound: bool) -> None:
    storage, built = build(tmp_path, data_at_the_end(), cut=cut)
    assert built.data_offsets[5] == 20 * CLUSTER
    if sound:
        complete(storage)
    else:
        with pytest.raises(TruncatedImageError, match="points past the end"):
            complete(storage)


def test_a_refcount_past_the_end_proves_nothing(tmp_path: Path) -> None:
    storage, _ = build(tmp_path, plain().refcount(100, 1))
    complete(storage)


def test_a_missing_cluster_is_found_though_a_refcount_block_is_missing(tmp_path: Path) -> None:
    storage, built = build(tmp_path, data_at_the_end(), cut=CLUSTER)
    block = storage.content[built.refcount_table_offset : built.refcount_table_offset + 8]
    for word in (1 << 60, 0xFFFF_FFFF_FFFF_FE00, 1 << 63):
        storage.content[built.refcount_table_offset : built.refcount_table_offset + 8] = struct.pack(">Q", word)
        with pytest.raises(TruncatedImageError):
            complete(storage)
    assert any(block)


@pytest.mark.parametrize("word", [0, 1 << 60, 2**63 - 512, 1 << 63, 2**64 - 512, 2**64 - 65536])
def test_refcount_blocks_anywhere_do_no_harm_to_a_whole_file(tmp_path: Path, word: int) -> None:
    _, built = build(tmp_path, plain())
    with open(built.path, "r+b") as file:
        file.seek(built.refcount_table_offset)
        file.write(struct.pack(">Q", word))
    storage = open_given(built.path)
    try:
        check_complete(read_header(storage), storage)
    finally:
        storage.close()


def test_zeroed_refcounts_are_no_proof(tmp_path: Path) -> None:
    image = data_at_the_end()
    for cluster in range(30):
        image.refcount(cluster, 0)
    complete(build(tmp_path, image)[0])
    with pytest.raises(TruncatedImageError):
        complete(build(tmp_path, image, cut=CLUSTER)[0])


def test_a_dirty_image_is_believed_only_after_a_look_at_its_tables(tmp_path: Path) -> None:
    image = ImageBuilder(1 << 20, incompatible=1).data(0, NOISE).data(5, NOISE, host_offset=20 * CLUSTER)
    image.refcount(20, 0)
    complete(build(tmp_path, image)[0])
    with pytest.raises(TruncatedImageError):
        complete(build(tmp_path, image, cut=CLUSTER)[0])


def test_a_bad_entry_is_no_reason_to_refuse_a_dirty_image_that_is_whole(tmp_path: Path) -> None:
    """Whoever reads that cluster hears of it; the rest of the disk is there."""
    image = ImageBuilder(1 << 20, incompatible=1).data(0, NOISE).entry(3, 0x200)
    complete(build(tmp_path, image)[0])


def test_a_doubtful_file_that_is_too_large_to_prove_is_refused(tmp_path: Path) -> None:
    storage, built = build(tmp_path, ImageBuilder(1 << 50, cluster_bits=16, incompatible=1, l1_size=1 << 21))
    offsets = range(1 << 30, (1 << 30) + 16385 * CLUSTER, CLUSTER)
    words = b"".join(struct.pack(">Q", offset) for offset in offsets)
    storage.content[built.l1_offset : built.l1_offset + len(words)] = words
    with pytest.raises(TruncatedImageError, match="too large to prove"):
        complete(storage)
    storage.content[built.l1_offset : built.l1_offset + 8] = bytes(8)
    with pytest.raises(TruncatedImageError, match="L2 table at host offset 0x40010000: lies past the end"):
        complete(storage)


def test_a_table_that_many_l1_entries_share_is_proved_once(tmp_path: Path) -> None:
    """A file of 400 KiB must not keep a processor busy for minutes when it is opened."""
    image = ImageBuilder(1024 * 8192 * CLUSTER, incompatible=1)
    for cluster in range(0, 8192, 2):
        image.zero(cluster)
    storage, built = build(tmp_path, image)
    storage.content[built.l1_offset : built.l1_offset + 8192] = struct.pack(">Q", built.l2_offsets[0]) * 1024
    start = time.thread_time()
    complete(storage)
    assert time.thread_time() - start < 2
