"""A new qcow2 image of a disk: with options of its own, and everything that was stored elsewhere in it.

**Order.** The image is made under a temporary name, its owner's alone to read, filled, and durable before it has its
own name. A data file has its name from the start, because the image names it. Whenever the power fails, an image of
that name is the whole disk, or what was there before. After an error there is neither image nor data file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.engine.image import Image
from qcow2_plugin.engine.zeros import data_runs
from qcow2_plugin.errors import OptionError
from qcow2_plugin.extent import ExtentKind
from qcow2_plugin.operations.create import create_image
from qcow2_plugin.storage.device import is_device
from qcow2_plugin.storage.directory import (
    give_name,
    identity_of,
    make_names_durable,
    remove,
    require_unused,
    temporary_name,
)
from qcow2_plugin.storage.opener import open_given

_STEP = 1 << 20

Path = str | os.PathLike[str]
Progress = Callable[[int, int], None]


def copy_image(
    disk: Image,
    to: Path,
    *,
    data_file: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> int:
    """Make `to` a qcow2 image of `disk`; how many bytes were written as data. Zeros are not stored.

    Neither `to` nor `data_file` may exist; with `overwrite` an image that does is replaced, by another file, once that
    is complete. `options` are those of `create_image` about the kind of image. `progress` is told (done, total) bytes.

    Raises FileExistsError; what `create_image` and reading raise; ImageLockedError; OSError.
    """
    path = os.path.realpath(to) if overwrite else os.fspath(to)
    if is_device(path):
        raise OptionError("a qcow2 image is made as a file; a block device takes a raw one", file=path)
    if data_file is not None:
        require_unused(data_file)
    if not overwrite:
        require_unused(path)
    with ExitStack() as resources:
        if overwrite and os.path.exists(path):
            old = open_given(path, writable=True)
            resources.callback(old.close)  # whoever uses it stays in the way until it has lost its name
        temporary = temporary_name(path)
        with _removed_after_error(temporary, data_file):
            create_image(temporary, disk.virtual_size, data_file=data_file, **options)
            for made in (temporary, data_file):
                if made is not None:
                    os.chmod(made, 0o600)  # nothing of the disk is in them yet
            with open_image(temporary, writable=True, data_file=data_file) as image:
                written = _fill(image, disk, progress)
                image.flush()
            if overwrite:
                os.replace(temporary, path)
            else:
                give_name(temporary, path)
        make_names_durable(os.path.dirname(path))
    return written


@contextmanager
def _removed_after_error(temporary: str, data_file: Path | None) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for path in (temporary, data_file):
            with suppress(OSError):  # the error that led here says more
                if path is not None and (identity := identity_of(path)) is not None:
                    remove(path, identity)
        raise


def _fill(image: Image, disk: Image, progress: Progress | None) -> int:
    """Write to an empty image what of the disk is not zeros; how many bytes that is."""
    granule = image.header.geometry.subcluster_size
    step = max(_STEP, granule)
    buffer = memoryview(bytearray(step))
    written = 0
    for start, length in _stored(disk, granule, step):
        if progress is not None:
            progress(start, disk.virtual_size)
        disk.read_into(buffer[:length], start)
        whole = -(-length // granule) * granule
        buffer[length:whole] = bytes(whole - length)
        for begin, end in data_runs(buffer[:whole], granule):
            stop = min(end, length)
            image.write_from(buffer[begin:stop], start + begin)
            written += stop - begin
    if progress is not None:
        progress(disk.virtual_size, disk.virtual_size)
    return written


def _stored(disk: Image, granule: int, step: int) -> Iterator[tuple[int, int]]:
    """Offset and length of whole granules of the disk in which anything is stored, each once, up to `step` bytes."""
    done = 0
    for extent in disk.extents():
        if extent.kind not in (ExtentKind.DATA, ExtentKind.COMPRESSED):
            continue
        end = min(-(-(extent.guest_offset + extent.length) // granule) * granule, disk.virtual_size)
        start = max(extent.guest_offset // granule * granule, done)
        while start < end:
            length = min(step, end - start)
            yield start, length
            start += length
        done = max(done, end)
