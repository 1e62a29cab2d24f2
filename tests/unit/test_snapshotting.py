"""Internal snapshots in memory: what is counted, what is refused before anything changes, what images that lie get."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from qcow2_plugin.engine.dirty_bitmaps.bitmap_changes import change_bitmaps
from qcow2_plugin.engine.dirty_bitmaps.bitmap_plan import BitmapChange, BitmapVerb
from qcow2_plugin.engine.header import read_header
from qcow2_plugin.engine.internal_snapshots import recounting, snapshot_sizes, snapshotting
from qcow2_plugin.engine.internal_snapshots.recounting import Recount
from qcow2_plugin.engine.internal_snapshots.snapshots import read_snapshots
from qcow2_plugin.engine.internal_snapshots.snapshotting import apply_snapshot, create_snapshot, delete_snapshot
from qcow2_plugin.errors import (
    CorruptImageError,
    FailedImageError,
    Qcow2Error,
    SnapshotError,
    UnsupportedFeatureError,
)
from tests.support.builder import ImageBuilder, deflate, patch
from tests.support.image_checker import check_image
from tests.support.in_memory import InMemory

KIB = 1 << 10
COVERAGE = 64 * 512
DATE = 1_600_000_000_000_000_007


def filled(virtual_size: int = 4 * COVERAGE, **options: object) -> ImageBuilder:
    image = ImageBuilder(virtual_size, 9, **options)  # type: ignore[arg-type] # the builder's own
    for cluster in range(0, 120, 3):
        image.data(cluster, bytes([cluster]) * 512)
        image.compressed(cluster + 1, b"small" * 10, stream=deflate((b"small" * 103)[:512]))
    return image.zero(2, preallocated=True)


@contextmanager
def unchanged(opened: InMemory) -> Iterator[None]:
    """Nothing of the file changes, nor of what is known of its refcounts."""
    opened.disk.flush()
    before = bytes(opened.storage.content)
    counts = opened.disk.allocator.refcounts_of(np.arange(len(before) // 512))
    yield
    assert opened.storage.content == before
    assert (opened.disk.allocator.refcounts_of(np.arange(len(before) // 512)) == counts).all()


def test_an_entry_says_what_it_should(tmp_path: Path) -> None:
    opened = InMemory(filled(), tmp_path)
    made = create_snapshot(opened.disk, b"name", DATE)
    (found,) = read_snapshots(opened.storage, opened.disk.header)
    assert found == made
    assert (found.id, found.name, found.l1_size) == (b"1", b"name", opened.disk.header.l1_size)
    assert (found.date_seconds, found.date_nanoseconds) == divmod(DATE, 10**9)
    assert (found.vm_state_size, found.vm_clock_nanoseconds, found.icount) == (0, 0, None)
    assert found.extra == struct.pack(">QQQ", 0, 4 * COVERAGE, 2**64 - 1)
    opened.disk.close()
    opened.assert_clean()


@pytest.mark.parametrize(
    ("ids", "following"),
    [
        ([b"1", b"7", b"3"], b"8"),
        ([b"name", b""], b"1"),
        ([b"12 monkeys"], b"13"),
        ([b"9" * 20], b"1" + b"0" * 20),
        ([b"9" * 5000], b"1" + b"0" * 20),
        ([b"-5"], b"1"),
    ],
)
def test_the_next_id_is_one_more_than_any_number(ids: list[bytes], following: bytes, tmp_path: Path) -> None:
    image = filled()
    for each in ids:
        image.snapshot(each, b"x")
    opened = InMemory(image, tmp_path)
    assert create_snapshot(opened.disk, b"new", 0).id == following


def test_the_next_id_is_none_that_is_there(tmp_path: Path) -> None:
    """Longer numbers than anybody counts to are cut, so one more than the largest may be taken."""
    opened = InMemory(filled().snapshot(b"9" * 20, b"x"), tmp_path)
    made = [create_snapshot(opened.disk, b"new", 0).id for _ in range(3)]
    assert len({*made, b"9" * 20}) == 4
    for each in made:
        delete_snapshot(opened.disk, each)
    opened.disk.close()
    opened.assert_clean()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_too_narrow_refcounts_are_noticed_before_anything_changes(bits: int, tmp_path: Path) -> None:
    """One cluster, the last that is looked at, has all the references that can be counted."""
    image = ImageBuilder(4 * COVERAGE, 9, refcount_bits=bits)
    for cluster in range(200):
        image.data(cluster, b"x")
    built = image.build(tmp_path / "first")
    last = max(offset for offset in built.data_offsets.values() if offset is not None) // 512
    image.refcount(last, (1 << bits) - 1)
    opened = InMemory(image, tmp_path)
    with unchanged(opened), pytest.raises(SnapshotError, match=f"than {bits} bits can count"):
        create_snapshot(opened.disk, b"new", 0)
    opened.disk.pwrite(b"goes on", 0)
    opened.disk.close()
    assert not opened.disk.file.failure
    assert check_image(opened.storage.content).damage == []


def test_limits_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = InMemory(filled().snapshot(b"1", b"one").snapshot(b"2", b"two"), tmp_path)
    for limit in ("MAX_SNAPSHOTS", "MAX_SNAPSHOT_TABLE_SIZE"):
        with monkeypatch.context() as patched, unchanged(opened):
            patched.setattr(snapshotting, limit, 2)
            with pytest.raises(SnapshotError, match="no room for more"):
                create_snapshot(opened.disk, b"three", 0)
    with monkeypatch.context() as patched, unchanged(opened):
        patched.setattr(recounting, "_MAX_CHANGED_SIZE", 0)
        with pytest.raises(UnsupportedFeatureError, match="too many clusters in use"):
            create_snapshot(opened.disk, b"three", 0)
    monkeypatch.setattr(snapshotting, "MAX_SNAPSHOTS", 3)
    create_snapshot(opened.disk, b"three", 0)
    monkeypatch.setattr(recounting, "_MAX_CHANGED_SIZE", 0)  # now refcounts are written in between
    delete_snapshot(opened.disk, b"one")
    opened.disk.close()
    opened.assert_clean()


@pytest.mark.parametrize("structure", ["refcount block", "L1 table", "L2 table"])
def test_an_entry_that_leads_into_a_structure_is_refused(structure: str, tmp_path: Path) -> None:
    opened = InMemory(filled(), tmp_path)
    place = {
        "refcount block": opened.built.refcount_block_offsets[0],
        "L1 table": opened.disk.header.l1_table_offset,
        "L2 table": opened.built.l2_offsets[0],
    }[structure]
    opened.disk.close()
    struct.pack_into(">Q", opened.storage.content, opened.built.l2_entry_offset(9), place)
    opened.reopen()
    with pytest.raises(CorruptImageError, match="points to a structure"):
        create_snapshot(opened.disk, b"new", 0)
    with pytest.raises(FailedImageError):
        create_snapshot(opened.disk, b"new", 0)
    assert opened.field("incompatible_features") & 2
    assert not opened.field("nb_snapshots")


def test_refcounts_that_are_too_low_already_are_refused(tmp_path: Path) -> None:
    image = filled()
    built = image.build(tmp_path / "first")
    offset = built.data_offsets[0]
    assert offset is not None
    opened = InMemory(image.refcount(offset // 512, 0), tmp_path)
    with pytest.raises(CorruptImageError, match=r"fewer references than there are.*check -r all"):
        create_snapshot(opened.disk, b"new", 0)


def test_tables_that_are_named_more_than_once_count_as_often(tmp_path: Path) -> None:
    """Three L1 entries name one L2 table, and two another; nobody writes such images, but they can be read."""
    image = filled(8 * COVERAGE)
    path = tmp_path / "image"
    built = image.build(path)
    tables = [built.l2_offsets[0], built.l2_offsets[1]]
    names = [tables[0], tables[1], tables[0], 0, tables[0], tables[1], 0, 0]
    content = bytearray(path.read_bytes())
    struct.pack_into(">8Q", content, built.l1_offset, *names)
    counts = references(content, built.l1_offset, 8)
    for cluster, count in counts.items():
        image.refcount(cluster, count)
    built = image.build(path)
    patch(path, built.l1_offset, struct.pack(">8Q", *names))
    content = bytearray(path.read_bytes())
    for table in tables:
        for place in range(table, table + 512, 8):
            content[place] &= 0x7F
    opened = InMemory(image, tmp_path)
    opened.storage.content[:] = content
    opened.reopen()
    assert not check_image(opened.storage.content).all_leaks
    view = opened.disk.pread(8 * COVERAGE, 0)
    made = create_snapshot(opened.disk, b"new", 0)
    opened.disk.pwrite(b"!" * 2000, COVERAGE - 1000)
    opened.settle()
    assert not check_image(opened.storage.content).all_leaks
    apply_snapshot(opened.disk, made.id, mark_bitmaps=False)
    assert opened.disk.pread(8 * COVERAGE, 0) == view
    opened.settle()
    assert not check_image(opened.storage.content).all_leaks
    delete_snapshot(opened.disk, made.id)
    opened.disk.close()
    report = check_image(opened.storage.content)
    assert not report.corruptions
    assert not report.all_leaks


def references(content: bytes | bytearray, l1_offset: int, l1_size: int) -> dict[int, int]:
    """By cluster, what an L1 table leads to, one entry after the other."""
    found: dict[int, int] = {}
    for (name,) in struct.iter_unpack(">Q", content[l1_offset : l1_offset + 8 * l1_size]):
        table = name & 0x00FFFFFFFFFFFE00
        if not table:
            continue
        found[table // 512] = found.get(table // 512, 0) + 1
        for (entry,) in struct.iter_unpack(">Q", content[table : table + 512]):
            if entry >> 62 & 1:
                start = entry & (1 << 56) - 1
                end = (start | 511) + 1 + 512 * (entry >> 61 & 1)
                clusters = range(start // 512, (end - 1) // 512 + 1)
            else:
                start = entry & 0x00FFFFFFFFFFFE00
                clusters = range(start // 512, start // 512 + bool(start))
            for cluster in clusters:
                found[cluster] = found.get(cluster, 0) + 1
    return found


def test_an_interrupted_change_takes_no_more_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = InMemory(filled(), tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Recount, "clear_copied_in_l1", interrupt)
        with pytest.raises(KeyboardInterrupt):
            create_snapshot(opened.disk, b"new", 0)
    with pytest.raises(FailedImageError, match="interrupted"):
        create_snapshot(opened.disk, b"new", 0)
    assert opened.disk.pread(3, 0) == bytes(3)
    opened.disk.close()
    report = check_image(opened.storage.content)
    assert not report.damage


def test_an_apply_interrupted_behind_the_header_takes_no_more_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has another L1 table than memory knows: what was written now would be lost."""
    opened = InMemory(filled(), tmp_path)
    create_snapshot(opened.disk, b"then", 0)
    opened.disk.pwrite(b"x" * 5000, 0)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshotting, "_show_new_disk", interrupt)
    with pytest.raises(KeyboardInterrupt):
        apply_snapshot(opened.disk, b"then", mark_bitmaps=False)
    with pytest.raises(FailedImageError, match="interrupted"):
        opened.disk.pwrite(b"lost", 0)
    assert opened.disk.pread(5000, 0) == b"x" * 5000
    opened.disk.close()
    assert not check_image(opened.storage.content).damage
    opened.reopen()
    assert opened.disk.pread(512, 0) == bytes(512)


