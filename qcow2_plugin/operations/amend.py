"""Changing what kind of image an image is: its version, its features, the names in its header."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from qcow2_plugin.engine import amending
from qcow2_plugin.engine.image import Image
from qcow2_plugin.errors import OptionError, printable
from qcow2_plugin.operations.opened import opened

if TYPE_CHECKING:
    from qcow2_plugin.engine.checking.findings import Progress

Path = str | os.PathLike[str]

VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
"""What `compat` can be."""


def amend(
    image: Image | Path,
    *,
    compat: str | None = None,
    lazy_refcounts: bool | None = None,
    refcount_bits: int | None = None,
    size: int | None = None,
    allow_shrink: bool = False,
    data_file: Path | None = None,
    data_file_raw: bool | None = None,
    progress: Progress | None = None,
    current_data_file: Path | None = None,
    **opening: Any,
) -> None:
    """Change an image, open for writing or at a path, into one with these properties; None leaves one as it is.

    `compat` is "1.1" (or "v3") or "0.10" ("v2"). `refcount_bits` is 1 to 64. `size` in bytes, with `allow_shrink`
    also a smaller one. `data_file` is the name of the external data file that the image is to record, "" for none; the
    file stays where it is. `data_file_raw` True says that the data file is a raw image of the disk; that is looked at,
    and the image refused if it is not so. `progress` is told (done, total) now and then; it must not use the image.

    `current_data_file`, and the other options of `open_image` (policy, backing_file, ...), are for opening a path.

    What cannot be is refused before anything changes: AmendError, ResizeError, OptionError. Raises what `open_image`
    does; HeaderFullError, FailedImageError, OSError in the midst, when some of it may have been done already and the
    rest can be tried again.
    """
    if compat is not None and compat not in VERSIONS:
        raise OptionError(f'"{printable(compat)}" is no compat; {", ".join(VERSIONS)} are')
    wanted = amending.Amendment(
        version=None if compat is None else VERSIONS[compat],
        refcount_bits=refcount_bits,
        data_file_raw=data_file_raw,
        data_file=None if data_file is None else os.fsencode(data_file),
        lazy_refcounts=lazy_refcounts,
        size=size,
        allow_shrink=allow_shrink,
    )
    if current_data_file is not None:
        opening["data_file"] = current_data_file
    with opened(image, **opening) as found:
        amending.amend(found, wanted, progress)
