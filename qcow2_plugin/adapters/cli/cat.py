"""`qcow2 cat`: one file out of a guest."""

from __future__ import annotations

import argparse
import sys

from qcow2_plugin.adapters.cli import guests, text
from qcow2_plugin.adapters.cli.signals import ended_by_signals

_DESCRIPTION = """\
Write a file of the guest to stdout, byte for byte, as the guest wrote it. libguestfs finds it, in a small virtual
machine that sees the disk read-only; symlinks are followed as in the guest. Nothing is written to the image.
"""
_EXAMPLES = """\
examples:
  qcow2 cat disk.qcow2 /etc/os-release
  qcow2 cat --snapshot=before-upgrade disk.qcow2 /etc/fstab | diff - fstab
  qcow2 cat --device=/dev/sda3 data.qcow2 /reports/2026.csv      a disk without a system
"""


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "cat",
        help="read a file out of the guest",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="the file system to look in, as 'qcow2 inspect' names it (default: the guest)",
    )
    parser.add_argument(
        "--limit", type=text.parse_size, default=64 << 20, metavar="SIZE", help="refuse longer files (default: 64M)"
    )
    guests.add_timeout(parser)
    text.add_opening(parser)
    text.add_image(parser)
    parser.add_argument("path", metavar="PATH", help="the file's absolute path in the guest")
    parser.set_defaults(start=_run, usage_error=parser.error)


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.adapters.guestfs.inspection import read_guest_file

    if not arguments.path.startswith("/"):
        arguments.usage_error("the path of a file in a guest begins with /")
    arguments.images = [arguments.image]
    opening = guests.opening(arguments)
    guests.tell_of_launch()
    with ended_by_signals():
        content = read_guest_file(
            arguments.image,
            arguments.path,
            device=arguments.device,
            limit=arguments.limit,
            timeout=arguments.timeout,
            **opening,
        )
    sys.stdout.buffer.write(content)
    return 0
