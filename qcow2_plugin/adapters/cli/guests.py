"""The options that the verbs about guests share."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from qcow2_plugin.adapters.cli import text

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
    for name in _OF_ONE_IMAGE if len(arguments.images) > 1 else ():
        if getattr(arguments, name):
            arguments.usage_error(f"--{name.replace('_', '-')} is for one image")
    return text.opening(arguments)


def tell_of_launch() -> None:
    """A line on a terminal's stderr, because nothing else is seen for a while."""
    if sys.stderr.isatty():
        print("Starting libguestfs, which takes a few seconds, or half a minute without KVM ...", file=sys.stderr)


def _seconds(word: str) -> float:
    seconds = float(word)
    if not 0 < seconds < 1e6:
        raise ValueError(word)
    return seconds


_seconds.__name__ = "number of seconds"  # what argparse calls it in "invalid ... value"
