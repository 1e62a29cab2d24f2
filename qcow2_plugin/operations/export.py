"""Exporting a disk: a raw copy of what the guest sees, whatever the image is made of.

**Order.** The source is open and locked as a reader's before the target is looked at. A new file is made under a
temporary name, readable by nobody who may not read the source: its size > the data > barrier > proof, if asked for >
the name it is to have > barrier of the directory. Whenever the power fails or the program is killed, a file of that
name is the whole disk, or what was there before; a leftover that ends in ".partial" may be removed. After an error
there is none.

**A block device** is written in place: what was on it is lost once the work begins, and after an error it holds a part
of the disk. It is claimed before that, and its size is looked at. What of it is behind the end of the disk stays.

**As a data file.** The raw copy is made first, durably, and then an image around it (`adopt`), durably too.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.engine.copy_out import Copied, Options, copy_out
from qcow2_plugin.engine.copy_proof import first_difference
from qcow2_plugin.engine.image import Image
from qcow2_plugin.engine.raw import RawDisk
from qcow2_plugin.errors import ExportError, OptionError
from qcow2_plugin.extent import GuestDisk
from qcow2_plugin.format.geometry import SECTOR_SIZE
from qcow2_plugin.operations.new_files import NewFiles
from qcow2_plugin.operations.opened import refuse_options
from qcow2_plugin.storage.device import claimed, is_device, leads_to
from qcow2_plugin.storage.directory import make_names_durable, remove, require_unused
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.opener import Identity, open_given

if TYPE_CHECKING:
    from qcow2_plugin.operations.adopt import Adopted

SPARSE_SIZE = 4096
"""Bytes of zeros that are not worth a write, as in qemu-img."""
MAX_SPARSE_SIZE = 8 << 20
"""What one thread moves at a time: of more it could not tell, and each has a buffer of that size."""
THREADS = 2
MAX_THREADS = 64
_EXPORTING = ("sparse_size", "offload", "share", "verify", "overwrite", "threads", "progress")
"""Options that are not about opening the image."""

Path = str | os.PathLike[str]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was done, in bytes: all of the disk is one of written, shared (blocks of the source), offloaded (copied by
    the system) and zeros."""

    virtual_size: int
    written: int
    shared: int
    offloaded: int
    zeros: int
    is_device: bool
    is_verified: bool


def export_raw(
    image: Image | Path,
    to: Path,
    *,
    snapshot: str | bytes | None = None,
    sparse_size: int = SPARSE_SIZE,
    offload: bool = False,
    share: bool = True,
    verify: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    **opening: Any,
) -> ExportResult:
    """Make `to` a raw image of the disk, or of what `snapshot` (ID or else name) keeps of it.

    `to` must not exist; with `overwrite` a file that does is replaced, by another file, once that is complete, where a
    symlink leads. A block device is written in place. `sparse_size` in bytes is the least run of zeros that becomes a
    hole, 0 writes zeros as they are stored. Where the file system can, blocks are shared with the source, unless
    `share` is False. `offload` lets the system copy what it can, zeros included. `verify` reads both again and compares
    them. `threads` is how many work at once. `progress` is told (done, total) bytes, by any thread; what is to be
    compared counts twice. `opening` are options of `open_image`, for an image that is not open yet. One that is open
    for writing must not change meanwhile.

    Raises FileExistsError; OptionError; ExportError if the copy is not the disk; ImageLockedError; what `open_image`
    and reading raise; OSError. After an error there is no new file, and one of that name is as it was.
    """
    options = _options(sparse_size, threads, may_share=share, may_copy=offload)
    with _source(image, snapshot, opening) as disk:
        if is_device(to):
            if not overwrite:
                raise OptionError(
                    "this is a block device, and what is on it would be lost; say that it may be (overwrite)",
                    file=os.fspath(to),
                )
            return _to_device(disk, to, options._replace(may_share=False, is_empty=False), progress, verify=verify)
        return _to_file(disk, to, options, progress, verify=verify, overwrite=overwrite)


