"""Whole images: what is read equals what was told and what the reference reader finds, in any order and by any way."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import Qcow2Error
from qcow2_plugin.extent import ExtentKind
from tests.support.builder import ImageBuilder
from tests.support.depth import examples
from tests.support.fields import ALL_PARTS, HEADER_FIELDS
from tests.support.reference import CorruptError, ReferenceReader
from tests.support.words import bitmaps, words


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@dataclass
class Built:
    path: Path
    image: ImageBuilder
    backing: bytes


@st.composite
def images(draw: st.DrawFn, place: Path) -> Built:
    """An image of a random mixture, over a raw file of random length or none, and some disk of odd size."""
    extended = draw(st.integers(0, 3)) == 0
    cluster_bits = draw(st.integers(14, 15)) if extended else draw(st.sampled_from([9, 9, 9, 10, 12]))
    data_file = draw(st.integers(0, 3)) == 0
    version = 2 if not extended and not data_file and draw(st.integers(0, 3)) == 0 else 3
    compression = "zstd" if version == 3 and draw(st.booleans()) else "deflate"
    size = 1 << cluster_bits
    clusters = 24 if extended else draw(st.sampled_from([1, 70, 400]))
    image = ImageBuilder(
        clusters * size - draw(st.sampled_from([0, 0, 512 % size, 100])),
        cluster_bits,
        version=version,
        extended_l2=extended,
        compression=compression,
    )
    if data_file:
        image.data_file(place / "data", b"data")
    chance = random.Random(draw(st.integers(0, 2**32)))
    kinds = ["data", "data", "none"] + ["zero", "kept"] * (version == 3)
    kinds += [] if data_file else ["packed"]
    kinds += ["parts"] * 3 * extended
    cluster = 0
    while cluster < clusters:
        kind = chance.choice(kinds)
        for index in range(cluster, min(cluster + chance.randint(1, 6), clusters)):
            tell(image, index, kind, chance)
            cluster = index + 1
    backing = b""
    if draw(st.booleans()):
        backing = chance.randbytes(chance.choice([0, 1, size, clusters * size // 2 + 77, clusters * size + 5000]))
        (place / "base").write_bytes(backing)
        image.backing(b"base", b"raw")
    image.build(place / "image")
    return Built(place / "image", image, backing)


def tell(image: ImageBuilder, index: int, kind: str, chance: random.Random) -> None:
    payload = chance.randbytes(image.cluster_size)
    if kind == "data":
        image.data(index, payload)
    elif kind == "zero":
        image.zero(index)
    elif kind == "kept":
        image.zero(index, preallocated=True, payload=payload)
    elif kind == "packed":
        image.compressed(index, payload[: image.cluster_size // 3])
    elif kind == "parts":
        allocated = chance.getrandbits(32)
        image.subclusters(index, payload, allocated=allocated, zero=chance.getrandbits(32) & ~allocated & ALL_PARTS)


@given(st.data())
@examples(60)
def test_any_image_reads_as_it_was_told(place: Path, data: st.DataObject) -> None:
    built = data.draw(images(place))
    expected = built.image.expected(built.backing)[: built.image.virtual_size // 512 * 512]
    cache_size = data.draw(st.sampled_from([0, 3000, 20000, 1 << 20]))
    chance = random.Random(data.draw(st.integers(0, 2**32)))
    with open_image(built.path, cache_size=cache_size) as disk:
        assert disk.virtual_size == len(expected)
        if chance.random() < 0.5:
            assert disk.pread(len(expected), 0) == expected
        for _ in range(150):
            offset = chance.randrange(len(expected) + 1)
            length = min(chance.choice([0, 1, 100, 512, 4096, 20000]), len(expected) - offset)
            whole = bytearray(b"\xaa" * (length + 2))
            disk.read_into(memoryview(whole)[1:-1], offset)
            assert whole[1:-1] == expected[offset : offset + length]
            assert (whole[0], whole[-1]) == (0xAA, 0xAA)
        position = 0
        for extent in disk.extents():
            assert extent.guest_offset == position
            position += extent.length
            if extent.kind in (ExtentKind.ZERO, ExtentKind.UNALLOCATED):
                assert not any(expected[extent.guest_offset : position])
        assert position == len(expected)


@given(st.data())
@examples(40)
def test_arbitrary_l2_words_read_as_the_reference_reads_them(place: Path, data: st.DataObject) -> None:
    extended = data.draw(st.booleans())
    cluster_bits = 14 if extended else 9
    image = ImageBuilder(40 << cluster_bits, cluster_bits, extended_l2=extended, version=3)
    image.data(39, b"the file goes on to here", host_offset=40 << cluster_bits)
    for index in range(data.draw(st.integers(1, 20))):
        second = data.draw(bitmaps()) if extended else 0
        image.entry(index, data.draw(words(cluster_bits, 38)), second)
    path = place / "words"
    image.build(path)
    reference = ReferenceReader(path)
    size = 1 << cluster_bits
    with open_image(path, allow_damaged=True) as disk:
        for index in range(40):
            offset = index * size + data.draw(st.integers(0, size - 1)) if index < 3 else index * size
            length = (index + 1) * size - offset
            try:
                expected = reference.read(offset, length)
            except CorruptError:
                with pytest.raises(Qcow2Error):
                    disk.pread(length, offset)
                continue
            except OSError:  # the reference cannot seek as far as some words point
                with suppress(Qcow2Error, OSError):
                    assert disk.pread(length, offset) == bytes(length)
                continue
            word, _ = reference.l2_entry(offset)
            if word >> 62 == 3:  # compressed and copied: the reference reads it, the format forbids it
                with pytest.raises(Qcow2Error):
                    disk.pread(length, offset)
                continue
            assert disk.pread(length, offset) == expected


def look_at(path: Path, *, allow_damaged: bool) -> None:
    """Open it and look everywhere; only this package's errors and the system's are allowed."""
    try:
        disk = open_image(path, allow_damaged=allow_damaged, cache_size=10000)
    except (Qcow2Error, OSError):
        return
    with disk:
        size = disk.virtual_size
        asks: list[Callable[[], object]] = [
            lambda: disk.pread(min(size, 1 << 16), 0),
            lambda: disk.pread(min(size, 700), max(size - 700, 0)),
            lambda: [each for each, _ in zip(disk.extents(), range(1000), strict=False)],
            lambda: [disk.at_snapshot(each.id).pread(1, 0) for each in disk.snapshots()[:3]],
            lambda: [list(disk.dirty_extents(each.name)) for each in disk.bitmaps()[:3]],
            lambda: disk.prefetch(0, min(size, 1 << 16)),
        ]
        for ask in asks:
            try:
                ask()
            except (Qcow2Error, OSError) as error:
                assert isinstance(error, OSError) or str(error).isprintable()


def victim(place: Path) -> bytes:
    """A small image with everything in it."""
    image = ImageBuilder(60 << 9, 9).data(0, b"x" * 512).zero(1).compressed(2, b"y" * 512).data(9, b"z" * 512)
    image.snapshot(b"1", b"first", image.map().data(3, b"then")).bitmap(b"b", [(0, 512)], granularity_bits=9)
    (place / "base").write_bytes(b"below" * 5000)
    image.backing(b"base", b"raw").build(place / "victim")
    return (place / "victim").read_bytes()


@given(st.data(), st.booleans())
@examples(200)
def test_a_whole_image_with_some_words_changed(place: Path, data: st.DataObject, allow_damaged: bool) -> None:
    content = bytearray(victim(place))
    for _ in range(data.draw(st.integers(1, 4))):
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        position = data.draw(st.integers(0, len(content) // width - 1)) * width
        extremes = st.sampled_from([0, 1, 2 ** (8 * width) - 2, 2 ** (8 * width) - 1, 1 << 8 * width - 1, 512])
        value = data.draw(st.one_of(extremes, st.integers(0, 2 ** (8 * width) - 1))) & 2 ** (8 * width) - 1
        content[position : position + width] = value.to_bytes(width, "big")
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    (place / "changed").write_bytes(content[:cut])
    look_at(place / "changed", allow_damaged=allow_damaged)


@pytest.mark.parametrize("allow_damaged", [False, True])
@pytest.mark.parametrize("name", HEADER_FIELDS)
def test_a_whole_image_with_a_header_field_at_its_extremes(place: Path, name: str, allow_damaged: bool) -> None:
    """Security A20, for everything behind the parser."""
    content = bytearray(victim(place))
    offset, code = HEADER_FIELDS[name]
    width = {"B": 1, "I": 4, "Q": 8}[code]
    for value in (0, 1, 2 ** (8 * width) - 2, 2 ** (8 * width) - 1, 512, 1 << 8 * width - 1):
        content[offset : offset + width] = (value & 2 ** (8 * width) - 1).to_bytes(width, "big")
        (place / "changed").write_bytes(content)
        look_at(place / "changed", allow_damaged=allow_damaged)


@given(st.binary(max_size=2000), st.booleans())
@examples(60)
def test_arbitrary_files(place: Path, content: bytes, allow_damaged: bool) -> None:
    (place / "bytes").write_bytes(content)
    look_at(place / "bytes", allow_damaged=allow_damaged)
