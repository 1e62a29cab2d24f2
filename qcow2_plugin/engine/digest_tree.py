"""A digest of a disk's contents that knows nothing of how they are kept: a tree of hashes over what a guest can read.

    leaf    a block of 64 KiB, by its number: BLAKE3 of its bytes; a block of zeros has a mark of 32 zero bytes
    node    256 leaves, or nodes, in line: BLAKE3 of them; the mark, if all of them are marks
    root    BLAKE3 of the virtual size and the topmost node, or leaf

Leaves, nodes and roots are hashed with keys of their own, so that none can pass for another. A block at the end of the
disk is filled up with zeros, so a disk that grows keeps its leaves, and only the root tells the sizes apart.

Zeros cost nothing, here and in `pack`, and what has changed of a disk changes the leaves there and nothing else: so the
digest of a point follows from that of the one before and from the blocks in between (`Recorder`). Kept are 32 bytes for
each block that is not zeros, a two-thousandth of the data.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Generator, Iterable, Iterator

import numpy as np
from blake3 import blake3

from qcow2_plugin.engine.in_order import in_order
from qcow2_plugin.engine.zeros import data_runs
from qcow2_plugin.errors import DigestError
from qcow2_plugin.extent import parts

BLOCK = 64 << 10
_FAN_OUT = 256
_HASH = 32
_ZERO = bytes(_HASH)
_GROUP_SIZE = _FAN_OUT * _HASH
_ZERO_GROUP = bytes(_GROUP_SIZE)
_LEAF_KEY = blake3(b"qcow2-plugin content digest 1, leaf").digest()
_NODE_KEY = blake3(b"qcow2-plugin content digest 1, node").digest()
_ROOT_KEY = blake3(b"qcow2-plugin content digest 1, root").digest()
_AT_ONCE = 1 << 20
_MAX_SIZE = 1 << 63
_MAGIC = b"Q2LEAVES"
_HEAD = struct.Struct(">8sQQ")
"""Magic, virtual size, groups with leaves."""
_GROUP = struct.Struct(f">Q{_FAN_OUT // 8}s")
"""Number of the group, which of its leaves follow."""

Read = Callable[[memoryview, int], None]


class Leaves:
    """The leaves of a disk of `virtual_size` bytes, at first all of zeros. Any thread may set them."""

    def __init__(self, virtual_size: int) -> None:
        self.virtual_size = virtual_size
        self._groups: dict[int, bytearray] = {}
        self._lock = threading.Lock()

    @property
    def block_count(self) -> int:
        """How many blocks the disk has; the last may be a part of one."""
        return -(-self.virtual_size // BLOCK)

    def set(self, block: int, leaf: bytes) -> None:
        """Let a block have this leaf."""
        index, within = divmod(block, _FAN_OUT)
        group = self._groups.get(index)
        if group is None:
            if leaf == _ZERO:
                return
            with self._lock:
                group = self._groups.setdefault(index, bytearray(_GROUP_SIZE))
        group[within * _HASH : (within + 1) * _HASH] = leaf

    def clear(self, first: int, end: int) -> None:
        """Let the blocks from `first` to before `end` be zeros."""
        for index in self._indexes_between(first, end):
            start = max(first - index * _FAN_OUT, 0)
            stop = min(end - index * _FAN_OUT, _FAN_OUT)
            self._groups[index][start * _HASH : stop * _HASH] = bytes((stop - start) * _HASH)

    def _indexes_between(self, first: int, end: int) -> list[int]:
        """The groups with leaves that these blocks are in."""
        span = range(first // _FAN_OUT, -(-end // _FAN_OUT))
        if len(span) > len(self._groups):
            return [index for index in list(self._groups) if index in span]
        return [index for index in span if index in self._groups]

    def get(self, block: int) -> bytes:
        """The leaf of a block."""
        index, within = divmod(block, _FAN_OUT)
        group = self._groups.get(index)
        return _ZERO if group is None else bytes(group[within * _HASH : (within + 1) * _HASH])

    def stored_blocks(self) -> Iterator[int]:
        """The numbers of the blocks that are not zeros, the last one first."""
        for index in sorted(self._groups, reverse=True):
            is_there = np.frombuffer(self._groups[index], np.uint8).reshape(_FAN_OUT, _HASH).any(axis=1)
            for within in np.flatnonzero(is_there)[::-1].tolist():
                yield index * _FAN_OUT + within

    def resized(self, virtual_size: int) -> Leaves:
        """A copy for a disk that has grown to this size."""
        grown = Leaves(virtual_size)
        grown._groups = {index: bytearray(group) for index, group in self._groups.items()}
        return grown

    def root(self) -> str:
        """The digest, in hexadecimal."""
        level = {
            index: blake3(group, key=_NODE_KEY).digest()
            for index, group in self._groups.items()
            if group != _ZERO_GROUP
        }
        count = -(-self.block_count // _FAN_OUT)
        while count > 1:
            above: dict[int, bytearray] = {}
            for index, node in level.items():
                place = index % _FAN_OUT * _HASH
                above.setdefault(index // _FAN_OUT, bytearray(_GROUP_SIZE))[place : place + _HASH] = node
            level = {index: blake3(nodes, key=_NODE_KEY).digest() for index, nodes in above.items()}
            count = -(-count // _FAN_OUT)
        return blake3(struct.pack(">Q", self.virtual_size) + level.get(0, _ZERO), key=_ROOT_KEY).hexdigest()

    def pack(self) -> bytes:
        """The leaves as bytes, with the digest at the end."""
        groups = [(index, self._groups[index]) for index in sorted(self._groups) if self._groups[index] != _ZERO_GROUP]
        pieces = [_HEAD.pack(_MAGIC, self.virtual_size, len(groups))]
        for index, group in groups:
            leaves = np.frombuffer(group, np.uint8).reshape(_FAN_OUT, _HASH)
            is_there = leaves.any(axis=1)
            pieces.append(_GROUP.pack(index, np.packbits(is_there).tobytes()))
            pieces.append(leaves[is_there].tobytes())
        pieces.append(bytes.fromhex(self.root()))
        return b"".join(pieces)

    @classmethod
    def unpack(cls, packed: bytes) -> Leaves:
        """The leaves that `pack` made. Raises DigestError for anything else."""
        if len(packed) < _HEAD.size + _HASH:
            raise DigestError(f"{len(packed)} bytes are too few for leaves of a digest")
        magic, virtual_size, group_count = _HEAD.unpack_from(packed)
        if magic != _MAGIC or virtual_size > _MAX_SIZE:
            raise DigestError("these are no leaves of a digest")
        leaves = cls(virtual_size)
        offset, end, previous = _HEAD.size, len(packed) - _HASH, -1
        for _ in range(group_count):
            if end - offset < _GROUP.size + _HASH:
                raise DigestError("leaves of a digest are missing")
            index, mask = _GROUP.unpack_from(packed, offset)
            offset += _GROUP.size
            is_there = np.unpackbits(np.frombuffer(mask, np.uint8)).astype(np.bool_)
            length = int(np.count_nonzero(is_there)) * _HASH
            blocks_left = leaves.block_count - index * _FAN_OUT
            if index <= previous or not length or length > end - offset or is_there[max(blocks_left, 0) :].any():
                raise DigestError(f"group {index} of the leaves of a digest cannot be right")
            group = np.zeros((_FAN_OUT, _HASH), np.uint8)
            group[is_there] = np.frombuffer(packed, np.uint8, length, offset).reshape(-1, _HASH)
            leaves._groups[index] = bytearray(group.tobytes())
            offset += length
            previous = index
        if offset != end or leaves.root() != packed[end:].hex():
            raise DigestError("the leaves of a digest are damaged: they are not those that the digest at the end is of")
        return leaves


def hash_ranges(
    read_into: Read, ranges: Iterable[tuple[int, int]], leaves: Leaves, threads: int
) -> Generator[tuple[int, int], None, None]:
    """Hash the blocks of ranges of a disk, (start, end) in whole blocks, ascending; what is done, as it is done.

    Raises what `read_into` and `ranges` do.
    """

    def work(part: tuple[int, int]) -> tuple[int, int]:
        start, end = part
        length = min(end, leaves.virtual_size) - start
        buffer = memoryview(bytearray(end - start))
        read_into(buffer[:length], start)
        _hash_blocks(buffer, start // BLOCK, leaves)
        return part

    return in_order(work, (part for start, end in ranges for part in parts(start, end, _AT_ONCE)), threads)


def _hash_blocks(buffer: memoryview, first: int, leaves: Leaves) -> None:
    """Set the leaves of the whole blocks in `buffer`, of which `first` is the number of the first."""
    leaves.clear(first, first + len(buffer) // BLOCK)
    for start, end in data_runs(buffer, BLOCK):
        for offset in range(start, end, BLOCK):
            leaf = blake3(buffer[offset : offset + BLOCK], key=_LEAF_KEY).digest()
            leaves.set(first + offset // BLOCK, leaf)


class Recorder:
    """Makes the digest of a disk from what is told of it while it is copied, over the leaves of what it was before.

    `told` is a `copy_out.Told`. Blocks of which it is told a part only are read at the end.
    """

    def __init__(self, read_into: Read, virtual_size: int, before: Leaves | None = None) -> None:
        """`before` None: everything that is not told of is zeros."""
        self._read_into = read_into
        self._leaves = Leaves(virtual_size) if before is None else before.resized(virtual_size)
        self._parts: set[int] = set()

    def told(self, guest_offset: int, length: int, data: memoryview | None) -> None:
        """A range holds these bytes, None for zeros. For any thread."""
        end = guest_offset + length
        first = -(-guest_offset // BLOCK)
        last = end // BLOCK
        if guest_offset % BLOCK:
            self._parts.add(first - 1)
        if end % BLOCK:
            self._parts.add(last)
        if first >= last:
            return
        if data is None:
            self._leaves.clear(first, last)
        else:
            start = first * BLOCK - guest_offset
            _hash_blocks(data[start : start + (last - first) * BLOCK], first, self._leaves)

    def finish(self, threads: int) -> Leaves:
        """The leaves of the disk as it is now. Raises what reading it does."""
        ranges = ((block * BLOCK, (block + 1) * BLOCK) for block in sorted(self._parts))
        for _ in hash_ranges(self._read_into, ranges, self._leaves, threads):
            pass
        return self._leaves