def test_what_was_tried_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """COPIED, too, so that writing in place goes on."""
    opened = InMemory(filled(), tmp_path)
    opened.disk.pwrite(b"x", 0)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(opened.disk.file, "update_header", fail)
        with pytest.raises(OSError, match="No space"):
            create_snapshot(opened.disk, b"new", 0)
    size = len(opened.storage.content)
    opened.disk.pwrite(b"y" * 5000, 0)
    opened.disk.close()
    opened.assert_clean()
    assert len(opened.storage.content) <= size + 512 * 8


@pytest.mark.parametrize("at_once", [1, 8 * 256 * 8, 1 << 20])
def test_sizes_do_not_depend_on_memory(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 512-byte clusters a refcount block describes 256 clusters."""
    opened = InMemory(filled(), tmp_path)
    first = create_snapshot(opened.disk, b"first", 0)
    opened.disk.pwrite(b"z" * 20000, 100)
    second = create_snapshot(opened.disk, b"second", 0)
    opened.disk.close()
    monkeypatch.setattr(snapshot_sizes, "_MAX_COUNTS_SIZE", at_once)
    header = read_header(opened.storage)
    content = opened.storage.content
    of_snapshots = [references(content, each.l1_table_offset, each.l1_size) for each in (first, second)]
    active = references(content, header.l1_table_offset, header.l1_size)
    for number, found in enumerate(snapshot_sizes.snapshot_sizes(opened.storage, header, (first, second))):
        other = of_snapshots[1 - number]
        own = [cluster for cluster in of_snapshots[number] if cluster not in active and cluster not in other]
        assert found == ((len(own) + 1) * 512, (len(of_snapshots[number]) + 1) * 512)


def test_the_disk_of_a_snapshot_tells_of_the_image_as_it_is_now(tmp_path: Path) -> None:
    """The tables of snapshots and bitmaps have moved since it was opened, and where they were is something else."""
    opened = InMemory(filled().bitmap(b"old"), tmp_path)
    create_snapshot(opened.disk, b"then", 0)
    shown = opened.disk.at_snapshot(b"then")
    create_snapshot(opened.disk, b"later", 0)
    change_bitmaps(opened.disk, [BitmapChange(BitmapVerb.ADD, b"new", is_enabled=False)])
    opened.disk.flush()
    opened.disk.pwrite(b"\xff" * 40000, 0)
    assert [each.name for each in shown.snapshots()] == [b"then", b"later"]
    assert [each.name for each in shown.bitmaps()] == [b"old", b"new"]
    assert shown.at_snapshot(b"later").pread(512, 3 * 512) == bytes([3]) * 512
    assert not list(shown.dirty_extents(b"new"))
    opened.disk.close()
    opened.assert_clean()


def test_readers_of_a_snapshot_that_never_was(tmp_path: Path) -> None:
    opened = InMemory(filled(), tmp_path)
    with pytest.raises(Qcow2Error):
        opened.disk.at_snapshot(b"none")
    with pytest.raises(Qcow2Error):
        delete_snapshot(opened.disk, b"none")
    opened.disk.close()
    opened.assert_clean()