def export_as_data_file(
    image: Image | Path,
    to: Path,
    new_data_file: Path,
    *,
    cluster_size: int = 65536,
    extended_l2: bool = False,
    **options: Any,
) -> tuple[ExportResult, Adopted]:
    """Make `to` a qcow2 image of the disk that keeps the data in `new_data_file`, which is a raw image of it by itself.

    Neither may exist. `options` are those of `export_raw`. Raises what that does, and `adopt`; what speaks against such
    an image is known before anything is copied. After an error there is neither.
    """
    from qcow2_plugin.operations.adopt import adopt  # who wants a raw image need not wait for it

    if options.get("overwrite"):
        raise OptionError(
            "overwrite is for raw images; an image and its data file are made anew, under names of theirs"
        )
    require_unused(to)
    if is_device(new_data_file):
        raise OptionError(
            "a block device cannot be made; export to it, and then adopt it", file=os.fspath(new_data_file)
        )
    exporting = {name: options.pop(name) for name in _EXPORTING if name in options}
    with _source(image, options.pop("snapshot", None), options) as disk:
        _require_books(disk.virtual_size, to, new_data_file, cluster_size=cluster_size, extended_l2=extended_l2)
        result = export_raw(disk, new_data_file, **exporting)
    made = os.stat(new_data_file)
    try:
        adopted = adopt(new_data_file, to, cluster_size=cluster_size, extended_l2=extended_l2, is_raw=True)
    except BaseException:
        remove(new_data_file, (made.st_dev, made.st_ino))
        raise
    return result, adopted


def _require_books(size: int, image: Path, data_file: Path, *, cluster_size: int, extended_l2: bool) -> None:
    """Raises OptionError or OSError, before anything is copied, if there can be no such image around the data file."""
    from qcow2_plugin.operations.new_image import ImageOptions

    if os.path.realpath(image) == os.path.realpath(data_file):
        raise OptionError(
            "the image and its data file are two files; name another for one of them", file=os.fspath(image)
        )
    if not size:
        raise OptionError("a disk of 0 bytes has no data file; export it as a raw image")
    os.stat(os.path.dirname(image) or os.curdir)
    options = ImageOptions.around(data_file, cluster_size=cluster_size, extended_l2=extended_l2)
    options.check()
    options.layout(size)


def _options(sparse_size: int, threads: int | None, *, may_share: bool, may_copy: bool) -> Options:
    if sparse_size % SECTOR_SIZE or not 0 <= sparse_size <= MAX_SPARSE_SIZE:
        raise OptionError(f"sparse_size is whole sectors of {SECTOR_SIZE} bytes, up to {MAX_SPARSE_SIZE}, or 0")
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise OptionError(f"threads is 1 to {MAX_THREADS}")
    return Options(sparse_size, may_share, may_copy, True, threads or THREADS)


@contextmanager
def _source(image: Image | Path, snapshot: str | bytes | None, opening: dict[str, Any]) -> Iterator[Image]:
    if not isinstance(image, Image):
        with open_image(image, snapshot=snapshot, **opening) as opened:
            yield opened
        return
    refuse_options(opening)
    yield image if snapshot is None else image.at_snapshot(snapshot)


def _to_file(
    disk: Image, to: Path, options: Options, progress: Progress | None, *, verify: bool, overwrite: bool
) -> ExportResult:
    if not overwrite:
        require_unused(to)
    path = os.path.realpath(to) if overwrite else os.fspath(to)
    sources = _files_of(disk)
    with ExitStack() as resources, NewFiles() as files:
        if overwrite and os.path.exists(path):
            old = open_given(path, writable=True, vet=lambda identity, found: _refuse_source(identity, found, sources))
            resources.callback(old.close)  # whoever uses it stays in the way until it has lost its name
        made = files.make_for(path, "copy", mode=_mode(sources, os.path.dirname(path)))
        target = made.storage
        target.truncate(disk.virtual_size)
        copied = _fill(target, disk, options, progress, verify=verify)
        if overwrite:
            os.replace(made.path, path)
        else:
            made.give_name(path)
    if overwrite:
        make_names_durable(os.path.dirname(path))  # there is no way back, so no error must undo the new file
    return _result(disk, copied, is_device=False, verify=verify)


