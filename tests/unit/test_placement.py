"""What becomes of L2 entries, refcounts and bytes: every kind of cluster against every request, entry by entry."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2_plugin.engine.image import Image
from qcow2_plugin.errors import CorruptImageError, FailedImageError, TruncatedImageError
from tests.support.builder import ImageBuilder
from tests.support.fields import ALL_PARTS, COMPRESSED, COPIED, ZERO
from tests.support.image_checker import CORRUPT, OFFSET_MASK
from tests.support.in_memory import InMemory, hide_nothing
from tests.support.memory_storage import MemoryStorage

CLUSTERS = 12
ALL_ZERO = ALL_PARTS << 32
SNAPSHOT = "1"


def text(number: int, length: int = 65536) -> bytes:
    """Bytes that are like no others."""
    return random.Random(number).randbytes(length)


def builder(cluster_bits: int = 9, **options: object) -> ImageBuilder:
    """A disk of some clusters, the last of them cut if that can be, with an L2 table and data at both ends."""
    size = 1 << cluster_bits
    image = ImageBuilder(CLUSTERS * size - size // 1024 * 512, cluster_bits, **options)  # type: ignore[arg-type] # of its own
    return image.data(5, text(5, size)).data(CLUSTERS - 1, text(CLUSTERS - 1, size))


def below(image: ImageBuilder) -> bytes:
    """A backing file that ends inside cluster 4."""
    return text(99, 4 * image.cluster_size + image.cluster_size // 2 + 7)


# ---- the kinds of clusters

Tell = Callable[[ImageBuilder, int], object]


def parts(image: ImageBuilder, cluster: int) -> None:
    """Data, zeros and nothing, all in one cluster."""
    image.subclusters(cluster, text(cluster, image.cluster_size), allocated=0x00FF_0F10, zero=0xF000_0083)


STATES: dict[str, Tell] = {
    "unallocated": lambda image, cluster: image.l2_table(cluster // image.l2_entries),
    "zero": lambda image, cluster: image.zero(cluster),
    "normal": lambda image, cluster: image.data(cluster, text(cluster, image.cluster_size)),
    "kept": lambda image, cluster: image.zero(cluster, preallocated=True, payload=text(cluster, image.cluster_size)),
    "packed": lambda image, cluster: image.compressed(cluster, text(cluster, image.cluster_size // 2)),
    "parts": parts,
    "parts of zero": lambda image, cluster: image.subclusters(
        cluster, b"", allocated=0, zero=0x0F0F_0F00, stored=False
    ),
    "space": lambda image, cluster: image.subclusters(cluster, text(cluster, image.cluster_size), allocated=0),
}

# ---- the requests that clear, and what entries become: the tables of "write zeroes" and "discard"

CLEAR: dict[str, Callable[[Image, int, int], None]] = {
    "zero": lambda disk, offset, length: disk.write_zeroes(offset, length, may_unmap=False),
    "unmap": lambda disk, offset, length: disk.write_zeroes(offset, length, may_unmap=True),
    "discard": lambda disk, offset, length: disk.discard(offset, length),
}

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


def touched(word: int, cluster_bits: int) -> list[int]:
    """The host offsets of the clusters that an entry refers to."""
    if not word & COMPRESSED:
        return [word & OFFSET_MASK] if word & OFFSET_MASK else []
    offset_bits = 70 - cluster_bits
    first = (word & (1 << offset_bits) - 1) >> 9
    last = first + ((word & COMPRESSED - 1) >> offset_bits)
    return sorted({sector << 9 >> cluster_bits << cluster_bits for sector in range(first, last + 1)})


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


# ---- images that lie


def refused(memory: InMemory, request: Callable[[], None]) -> None:
    """The request is refused, the image marked corrupt and not written to any more; it can still be read."""
    before = bytes(memory.storage.content)
    with pytest.raises(CorruptImageError):
        request()
    assert memory.field("incompatible_features") & CORRUPT
    after = bytearray(memory.storage.content)
    after[79] &= ~CORRUPT
    assert after == before, "something else changed"
    with pytest.raises(FailedImageError):
        memory.disk.pwrite(b"x", 5 * 512)
    with pytest.raises(FailedImageError):
        memory.disk.write_zeroes(0, 512)
    assert memory.disk.pread(10, 5 * 512) == text(5, 512)[:10]
    marked = bytes(memory.storage.content)
    memory.disk.close()
    assert memory.storage.content == marked


@pytest.mark.parametrize("length", [1, 100, 512])
def test_a_cluster_that_only_claims_to_be_ours_is_not_overwritten(length: int, tmp_path: Path) -> None:
    """COPIED, and a refcount of 2: a snapshot has it too."""
    image = builder()
    snapshot = image.map().data(1, text(1, 512), host_offset=40 * 512)
    image.data(1, text(1, 512), host_offset=40 * 512, copied=True)
    image.snapshot(SNAPSHOT.encode(), b"then", snapshot)
    memory = InMemory(image, tmp_path)
    assert memory.refcount(40 * 512) == 2 and memory.l2_entry(1)[0] == COPIED | 40 * 512
    refused(memory, lambda: memory.disk.pwrite(b"x" * length, 512))
    assert memory.cluster(40 * 512) == text(1, 512)


@pytest.mark.parametrize("refcount", [0, 2, 3])
@pytest.mark.parametrize("state", ["normal", "kept"])
def test_a_wrong_refcount_of_a_cluster_is_noticed(state: str, refcount: int, tmp_path: Path) -> None:
    image = builder()
    STATES[state](image, 1)
    place = image.build(tmp_path / "first").data_offsets[1]
    memory = InMemory(image.refcount(place // 512, refcount), tmp_path)
    refused(memory, lambda: memory.disk.pwrite(b"x" * 10, 512))


def test_a_wrong_refcount_of_a_table_is_noticed(tmp_path: Path) -> None:
    image = builder()
    place = image.build(tmp_path / "first").l2_offsets[0]
    memory = InMemory(image.refcount(place // 512, 2), tmp_path)
    refused(memory, lambda: memory.disk.pwrite(b"x" * 10, 512))


def everything() -> ImageBuilder:
    """An image with each structure that there is."""
    image = builder()
    own = image.map().data(3, text(3, 512))
    return image.snapshot(SNAPSHOT.encode(), b"then", own).bitmap(b"dirty", [(0, 512)], granularity_bits=9, flags=2)


TARGETS: dict[str, Callable[[InMemory], int]] = {
    "L1 table": lambda memory: memory.built.l1_offset,
    "L2 table": lambda memory: memory.built.l2_offsets[0],
    "refcount table": lambda memory: memory.built.refcount_table_offset,
    "refcount block": lambda memory: memory.built.refcount_block_offsets[0],
    "snapshot table": lambda memory: memory.built.snapshots_offset,
    "snapshot L1 table": lambda memory: memory.built.snapshots[0].l1_offset,
    "snapshot L2 table": lambda memory: memory.built.snapshots[0].l2_offsets[0],
    "bitmap directory": lambda memory: memory.built.bitmap_directory_offset,
    "bitmap table": lambda memory: memory.built.bitmap_table_offsets[0],
    "bits": lambda memory: memory.built.bitmap_data_offsets[0][0],
}


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("request_name", ["write", "unmap", "discard"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_table_that_an_entry_calls_data_is_left_alone(
    target: str, request_name: str, copied: bool, tmp_path: Path
) -> None:
    """Not overwritten, and not given away as free either. What has to be true before the first change may be done."""
    image = everything().l2_table(0)
    memory = InMemory(image, tmp_path)
    place = TARGETS[target](memory)
    entry = memory.built.l2_entry_offset(1)
    memory.disk.close()
    memory.storage.content[entry : entry + 8] = (place | COPIED * copied).to_bytes(8, "big")
    memory.reopen()
    before = bytearray(memory.cluster(place))
    with pytest.raises(CorruptImageError):
        if request_name == "write":
            memory.disk.pwrite(b"x" * 512, 512)
        else:
            CLEAR[request_name](memory.disk, 512, 512)
        memory.disk.flush()
    assert memory.field("incompatible_features") & CORRUPT
    after = bytearray(memory.cluster(place))
    if target == "bitmap directory":  # in use
        before[15], after[15] = 0, 0
    assert after == before
    with pytest.raises(FailedImageError):
        memory.disk.pwrite(b"x", 5 * 512)
    memory.disk.close()
    assert memory.refcount(place) == 1


@pytest.mark.parametrize("place", [1 << 50, (1 << 56) - 512, 200 * 512])
@pytest.mark.parametrize("state", ["normal", "kept"])
@pytest.mark.parametrize("length", [10, 512])
def test_a_cluster_past_the_end_of_the_file_is_not_written(state: str, place: int, length: int, tmp_path: Path) -> None:
    memory = InMemory(builder().entry(1, COPIED | place | ZERO * (state == "kept")), tmp_path)
    before = bytes(memory.storage.content)
    with pytest.raises(TruncatedImageError):
        memory.disk.pwrite(b"x" * length, 512)
    memory.disk.close()
    assert memory.storage.content == before


@pytest.mark.parametrize("request_name", ["write", *CLEAR])
@pytest.mark.parametrize(
    ("extended", "word", "bitmap"),
    [
        (False, COPIED | 513 * 512 - 511, 0),  # reserved bits are ignored, but there is nothing
        (False, COMPRESSED | COPIED | 20 * 512, 0),
        (True, COPIED | 60 << 14, 0x1_0000_0001),
        (True, 0, 1),
        (True, COMPRESSED | 20 << 14, 1),
        (True, COPIED | 20 << 14 | 512, ALL_PARTS),
    ],
)
def test_an_entry_that_breaks_the_format_is_left_as_it_is(
    extended: bool, word: int, bitmap: int, request_name: str, tmp_path: Path
) -> None:
    bits = 14 if extended else 9
    memory = InMemory(builder(bits, extended_l2=extended).entry(1, word, bitmap), tmp_path)
    before = bytes(memory.storage.content)
    offset, length = 1 << bits, 1 << bits
    if not extended and not word & COMPRESSED and request_name != "write":
        return  # nothing is relied on when it goes
    with pytest.raises(CorruptImageError):
        if request_name == "write":
            memory.disk.pwrite(b"x" * 10, offset)
        else:
            CLEAR[request_name](memory.disk, offset, length)
    memory.disk.close()
    assert memory.storage.content == before


def test_a_zero_flag_in_version_2(tmp_path: Path) -> None:
    memory = InMemory(builder(version=2).entry(1, ZERO), tmp_path)
    before = bytes(memory.storage.content)
    with pytest.raises(CorruptImageError):
        memory.disk.pwrite(b"x", 512)
    with pytest.raises(CorruptImageError):
        memory.disk.discard(512, 512)
    memory.disk.close()
    assert memory.storage.content == before


def test_refcounts_that_call_tables_free_hand_out_nothing(tmp_path: Path) -> None:
    """A refcount block of zeros."""
    image = builder()
    memory = InMemory(image, tmp_path)
    block = memory.built.refcount_block_offsets[0]
    memory.storage.content[block : block + 512] = bytes(512)
    before = bytes(memory.storage.content)
    with pytest.raises(CorruptImageError):
        memory.disk.pwrite(b"x", 512)
    after = bytearray(memory.storage.content)
    assert after[79] & CORRUPT
    after[79] &= ~CORRUPT
    assert after == before


# ---- what fails


class Failing(MemoryStorage):
    """Writes at or behind `limit` fail with ENOSPC."""

    limit = 1 << 62

    def write_from(self, buffer: bytes | bytearray | memoryview, host_offset: int) -> None:
        if host_offset + len(buffer) > self.limit:
            raise OSError(errno.ENOSPC, "no space")
        super().write_from(buffer, host_offset)


@pytest.mark.parametrize("state", ["unallocated", "packed", "zero", "shared"])
def test_a_write_that_fails_leaves_the_entry_and_gives_the_cluster_back(state: str, tmp_path: Path) -> None:
    image = builder()
    STATES["normal" if state == "shared" else state](image, 1)
    if state == "shared":
        image.snapshot(SNAPSHOT.encode(), b"then")
    view = image.expected()
    memory = InMemory(image, tmp_path)
    memory.disk.close()
    storage = Failing(memory.storage.content)
    memory.storage = storage
    memory.reopen()
    entry, size = memory.l2_entry(1), len(storage.content)
    if state == "shared":  # its table is copied first
        memory.disk.write_zeroes(2 * 512, 512)
        memory.settle()
        entry, size = memory.l2_entry(1), len(storage.content)
    storage.limit = size
    for _ in range(3):
        with pytest.raises(OSError) as found:
            memory.disk.pwrite(b"x" * 10, 512)
        assert found.value.errno == errno.ENOSPC
        assert memory.disk.pread(len(view), 0) == view
    memory.settle()
    assert memory.l2_entry(1) == entry
    memory.assert_clean()
    storage.limit = 1 << 62
    memory.disk.pwrite(b"x" * 10, 512)
    memory.disk.close()
    assert memory.view() == view[:512] + b"x" * 10 + view[522:]
    memory.assert_clean()


def test_a_fill_that_cannot_be_read_leaves_the_cluster_as_it_is(tmp_path: Path) -> None:
    image = builder().compressed(1, b"", stream=b"\xff" * 100)
    memory = InMemory(image, tmp_path)
    entry = memory.l2_entry(1)
    with pytest.raises(CorruptImageError):
        memory.disk.pwrite(b"x", 512)
    memory.settle()
    assert memory.l2_entry(1) == entry
    memory.assert_clean()
    memory.disk.pwrite(b"x" * 512, 512)  # nothing to fill up
    memory.disk.close()
    assert memory.disk.virtual_size == len(memory.view())
    memory.assert_clean()
