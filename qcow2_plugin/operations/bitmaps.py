"""Persistent dirty bitmaps: made, removed, cleared, merged, switched on and off, rotated from one backup to the next.

Each verb takes an image that is open for writing, with threads writing to it or not, or a path; then the image is
opened for as long as it takes, without its backing files. Several changes are carried out together, and a crash leaves
all of them or none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from qcow2_plugin.engine.chain import open_alone
from qcow2_plugin.engine.dirty_bitmaps import bitmap_changes
from qcow2_plugin.engine.dirty_bitmaps.bitmap_content import BitmapContent, read_content
from qcow2_plugin.engine.dirty_bitmaps.bitmap_plan import BitmapChange, Verb, rotating
from qcow2_plugin.engine.image import Image
from qcow2_plugin.format.names import to_bytes
from qcow2_plugin.operations.opened import opened
from qcow2_plugin.storage.opener import Policy

if TYPE_CHECKING:
    from qcow2_plugin.engine.writable import WritableImage

Path = str | os.PathLike[str]
Name = str | bytes


def add_bitmap(
    image: Image | Path,
    name: Name,
    *,
    granularity: int | None = None,
    enabled: bool = True,
    policy: Policy | None = None,
    data_file: Path | None = None,
    base_directory: Path | None = None,
) -> None:
    """Add a bitmap that marks nothing yet and, if `enabled`, follows the disk from now on.

    One bit stands for `granularity` bytes, a power of two from 512 to 2 GiB; None is the cluster size, but not less
    than 4 KiB and not more than 64 KiB. Options and errors are those of `change_bitmaps`.
    """
    changes = [BitmapChange(Verb.ADD, to_bytes(name), granularity, is_enabled=enabled)]
    change_bitmaps(image, changes, policy=policy, data_file=data_file, base_directory=base_directory)


def remove_bitmap(
    image: Image | Path,
    name: Name,
    *,
    policy: Policy | None = None,
    data_file: Path | None = None,
    base_directory: Path | None = None,
) -> None:
    """Remove a bitmap, whether it can be used or not. Options and errors are those of `change_bitmaps`."""
    changes = [BitmapChange(Verb.REMOVE, to_bytes(name))]
    change_bitmaps(image, changes, policy=policy, data_file=data_file, base_directory=base_directory)


def clear_bitmap(
    image: Image | Path,
    name: Name,
    *,
    policy: Policy | None = None,
    data_file: Path | None = None,
    base_directory: Path | None = None,
) -> None:
    """Let a bitmap mark nothing. Options and errors are those of `change_bitmaps`."""
    changes = [BitmapChange(Verb.CLEAR, to_bytes(name))]
    change_bitmaps(image, changes, policy=policy, data_file=data_file, base_directory=base_directory)


def enable_bitmap(
    image: Image | Path,
    name: Name,
    *,
    policy: Policy | None = None,
    data_file: Path | None = None,
    base_directory: Path | None = None,
) -> None:
    """Let a bitmap follow the disk from now on. Options and errors are those of `change_bitmaps`."""
    changes = [BitmapChange(Verb.ENABLE, to_bytes(name))]
    change_bitmaps(image, changes, policy=policy, data_file=data_file, base_directory=base_directory)


def disable_bitmap(
    image: Image | Path,
    name: Name,
    *,
    policy: Policy | None = None,
    data_file: Path | None = None,
    base_directory: Path | None = None,
) -> None:
    """Let a bitmap stay as it is now. Options and errors are those of `change_bitmaps`."""
    changes = [BitmapChange(Verb.DISABLE, to_bytes(name))]
    change_bitmaps(image, changes, policy=policy, data_file=data_file, base_directory=base_directory)


def merge_bitmap(
    image: Image | Path,
    target: Name,
    source: Name,
    *,
    source_image: Image | Path | None = None,
    policy: Policy | None = None,
    data_file: Path | None = None,
    base_directory: Path | None = None,
) -> None:
    """Mark in the bitmap `target` what the bitmap `source` marks, of the same image or of `source_image`.

    Granularities may differ, the sizes of the disks not. `source` stays as it is. Options and errors are those of
    `change_bitmaps`, and the options are for either image.
    """
    found: bytes | BitmapContent = to_bytes(source)
    if source_image is not None and source_image is not image:
        found = content_of(source_image, source, policy=policy, base_directory=base_directory)
    changes = [BitmapChange(Verb.MERGE, to_bytes(target), source=found)]
    change_bitmaps(image, changes, policy=policy, data_file=data_file, base_directory=base_directory)


def rotate_bitmap(
    image: Image | Path,
    old: Name,
    new: Name,
    *,
    granularity: int | None = None,
    policy: Policy | None = None,
    data_file: Path | None = None,
    base_directory: Path | None = None,
) -> None:
    """Freeze the bitmap `old` and begin `new` at the same moment, with the same granularity unless told otherwise.

    A write that has returned before this is called is in `old`, one that begins after it has returned is in `new`, and
    one that goes on meanwhile is in exactly one of them. `old` is disabled, complete and on disk; read it, and keep
    it until the backup that it is for is safe. Worked example, with a full backup first and two increments:

        add_bitmap(image, "since-full")                       then copy the whole disk: the full backup
        ...                                                   the guest writes A
        rotate_bitmap(image, "since-full", "since-1")         A is in since-full, and nowhere else
        increment 1 = image.dirty_extents("since-full")       the guest goes on and writes B meanwhile: B is in since-1
        remove_bitmap(image, "since-full")                    when increment 1 is safe
        rotate_bitmap(image, "since-1", "since-2")
        increment 2 = image.dirty_extents("since-1")          B, and A only where it was written to again

    If the first increment fails, nothing is lost: merge "since-full" into "since-1", remove it, and the next increment
    has both. What is read of a disk in use while an increment is copied may be newer than the rotation; then it is in
    the next increment again. A crash leaves `old` enabled without `new`, or `old` frozen beside `new`.

    Raises BitmapError if `old` is disabled: then changes are in no bitmap. Options and other errors are those of
    `change_bitmaps`.
    """
    changes = rotating(to_bytes(old), to_bytes(new), granularity)
    change_bitmaps(image, changes, policy=policy, data_file=data_file, base_directory=base_directory)


def change_bitmaps(
    image: Image | Path,
    changes: Sequence[BitmapChange],
    *,
    policy: Policy | None = None,
    data_file: Path | None = None,
    base_directory: Path | None = None,
) -> None:
    """Carry out several changes, in this order, as one: all of them are durable after, or none has happened.

    `policy`, `data_file` and `base_directory` are those of `open_image`, for an image that is given by its path;
    backing files are not opened. The thread must not be inside another request to an image that is open.

    Raises MissingReferenceError if there is no such bitmap; BitmapError if a bitmap, a name or a granularity is not for
    that; HeaderFullError; ReadOnlyImageError, OptionError and what `open_image` raises; OSError (ENOSPC, ...).
    """
    with opened_alone(image, policy=policy, data_file=data_file, base_directory=base_directory) as found:
        bitmap_changes.change_bitmaps(found, changes)


def content_of(
    image: Image | Path, name: Name, *, policy: Policy | None = None, base_directory: Path | None = None
) -> BitmapContent:
    """What a bitmap of an image, open or not, marks now: to be merged into one of another image, as the `source` of a
    change. Raises MissingReferenceError, BitmapError; what `open_image` raises."""
    if isinstance(image, Image):
        return read_content(image, to_bytes(name))
    with open_alone(image, policy=policy or Policy.CONFINED, base_directory=base_directory) as found:
        return read_content(found, to_bytes(name))


@contextmanager
def opened_alone(
    image: Image | Path,
    *,
    policy: Policy | None = None,
    data_file: Path | None = None,
    base_directory: Path | None = None,
) -> Iterator[WritableImage]:
    """`image` if it is open, for writing; else the image at this path, opened for writing without its backing files.

    Raises as `opened` does.
    """
    if isinstance(image, Image):
        with opened(image, policy=policy, data_file=data_file, base_directory=base_directory) as found:
            yield found
        return
    chosen = policy or Policy.CONFINED
    with open_alone(image, writable=True, policy=chosen, data_file=data_file, base_directory=base_directory) as alone:
        yield cast("WritableImage", alone)
