"""`qcow2 digest`: do an image, a raw file and a device hold the same disk?"""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from qcow2_plugin.adapters.cli import text
from qcow2_plugin.errors import OptionError, printable

if TYPE_CHECKING:
    from qcow2_plugin.adapters.cli.progress import Progress
    from qcow2_plugin.operations.content_digest import Digest

_DESCRIPTION = """\
Show a digest of what a guest would read. It is the same for a qcow2 image, a raw file and a block device that hold the
same disk, whatever their clusters, compression and backing files, and differs when a single byte or the size does. What
is known to be zeros is not read.

The digest is a tree of BLAKE3 hashes over blocks of 64 KiB. It is none of the bytes of any file, so no other program
makes the same one.
"""
_EXAMPLES = """\
examples:
  qcow2 digest disk.qcow2
  qcow2 digest --snapshot=before-upgrade disk.qcow2
  qcow2 digest -f raw restored.raw
  qcow2 digest -f raw --size=20G /dev/vg/restored      of a device that is larger than the disk on it
"""


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "digest",
        help="a digest of the disk, whatever it is kept in",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-f", "--format", choices=("qcow2", "raw"), default="qcow2", help="what the file is (default: qcow2)"
    )
    parser.add_argument("--size", type=text.parse_size, metavar="SIZE", help="of the first so many bytes only")
    parser.add_argument("-p", "--progress", action="store_true", help="tell how far it is")
    parser.add_argument("--output", choices=("human", "json"), default="human", help="json tells the size, too")
    text.add_opening(parser)
    parser.add_argument("image", metavar="FILE", help="a file or block device")
    parser.set_defaults(start=_run)


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.adapters.cli.progress import Progress
    from qcow2_plugin.adapters.cli.signals import ended_by_signals
    from qcow2_plugin.operations.content_digest import ALGORITHM

    progress = Progress("read", asked=arguments.progress)
    try:
        with ended_by_signals():
            digest = _digest(arguments, progress)
    finally:
        progress.clear()
    if arguments.output == "json":
        told = {
            "filename": arguments.image,
            "virtual-size": digest.leaves.virtual_size,
            "algorithm": ALGORITHM,
            "digest": digest.root,
        }
        print(json.dumps(told, indent=4))
    else:
        print(f"{digest.root}  {printable(os.fspath(arguments.image))}")
    return 0


def _digest(arguments: argparse.Namespace, progress: Progress) -> Digest:
    from qcow2_plugin.engine.chain import open_image
    from qcow2_plugin.operations.content_digest import content_digest, opened_raw

    how: dict[str, Any] = {"virtual_size": arguments.size, "progress": progress.tell}
    if arguments.format == "raw":
        if arguments.snapshot is not None:
            raise OptionError("a raw disk has no snapshots; leave it out")
        with opened_raw(arguments.image) as disk:
            return content_digest(disk, **how)
    with open_image(arguments.image, **text.opening(arguments)) as image:
        return content_digest(image, **how)
