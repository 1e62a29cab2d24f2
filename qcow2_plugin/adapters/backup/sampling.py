"""Looking at what should not have changed: bitmaps are believed, but not blindly.

The last point has a leaf of its digest for each block of the disk. Blocks that no bitmap marks must still have theirs.
Some are chosen at random, half of them where there was data. One is not: the last block with data that is not marked.
A disk that was made smaller and larger again has lost what was behind, and no bitmap tells of it; if anything was lost
that was not written again, it was in that block too, since all behind it is zeros, or marked.

Owns which blocks are looked at. What is said of a disk without leaves is nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qcow2_plugin.engine.digest_tree import BLOCK, Leaves, hash_ranges
from qcow2_plugin.errors import DigestError

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.model import Member
    from qcow2_plugin.adapters.backup.repository import Repository
    from qcow2_plugin.engine.dirty_bitmaps.dirty import DirtyBitmap
    from qcow2_plugin.engine.image import Image

_WINDOW = 256
"""Blocks that a bitmap is asked about together."""
_LEAF_ROOM = 40
"""Bytes that one leaf may take where leaves are kept, at most, with all around it."""


def kept_leaves(repository: Repository, member: Member) -> Leaves | None:
    """The leaves of a member that is kept, None if there are none. Raises DigestError if they are not of its digest;
    what the target raises."""
    if member.leaves_file is None or member.content_digest is None:
        return None
    limit = (1 << 20) + _LEAF_ROOM * (member.virtual_size // BLOCK)
    packed = bytearray()
    for chunk in repository.target.get(member.leaves_file):
        packed += chunk
        if len(packed) > limit:
            raise DigestError("the leaves of a digest are longer than they can be", file=member.leaves_file)
    leaves = Leaves.unpack(bytes(packed))
    if leaves.virtual_size != member.virtual_size or leaves.root() != member.content_digest:
        raise DigestError("the leaves are those of another digest than the manifest tells", file=member.leaves_file)
    return leaves


def first_difference(image: Image, bitmaps: Sequence[str], leaves: Leaves, count: int) -> int | None:
    """Where in up to `count` blocks that no bitmap marks the disk is not as its `leaves` tell, None if nowhere.

    The disk has not become smaller. Raises what reading bitmaps and disk does.
    """
    if not count:
        return None
    marked = [image.dirty_bitmap(name) for name in bitmaps]
    last = next(_unmarked_down(marked, leaves), None)
    chosen = {block for block in _at_random(leaves, count - 1) if not _is_marked(marked, block, 1)}
    if last is not None:
        chosen.add(last)
    now = Leaves(leaves.virtual_size)
    for block in sorted(chosen):
        for _ in hash_ranges(image.read_into, [(block * BLOCK, (block + 1) * BLOCK)], now, 1):
            pass
        if now.get(block) != leaves.get(block):
            return block * BLOCK
    return None


def _at_random(leaves: Leaves, count: int) -> set[int]:
    stored = list(leaves.stored_blocks())
    chosen = set(random.sample(stored, min(count - count // 2, len(stored))))
    if leaves.block_count:
        chosen |= {random.randrange(leaves.block_count) for _ in range(count - len(chosen))}
    return chosen


def _unmarked_down(marked: Sequence[DirtyBitmap], leaves: Leaves) -> Iterator[int]:
    """The blocks that are not zeros and not marked, the last one first."""
    window, is_whole = -1, False
    for block in leaves.stored_blocks():
        if block // _WINDOW != window:
            window = block // _WINDOW
            is_whole = _is_all_marked(marked, window * _WINDOW * BLOCK, _WINDOW * BLOCK)
        if not is_whole and not _is_marked(marked, block, 1):
            yield block


def _is_marked(marked: Sequence[DirtyBitmap], block: int, count: int) -> bool:
    return any(any(True for _ in bitmap.ranges(block * BLOCK, count * BLOCK)) for bitmap in marked)


def _is_all_marked(marked: Sequence[DirtyBitmap], offset: int, length: int) -> bool:
    return any(next(iter(bitmap.ranges(offset, length)), None) == (offset, length) for bitmap in marked)
