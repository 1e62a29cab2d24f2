"""`qcow2 map`: where every byte of a disk comes from, for people and, exactly as qemu-img prints it, for programs.

Both are streams: entries are printed as they are found, some at a time, and none is kept.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.cli import text
from qcow2_plugin.errors import printable

if TYPE_CHECKING:
    from qcow2_plugin.engine.image import Image
    from qcow2_plugin.operations.map import MapEntry

_DESCRIPTION = """\
Show which ranges of the disk hold data, in which file of the backing chain and where in it. Only metadata is read.
"""
_EXAMPLES = """\
examples:
  qcow2 map disk.qcow2
  qcow2 map --output=json --start-offset=1G --max-length=64M disk.qcow2
  qcow2 map --snapshot=before-upgrade disk.qcow2
  qcow2 map --backing-file=/srv/base.qcow2 overlay.qcow2
"""
_LINES_AT_ONCE = 512
_WORDS = {False: "false", True: "true"}
_KINDS = ("data", "data, never written", "compressed", "zeros")


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "map",
        help="where every byte of the disk comes from",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text.add_output(parser)
    parser.add_argument(
        "-s", "--start-offset", type=text.parse_size, default=0, metavar="SIZE", help="begin here (64k, 1G, ...)"
    )
    parser.add_argument("-l", "--max-length", type=text.parse_size, metavar="SIZE", help="stop after so many bytes")
    text.add_opening(parser)
    text.add_image(parser)
    parser.set_defaults(start=_run)


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.engine.chain import open_image
    from qcow2_plugin.operations.map import map_image

    with open_image(arguments.image, **text.opening(arguments)) as image:
        entries = map_image(image, arguments.start_offset, arguments.max_length)
        _print(_json(entries) if arguments.output == "json" else _for_people(image, entries))
    return 0


def _print(parts: Iterator[str]) -> None:
    while lines := list(itertools.islice(parts, _LINES_AT_ONCE)):
        sys.stdout.write("".join(lines))


def _json(entries: Iterable[MapEntry]) -> Iterator[str]:
    before = "["
    for start, length, depth, present, zero, data, offset in entries:
        place = "}" if offset is None else f', "offset": {offset}}}'
        yield (
            f'{before}{{ "start": {start}, "length": {length}, "depth": {depth}, "present": {_WORDS[present]}, '
            f'"zero": {_WORDS[zero]}, "data": {_WORDS[data]}{place}'
        )
        before = ",\n"
    yield "]\n"


def _for_people(image: Image, entries: Iterable[MapEntry]) -> Iterator[str]:
    from qcow2_plugin.operations.map import layer_files

    files = [printable(path) for path in layer_files(image)]
    width = max(len(hex(image.virtual_size)), len("LENGTH"))
    totals = dict.fromkeys(_KINDS, 0)
    mapped = covered = 0
    yield text.heading(f"{'START':<{width}}  {'LENGTH':<{width}}  {'KIND':<19}  {'STORED AT':<14}  FILE") + "\n"
    for entry in entries:
        covered += entry.length
        if not entry.present:
            continue
        kind = _kind(entry)
        totals[kind] += entry.length
        mapped += entry.length
        place = "-" if entry.offset is None else hex(entry.offset)
        yield f"{entry.start:<#{width}x}  {entry.length:<#{width}x}  {kind:<19}  {place:<14}  {files[entry.depth]}\n"
    told = [f"{text.short_size(length)} {kind}" for kind, length in totals.items() if length]
    told.append(f"{text.short_size(covered - mapped)} unallocated (zeros)")
    yield f"{text.short_size(covered)} in all: {', '.join(told)}\n"


def _kind(entry: MapEntry) -> str:
    if not entry.data:
        return "zeros"
    if entry.zero:
        return "data, never written"
    return "compressed" if entry.offset is None else "data"
