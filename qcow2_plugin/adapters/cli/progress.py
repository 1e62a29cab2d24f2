"""How far a verb is, on stderr: for people who asked, or who sit at a terminal and wait."""

from __future__ import annotations

import sys
import time

_UNASKED_AFTER = 2.0
"""Seconds after which progress is shown on a terminal."""


class Progress:
    """Shows on stderr how far the work is: if asked for, or on a terminal when it takes long."""

    def __init__(self, done: str, *, asked: bool) -> None:
        """`done` says what has been done, as in "12 % checked"."""
        self._done = done
        self._asked = asked
        self._on_terminal = sys.stderr.isatty()
        self._start = time.monotonic()
        self._shown = -1

    def tell(self, done: int, total: int) -> None:
        """`done` of `total` is done."""
        if not self._asked and not (self._on_terminal and time.monotonic() - self._start > _UNASKED_AFTER):
            return
        percent = 100 * done // max(total, 1)
        is_step = self._on_terminal or percent == 100 or not self._shown <= percent < self._shown + 10
        if percent == self._shown or not is_step:
            return
        self._shown = percent
        start, end = ("\r", "") if self._on_terminal else ("", "\n")
        print(f"{start}{percent:{3 if start else 1}} % {self._done}", end=end, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """The work is over."""
        if self._on_terminal and self._shown >= 0:
            print("\r" + " " * (len(self._done) + 9) + "\r", end="", file=sys.stderr, flush=True)
