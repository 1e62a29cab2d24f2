"""Which cluster holds which structure, and images in which that cannot be told."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from qcow2_plugin.engine import metadata
from qcow2_plugin.engine.header import read_header
from qcow2_plugin.engine.image_file import MetadataMap, Structure
from qcow2_plugin.engine.metadata import l2_tables, read_metadata, structures
from qcow2_plugin.errors import CorruptImageError, TruncatedImageError, UnsupportedFeatureError
from tests.support.builder import BuiltImage, ImageBuilder
from tests.support.fields import COPIED
from tests.support.memory_storage import MemoryStorage

BITS = 9
CLUSTER = 1 << BITS
DISK = 4 << 20
"""128 L2 tables' worth."""


def rich() -> ImageBuilder:
    """Small clusters, so that every structure takes several of them."""
    image = ImageBuilder(DISK, BITS, refcount_bits=64)
    for cluster in (0, 1, 70, 200):
        image.data(cluster, b"payload")
    image.data(8000, b"far away", host_offset=100 * CLUSTER)
    image.snapshot(b"1", b"first")
    image.snapshot(b"2", b"n" * 500)
    image.bitmap(b"usable", [(0, 512)], granularity_bits=9, flags=2)
    image.bitmap(b"disabled", [(DISK - 512, 512)], granularity_bits=9)
    return image


def build(tmp_path: Path, image: ImageBuilder) -> tuple[MemoryStorage, BuiltImage]:
    built = image.build(tmp_path / "image.qcow2")
    return MemoryStorage(built.path.read_bytes()), built


def put(storage: MemoryStorage, host_offset: int, *words: int) -> None:
    storage.content[host_offset : host_offset + 8 * len(words)] = struct.pack(f">{len(words)}Q", *words)


def read(storage: MemoryStorage) -> MetadataMap:
    return read_metadata(storage, read_header(storage))


def clusters_of(host_offset: int, length: int) -> set[int]:
    return set(range(host_offset >> BITS, -(-(host_offset + length) >> BITS)))


def test_every_structure_is_found(tmp_path: Path) -> None:
    storage, built = build(tmp_path, rich())
    snapshots = b"".join(
        storage.content[offset : offset + 64 + length]
        for offset, length in zip(built.snapshot_entry_offsets, (6, 501), strict=True)
    )
    assert b"first" in snapshots
    expected = {
        Structure.HEADER: {0},
        Structure.L1_TABLE: clusters_of(built.l1_offset, 8 * built.l1_size),
        Structure.L2_TABLE: {offset >> BITS for offset in built.l2_offsets.values()},
        Structure.REFCOUNT_TABLE: clusters_of(built.refcount_table_offset, built.refcount_table_clusters << BITS),
        Structure.REFCOUNT_BLOCK: {offset >> BITS for offset in built.refcount_block_offsets.values()},
        Structure.SNAPSHOT_TABLE: clusters_of(
            built.snapshots_offset, built.snapshot_entry_offsets[1] + 64 + 501 - built.snapshots_offset
        ),
        Structure.SNAPSHOT_L1_TABLE: set().union(
            *(clusters_of(each.l1_offset, 8 * each.l1_size) for each in built.snapshots)
        ),
        Structure.BITMAP: clusters_of(built.bitmap_directory_offset, 24 + 8 + 24 + 8).union(
            *(clusters_of(offset, 8 * 2) for offset in built.bitmap_table_offsets),
            *(clusters_of(offset, CLUSTER) for offsets in built.bitmap_data_offsets for offset in offsets),
        ),
    }
    assert len(expected[Structure.SNAPSHOT_TABLE]) == 2
    owners = {cluster: int(structure) for structure, clusters in expected.items() for cluster in clusters}
    found = read(storage)
    assert [found.owner(cluster) for cluster in range(built.file_size >> BITS)] == [
        owners.get(cluster, 0) for cluster in range(built.file_size >> BITS)
    ]


def test_what_no_structure_takes_is_in_no_map(tmp_path: Path) -> None:
    storage, built = build(tmp_path, rich())
    found = read(storage)
    data = np.array(sorted(built.data_offsets.values()), dtype=np.int64) >> BITS
    assert not found.among(data).any()
    assert found.first_in(int(data[0]), 1) is None
    assert found.first_in(0, built.file_size >> BITS) == 0
    assert found.owner(built.file_size >> BITS) == 0


