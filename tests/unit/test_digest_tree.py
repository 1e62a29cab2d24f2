"""The digest of a disk: held against one that is made the plain way, and its leaves against whoever forges them."""

from __future__ import annotations

import random
import struct

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from qcow2_plugin.engine.digest_tree import BLOCK, Leaves, Recorder, hash_ranges
from qcow2_plugin.errors import DigestError

MIB = 1 << 20
MARK = bytes(32)


def key(role: str) -> bytes:
    return blake3(f"qcow2-plugin content digest 1, {role}".encode()).digest()


def plain_digest(disk: bytes) -> str:
    """As the module says it, with everything in memory and zeros read like all else."""
    whole = disk + bytes(-len(disk) % BLOCK)
    level = [
        MARK if not any(block) else blake3(block, key=key("leaf")).digest()
        for block in (whole[start : start + BLOCK] for start in range(0, len(whole), BLOCK))
    ]
    first = True
    while len(level) > 1 or first:
        level += [MARK] * (-len(level) % 256)
        groups = [b"".join(level[start : start + 256]) for start in range(0, len(level), 256)]
        level = [blake3(group, key=key("node")).digest() if any(group) else MARK for group in groups]
        first = False
    return blake3(struct.pack(">Q", len(disk)) + (level[0] if level else MARK), key=key("root")).hexdigest()


