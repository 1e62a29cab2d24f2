"""`qcow2 resize`: another size for the disk in an image."""

from __future__ import annotations

import argparse
import re
from typing import NamedTuple

from qcow2_plugin.adapters.cli import text

_DESCRIPTION = """\
Change the size of the disk to SIZE, or by +SIZE or -SIZE: bytes, or a number with k, M, G, T, P or E. What is added
reads as zeros. What is cut off is lost, which takes --shrink; first make the file systems and partitions on it smaller.
"""
_EXAMPLES = """\
examples:
  qcow2 resize disk.qcow2 +10G
  qcow2 resize --preallocation=metadata disk.qcow2 1T
  qcow2 resize --shrink disk.qcow2 20G
"""


class _Size(NamedTuple):
    byte_count: int
    is_relative: bool


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "resize",
        help="change the size of a disk",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser._negative_number_matcher = re.compile(r"-\d")  # so that -10G is no unknown option
    parser.add_argument("-f", "--format", choices=("qcow2",), help="the only format that is resized")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing")
    parser.add_argument("--shrink", action="store_true", help="allow a smaller size")
    parser.add_argument(
        "--preallocation",
        choices=("off", "metadata", "falloc", "full"),
        default="off",
        help="of what is added: map the clusters, get space for them, fill it with zeros",
    )
    text.add_policy(parser, "confined", "default: confined")
    parser.add_argument("--data-file", metavar="FILE", help="the external data file, instead of the name in the image")
    text.add_below(parser)
    text.add_image(parser)
    parser.add_argument("size", metavar="[+|-]SIZE", type=_size, help="the new size, or the difference to it")
    parser.set_defaults(start=_run)


def _size(word: str) -> _Size:
    """Raises ValueError, as `text.parse_size` does."""
    if not word.startswith(("+", "-")):
        return _Size(text.parse_size(word), is_relative=False)
    byte_count = text.parse_size(word[1:])
    return _Size(-byte_count if word.startswith("-") else byte_count, is_relative=True)


_size.__name__ = "size"  # what argparse calls it in "invalid size value"


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.operations.resize import resize
    from qcow2_plugin.storage.opener import Policy

    resize(
        arguments.image,
        arguments.size.byte_count,
        is_relative=arguments.size.is_relative,
        allow_shrink=arguments.shrink,
        preallocation=arguments.preallocation,
        policy=Policy(arguments.policy),
        data_file=arguments.data_file,
        backing_file=arguments.backing_file,
        backing_format=arguments.backing_format,
        base_directory=arguments.base_directory,
    )
    if not arguments.quiet:
        print("Image resized.")
    return 0
