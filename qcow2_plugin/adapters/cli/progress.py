"""How far a verb is, on stderr: for people who asked, or who sit at a terminal and wait."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TOLD_EVERY = 0.2
"""Seconds between two lines for a program."""
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


class JsonProgress:
    """Tells on stderr how far the work is, for a program: an object in each line."""

    def __init__(self, phase: str) -> None:
        self._phase = phase
        self._told_at = 0.0

    def tell(self, done: int, total: int) -> None:
        """`done` of `total` is done."""
        now = time.monotonic()
        if done == total or now - self._told_at > _TOLD_EVERY:
            self._told_at = now
            print(json.dumps({"phase": self._phase, "done": done, "total": total}), file=sys.stderr, flush=True)

    def clear(self) -> None:
        """The work is over."""


def add_option(parser: argparse.ArgumentParser) -> None:
    """--progress."""
    parser.add_argument(
        "--progress", choices=("bar", "json"), help="tell on stderr how far it is; json: an object in each line"
    )


@contextmanager
def asked_for(arguments: argparse.Namespace, phase: str, done: str) -> Iterator[Callable[[int, int], None] | None]:
    """What tells how far the work in the block is, as --progress asks for, None if --quiet does; `done` says what has
    been done, as in "12 % checked"."""
    if arguments.quiet and not arguments.progress:
        yield None
        return
    shown = JsonProgress(phase) if arguments.progress == "json" else Progress(done, asked=arguments.progress == "bar")
    try:
        yield shown.tell
    finally:
        shown.clear()
