"""An overlay with its backing disk showing through."""

from __future__ import annotations

from collections.abc import Iterator

from qcow2_plugin.engine.through import through_backing
from qcow2_plugin.extent import Extent, ExtentKind

DATA, PACKED, UNALLOCATED = ExtentKind.DATA, ExtentKind.COMPRESSED, ExtentKind.UNALLOCATED
STEP = 4096


class Striped:
    """A disk of alternating kinds that remembers what it was asked for and how far it was walked."""

    def __init__(self, virtual_size: int) -> None:
        self.virtual_size = virtual_size
        self.asked: list[tuple[int, int]] = []
        self.told = 0

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Zeros."""
        buffer[:] = bytes(len(buffer))

    def extents(self, offset: int = 0, length: int | None = None, *, whole_chain: bool = True) -> Iterator[Extent]:
        """A stripe per step."""
        end = self.virtual_size if length is None else offset + length
        self.asked.append((offset, end))
        while offset < end:
            stripe_end = min(offset // STEP * STEP + STEP, end)
            self.told += 1
            kind = DATA if offset // STEP % 2 else UNALLOCATED
            yield Extent(offset, stripe_end - offset, kind, offset if kind is DATA else None)
            offset = stripe_end

    def prefetch(self, offset: int, length: int) -> None:
        """Nothing to do."""


def holes(*ranges: tuple[int, int]) -> Iterator[Extent]:
    return iter([Extent(start, end - start, UNALLOCATED, None) for start, end in ranges])


def test_no_more_of_the_backing_disk_is_walked_than_was_asked_of_the_overlay() -> None:
    backing = Striped(1 << 40)
    told = list(through_backing(holes((0, 3 * STEP)), backing, 3 * STEP))
    assert [(each.guest_offset, each.kind, each.depth) for each in told] == [
        (0, UNALLOCATED, 1),
        (STEP, DATA, 1),
        (2 * STEP, UNALLOCATED, 1),
    ]
    assert backing.asked == [(0, 3 * STEP)]
    assert backing.told == 3


def test_near_ranges_are_reached_by_going_on_and_far_ones_by_beginning_anew() -> None:
    backing = Striped(1 << 40)
    far = 1 << 30
    ranges = [(STEP, 2 * STEP), (9 * STEP, 10 * STEP), (far, far + 100), (far + 200, far + 300)]
    told = list(through_backing(holes(*ranges), backing, far + STEP))
    assert [(each.guest_offset, each.guest_offset + each.length) for each in told] == ranges
    assert backing.asked == [(STEP, far + STEP), (far, far + STEP)]


def test_what_lies_past_the_backing_disk_stays_unallocated_here() -> None:
    told = list(through_backing(holes((0, 3 * STEP)), Striped(STEP + 512), 3 * STEP))
    assert told[-1] == Extent(STEP + 512, 2 * STEP - 512, UNALLOCATED, None, 0, 0)
    assert [each.depth for each in told] == [1, 1, 0]


def test_a_compressed_run_that_is_partly_hidden_tells_its_share_of_what_is_stored() -> None:
    class Packed(Striped):
        """One compressed run."""

        def extents(self, offset: int = 0, length: int | None = None, *, whole_chain: bool = True) -> Iterator[Extent]:
            """Half as many bytes as the guest sees."""
            end = self.virtual_size if length is None else offset + length
            yield Extent(offset, end - offset, PACKED, None, (end - offset) // 2)

    ranges = [(0, 2 * STEP), (3 * STEP, 8 * STEP)]
    told = list(through_backing(holes(*ranges), Packed(8 * STEP), 8 * STEP))
    assert [each.stored_length for each in told] == [STEP, 5 * STEP // 2]
