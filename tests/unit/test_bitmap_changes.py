"""Changes of bitmaps: prepared and published or given up, what a failure leaves in doubt, what is not opened."""

from __future__ import annotations

import errno
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from qcow2_plugin.engine.chain import open_alone
from qcow2_plugin.engine.dirty_bitmaps.bitmap_changes import BitmapChange, Verb, prepare_bitmaps, rotating
from qcow2_plugin.engine.standing_still import at_rest
from qcow2_plugin.engine.writable import WritableImage
from qcow2_plugin.errors import (
    BitmapError,
    FailedImageError,
    ImageClosedError,
    MissingReferenceError,
    OptionError,
    ReadOnlyImageError,
)
from qcow2_plugin.format.header import EXTENSION_BITMAPS, BitmapsPointer
from qcow2_plugin.operations.bitmaps import add_bitmap, change_bitmaps, clear_bitmap, rotate_bitmap
from qcow2_plugin.storage import Buffer
from tests.support.builder import BuiltImage, ImageBuilder
from tests.support.image_checker import check_image
from tests.support.in_memory import open_in_memory
from tests.support.memory_storage import MemoryStorage

SIZE = 64 << 10
AUTO, IN_USE = 2, 1


def built(tmp_path: Path) -> BuiltImage:
    image = ImageBuilder(SIZE, 9).data(0, b"zero").data(3, b"three")
    return image.bitmap(b"a", [(1024, 512)], granularity_bits=9, flags=AUTO).build(tmp_path / "image")


def flags(storage: MemoryStorage) -> dict[bytes, int]:
    return {bitmap.name: bitmap.flags for bitmap in check_image(storage.content).bitmaps}


def marks(storage: MemoryStorage) -> dict[bytes, set[int] | None]:
    found = check_image(storage.content).bitmaps
    return {bitmap.name: None if bitmap.granules is None else set(bitmap.granules) for bitmap in found}


class Slipping(MemoryStorage):
    """Does what it is asked to, but says once that it has failed: when a write of these bytes is due."""

    slips_at: bytes | None = None

    def write_from(self, buffer: Buffer, host_offset: int) -> None:
        """Write all of `buffer` at `host_offset`."""
        super().write_from(buffer, host_offset)
        if bytes(buffer) == self.slips_at:
            self.slips_at = None
            raise OSError(errno.EIO, "slipped")


@pytest.fixture
def opened(tmp_path: Path) -> tuple[WritableImage, Slipping]:
    storage = Slipping(built(tmp_path).path.read_bytes(), "image")
    return open_in_memory(storage), storage


Opened = tuple[WritableImage, Slipping]


def test_what_is_prepared_does_not_show(opened: Opened) -> None:
    image, storage = opened
    image.write_from(b"x", 0)
    with at_rest(image):
        prepared = prepare_bitmaps(image, rotating(b"a", b"b"))
        assert prepared.old == image.header.bitmaps and prepared.new not in (None, prepared.old)
        assert marks(storage) == {b"a": {0, 2}}, "settled, and what it was"
        assert not prepared.is_empty
        prepared.publish()
        assert prepared.new == image.header.bitmaps
        assert flags(storage) == {b"a": 0, b"b": AUTO} and marks(storage) == {b"a": {0, 2}, b"b": set()}
        prepared.abandon()  # too late
    image.write_from(b"x", 512)
    assert flags(storage) == {b"a": 0, b"b": AUTO | IN_USE}
    image.close()
    assert marks(storage) == {b"a": {0, 2}, b"b": {1}}
    assert not check_image(storage.content).all_leaks


def test_what_is_abandoned_leaves_nothing(opened: Opened) -> None:
    image, storage = opened
    image.write_from(b"x", 0)
    before = image.header.bitmaps
    with at_rest(image):
        prepared = prepare_bitmaps(image, [BitmapChange(Verb.ADD, b"b"), BitmapChange(Verb.CLEAR, b"a")])
        prepared.abandon()
        prepared.abandon()
    image.write_from(b"x", 512)
    assert flags(storage) == {b"a": AUTO | IN_USE}
    image.close()
    assert image.header.bitmaps == before
    assert marks(storage) == {b"a": {0, 1, 2}}
    assert not check_image(storage.content).all_leaks


