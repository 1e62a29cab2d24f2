"""`qcow2 verify`: can what a repository of backups keeps be relied on?"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.cli import hook_options, progress, target_options, text
from qcow2_plugin.errors import OptionError, printable

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.verify import Verification

_FOUND = 3
_DESCRIPTION = """\
Look whether the points of the repository of backups at TARGET can be restored: all of them, or some. Level 0
looks at manifests, names and, in a directory, sizes and headers; level 1 reads all files and compares digests; level 2
rebuilds the disks, and compares the digests of what the guest sees.
"""
_EXAMPLES = """\
exit codes:
  0  nothing is wrong, as far as was looked
  1  it could not be looked at; one line on stderr says why
  2  wrong usage
  3  something is wrong, and told

examples:
  qcow2 verify /backups/guest
  qcow2 verify --level 1 /backups/guest
  qcow2 verify --level 2 /backups/guest --point latest
  qcow2 verify --against root=vm-root.qcow2 /backups/guest --point latest
      is the disk, rebuilt, what is in the image now?
"""


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "verify",
        help="look whether backups can be relied on",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="TARGET", help=f"where the backups are: {target_options.TARGETS}")
    parser.add_argument(
        "--point",
        dest="points",
        action="append",
        metavar="POINT",
        help='only this one, by its id, or "latest"; may be given several times',
    )
    parser.add_argument("--level", type=int, choices=(0, 1, 2), default=1, help="how deep to look (default: 1)")
    parser.add_argument(
        "--disk", dest="disks", action="append", metavar="NAME", help="only this disk; may be given several times"
    )
    parser.add_argument(
        "--against",
        action="append",
        type=target_options.pair,
        default=[],
        metavar="DISK=IMAGE",
        help="the disk must be equal to this image, or raw disk; may be given several times",
    )
    parser.add_argument("--scratch", metavar="DIR", help="where chains are fetched to (default: the usual place)")
    progress.add_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="tell only what is wrong")
    parser.add_argument("--output", choices=("human", "json"), default="human", help="json tells sizes in bytes")
    target_options.add_options(parser)
    hook_options.add_to(parser)
    parser.set_defaults(start=_run)


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.adapters.backup.verify import verify

    against = dict(arguments.against)
    if against and not arguments.points:
        raise OptionError("--against is about one point: name it with --point")
    with (
        progress.asked_for(arguments, "verify", "verified") as tell,
        target_options.opened_repository(arguments.target, arguments) as (repository, hooks),
    ):
        result = verify(
            repository,
            arguments.points,
            level=arguments.level,
            disks=arguments.disks,
            against=against,
            hooks=hooks,
            scratch=arguments.scratch,
            progress=tell,
        )
    if arguments.output == "json":
        print(json.dumps(asdict(result), indent=4))
    else:
        _show(result, quiet=arguments.quiet)
    return _FOUND if result.findings else 0


def _show(result: Verification, *, quiet: bool) -> None:
    for finding in result.findings:
        place = " ".join(printable(part) for part in (finding.point, finding.disk, finding.file) if part)
        print(f"{place}: {finding.text}")
    if quiet:
        return
    read = f", {text.short_size(result.read)} read" if result.read else ""
    print(f"{result.points} points with {result.members} disks looked at (level {result.level}{read}): ", end="")
    print(f"{len(result.findings)} problems" if result.findings else "no problem")
    if result.without_digest:
        text.warn(f"{result.without_digest} members have no digest to compare")
