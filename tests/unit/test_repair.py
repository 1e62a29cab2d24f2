"""Repairs: what changes on disk and what does not, what only we repair, and repairing a copy."""

from __future__ import annotations

import errno
import struct
from pathlib import Path

import numpy as np
import pytest

from qcow2_plugin import open_image
from qcow2_plugin.engine.checking.check import read_header_for_check
from qcow2_plugin.engine.image_file import Structure
from qcow2_plugin.engine.repairing.damaged_map import read_damaged_map
from qcow2_plugin.errors import CorruptImageError, ImageLockedError, ReadOnlyImageError
from qcow2_plugin.format import geometry
from qcow2_plugin.operations.check import check
from qcow2_plugin.operations.repair_copy import repair_to
from qcow2_plugin.storage import directory
from qcow2_plugin.storage.copying import copy_content
from qcow2_plugin.storage.opener import create_given, open_given
from tests.support import broken
from tests.support.broken import NOISE, SIZE
from tests.support.builder import ImageBuilder
from tests.support.fields import COPIED
from tests.support.image_checker import check_image
from tests.support.memory_storage import MemoryStorage
from tests.support.recording import Action
from tests.support.repairing import Reader, lost, missing_references, readable, repair, snapshot_ids

ALONE = np.zeros(0, dtype=np.int64)

# ---- what changes


@pytest.mark.parametrize("name", ["plain", "with_snapshots", "with_bitmaps", "extended", "long_table"])
def test_nothing_is_written_where_nothing_is_wrong(name: str, tmp_path: Path) -> None:
    content = bytes(broken.whole(getattr(broken, name), tmp_path).content)
    for ours in (False, True):
        repaired = repair(content, "all", ours=ours)
        assert repaired.result.is_sound
        assert not repaired.log.calls
        assert repaired.content == content


def test_only_what_differs_is_written(tmp_path: Path) -> None:
    image = broken.whole(broken.plain, tmp_path)
    before = bytes(image.content)
    image.set_refcount(image.built.data_offsets[3], 7)
    image.flip(image.entry(5), COPIED)
    assert repair(bytes(image.content), "all").content == before


def test_leaks_are_not_freed_by_the_way_while_more_is_wrong(tmp_path: Path) -> None:
    """COPIED is believed only where refcounts are."""
    image = broken.broken("several", tmp_path)
    repaired = repair(bytes(image.content), "leaks")
    assert repaired.result.leaks_fixed == 2
    assert repaired.result.corruptions_fixed == 0
    assert Reader(repaired.content).l2_entry(70 * SIZE) == Reader(image.content).l2_entry(70 * SIZE)


def test_the_mark_of_corruption_stays_while_anything_is_wrong(tmp_path: Path) -> None:
    image = broken.broken("L2 entry with reserved bits", tmp_path)
    image.set_field("incompatible_features", 2)
    content = bytes(image.content)
    assert repair(content, "all").content == content
    assert repair(content, "all", ours=True).content[79] == 0
    aliased = broken.with_aliases(tmp_path)
    aliased.set_field("incompatible_features", 3)
    assert repair(bytes(aliased.content), "all").content[79] == 2, "refcounts are right, so it is not dirty"
    assert repair(bytes(aliased.content), "all", ours=True).content[79] == 0


def test_features_that_nobody_knows_lose_their_promise_first(tmp_path: Path) -> None:
    image = broken.broken("leak and unknown autoclear feature", tmp_path)
    repaired = repair(bytes(image.content), "leaks")
    assert repaired.content[88:96] == bytes(8)
    assert [call.action for call in repaired.log.calls[:2]] == [Action.WRITE, Action.BARRIER]


def test_snapshots_that_are_too_many_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "MAX_SNAPSHOTS", 1)
    image = broken.whole(broken.with_snapshots, tmp_path)
    before = readable(image.content)
    repaired = repair(bytes(image.content), "all")
    assert repaired.result.is_sound
    assert repaired.result.corruptions_fixed == 1
    assert list(snapshot_ids(repaired.content)) == ["1"]
    assert {snapshot for snapshot, _ in lost(before, readable(repaired.content))} == {"2"}
    assert not check_image(repaired.content).all_leaks


