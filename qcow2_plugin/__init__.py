"""qcow2 images without QEMU: create, read and write them, serve them through nbdkit, take care of them.

    with open_image("disk.qcow2", writable=True) as image:
        first_sector = image.pread(512, 0)
        image.pwrite(first_sector, 4096)
        image.flush()
        for extent in image.extents():
            ...

The house, top floor first; imports point down only:

    adapters      translation, no logic: `nbd` (connections), `exports` and `command_line` (nbdkit's), `cli` (the
                  `qcow2` command), `nbdkit_process` (nbdkit as a child), `guestfs` (drives for libguestfs, and what it
                  finds in a guest)
      backup      `hookspecs` is what plugins can take part in (HOOKS.md tells them), `plugins` finds them, `manager`
                  asks them by the rules of `calls`, `builtin` are those that are always there, `references` open files
                  for images as plugins say; `target` says what a place for backups must do, `targets` are such places
                  (with `program`, for those that are the programs of others), and `testing`, in the package itself,
                  holds anybody's to it. `model` is what they all talk about; `repository` finds points and chains at a
                  target by `names` and `manifest`, `restore`, `verify` and `serving` use them, `merge` and `retention`
                  make them fewer. `job` says in which order a backup happens: `journal` tells of it while it runs,
                  `levels` and `sampling` judge how much is needed, `rotation` turns the bitmaps, `planning` and
                  `members` deal with each disk, `sources` with its image, `recovery` with what a crash leaves
    operations    verbs over whole images, one module each: `create`, `info`, `map`, `vet`, `resize`, `check`,
                  `snapshots`, `bitmaps`, `bitmap_health`, `transaction` (bitmaps of several images), `amend`, `adopt`
                  and `detach` (a raw disk gets an image and loses it), `relocate` (names of other files),
                  `export` (a raw copy of the disk), `raw_view` (the data file as that disk), ...;
                  `new_image` and `new_files` are what images are made with.
                  For backups: `changes` (what has to be kept), `write_member` (what keeps it), `content_digest` (is it
                  the same disk?), `file_digest` (the same file?), `merge_layers` (fewer files, the same disk),
                  `copy_image` (an image of its own)
    engine        one image. Reading: `chain` opens it with all that is below, `image` is the data path, `mapping` says
                  where guest ranges live, `tables` keeps what was read of the L1 and L2 tables, `codec` decompresses,
                  `layout` tells whether the file is all there.
                  Writing: `writable` is the data path, `placement` says where a write goes, `written_tables` and
                  `allocator` (over `refcount_blocks`) hold tables and refcounts as they change, `writeback` brings them
                  to disk in order, `requests` knows who is still moving data, `image_file` lets no write go where it
                  does not belong, `metadata` finds every structure, `first_change` puts right what must be.
                  Changing it as a whole: `standing_still` gives the time, `resizing` another size, `amending` another
                  kind (with `refcount_width` and `zero_expansion`), `header_rewrite` plans another header,
                  `data_file_proof` tells whether a data file is the disk.
                  Copying it out: `copy_out` moves the data (`zeros` finds what need not move), `copy_proof` compares,
                  `packing` compresses it to an image, `digest_tree` hashes it, `merging` takes layers as stored;
                  `in_order` is for threads whose results are wanted one after the other.
      checking    `check` says what is looked for, `check_structures`, `check_tables`, `check_refcounts` and
                  `check_data_file` look, `references` and `table_references` count, `findings` collects
      repairing   `repair` says in which order, `repair_entries`, `repair_refcounts`, `repair_snapshots` and
                  `repair_extra` write, `damaged_map` sees where; `rebuild` makes refcounts from the tables
      internal_snapshots
                  `snapshots` reads the table, `snapshotting` makes, applies and deletes them, `reaching` finds what
                  they refer to, `recounting` counts it, `differing` compares, `snapshot_sizes` tells what they keep,
                  `snapshot_views` who reads them
      dirty_bitmaps
                  `bitmaps` and `dirty` read them, `tracking` keeps them true, `bitmap_changes` brings other ones by one
                  switch (`bitmap_plan` says which, `bitmap_content` what they mark), `bitmap_survey` looks at damaged
                  ones, `unfinished` at images in the middle of a transaction
    storage       where bytes live: `file`, `space`, `copying`, `offload`, `early`, `device`, `locks`, `directory`,
                  `blobs` (files that are there as a whole), and `opener`, the only way from a name to an open file
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
    from qcow2_plugin.engine.checking.findings import CheckResult, Finding, FindingClass
    from qcow2_plugin.engine.dirty_bitmaps.bitmap_plan import BitmapChange, BitmapVerb
    from qcow2_plugin.engine.image import Image
    from qcow2_plugin.extent import Extent, ExtentKind, GuestDisk
    from qcow2_plugin.operations.adopt import Adopted, adopt
    from qcow2_plugin.operations.amend import amend
    from qcow2_plugin.operations.bitmap_health import BitmapHealth, BitmapState, bitmap_health
    from qcow2_plugin.operations.bitmap_pruning import drop_bitmaps, prune_bitmaps
    from qcow2_plugin.operations.bitmaps import (
        add_bitmap,
        change_bitmaps,
        clear_bitmap,
        disable_bitmap,
        enable_bitmap,
        merge_bitmap,
        remove_bitmap,
        rotate_bitmap,
    )
    from qcow2_plugin.operations.check import check
    from qcow2_plugin.operations.create import create_image
    from qcow2_plugin.operations.detach import Detached, detach
    from qcow2_plugin.operations.export import ExportResult, export_as_data_file, export_raw
    from qcow2_plugin.operations.info import ImageInfo, info
    from qcow2_plugin.operations.map import MapEntry, map_image
    from qcow2_plugin.operations.raw_view import RawView, raw_view
    from qcow2_plugin.operations.relocate import Relocated, attach, relocate
    from qcow2_plugin.operations.resize import resize
    from qcow2_plugin.operations.snapshots import (
        ListedSnapshot,
        apply_snapshot,
        create_snapshot,
        delete_snapshot,
        list_snapshots,
    )
    from qcow2_plugin.operations.transaction import bitmap_transaction, forget_transaction, recover_transaction
    from qcow2_plugin.operations.vet import Verdict, vet
    from qcow2_plugin.storage.opener import Policy

__all__ = [
    "Adopted",
    "BitmapChange",
    "BitmapHealth",
    "BitmapState",
    "BitmapVerb",
    "CheckResult",
    "Detached",
    "ExportResult",
    "Extent",
    "ExtentKind",
    "Finding",
    "FindingClass",
    "GuestDisk",
    "Image",
    "ImageInfo",
    "ListedSnapshot",
    "MapEntry",
    "Policy",
    "RawView",
    "Relocated",
    "Verdict",
    "add_bitmap",
    "adopt",
    "amend",
    "apply_snapshot",
    "attach",
    "bitmap_health",
    "bitmap_transaction",
    "change_bitmaps",
    "check",
    "clear_bitmap",
    "create_image",
    "create_snapshot",
    "delete_snapshot",
    "detach",
    "disable_bitmap",
    "drop_bitmaps",
    "enable_bitmap",
    "export_as_data_file",
    "export_raw",
    "forget_transaction",
    "info",
    "list_snapshots",
    "map_image",
    "merge_bitmap",
    "open_image",
    "prune_bitmaps",
    "raw_view",
    "recover_transaction",
    "relocate",
    "remove_bitmap",
    "resize",
    "rotate_bitmap",
    "vet",
]

if not TYPE_CHECKING:  # a checker that saw __getattr__ would take every name for public
    _HOMES = {
        "Adopted": "operations.adopt",
        "BitmapChange": "engine.dirty_bitmaps.bitmap_plan",
        "BitmapHealth": "operations.bitmap_health",
        "BitmapState": "operations.bitmap_health",
        "BitmapVerb": "engine.dirty_bitmaps.bitmap_plan",
        "CheckResult": "engine.checking.findings",
        "Detached": "operations.detach",
        "ExportResult": "operations.export",
        "Extent": "extent",
        "ExtentKind": "extent",
        "Finding": "engine.checking.findings",
        "FindingClass": "engine.checking.findings",
        "GuestDisk": "extent",
        "Image": "engine.image",
        "ImageInfo": "operations.info",
        "ListedSnapshot": "operations.snapshots",
        "MapEntry": "operations.map",
        "Policy": "storage.opener",
        "RawView": "operations.raw_view",
        "Relocated": "operations.relocate",
        "Verdict": "operations.vet",
        "add_bitmap": "operations.bitmaps",
        "adopt": "operations.adopt",
        "amend": "operations.amend",
        "apply_snapshot": "operations.snapshots",
        "attach": "operations.relocate",
        "bitmap_health": "operations.bitmap_health",
        "bitmap_transaction": "operations.transaction",
        "change_bitmaps": "operations.bitmaps",
        "check": "operations.check",
        "clear_bitmap": "operations.bitmaps",
        "create_image": "operations.create",
        "create_snapshot": "operations.snapshots",
        "delete_snapshot": "operations.snapshots",
        "detach": "operations.detach",
        "disable_bitmap": "operations.bitmaps",
        "drop_bitmaps": "operations.bitmap_pruning",
        "enable_bitmap": "operations.bitmaps",
        "export_as_data_file": "operations.export",
        "export_raw": "operations.export",
        "forget_transaction": "operations.transaction",
        "info": "operations.info",
        "list_snapshots": "operations.snapshots",
        "map_image": "operations.map",
        "merge_bitmap": "operations.bitmaps",
        "open_image": "engine.chain",
        "prune_bitmaps": "operations.bitmap_pruning",
        "raw_view": "operations.raw_view",
        "recover_transaction": "operations.transaction",
        "relocate": "operations.relocate",
        "remove_bitmap": "operations.bitmaps",
        "resize": "operations.resize",
        "rotate_bitmap": "operations.bitmaps",
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
