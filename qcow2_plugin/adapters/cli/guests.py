"""What the verbs about guests share: their options, and how they end."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

_ENDING = (signal.SIGTERM, signal.SIGHUP)
_OPENING = (
    *("snapshot", "data_file", "backing_file", "backing_format", "base_directory", "allow_damaged", "force_share"),
)
_OF_ONE_IMAGE = ("data_file", "backing_file")


def add_images(parser: argparse.ArgumentParser) -> None:
    """IMAGE..."""
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="qcow2 files or block devices")


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """--timeout."""
    parser.add_argument(
        "--timeout", type=_seconds, default=300.0, metavar="SECONDS", help="give up after this long (default: 300)"
    )


def opening(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `text.add_opening` as those of `guestfs_drive`."""
    from qcow2_plugin.storage.opener import Policy

    for name in _OF_ONE_IMAGE if len(arguments.images) > 1 else ():
        if getattr(arguments, name):
            arguments.usage_error(f"--{name.replace('_', '-')} is for one image")
    return {"policy": Policy(arguments.policy), **{name: getattr(arguments, name) for name in _OPENING}}


def tell_of_launch() -> None:
    """A line on a terminal's stderr, because nothing else is seen for a while."""
    if sys.stderr.isatty():
        print("Starting libguestfs, which takes a few seconds, or half a minute without KVM ...", file=sys.stderr)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While the block runs, SIGTERM and SIGHUP end this process as Ctrl-C does: what it started ends first.

    One that is ignored, as by nohup, stays so.
    """

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    heeded = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = [(number, signal.signal(number, end)) for number in heeded]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _seconds(word: str) -> float:
    seconds = float(word)
    if not 0 < seconds < 1e6:
        raise ValueError(word)
    return seconds


_seconds.__name__ = "number of seconds"  # what argparse calls it in "invalid ... value"