def test_refcounts_stay_while_the_table_has_the_snapshots_that_are_to_be_dropped(tmp_path: Path) -> None:
    """There is no place for a new table, so the old one stays, and is the only thing that knows what they have."""
    image = broken.whole(broken.with_snapshots, tmp_path)
    place = image.built.snapshots_offset + 32
    before = image.word(place)
    image.set_word(place, before | 0xF000_0000)  # extra data
    image.set_word(image.entry(50), len(image.content) + 4 * SIZE | COPIED)
    repaired = bytearray(repair(bytes(image.content), "all").content)
    struct.pack_into(">Q", repaired, place, before)
    assert missing_references(check_image(repaired)) == 0


def test_extra_data_is_kept_as_far_as_there_is_room(tmp_path: Path) -> None:
    cut = repair(bytes(broken.broken("snapshot with too much extra data", tmp_path).content), "all").content
    (place,) = struct.unpack_from(">Q", cut, 64)
    assert struct.unpack_from(">I", cut, place + 36) == (1024,)
    assert cut[place + 64 : place + 40 + 1024] == b"\x55" * 1000
    filled = repair(bytes(broken.broken("snapshot without disk size", tmp_path).content), "all").content
    (place,) = struct.unpack_from(">Q", filled, 64)
    assert struct.unpack_from(">IQQQ", filled, place + 36) == (24, 0, 100 * SIZE, 2**64 - 1)


def test_new_refcounts_go_where_nothing_points_to(tmp_path: Path) -> None:
    """Not behind the file, when a reference leads there: what it names would be there all of a sudden."""
    image = broken.broken("block entry lost", tmp_path)
    image.set_word(image.entry(50), len(image.content) + 4 * SIZE | COPIED)
    full = bytes(image.content)
    with pytest.raises(CorruptImageError, match="there is no place that nothing points to, because something refers"):
        repair(full, "all")
    for cluster in (0, 1, 2):
        image.set_word(image.entry(cluster), 0)
    for snapshot in image.built.snapshots:
        for cluster in (0, 1, 2):
            image.set_word(snapshot.l2_entry_offset(cluster), 0)
    repaired = repair(bytes(image.content), "all")
    assert len(repaired.content) == len(full)
    assert repaired.result.corruptions == 2, "a snapshot has the table, too"
    assert lost(readable(image.content), readable(repaired.content)) == []


def test_new_refcounts_do_not_go_where_the_lost_table_was(tmp_path: Path) -> None:
    """Until the header is switched it names that place, and what is there would be taken for the table."""
    image = ImageBuilder(1 << 20, 9).zero(5, preallocated=True).build(tmp_path / "disk.qcow2")
    content = image.path.read_bytes()[: image.refcount_block_offsets[0]]
    assert image.refcount_table_offset > len(content)
    repaired = repair(content, "all")
    assert repaired.result.corruptions_fixed
    assert not any(repaired.content[image.refcount_table_offset :][:SIZE])


def test_more_references_than_a_refcount_can_say(tmp_path: Path) -> None:
    """QEMU wants COPIED on a cluster with a refcount of 1; where several refer to it that would be the end of one."""
    image = broken.whole(broken.one_bit, tmp_path)
    image.set_word(image.entry(50), image.built.data_offsets[3])
    image.set_word(image.entry(3), image.built.data_offsets[3])
    repaired = repair(bytes(image.content), "all")
    assert repaired.content == image.content
    assert repaired.result.corruptions


# ---- what structures share a cluster


