"""Threads whose results come in order, and which stop when nobody wants them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from qcow2_plugin.engine.in_order import in_order


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_the_order_of_the_tasks(threads: int) -> None:
    def work(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    assert list(in_order(work, range(40), threads)) == [number * number for number in range(40)]


def test_no_more_is_begun_than_is_wanted_soon() -> None:
    begun = []

    def tasks() -> Iterator[int]:
        for number in range(1000):
            begun.append(number)
            yield number

    results = in_order(lambda number: number, tasks(), 2)
    assert next(results) == 0
    assert len(begun) <= 6
    results.close()
    assert len(begun) <= 6


def test_an_error_comes_at_its_place_and_nobody_works_after() -> None:
    working = threading.Semaphore(0)

    def work(number: int) -> int:
        if number == 5:
            raise ValueError("five")
        time.sleep(0.01)
        working.release()
        return number

    found = []
    with pytest.raises(ValueError, match="five"):
        for number in in_order(work, range(100), 3):
            found.append(number)
    assert found == [0, 1, 2, 3, 4]
    done = working._value
    time.sleep(0.05)
    assert working._value == done < 20


def test_an_error_of_the_tasks_is_told() -> None:
    def tasks() -> Iterator[int]:
        yield 1
        raise OSError("no more")

    results = in_order(lambda number: number, tasks(), 2)
    with pytest.raises(OSError, match="no more"):
        list(results)


def test_without_room_for_threads_the_caller_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def work(number: int) -> int:
        return 7 // number

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert list(in_order(work, [1, 7, 8], 2)) == [7, 1, 0]
    with pytest.raises(ZeroDivisionError):
        list(in_order(work, [1, 0], 2))
