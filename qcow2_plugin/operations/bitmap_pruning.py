"""Removing bitmaps that are good for nothing any more, and nothing else.

They take space and hide the good ones; and QEMU refuses to resize a disk with one of them. What may still be of use to
somebody, or cannot be removed by itself, stays: a bitmap of a kind that is unknown here unless it is asked for, and
one in a damaged place. `drop_bitmaps` is for the latter: it takes all bitmaps from an image without looking at them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qcow2_plugin.engine.dirty_bitmaps import unfinished
from qcow2_plugin.engine.dirty_bitmaps.bitmap_changes import change_bitmaps
from qcow2_plugin.engine.dirty_bitmaps.bitmap_plan import BitmapChange, Verb
from qcow2_plugin.errors import OptionError, ReadOnlyImageError, printable
from qcow2_plugin.format import names as format_names
from qcow2_plugin.format.header import AUTOCLEAR_DATA_FILE_RAW, EXTENSION_BITMAPS, Header
from qcow2_plugin.format.transaction import unmarked
from qcow2_plugin.operations.bitmap_health import BitmapHealth, BitmapState, bitmap_health, examined
from qcow2_plugin.operations.bitmaps import opened_alone

if TYPE_CHECKING:
    from qcow2_plugin.engine.image import Image
    from qcow2_plugin.engine.writable import WritableImage

Path = str | os.PathLike[str]

PRUNED = (BitmapState.INCONSISTENT, BitmapState.WRONG_SIZE, BitmapState.STALE)
"""What nobody can use any more."""
_PRUNABLE = frozenset({*PRUNED, BitmapState.UNKNOWN})


def prune_bitmaps(image: Image | Path, *, include: Iterable[BitmapState | str] = PRUNED, **options: Any) -> list[str]:
    """Remove the bitmaps in one of the states `include`, by one change of the header; their names.

    The states are those of `BitmapState`, or their words: inconsistent, wrong-size, stale, unknown. `options` are those
    of `open_image`. Raises OptionError for any other state; what `bitmap_health` and `open_image` do; FailedImageError,
    OSError.
    """
    states = frozenset(map(_state, include))
    with opened_alone(image, **options) as found:
        pruned = [each for each in bitmap_health(found) if each.state in states]
        if any(each.state is BitmapState.STALE for each in pruned):
            _drop_stale(found)
        else:
            change_bitmaps(found, [BitmapChange(Verb.REMOVE, format_names.to_bytes(name)) for name in _names(pruned)])
        return _names(pruned)


def _names(found: Iterable[BitmapHealth]) -> list[str]:
    return [each.name for each in found if each.name is not None]


def _state(told: BitmapState | str) -> BitmapState:
    try:
        state = BitmapState(told)
    except ValueError as error:
        raise OptionError(f'"{printable(str(told))}" is no state of a bitmap') from error
    if state not in _PRUNABLE:
        known = ", ".join(sorted(each.value for each in _PRUNABLE))
        raise OptionError(f"bitmaps that are {state.value} are not pruned, only those that are {known}")
    return state


def _drop_stale(image: WritableImage) -> None:
    """Take what is left of stale bitmaps from the header."""
    from qcow2_plugin.engine.standing_still import at_rest

    with at_rest(image):
        image.file.update_header(extensions=image.header.with_extension(EXTENSION_BITMAPS, None).extensions)
        image.file.barrier()


def drop_bitmaps(path: Path) -> list[BitmapHealth]:
    """Take all bitmaps from the image at `path` by a change of its header alone; what they were.

    Nothing that the header says of them is followed, so damaged ones go too. Their clusters stay behind as leaks, for
    `qcow2 check -r leaks`. A mark of an interrupted transaction goes with them.

    Raises NotQcow2Error, UnsupportedFeatureError, CorruptImageError (header), ReadOnlyImageError, ImageLockedError;
    OSError.
    """
    with unfinished.header_alone(path) as (storage, header):
        if header.corrupt:
            raise ReadOnlyImageError("the image is marked as corrupt; repair it first")
        found = examined(storage, header, os.fspath(path))
        if found or header.extension_data(EXTENSION_BITMAPS) is not None:
            unfinished.store(storage, header, _without_bitmaps(header))
        return found


def _without_bitmaps(header: Header) -> Header:
    bare = unmarked(header).with_extension(EXTENSION_BITMAPS, None)
    return replace(bare, autoclear_features=bare.autoclear_features & AUTOCLEAR_DATA_FILE_RAW)
