"""Restoring a disk: a point's member, with all below it, becomes a disk that stands by itself.

**Order.** The point, the chain with its headers, and the digests of all its files > what is asked for > the plugins >
the disk, which has its name when it is whole and durable > its digest, if that is asked for > the plugins. Nothing is
written before the chain is known to be what the manifests say; after an error there is no new file, though one that was
to be overwritten may be gone if the digest was wrong, and of a block device any part may be written.

What is dirty and zero in an increment is stored as zeros there, and so it hides what is below, in a new file as well as
on a device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcow2_plugin.adapters.backup.hook_values import Restore
from qcow2_plugin.adapters.backup.verify import content_of, content_of_raw, require_files
from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import ExportError, OptionError, printable
from qcow2_plugin.operations.copy_image import copy_image
from qcow2_plugin.operations.export import export_as_data_file, export_raw
from qcow2_plugin.storage.device import is_device
from qcow2_plugin.storage.directory import identity_of, remove

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.manager import Hooks
    from qcow2_plugin.adapters.backup.model import Member
    from qcow2_plugin.adapters.backup.repository import Repository
    from qcow2_plugin.engine.image import Image

FORMS = ("saved", "raw", "qcow2", "external-data-file")
"""As the source was; a raw image; a qcow2 image with all in it; one around a raw data file."""

_KINDS: dict[str, type] = {
    "version": int,
    "cluster_size": int,
    "refcount_bits": int,
    "lazy_refcounts": bool,
    "extended_l2": bool,
    "compression_type": str,
}
"""Saved options that are used; names of files are not."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be made of a point's disk: `to` in one of `FORMS`, with `data_file` where that has one.

    `overwrite` replaces a file once the new one is whole, and is asked of a block device. `verify` computes the digest
    of what was made.
    """

    to: str
    form: str = "saved"
    data_file: str | None = None
    overwrite: bool = False
    verify: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What was made. `format` is raw or qcow2; sizes in bytes."""

    point: str
    disk: str
    target: str
    data_file: str | None
    format: str
    virtual_size: int
    written: int
    is_verified: bool


def restore(
    repository: Repository,
    point: str,
    disk: str | None,
    request: Request,
    *,
    hooks: Hooks | None = None,
    scratch: str | None = None,
    progress: Progress | None = None,
) -> Restored:
    """Make a disk of the point (an id or "latest") as `request` says.

    What is not in a local directory is fetched first, to `scratch`. `progress` is told (done, total) bytes of the disk.

    Raises ManifestError if the chain is not what it should be; FileExistsError; OptionError; ExportError if what was
    made has another digest than the point; PluginError; what the target raises; OSError.
    """
    manifest = repository.point(point)
    member = repository.member(manifest.point, disk)
    has_data_file = _form(member, request) == "external-data-file"
    if request.data_file is not None and not has_data_file:
        raise OptionError("a data file is for an image that has one: as external-data-file, or saved if it had one")
    if request.verify and member.content_digest is None:
        raise OptionError("the point has no digest of its disk to verify the new one by; leave that out")
    chain = repository.chain(manifest.point, member.disk)
    with repository.local(chain, scratch) as top:
        require_files(chain, os.path.dirname(top))
        with open_image(top) as source:
            told = Restore(
                manifest=manifest,
                disk=member.disk,
                destination=request.to,
                format="raw" if _form(member, request) == "raw" else "qcow2",
            )
            return _with_plugins(source, member, request, told, hooks=hooks, progress=progress)


def _with_plugins(
    source: Image, member: Member, request: Request, told: Restore, *, hooks: Hooks | None, progress: Progress | None
) -> Restored:
    if hooks is None:
        return _make(source, member, request, told, progress)
    try:
        hooks.restore_begin(told)
        restored = _make(source, member, request, told, progress)
    except BaseException as error:
        hooks.restore_abort(told, error)
        raise
    hooks.restore_commit(told)
    return restored


def _form(member: Member, request: Request) -> str:
    if request.form not in FORMS:
        raise OptionError(f'"{printable(request.form)}" is none of {", ".join(FORMS)}')
    if request.form != "saved":
        return request.form
    return "external-data-file" if member.options.get("data_file_raw") is True else "qcow2"


def _make(source: Image, member: Member, request: Request, told: Restore, progress: Progress | None) -> Restored:
    form = _form(member, request)
    data_file = request.data_file
    if form == "raw":
        written = export_raw(source, request.to, overwrite=request.overwrite, progress=progress).written
    elif form == "external-data-file":
        data_file = data_file or f"{request.to.removesuffix('.qcow2')}.raw"
        kind = {name: value for name, value in _saved(member).items() if name in ("cluster_size", "extended_l2")}
        written = export_as_data_file(
            source, request.to, data_file, overwrite=request.overwrite, progress=progress, **kind
        )[0].written
    else:
        written = copy_image(source, request.to, overwrite=request.overwrite, progress=progress, **_saved(member))
    if request.verify:
        with _gone_after_error(request.to, data_file if form == "external-data-file" else None):
            _require_content(member, request.to, is_raw=form == "raw")
    return Restored(
        point=told.manifest.point,
        disk=member.disk,
        target=request.to,
        data_file=data_file if form == "external-data-file" else None,
        format=told.format,
        virtual_size=source.virtual_size,
        written=written,
        is_verified=request.verify,
    )


@contextmanager
def _gone_after_error(*paths: str | None) -> Iterator[None]:
    """What turned out not to be the disk must not be taken for it."""
    try:
        yield
    except BaseException:
        for path in map(os.path.realpath, filter(None, paths)):
            if not is_device(path) and (identity := identity_of(path)) is not None:
                remove(path, identity)
        raise


def _saved(member: Member) -> dict[str, Any]:
    """The saved options of the source, as far as they are of the kind that they should be."""
    found = {name: value for name, value in member.options.items() if type(value) is _KINDS.get(name)}
    if found.get("version") == 2:
        return {name: found[name] for name in ("version", "cluster_size") if name in found}
    return found


def _require_content(member: Member, path: str, *, is_raw: bool) -> None:
    """Raises ExportError unless the disk at `path` has the digest of the point."""
    found = content_of_raw(path, member.virtual_size) if is_raw else content_of(path)
    if found != member.content_digest:
        raise ExportError(
            f"what was restored is not the disk: its digest is {found}, and that of the point {member.content_digest}",
            file=path,
        )
