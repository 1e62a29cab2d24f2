"""`qcow2 adopt`: a qcow2 image around a raw disk that is there already, of which not one byte changes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.cli import options, text
from qcow2_plugin.adapters.cli.options import Option
from qcow2_plugin.errors import printable

if TYPE_CHECKING:
    from qcow2_plugin.operations.adopt import Adopted

_DESCRIPTION = """\
Make a qcow2 image around VOLUME: a raw file, a block device, an LVM volume. The image keeps the books, for dirty
bitmaps and the like; the volume is its external data file, and stays at all times a raw image of the disk. It is opened
for reading only: not one byte of it changes. IMAGE must not exist; a failure leaves no image.
"""
_EXAMPLES = """\
examples:
  qcow2 adopt disk.raw disk.qcow2
  qcow2 adopt --bitmap=daily /dev/vg0/guest guest.qcow2
      from now on, what is written through guest.qcow2 is marked for the next incremental backup
  qcow2 adopt -o extended_l2=on,cluster_size=128k disk.raw disk.qcow2
  qcow2 detach disk.qcow2
      the way back: the raw disk alone
"""
_OPTIONS = {
    option.name: option
    for option in (
        Option("cluster_size", text.parse_size, "SIZE", "unit of the mapping, 512 to 2M, 64k by default"),
        Option("refcount_bits", int, "BITS", "width of refcounts, 1 to 64, 16 by default"),
        Option("lazy_refcounts", options.switch, "on|off", "let QEMU put off the update of refcounts"),
        Option("extended_l2", options.switch, "on|off", "map by 32nds of a cluster; for clusters of 16k or more"),
    )
}


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "adopt",
        help="make an image around a raw disk that stays as it is",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("-q", "--quiet", action="store_true", default=False, help="say nothing")
    options.add_to(parser, _OPTIONS)
    parser.add_argument("--bitmap", metavar="NAME", help="a first dirty bitmap, which follows the disk from now on")
    parser.add_argument(
        "--bitmap-granularity", type=text.parse_size, metavar="SIZE", help="bytes that one of its bits stands for"
    )
    parser.add_argument(
        "--size",
        dest="virtual_size",
        type=text.parse_size,
        metavar="SIZE",
        help="size of the disk (default: all of the volume, rounded up to whole 512 bytes)",
    )
    parser.add_argument(
        "--clip", action="store_true", help="with --size: what of the volume is behind that need not be seen"
    )
    parser.add_argument(
        "--raw",
        dest="is_raw",
        action="store_true",
        help="insist that it is a raw disk although it begins as a qcow2 image does",
    )
    parser.add_argument("volume", metavar="VOLUME", help="a raw file or block device")
    parser.add_argument("image", metavar="IMAGE", help="the image to make")
    parser.set_defaults(start=_run)


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.operations.adopt import adopt

    named = (*_OPTIONS, "bitmap", "bitmap_granularity", "virtual_size", "clip", "is_raw")
    told = {name: value for name, value in vars(arguments).items() if name in named}
    adopted = adopt(arguments.volume, arguments.image, **told)
    if not arguments.quiet:
        print(f"Adopted '{printable(arguments.volume)}': a disk of {text.size(adopted.virtual_size)}")
        _tell(adopted)
    return 0


def _tell(adopted: Adopted) -> None:
    if adopted.virtual_size > adopted.volume_size:
        text.warn(f"the volume has {adopted.volume_size} bytes; the disk is rounded up to whole sectors, with zeros")
    elif adopted.virtual_size < adopted.volume_size:
        text.warn(f"the last {adopted.volume_size - adopted.virtual_size} bytes of the volume are not part of the disk")
    if adopted.needs_trust:
        text.warn_of_trust("data file", adopted.recorded_name)
    options.warn_of_data_file(printable(adopted.recorded_name))
