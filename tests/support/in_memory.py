"""Images in memory that are open for writing, and what their files say, read without the engine.

It owns how an image gets there, with a data file and a raw backing file if it has them, and the walk from its header
to one entry or one refcount. It refuses to know what a request should do.
"""

from __future__ import annotations

import struct
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from qcow2_plugin.engine.chain import check_writable
from qcow2_plugin.engine.header import read_header, refusals
from qcow2_plugin.engine.image import Layer
from qcow2_plugin.engine.layout import check_complete, check_tables
from qcow2_plugin.engine.raw import RawDisk
from qcow2_plugin.engine.writable import WritableImage
from tests.support.builder import BuiltImage, ImageBuilder
from tests.support.fields import HEADER_FIELDS
from tests.support.image_checker import EXTENDED_L2, OFFSET_MASK, TABLE_MASK, Report, check_image
from tests.support.memory_storage import MemoryStorage
from tests.support.reference import ReferenceReader

CACHE_SIZE = 1 << 20


def open_in_memory(
    image: MemoryStorage, data: MemoryStorage | None = None, backing: bytes | None = None, cache_size: int = CACHE_SIZE
) -> WritableImage:
    """Raises whatever `open_image` would."""
    header = read_header(image)
    for refusal in refusals(header):
        raise refusal
    check_tables(header, image)
    check_complete(header, image)
    check_writable(header, image)
    below = None if backing is None else RawDisk(MemoryStorage(backing, "backing"))
    return WritableImage(Layer(header, image, data or image, below, cache_size, False), ExitStack())


def hide_nothing(told: ImageBuilder) -> None:
    """Let clusters hold in the data file what the guest sees, as a raw data file has to; for images on their own."""
    view, size = told.expected(), told.cluster_size
    for cluster, each in told.told.items():
        told.told[cluster] = replace(each, payload=view[cluster * size : (cluster + 1) * size].ljust(size, b"\0"))


class InMemory:
    """An image as a builder makes it, in memory and open for writing. `backing` is the content of its backing file."""

    def __init__(
        self, told: ImageBuilder, folder: Path, *, backing: bytes | None = None, cache_size: int = CACHE_SIZE
    ) -> None:
        if backing is not None:
            told.backing(b"backing", b"raw")
        self.folder, self.backing, self.cache_size = folder, backing, cache_size
        self.built: BuiltImage = told.build(folder / "image")
        self.storage = MemoryStorage(self.built.path.read_bytes(), "image")
        self.data = None if told.data_path is None else MemoryStorage(told.data_path.read_bytes(), "data")
        self.disk = open_in_memory(self.storage, self.data, backing, cache_size)

    def reopen(self) -> None:
        """Close the image and open it anew."""
        self.disk.close()
        self.disk = open_in_memory(self.storage, self.data, self.backing, self.cache_size)

    def settle(self) -> None:
        """Until the files say everything: refcounts that fall reach them with the second flush."""
        self.disk.flush()
        self.disk.flush()

    # ---- what the files say

    def field(self, name: str) -> int:
        """A field of the header, named as in `HEADER_FIELDS`."""
        offset, code = HEADER_FIELDS[name]
        return self._word(offset, code)

    def l1_entry(self, index: int) -> int:
        return self._word(self.field("l1_table_offset") + 8 * index)

    def l2_entry(self, cluster: int) -> tuple[int, int]:
        """The entry of a guest cluster and its bitmap; both 0 without an L2 table, the bitmap without extended L2."""
        is_extended = self._has(EXTENDED_L2)
        size = 16 if is_extended else 8
        table, index = divmod(cluster, (1 << self.field("cluster_bits")) // size)
        table_offset = self.l1_entry(table) & OFFSET_MASK
        if not table_offset:
            return 0, 0
        place = table_offset + index * size
        return self._word(place), self._word(place + 8) if is_extended else 0

    def refcount(self, host_offset: int) -> int:
        """The refcount of the cluster at `host_offset`."""
        order = self.field("refcount_order") if self.field("version") > 2 else 4
        bits, width = self.field("cluster_bits"), 1 << order
        table, index = divmod(host_offset >> bits, (8 << bits) // width)
        if table >= (self.field("refcount_table_clusters") << bits) // 8:
            return 0
        block = self._word(self.field("refcount_table_offset") + 8 * table) & TABLE_MASK
        if not block:
            return 0
        if width >= 8:
            return int.from_bytes(self._bytes(block + index * width // 8, width // 8), "big")
        return self._word(block + index * width // 8, "B") >> index * width % 8 & (1 << width) - 1

    def cluster(self, host_offset: int, *, in_data_file: bool = False) -> bytes:
        """The content of one host cluster."""
        storage = self.data if in_data_file else self.storage
        assert storage is not None
        size = 1 << self.field("cluster_bits")
        return bytes(storage.content[host_offset : host_offset + size]).ljust(size, b"\0")

    def view(self, snapshot: str | None = None) -> bytes:
        """The whole disk by the reference reader."""
        self.built.path.write_bytes(self.storage.content)
        data_path = self.folder / "data-file"
        if self.data is not None:
            data_path.write_bytes(self.data.content)
        reader = ReferenceReader(self.built.path, data_file=data_path, backing=self.backing or b"", snapshot=snapshot)
        return reader.read(0, reader.virtual_size)

    def assert_clean(self) -> Report:
        """Nothing is wrong with the image file, not even a leak."""
        report = check_image(self.storage.content)
        assert not report.corruptions and not report.damage, [*report.corruptions, *report.damage]
        assert not report.all_leaks, f"{report.all_leaks} leaks"
        return report

    def _has(self, feature: int) -> bool:
        return self.field("version") > 2 and bool(self.field("incompatible_features") & feature)

    def _word(self, offset: int, code: str = "Q") -> int:
        word: int
        (word,) = struct.unpack(">" + code, self._bytes(offset, struct.calcsize(">" + code)))
        return word

    def _bytes(self, offset: int, length: int) -> bytes:
        return bytes(self.storage.content[offset : offset + length])
