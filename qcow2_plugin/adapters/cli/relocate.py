"""`qcow2 relocate`: another name for the data file or the backing file of an image."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.cli import options, text
from qcow2_plugin.adapters.cli.progress import Progress
from qcow2_plugin.errors import printable

if TYPE_CHECKING:
    from qcow2_plugin.operations.relocate import Relocated

_DESCRIPTION = """\
Let IMAGE name another file as its external data file or its backing file, because it was moved, copied or restored
elsewhere. FILE is named as on any command line; recorded is its name as seen from the directory of IMAGE if it is below
that, else its absolute path. FILE must be there, fit, and be no other file of the same chain. Nothing else changes.
"""
_EXAMPLES = """\
examples:
  qcow2 relocate --data-file=/dev/vg1/guest guest.qcow2
  qcow2 relocate --backing-file=base.qcow2 --backing-format=qcow2 overlay.qcow2
  qcow2 relocate --verify --backing-file=/srv/copy/base.qcow2 overlay.qcow2
      only if it shows the same disk as the file that is named now
  qcow2 relocate --relative --backing-file=../bases/base.qcow2 overlay.qcow2
"""


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "relocate",
        help="record where the data file or backing file is now",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-file", metavar="FILE", help="the external data file to record")
    parser.add_argument("-b", "--backing-file", metavar="FILE", help="the backing file to record")
    parser.add_argument(
        "-F",
        "--backing-format",
        choices=("qcow2", "raw"),
        help="format of the backing file (default: the one that is recorded)",
    )
    add_form(parser)
    parser.add_argument("--missing", action="store_true", help="FILE need not be there yet; then it is not looked at")
    parser.add_argument(
        "--verify", action="store_true", help="compare with the old file, which has to be there; they must be equal"
    )
    parser.add_argument("-p", "--progress", action="store_true", help="show how far it is, on stderr")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing")
    text.add_policy(parser, "confined", "default: confined")
    text.add_image(parser)
    parser.set_defaults(start=_run, usage_error=parser.error)


def add_form(parser: argparse.ArgumentParser) -> None:
    """--absolute and --relative."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--absolute", dest="form", action="store_const", const="absolute", help="record the absolute path"
    )
    form.add_argument(
        "--relative", dest="form", action="store_const", const="relative", help="record it from the image's directory"
    )


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.operations.relocate import relocate
    from qcow2_plugin.storage.opener import Policy

    if arguments.data_file is None and arguments.backing_file is None:
        arguments.usage_error("say which file the image is to name: --data-file or --backing-file")
    progress = Progress("compared", asked=arguments.progress)
    try:
        relocated = relocate(
            arguments.image,
            data_file=arguments.data_file,
            backing_file=arguments.backing_file,
            backing_format=arguments.backing_format,
            form=arguments.form,
            missing=arguments.missing,
            verify=arguments.verify,
            policy=Policy(arguments.policy),
            progress=progress.tell,
        )
    finally:
        progress.clear()
    if not arguments.quiet:
        tell(relocated)
    return 0


def tell(relocated: Relocated) -> None:
    """The names that the image has now, and who looks for them elsewhere."""
    for role, name in (("data file", relocated.data_file), ("backing file", relocated.backing_file)):
        if name is not None:
            print(f"{role}: {printable(name)}")
            if role in relocated.needs_trust:
                text.warn_of_trust(role, name)
    options.warn_of_data_file(None if relocated.data_file is None else printable(relocated.data_file))