def test_other_fields_of_the_header_are_switched_along(opened: Opened) -> None:
    """The pointer to the bitmaps is laid over whatever is given."""
    image, storage = opened
    with at_rest(image):
        prepared = prepare_bitmaps(image, rotating(b"a", b"b"))
        marked = replace(image.header, autoclear_features=image.header.autoclear_features | 1 << 63)
        marked = marked.with_extension(0x12345678, b"marked!!")
        image.file.update_header(extensions=marked.extensions, autoclear_features=marked.autoclear_features)
        bare = image.header.with_extension(0x12345678, None)
        prepared.publish(extensions=bare.extensions, autoclear_features=0)
    assert image.header.autoclear_features == 1
    assert image.header.bitmaps == prepared.new and image.header.extension_data(0x12345678) is None
    image.close()
    assert list(flags(storage)) == [b"a", b"b"]


def test_nothing_is_switched_when_nothing_changes(opened: Opened) -> None:
    image, storage = opened
    content = bytes(storage.content)
    with at_rest(image):
        changes = [BitmapChange(Verb.ENABLE, b"a"), BitmapChange(Verb.MERGE, b"a", source=b"a")]
        prepared = prepare_bitmaps(image, changes)
        assert prepared.is_empty and prepared.new == prepared.old
        prepared.publish()
    image.close()
    assert bytes(storage.content) == content


def test_the_last_bitmap_takes_the_extension_along(opened: Opened) -> None:
    image, storage = opened
    change_bitmaps(image, [BitmapChange(Verb.REMOVE, b"a")])
    assert image.header.extension_data(EXTENSION_BITMAPS) is None and not image.header.autoclear_features & 1
    image.write_from(b"x", 512)
    add_bitmap(image, "new", granularity=512)
    image.write_from(b"x", 512)
    image.close()
    assert marks(storage) == {b"new": {1}}
    assert not check_image(storage.content).all_leaks


def test_in_use_that_may_have_been_cleared_is_set_again(opened: Opened) -> None:
    """The write that clears it arrives and fails all the same."""
    image, storage = opened
    image.write_from(b"x", 0)
    assert flags(storage) == {b"a": AUTO | IN_USE}
    storage.slips_at = struct.pack(">I", AUTO)
    with pytest.raises(OSError, match="slipped"):
        rotate_bitmap(image, "a", "b")
    assert flags(storage) == {b"a": AUTO}
    image.write_from(b"x", 512)
    assert flags(storage) == {b"a": AUTO | IN_USE}, "or what was just written would be clean"
    image.close()
    assert marks(storage) == {b"a": {0, 1, 2}}


