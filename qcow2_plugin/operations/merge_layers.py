"""A new image out of the top layers of a chain, which is the same disk with fewer files.

The new file, readable by its owner alone, has its name when it is whole and durable, not before; after an error there
is none.
"""

from __future__ import annotations

import os
from dataclasses import replace

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.engine.image import Image
from qcow2_plugin.engine.merging import REFCOUNT_ORDER, Merged, Merging, Progress, layers_of, require_alike
from qcow2_plugin.errors import OptionError
from qcow2_plugin.format.header import CompressionType
from qcow2_plugin.operations.new_files import NewFile, NewFiles
from qcow2_plugin.operations.new_image import ImageOptions
from qcow2_plugin.storage.directory import require_unused

_COMPRESSION = {CompressionType.DEFLATE: "zlib", CompressionType.ZSTD: "zstd"}

Path = str | os.PathLike[str]


def merge_layers(
    image: Image | Path, to: Path, *, count: int | None = None, progress: Progress | None = None
) -> Merged:
    """Make `to` a qcow2 image with what the top `count` layers hold, all by default.

    It names as its backing file what the lowest of them names; if that is none, what reads as zeros is not stored.
    Compressed clusters stay as they are. `progress` is told (done, total) bytes of the disk.

    Raises FileExistsError; OptionError if the layers cannot be merged; what `open_image` and reading raise; OSError.
    """
    if not isinstance(image, Image):
        with open_image(image) as opened:
            return merge_layers(opened, to, count=count, progress=progress)
    layers = layers_of(image)
    wanted = layers[:count]
    require_alike(layers)
    if any(layer.layer.data is not layer.layer.storage for layer in wanted):
        raise OptionError("a layer keeps its data in another file, so it is not merged", file=os.fspath(to))
    require_unused(to)
    with NewFiles() as files:
        made = files.make_for(to, "merged image", mode=0o600)
        merged = _write(image, made, wanted, progress)
        made.give_name(to)
    return merged


def _write(image: Image, made: NewFile, layers: list[Image], progress: Progress | None) -> Merged:
    lowest = layers[-1].header
    has_backing = lowest.backing_file is not None
    options = ImageOptions(
        cluster_size=lowest.geometry.cluster_size,
        refcount_bits=1 << REFCOUNT_ORDER,
        compression_type=_COMPRESSION[lowest.compression_type],
        backing_file=lowest.backing_file,
        backing_format=os.fsdecode(lowest.backing_format or b"qcow2") if has_backing else None,
    )
    header = options.header(options.layout(image.virtual_size), None)
    work = Merging(image, made.storage, len(layers), lowest.compression_type, keeps_zeros=has_backing)
    tables = work.run(progress)
    packed = replace(header, **tables._asdict()).pack()
    made.storage.write_from(packed.ljust(header.geometry.cluster_size, b"\0"), 0)
    made.storage.barrier()
    return work.merged
