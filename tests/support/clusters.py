"""One guest cluster in every state there is, in a small image, and the requests that clear it.

It owns the images of the tests that look at single L2 entries. It refuses to know what becomes of an entry.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from qcow2_plugin.engine.image import Image
from tests.support.builder import ImageBuilder
from tests.support.fields import ALL_PARTS, COMPRESSED
from tests.support.image_checker import OFFSET_MASK

CLUSTERS = 12
ALL_ZERO = ALL_PARTS << 32
SNAPSHOT = "1"


def text(number: int, length: int = 65536) -> bytes:
    """Bytes that are like no others."""
    return random.Random(number).randbytes(length)


def builder(cluster_bits: int = 9, **options: object) -> ImageBuilder:
    """A disk of some clusters, the last of them cut if that can be, with an L2 table and data at both ends."""
    size = 1 << cluster_bits
    image = ImageBuilder(CLUSTERS * size - size // 1024 * 512, cluster_bits, **options)  # type: ignore[arg-type] # of its own
    return image.data(5, text(5, size)).data(CLUSTERS - 1, text(CLUSTERS - 1, size))


def below(image: ImageBuilder) -> bytes:
    """A backing file that ends inside cluster 4."""
    return text(99, 4 * image.cluster_size + image.cluster_size // 2 + 7)


def touched(word: int, cluster_bits: int) -> list[int]:
    """The host offsets of the clusters that an entry refers to."""
    if not word & COMPRESSED:
        return [word & OFFSET_MASK] if word & OFFSET_MASK else []
    offset_bits = 70 - cluster_bits
    first = (word & (1 << offset_bits) - 1) >> 9
    last = first + ((word & COMPRESSED - 1) >> offset_bits)
    return sorted({sector << 9 >> cluster_bits << cluster_bits for sector in range(first, last + 1)})


Tell = Callable[[ImageBuilder, int], object]


def parts(image: ImageBuilder, cluster: int) -> None:
    """Data, zeros and nothing, all in one cluster."""
    image.subclusters(cluster, text(cluster, image.cluster_size), allocated=0x00FF_0F10, zero=0xF000_0083)


STATES: dict[str, Tell] = {
    "unallocated": lambda image, cluster: image.l2_table(cluster // image.l2_entries),
    "zero": lambda image, cluster: image.zero(cluster),
    "normal": lambda image, cluster: image.data(cluster, text(cluster, image.cluster_size)),
    "kept": lambda image, cluster: image.zero(cluster, preallocated=True, payload=text(cluster, image.cluster_size)),
    "packed": lambda image, cluster: image.compressed(cluster, text(cluster, image.cluster_size // 2)),
    "parts": parts,
    "parts of zero": lambda image, cluster: image.subclusters(
        cluster, b"", allocated=0, zero=0x0F0F_0F00, stored=False
    ),
    "space": lambda image, cluster: image.subclusters(cluster, text(cluster, image.cluster_size), allocated=0),
}

CLEAR: dict[str, Callable[[Image, int, int], None]] = {
    "zero": lambda disk, offset, length: disk.write_zeroes(offset, length, may_unmap=False),
    "unmap": lambda disk, offset, length: disk.write_zeroes(offset, length, may_unmap=True),
    "discard": lambda disk, offset, length: disk.discard(offset, length),
}