def test_a_header_that_could_not_be_written_changes_nothing(opened: Opened) -> None:
    image, storage = opened
    image.write_from(b"x", 0)
    image.flush()
    original = image.file.update_header

    def fail(**_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    image.file.update_header = fail  # type: ignore[method-assign] # a disk that is full just now
    with pytest.raises(OSError, match="full"):
        rotate_bitmap(image, "a", "b")
    image.file.update_header = original  # type: ignore[method-assign] # there is room again
    image.write_from(b"x", 512)
    clear_bitmap(image, "a")
    image.write_from(b"x", 1024)
    image.close()
    assert marks(storage) == {b"a": {2}}
    assert not check_image(storage.content).all_leaks


def test_pointers_are_packed_as_the_extension_is() -> None:
    pointer = BitmapsPointer(3, 96, 0x50000)
    assert pointer.pack() == struct.pack(">IIQQ", 3, 0, 96, 0x50000)


def test_images_that_take_no_change(tmp_path: Path) -> None:
    path = built(tmp_path).path
    with open_alone(path) as image, pytest.raises(ReadOnlyImageError):
        add_bitmap(image, "b")
    with open_alone(path, writable=True) as image:
        with pytest.raises(OptionError, match="data_file"):
            add_bitmap(image, "b", data_file=tmp_path / "data")
        assert isinstance(image, WritableImage)
    with pytest.raises(ImageClosedError):
        add_bitmap(image, "b")
    with pytest.raises(MissingReferenceError, match="no bitmap"):
        clear_bitmap(path, "b")
    with pytest.raises(BitmapError):
        add_bitmap(path, "a")


def test_what_is_in_a_backing_file_that_was_not_opened_cannot_be_had(tmp_path: Path) -> None:
    path = ImageBuilder(SIZE, 9).data(0, b"here").backing(b"nowhere", b"raw").build(tmp_path / "image").path
    with open_alone(path, writable=True) as image:
        assert image.pread(4, 0) == b"here"
        image.prefetch(0, SIZE)
        image.pwrite(b"more", 4)
        for ask in (
            lambda: image.pread(4, 512),
            lambda: image.pwrite(b"part", 512),
            lambda: list(image.extents()),
            lambda: image.write_zeroes(1024, 4),
        ):
            with pytest.raises(MissingReferenceError, match="opened without its backing files"):
                ask()
        assert [extent.length for extent in image.extents(whole_chain=False)] == [512, SIZE - 512]
        add_bitmap(image, "b")
    report = check_image(path.read_bytes())
    assert report.is_sound and not report.all_leaks


class Interrupting(MemoryStorage):
    """Does what it is asked to, and is interrupted right behind: by the write that switches, or by its barrier."""

    at: str | None = None
    has_switched = False

    def write_from(self, buffer: Buffer, host_offset: int) -> None:
        """Write all of `buffer` at `host_offset`."""
        super().write_from(buffer, host_offset)
        self.has_switched = not host_offset >> 9
        self._come_to("write")

    def barrier(self) -> None:
        """Nothing is lost."""
        super().barrier()
        self._come_to("barrier")

    def _come_to(self, what: str) -> None:
        if self.has_switched and self.at == what:
            self.at = None
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["write", "barrier"])
def test_interrupted_at_the_switch_takes_no_more_changes(tmp_path: Path, at: str) -> None:
    """Which directory is in force is not known then: neither is believed, and nothing that they name is free."""
    storage = Interrupting(built(tmp_path).path.read_bytes(), "image")
    image = open_in_memory(storage)
    storage.at = at
    with pytest.raises(KeyboardInterrupt):
        rotate_bitmap(image, "a", "b")
    with pytest.raises(FailedImageError, match="interrupted"):
        image.write_from(b"x" * 512, 0)
    image.close()
    assert check_image(storage.content).is_sound
    assert marks(storage) == {b"a": {2}, b"b": set()}


@pytest.mark.parametrize("verb", [Verb.REMOVE, Verb.CLEAR, Verb.DISABLE])
def test_a_bitmap_that_goes_while_it_is_read_is_not_taken_for_clean(tmp_path: Path, verb: Verb) -> None:
    """Its place is somebody else's then; one that is only switched off stays where it is."""
    told = ImageBuilder(8 << 20, 9).bitmap(
        b"a", [(place, 512) for place in range(0, 8 << 20, 64 << 10)], granularity_bits=9, flags=AUTO
    )
    image = open_in_memory(MemoryStorage(told.build(tmp_path / "image").path.read_bytes(), "image"))
    ranges = image.dirty_bitmap("a").ranges(0, image.virtual_size)
    assert next(ranges) == (0, 512)
    change_bitmaps(image, [BitmapChange(verb, b"a")])
    if verb is Verb.DISABLE:
        assert len(list(ranges)) == 127
        return
    image.flush()
    with pytest.raises(MissingReferenceError, match="while it was read"):
        list(ranges)
