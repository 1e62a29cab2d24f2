"""`qcow2 attach`: an external data file for an image that names none, or whose file has gone."""

from __future__ import annotations

import argparse

from qcow2_plugin.adapters.cli import text
from qcow2_plugin.adapters.cli.progress import Progress
from qcow2_plugin.adapters.cli.relocate import add_form, tell

_DESCRIPTION = """\
Let IMAGE name FILE as its external data file, where it names none or what it names has gone. FILE must be long enough
and, if it is to be a raw image of the disk, hold zeros where IMAGE says so. Neither of the two changes otherwise.
"""
_EXAMPLES = """\
examples:
  qcow2 attach disk.qcow2 restored.raw
  qcow2 attach --absolute disk.qcow2 restored.raw
"""


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "attach",
        help="record the data file of an image that has lost it",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_form(parser)
    parser.add_argument("-p", "--progress", action="store_true", help="show how far it is, on stderr")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing")
    text.add_policy(parser, "confined", "default: confined")
    text.add_image(parser)
    parser.add_argument("file", metavar="FILE", help="the external data file")
    parser.set_defaults(start=_run)


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.operations.relocate import attach
    from qcow2_plugin.storage.opener import Policy

    progress = Progress("compared", asked=arguments.progress)
    try:
        attached = attach(
            arguments.image,
            arguments.file,
            form=arguments.form,
            policy=Policy(arguments.policy),
            progress=progress.tell,
        )
    finally:
        progress.clear()
    if not arguments.quiet:
        tell(attached)
    return 0
