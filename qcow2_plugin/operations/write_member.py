"""Writing what one backup keeps of a disk: a new qcow2 image, from the changes that are told, in one go.

**What is kept.** A cluster with anything dirty in it is kept whole, as the disk has it now. One that is dirty all over
and stores nothing is kept as zeros if there is a backing file, which must not show through, and not at all if there is
none. A cluster that is dirty in a part of it only, with zeros there, is read and kept as data.

**Order.** The changes are gone through first, without reading data: they say where everything will stand (see
`format.member_layout`). Then comes all in front of the data, and then the data, in the guest's order. The same disk and
the same changes make the same bytes. Compressed clusters cannot be told beforehand how long they get; see `packing`.

A file is made under a temporary name, readable by its owner alone, and has its name when all of it is durable. After an
error there is none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import NamedTuple

from qcow2_plugin.engine.codec import Encoder
from qcow2_plugin.engine.copy_out import Options, Range, Told, copy_ranges
from qcow2_plugin.engine.image import Image
from qcow2_plugin.engine.in_order import in_order
from qcow2_plugin.engine.packing import write_packed
from qcow2_plugin.errors import OptionError
from qcow2_plugin.extent import parts
from qcow2_plugin.format.geometry import SECTOR_SIZE, Geometry
from qcow2_plugin.format.member_layout import ClusterUses, MemberLayout
from qcow2_plugin.operations.changes import Change, RangeKind
from qcow2_plugin.operations.new_files import NewFiles
from qcow2_plugin.operations.new_image import COMPRESSION_TYPES, ImageOptions
from qcow2_plugin.storage.file import FileStorage

THREADS = 2
_GRANULE = 4096
_AT_ONCE = 1 << 20

Path = str | os.PathLike[str]
Progress = Callable[[int, int], None]


class WrittenMember(NamedTuple):
    """What was made, in bytes: the file up to its end; what was read of the disk; what of that is not zeros and takes
    space (before it was compressed); and what is said to be zeros."""

    file_size: int
    read: int
    data: int
    zeros: int


def write_member(
    image: Image,
    changes: Iterable[Change],
    to: Path,
    *,
    virtual_size: int,
    cluster_size: int = 65536,
    backing_file: Path | None = None,
    backing_format: str | None = None,
    compression: str | None = None,
    level: int | None = None,
    threads: int = THREADS,
    on_block: Told | None = None,
    progress: Progress | None = None,
) -> WrittenMember:
    """Make `to`, which must not exist, a qcow2 image of the changes of `image`, durably.

    `changes` ascend; clean ones are passed over. `virtual_size` in bytes is that of the new image. `backing_file` is
    stored as given and not looked at. `compression` is "zlib" or "zstd", None for none; `level` is that of
    `codec.Encoder`. `on_block` is told (guest offset, length, bytes or None for zeros) of all that is kept, by any of
    the threads, in parts that end at multiples of 256 KiB of the disk or with a run of clusters; the bytes are good
    until it returns. `progress` is told (done, total) bytes that are read.

    Raises FileExistsError; OptionError; what reading the image raises; OSError. After an error there is no new file.
    """
    options = _options(cluster_size, backing_file, backing_format, compression)
    encoder = None if compression is None else Encoder(COMPRESSION_TYPES[compression], level)
    uses = _uses(changes, Geometry(cluster_size.bit_length() - 1), virtual_size, is_alone=backing_file is None)
    work = _Work(image, uses, options, threads, on_block, progress)
    with NewFiles() as files:
        made = files.make_for(to, "member", mode=0o600)
        written = work.write(made.storage) if encoder is None else work.write_compressed(made.storage, encoder)
        made.storage.barrier()
        made.give_name(to)
    return written


def member_chunks(
    image: Image,
    changes: Iterable[Change],
    *,
    virtual_size: int,
    cluster_size: int = 65536,
    backing_file: Path | None = None,
    backing_format: str | None = None,
    threads: int = THREADS,
    on_block: Told | None = None,
    progress: Progress | None = None,
) -> tuple[int, Generator[bytes | bytearray, None, None]]:
    """What `write_member` would write, not compressed: the size in bytes, known now, and the bytes, read when taken.

    Parameters are those of `write_member`; the chunks have up to 1 MiB, but for those of large tables. Raises
    OptionError and what the changes raise; the iterator raises what reading the image does. It is to be closed, or to
    be taken to its end, before the image is closed.
    """
    options = _options(cluster_size, backing_file, backing_format, None)
    uses = _uses(changes, Geometry(cluster_size.bit_length() - 1), virtual_size, is_alone=backing_file is None)
    return _Work(image, uses, options, threads, on_block, progress).chunks()


class _Work(NamedTuple):
    """One image to be written."""

    image: Image
    uses: ClusterUses
    options: ImageOptions
    threads: int
    on_block: Told | None
    progress: Progress | None

    def write(self, target: FileStorage) -> WrittenMember:
        layout = MemberLayout(self.uses)
        header = self.options.header(layout, None).pack()
        target.truncate(layout.file_size)
        offset = 0
        for piece in layout.front(header):
            target.write_from(piece, offset)
            offset += len(piece)
        zeros = self._tell_zeros()
        copied = copy_ranges(
            self.image,
            self._ranges(layout),
            target,
            Options(min(_GRANULE, self.options.cluster_size), True, False, True, self.threads),
            total=self._to_read(layout),
            told=self.on_block,
            progress=self.progress,
        )
        stored = copied.written + copied.shared + copied.offloaded
        return WrittenMember(layout.file_size, stored + copied.zeros, stored, zeros)

    def write_compressed(self, target: FileStorage, encoder: Encoder) -> WrittenMember:
        zeros = self._tell_zeros()
        layout = write_packed(
            self.image,
            self.uses,
            target,
            encoder,
            self.threads,
            is_alone=self.options.backing_file is None,
            told=self.on_block,
            progress=self.progress,
        )
        target.write_from(self.options.header(layout, None).pack(), 0)
        return WrittenMember(layout.file_size, layout.read, layout.data, zeros)

    def chunks(self) -> tuple[int, Generator[bytes | bytearray, None, None]]:
        layout = MemberLayout(self.uses)
        header = self.options.header(layout, None).pack()
        return layout.file_size, self._chunks(layout, header)

    def _chunks(self, layout: MemberLayout, header: bytes) -> Generator[bytes | bytearray, None, None]:
        yield from layout.front(header)
        self._tell_zeros()
        total, done = self._to_read(layout), 0
        with closing(in_order(self._read, self._parts(layout), self.threads)) as read:
            for chunk, length in read:
                yield chunk
                done += length
                if self.progress is not None:
                    self.progress(done, total)

    def _parts(self, layout: MemberLayout) -> Iterator[tuple[int, int]]:
        """(start, end) of all that is to be read."""
        for each in self._ranges(layout):
            yield from parts(each.guest_offset, each.guest_offset + each.length, _AT_ONCE)

    def _read(self, part: tuple[int, int]) -> tuple[bytearray, int]:
        """The bytes, filled up with zeros to whole clusters where the disk ends, and how many were read."""
        start, end = part
        length = end - start
        is_last = end == self.image.virtual_size
        chunk = bytearray(length + (-length % self.options.cluster_size if is_last else 0))
        view = memoryview(chunk)[:length]
        self.image.read_into(view, start)
        if self.on_block is not None:
            self.on_block(start, length, view)
        return chunk, length

    def _ranges(self, layout: MemberLayout) -> Iterator[Range]:
        """What is to be read of the disk, and where it goes."""
        cluster_size = layout.geometry.cluster_size
        for run in self.uses.data_runs():
            start = run.first * cluster_size
            length = min(run.cluster_count * cluster_size, self.image.virtual_size - start)
            yield Range(start, length, layout.data_offset + run.rank * cluster_size)

    def _to_read(self, layout: MemberLayout) -> int:
        """Bytes of all the ranges."""
        return sum(each.length for each in self._ranges(layout))

    def _tell_zeros(self) -> int:
        """Bytes that are said to be zeros, which is told."""
        zeros = 0
        cluster_size = self.options.cluster_size
        for first, cluster_count in self.uses.zero_runs():
            start = first * cluster_size
            length = min(cluster_count * cluster_size, self.uses.virtual_size - start)
            zeros += length
            if self.on_block is not None:
                self.on_block(start, length, None)
        return zeros


def _options(
    cluster_size: int, backing_file: Path | None, backing_format: str | None, compression: str | None
) -> ImageOptions:
    options = ImageOptions(
        cluster_size=cluster_size,
        compression_type=compression or "zlib",
        backing_file=None if backing_file is None else os.fsencode(backing_file),
        backing_format=backing_format,
    )
    options.check()
    return options


def _uses(changes: Iterable[Change], geometry: Geometry, virtual_size: int, *, is_alone: bool) -> ClusterUses:
    """What each cluster is to hold. `is_alone`: there is no backing file, and what is not told of reads as zeros."""
    if virtual_size % SECTOR_SIZE or virtual_size < 0:
        raise OptionError(f"a disk cannot have {virtual_size} bytes")
    uses = ClusterUses(geometry, virtual_size)
    for start, end, is_data in _joined(changes):
        if end > virtual_size:
            raise OptionError(f"there are changes up to {end:#x}, but the image is to have {virtual_size} bytes only")
        first, last = start // geometry.cluster_size, -(-end // geometry.cluster_size)
        if is_data:
            uses.mark_data(first, last)
        elif not is_alone:
            _mark_zero(uses, start, end)
    return uses


def _mark_zero(uses: ClusterUses, start: int, end: int) -> None:
    """Zeros, but for clusters at both ends of which a part is something else."""
    cluster_size = uses.geometry.cluster_size
    first, last = -(-start // cluster_size), end // cluster_size
    if end == uses.virtual_size:
        last = -(-end // cluster_size)
    if start % cluster_size:
        uses.mark_data(first - 1, first)
    if end % cluster_size and end != uses.virtual_size:
        uses.mark_data(last, last + 1)
    uses.mark_zero(first, last)


def _joined(changes: Iterable[Change]) -> Iterator[tuple[int, int, bool]]:
    """(start, end, is_data) of what is dirty, neighbours joined."""
    current: tuple[int, int, bool] | None = None
    for change in changes:
        if change.kind is RangeKind.CLEAN:
            continue
        start, end = change.guest_offset, change.guest_offset + change.length
        is_data = change.kind is RangeKind.DIRTY_DATA
        if current is not None and current[1] == start and current[2] is is_data:
            current = (current[0], end, is_data)
            continue
        if current is not None:
            yield current
        current = (start, end, is_data)
    if current is not None:
        yield current
