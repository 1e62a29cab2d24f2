"""What becomes of L2 entries, refcounts and bytes when guest clusters are cleared: the tables of "write zeroes" and
"discard", row by row."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.builder import ImageBuilder
from tests.support.clusters import ALL_ZERO, CLEAR, CLUSTERS, SNAPSHOT, STATES, below, builder, parts, text, touched
from tests.support.fields import ALL_PARTS, COMPRESSED, COPIED, ZERO
from tests.support.image_checker import OFFSET_MASK
from tests.support.in_memory import InMemory, hide_nothing

AFTER: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "same": lambda word, bitmap: (word, bitmap),
    "0": lambda word, bitmap: (0, 0),
    "zero": lambda word, bitmap: (ZERO, 0),
    "kept": lambda word, bitmap: (word | ZERO, 0),
    "all zero": lambda word, bitmap: (0, ALL_ZERO),
    "all kept": lambda word, bitmap: (word, ALL_ZERO),
}

Rows = dict[str, tuple[str, str, str]]
STANDARD: Rows = {  # what is there: the entry after zeros without unmap, zeros that may unmap, discard
    "unallocated": ("zero", "zero", "same"),
    "zero": ("same", "same", "same"),
    "normal": ("kept", "zero", "zero"),
    "kept": ("same", "zero", "zero"),
    "packed": ("zero", "zero", "zero"),
}
WITH_BACKING: Rows = {**STANDARD, "unallocated": ("zero", "zero", "zero")}
VERSION_2: Rows = {name: ("0", "0", "0") for name in ("unallocated", "normal", "packed")}
DATA_FILE: Rows = {name: row for name, row in STANDARD.items() if name != "packed"}
DATA_FILE_FIRST: Rows = {  # an entry cannot say that offset 0 is kept and zero
    **{name: row for name, row in DATA_FILE.items() if name != "kept"},
    "normal": ("zero", "zero", "zero"),
}
EXTENDED: Rows = {
    "unallocated": ("all zero", "all zero", "same"),
    "zero": ("same", "same", "same"),
    "parts of zero": ("all zero", "all zero", "same"),
    "normal": ("all kept", "all zero", "all zero"),
    "parts": ("all kept", "all zero", "all zero"),
    "space": ("all kept", "all zero", "all zero"),
    "kept": ("same", "all zero", "all zero"),
    "packed": ("all zero", "all zero", "all zero"),
}
EXTENDED_WITH_BACKING: Rows = {
    **EXTENDED,
    "unallocated": ("all zero", "all zero", "all zero"),
    "parts of zero": ("all zero", "all zero", "all zero"),
}
EXTENDED_DATA_FILE: Rows = {name: row for name, row in EXTENDED.items() if name != "packed"}
RAW_DATA_FILE: Rows = {name: ("same", "same", "same") for name in DATA_FILE}  # the file says zeros, not the entry
RAW_FIRST: Rows = {name: row for name, row in RAW_DATA_FILE.items() if name != "kept"}
EXTENDED_RAW: Rows = {name: ("same", "same", "same") for name in EXTENDED_DATA_FILE}

EXTENDED_OPTIONS: dict[str, object] = {"cluster_bits": 14, "extended_l2": True}
FORMS: dict[str, tuple[Rows, dict[str, object], int]] = {  # rows, options of the builder, the guest cluster
    "512": (STANDARD, {}, 1),
    "4k": (STANDARD, {"cluster_bits": 12}, 1),
    "64k": (STANDARD, {"cluster_bits": 16}, 1),
    "last cluster of the disk": (STANDARD, {"cluster_bits": 12}, CLUSTERS - 1),
    "backing": (WITH_BACKING, {"over": True}, 1),
    "end of the backing file": (WITH_BACKING, {"over": True}, 4),
    "behind the backing file": (WITH_BACKING, {"over": True}, 6),
    "version 2": (VERSION_2, {"version": 2}, 1),
    "1-bit refcounts": (STANDARD, {"refcount_bits": 1, "pack": False}, 1),
    "64-bit refcounts": (STANDARD, {"refcount_bits": 64}, 1),
    "data file": (DATA_FILE, {"data_file": "plain"}, 1),
    "first cluster of a data file": (DATA_FILE_FIRST, {"data_file": "plain"}, 0),
    "raw data file": (RAW_DATA_FILE, {"data_file": "raw"}, 1),
    "first cluster of a raw data file": (RAW_FIRST, {"data_file": "raw"}, 0),
    "extended": (EXTENDED, EXTENDED_OPTIONS, 1),
    "extended over backing": (EXTENDED_WITH_BACKING, {**EXTENDED_OPTIONS, "over": True}, 1),
    "extended in a data file": (EXTENDED_DATA_FILE, {**EXTENDED_OPTIONS, "data_file": "plain"}, 1),
    "extended, first of a data file": (EXTENDED_DATA_FILE, {**EXTENDED_OPTIONS, "data_file": "plain"}, 0),
    "extended in a raw data file": (EXTENDED_RAW, {**EXTENDED_OPTIONS, "data_file": "raw"}, 1),
}
CASES = [
    pytest.param(form, state, request, id=f"{form}-{state}-{request}".replace(" ", "_"))
    for form, (rows, _, _) in FORMS.items()
    for state in rows
    for request in CLEAR
]


def made(form: str, state: str, folder: Path) -> tuple[InMemory, bytes]:
    """The image of a form with one cluster in a state, and what the guest sees of it."""
    _, options, cluster = FORMS[form]
    options = dict(options)
    over, data_file = options.pop("over", False), options.pop("data_file", None)
    image = builder(**options)  # type: ignore[arg-type] # of the builder
    if data_file:
        image.data_file(folder / "data", b"data", raw=data_file == "raw")
    image.told.pop(cluster, None)
    STATES[state](image, cluster)
    backing = below(image) if over else None
    view = image.expected(backing or b"")
    if data_file == "raw":
        hide_nothing(image)
    return InMemory(image, folder, backing=backing), view


@pytest.mark.parametrize(("form", "state", "request_name"), CASES)
def test_a_whole_cluster_is_cleared(form: str, state: str, request_name: str, tmp_path: Path) -> None:
    """Every row of the tables. Refcounts fall on disk after the entry, never with it."""
    rows, _, cluster = FORMS[form]
    image, before = made(form, state, tmp_path)
    size = image.disk.cluster_size
    word, bitmap = image.l2_entry(cluster)
    expected = AFTER[rows[state][list(CLEAR).index(request_name)]](word, bitmap)
    start, end = cluster * size, min((cluster + 1) * size, len(before))

    CLEAR[request_name](image.disk, start, end - start)

    after = bytearray(before)
    after[start:end] = bytes(end - start)
    assert image.disk.pread(len(before), 0) == after
    was = [] if image.data is not None else touched(word, image.field("cluster_bits"))
    counts = [image.refcount(place) for place in was]
    image.disk.flush()
    assert image.l2_entry(cluster) == expected
    assert [image.refcount(place) for place in was] == counts
    image.disk.flush()
    lost = 0 if touched(expected[0], image.field("cluster_bits")) else 1
    assert [image.refcount(place) for place in was] == [count - lost for count in counts]
    assert image.view() == after
    if request_name != "zero" and image.data is None and lost and not word & COMPRESSED:
        assert all(image.cluster(place) == bytes(size) for place in was), "not given back"
    if "raw" in form:
        assert image.data is not None and image.data.content[: len(after)] == after
    elif image.data is not None and request_name != "zero" and state in ("normal", "kept", "parts", "space"):
        assert image.cluster(start, in_data_file=True) == bytes(size), "not given back"
    image.assert_clean()
    image.disk.close()
    image.assert_clean()


@pytest.mark.parametrize("request_name", CLEAR)
@pytest.mark.parametrize("state", ["normal", "kept", "packed"])
def test_a_shared_cluster_is_cleared(state: str, request_name: str, tmp_path: Path) -> None:
    """Without unmap it stays referred to, without COPIED; otherwise the snapshot alone has it."""
    image = builder()
    STATES[state](image, 1)
    image.snapshot(SNAPSHOT.encode(), b"then")
    then = image.expected()
    memory = InMemory(image, tmp_path)
    word, _ = memory.l2_entry(1)
    assert not word & COPIED
    (place,) = touched(word, 9)
    count = memory.refcount(place)

    CLEAR[request_name](memory.disk, 512, 512)

    memory.settle()
    expected, _ = AFTER[STANDARD[state][list(CLEAR).index(request_name)]](word, 0)
    assert memory.l2_entry(1) == (expected, 0)
    assert memory.refcount(place) == count - (not expected & OFFSET_MASK)
    assert memory.view(SNAPSHOT) == then
    assert memory.view() == then[:512] + bytes(512) + then[1024:]
    memory.assert_clean()
    if expected & OFFSET_MASK:  # and is not written in place
        memory.disk.pwrite(b"x" * 100, 600)
        memory.settle()
        assert memory.l2_entry(1)[0] & OFFSET_MASK not in (0, place)
        assert memory.l2_entry(1)[0] & COPIED
        assert memory.refcount(place) == count - 1
        assert memory.view(SNAPSHOT) == then
        assert memory.view() == then[:512] + bytes(88) + b"x" * 100 + bytes(324) + then[1024:]
        memory.assert_clean()


@pytest.mark.parametrize("request_name", CLEAR)
@pytest.mark.parametrize("state", ["unallocated", "normal", "packed"])
def test_version_2_over_a_backing_file_has_no_way_to_say_zero(state: str, request_name: str, tmp_path: Path) -> None:
    image = builder(version=2)
    STATES[state](image, 1)
    backing = below(image)
    before = image.expected(backing)
    memory = InMemory(image, tmp_path, backing=backing)
    word, _ = memory.l2_entry(1)

    CLEAR[request_name](memory.disk, 512, 512)

    memory.settle()
    after, _ = memory.l2_entry(1)
    if request_name == "discard":
        assert after == word
        assert memory.view() == before
    else:
        assert after & COPIED and not after & (ZERO | COMPRESSED)
        assert (after == word) == (state == "normal")
        assert memory.cluster(after & OFFSET_MASK) == bytes(512)
        assert memory.view() == before[:512] + bytes(512) + before[1024:]
    memory.assert_clean()


@pytest.mark.parametrize("request_name", CLEAR)
@pytest.mark.parametrize("extended", [False, True])
def test_nothing_is_made_where_nothing_is(extended: bool, request_name: str, tmp_path: Path) -> None:
    """No L2 table is allocated to record nothing."""
    bits = 14 if extended else 9
    image = ImageBuilder(40 << 2 * bits - 3, bits, extended_l2=extended).data(0, b"x")
    memory = InMemory(image, tmp_path)
    before = bytes(memory.storage.content)
    CLEAR[request_name](memory.disk, 1 << bits, memory.disk.virtual_size - (1 << bits))
    memory.disk.close()
    assert len(memory.storage.content) == len(before)
    tables = [memory.l1_entry(index) for index in range(memory.field("l1_size"))]
    assert [index for index, entry in enumerate(tables) if entry] == [0]


# ---- parts of clusters

PARTS: dict[str, Callable[[int, int, int], tuple[int, int]]] = {  # word, bitmap, mask of what is cleared
    "unallocated": lambda word, bitmap, mask: (0, mask << 32),
    "zero": lambda word, bitmap, mask: (word, bitmap),
    "parts of zero": lambda word, bitmap, mask: (0, bitmap | mask << 32),
    "normal": lambda word, bitmap, mask: (word, ALL_PARTS & ~mask | mask << 32),
    "parts": lambda word, bitmap, mask: (word, bitmap & ~mask | mask << 32),
    "space": lambda word, bitmap, mask: (word, mask << 32),
    "kept": lambda word, bitmap, mask: (word, bitmap),
}


@pytest.mark.parametrize("mask", [1, 0x8000_0000, 0x00FF_FF00, 0x7FFF_FFFF])
@pytest.mark.parametrize("request_name", ["zero", "unmap"])
@pytest.mark.parametrize("data_file", [None, "plain", "raw"])
@pytest.mark.parametrize("state", PARTS)
def test_subclusters_are_cleared(
    state: str, data_file: str | None, request_name: str, mask: int, tmp_path: Path
) -> None:
    image = builder(14, extended_l2=True)
    if data_file:
        image.data_file(tmp_path / "data", b"data", raw=data_file == "raw")
    STATES[state](image, 1)
    before = bytearray(image.expected())
    if data_file == "raw":
        hide_nothing(image)
    memory = InMemory(image, tmp_path)
    word, bitmap = memory.l2_entry(1)
    first, last = (mask & -mask).bit_length() - 1, mask.bit_length() - 1
    start, end = (32 + first) * 512, (32 + last + 1) * 512

    CLEAR[request_name](memory.disk, start, end - start)

    before[start:end] = bytes(end - start)
    memory.settle()
    assert memory.l2_entry(1) == ((word, bitmap) if data_file == "raw" else PARTS[state](word, bitmap, mask))
    assert memory.view() == before
    if data_file == "raw":
        assert memory.data is not None and memory.data.content[: len(before)] == before
    memory.assert_clean()


def test_subclusters_of_a_shared_cluster_are_cleared_without_moving_it(tmp_path: Path) -> None:
    image = builder(14, extended_l2=True)
    parts(image, 1)
    image.snapshot(SNAPSHOT.encode(), b"then")
    then = image.expected()
    memory = InMemory(image, tmp_path)
    word, bitmap = memory.l2_entry(1)
    memory.disk.write_zeroes(32 * 512, 9 * 512)
    memory.settle()
    assert memory.l2_entry(1) == (word, bitmap & ~0x1FF | 0x1FF << 32)
    assert memory.refcount(word & OFFSET_MASK) == 2
    assert memory.view(SNAPSHOT) == then
    assert memory.view() == then[: 32 * 512] + bytes(9 * 512) + then[41 * 512 :]
    memory.assert_clean()


@pytest.mark.parametrize("request_name", ["zero", "unmap"])
def test_subclusters_of_a_compressed_cluster_are_written(request_name: str, tmp_path: Path) -> None:
    image = builder(14, extended_l2=True).compressed(1, text(1, 9000))
    before = image.expected()
    memory = InMemory(image, tmp_path)
    old = touched(memory.l2_entry(1)[0], 14)
    CLEAR[request_name](memory.disk, 34 * 512, 5 * 512)
    memory.settle()
    word, bitmap = memory.l2_entry(1)
    assert word & COPIED and not word & COMPRESSED
    assert bitmap == ALL_PARTS
    assert [memory.refcount(place) for place in old] == [0] * len(old)
    assert memory.view() == before[: 34 * 512] + bytes(5 * 512) + before[39 * 512 :]
    memory.assert_clean()


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("request_name", CLEAR)
def test_odd_ends_of_a_range_are_data_or_stay(request_name: str, extended: bool, tmp_path: Path) -> None:
    """Zeros to parts of units are written; a discard of them is no business of ours."""
    bits = 14 if extended else 9
    size = 1 << bits
    image = builder(bits, extended_l2=extended)
    for cluster in range(1, 5):
        image.data(cluster, text(cluster, size))
    before = image.expected()
    memory = InMemory(image, tmp_path)
    words = [memory.l2_entry(cluster) for cluster in range(1, 5)]
    start, end = size + size - 100, 4 * size + 77

    CLEAR[request_name](memory.disk, start, end - start)

    memory.settle()
    after = [memory.l2_entry(cluster) for cluster in range(1, 5)]
    assert (after[0], after[3]) == (words[0], words[3])
    view = bytearray(before)
    if request_name == "discard":
        start, end = 2 * size, 4 * size
    view[start:end] = bytes(end - start)
    assert memory.view() == view
    if request_name == "zero":
        assert [word & OFFSET_MASK for word, _ in after[1:3]] == [word & OFFSET_MASK for word, _ in words[1:3]]
    else:
        assert after[1] == after[2] == ((0, ALL_ZERO) if extended else (ZERO, 0))
    memory.assert_clean()


@pytest.mark.parametrize("request_name", CLEAR)
def test_the_last_piece_of_the_disk_counts_as_whole(request_name: str, tmp_path: Path) -> None:
    """A range that ends with the disk clears its last cluster, one that ends a byte before does not."""
    image = builder(12)
    memory = InMemory(image, tmp_path)
    end = memory.disk.virtual_size
    word, _ = memory.l2_entry(CLUSTERS - 1)
    CLEAR[request_name](memory.disk, end - 2048, 2047)
    memory.settle()
    assert memory.l2_entry(CLUSTERS - 1) == (word, 0)
    expected = bytearray(image.expected())
    if request_name != "discard":
        expected[end - 2048 : end - 1] = bytes(2047)
    assert memory.view() == expected
    CLEAR[request_name](memory.disk, end - 2048, 2048)
    memory.settle()
    assert memory.l2_entry(CLUSTERS - 1) == ((word | ZERO, 0) if request_name == "zero" else (ZERO, 0))
    memory.assert_clean()


@pytest.mark.parametrize("data_file", [None, "plain", "raw"])
def test_requests_for_nothing_do_nothing(data_file: str | None, tmp_path: Path) -> None:
    """At the end of the disk, too."""
    image = builder().data(1, text(1, 512))
    if data_file:
        image.data_file(tmp_path / "data", b"data", raw=data_file == "raw")
    memory = InMemory(image, tmp_path)
    before = bytes(memory.storage.content)
    for offset in (0, 100, 512, 3 * 512, memory.disk.virtual_size):
        memory.disk.pwrite(b"", offset)
        for request in CLEAR.values():
            request(memory.disk, offset, 0)
        memory.disk.write_zeroes(offset, 0, only_fast=True)
    assert memory.disk.pread(512, 512) == text(1, 512)
    memory.disk.close()
    assert memory.storage.content == before


# ---- only what is fast


def test_fast_zeroes_refuse_before_anything_changes(tmp_path: Path) -> None:
    image = builder(14, extended_l2=True).data(1, text(1, 16384)).compressed(2, text(2, 100)).zero(3)
    memory = InMemory(image, tmp_path)
    before = bytes(memory.storage.content)
    slow = [
        (16384 + 100, 16384),  # begins inside a subcluster with data
        (16384, 16384 - 1),  # ends inside one
        (2 * 16384, 512),  # a part of a compressed cluster
        (16384, 16384 + 512),  # whole cluster first, then that
        (2 * 16384 + 3, 10),
    ]
    for offset, length in slow:
        for may_unmap in (False, True):
            with pytest.raises(OSError) as found:
                memory.disk.write_zeroes(offset, length, may_unmap=may_unmap, only_fast=True)
            assert found.value.errno == errno.ENOTSUP
    memory.settle()
    assert memory.storage.content == before


def test_fast_zeroes_are_done_where_entries_say_it_all(tmp_path: Path) -> None:
    image = builder(14, extended_l2=True).data(1, text(1, 16384)).compressed(2, text(2, 100)).zero(3)
    before = bytearray(image.expected())
    memory = InMemory(image, tmp_path)
    fast = [
        (16384 + 512, 1024),  # whole subclusters
        (2 * 16384, 16384),  # a whole compressed cluster
        (3 * 16384 + 100, 16384),  # odd ends that are zeros already
        (16384 + 3 * 512, 29 * 512),
    ]
    for offset, length in fast:
        memory.disk.write_zeroes(offset, length, only_fast=True)
        before[offset : offset + length] = bytes(length)
        assert memory.disk.pread(len(before), 0) == before
    memory.settle()
    assert memory.view() == before
    memory.assert_clean()


def test_fast_zeroes_of_version_2_over_a_backing_file(tmp_path: Path) -> None:
    image = builder(version=2)
    memory = InMemory(image, tmp_path, backing=below(image))
    with pytest.raises(OSError) as found:
        memory.disk.write_zeroes(512, 512, only_fast=True)
    assert found.value.errno == errno.ENOTSUP
    memory.disk.write_zeroes(7 * 512, 512, only_fast=True)  # behind the backing file
    memory.disk.close()
    assert memory.view() == image.expected(memory.backing or b"")