def test_bitmaps_of_an_image_that_an_ignorant_writer_changed_are_no_structures(tmp_path: Path) -> None:
    storage, built = build(tmp_path, rich())
    put(storage, 88, 0)  # autoclear features
    assert read(storage).owner(built.bitmap_directory_offset >> BITS) == 0


def test_l2_tables_that_are_named_twice_are_one_structure(tmp_path: Path) -> None:
    storage, built = build(tmp_path, rich())
    put(storage, built.l1_entry_offset(0), built.l2_offsets[0])
    put(storage, built.l1_entry_offset(5), built.l2_offsets[0])
    put(storage, built.l1_entry_offset(6), built.l2_offsets[0])
    header = read_header(storage)
    shared = built.l2_offsets[0] >> BITS
    assert read(storage).owner(shared) == Structure.L2_TABLE
    named = l2_tables(storage, header, header.l1_table_offset, header.l1_size).tolist()
    assert named.count(shared) == 3
    counted = next(clusters for structure, clusters in structures(storage, header) if structure is Structure.L2_TABLE)
    assert counted.tolist() == named


def test_l2_tables_of_the_vm_state_behind_the_disk_belong_to_the_map(tmp_path: Path) -> None:
    storage, built = build(tmp_path, ImageBuilder(DISK, BITS, l1_size=200).l2_table(150))
    assert read(storage).owner(built.l2_offsets[150] >> BITS) == Structure.L2_TABLE


def test_l2_tables_of_snapshots_stay_structures_when_the_active_disk_lets_go_of_them(tmp_path: Path) -> None:
    image = ImageBuilder(DISK, BITS).data(0, b"x").data(70, b"y")
    image.snapshot(b"1", b"shares them").snapshot(b"2", b"own", image.map().data(0, b"z"))
    storage, built = build(tmp_path, image)
    found = read(storage)
    shared, own = built.l2_offsets[0] >> BITS, built.snapshots[1].l2_offsets[0] >> BITS
    data = built.data_offsets[0] >> BITS
    assert found.owner(shared) == Structure.L2_TABLE
    assert found.owner(own) == Structure.SNAPSHOT_L2_TABLE
    found.release([shared, own, data])
    assert found.owner(shared) == found.owner(own) == Structure.SNAPSHOT_L2_TABLE
    assert not found.owner(data)
    only_active = read(build(tmp_path, ImageBuilder(DISK, BITS).data(0, b"x"))[0])
    only_active.release([shared])
    assert not only_active.owner(shared)


@pytest.mark.parametrize("elsewhere", ["snapshot", "active disk"])
def test_an_l2_table_that_is_named_elsewhere_must_not_be_called_own(tmp_path: Path, elsewhere: str) -> None:
    """What is called so is written in place."""
    image = ImageBuilder(DISK, BITS).data(0, b"x").snapshot(b"1", b"own", ImageBuilder(DISK, BITS).data(0, b"z"))
    storage, built = build(tmp_path, image)
    owner = built.snapshots[0] if elsewhere == "snapshot" else built
    put(storage, built.l1_entry_offset(3), owner.l2_offsets[0])
    if elsewhere == "snapshot":
        assert read(storage).owner(owner.l2_offsets[0] >> BITS) == Structure.L2_TABLE
    put(storage, built.l1_entry_offset(3), owner.l2_offsets[0] | COPIED)
    index = 3 if elsewhere == "snapshot" else 0
    message = (
        rf"L1 table at .*: entry {index} is 0x8[0-9a-f]+, but that L2 table is named elsewhere too; repair the image"
    )
    with pytest.raises(CorruptImageError, match=message):
        read(storage)
    storage.content[79] |= 1  # dirty: the flag is not believed before it was put right
    assert read(storage).owner(owner.l2_offsets[0] >> BITS) == Structure.L2_TABLE


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("L1 table", "L2 table"),
        ("refcount table", "L2 table"),
        ("refcount block", "L2 table"),
        ("snapshot table", "L2 table"),
        ("snapshot L1 table", "L2 table"),
        ("bitmap directory", "L2 table"),
        ("bitmap table", "L2 table"),
        ("bits", "L2 table"),
        ("L2 table", "refcount block"),
        ("refcount table", "refcount block"),
        ("refcount block", "refcount block"),
        ("L1 table", "snapshot L1 table"),
        ("snapshot L1 table", "snapshot L1 table"),
        ("L2 table", "bits"),
        ("bits", "bits"),
    ],
)
def test_structures_do_not_share_a_cluster(tmp_path: Path, first: str, second: str) -> None:
    """The second one is moved to where the first one is."""
    storage, built = build(tmp_path, rich())
    places = {
        "L1 table": built.l1_offset,
        "L2 table": built.l2_offsets[0],
        "refcount table": built.refcount_table_offset,
        "refcount block": built.refcount_block_offsets[1],
        "snapshot table": built.snapshots_offset,
        "snapshot L1 table": built.snapshots[1].l1_offset,
        "bitmap directory": built.bitmap_directory_offset,
        "bitmap table": built.bitmap_table_offsets[0],
        "bits": built.bitmap_data_offsets[1][0],
    }
    pointers = {
        "L2 table": built.l1_entry_offset(1),
        "refcount block": built.refcount_table_offset,
        "snapshot L1 table": built.snapshot_entry_offsets[0],
        "bits": built.bitmap_table_offsets[0],
    }
    put(storage, pointers[second], places[first])
    titles = {"bitmap directory": "bitmap", "bitmap table": "bitmap", "bits": "bitmap"}
    names = {titles.get(name, name) for name in (first, second)}
    with pytest.raises(CorruptImageError) as refused:
        read(storage)
    message = str(refused.value)
    assert all(name in message for name in names)
    assert message.endswith("(memory)")
    assert "overlaps " in message
    assert f"host offset {places[first]:#x}" in message


