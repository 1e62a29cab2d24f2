"""Making a new, empty image, with all options of `qemu-img create` but encryption.

**Order.** Every option is judged before any file is touched. Then each file is opened under its lock, so that what
others use stays as it is, and only when all of them are ours is the first one emptied: the image, durably, so that no
old one is left with a data file that is no longer its own. The new data file becomes durable first, then the tables of
the image, and last the first sector of its header, which makes it an image: whenever the power fails, a file of that
name is a whole image or none at all.

**After a failure** nothing is left. A file that was made is removed, one that was there and was to be overwritten is
empty, a data file that was to be kept is as it was.

**What is overwritten.** As with `qemu-img create` an image file that exists is, unless somebody uses it. A data file is
not, because it may be the only copy of a disk: the caller says whether it is kept or overwritten.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from qcow2_plugin.errors import OptionError, printable
from qcow2_plugin.extent import GuestDisk
from qcow2_plugin.format import geometry as limits
from qcow2_plugin.format.fresh import FreshLayout
from qcow2_plugin.format.geometry import SECTOR_SIZE, Geometry
from qcow2_plugin.format.header import (
    AUTOCLEAR_DATA_FILE_RAW,
    COMPATIBLE_LAZY_REFCOUNTS,
    INCOMPATIBLE_COMPRESSION_TYPE,
    INCOMPATIBLE_DATA_FILE,
    INCOMPATIBLE_EXTENDED_L2,
    NEW_HEADER_LENGTH,
    V3_HEADER_LENGTH,
    CompressionType,
    EncryptionMethod,
    Header,
)
from qcow2_plugin.operations.new_files import NewFile, NewFiles, identity_if_any
from qcow2_plugin.storage.opener import Policy, broken_rule, open_given

_PREALLOCATIONS = ("off", "metadata", "falloc", "full")
_BACKING_FORMATS = ("qcow2", "raw")
_COMPRESSION_TYPES = {"zlib": CompressionType.DEFLATE, "zstd": CompressionType.ZSTD}

Path = str | os.PathLike[str]


def create_image(
    path: Path,
    virtual_size: int | None = None,
    *,
    version: int = 3,
    cluster_size: int = 65536,
    refcount_bits: int = 16,
    lazy_refcounts: bool = False,
    extended_l2: bool = False,
    compression_type: str = "zlib",
    preallocation: str = "off",
    backing_file: Path | None = None,
    backing_format: str | None = None,
    check_backing_file: bool = True,
    data_file: Path | None = None,
    data_file_raw: bool = False,
    keep_data_file: bool = False,
    overwrite_data_file: bool = False,
    clip_data_file: bool = False,
    policy: Policy = Policy.CONFINED,
) -> None:
    """Make a qcow2 image; one that is there already is overwritten, unless somebody uses it.

    `virtual_size` in bytes is rounded up to whole sectors; None takes that of the backing file, or of a data file that
    is kept. `version` 2 is for very old programs. `preallocation` "metadata" maps all clusters, "falloc" gets disk
    space for them as well, "full" by writing zeros; the default is "off".

    `backing_file` is stored as given; a relative name starts at the image's directory. `backing_format` is "qcow2" or
    "raw". The file must be there and be that, and all that is below it must be openable under `policy`; without
    `check_backing_file` it is not looked at, so that a size is needed.

    `data_file` is where the guest's data go, instead of into the image. With `data_file_raw` it is a raw image of the
    disk by itself, at all times, for which the whole disk is mapped. Where the file exists, `keep_data_file` makes what
    is in it the contents of the disk, and changes nothing but a length that is short; `overwrite_data_file` drops it.
    `clip_data_file` keeps a longer one, too, whose rest is not seen. Stored is its bare name if it is in the image's
    directory, else its absolute path.

    Raises OptionError (a wrong value, a contradiction, a file in two parts), with nothing changed; ImageLockedError;
    what `open_image` does about the backing file; OSError. After an error there is no image.
    """
    options = _Options(
        version=version,
        cluster_size=cluster_size,
        refcount_bits=refcount_bits,
        lazy_refcounts=lazy_refcounts,
        extended_l2=extended_l2,
        compression_type=compression_type,
        preallocation=preallocation,
        backing_file=None if backing_file is None else os.fsencode(backing_file),
        backing_format=backing_format,
        data_file=None if data_file is None else os.fsdecode(data_file),
        data_file_raw=data_file_raw,
        keep_data_file=keep_data_file,
        overwrite_data_file=overwrite_data_file,
        clip_data_file=clip_data_file,
    )
    options.check()
    with NewFiles() as files:
        _make_image(os.fspath(path), virtual_size, options, files, policy if check_backing_file else None)


@dataclass(frozen=True, slots=True)
class _Options:
    """What `create_image` was asked, by the names that it has there."""

    version: int
    cluster_size: int
    refcount_bits: int
    lazy_refcounts: bool
    extended_l2: bool
    compression_type: str
    preallocation: str
    backing_file: bytes | None
    backing_format: str | None
    data_file: str | None
    data_file_raw: bool
    keep_data_file: bool
    overwrite_data_file: bool
    clip_data_file: bool

    def check(self) -> None:
        """Raises OptionError if a value is none that its option can have, or options contradict each other."""
        self._check_values()
        if self.version == 2:
            self._check_version_2()
        if self.backing_file is not None:
            self._check_backing_file(self.backing_file)
        elif self.backing_format is not None:
            raise OptionError("there is a backing_format, but no backing_file to have it; name the file, too")
        if self.data_file is not None:
            self._check_data_file(self.data_file)
            return
        for option in ("data_file_raw", "keep_data_file", "overwrite_data_file", "clip_data_file"):
            if getattr(self, option):
                raise OptionError(f"{option} is about a data_file, and none is named; name one, or leave it out")

    def _check_values(self) -> None:
        if self.version not in (2, 3):
            raise OptionError(f"there is no version {self.version}; take 3 (compat=1.1) or 2 (compat=0.10)")
        smallest, largest = 1 << limits.MIN_CLUSTER_BITS, 1 << limits.MAX_CLUSTER_BITS
        if not smallest <= self.cluster_size <= largest or self.cluster_size & self.cluster_size - 1:
            raise OptionError(
                f"cluster_size must be a power of two from {smallest} to {largest} bytes, not {self.cluster_size}"
            )
        if self.refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
            raise OptionError(f"refcount_bits must be 1, 2, 4, 8, 16, 32 or 64, not {self.refcount_bits}")
        _check_choice("compression_type", self.compression_type, _COMPRESSION_TYPES)
        _check_choice("preallocation", self.preallocation, _PREALLOCATIONS)
        smallest = 1 << limits.MIN_CLUSTER_BITS_EXTENDED_L2
        if self.extended_l2 and self.cluster_size < smallest:
            raise OptionError(f"extended_l2 needs a cluster_size of {smallest} bytes or more, not {self.cluster_size}")

    def _check_version_2(self) -> None:
        asked = {
            "lazy_refcounts": self.lazy_refcounts,
            "refcount_bits but 16": self.refcount_bits != 16,
            "extended_l2": self.extended_l2,
            "compression_type but zlib": self.compression_type != "zlib",
            "data_file": self.data_file is not None,
        }
        for option in (option for option, is_asked in asked.items() if is_asked):
            raise OptionError(f"version 2 (compat=0.10) has no {option}; leave it out, or take version 3 (compat=1.1)")

    def _check_backing_file(self, name: bytes) -> None:
        if not name or b"\0" in name:
            raise OptionError(f'"{printable(name)}" is no name for a backing_file')
        if len(name) > limits.MAX_NAME_LENGTH:
            raise OptionError(f"the name of the backing_file is longer than {limits.MAX_NAME_LENGTH} bytes")
        if not self.backing_format:
            raise OptionError("say the format of the backing_file (backing_format qcow2 or raw): it is never guessed")
        if len(os.fsencode(self.backing_format)) > limits.MAX_BACKING_FORMAT_LENGTH:
            raise OptionError(f'"{printable(self.backing_format)}" is no backing_format; qcow2 and raw are')
        for option in ("data_file_raw", "keep_data_file"):
            if getattr(self, option):
                raise OptionError(
                    f"{option} means the whole disk, and nothing is left to a backing_file; take one of them"
                )
        if self.preallocation != "off" and not self.extended_l2:
            raise OptionError(
                f"preallocation={self.preallocation} hides the backing_file, other than with extended_l2; add that, or "
                "take one of them"
            )

    def _check_data_file(self, name: str) -> None:
        if not name or "\0" in name:
            raise OptionError(f'"{printable(name)}" is no name for a data_file')
        if self.clip_data_file and not self.keep_data_file:
            raise OptionError("clip_data_file is about a data file that is kept; add keep_data_file, or leave it out")
        if not self.keep_data_file:
            return
        if self.overwrite_data_file:
            raise OptionError("keep_data_file and overwrite_data_file contradict each other; take one of them")
        if self.preallocation in ("falloc", "full"):
            raise OptionError(
                f"a data file that is kept is not written to, so preallocation={self.preallocation} cannot be; take "
                "metadata"
            )
        if not self.is_mapped:
            raise OptionError(
                "nothing of the data file that is kept would be seen; add data_file_raw, or, if it need not stay a raw "
                "image, preallocation=metadata"
            )

    @property
    def is_mapped(self) -> bool:
        """Every guest cluster has its L2 entry from the start, which a raw data file needs to be what it is called."""
        return self.preallocation != "off" or self.data_file_raw

    def layout(self, virtual_size: int) -> FreshLayout:
        """Where everything lies. Raises OptionError if that is too much."""
        return FreshLayout(
            Geometry(self.cluster_size.bit_length() - 1, self.extended_l2),
            self.refcount_bits.bit_length() - 1,
            virtual_size,
            is_mapped=self.is_mapped,
            has_data_file=self.data_file is not None,
        )

    def header(self, layout: FreshLayout, data_file: bytes | None) -> Header:
        """The header; `data_file` is the name to store. Raises OptionError if there is no room for the names."""
        compression_type = _COMPRESSION_TYPES[self.compression_type]
        incompatible = {
            INCOMPATIBLE_DATA_FILE: data_file is not None,
            INCOMPATIBLE_COMPRESSION_TYPE: compression_type is not CompressionType.DEFLATE,
            INCOMPATIBLE_EXTENDED_L2: self.extended_l2,
        }
        header = Header(
            version=self.version,
            backing_file_offset=0,
            backing_file=None,
            cluster_bits=layout.geometry.cluster_bits,
            size=layout.virtual_size,
            encryption_method=EncryptionMethod.NONE,
            l1_size=layout.l1_size,
            l1_table_offset=layout.l1_table_offset,
            refcount_table_offset=layout.refcount_table_offset,
            refcount_table_clusters=layout.refcount_table_clusters,
            snapshot_count=0,
            snapshots_offset=0,
            incompatible_features=sum(bit for bit, is_set in incompatible.items() if is_set),
            compatible_features=COMPATIBLE_LAZY_REFCOUNTS if self.lazy_refcounts else 0,
            autoclear_features=AUTOCLEAR_DATA_FILE_RAW if self.data_file_raw else 0,
            refcount_order=layout.refcount_order,
            header_length=NEW_HEADER_LENGTH,
            compression_type=compression_type,
            additional_fields=bytes(NEW_HEADER_LENGTH - V3_HEADER_LENGTH - 1),
        )
        return header.with_names(
            backing_file=self.backing_file,
            backing_format=None if self.backing_format is None else os.fsencode(self.backing_format),
            data_file=data_file,
        )


def _check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise OptionError(f'{option} cannot be "{printable(value)}"; it is one of {", ".join(choices)}')


def _make_image(path: str, virtual_size: int | None, options: _Options, files: NewFiles, policy: Policy | None) -> None:
    """`policy` None does not look at the backing file."""
    found_size, data = None, None
    backing = None if options.backing_file is None else _path_of_backing_file(options.backing_file, path)
    if backing is not None:
        if policy is not None:
            found_size = _open_backing_file(backing, options, files, policy)
        files.assign(identity_if_any(backing), "backing file")
    if options.data_file is not None and options.keep_data_file:
        data = files.open(options.data_file, "data file", is_kept=True)
        found_size = data.storage.size()
    size = _whole_sectors(found_size if virtual_size is None else virtual_size)
    if data is not None:
        _require_fit(data, size, is_clipped=options.clip_data_file)
    layout = options.layout(size)
    header = options.header(layout, None if options.data_file is None else _stored_name(options.data_file, path))

    image = files.make_or_open(path, "image")
    if backing is not None:
        files.refuse(identity_if_any(backing), "backing file", backing)
    image.require_room(layout.file_size)
    if options.data_file is not None and data is None:
        data = _new_data_file(options.data_file, files, may_exist=options.overwrite_data_file)
        data.require_room(size)
    image.clear(layout.file_size)
    if data is not None and not options.keep_data_file:
        data.clear(size)
        data.reserve(options.preallocation, 0, size)
        data.storage.barrier()
    _write_tables(image, layout, header.pack(), data_is_there=options.keep_data_file)
    if data is None:
        image.reserve(options.preallocation, layout.data_offset, layout.file_size)
    image.storage.barrier()
    if data is not None and options.keep_data_file:
        data.extend(size)
        data.storage.barrier()
    image.storage.write_from(header.pack().ljust(SECTOR_SIZE, b"\0")[:SECTOR_SIZE], 0)
    image.storage.barrier()
    files.make_names_durable()


def _path_of_backing_file(name: bytes, path: str) -> str:
    return os.path.join(os.path.dirname(path), os.fsdecode(name))


def _open_backing_file(path: str, options: _Options, files: NewFiles, policy: Policy) -> int:
    """Its virtual size. What is below it gets its part, and everything stays locked for reading."""
    if b":" in (options.backing_file or b"").partition(b"/")[0]:
        raise OptionError(f'"{printable(path)}" would be taken for a driver or URL, not for a file; put ./ before it')
    if options.backing_format == "raw":
        storage = open_given(path)
        files.resources.callback(storage.close)
        return storage.size()
    _check_choice("backing_format", options.backing_format or "", _BACKING_FORMATS)
    from qcow2_plugin.engine.chain import open_image  # who has no backing file need not wait for them
    from qcow2_plugin.engine.image import Image
    from qcow2_plugin.engine.raw import RawDisk

    image = files.resources.enter_context(open_image(path, policy=policy))
    disk: GuestDisk | None = image
    while isinstance(disk, Image):
        files.assign(disk.layer.storage.identity, "backing file")
        files.assign(disk.layer.data.identity, "data file of the backing file")
        disk = disk.layer.backing
    if isinstance(disk, RawDisk):
        files.assign(identity_if_any(disk.path), "backing file")
    return image.virtual_size


def _whole_sectors(size: int | None) -> int:
    if size is None:
        raise OptionError("say how large the disk is to be: there is no file to take its size from")
    if size < 0:
        raise OptionError(f"a disk cannot have {size} bytes")
    return -(-size // SECTOR_SIZE) * SECTOR_SIZE


def _require_fit(data: NewFile, virtual_size: int, *, is_clipped: bool) -> None:
    """Raises OptionError unless the data file that is kept can be that of a disk of this size."""
    size = data.storage.size()
    if _whole_sectors(size) > virtual_size and not is_clipped:
        raise OptionError(
            f"the data file has {size} bytes, more than the disk of {virtual_size}; make the disk larger, or add "
            "clip_data_file if what is behind its end need not be seen",
            file=data.path,
        )
    data.require_room(virtual_size)


def _new_data_file(path: str, files: NewFiles, *, may_exist: bool) -> NewFile:
    if may_exist:
        return files.make_or_open(path, "data file")
    try:
        return files.make(path, "data file")
    except FileExistsError as error:
        files.refuse(identity_if_any(path), "data file", path)
        raise OptionError(
            "the data file exists; add keep_data_file to use what is in it, or overwrite_data_file to lose that",
            file=path,
        ) from error


def _stored_name(data_file: str, image: str) -> bytes:
    """The name of a data file that `open_image` finds again, by the confined policy if they share a directory."""
    directory, name = os.path.split(data_file)
    is_beside = identity_if_any(directory or os.curdir) == identity_if_any(os.path.dirname(image) or os.curdir)
    if is_beside and broken_rule(os.fsencode(name), Policy.CONFINED) is None:
        return os.fsencode(name)
    return os.fsencode(os.path.abspath(data_file))


def _write_tables(image: NewFile, layout: FreshLayout, header: bytes, *, data_is_there: bool) -> None:
    """Everything but the data and the first sector; the header cluster is filled up with zeros."""
    behind_first_sector = header.ljust(layout.geometry.cluster_size, b"\0")[SECTOR_SIZE:]
    front = [behind_first_sector, layout.refcount_table(), *layout.refcount_blocks(), layout.l1_table()]
    image.storage.write_vector(front, SECTOR_SIZE)
    offset = layout.l2_offset
    for piece in layout.l2_tables(data_is_there=data_is_there):
        image.storage.write_from(piece, offset)
        offset += len(piece)
