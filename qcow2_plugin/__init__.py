"""qcow2 images without QEMU: create, read and write them, serve them through nbdkit, look into them.

    with open_image("disk.qcow2", writable=True) as image:
        first_sector = image.pread(512, 0)
        image.pwrite(first_sector, 4096)
        image.flush()
        for extent in image.extents():
            ...

The house, top floor first; imports point down only:

    adapters      translation, no logic: `nbd` (connections), `exports` and `command_line` (nbdkit's), `cli` (the
                  `qcow2` command)
    operations    verbs over whole images: `create`, `resize`, `info`, `map`, `vet`
    engine        one image. Reading: `chain` opens it with all that is below, `image` is the data path, `mapping` says
                  where guest ranges live, `tables` keeps what was read of the L1 and L2 tables, `codec` decompresses,
                  `layout` tells whether the file is all there; `snapshots`, `bitmaps` and `dirty` read the rest.
                  Writing: `writable` is the data path, `placement` says where a write goes, `written_tables` and
                  `allocator` hold tables and refcounts as they change, `writeback` brings them to disk in order,
                  `requests` knows who is still moving data, `image_file` lets no write go where it does not belong.
                  Around that: `metadata` finds every structure, `tracking` keeps dirty bitmaps true, `rebuild` makes
                  refcounts from the tables, `resizing` changes the size of the disk
    storage       where bytes live: `file`, `space`, `locks`, `directory`, and `opener`, the only way from a name to an
                  open file
    format        bytes <-> values, pure: `header`, `geometry`, `entries`, `refcounts`, `snapshots`, `bitmaps`, ...
    extent, errors    the words that all of them share

A guest request goes down one call at a time, and data moves straight from or to the caller's buffer:

    read    adapter -> Image.read_into  -> Mapping.resolve       -> [Extent, ...] -> storage | codec | backing disk
    write   adapter -> Image.write_from -> WrittenMapping.place  -> Placement     -> storage -> commit, or abandon
    flush   adapter -> Image.flush      -> WriteBack.run: data, refcounts > barrier > L2, L1 > barrier > reclaim

A request is planned under the image's lock and moved without it; most requests need no lock at all (see "the lane" in
`engine.tables`, "the write lane" in `engine.written_tables`). Long ranges are walked by `Image.extents`, one L2 table
at a time, lazily. Nothing that an image says makes a file open unless the `Policy` allows it, and nothing is allocated
because of a number in a file before the number was held against its limit.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcow2_plugin.engine.chain import open_image
    from qcow2_plugin.engine.image import Image
    from qcow2_plugin.extent import Extent, ExtentKind, GuestDisk
    from qcow2_plugin.operations.create import create_image
    from qcow2_plugin.operations.info import ImageInfo, info
    from qcow2_plugin.operations.map import MapEntry, map_image
    from qcow2_plugin.operations.resize import resize
    from qcow2_plugin.operations.vet import Verdict, vet
    from qcow2_plugin.storage.opener import Policy

__all__ = [
    "Extent",
    "ExtentKind",
    "GuestDisk",
    "Image",
    "ImageInfo",
    "MapEntry",
    "Policy",
    "Verdict",
    "create_image",
    "info",
    "map_image",
    "open_image",
    "resize",
    "vet",
]

if not TYPE_CHECKING:  # a checker that saw __getattr__ would take every name for public
    _HOMES = {
        "Extent": "extent",
        "ExtentKind": "extent",
        "GuestDisk": "extent",
        "Image": "engine.image",
        "ImageInfo": "operations.info",
        "MapEntry": "operations.map",
        "Policy": "storage.opener",
        "Verdict": "operations.vet",
        "create_image": "operations.create",
        "info": "operations.info",
        "map_image": "operations.map",
        "open_image": "engine.chain",
        "resize": "operations.resize",
        "vet": "operations.vet",
    }

    def __getattr__(name):
        """Public names are imported when they are first used, so that `qcow2 info` does not wait for numpy."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
