"""`qcow2 extents`: what of a disk has changed, and what it stores there, for programs that make backups.

A stream, as `qcow2 map` is: ranges are printed as they are found, some at a time, and none is kept.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.cli import text
from qcow2_plugin.errors import OptionError

if TYPE_CHECKING:
    from qcow2_plugin.operations.changes import Change

_DESCRIPTION = """\
Show what of the disk has to be backed up. With bitmaps: what any of them marks as changed, and what is there now. With
none: the whole disk. Only metadata is read.

A range is one of
  clean  not marked by any of the bitmaps; what is there was not looked up
  data   changed, and bytes are stored
  zero   changed, and reads as zeros, because the image says so
  hole   changed, and reads as zeros, because nothing is stored
A backup must keep changed zeros and holes as zeros: what it had there before is no longer so.
"""
_EXAMPLES = """\
examples:
  qcow2 extents disk.qcow2                                   what a full backup holds
  qcow2 extents --bitmap=daily disk.qcow2                    what an increment holds
  qcow2 extents --bitmap=mon --bitmap=tue disk.qcow2         ... since the first of several bitmaps began
  qcow2 extents --bitmap=daily --dirty --output=json disk.qcow2
  qcow2 extents --bitmap=daily --offset=1G --length=64M disk.qcow2
"""
_LINES_AT_ONCE = 512


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "extents",
        help="what has changed since a dirty bitmap began, for backups",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-B",
        "--bitmap",
        action="append",
        dest="bitmaps",
        metavar="NAME",
        help="a dirty bitmap of the image; several are taken together",
    )
    parser.add_argument("--offset", type=text.parse_size, default=0, metavar="SIZE", help="begin here (64k, 1G, ...)")
    parser.add_argument("--length", type=text.parse_size, metavar="SIZE", help="stop after so many bytes")
    parser.add_argument("--dirty", action="store_true", help="leave out what is clean")
    parser.add_argument(
        "--output",
        choices=("human", "json"),
        default="human",
        help='json is a list of {"start", "length", "kind"} in bytes, ascending, and, but for --dirty, without gaps',
    )
    text.add_opening(parser)
    text.add_image(parser)
    parser.set_defaults(start=_run)


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.engine.chain import open_image
    from qcow2_plugin.operations.changes import changes

    if arguments.bitmaps and arguments.snapshot is not None:
        raise OptionError("bitmaps tell of the active disk, not of a snapshot; take one of them")
    with open_image(arguments.image, **text.opening(arguments)) as image:
        size = image.virtual_size
        start = min(arguments.offset, size)
        length = size - start if arguments.length is None else min(arguments.length, size - start)
        found = changes(image, arguments.bitmaps, offset=start, length=length, with_clean=not arguments.dirty)
        _print(_json(found) if arguments.output == "json" else _for_people(found, size))
    return 0


def _print(parts: Iterator[str]) -> None:
    while lines := list(itertools.islice(parts, _LINES_AT_ONCE)):
        sys.stdout.write("".join(lines))


def _json(found: Iterable[Change]) -> Iterator[str]:
    before = "["
    for start, length, kind in found:
        yield f'{before}{{ "start": {start}, "length": {length}, "kind": "{kind.value}" }}'
        before = ",\n"
    yield "]\n" if before != "[" else "[]\n"


def _for_people(found: Iterable[Change], size: int) -> Iterator[str]:
    width = max(len(hex(size)), len("LENGTH"))
    totals: dict[str, int] = {}
    yield text.heading(f"{'START':<{width}}  {'LENGTH':<{width}}  KIND") + "\n"
    for start, length, kind in found:
        totals[kind.value] = totals.get(kind.value, 0) + length
        yield f"{start:<#{width}x}  {length:<#{width}x}  {kind.value}\n"
    told = (f"{text.short_size(totals[kind])} {kind}" for kind in ("data", "zero", "hole", "clean") if kind in totals)
    yield f"in all: {', '.join(told) or 'nothing'}\n"
