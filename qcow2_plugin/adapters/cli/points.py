"""`qcow2 points`: what a repository of backups keeps."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

from qcow2_plugin.adapters.cli import hook_options, target_options, text
from qcow2_plugin.errors import printable

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.model import Manifest
    from qcow2_plugin.adapters.backup.repository import Repository

_DESCRIPTION = """\
List the points of the repository of backups at TARGET, the oldest first: when each was made, and what it keeps of which
disk. A point is restored, verified and served by its id. Exit code 1 too if a manifest cannot be read.
"""
_EXAMPLES = """\
examples:
  qcow2 points /backups/guest
  qcow2 points /backups/guest --output=json
  qcow2 points s3://backups/guest --target-option endpoint=http://127.0.0.1:8333
"""


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "points",
        help="list the points of a repository of backups",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="TARGET", help=f"where the backups are: {target_options.TARGETS}")
    parser.add_argument("--output", choices=("human", "json"), default="human", help="json tells all of each manifest")
    target_options.add_options(parser)
    hook_options.add_to(parser)
    parser.set_defaults(start=_run)


def _run(arguments: argparse.Namespace) -> int:
    with target_options.opened_repository(arguments.target, arguments) as (repository, _):
        points, damaged, leftovers = repository.points(), repository.damaged(), repository.leftovers()
    if arguments.output == "json":
        print(json.dumps(_as_json(repository, points, leftovers), indent=4))
    else:
        _show(points, leftovers)
    for error in damaged.values():
        text.warn(f"a point cannot be used: {error}")
    return 1 if damaged else 0


def _as_json(repository: Repository, points: list[Manifest], leftovers: list[str]) -> dict[str, Any]:
    from qcow2_plugin.adapters.backup.manifest import plain

    return {
        "repository": repository.id,
        "target": repository.target.uri,
        "points": [plain(point) for point in points],
        "damaged": {point: str(error) for point, error in repository.damaged().items()},
        "leftovers": leftovers,
    }


def _show(points: list[Manifest], leftovers: list[str]) -> None:
    rows = [
        (
            point.point if not index else "",
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(point.created)) if not index else "",
            member.disk,
            member.level.value,
            text.short_size(member.virtual_size),
            text.short_size(member.file_size),
            member.parent_point or "-",
        )
        for point in points
        for index, member in enumerate(point.members)
    ]
    if not rows:
        print("no point yet")
    else:
        titles = ("POINT", "MADE", "DISK", "LEVEL", "DISK SIZE", "STORED", "BUILDS ON")
        print(text.table(titles, rows, right=frozenset((4, 5))), end="")
    for point in points:
        if point.labels:
            told = ", ".join(f"{printable(name)}={printable(value)}" for name, value in sorted(point.labels.items()))
            print(f"{point.point}: {told}")
    if leftovers:
        text.warn(f"{len(leftovers)} files are of no point: of a backup that is being made, or never was")
