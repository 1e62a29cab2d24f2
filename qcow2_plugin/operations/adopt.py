"""Adopting a volume: a qcow2 image that keeps books about a raw disk which is there already, without touching that.

The volume, a raw file or block device, becomes the external data file of a new image, cluster by cluster in place, and
stays at all times a raw image of the disk by itself. It is opened for reading only, so that not even a mistake could
change a byte of it, and locked as a reader's, so that nobody changes it meanwhile.

**Order.** Everything is judged before any file is made. The image is made under a temporary name: the tables > barrier
> the first sector of its header > barrier > its first bitmap, durably > the name it is to have > barrier of the
directory. Whenever the power fails, a file of that name is a whole image or none at all; a leftover of the temporary
name may be removed. After an error there is neither.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from typing import NamedTuple

from qcow2_plugin.engine.chain import DEFAULT_CACHE_SIZE
from qcow2_plugin.engine.dirty_bitmaps.bitmap_changes import BitmapChange, Verb, change_bitmaps
from qcow2_plugin.engine.image import Layer
from qcow2_plugin.engine.writable import WritableImage
from qcow2_plugin.errors import OptionError
from qcow2_plugin.format.header import MAGIC, Header
from qcow2_plugin.format.names import to_bytes
from qcow2_plugin.operations.new_files import NewFile, NewFiles
from qcow2_plugin.operations.new_image import (
    ImageOptions,
    stored_name,
    whole_sectors,
    write_first_sector,
    write_tables,
)
from qcow2_plugin.storage.directory import require_unused
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.opener import open_given

Path = str | os.PathLike[str]


class Adopted(NamedTuple):
    """The image that was made. Sizes in bytes."""

    virtual_size: int
    volume_size: int
    recorded_name: bytes
    """The name of the volume in the image."""
    needs_trust: bool
    """The image opens only if its volume is named, or the policy is `Policy.TRUSTED`."""


def adopt(
    volume: Path,
    image: Path,
    *,
    virtual_size: int | None = None,
    clip: bool = False,
    cluster_size: int = 65536,
    extended_l2: bool = False,
    refcount_bits: int = 16,
    lazy_refcounts: bool = False,
    bitmap: str | bytes | None = None,
    bitmap_granularity: int | None = None,
    is_raw: bool = False,
) -> Adopted:
    """Make the qcow2 image `image`, which must not exist, around the raw disk in `volume`, of which no byte changes.

    The disk is as large as the volume, rounded up to whole sectors; `virtual_size` in bytes says it otherwise, and with
    `clip` what of the volume is behind that need not be seen. `bitmap` is the name of a dirty bitmap that marks nothing
    yet and follows the disk from now on, one bit for `bitmap_granularity` bytes. A volume that begins as a qcow2 image
    does is one by mistake, more often than not, and refused unless it `is_raw` for certain. Recorded is its bare name
    if it is in the image's directory, else its absolute path. The other options are those of `create_image`.

    Raises FileExistsError if something has the name of the image; OptionError; BitmapError; ImageLockedError if
    somebody writes to the volume; OSError. After an error nothing is left.
    """
    options = ImageOptions.around(
        volume,
        cluster_size=cluster_size,
        refcount_bits=refcount_bits,
        lazy_refcounts=lazy_refcounts,
        extended_l2=extended_l2,
        clip=clip,
    )
    options.check()
    if bitmap is None and bitmap_granularity is not None:
        raise OptionError("there is a bitmap_granularity, but no bitmap to have it; name the bitmap, too")
    first = None
    if bitmap is not None:
        first = BitmapChange(Verb.ADD, to_bytes(bitmap), bitmap_granularity, is_enabled=True)
    require_unused(image)
    with ExitStack() as resources:
        disk = open_given(volume)
        resources.callback(disk.close)
        volume_size = disk.size()
        size = whole_sectors(volume_size if virtual_size is None else virtual_size)
        _require_raw_disk(disk, size, may_clip=clip, is_raw=is_raw)
        name = stored_name(os.fsdecode(volume), os.fspath(image))
        needs_trust = os.path.isabs(name) or not stat.S_ISREG(os.lstat(volume).st_mode)
        layout = options.layout(size)
        header = options.header(layout, name)
        with NewFiles() as files:
            made = files.make_for(image, "image")
            made.clear(layout.file_size)
            write_tables(made, layout, header.pack(), data_is_there=True)
            made.storage.barrier()
            write_first_sector(made, header.pack())
            if first is not None:
                _add_bitmap(made, header, disk, first)
            made.give_name(image)
    return Adopted(size, volume_size, name, needs_trust)


def _require_raw_disk(disk: FileStorage, size: int, *, may_clip: bool, is_raw: bool) -> None:
    """Raises OptionError unless the volume can be all of a disk of `size` bytes."""
    volume_size = disk.size()
    detail = None
    if volume_size == 0:
        detail = "the volume is empty; make the file as large as the disk is to be first"
    elif int.from_bytes(disk.pread(4, 0), "big") == MAGIC and not is_raw:
        detail = (
            "this looks like a qcow2 image, not like a raw disk, and its metadata would become the guest's data; "
            "insist that it is a raw disk (is_raw, --raw) if that is what you want"
        )
    elif size > whole_sectors(volume_size):
        detail = (
            f"the volume has {volume_size} bytes, less than the disk of {size}, and is not made longer; take a size "
            "that it has"
        )
    elif size < whole_sectors(volume_size) and not may_clip:
        detail = (
            f"the volume has {volume_size} bytes, more than the disk of {size}; leave out the size, or add clip if "
            "what is behind the end of the disk need not be seen"
        )
    if detail is not None:
        raise OptionError(detail, file=disk.path)


def _add_bitmap(made: NewFile, header: Header, disk: FileStorage, first: BitmapChange) -> None:
    """Let the image have its first bitmap, durably; the disk is only there to be described."""
    layer = Layer(header, made.storage, disk, None, DEFAULT_CACHE_SIZE, False)
    with WritableImage(layer, ExitStack()) as image:
        change_bitmaps(image, [first])
    made.storage.barrier()
