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

from qcow2_plugin.errors import OptionError, printable
from qcow2_plugin.extent import GuestDisk
from qcow2_plugin.operations.new_files import NewFile, NewFiles, identity_if_any
from qcow2_plugin.operations.new_image import (
    ImageOptions,
    check_choice,
    stored_name,
    whole_sectors,
    write_first_sector,
    write_tables,
)
from qcow2_plugin.storage.opener import Policy, open_given

_BACKING_FORMATS = ("qcow2", "raw")

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
    options = ImageOptions(
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


def _make_image(
    path: str, virtual_size: int | None, options: ImageOptions, files: NewFiles, policy: Policy | None
) -> None:
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
    size = whole_sectors(found_size if virtual_size is None else virtual_size)
    if data is not None:
        _require_fit(data, size, is_clipped=options.clip_data_file)
    layout = options.layout(size)
    header = options.header(layout, None if options.data_file is None else stored_name(options.data_file, path))

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
    write_tables(image, layout, header.pack(), data_is_there=options.keep_data_file)
    if data is None:
        image.reserve(options.preallocation, layout.data_offset, layout.file_size)
    image.storage.barrier()
    if data is not None and options.keep_data_file:
        data.extend(size)
        data.storage.barrier()
    write_first_sector(image, header.pack())
    files.make_names_durable()


def _path_of_backing_file(name: bytes, path: str) -> str:
    return os.path.join(os.path.dirname(path), os.fsdecode(name))


def _open_backing_file(path: str, options: ImageOptions, files: NewFiles, policy: Policy) -> int:
    """Its virtual size. What is below it gets its part, and everything stays locked for reading."""
    if b":" in (options.backing_file or b"").partition(b"/")[0]:
        raise OptionError(f'"{printable(path)}" would be taken for a driver or URL, not for a file; put ./ before it')
    if options.backing_format == "raw":
        storage = open_given(path)
        files.resources.callback(storage.close)
        return storage.size()
    check_choice("backing_format", options.backing_format or "", _BACKING_FORMATS)
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


def _require_fit(data: NewFile, virtual_size: int, *, is_clipped: bool) -> None:
    """Raises OptionError unless the data file that is kept can be that of a disk of this size."""
    size = data.storage.size()
    if whole_sectors(size) > virtual_size and not is_clipped:
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
