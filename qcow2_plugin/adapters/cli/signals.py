"""How a verb ends that has started something, or made a file that is not whole yet, when it is told to end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Ended(KeyboardInterrupt):
    """A signal has told this process to end, with the exit code `status`. No SystemExit: plugins raise that, too."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = 128 + number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While the block runs, SIGTERM and SIGHUP end this process as Ctrl-C does: what it started ends first.

    One that is ignored, as by nohup, stays so.
    """

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        raise Ended(number)

    heeded = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = [(number, signal.signal(number, end)) for number in heeded]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
