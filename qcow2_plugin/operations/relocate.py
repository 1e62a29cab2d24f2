"""Another name for the data file or the backing file of an image: they were moved, copied or restored elsewhere.

Nothing of the image changes but names in its header, by steps that a crash leaves whole (`engine.header_rewrite`); so
dirty bitmaps and internal snapshots stay what they are, as far as the file of the new name is what that of the old one
was. What can be seen of that is looked at before anything changes: the file opens, as what it is to be, and is no
other part of the same chain; a data file is long enough, and a raw one holds zeros where the image says so; and on
request, as long as the old file is there, the contents are the same.

While that is done the image is locked as a writer's, the others as a reader's.

A name is recorded relative to the directory of the image if it leads to a file below that, and is absolute otherwise.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Literal, NamedTuple

from qcow2_plugin.engine.chain import DEFAULT_CACHE_SIZE, open_below, require_readable
from qcow2_plugin.engine.data_file_proof import Progress, difference, first_difference, first_hidden
from qcow2_plugin.engine.dirty_bitmaps.unfinished import header_alone, store
from qcow2_plugin.engine.files import ChainFiles
from qcow2_plugin.engine.first_change import kept_autoclear_features
from qcow2_plugin.engine.image import Image, Layer
from qcow2_plugin.engine.internal_snapshots.snapshots import read_snapshots
from qcow2_plugin.errors import OptionError, Qcow2Error, RelocateError, UnfinishedTransactionError, printable
from qcow2_plugin.extent import Extent, ExtentKind, GuestDisk
from qcow2_plugin.format.geometry import MAX_BACKING_FORMAT_LENGTH, MAX_NAME_LENGTH, SECTOR_SIZE
from qcow2_plugin.format.header import EXTENSION_BACKING_FORMAT, EXTENSION_DATA_FILE, Header
from qcow2_plugin.format.transaction import is_marked
from qcow2_plugin.operations.new_files import identity_if_any
from qcow2_plugin.storage.directory import absolute_path
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.opener import Policy, broken_rule

_COMPARED_AT_ONCE = 1 << 20

Path = str | os.PathLike[str]
Form = Literal["absolute", "relative"]


class Relocated(NamedTuple):
    """The names that the image has now; None for one that was not asked for."""

    data_file: bytes | None
    backing_file: bytes | None
    needs_trust: tuple[str, ...]
    """Which of them, "data file" or "backing file", are followed only by `Policy.TRUSTED`."""


def relocate(
    path: Path,
    *,
    data_file: Path | None = None,
    backing_file: Path | None = None,
    backing_format: str | None = None,
    form: Form | None = None,
    missing: bool = False,
    verify: bool = False,
    policy: Policy = Policy.CONFINED,
    progress: Progress | None = None,
) -> Relocated:
    """Let the image at `path` name these files as its external data file or its backing file, instead of others.

    They are files as the caller names them. `form` says whether their names are recorded as absolute ones or relative
    to the image's directory; None takes what suits. `backing_format` is "qcow2" or "raw"; None is the recorded one.
    A file that is `missing` need not be there yet, and is not looked at then. `verify` compares the contents with those
    of the old files, which have to be there. `policy` is for names that images have. `progress` is told (done, total).

    Raises RelocateError, OptionError, ReferenceDeniedError (a file has two parts), MissingReferenceError (`verify`
    without the old file), HeaderFullError, UnfinishedTransactionError; what opening the files does; OSError. Unless it
    is an error of the storage in the midst, nothing has changed.
    """
    if data_file is None and backing_file is None:
        raise OptionError("say which file the image is to name, a data file or a backing file")
    if backing_format is not None and backing_file is None:
        raise OptionError("there is a backing_format, but no backing_file to have it; name the file, too")
    if missing and verify:
        raise OptionError("a file that is missing cannot be compared with anything; leave out missing, or verify")
    with header_alone(path) as (storage, header):
        _require_names(header, storage, data_file=data_file, backing_file=backing_file)
        relocation = _Relocation(storage, header, policy, progress or (lambda done, total: None))
        return relocation.run(
            _Target.of(data_file, storage.path, form, missing=missing),
            _Target.of(backing_file, storage.path, form, missing=missing),
            backing_format,
            verify=verify,
        )


def attach(
    path: Path,
    data_file: Path,
    *,
    form: Form | None = None,
    policy: Policy = Policy.CONFINED,
    progress: Progress | None = None,
) -> Relocated:
    """Let the image at `path`, whose external data file it does not name or which has gone, name this file as such.

    Raises RelocateError if it names one that is there; otherwise as `relocate` does, whose options these are.
    """
    with header_alone(path) as (storage, header):
        _require_names(header, storage, data_file=data_file, backing_file=None)
        if header.data_file is not None and broken_rule(header.data_file, Policy.TRUSTED) is None:
            named = identity_if_any(os.path.join(os.path.dirname(storage.path), os.fsdecode(header.data_file)))
            if named is not None and named != identity_if_any(data_file):
                raise RelocateError(
                    f'the image names "{printable(header.data_file)}" as its data file, and that is there; use '
                    "'qcow2 relocate --data-file' to let it name another",
                    file=storage.path,
                )
        relocation = _Relocation(storage, header, policy, progress or (lambda done, total: None))
        return relocation.run(_Target.of(data_file, storage.path, form, missing=False), None, None, verify=False)


def _require_names(header: Header, storage: FileStorage, *, data_file: Path | None, backing_file: Path | None) -> None:
    """Raises what of the image alone speaks against these names."""
    detail = None
    if is_marked(header):
        raise UnfinishedTransactionError(
            "a change of the bitmaps of several images was interrupted; finish it first with 'qcow2 bitmap recover'",
            file=storage.path,
        )
    if header.corrupt:
        detail = "the image is marked as corrupt and not written to; repair it first with 'qcow2 check -r all'"
    elif data_file is not None and not header.has_data_file:
        detail = "the image has no external data file, it keeps the disk itself"
    elif backing_file is not None and header.backing_file is None:
        detail = "the image has no backing file; 'qemu-img rebase' gives it one"
    if detail is not None:
        raise RelocateError(detail, file=storage.path)


class _Target(NamedTuple):
    """A file that is to be named, and the name to record; `path` None: it is not there, and not looked at."""

    path: Path | None
    name: bytes

    @classmethod
    def of(cls, path: Path | None, image: str, form: Form | None, *, missing: bool) -> _Target | None:
        if path is None:
            return None
        name = recorded_name(path, image, form)
        return cls(None if missing and not os.path.lexists(path) else path, name)

    @property
    def needs_trust(self) -> bool:
        if broken_rule(self.name, Policy.CONFINED) is not None:
            return True
        return self.path is not None and not stat.S_ISREG(os.lstat(self.path).st_mode)


def recorded_name(path: Path, image: str, form: Form | None = None) -> bytes:
    """The name by which the image of the path `image` finds the file `path`. Raises RelocateError if there is none."""
    given = os.fsdecode(path)
    if os.path.basename(given) in ("", os.curdir, os.pardir):
        raise RelocateError(f'the name "{printable(given)}" cannot be recorded: it is not that of a file', file=image)
    absolute = absolute_path(given)
    directory, base = os.path.split(absolute)
    real = os.path.join(os.path.realpath(directory), base)
    relative = os.fsencode(os.path.relpath(real, os.path.realpath(os.path.dirname(image) or os.curdir)))
    name = os.fsencode(absolute)
    if form == "relative" or (form is None and broken_rule(relative, Policy.CONFINED) is None):
        name = relative
    rule = broken_rule(name, Policy.TRUSTED)
    if rule is None and len(name) > MAX_NAME_LENGTH:
        rule = f"it is longer than {MAX_NAME_LENGTH} bytes"
    if rule is not None:
        raise RelocateError(f'the name "{printable(name)}" cannot be recorded: {rule}', file=image)
    return name


class _Relocation:
    """One image whose header alone has been looked at so far."""

    def __init__(self, storage: FileStorage, header: Header, policy: Policy, progress: Progress) -> None:
        self._storage = storage
        self._header = header
        self._policy = policy
        self._progress = progress

    def run(
        self, data: _Target | None, backing: _Target | None, backing_format: str | None, *, verify: bool
    ) -> Relocated:
        """Look at everything, then change the names, durably."""
        header = self._renamed(data, backing, backing_format)
        with ExitStack() as resources:
            files = self._files(resources)
            if data is None and header.has_data_file:
                with suppress(Qcow2Error, OSError):  # so that no file gets a second part, as far as they can be found
                    files.open_data_file(self._header, self._storage)
            if backing is None and header.backing_file is not None:
                with suppress(Qcow2Error, OSError):
                    open_below(files, self._header, self._storage)
            if data is not None and data.path is not None:
                new = files.open_data_file(header, self._storage, data.path)
                assert isinstance(new, FileStorage)
                self._require_data_file(new, verify=verify)
            if backing is not None and backing.path is not None:
                below = open_below(files, header, self._storage, backing.path)
                if verify:
                    self._require_same_disk(below)
            if header.data_file is not None and header.data_file == header.backing_file:
                raise RelocateError(
                    f'the image would name "{printable(header.data_file)}" as its data file and as its backing file',
                    file=self._storage.path,
                )
            named = (("data file", data), ("backing file", backing))
            needs_trust = tuple(role for role, target in named if target is not None and target.needs_trust)
            store(self._storage, self._header, header)
        return Relocated(data and data.name, backing and backing.name, needs_trust)

    def _files(self, resources: ExitStack) -> ChainFiles:
        files = ChainFiles(resources, policy=self._policy)
        files.start_at(self._storage)
        return files

    def _renamed(self, data: _Target | None, backing: _Target | None, backing_format: str | None) -> Header:
        header = self._header
        if data is not None:
            header = header.with_extension(EXTENSION_DATA_FILE, data.name)
        if backing is not None:
            recorded = header.backing_format if backing_format is None else os.fsencode(backing_format)
            if not recorded:
                raise RelocateError(
                    "the format of the backing file is not recorded; say it (backing_format, --backing-format), it is "
                    "never guessed",
                    file=self._storage.path,
                )
            if recorded not in (b"qcow2", b"raw") and (backing_format is not None or backing.path is not None):
                raise RelocateError(
                    f'"{printable(recorded[:MAX_BACKING_FORMAT_LENGTH])}" is no format for the backing file; qcow2 and '
                    "raw are",
                    file=self._storage.path,
                )
            header = header.with_extension(EXTENSION_BACKING_FORMAT, recorded)
            header = replace(header, backing_file=backing.name).laid_out()
        return replace(header, autoclear_features=kept_autoclear_features(header))

    # -- a data file --

    def _require_data_file(self, new: FileStorage, *, verify: bool) -> None:
        """Raises RelocateError if it cannot be the image's, or with `verify` is not what the old one is."""
        require_readable(self._header, self._storage)
        layer = Layer(self._header, self._storage, new, None, DEFAULT_CACHE_SIZE, False)
        image = Image(layer, ExitStack())
        self._require_length(image, new)
        new.barrier()  # so that the system is sure of what are holes
        if self._header.data_file_raw:
            hidden = first_hidden(image, self._progress)
            if hidden is not None:
                raise RelocateError(
                    f"this is not the raw disk of the image: at guest offset {hidden:#x} the disk reads as zeros, and "
                    "the file holds something else",
                    file=new.path,
                )
        if verify:
            self._require_same_data(image, new)

    def _require_length(self, image: Image, new: FileStorage) -> None:
        size = -(-new.size() // SECTOR_SIZE) * SECTOR_SIZE
        if size >= image.virtual_size:
            return
        if self._header.data_file_raw or any(
            extent.kind is ExtentKind.DATA for extent in image.extents(size, whole_chain=False)
        ):
            raise RelocateError(
                f"the file has {new.size()} bytes, too few for the data of the disk of {image.virtual_size}",
                file=new.path,
            )

    def _require_same_data(self, image: Image, new: FileStorage) -> None:
        with ExitStack() as resources:
            files = self._files(resources)
            old = files.open_data_file(self._header, self._storage)
            assert isinstance(old, FileStorage)
            if old.identity == new.identity:
                return
            old.barrier()
            for extent in image.extents(whole_chain=False):
                if extent.kind is ExtentKind.DATA:
                    found = first_difference(old, new, extent.guest_offset, extent.length)
                    if found is not None:
                        raise _differing(found, new.path)
                self._progress(extent.guest_offset + extent.length, image.virtual_size)

    # -- a backing file --

    def _require_same_disk(self, new: GuestDisk) -> None:
        """Raises RelocateError unless the image, and each of its snapshots, sees the same below it."""
        size = self._header.virtual_size
        snapshots = read_snapshots(self._storage, self._header)
        size = max([size, *(snapshot.virtual_size(size) for snapshot in snapshots)])
        with ExitStack() as resources:
            old = open_below(self._files(resources), self._header, self._storage)
            for start, length in _ranges_with_data(old, new, size):
                found = difference(_pread(old, start, length), _pread(new, start, length))
                if found is not None:
                    raise _differing(start + found, self._storage.path)
                self._progress(start + length, size)


def _differing(offset: int, path: str) -> RelocateError:
    return RelocateError(
        f"the file is not what the old one is: they differ at offset {offset:#x} of the disk", file=path
    )


def _ranges_with_data(old: GuestDisk, new: GuestDisk, size: int) -> Iterator[tuple[int, int]]:
    """Pieces of the first `size` bytes in which one of the disks may have anything but zeros."""
    for extent in _extents(old, 0, size):
        if _has_data(extent):
            yield from _pieces(extent.guest_offset, extent.length)
    for extent in _extents(new, 0, size):
        if not _has_data(extent):
            continue
        end = extent.guest_offset + extent.length
        for other in _extents(old, extent.guest_offset, end):
            if not _has_data(other):
                yield from _pieces(other.guest_offset, other.length)
        behind = max(extent.guest_offset, old.virtual_size)
        yield from _pieces(behind, end - behind)


def _extents(disk: GuestDisk, start: int, end: int) -> Iterator[Extent]:
    end = min(end, disk.virtual_size)
    return disk.extents(start, end - start) if start < end else iter(())


def _has_data(extent: Extent) -> bool:
    return extent.kind in (ExtentKind.DATA, ExtentKind.COMPRESSED)


def _pieces(start: int, length: int) -> Iterator[tuple[int, int]]:
    for place in range(start, start + length, _COMPARED_AT_ONCE):
        yield place, min(_COMPARED_AT_ONCE, start + length - place)


def _pread(disk: GuestDisk, start: int, length: int) -> bytes:
    """What the disk has of a range, as far as it goes."""
    content = bytearray(max(min(length, disk.virtual_size - start), 0))
    if content:
        disk.read_into(memoryview(content), start)
    return bytes(content)
