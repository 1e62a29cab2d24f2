"""What a disk must read as, and requests to it that are worth making.

It owns the guest's view as plain bytes, the meaning of a request for it, and the choice of requests: near borders of
clusters, subclusters, L2 tables and refcount blocks, near the end, and where requests were before. It refuses to know
how an image stores any of it.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qcow2_plugin.engine.image import Image

_CHUNK = 1 << 16
_MAX_LENGTH = 3 << 20


class Verb(enum.Enum):
    """What a guest asks for, by the words of qemu-io."""

    WRITE = "write"
    ZERO = "write -z"
    UNMAP = "write -z -u"
    DISCARD = "discard"


class Request(NamedTuple):
    """One request of a guest; `seed` tells what a write writes."""

    verb: Verb
    offset: int
    length: int
    seed: int = 0

    @property
    def payload(self) -> bytes:
        """The bytes of a write: no two places in it look alike."""
        return random.Random(self.seed).randbytes(self.length)

    def apply(self, image: Image) -> None:
        """Make it to an image that is open for writing."""
        if self.verb is Verb.WRITE:
            image.pwrite(self.payload, self.offset)
        elif self.verb is Verb.DISCARD:
            image.discard(self.offset, self.length)
        else:
            image.write_zeroes(self.offset, self.length, may_unmap=self.verb is Verb.UNMAP)

    def command(self, folder: Path) -> str:
        """It as a command of qemu-io, which finds what it writes in `folder`."""
        words = [self.verb.value]
        if self.verb is Verb.WRITE:
            payload = folder / f"payload-{self.seed}-{self.length}"
            payload.write_bytes(self.payload)
            words.append(f"-s {payload}")
        return " ".join([*words, str(self.offset), str(self.length)])


class Model:
    """The guest's view of a disk. Memory follows what is written, whatever the size.

    `discards` False: a discard does nothing, as where no entry could hide a backing file.
    """

    def __init__(self, virtual_size: int, cluster_size: int, *, content: bytes = b"", discards: bool = True) -> None:
        self.virtual_size, self.cluster_size, self.discards = virtual_size, cluster_size, discards
        self._chunks: dict[int, bytearray] = {}
        self.write(0, content[:virtual_size])

    def apply(self, request: Request) -> None:
        """What the request does to the disk."""
        if request.verb is Verb.WRITE:
            self.write(request.offset, request.payload)
        elif request.verb is Verb.DISCARD:
            self.discard(request.offset, request.length)
        else:
            self.zero(request.offset, request.offset + request.length)

    def write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        assert end <= self.virtual_size
        for index in range(offset // _CHUNK, -(-end // _CHUNK)):
            base = index * _CHUNK
            chunk = self._chunks.setdefault(index, bytearray(_CHUNK))
            first, last = max(offset, base), min(end, base + _CHUNK)
            chunk[first - base : last - base] = data[first - offset : last - offset]

    def zero(self, start: int, end: int) -> None:
        for first, length in self._known(start, end):
            self.write(first, bytes(length))

    def discard(self, offset: int, length: int) -> None:
        """Whole clusters, the last one of the disk as far as it goes."""
        end = offset + length
        start = -(-offset // self.cluster_size) * self.cluster_size
        stop = end if end == self.virtual_size else end // self.cluster_size * self.cluster_size
        if self.discards and start < stop:
            self.zero(start, stop)

    def resize(self, virtual_size: int) -> None:
        """What is cut off is gone; what is added is zeros."""
        self.zero(virtual_size, self.virtual_size)
        self.virtual_size = virtual_size

    def read(self, offset: int, length: int) -> bytes:
        view = bytearray(length)
        for first, count in self._known(offset, offset + length):
            index, within = divmod(first, _CHUNK)
            view[first - offset : first - offset + count] = self._chunks[index][within : within + count]
        return bytes(view)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of what may hold other bytes than zeros, ascending."""
        return self._known(0, self.virtual_size)

    def save(self, path: Path) -> None:
        """Write the disk out, as a sparse raw file."""
        with open(path, "wb") as stream:
            for offset, length in self.ranges():
                piece = self.read(offset, length)
                if any(piece):
                    stream.seek(offset)
                    stream.write(piece)
            stream.truncate(self.virtual_size)

    def _known(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of the chunks between `start` and `end` that were ever written to, clipped."""
        for index in sorted(self._chunks):
            first, last = max(index * _CHUNK, start), min((index + 1) * _CHUNK, end)
            if first < last:
                yield first, last - first


def assert_reads_as(image: Image, model: Model) -> None:
    """All that the model knows of, and a byte on either side."""
    assert image.virtual_size == model.virtual_size
    for offset, length in model.ranges():
        first, last = max(offset - 1, 0), min(offset + length + 1, model.virtual_size)
        found, wanted = image.pread(last - first, first), model.read(first, last - first)
        if found != wanted:
            wrong = next(index for index in range(len(found)) if found[index] != wanted[index])
            difference = f"{found[wrong]:#x} instead of {wanted[wrong]:#x}"
            raise AssertionError(f"byte {first + wrong:#x} of the disk is {difference}")


@dataclass(frozen=True)
class Places:
    """Where the borders are. `coverages` are guest bytes below one L2 table, one refcount block and the like."""

    cluster_size: int
    subcluster_size: int
    coverages: Sequence[int] = ()

    def request(self, chance: random.Random, virtual_size: int, verbs: Sequence[Verb] = tuple(Verb)) -> Request:
        """One request to a disk that is not empty, inside it and not empty itself."""
        verb = chance.choice([Verb.WRITE, *verbs]) if Verb.WRITE in verbs else chance.choice(verbs)
        offset, length = self.range(chance, virtual_size)
        if verb is not Verb.WRITE and chance.random() < 0.04:
            length = virtual_size - offset
        return Request(verb, offset, length, chance.getrandbits(32))

    def range(self, chance: random.Random, virtual_size: int) -> tuple[int, int]:
        """(offset, length) of a range in the disk, mostly near a border."""
        offset = self._anchor(chance, virtual_size) + chance.choice([0, 0, 0, 0, 1, -1, 511, 512, -512])
        offset += chance.choice([0, 0, self.subcluster_size, -self.subcluster_size])
        offset = min(max(offset, 0), virtual_size - 1)
        unit = chance.choice([1, 512, self.subcluster_size, self.cluster_size, self.cluster_size])
        length = unit * chance.choice([1, 1, 1, 2, 3, 5]) + chance.choice([0, 0, 0, 1, -1, 512])
        if chance.random() < 0.3:  # as many as reach a border
            length = -offset % self.cluster_size + chance.choice([0, 1, 2]) * self.cluster_size
        return offset, max(min(length, _MAX_LENGTH, virtual_size - offset), 1)

    def _anchor(self, chance: random.Random, virtual_size: int) -> int:
        """A border of clusters, not far from 0, the end or a border of something larger."""
        borders = [0, virtual_size // self.cluster_size * self.cluster_size]
        for coverage in self.coverages:
            if coverage < virtual_size:
                borders.append(chance.randint(1, min(virtual_size // coverage, 3)) * coverage)
        return chance.choice(borders) + chance.randint(-6, 12) * self.cluster_size