@pytest.mark.parametrize(
    ("pointer", "word", "message"),
    [
        ("L1", 1 << 63, "L1 table at host offset .*: entry 1 is 0x8000000000000000, where no L2 table can be"),
        ("refcount table", 1 << 63, "refcount block at host offset 0x8000000000000000: lies past the end"),
        ("refcount table", 1 << 40, "refcount block at host offset 0x10000000000: lies past the end"),
        ("L1", 1 << 40, "L2 table at host offset 0x10000000000: lies past the end"),
        ("bitmap table", 1 << 40, "cluster of bits at host offset 0x10000000000: lies past the end"),
        ("bitmap table", 1 << 60, "bitmap table: entry 0 is 0x1000000000000000"),
        ("snapshot", 1 << 40, 'L1 table of snapshot "1" at host offset 0x10000000000: lies past the end'),
        ("snapshot", CLUSTER + 8, 'L1 table of snapshot "1" at host offset 0x208: is not at the start of a cluster'),
        ("bitmap directory", 1 << 40, "bitmap table at host offset 0x10000000000: lies past the end"),
    ],
)
def test_pointers_to_where_nothing_can_be(tmp_path: Path, pointer: str, word: int, message: str) -> None:
    storage, built = build(tmp_path, rich())
    places = {
        "L1": built.l1_entry_offset(1),
        "refcount table": built.refcount_table_offset,
        "snapshot": built.snapshot_entry_offsets[0],
        "bitmap directory": built.bitmap_entry_offsets[0],
        "bitmap table": built.bitmap_table_offsets[0],
    }
    put(storage, places[pointer], word)
    with pytest.raises(CorruptImageError, match=message.replace(".*", r"\S+")) as refused:
        read(storage)
    assert isinstance(refused.value, TruncatedImageError) == ("past the end" in message)
    assert str(refused.value).endswith("(memory)")


def test_pointers_between_clusters(tmp_path: Path) -> None:
    image = ImageBuilder(1 << 20, 12).data(0, b"x").bitmap(b"b", literal=True, granularity_bits=9, flags=2)
    for pointer, structure in (("l1", "L2 table"), ("refcount_table", "refcount block"), ("bitmap_table", "")):
        storage, built = build(tmp_path, image)
        place = built.bitmap_table_offsets[0] if pointer == "bitmap_table" else getattr(built, f"{pointer}_offset")
        put(storage, place, 4096 + 512)
        with pytest.raises(CorruptImageError, match=rf"entry 0 is 0x1200.*{structure}.*\(memory\)"):
            read(storage)


def test_a_structure_that_the_file_ends_in_is_truncated(tmp_path: Path) -> None:
    storage, built = build(tmp_path, rich())
    place = len(storage.content)
    put(storage, built.l1_entry_offset(7), place)
    storage.content += bytes(CLUSTER)
    assert read(storage).owner(place >> BITS) == Structure.L2_TABLE
    del storage.content[-1:]
    with pytest.raises(TruncatedImageError):
        read(storage)


