"""The judge of killed servers, with journals and disks made up: what it must let pass, and what it must object to."""

from __future__ import annotations

import pytest

from tests.support.journal import SECTOR, Journal, Kind, Request

COUNT = 8


class Disk:
    """A disk and its journal; every request covers two sectors."""

    def __init__(self, base: bytes = bytes(COUNT * SECTOR)) -> None:
        self.journal = Journal(base)
        self.content = bytearray(base)

    def send(self, kind: Kind = Kind.WRITE, first: int = 2, *, durable: bool = False) -> Request:
        return self.journal.send(kind, first, 2, durable=durable)

    def done(self, kind: Kind = Kind.WRITE, first: int = 2, *, durable: bool = False) -> Request:
        """Sent and answered."""
        request = self.send(kind, first, durable=durable)
        self.journal.answer(request)
        return request

    def flush(self) -> None:
        self.journal.answer_flush(self.journal.send_flush())

    def store(self, request: Request, *, sectors: int = 2) -> None:
        """The disk holds what the request gave it, or the first sectors of it."""
        content = bytes(2 * SECTOR) if request.kind is not Kind.WRITE else self.journal.content(request)
        start = request.first * SECTOR
        self.content[start : start + sectors * SECTOR] = content[: sectors * SECTOR]

    def objections(self, *, killed: bool = True) -> int:
        judge = self.journal.objections_after_kill if killed else self.journal.objections_after_shutdown
        return len(judge(bytes(self.content)))


def test_a_new_disk_holds_what_it_held() -> None:
    disk = Disk(bytes(range(256)) * (COUNT * SECTOR // 256))
    assert not disk.objections()
    disk.content[5] ^= 1
    assert disk.objections() == 1


def test_a_write_that_was_not_flushed_may_be_lost_or_not_or_in_part() -> None:
    disk = Disk()
    write = disk.done()
    for sectors in (0, 1, 2):
        disk.store(write, sectors=sectors)
        assert not disk.objections()


def test_a_flushed_write_may_not_be_lost() -> None:
    disk = Disk()
    write = disk.done()
    disk.flush()
    assert disk.objections() == 2
    disk.store(write, sectors=1)
    assert disk.objections() == 1
    disk.store(write)
    assert not disk.objections()


def test_a_write_with_fua_may_not_be_lost() -> None:
    disk = Disk()
    disk.done(durable=True)
    assert disk.objections() == 2


def test_an_answered_write_may_not_be_lost_by_a_shutdown_in_order() -> None:
    disk = Disk()
    write = disk.done()
    assert disk.objections(killed=False) == 2
    disk.store(write)
    assert not disk.objections(killed=False)


def test_a_write_without_an_answer_may_show() -> None:
    disk = Disk()
    write = disk.send()
    assert not disk.objections(killed=False)
    disk.store(write, sectors=1)
    assert not disk.objections()
    assert not disk.objections(killed=False)


def test_a_flush_covers_nothing_that_was_answered_after_it_was_sent() -> None:
    disk = Disk()
    write = disk.send()
    sent = disk.journal.send_flush()
    disk.journal.answer(write)
    disk.journal.answer_flush(sent)
    assert not disk.objections()
    disk.flush()
    assert disk.objections() == 2


def test_a_flush_without_an_answer_covers_nothing() -> None:
    disk = Disk()
    disk.done()
    disk.journal.send_flush()
    assert not disk.objections()


def test_flushes_may_be_answered_in_any_order() -> None:
    disk = Disk()
    disk.done(first=0)
    early = disk.journal.send_flush()
    disk.done(first=4)
    late = disk.journal.send_flush()
    disk.journal.answer_flush(late)
    disk.journal.answer_flush(early)
    assert disk.objections() == 4


def test_the_older_of_two_flushed_writes_may_not_show() -> None:
    disk = Disk()
    older = disk.done()
    newer = disk.done()
    disk.store(older)
    assert not disk.objections()
    disk.flush()
    assert disk.objections() == 2
    disk.store(newer)
    assert not disk.objections()


def test_either_of_two_writes_at_the_same_time_may_show() -> None:
    disk = Disk()
    one, other = disk.send(), disk.send()
    disk.journal.answer(other)
    disk.journal.answer(one)
    disk.flush()
    for write in (one, other):
        disk.store(write)
        assert not disk.objections()
    disk.store(one, sectors=1)
    assert not disk.objections()


def test_a_newer_write_may_show_before_it_is_flushed() -> None:
    disk = Disk()
    disk.done()
    disk.flush()
    disk.store(disk.send())
    assert not disk.objections()


def test_written_zeros_are_like_a_write() -> None:
    disk = Disk()
    write = disk.done()
    disk.flush()
    zeros = disk.done(Kind.ZERO)
    disk.store(write, sectors=2)
    assert not disk.objections()
    disk.store(zeros)
    assert not disk.objections()
    disk.flush()
    disk.store(write, sectors=1)
    assert disk.objections() == 1


def test_a_trim_leaves_what_was_there_or_zeros() -> None:
    disk = Disk()
    write = disk.done()
    disk.flush()
    trim = disk.done(Kind.TRIM)
    disk.flush()
    for request in (write, trim):
        disk.store(request)
        assert not disk.objections()
        assert not disk.objections(killed=False)
    disk.done()
    disk.flush()
    assert disk.objections() == 2


def test_what_was_there_before_a_trim_is_not_what_had_been_replaced() -> None:
    disk = Disk()
    older = disk.done()
    disk.done()
    disk.flush()
    disk.done(Kind.TRIM)
    disk.store(older)
    assert disk.objections() == 2


def test_zeros_without_an_answer_may_show_and_refused_ones_may_not() -> None:
    disk = Disk()
    disk.done()
    disk.flush()
    zeros = disk.send(Kind.ZERO)
    disk.store(zeros)
    assert not disk.objections()
    disk.journal.refuse(zeros)
    assert disk.objections() == 2


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda disk: disk.content.__setitem__(2 * SECTOR + 300, 7), id="a byte is wrong"),
        pytest.param(
            lambda disk: disk.content.__setitem__(slice(2 * SECTOR, 2 * SECTOR + 256), bytes(256)), id="half of it"
        ),
        pytest.param(
            lambda disk: disk.content.__setitem__(slice(6 * SECTOR, 7 * SECTOR), disk.content[2 * SECTOR : 3 * SECTOR]),
            id="in another place",
        ),
        pytest.param(
            lambda disk: disk.content.__setitem__(
                slice(6 * SECTOR, 8 * SECTOR),
                Journal(bytes(COUNT * SECTOR)).content(Request(1, Kind.WRITE, 6, 2, durable=False, sent=1)),
            ),
            id="never asked for there",
        ),
        pytest.param(
            lambda disk: disk.content.__setitem__(
                slice(2 * SECTOR, 3 * SECTOR),
                Journal(bytes(COUNT * SECTOR), 1).content(Request(1, Kind.WRITE, 2, 1, durable=False, sent=1)),
            ),
            id="of another journal",
        ),
    ],
)
def test_what_nobody_wrote_may_not_show(damage: object) -> None:
    disk = Disk()
    disk.store(disk.done())
    assert not disk.objections()
    assert callable(damage)
    damage(disk)
    assert disk.objections()