class Disk:
    """Bytes to be read as a disk is."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.read = 0

    def read_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self.content[offset : offset + len(buffer)]
        self.read += len(buffer)

    def leaves(self) -> Leaves:
        leaves = Leaves(len(self.content))
        end = -(-len(self.content) // BLOCK) * BLOCK
        list(hash_ranges(self.read_into, [(0, end)], leaves, 2))
        return leaves


def some_disk(size: int, seed: int = 0) -> Disk:
    rng = random.Random(seed)
    content = bytearray(size)
    for _ in range(1 + size // MIB):
        start = rng.randrange(size)
        content[start : start + 100] = rng.randbytes(100)[: size - start]
    return Disk(bytes(content))


@pytest.mark.parametrize("size", [0, 512, BLOCK, BLOCK + 512, 3 * MIB, 16 * MIB, 16 * MIB + 512, 40 * MIB])
def test_the_digest_is_what_the_plain_way_makes(size: int) -> None:
    disk = some_disk(size) if size else Disk(b"")
    assert disk.leaves().root() == plain_digest(bytes(disk.content))


def test_sizes_and_single_bytes_make_a_difference() -> None:
    zeros = {Leaves(size).root() for size in (0, 512, 1024, BLOCK, 2 * BLOCK, 1 << 40, 1 << 62)}
    assert len(zeros) == 7
    disk = some_disk(MIB)
    before = disk.leaves().root()
    disk.content[-1] ^= 1
    assert disk.leaves().root() != before


def test_places_make_a_difference() -> None:
    first, second = Disk(b"a" * BLOCK + bytes(BLOCK)), Disk(bytes(BLOCK) + b"a" * BLOCK)
    assert first.leaves().root() != second.leaves().root()


@given(st.lists(st.tuples(st.integers(0, 2047), st.integers(0, 300), st.booleans()), max_size=8), st.integers(0, 3))
def test_a_digest_follows_from_the_one_before(writes: list[tuple[int, int, bool]], growth: int) -> None:
    """Of sectors: written or zeroed, told as they are copied, in a disk that may have grown."""
    disk = some_disk(MIB - 512)
    before = disk.leaves()
    disk.content += bytes(growth * 512)
    recorder = Recorder(disk.read_into, len(disk.content), before)
    for sector, count, is_zero in writes:
        start = min(sector * 512, len(disk.content))
        end = min(start + count * 512, len(disk.content))
        disk.content[start:end] = bytes(end - start) if is_zero else b"w" * (end - start)
    for sector, count, _ in writes:
        start = min(sector * 512, len(disk.content))
        end = min(start + count * 512, len(disk.content))
        now = memoryview(bytes(disk.content[start:end]))
        recorder.told(start, end - start, now if any(now) else None)
    assert recorder.finish(1).root() == disk.leaves().root()
    assert before.root() == some_disk(MIB - 512).leaves().root()


def test_blocks_that_are_told_whole_are_not_read_again() -> None:
    disk = some_disk(4 * MIB)
    before = disk.leaves()
    disk.content[MIB : 2 * MIB] = b"n" * MIB
    recorder = Recorder(disk.read_into, 4 * MIB, before)
    disk.read = 0
    recorder.told(MIB, MIB, memoryview(disk.content)[MIB : 2 * MIB])
    recorder.told(3 * MIB, 512, memoryview(disk.content)[3 * MIB : 3 * MIB + 512])
    assert recorder.finish(2).root() == disk.leaves().root()
    assert disk.read - len(disk.content) == BLOCK


def test_leaves_come_back_as_they_were_packed() -> None:
    leaves = some_disk(60 * MIB, seed=3).leaves()
    packed = leaves.pack()
    again = Leaves.unpack(packed)
    assert again.pack() == packed
    assert again.root() == leaves.root() == packed[-32:].hex()
    assert again.virtual_size == 60 * MIB
    assert [again.get(block) for block in range(960)] == [leaves.get(block) for block in range(960)]
    assert len(Leaves(1 << 62).pack()) == 24 + 32


def test_what_became_zeros_is_not_packed() -> None:
    leaves = some_disk(40 * MIB).leaves()
    leaves.clear(0, 640)
    assert leaves.pack() == Leaves(40 * MIB).pack()
    assert leaves.root() == Leaves(40 * MIB).root()


def test_a_part_is_cleared() -> None:
    leaves = Leaves(64 * MIB)
    for block in range(1024):
        leaves.set(block, b"l" * 32)
    leaves.clear(200, 900)
    assert {block for block in range(1024) if leaves.get(block) != MARK} == {*range(200), *range(900, 1024)}
    leaves.clear(0, 1 << 40)
    assert leaves.pack() == Leaves(64 * MIB).pack()


PACKED = some_disk(60 * MIB, seed=3).leaves().pack()


@given(st.integers(0, len(PACKED) - 1), st.integers(1, 255))
def test_no_byte_can_be_changed(place: int, bits: int) -> None:
    forged = bytearray(PACKED)
    forged[place] ^= bits
    with pytest.raises(DigestError):
        Leaves.unpack(bytes(forged))


@given(st.binary(max_size=300))
def test_other_bytes_are_refused(forged: bytes) -> None:
    for candidate in (forged, b"Q2LEAVES" + forged, PACKED[:24] + forged, PACKED + forged + b"1"):
        with pytest.raises(DigestError):
            Leaves.unpack(candidate)


@pytest.mark.parametrize("length", [0, 20, 24, 60, len(PACKED) - 33, len(PACKED) - 1])
def test_what_is_cut_off_is_refused(length: int) -> None:
    with pytest.raises(DigestError):
        Leaves.unpack(PACKED[:length])


def test_leaves_past_the_end_and_out_of_order_are_refused() -> None:
    """Each with the digest that goes with it, so that only the rule itself can refuse it."""
    leaf, mask = b"l" * 32, b"\x80" + bytes(31)

    def packed(size: int, *groups: tuple[int, bytes, bytes]) -> bytes:
        body = b"".join(struct.pack(">Q", index) + bits + leaves for index, bits, leaves in groups)
        head = struct.pack(">8sQQ", b"Q2LEAVES", size, len(groups))
        honest = Leaves(size)
        for index, _, _ in groups:
            honest.set(index * 256, leaf)
        return head + body + bytes.fromhex(honest.root())

    assert Leaves.unpack(packed(32 * MIB, (0, mask, leaf), (1, mask, leaf))).get(256) == leaf
    for wrong in (
        packed(16 * MIB, (1, mask, leaf)),
        packed(32 * MIB, (1, mask, leaf), (0, mask, leaf)),
        packed(32 * MIB, (0, mask, leaf), (0, mask, leaf)),
        packed(32 * MIB, (0, bytes(32), b"")),
        packed(MIB, (0, b"\x80" + bytes(30) + b"\x01", leaf + leaf)),
    ):
        with pytest.raises(DigestError):
            Leaves.unpack(wrong)
