"""Writing to images whose data is in an external file: where it goes, what entries say of it, and what the raw bit
promises; QEMU reads both files, and writes them in turn."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcow2_plugin import Image, Policy, open_image
from qcow2_plugin.errors import CorruptImageError, ImageLockedError, ReadOnlyImageError
from tests.support.fields import ALL_PARTS, COMPRESSED, COPIED, HEADER_FIELDS, patch, set_field
from tests.support.image_checker import OFFSET_MASK
from tests.support.model import Model, Places, Verb, assert_reads_as
from tests.support.tools import convert_to_raw, qemu_img, qemu_img_json, qemu_io

KIB, MIB = 1 << 10, 1 << 20
RAW_BIT, UNKNOWN_BITS = 2, 1 << 17 | 1 << 63
SIZE = 700 * KIB + 512
FORMS = {  # cluster size, subclusters, create options
    "512": (512, 1, "cluster_size=512"),
    "64k": (65536, 1, "cluster_size=64k"),
    "preallocated": (4096, 1, "cluster_size=4k,preallocation=metadata"),
    "extended": (16384, 32, "cluster_size=16k,extended_l2=on"),
}


class TwoFiles:
    """An image and its data file, made by QEMU; `raw` says whether the raw bit is set."""

    def __init__(self, folder: Path, form: str = "64k", *, raw: bool = False, size: int = SIZE) -> None:
        self.path, self.data_path = folder / "disk.qcow2", folder / "disk.data"
        self.cluster_size, self.subclusters, options = FORMS[form]
        self.raw = raw
        options += f",data_file={self.data_path},data_file_raw={'on' if raw else 'off'}"
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, self.path, str(size))
        self.model = Model(size, self.cluster_size)
        coverage = self.cluster_size * self.cluster_size // (8 if self.subclusters == 1 else 16)
        self.places = Places(self.cluster_size, self.cluster_size // self.subclusters, (coverage,))

    def open(self) -> Image:
        return open_image(self.path, writable=True, policy=Policy.TRUSTED)

    def change(self, image: Image, chance: random.Random, verbs: tuple[Verb, ...] = tuple(Verb)) -> None:
        request = self.places.request(chance, self.model.virtual_size, verbs)
        request.apply(image)
        self.model.apply(request)

    def field(self, name: str) -> int:
        """A field of the header."""
        offset, code = HEADER_FIELDS[name]
        with open(self.path, "rb") as stream:
            stream.seek(offset)
            value: int
            (value,) = struct.unpack(">" + code, stream.read(struct.calcsize(">" + code)))
        return value

    def entry_offset(self, cluster: int) -> int:
        """Where in the image file the L2 entry is; there must be a table for it."""
        size = 8 if self.subclusters == 1 else 16
        table, index = divmod(cluster, self.cluster_size // size)
        content = self.path.read_bytes()
        (l1_entry,) = struct.unpack_from(">Q", content, self.field("l1_table_offset") + 8 * table)
        place: int = l1_entry & OFFSET_MASK
        assert place
        return place + index * size

    def entries(self) -> Iterator[tuple[int, int, int]]:
        """(guest offset, entry, bitmap) of all clusters that are mapped; the bitmap is 0 without extended L2."""
        content = self.path.read_bytes()
        words = 1 if self.subclusters == 1 else 2
        count = self.cluster_size // (8 * words)
        l1_offset = self.field("l1_table_offset")
        for table in range(self.field("l1_size")):
            (l1_entry,) = struct.unpack_from(">Q", content, l1_offset + 8 * table)
            if not l1_entry & OFFSET_MASK:
                continue
            for index in range(count):
                place = (l1_entry & OFFSET_MASK) + index * 8 * words
                entry, *rest = struct.unpack_from(f">{words}Q", content, place)
                if entry or any(rest):
                    yield (table * count + index) * self.cluster_size, entry, rest[0] if rest else 0

    def assert_as_modelled(self) -> None:
        qemu_img("check", "-f", "qcow2", self.path)
        raw = self.path.with_name("model.raw")
        self.model.save(raw)
        qemu_img("compare", "-f", "qcow2", "-F", "raw", self.path, raw)
        if self.raw:
            self.assert_raw_file_is_the_disk()

    def assert_raw_file_is_the_disk(self) -> None:
        size = self.model.virtual_size
        assert self.data_path.read_bytes()[:size].ljust(size, b"\0") == self.model.read(0, size)

    def assert_entries_are_as_they_must_be(self) -> None:
        """Data is where the guest has it, and every entry that has a place says COPIED."""
        for guest_offset, entry, bitmap in self.entries():
            assert not entry & COMPRESSED
            has_place = entry & (COPIED | OFFSET_MASK) != 0
            if has_place:
                assert entry & OFFSET_MASK == guest_offset, f"{entry:#x} for guest offset {guest_offset:#x}"
                assert entry & COPIED, f"{entry:#x} for guest offset {guest_offset:#x}"
            assert not bitmap & bitmap >> 32 & ALL_PARTS
            assert has_place or not bitmap & ALL_PARTS


@pytest.fixture(params=[False, True], ids=["data file", "raw data file"])
def raw(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


@pytest.mark.parametrize("form", FORMS)
def test_data_stays_where_the_guest_has_it(form: str, raw: bool, tmp_path: Path) -> None:
    files = TwoFiles(tmp_path, form, raw=raw)
    chance = random.Random(form)
    for _ in range(3):
        with files.open() as image:
            for _ in range(100):
                files.change(image, chance)
            assert_reads_as(image, files.model)
        files.assert_as_modelled()
        files.assert_entries_are_as_they_must_be()
        for entry in qemu_img_json("map", files.path):
            assert entry.get("offset", entry["start"]) == entry["start"]
        requests = [files.places.request(chance, SIZE) for _ in range(8)]
        qemu_io(
            files.path,
            *(request.command(tmp_path) for request in requests),
            options=("-f", "qcow2", "-t", "unsafe", "-d", "unmap"),
        )
        for request in requests:
            files.model.apply(request)
    files.assert_as_modelled()


@pytest.mark.parametrize("form", FORMS)
def test_a_raw_data_file_is_the_disk_after_every_request(form: str, tmp_path: Path) -> None:
    """Of every kind, flushed or not, and whatever is odd about its ends."""
    files = TwoFiles(tmp_path, form, raw=True)
    chance = random.Random(form)
    with files.open() as image:
        for number in range(120):
            files.change(image, chance)
            if number % 7 == 0:
                image.flush()
            files.assert_raw_file_is_the_disk()
    files.assert_as_modelled()
    assert files.field("autoclear_features") == RAW_BIT


def test_a_discard_of_less_than_a_cluster_does_not_touch_the_data_file(raw: bool, tmp_path: Path) -> None:
    files = TwoFiles(tmp_path, raw=raw)
    with files.open() as image:
        image.pwrite(b"x" * 4 * 65536, 0)
        image.flush()
        before = files.data_path.read_bytes()
        for offset, length in ((0, 65535), (1, 65536), (65536 - 512, 1024), (70000, 100), (5, 131000)):
            image.discard(offset, length)
        assert files.data_path.read_bytes() == before
        assert image.pread(4 * 65536, 0) == b"x" * 4 * 65536


# ---- the first cluster


@pytest.mark.parametrize("form", ["512", "64k", "extended"])
def test_the_first_cluster_of_the_data_file(form: str, tmp_path: Path) -> None:
    """Its entry is COPIED and nothing else; whoever loses the bit loses the data."""
    files = TwoFiles(tmp_path, form)
    size = files.cluster_size
    with files.open() as image:
        image.pwrite(b"first", 0)
    files.model.write(0, b"first")
    files.assert_as_modelled()
    assert [(offset, entry) for offset, entry, _ in files.entries()] == [(0, COPIED)]
    qemu_io(files.path, "write -P 7 100 200")
    files.model.write(100, b"\7" * 200)
    with files.open() as image:
        assert image.pread(400, 0) == files.model.read(0, 400)
        image.pwrite(b"second", 300)
        image.write_zeroes(size, size)
    files.model.write(300, b"second")
    files.assert_as_modelled()
    for may_unmap in (True, False):
        with files.open() as image:
            image.write_zeroes(0, size, may_unmap=may_unmap)
            assert image.pread(size, 0) == bytes(size)
        files.model.zero(0, size)
        files.assert_as_modelled()
        with files.open() as image:
            image.pwrite(b"again", 10)
        files.model.write(10, b"again")
        files.assert_as_modelled()
        files.assert_entries_are_as_they_must_be()
    qemu_io(files.path, f"write -z 0 {size}")  # it keeps COPIED beside the zero flag
    with files.open() as image:
        assert image.pread(size, 0) == bytes(size)
        image.pwrite(b"once more", 20)
    files.model.zero(0, size)
    files.model.write(20, b"once more")
    files.assert_as_modelled()
    with files.open() as image:
        image.discard(0, size)
    files.model.zero(0, size)
    files.assert_as_modelled()


# ---- the raw bit


def test_the_raw_bit_is_kept_and_bits_that_nobody_knows_are_not(raw: bool, tmp_path: Path) -> None:
    files = TwoFiles(tmp_path, raw=raw)
    set_field(files.path, "autoclear_features", RAW_BIT * raw | UNKNOWN_BITS)
    with files.open():
        pass  # nothing has changed
    assert files.field("autoclear_features") == RAW_BIT * raw | UNKNOWN_BITS
    with files.open() as image:
        image.pwrite(b"x", 5)
    assert files.field("autoclear_features") == RAW_BIT * raw
    files.model.write(5, b"x")
    files.assert_as_modelled()


def test_a_lost_raw_bit_is_lost(tmp_path: Path) -> None:
    """Zeros are said by entries again, growth prepares nothing, and nobody sets the bit anew."""
    files = TwoFiles(tmp_path, raw=True)
    qemu_io(files.path, f"write -P 5 0 {SIZE}")
    files.model.write(0, b"\5" * SIZE)
    set_field(files.path, "autoclear_features", 0)
    files.raw = False
    with files.open() as image:
        image.write_zeroes(65536, 65536, may_unmap=False)
        assert image.pread(65536, 65536) == bytes(65536)
        image.resize(SIZE + 4 * MIB)
    files.model.zero(65536, 131072)
    files.model.resize(SIZE + 4 * MIB)
    files.assert_as_modelled()
    assert files.data_path.read_bytes()[65536:131072] == b"\5" * 65536
    assert files.field("autoclear_features") == 0
    mapped = {offset for offset, _, _ in files.entries()}
    assert max(mapped) <= SIZE


def test_the_raw_bit_and_a_backing_file_are_not_written_to(tmp_path: Path) -> None:
    files = TwoFiles(tmp_path, raw=True)
    qemu_img("create", "-q", "-f", "raw", tmp_path / "base.raw", "1M")
    set_field(files.path, "autoclear_features", 0)
    qemu_img("rebase", "-u", "-F", "raw", "-b", tmp_path / "base.raw", files.path)
    set_field(files.path, "autoclear_features", RAW_BIT)
    before = files.path.read_bytes()
    with pytest.raises(ReadOnlyImageError):
        files.open()
    assert files.path.read_bytes() == before


# ---- a data file of another length


def test_what_is_behind_the_disk_in_its_data_file_is_left_alone(raw: bool, tmp_path: Path) -> None:
    """Not read, not overwritten, not cut off by what is written to the last cluster."""
    files = TwoFiles(tmp_path, raw=raw)
    with open(files.data_path, "r+b") as data:
        data.seek(SIZE)
        data.write(b"\xee" * 200 * KIB)
    chance = random.Random(1)
    with files.open() as image:
        for _ in range(60):
            files.change(image, chance)
        image.pwrite(b"end", SIZE - 3)
        files.model.write(SIZE - 3, b"end")
        image.write_zeroes(SIZE - 100, 50)
        files.model.zero(SIZE - 100, SIZE - 50)
    files.assert_as_modelled()
    assert files.data_path.read_bytes()[SIZE:] == b"\xee" * 200 * KIB
    with files.open() as image:
        image.resize(SIZE + 300 * KIB)
        files.model.resize(SIZE + 300 * KIB)
        assert_reads_as(image, files.model)
        assert image.pread(300 * KIB, SIZE) == bytes(300 * KIB)
    files.assert_as_modelled()


@pytest.mark.parametrize("length", [0, 1000, 300 * KIB + 77])
def test_a_data_file_that_is_too_short_reads_as_zeros_and_grows(length: int, raw: bool, tmp_path: Path) -> None:
    files = TwoFiles(tmp_path, raw=raw)
    qemu_io(files.path, f"write -P 5 0 {SIZE}")
    files.model.write(0, b"\5" * SIZE)
    with open(files.data_path, "r+b") as data:
        data.truncate(length)
    files.model.zero(length, SIZE)
    chance = random.Random(length)
    with files.open() as image:
        assert_reads_as(image, files.model)
        for _ in range(40):
            files.change(image, chance)
            if raw:
                files.assert_raw_file_is_the_disk()
        assert_reads_as(image, files.model)
    files.assert_as_modelled()


# ---- two files


def test_guest_data_is_in_one_file_and_tables_in_the_other(raw: bool, tmp_path: Path) -> None:
    files = TwoFiles(tmp_path, raw=raw)
    size = files.path.stat().st_size
    with files.open() as image:
        for offset in range(0, SIZE - 65536, 65536):
            image.pwrite(b"this is guest data " * 3000, offset)
    assert b"guest data" not in files.path.read_bytes()
    assert files.path.stat().st_size <= -(-size // 65536) * 65536 + 65536  # an L2 table
    assert files.data_path.read_bytes().startswith(b"this is guest data")


def test_a_data_file_that_looks_like_an_image_is_data(raw: bool, tmp_path: Path) -> None:
    files = TwoFiles(tmp_path, raw=raw)
    header = files.path.read_bytes()[:65536]
    with files.open() as image:
        image.pwrite(header, 0)
    files.model.write(0, header)
    with files.open() as image:
        image.pwrite(b"behind", 70000)
        files.model.write(70000, b"behind")
        assert_reads_as(image, files.model)
    files.assert_as_modelled()


def test_a_data_file_that_only_the_caller_knows(raw: bool, tmp_path: Path) -> None:
    """The image does not name it."""
    files = TwoFiles(tmp_path, raw=raw)
    qemu_img("amend", "-f", "qcow2", "-o", "data_file=", files.path)
    with open_image(files.path, writable=True, data_file=files.data_path) as image:
        image.pwrite(b"x" * 1000, 1000)
        image.discard(0, 65536)
        image.pwrite(b"y" * 1000, 2000)
    files.model.write(2000, b"y" * 1000)
    source = f"driver=qcow2,file.filename={files.path},data-file.driver=file,data-file.filename={files.data_path}"
    found = convert_to_raw(source, extra=("--image-opts",))
    assert found == files.model.read(0, SIZE)
    if raw:
        files.assert_raw_file_is_the_disk()


def test_two_images_do_not_write_to_one_data_file(tmp_path: Path) -> None:
    files = TwoFiles(tmp_path)
    other = tmp_path / "other.qcow2"
    other.write_bytes(files.path.read_bytes())
    with files.open() as image:
        with pytest.raises(ImageLockedError):
            open_image(other, writable=True, policy=Policy.TRUSTED)
        image.pwrite(b"x", 0)


@pytest.mark.parametrize("cluster", [0, 1, 5])
def test_an_entry_that_points_elsewhere_is_not_followed(cluster: int, raw: bool, tmp_path: Path) -> None:
    """QEMU writes there; we refuse, and neither file changes."""
    files = TwoFiles(tmp_path, raw=raw)
    qemu_io(files.path, f"write -P 5 0 {SIZE}")
    patch(files.path, files.entry_offset(cluster), struct.pack(">Q", COPIED | 9 * 65536))
    image_before, data_before = files.path.read_bytes(), files.data_path.read_bytes()
    with files.open() as image:
        with pytest.raises(CorruptImageError):
            image.pwrite(b"x" * 65536, cluster * 65536)
        with pytest.raises(CorruptImageError):
            image.pwrite(b"x", cluster * 65536 + 7)
        with pytest.raises(CorruptImageError):
            image.pread(10, cluster * 65536)
    assert files.data_path.read_bytes() == data_before
    assert files.path.read_bytes() == image_before
