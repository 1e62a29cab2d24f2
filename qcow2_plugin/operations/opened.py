"""The image that a verb is about: one that is open already, or one to open for as long as the verb takes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.engine.image import Image
from qcow2_plugin.errors import OptionError, ReadOnlyImageError

if TYPE_CHECKING:
    from qcow2_plugin.engine.writable import WritableImage

Path = str | os.PathLike[str]


@contextmanager
def opened(image: Image | Path, **options: Any) -> Iterator[WritableImage]:
    """`image` if it is open, for writing; else the image at this path, opened for writing with these options of
    `open_image` and closed in the end.

    Raises ReadOnlyImageError if it is open for reading only, OptionError for options to an image that is open; what
    `open_image` raises.
    """
    if not isinstance(image, Image):
        with open_image(image, writable=True, **options) as found:
            yield cast("WritableImage", found)
        return
    if not image.writable:
        raise ReadOnlyImageError("the image is not open for writing", file=image.layer.storage.path)
    refuse_options(options)
    yield cast("WritableImage", image)


def refuse_options(options: Mapping[str, Any]) -> None:
    """Raises OptionError if options of `open_image` are given for an image that is open already."""
    given = sorted(name for name, value in options.items() if value is not None)
    if given:
        raise OptionError(f"{', '.join(given)}: the image is open already, so this comes too late")
