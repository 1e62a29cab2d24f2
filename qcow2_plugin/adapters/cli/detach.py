"""`qcow2 detach`: prove that the external data file is the disk by itself, and let the image go."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.cli import text
from qcow2_plugin.adapters.cli.progress import Progress
from qcow2_plugin.errors import printable

if TYPE_CHECKING:
    from qcow2_plugin.operations.detach import Detached

_DESCRIPTION = """\
Prove that the external data file of IMAGE is, by itself, a raw image of the disk; only then make it exactly as long as
the disk (a block device stays as long as it is) and remove IMAGE. Where it is not, say why, and keep IMAGE. If that is
interrupted, there is the image as it was, or the data file alone. Overlays of IMAGE are not looked for.
"""
_EXAMPLES = """\
examples:
  qcow2 detach -n disk.qcow2               only prove it
  qcow2 detach disk.qcow2
  qcow2 detach --lose-bitmaps disk.qcow2   although its dirty bitmaps are lost by that
  qcow2 relocate -b disk.raw -F raw overlay.qcow2
      an overlay of disk.qcow2 has what that was as its backing file again
"""


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "detach",
        help="let the raw disk of an image go its own way",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-n", "--dry-run", action="store_true", help="only prove it, and change nothing")
    parser.add_argument("--lose-bitmaps", action="store_true", help="also if dirty bitmaps of the image are lost")
    parser.add_argument("-p", "--progress", action="store_true", help="show how far it is, on stderr")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing")
    parser.add_argument("--output", choices=("human", "json"), default="human", help="json is for programs")
    text.add_policy(parser, "confined", "default: confined")
    parser.add_argument("--data-file", metavar="FILE", help="the external data file, instead of the name in the image")
    parser.add_argument(
        "--base-directory", metavar="DIR", help="where a relative name in the image starts (default: its directory)"
    )
    text.add_image(parser)
    parser.set_defaults(start=_run)


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.operations.detach import detach
    from qcow2_plugin.storage.opener import Policy

    progress = Progress("proved", asked=arguments.progress)
    try:
        detached = detach(
            arguments.image,
            dry_run=arguments.dry_run,
            lose_bitmaps=arguments.lose_bitmaps,
            policy=Policy(arguments.policy),
            data_file=arguments.data_file,
            base_directory=arguments.base_directory,
            progress=progress.tell,
        )
    finally:
        progress.clear()
    if arguments.output == "json":
        _print_json(arguments, detached)
    elif not arguments.quiet:
        _print(arguments, detached)
    return 0


def _print_json(arguments: argparse.Namespace, detached: Detached) -> None:
    told = {
        "image": arguments.image,
        "removed": not arguments.dry_run,
        "data-file": detached.data_file,
        "virtual-size": detached.virtual_size,
        "data-file-size": detached.found_size if detached.is_device or arguments.dry_run else detached.virtual_size,
        "lost-bitmaps": detached.lost_bitmaps,
    }
    print(json.dumps(told, indent=4))


def _print(arguments: argparse.Namespace, detached: Detached) -> None:
    name = printable(detached.data_file)
    if arguments.dry_run:
        print(f"'{name}' is a raw image of the disk of {text.size(detached.virtual_size)}; the image could go.")
    else:
        print(f"The disk of {text.size(detached.virtual_size)} is '{name}', format raw; the image is removed.")
    if detached.is_device and detached.found_size > detached.virtual_size:
        behind = detached.found_size - detached.virtual_size
        text.warn(f"the block device is {behind} bytes longer than the disk, and whoever uses it sees them, too")
    elif detached.found_size != detached.virtual_size and arguments.dry_run:
        text.warn(f"the file has {detached.found_size} bytes, and would be made as long as the disk")