def _to_device(disk: Image, to: Path, options: Options, progress: Progress | None, *, verify: bool) -> ExportResult:
    sources = _files_of(disk)
    locked = open_given(to, writable=True, vet=lambda identity, found: _refuse_source(identity, found, sources))
    with ExitStack() as resources:
        resources.callback(locked.close)
        if any(leads_to(locked, source) for source in sources):
            raise _is_source(locked.path)
        target = resources.enter_context(claimed(locked))
        if target.size() < disk.virtual_size:
            raise OptionError(
                f"the block device has {target.size()} bytes, less than the disk of {disk.virtual_size}",
                file=os.fspath(to),
            )
        copied = _fill(target, disk, options, progress, verify=verify)
    return _result(disk, copied, is_device=True, verify=verify)


def _fill(target: FileStorage, disk: Image, options: Options, progress: Progress | None, *, verify: bool) -> Copied:
    """Let `target` be the disk, durably, and see if it is."""
    if not verify:
        copied = copy_out(disk, target, options, progress)
        target.barrier()
        return copied
    copied = copy_out(disk, target, options, _half(progress, 0))
    target.barrier()
    _require_equal(disk, target, _half(progress, 1))
    return copied


def _half(progress: Progress | None, which: int) -> Progress | None:
    """Tells of the first or the second time that each byte is moved."""
    if progress is None:
        return None
    return lambda done, total: progress(done + which * total, 2 * total)


def _result(disk: Image, copied: Copied, *, is_device: bool, verify: bool) -> ExportResult:
    return ExportResult(
        disk.virtual_size, copied.written, copied.shared, copied.offloaded, copied.zeros, is_device, verify
    )


def _require_equal(disk: Image, target: FileStorage, progress: Progress | None) -> None:
    """Raises ExportError unless `target`, read again, is the disk."""
    target.forget_cached()
    difference = first_difference(disk, target, progress)
    if difference is not None:
        raise ExportError(
            f"the copy is not the disk: they differ at guest offset {difference:#x}; something between the two lost or "
            "made up data, a disk or a file system",
            file=target.path,
        )


def _files_of(image: Image) -> list[FileStorage]:
    """All files of the chain."""
    found: list[FileStorage] = []
    disk: GuestDisk | None = image
    while isinstance(disk, Image):
        found += [file for file in (disk.layer.storage, disk.layer.data) if isinstance(file, FileStorage)]
        disk = disk.layer.backing
    if isinstance(disk, RawDisk) and isinstance(disk.storage, FileStorage):
        found.append(disk.storage)
    return found


def _mode(sources: list[FileStorage], directory: str) -> int:
    """Permissions for the owner, and for those who may read every one of the files: a group only if it is theirs."""
    there = os.stat(directory or os.curdir)
    group = there.st_gid if there.st_mode & stat.S_ISGID else os.getegid()
    readable = 0o044
    for file in sources:
        mode = file.mode()
        readable &= mode
        if not mode & 0o040 or (not mode & 0o004 and file.group() != group):
            readable = 0  # who is in a group here may be anybody there
    return 0o600 | readable | readable >> 1


def _refuse_source(identity: Identity, path: str, sources: list[FileStorage]) -> None:
    if identity in {file.identity for file in sources}:
        raise _is_source(path)


def _is_source(path: str) -> OptionError:
    return OptionError("this file is part of the disk to export; name another", file=path)
