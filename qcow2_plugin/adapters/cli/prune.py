"""`qcow2 prune`: which points of a repository of backups stay."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.cli import hook_options, progress, target_options, text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qcow2_plugin.adapters.backup.retention import Fate

_DESCRIPTION = """\
Keep the points of the repository of backups at TARGET that the rules name, and remove the others. A point is kept if
one rule keeps it; rules count the points of the same disks, and all of them keep the newest. A point that stays
and is built on one that goes is merged with it first: compressed clusters are not opened for that, and blocks are
shared where the file system can. Nothing that is needed is ever removed, whenever this is interrupted.
"""
_EXAMPLES = """\
examples:
  qcow2 prune /backups/guest --keep-last 7 --dry-run
  qcow2 prune /backups/guest --keep-last 7 --keep-weekly 4 --keep-monthly 12
  qcow2 prune /backups/guest --keep-daily 30 --no-merge
      points that others are built on stay, too
"""


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "prune",
        help="remove old points of a repository of backups",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="TARGET", help=f"where the backups are: {target_options.TARGETS}")
    for name, kept in (
        ("last", "the newest N points"),
        ("daily", "the newest point of each of the newest N days that have one"),
        ("weekly", "the same by weeks"),
        ("monthly", "the same by months"),
        ("yearly", "the same by years"),
    ):
        parser.add_argument(f"--keep-{name}", type=int, default=0, metavar="N", help=kept)
    parser.add_argument("--no-merge", action="store_true", help="keep what others are built on, instead of merging it")
    parser.add_argument("-n", "--dry-run", action="store_true", help="tell what would be done, and do nothing")
    parser.add_argument("--scratch", metavar="DIR", help="where chains are fetched to (default: the usual place)")
    progress.add_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing")
    parser.add_argument("--output", choices=("human", "json"), default="human", help="json is a list of all points")
    target_options.add_options(parser)
    hook_options.add_to(parser)
    parser.set_defaults(start=_run)


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.adapters.backup.retention import Rules, plan, prune

    rules = Rules(
        last=arguments.keep_last,
        daily=arguments.keep_daily,
        weekly=arguments.keep_weekly,
        monthly=arguments.keep_monthly,
        yearly=arguments.keep_yearly,
    )
    rules.check()
    with (
        progress.asked_for(arguments, "prune", "merged") as tell,
        target_options.opened_repository(arguments.target, arguments) as (repository, _),
    ):
        fates = plan(repository, rules, may_merge=not arguments.no_merge)
        if not arguments.dry_run:
            prune(repository, fates, scratch=arguments.scratch, progress=tell)
    if arguments.output == "json":
        print(json.dumps([asdict(fate) | {"is_kept": fate.is_kept} for fate in fates], indent=4))
    elif not arguments.quiet:
        _show(fates, is_dry_run=arguments.dry_run)
    return 0


def _show(fates: Sequence[Fate], *, is_dry_run: bool) -> None:
    rows = [
        (
            fate.point,
            ("keep" if fate.is_kept else "remove") if is_dry_run else ("kept" if fate.is_kept else "removed"),
            ", ".join(fate.reasons) or "-",
            ", ".join(f"{disk} on {base or 'nothing'}" for disk, base in fate.bases.items()) or "-",
        )
        for fate in fates
    ]
    print(text.table(("POINT", "FATE", "WHY", "MERGED TO STAND"), rows), end="")
