"""`qcow2 amend`: another version, other features, other names for an image, told by the -o options of qemu-img."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from qcow2_plugin.adapters.cli import options, text
from qcow2_plugin.adapters.cli.options import Option
from qcow2_plugin.errors import printable

_DESCRIPTION = """\
Change what kind of image an image is; what is on the disk stays, but for what a smaller size cuts off. What cannot be
is refused before anything changes. Interrupted, it leaves a sound image, and can be run again.
"""
_EXAMPLES = """\
examples:
  qcow2 amend -o compat=1.1,refcount_bits=64 disk.qcow2
  qcow2 amend -o compat=0.10 disk.qcow2         for programs that know only the old version
  qcow2 amend -o data_file=new.raw disk.qcow2   record another name; the data file stays where it is
  qcow2 amend -o help
      all options that can be given after -o
"""
_OPTIONS = {
    option.name: option
    for option in (
        Option("compat", options.compat, "1.1|0.10", "format version, 1.1 (also v3) or, for old programs, 0.10 (v2)"),
        Option("lazy_refcounts", options.switch, "on|off", "let QEMU put off the update of refcounts"),
        Option("refcount_bits", int, "BITS", "width of refcounts, 1 to 64"),
        Option("size", text.parse_size, "SIZE", "size of the disk; a smaller one takes --shrink"),
        Option("data_file", str, "FILE", "name of the external data file to record; nothing for none"),
        Option("data_file_raw", options.switch, "on|off", "the data file is at all times a raw image of the disk"),
    )
}
_FIXED = {
    option.name: option
    for option in (
        Option("backing_file", str, "FILE", "cannot be changed"),
        Option("backing_fmt", str, "FORMAT", "cannot be changed"),
        Option("cluster_size", text.parse_size, "SIZE", "cannot be changed"),
        Option("compression_type", str, "zlib|zstd", "cannot be changed"),
        Option("extended_l2", options.switch, "on|off", "cannot be changed"),
        Option("preallocation", str, "MODE", "cannot be changed"),
    )
}
"""Taken where they say what the image is already."""


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "amend",
        help="change the version or the features of an image",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("-f", "--format", choices=("qcow2",), help="the only format that is amended")
    parser.add_argument("-q", "--quiet", action="store_true", default=False, help="no progress and no notes")
    parser.add_argument("-p", "--progress", action="store_true", default=False, help="tell how far it is")
    parser.add_argument("--shrink", action="store_true", default=False, help="allow a smaller size")
    options.add_to(parser, _OPTIONS, unlisted=_FIXED, required=True)
    text.add_policy(parser, "confined", "default: confined")
    parser.add_argument(
        "--data-file",
        dest="current_data_file",
        default=None,
        metavar="FILE",
        help="where the external data file is, instead of the name in the image",
    )
    parser.add_argument(
        "--base-directory",
        default=None,
        metavar="DIR",
        help="where relative names in images start (default: the image's directory)",
    )
    text.add_image(parser)
    parser.set_defaults(start=_run)


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.operations.amend import amend
    from qcow2_plugin.storage.opener import Policy

    told = vars(arguments)
    _require_as_is(arguments.image, {name: told[name] for name in _FIXED if name in told})
    with_progress = arguments.progress and not arguments.quiet
    amend(
        arguments.image,
        **{name: told[name] for name in _OPTIONS if name in told},
        allow_shrink=arguments.shrink,
        current_data_file=arguments.current_data_file,
        policy=Policy(arguments.policy),
        base_directory=arguments.base_directory,
        progress=_tell if with_progress else None,
    )
    if with_progress:
        _tell(1, 1)
        print()
    if not arguments.quiet:
        options.warn_of_data_file(told.get("data_file"))
    return 0


def _require_as_is(image: str, told: dict[str, Any]) -> None:
    """Raises OptionError if one of these options is not what the image is."""
    if not told:
        return
    from qcow2_plugin.errors import OptionError
    from qcow2_plugin.operations.info import info

    known = info(image).qcow2
    if known is None:
        return  # opening it will say what is wrong
    is_now = {
        "backing_file": known.backing_file,
        "backing_fmt": known.backing_format,
        "cluster_size": known.cluster_size,
        "compression_type": known.compression,
        "extended_l2": known.extended_l2,
    }
    for name, value in told.items():
        if name not in is_now or is_now[name] != value:
            hint = "use `qemu-img rebase`" if name.startswith("backing") else "make a new image that has it"
            told_value = printable(options.as_told(value))
            raise OptionError(f"{name} of an image cannot be changed to {told_value}; {hint}", file=image)


def _tell(done: int, total: int) -> None:
    """As qemu-img does."""
    print(f"    ({100 * done / max(total, 1):.2f}/100%)", end="\r")
    sys.stdout.flush()
