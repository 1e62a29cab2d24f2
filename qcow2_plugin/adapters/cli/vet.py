"""`qcow2 vet`: may an image from a stranger be opened?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.cli import text
from qcow2_plugin.errors import printable

if TYPE_CHECKING:
    from qcow2_plugin.operations.vet import Verdict

_REFUSED = 3
_DESCRIPTION = """\
Judge an image that somebody else made, before anything in it is believed: what it is, which other files it wants, and
whether the policy would let it have them. One file is opened, read-only. Exit code 0: nothing speaks against opening
the image under the policy; 3: something does; 1: the file could not be looked at.
"""
_EXAMPLES = """\
examples:
  qcow2 vet upload.qcow2
  qcow2 vet --policy=inspect --output=json upload.qcow2    for images that must stand alone
"""


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "vet",
        help="may an image from a stranger be opened?",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text.add_output(parser)
    text.add_policy(parser, "confined", "default: confined")
    text.add_force_share(parser)
    text.add_image(parser)
    parser.set_defaults(start=_run)


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.operations.vet import vet
    from qcow2_plugin.storage.opener import Policy

    verdict = vet(arguments.image, policy=Policy(arguments.policy), force_share=arguments.force_share)
    if arguments.output == "json":
        _print_json(verdict)
    else:
        print(_for_people(arguments.image, verdict), end="")
    return 0 if verdict.accepted else _REFUSED


def _print_json(verdict: Verdict) -> None:
    import json
    from dataclasses import asdict

    print(json.dumps({key.replace("_", "-"): value for key, value in asdict(verdict).items()}, indent=4))


def _for_people(path: str, verdict: Verdict) -> str:
    lines = [("image", printable(path)), ("policy", verdict.policy)]
    if verdict.virtual_size is not None:
        lines.append(("virtual size", text.size(verdict.virtual_size)))
    if verdict.data_file is not None:
        lines.append(("data file", printable(verdict.data_file)))
    if verdict.backing_file is not None:
        lines.append(("backing file", printable(verdict.backing_file)))
    lines.append(("verdict", "accepted" if verdict.accepted else "refused"))
    lines += [("", reason) for reason in verdict.reasons]
    return text.fields(lines)
