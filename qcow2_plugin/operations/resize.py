"""Changing the size of the disk in an image."""

from __future__ import annotations

import os

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import ResizeError
from qcow2_plugin.storage.opener import Policy

Path = str | os.PathLike[str]


def resize(
    path: Path,
    size: int,
    *,
    is_relative: bool = False,
    allow_shrink: bool = False,
    preallocation: str = "off",
    policy: Policy = Policy.CONFINED,
    data_file: Path | None = None,
    backing_file: Path | None = None,
    backing_format: str | None = None,
    base_directory: Path | None = None,
) -> None:
    """Make the disk in an image `size` bytes large or, if `is_relative`, so much larger or (negative) smaller.

    What is added reads as zeros, whatever a backing file holds there. What is cut off is lost, so that has to be
    allowed. `preallocation` of what is added is "off", "metadata", "falloc" or "full", as for `create_image`; the other
    options are those of `open_image`.

    Raises what `open_image` and `Image.resize` do; ResizeError if nothing would be left.
    """
    with open_image(
        path,
        writable=True,
        policy=policy,
        data_file=data_file,
        backing_file=backing_file,
        backing_format=backing_format,
        base_directory=base_directory,
    ) as image:
        virtual_size = image.virtual_size + size if is_relative else size
        if virtual_size <= 0:
            raise ResizeError(
                f"nothing would be left of the disk of {image.virtual_size} bytes; take a size of more than 0",
                file=image.layer.storage.path,
            )
        image.resize(virtual_size, allow_shrink=allow_shrink, preallocation=preallocation)