def test_nothing_is_written_where_two_structures_are(tmp_path: Path) -> None:
    """An L1 entry that leads to the snapshot table: its "flags" are not put right."""
    image = broken.whole(broken.with_snapshots, tmp_path)
    image.set_word(image.built.l1_entry_offset(1), image.built.snapshots_offset | COPIED)
    content = bytes(image.content)
    repaired = repair(content, "all")
    place = image.built.snapshots_offset
    assert repaired.content[place : place + SIZE] == content[place : place + SIZE]
    storage = MemoryStorage(content)
    found = read_damaged_map(storage, read_header_for_check(storage), [], ALONE)
    assert found.owner(image.built.l1_offset // SIZE) == Structure.L1_TABLE
    assert found.owner(0) == Structure.HEADER


@pytest.mark.parametrize("bits", [COPIED, 1 << 60], ids=["flag", "reserved"])
def test_data_that_an_entry_takes_for_a_table_is_not_put_right(bits: int, tmp_path: Path) -> None:
    """An L1 entry that leads to guest data: what looks like entries there is the guest's."""
    image = broken.whole(broken.plain, tmp_path)
    place = image.built.data_offsets[3]
    image.set_word(place + 8, image.built.data_offsets[0] | bits)
    image.set_word(image.built.l1_entry_offset(1), place | COPIED)
    content = bytes(image.content)
    repaired = repair(content, "all", ours=True)
    assert repaired.content[place : place + SIZE] == content[place : place + SIZE]
    assert lost(readable(content), readable(repaired.content)) == []


def test_a_cluster_of_two_structures_belongs_to_none(tmp_path: Path) -> None:
    image = broken.whole(broken.plain, tmp_path)
    image.set_word(image.built.l1_entry_offset(1), image.built.refcount_table_offset)
    image.set_field("snapshots_offset", 0)
    storage = MemoryStorage(image.content)
    found = read_damaged_map(storage, read_header_for_check(storage), [], ALONE)
    assert found.owner(image.built.refcount_table_offset // SIZE) == Structure.CONTESTED
    image.set_word(image.built.l1_entry_offset(1), 0)
    image.set_field("refcount_table_offset", 0)
    storage = MemoryStorage(image.content)
    assert read_damaged_map(storage, read_header_for_check(storage), [], ALONE).owner(0) == Structure.HEADER


# ---- what only we repair


def test_clusters_of_a_data_file_are_put_where_the_guest_is(tmp_path: Path) -> None:
    image = broken.in_the_wrong_place(tmp_path)
    data = (tmp_path / "data").read_bytes()
    assert repair(bytes(image.content), "all", data=data).content == image.content
    repaired = repair(bytes(image.content), "all", ours=True, data=data)
    assert repaired.result.extra_corruptions_fixed == 2
    report = check_image(repaired.content)
    assert report.is_sound
    assert [bitmap.granules for bitmap in report.bitmaps] == [None], "what the guest sees is another"
    assert Reader(repaired.content, data).read(3 * SIZE, SIZE) == data[3 * SIZE : 4 * SIZE]


@pytest.mark.parametrize("extended_l2", [False, True])
def test_a_raw_data_file_is_mapped_all_over(extended_l2: bool, tmp_path: Path) -> None:
    image = broken.with_gaps(tmp_path, extended_l2=extended_l2)
    data = (tmp_path / "data").read_bytes()
    repaired = repair(bytes(image.content), "all", ours=True, data=data)
    assert repaired.result.is_sound
    assert repaired.result.extra_corruptions_fixed
    reader = Reader(repaired.content, data)
    assert reader.read(0, reader.virtual_size) == data[: reader.virtual_size]
    report = check_image(repaired.content)
    assert report.is_sound and not report.all_leaks


def test_guest_clusters_get_a_cluster_each(tmp_path: Path) -> None:
    image = broken.with_aliases(tmp_path)
    before = readable(image.content)
    repaired = repair(bytes(image.content), "all", ours=True)
    assert repaired.result.extra_corruptions_fixed == 2
    assert repaired.result.corruptions_fixed == repaired.result.leaks_fixed == 0
    assert readable(repaired.content) == before
    entries = [Reader(repaired.content).l2_entry(cluster * SIZE)[0] for cluster in (3, 50, 98)]
    assert len(set(entries)) == 3
    assert all(entry & COPIED for entry in entries)


def test_encrypted_clusters_are_not_moved(tmp_path: Path) -> None:
    """What they hold may depend on where they are. Refcounts are repaired as anywhere."""
    image = broken.with_aliases(tmp_path, lambda: broken.plain().luks(bytes(SIZE)))
    before = bytes(image.content)
    assert repair(before, "all", ours=True).content == before
    image.set_refcount(image.built.data_offsets[5], 4)
    assert repair(bytes(image.content), "all").content == before


def test_bits_that_mean_nothing_are_cleared(tmp_path: Path) -> None:
    whole = bytes(broken.whole(broken.extended, tmp_path).content)
    image = broken.with_odd_bits(tmp_path)
    repaired = repair(bytes(image.content), "all", ours=True)
    assert repaired.content == whole
    assert repaired.result.corruptions_fixed == 2
    assert repaired.result.extra_corruptions_fixed == 1


# ---- a copy


def damaged(folder: Path, name: str = "several") -> Path:
    path = folder / "disk.qcow2"
    path.write_bytes(broken.broken(name, folder).content)
    return path


def test_a_copy_is_repaired_and_the_image_stays_as_it_is(tmp_path: Path) -> None:
    path = damaged(tmp_path)
    path.chmod(0o444)
    content, to = path.read_bytes(), tmp_path / "repaired.qcow2"
    result = check(path, repair="all", to=to)
    assert result.is_sound
    assert path.read_bytes() == content
    assert to.read_bytes() == repair(content, "all").content
    assert sorted(each.name for each in tmp_path.iterdir()) == ["built.qcow2", "disk.qcow2", "repaired.qcow2"]


def test_nobody_may_read_the_copy_who_may_not_read_the_image(tmp_path: Path) -> None:
    path, to = damaged(tmp_path), tmp_path / "repaired.qcow2"
    path.chmod(0o600)
    check(path, repair="all", to=to)
    assert to.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("is_link", [False, True])
def test_nothing_is_copied_over(is_link: bool, tmp_path: Path) -> None:
    path, to = damaged(tmp_path), tmp_path / "there"
    if is_link:
        to.symlink_to(tmp_path / "nowhere")
    else:
        to.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        repair_to(path, to, mode="all")
    assert is_link or to.read_bytes() == b"precious"
    assert not list(tmp_path.glob("*.partial"))


def test_what_cannot_be_repaired_leaves_no_copy(tmp_path: Path) -> None:
    path = damaged(tmp_path, "no refcounts")
    with pytest.raises(CorruptImageError, match="have to be rebuilt"):
        repair_to(path, tmp_path / "repaired.qcow2", mode="leaks")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["built.qcow2", "disk.qcow2"]


def test_a_name_that_cannot_be_made_durable_leaves_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> None:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr("qcow2_plugin.operations.new_files.make_names_durable", fail)
    with pytest.raises(OSError, match="no"):
        repair_to(damaged(tmp_path), tmp_path / "repaired.qcow2", mode="all")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["built.qcow2", "disk.qcow2"]


def test_a_data_file_is_read_and_the_copy_names_the_same(tmp_path: Path) -> None:
    image = broken.in_the_wrong_place(tmp_path)
    path, to = tmp_path / "disk.qcow2", tmp_path / "repaired.qcow2"
    path.write_bytes(image.content)
    data = (tmp_path / "data").read_bytes()
    (tmp_path / "data").chmod(0o444)
    result = repair_to(path, to, mode="all", repair_ours=True)
    assert result.extra_corruptions_fixed == 2
    assert (tmp_path / "data").read_bytes() == data
    with open_image(to) as opened:
        assert opened.pread(SIZE, 3 * SIZE) == data[3 * SIZE : 4 * SIZE]


def test_an_image_in_use_is_not_repaired(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(broken.whole(broken.plain, tmp_path).content)
    with open_image(path), pytest.raises(ImageLockedError):
        check(path, repair="all")


def test_a_corrupt_image_can_be_written_to_after_its_repair(tmp_path: Path) -> None:
    path = damaged(tmp_path, "corrupt and shared clusters flagged")
    with pytest.raises(ReadOnlyImageError, match="qcow2 check -r all"):
        open_image(path, writable=True)
    assert check(path, repair="all").is_sound
    with open_image(path, writable=True) as image:
        image.pwrite(NOISE[:SIZE], 0)
    assert check(path).is_sound


def test_holes_are_copied_as_holes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.write(b"begin")
        file.seek(64 << 20)
        file.write(bytes(1 << 20) + b"middle")
        file.truncate(128 << 20)
    target = create_given(tmp_path / "target")
    opened = open_given(source)
    copy_content(opened, target)
    assert target.allocated_size() <= 2 << 20
    assert target.size() == 128 << 20
    assert target.pread(5, 0) + target.pread(6, 65 << 20) == b"beginmiddle"
    target.close()
    opened.close()


@pytest.mark.parametrize("has_links", [True, False])
def test_names_are_given_once(has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: str, target: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not has_links:
        monkeypatch.setattr("os.link", link)
    for content in (b"first", b"second"):
        (tmp_path / "temporary").write_bytes(content)
        if content == b"first":
            directory.give_name(str(tmp_path / "temporary"), tmp_path / "name")
        else:
            with pytest.raises(FileExistsError):
                directory.give_name(str(tmp_path / "temporary"), tmp_path / "name")
    assert (tmp_path / "name").read_bytes() == b"first"
    assert (tmp_path / "temporary").exists()
