"""`qcow2 create`: a new image, told by the flags and -o options of qemu-img, or by long options of the same names."""

from __future__ import annotations

import argparse
from typing import Any

from qcow2_plugin.adapters.cli import options, text
from qcow2_plugin.adapters.cli.options import Option
from qcow2_plugin.errors import printable

_USAGE = "qcow2 create [-q] [-b FILE -F FORMAT [-u]] [-o OPTION=VALUE,...] [option ...] FILE [SIZE]"
_DESCRIPTION = """\
Make a new, empty image of SIZE: bytes, or a number with k, M, G, T, P or E. What qemu-img takes after -o can be given
after -o here, too, or as an option of its own: --cluster-size=4k is -o cluster_size=4k.

An image file that exists is overwritten, unless somebody uses it. An external data file that exists is not: use it as
it is with --keep-data-file, or lose what is in it with --overwrite-data-file. A failure leaves no image.
"""
_EXAMPLES = """\
examples:
  qcow2 create disk.qcow2 20G
  qcow2 create -b base.qcow2 -F qcow2 overlay.qcow2
  qcow2 create -o preallocation=metadata,cluster_size=2M disk.qcow2 1T
  qcow2 create --data-file=disk.raw --data-file-raw --keep-data-file disk.qcow2
      the raw image disk.raw gets a qcow2 image, for dirty bitmaps and the like, and stays a raw image of the disk
  qcow2 create -o help
      all options that can be given after -o
"""


_OPTIONS = {
    option.name: option
    for option in (
        Option("size", text.parse_size, "SIZE", "size of the disk, rounded up to whole 512 bytes"),
        Option("compat", options.compat, "1.1|0.10", "format version, 1.1 (also v3) or, for old programs, 0.10 (v2)"),
        Option("cluster_size", text.parse_size, "SIZE", "unit of allocation, 512 to 2M, 64k by default"),
        Option("refcount_bits", int, "BITS", "width of refcounts, 1 to 64, 16 by default"),
        Option("lazy_refcounts", options.switch, "on|off", "let QEMU put off the update of refcounts"),
        Option("extended_l2", options.switch, "on|off", "allocate by 32nds of a cluster; for clusters of 16k or more"),
        Option("compression_type", str, "zlib|zstd", "how clusters are compressed, if they are"),
        Option("preallocation", str, "MODE", "off; metadata maps clusters, falloc gets space for them, full fills it"),
        Option("backing_file", str, "FILE", "shows wherever nothing was written; as -b"),
        Option("backing_fmt", str, "qcow2|raw", "format of the backing file; as -F"),
        Option("data_file", str, "FILE", "where the data go, instead of into the image"),
        Option("data_file_raw", options.switch, "on|off", "the data file is at all times a raw image of the disk"),
        Option("keep_data_file", options.switch, "on|off", "use a data file that exists with what is in it"),
        Option("overwrite_data_file", options.switch, "on|off", "use a data file that exists and lose what is in it"),
        Option("clip_data_file", options.switch, "on|off", "keep a data file that is longer than the disk, too"),
    )
}  # fmt: skip
_FLAGS_OF_THEIR_OWN = frozenset({"size", "backing_file", "backing_fmt"})
_TOLD = (
    *("cluster_size", "extended_l2", "preallocation", "compression_type", "size", "compat", "backing_file"),
    *("backing_fmt", "data_file", "data_file_raw", "lazy_refcounts", "refcount_bits"),
)
"""In the order of qemu-img."""
_TOLD_ALWAYS = {
    "cluster_size": 65536,
    "extended_l2": False,
    "compression_type": "zlib",
    "lazy_refcounts": False,
    "refcount_bits": 16,
}


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "create",
        help="make a new image",
        usage=_USAGE,
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("-f", "--format", choices=("qcow2",), help="the only format that is made")
    parser.add_argument("-q", "--quiet", action="store_true", default=False, help="do not say what is made")
    parser.add_argument("-b", "--backing-file", metavar="FILE", help=_OPTIONS["backing_file"].help.partition(";")[0])
    parser.add_argument(
        "-F", "--backing-format", dest="backing_fmt", metavar="FORMAT", help="format of the backing file: qcow2 or raw"
    )
    parser.add_argument(
        "-u", "--unsafe", action="store_true", default=False, help="do not look at the backing file; SIZE is needed"
    )
    options.add_to(parser, _OPTIONS)
    for option in _OPTIONS.values():
        if option.name not in _FLAGS_OF_THEIR_OWN:
            _add_long_option(parser, option)
    text.add_policy(parser, "confined", "about what is below the backing file; default: confined")
    parser.add_argument("image", metavar="FILE", help="the image to make")
    parser.add_argument(
        "disk_size",
        metavar="SIZE",
        nargs="?",
        type=text.parse_size,
        default=None,
        help="default: that of the backing file, or of the data file that is kept",
    )
    parser.set_defaults(start=_run, usage_error=parser.error)


def _add_long_option(parser: argparse.ArgumentParser, option: Option) -> None:
    flag = "--" + option.name.replace("_", "-")
    if option.parse is options.switch:
        parser.add_argument(flag, action="store_true", help=option.help)
    else:
        parser.add_argument(flag, type=option.parse, metavar=option.values, help=option.help)


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.operations.create import create_image
    from qcow2_plugin.storage.opener import Policy

    asked = {name: value for name, value in vars(arguments).items() if name in _OPTIONS}
    if "size" in asked and arguments.disk_size is not None:
        arguments.usage_error("the size is given twice: as SIZE and by -o")
    told = dict(asked)
    size = told.pop("size", arguments.disk_size)
    if "compat" in told:
        told["version"] = options.COMPATS[told.pop("compat")]
    if "backing_fmt" in told:
        told["backing_format"] = told.pop("backing_fmt")
    create_image(
        arguments.image, size, check_backing_file=not arguments.unsafe, policy=Policy(arguments.policy), **told
    )
    if not arguments.quiet:
        _tell(arguments.image, asked)
    return 0


def _tell(image: str, asked: dict[str, Any]) -> None:
    from qcow2_plugin.operations.info import info

    made = info(image, force_share=True)  # by now somebody may use it
    print(_formatted(image, {**asked, "size": made.virtual_size}))
    if made.qcow2 is not None:
        options.warn_of_data_file(made.qcow2.data_file)


def _formatted(image: str, asked: dict[str, Any]) -> str:
    """The line that qemu-img prints."""
    told = {**_TOLD_ALWAYS, **asked}
    words = [f"{name}={printable(options.as_told(told[name]))}" for name in _TOLD if name in told]
    return f"Formatting '{printable(image)}', fmt=qcow2 {' '.join(words)}"