def test_a_snapshot_table_and_l1_tables_need_not_fill_their_last_clusters(tmp_path: Path) -> None:
    """QEMU writes them at the end of a file without filling it up."""
    image = ImageBuilder(DISK, BITS).snapshot(b"1", b"first")
    storage, built = build(tmp_path, image)
    moved = len(storage.content)
    length = 64 + 6
    entry = bytes(storage.content[built.snapshots_offset : built.snapshots_offset + length])
    storage.content[64:72] = moved.to_bytes(8, "big")
    storage.content += entry
    assert read(storage).owner(moved >> BITS) == Structure.SNAPSHOT_TABLE
    del storage.content[-1:]
    with pytest.raises(TruncatedImageError, match="snapshot table"):
        read(storage)


# ---- bitmaps that nobody can use


@pytest.mark.parametrize("fields", [{"flags": 3}, {"flags": 2, "type": 7}, {"flags": 1 << 20}, {"table_size": 3}])
def test_of_a_bitmap_that_cannot_be_used_what_makes_sense_is_protected(tmp_path: Path, fields: dict[str, int]) -> None:
    image = ImageBuilder(DISK, BITS).bitmap(b"b", [(0, 512), (DISK - 512, 512)], granularity_bits=9, **fields)  # type: ignore[arg-type]
    storage, built = build(tmp_path, image)
    table, data = built.bitmap_table_offsets[0], built.bitmap_data_offsets[0][0]
    assert read(storage).owner(data >> BITS) == Structure.BITMAP
    for word in (1 << 60, 512 + 1, 1 << 50):
        put(storage, table + 8, word)
        found = read(storage)
        assert found.owner(table >> BITS) == found.owner(data >> BITS) == Structure.BITMAP
    put(storage, built.bitmap_entry_offsets[0], 1 << 50)
    assert read(storage).owner(built.bitmap_directory_offset >> BITS) == Structure.BITMAP


def test_a_stale_bitmap_must_not_name_a_table_either(tmp_path: Path) -> None:
    image = ImageBuilder(DISK, BITS).data(0, b"x").bitmap(b"b", [(0, 512)], granularity_bits=9, flags=3)
    storage, built = build(tmp_path, image)
    put(storage, built.bitmap_table_offsets[0], built.l2_offsets[0])
    with pytest.raises(
        CorruptImageError, match=f"bitmap at host offset {built.l2_offsets[0]:#x}: overlaps the L2 table"
    ):
        read(storage)


@pytest.mark.parametrize("fields", [{"nb_bitmaps": 3}, {"directory_size": 40}, {"reserved": 1}])
def test_a_directory_that_cannot_be_parsed_says_what_to_do(tmp_path: Path, fields: dict[str, int]) -> None:
    storage, _ = build(tmp_path, rich().bitmaps_extension(**fields))
    with pytest.raises(CorruptImageError, match=r"bitmap directory: cannot be read \(bitmap.*copy it to a new image"):
        read(storage)


def test_a_directory_past_the_end_of_the_file(tmp_path: Path) -> None:
    storage, _ = build(tmp_path, rich().bitmaps_extension(directory_offset=1 << 40))
    with pytest.raises(TruncatedImageError, match=r"bitmap directory: cannot be read .*0x10000000000"):
        read(storage)


# ---- bounds


def test_more_structures_than_a_map_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, built = build(tmp_path, rich())
    found = read(storage)
    everything = sum(found.owner(cluster) != 0 for cluster in range(built.file_size >> BITS))
    everything += len(built.l2_offsets)  # those that are shared with snapshots are held twice
    monkeypatch.setattr(metadata, "_MAX_CLUSTERS", everything)
    read(storage)
    monkeypatch.setattr(metadata, "_MAX_CLUSTERS", everything - 1)
    with pytest.raises(UnsupportedFeatureError, match=r"too many to write to it \(memory\)"):
        read(storage)


def test_bitmap_tables_that_take_too_long_to_read(tmp_path: Path) -> None:
    image = rich().bitmap(b"huge", flags=1, table_size=128 << 20)
    storage, _ = build(tmp_path, image)
    with pytest.raises(UnsupportedFeatureError, match=r"too large bitmaps to write to it \(memory\)"):
        read(storage)