def test_a_read_sees_what_was_answered_before_it() -> None:
    disk = Disk()
    write = disk.done()
    before = disk.journal.answered(2, 2)
    content = disk.journal.content(write)
    assert not disk.journal.objections(2, content, before)
    assert len(disk.journal.objections(2, bytes(2 * SECTOR), before)) == 2
    later = disk.done()
    assert not disk.journal.objections(2, disk.journal.content(later), before)
    assert len(disk.journal.objections(2, content, disk.journal.answered(2, 2))) == 2


def test_only_a_read_may_see_a_mixture_and_only_of_what_may_be_there() -> None:
    disk = Disk()
    one = disk.done()
    other = disk.send()
    half = SECTOR // 2
    mixture = disk.journal.content(one)[:half] + disk.journal.content(other)[half:SECTOR]
    before = disk.journal.answered(2, 1)
    assert not disk.journal.objections(2, mixture, before, torn=True)
    assert disk.journal.objections(2, mixture, before)
    disk.journal.answer(other)
    assert disk.journal.objections(2, mixture, disk.journal.answered(2, 1), torn=True)
    assert disk.journal.objections(3, mixture, before, torn=True)


def test_an_objection_tells_what_is_there_and_how_it_came() -> None:
    disk = Disk()
    older = disk.done()
    disk.done(durable=True)
    disk.store(older)
    told = disk.journal.objections_after_kill(bytes(disk.content))[0]
    assert told.startswith("sector 2 holds write 1 of journal 0 to sector 2; what was sent at 3 must show.")
    assert "write 2 (FUA), sent at 3, answered at 4" in told
