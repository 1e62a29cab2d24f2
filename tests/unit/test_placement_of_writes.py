"""Where writes go, entry by entry: in place or elsewhere, with what surrounds them, and what loses a reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2_plugin.errors import CorruptImageError
from tests.support.builder import ImageBuilder
from tests.support.clusters import CLEAR, SNAPSHOT, STATES, below, builder, parts, text, touched
from tests.support.fields import ALL_PARTS, COPIED, ZERO
from tests.support.image_checker import OFFSET_MASK
from tests.support.in_memory import InMemory, hide_nothing

# ---- writes

WRITES = [(0, 512), (0, 100), (511, 1), (200, 100), (100, 412)]  # offset in the cluster and length


@pytest.mark.parametrize(("within", "length"), WRITES)
@pytest.mark.parametrize("state", ["unallocated", "zero", "normal", "kept", "packed"])
@pytest.mark.parametrize("over", [False, True])
def test_a_write_to_a_cluster(state: str, over: bool, within: int, length: int, tmp_path: Path) -> None:
    """In place where the cluster is ours alone; around it is what was to be read there, and no old payload shows."""
    image = builder()
    for cluster in (1, 4):  # the backing file ends inside the second one
        STATES[state](image, cluster)
    backing = below(image) if over else None
    view = bytearray(image.expected(backing or b""))
    memory = InMemory(image, tmp_path, backing=backing)
    file_size = len(memory.storage.content)
    for number, cluster in enumerate((1, 4)):
        word, _ = memory.l2_entry(cluster)
        data = text(1000 + number, length)
        start = cluster * 512 + within
        view[start : start + length] = data

        memory.disk.pwrite(data, start)

        memory.settle()
        after, _ = memory.l2_entry(cluster)
        assert after & ~OFFSET_MASK == COPIED
        assert memory.cluster(after & OFFSET_MASK) == view[cluster * 512 : (cluster + 1) * 512]
        assert (after & OFFSET_MASK == word & OFFSET_MASK) == (state in ("normal", "kept"))
        if state == "packed":
            assert all(memory.refcount(place) == 0 for place in touched(word, 9)) or cluster == 1
    if state in ("normal", "kept"):
        assert len(memory.storage.content) == file_size
    assert memory.view() == view
    memory.assert_clean()
    memory.disk.close()
    memory.assert_clean()


@pytest.mark.parametrize(("within", "length"), WRITES)
@pytest.mark.parametrize("state", ["normal", "kept", "packed"])
def test_a_write_to_a_shared_cluster_goes_elsewhere(state: str, within: int, length: int, tmp_path: Path) -> None:
    image = builder()
    STATES[state](image, 1)
    image.snapshot(SNAPSHOT.encode(), b"then")
    then = image.expected()
    memory = InMemory(image, tmp_path)
    word, _ = memory.l2_entry(1)
    (place,) = touched(word, 9)
    old, count = memory.cluster(place), memory.refcount(place)
    data = text(1000, length)

    memory.disk.pwrite(data, 512 + within)

    memory.settle()
    after, _ = memory.l2_entry(1)
    assert after & COPIED and after & OFFSET_MASK not in (0, place)
    assert (memory.refcount(place), memory.refcount(after & OFFSET_MASK)) == (count - 1, 1)
    assert memory.cluster(place) == old
    assert memory.view(SNAPSHOT) == then
    assert memory.view() == then[: 512 + within] + data + then[512 + within + length :]
    memory.assert_clean()


def test_one_write_over_clusters_of_every_kind(tmp_path: Path) -> None:
    image = builder(12)
    for cluster, state in enumerate(("normal", "unallocated", "packed", "zero", "kept", "normal", "packed"), 1):
        STATES[state](image, cluster)
    backing = below(image)
    view = bytearray(image.expected(backing))
    memory = InMemory(image, tmp_path, backing=backing)
    kept = [memory.l2_entry(cluster)[0] & OFFSET_MASK for cluster in (1, 5, 6)]
    data = text(1000, 6 * 4096)
    memory.disk.pwrite(data, 4096 + 1000)
    view[4096 + 1000 : 4096 + 1000 + len(data)] = data
    memory.settle()
    assert [memory.l2_entry(cluster)[0] & OFFSET_MASK for cluster in (1, 5, 6)] == kept
    assert memory.view() == view
    memory.assert_clean()


def test_a_write_over_the_border_of_two_tables(tmp_path: Path) -> None:
    image = ImageBuilder(3 * 64 * 512, 9).data(63, text(63, 512)).data(100, b"x")
    view = bytearray(image.expected())
    memory = InMemory(image, tmp_path)
    data = text(1000, 3 * 512 + 66 * 512)
    memory.disk.pwrite(data, 62 * 512 + 5)
    view[62 * 512 + 5 : 62 * 512 + 5 + len(data)] = data
    memory.settle()
    assert memory.view() == view
    assert all(memory.l1_entry(index) & COPIED for index in range(3))
    memory.assert_clean()


def test_compressed_neighbours_in_one_host_cluster_lose_one_reference_each(tmp_path: Path) -> None:
    """A host cluster is free when the last stream in it is gone; a stream that touches two is a reference to both."""
    image = builder(12, l1_size=4)
    for cluster in range(1, 5):
        image.compressed(cluster, text(cluster, 1400))
    for cluster in range(6, 10):
        image.compressed(cluster, text(cluster, 3300))
    view = bytearray(image.expected())
    memory = InMemory(image, tmp_path)
    places = {cluster: touched(memory.l2_entry(cluster)[0], 12) for cluster in (*range(1, 5), *range(6, 10))}
    assert max(map(len, places.values())) == 2, "the builder packs them so that one touches two clusters"
    counts = {place: memory.refcount(place) for each in places.values() for place in each}
    assert max(counts.values()) > 2
    for number, cluster in enumerate((2, 7, 1, 9, 4, 8, 6, 3)):
        start = cluster * 4096
        if number % 3 == 2:
            memory.disk.discard(start, 4096)
            view[start : start + 4096] = bytes(4096)
        else:
            memory.disk.pwrite(b"n" * 100, start + 50)
            view[start + 50 : start + 150] = b"n" * 100
        for place in places[cluster]:
            counts[place] -= 1
        memory.settle()
        assert {place: memory.refcount(place) for place in counts if counts[place]} == {
            place: count for place, count in counts.items() if count
        }
        assert memory.view() == view
        memory.assert_clean()


# ---- writes to subclusters


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("state", ["unallocated", "zero", "parts of zero", "parts", "space", "kept", "normal"])
def test_a_write_inside_one_subcluster(state: str, over: bool, tmp_path: Path) -> None:
    """Only the rest of that subcluster is filled up, from below or with zeros: not with what the space held."""
    for index in (0, 4, 8, 16, 30, 31):
        image = builder(14, extended_l2=True)
        STATES[state](image, 1)
        backing = below(image) if over else None
        view = bytearray(image.expected(backing or b""))
        memory = InMemory(image, tmp_path, backing=backing)
        word, bitmap = memory.l2_entry(1)
        start = 16384 + index * 512 + 100
        view[start : start + 50] = b"n" * 50

        memory.disk.pwrite(b"n" * 50, start)

        memory.settle()
        after, after_bitmap = memory.l2_entry(1)
        assert after & ~OFFSET_MASK == COPIED and after & OFFSET_MASK
        if word & OFFSET_MASK:
            assert after == word
        assert after_bitmap == (bitmap | 1 << index) & ~(1 << 32 + index)
        assert memory.view() == view
        memory.assert_clean()


def test_a_write_over_several_subclusters_fills_both_ends(tmp_path: Path) -> None:
    image = builder(14, extended_l2=True)
    parts(image, 1)
    image.subclusters(2, text(2, 16384), allocated=0)
    backing = below(image)
    view = bytearray(image.expected(backing))
    memory = InMemory(image, tmp_path, backing=backing)
    bitmaps = [memory.l2_entry(cluster)[1] for cluster in (1, 2)]
    first, last = 29, 3  # subclusters: three of the first cluster, four of the second
    start, end = 16384 + first * 512 + 10, 2 * 16384 + (last + 1) * 512 - 10
    memory.disk.pwrite(b"n" * (end - start), start)
    view[start:end] = b"n" * (end - start)
    memory.settle()
    masks = [0xE000_0000, 0xF]
    assert [memory.l2_entry(cluster)[1] for cluster in (1, 2)] == [
        (bitmap | mask) & ~(mask << 32) for bitmap, mask in zip(bitmaps, masks, strict=True)
    ]
    assert memory.view() == view
    memory.assert_clean()


@pytest.mark.parametrize("index", [0, 4, 6, 20, 27, 31])
def test_a_shared_cluster_moves_with_its_subclusters(index: int, tmp_path: Path) -> None:
    image = builder(14, extended_l2=True)
    parts(image, 1)
    image.snapshot(SNAPSHOT.encode(), b"then")
    backing = below(image)
    then = image.expected(backing)
    memory = InMemory(image, tmp_path, backing=backing)
    word, bitmap = memory.l2_entry(1)
    start = 16384 + index * 512 + 100
    memory.disk.pwrite(b"n" * 50, start)
    memory.settle()
    after, after_bitmap = memory.l2_entry(1)
    assert after & COPIED and after & OFFSET_MASK not in (0, word & OFFSET_MASK)
    assert after_bitmap == (bitmap | 1 << index) & ~(1 << 32 + index)
    assert memory.view(SNAPSHOT) == then
    assert memory.view() == then[:start] + b"n" * 50 + then[start + 50 :]
    memory.assert_clean()


def test_a_compressed_cluster_becomes_one_with_all_subclusters(tmp_path: Path) -> None:
    image = builder(14, extended_l2=True).compressed(1, text(1, 9000))
    view = bytearray(image.expected())
    memory = InMemory(image, tmp_path)
    memory.disk.pwrite(b"n" * 50, 16384 + 700)
    view[16384 + 700 : 16384 + 750] = b"n" * 50
    memory.settle()
    word, bitmap = memory.l2_entry(1)
    assert word & COPIED and bitmap == ALL_PARTS
    assert memory.view() == view
    memory.assert_clean()


# ---- data files


@pytest.mark.parametrize("extended", [False, True])
def test_a_data_file_keeps_every_cluster_where_it_is(extended: bool, tmp_path: Path) -> None:
    bits = 14 if extended else 9
    size = 1 << bits
    image = builder(bits, extended_l2=extended).data_file(tmp_path / "data", b"data")
    image.zero(2).zero(3, preallocated=True, payload=text(3, size))
    view = bytearray(image.expected())
    memory = InMemory(image, tmp_path)
    for cluster in (0, 1, 2, 3, 5):
        offset = cluster * size + 100
        memory.disk.pwrite(b"n" * 300, offset)
        view[offset : offset + 300] = b"n" * 300
    memory.settle()
    assert memory.l2_entry(0)[0] == COPIED
    assert [memory.l2_entry(cluster)[0] for cluster in (1, 2, 3, 5)] == [
        COPIED | cluster * size for cluster in (1, 2, 3, 5)
    ]
    assert memory.view() == view
    assert memory.data is not None and memory.data.content[5 * size + 100 : 5 * size + 400] == b"n" * 300
    memory.assert_clean()
    memory.reopen()
    assert memory.disk.pread(len(view), 0) == view


def test_clearing_the_first_cluster_of_a_data_file_and_writing_it_again(tmp_path: Path) -> None:
    """Its entry is COPIED alone, then the zero flag alone, then COPIED alone."""
    image = builder().data_file(tmp_path / "data", b"data").data(0, text(0, 512)).data(1, text(1, 512))
    view = bytearray(image.expected())
    memory = InMemory(image, tmp_path)
    assert memory.l2_entry(0)[0] == COPIED
    memory.disk.pwrite(b"n" * 100, 10)  # in place
    memory.disk.flush()
    assert memory.l2_entry(0)[0] == COPIED
    memory.disk.write_zeroes(0, 512, may_unmap=False)
    memory.disk.flush()
    assert memory.l2_entry(0)[0] == ZERO
    memory.disk.pwrite(b"n" * 100, 10)
    memory.disk.flush()
    assert memory.l2_entry(0)[0] == COPIED
    view[:512] = bytes(10) + b"n" * 100 + bytes(402)
    assert memory.view() == view
    memory.assert_clean()


@pytest.mark.parametrize("state", ["unallocated", "zero", "kept", "parts", "parts of zero", "space"])
def test_a_raw_data_file_is_written_only_where_entries_say_data(state: str, tmp_path: Path) -> None:
    """A write to a place that an entry calls zero makes it and its neighbours say data; the file shows the write."""
    is_extended = state in ("parts", "parts of zero", "space")
    bits = 14 if is_extended else 9
    size = 1 << bits
    image = builder(bits, extended_l2=is_extended).data_file(tmp_path / "data", b"data", raw=True)
    STATES[state](image, 1)
    STATES[state](image, 3)
    view = bytearray(image.expected())
    hide_nothing(image)
    memory = InMemory(image, tmp_path)
    memory.disk.pwrite(b"n" * 300, size + 100)
    view[size + 100 : size + 400] = b"n" * 300
    memory.settle()
    for cluster in (0, 1, 2, 3, 5):
        assert memory.l2_entry(cluster) == (COPIED | cluster * size, ALL_PARTS if is_extended else 0)
    assert memory.view() == view
    assert memory.data is not None and memory.data.content[: len(view)] == view
    memory.assert_clean()


@pytest.mark.parametrize("state", ["kept", "parts", "space"])
def test_bytes_that_another_program_left_in_a_raw_data_file_never_show(state: str, tmp_path: Path) -> None:
    """They are hidden by entries that say zero, and such entries are about to say data."""
    is_extended = state != "kept"
    bits = 14 if is_extended else 9
    size = 1 << bits
    image = builder(bits, extended_l2=is_extended).data_file(tmp_path / "data", b"data", raw=True)
    for cluster in (1, 3):
        STATES[state](image, cluster)
    view = bytearray(image.expected())
    memory = InMemory(image, tmp_path)
    assert memory.disk.pread(len(view), 0) == view
    memory.disk.pwrite(b"n" * 300, size + 100)
    view[size + 100 : size + 400] = b"n" * 300
    assert memory.disk.pread(len(view), 0) == view
    memory.settle()
    assert memory.view() == view
    assert memory.data is not None and memory.data.content[: len(view)] == view


@pytest.mark.parametrize("cluster", [1, 3])
def test_a_cluster_that_is_elsewhere_in_its_data_file_is_not_written(cluster: int, tmp_path: Path) -> None:
    image = builder().data_file(tmp_path / "data", b"data").data(1, b"1").data(3, b"3")
    image.entry(cluster, COPIED | (4 - cluster) * 512)
    memory = InMemory(image, tmp_path)
    assert memory.data is not None
    before, entry = bytes(memory.data.content), memory.l2_entry(cluster)
    requests: list[Callable[[], None]] = [
        lambda: memory.disk.pwrite(b"x", cluster * 512),
        lambda: memory.disk.pwrite(b"x" * 512, cluster * 512),
        lambda: memory.disk.write_zeroes(cluster * 512, 512, may_unmap=False),
        lambda: memory.disk.write_zeroes(cluster * 512, 512),
        lambda: memory.disk.discard(cluster * 512, 512),
    ]
    for request in requests:
        with pytest.raises(CorruptImageError):
            request()
    assert memory.data.content == before
    assert memory.l2_entry(cluster) == entry


# ---- tables that snapshots share


@pytest.mark.parametrize("request_name", ["write", *CLEAR])
@pytest.mark.parametrize("extended", [False, True])
def test_a_shared_table_is_copied_before_it_changes(extended: bool, request_name: str, tmp_path: Path) -> None:
    bits = 14 if extended else 9
    size = 1 << bits
    image = builder(bits, extended_l2=extended)
    for cluster in range(1, 4):
        image.data(cluster, text(cluster, size))
    image.snapshot(SNAPSHOT.encode(), b"then")
    then = image.expected()
    memory = InMemory(image, tmp_path)
    old_table = memory.l1_entry(0)
    content = memory.cluster(old_table & OFFSET_MASK)
    assert not old_table & COPIED and memory.refcount(old_table) == 2

    view = bytearray(then)
    if request_name == "write":
        memory.disk.pwrite(b"n" * 100, 2 * size + 10)
        view[2 * size + 10 : 2 * size + 110] = b"n" * 100
    else:
        CLEAR[request_name](memory.disk, 2 * size, size)
        view[2 * size : 3 * size] = bytes(size)

    memory.settle()
    table = memory.l1_entry(0)
    assert table & COPIED and table & OFFSET_MASK != old_table & OFFSET_MASK
    assert (memory.refcount(old_table), memory.refcount(table & OFFSET_MASK)) == (1, 1)
    assert memory.cluster(old_table & OFFSET_MASK) == content
    assert memory.view(SNAPSHOT) == then
    assert memory.view() == view
    memory.assert_clean()


@pytest.mark.parametrize("request_name", CLEAR)
def test_a_request_that_changes_nothing_copies_no_table(request_name: str, tmp_path: Path) -> None:
    image = builder().zero(1).zero(2)
    image.snapshot(SNAPSHOT.encode(), b"then")
    memory = InMemory(image, tmp_path)
    before = bytes(memory.storage.content)
    CLEAR[request_name](memory.disk, 512, 1024)
    memory.disk.close()
    assert memory.storage.content == before
