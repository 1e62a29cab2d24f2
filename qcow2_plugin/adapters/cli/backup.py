"""`qcow2 backup`: a point in a repository of backups, of all disks named, as of one moment."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qcow2_plugin.adapters.cli import hook_options, target_options, text
from qcow2_plugin.errors import LooseEndError, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qcow2_plugin.adapters.backup.model import DiskPlan, DiskRequest, Level, Manifest, ProgressEvent
    from qcow2_plugin.adapters.backup.planning import Settings

_LOOSE_END = 3
_DESCRIPTION = """\
Make a point in the repository of backups at TARGET: all disks that are named, as of one moment. The first member of a
disk is full, those after it hold what has changed since (dirty bitmaps in the images tell), and what has to be full
again says why. In a directory, members are ordinary qcow2 files: any tool can read them, each with those below it.

The images must not be in use. Nothing is ever half done: after an error, a crash or a kill the next backup, or
--recover, brings the interrupted one to its end or takes it back. TARGET is a directory, s3://BUCKET/PREFIX,
borg:REPOSITORY, restic:REPOSITORY, or what a plugin knows.
"""
_EXAMPLES = """\
exit codes:
  0  the point is made (with --dry-run: it could be)
  1  there is no such point; one line on stderr says why
  2  wrong usage
  3  the point is made and durable, but an image still has to lose a bitmap: the next backup sees to that
  130, 129, 143  interrupted, or told to end: there is no such point

examples:
  qcow2 backup disk.qcow2 --to /backups/guest
  qcow2 backup root=vm-root.qcow2 data=vm-data.qcow2 --to /backups/guest --progress bar
  qcow2 backup disk.qcow2 --to /backups/guest --dry-run
      which level, and how many bytes; nothing is changed
  qcow2 backup disk.qcow2 --to /backups/guest --full --compress --verify
  qcow2 backup disk.qcow2 --to s3://backups/guest --target-option endpoint=http://127.0.0.1:8333
  qcow2 backup disk.qcow2 --to /backups/guest --bitmap since-sunday
      go on from a bitmap that QEMU has kept since the last point
"""


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "backup",
        help="back up disks, fully or what has changed",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="[DISK=]IMAGE",
        help="a qcow2 file or block device, and what the disk is called in the repository (default: as the file)",
    )
    parser.add_argument("--to", required=True, metavar="TARGET", help=f"where to keep it: {target_options.TARGETS}")
    target_options.add_options(parser)
    _add_levels(parser)
    _add_checks(parser)
    parser.add_argument(
        "-c", "--compress", action="store_true", help="compress clusters, where that makes them smaller"
    )
    parser.add_argument(
        "--compression-type", choices=("zlib", "zstd"), help="with --compress; zlib is known to all (default: zlib)"
    )
    parser.add_argument(
        "--label", dest="labels", action="append", type=target_options.pair, default=[], metavar="NAME=VALUE",
        help="a note to keep with the point; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--journal", metavar="FILE", help="what tells of the job while it runs (default: beside the first image)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-n", "--dry-run", action="store_true", help="tell what would be done, and do nothing")
    what.add_argument(
        "--recover",
        action="store_true",
        help="only finish an interrupted backup, or take it back, as its journal tells",
    )
    parser.add_argument(
        "--progress", choices=("bar", "json"), help="tell on stderr how far it is; json: an object in each line"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing about a point that is made")
    parser.add_argument("--output", choices=("human", "json"), default="human", help="json tells sizes in bytes")
    text.add_policy(parser, "confined", "default: confined")
    hook_options.add_to(parser)
    parser.set_defaults(start=_run, usage_error=parser.error)


def _add_levels(parser: argparse.ArgumentParser) -> None:
    levels = parser.add_mutually_exclusive_group()
    for level, help in (
        ("full", "keep all of each disk"),
        ("incremental", "keep what has changed since the last point; the default, where it can be"),
        ("differential", "keep what has changed since the last full member of each disk"),
    ):
        levels.add_argument(f"--{level}", dest="level", action="store_const", const=level, help=help)
    parser.add_argument(
        "--max-chain", type=_count, metavar="N", help="as many members may build on each other (default: 63, the most)"
    )
    parser.add_argument(
        "--bitmap",
        dest="bitmaps",
        action="append",
        default=[],
        metavar="[DISK=]NAME",
        help="a bitmap of another program that marks all that has changed since the last point, to go on from",
    )


def _add_checks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verify", action="store_true", help="read each member again before the point is made")
    parser.add_argument(
        "--no-digest",
        dest="digest",
        action="store_false",
        help="keep no digests: faster where the file system can share blocks, but nothing can be proven later",
    )
    parser.add_argument(
        "--sample",
        type=_number,
        metavar="N",
        help="look at so many blocks that should not have changed; 0 trusts the bitmaps (default: 16)",
    )


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.adapters.backup.job import plan_backup, recover, run_backup

    if arguments.compression_type and not arguments.compress:
        arguments.usage_error("--compression-type goes with --compress")
    disks = _disks(arguments)
    settings = _settings(arguments, disks)
    with target_options.opened(arguments.to, arguments) as (target, hooks):
        if arguments.dry_run:
            _show_plans(plan_backup(disks, target, hooks=hooks, settings=settings), arguments.output)
            return 0
        if arguments.recover:
            outcome = recover(target, hooks=hooks, disks=disks, journal=arguments.journal, policy=settings.policy)
            _show_outcome(outcome, arguments)
            return 0
        try:
            manifest = run_backup(
                disks, target, hooks=hooks, settings=settings, journal=arguments.journal, progress=_progress(arguments)
            )
        except LooseEndError as error:
            text.fail(error)
            return _LOOSE_END
        _show_point(manifest, arguments)
    return 0


def _disks(arguments: argparse.Namespace) -> list[DiskRequest]:
    from qcow2_plugin.adapters.backup.model import DiskRequest
    from qcow2_plugin.adapters.backup.sources import disk_name

    found = []
    for word in arguments.images:
        disk, is_named, path = word.partition("=")
        if not is_named or os.sep in disk:  # a path may have a "="
            disk, path = disk_name(word), word
        found.append(DiskRequest(disk=disk, path=path))
    return found


def _settings(arguments: argparse.Namespace, disks: Sequence[DiskRequest]) -> Settings:
    from qcow2_plugin.adapters.backup.model import Level
    from qcow2_plugin.adapters.backup.planning import Settings
    from qcow2_plugin.storage.opener import Policy

    level: Level | None = Level(arguments.level) if arguments.level else None
    told = {name: getattr(arguments, name) for name in ("sample", "max_chain")}
    return Settings(
        level=level,
        compression=(arguments.compression_type or "zlib") if arguments.compress else None,
        digest=arguments.digest,
        verify=arguments.verify,
        labels=dict(arguments.labels),
        bitmaps=_bitmaps(arguments, disks),
        policy=Policy(arguments.policy),
        **{name: value for name, value in told.items() if value is not None},
    )


def _bitmaps(arguments: argparse.Namespace, disks: Sequence[DiskRequest]) -> dict[str, str]:
    found: dict[str, str] = {}
    known = {each.disk for each in disks}
    for word in arguments.bitmaps:
        disk, is_named, name = word.partition("=")
        if is_named and disk in known:
            found[disk] = name
        elif len(disks) == 1:
            found[disks[0].disk] = word
        else:
            arguments.usage_error(f"--bitmap {printable(word)}: say of which disk it is (DISK=NAME)")
    return found


# -- what is told --


def _progress(arguments: argparse.Namespace) -> Callable[[ProgressEvent], None] | None:
    if arguments.progress == "json":
        return _tell_json
    if arguments.quiet and arguments.progress is None:
        return None
    from qcow2_plugin.adapters.cli.progress import Progress

    bars: dict[tuple[str, str | None], Progress] = {}

    def tell(event: ProgressEvent) -> None:
        key = event.phase, event.disk
        if key not in bars:
            words = _PHASES.get(event.phase, event.phase)
            bars[key] = Progress(f"{words} of {event.disk}", asked=arguments.progress == "bar")
        bars[key].tell(event.done, event.total)
        if event.done == event.total:
            bars[key].clear()

    return tell


_PHASES = {"write": "written", "verify": "verified"}


def _tell_json(event: ProgressEvent) -> None:
    print(json.dumps(asdict(event)), file=sys.stderr, flush=True)


def _show_plans(plans: Sequence[DiskPlan], output: str) -> None:
    if output == "json":
        print(json.dumps([asdict(plan) | {"level": plan.level.value} for plan in plans], indent=4))
        return
    rows = [
        (
            plan.disk,
            plan.level.value,
            text.short_size(plan.estimate.dirty_data),
            text.short_size(plan.estimate.dirty_zero + plan.estimate.dirty_hole),
            text.short_size(plan.estimate.clean),
            plan.base or "-",
        )
        for plan in plans
    ]
    titles = ("DISK", "LEVEL", "DATA", "ZEROS", "CLEAN", "BUILDS ON")
    print(text.table(titles, rows, right=frozenset((2, 3, 4))), end="")
    _show_reasons((plan.disk, plan.reason) for plan in plans)


def _show_point(manifest: Manifest, arguments: argparse.Namespace) -> None:
    if arguments.output == "json":
        members: list[dict[str, Any]] = [asdict(each) | {"level": each.level.value} for each in manifest.members]
        print(json.dumps(asdict(manifest) | {"members": members}, indent=4))
        return
    if arguments.quiet:
        return
    print(manifest.point)
    rows = [(each.disk, each.level.value, text.short_size(each.file_size), each.file) for each in manifest.members]
    print(text.table(("DISK", "LEVEL", "SIZE", "MEMBER"), rows, right=frozenset((2,))), end="")
    _show_reasons((each.disk, each.reason) for each in manifest.members)


def _show_reasons(reasons: Any) -> None:
    for disk, reason in reasons:
        if reason is not None:
            print(f"{disk}: {printable(reason)}")


def _show_outcome(outcome: str | None, arguments: argparse.Namespace) -> None:
    if arguments.output == "json":
        print(json.dumps({"outcome": outcome}))
        return
    words = {
        None: "no backup was interrupted",
        "commit": "the interrupted backup is finished",
        "abort": "the interrupted backup never happened",
    }
    if not arguments.quiet:
        print(words[outcome])


def _count(word: str) -> int:
    count = int(word)
    if count < 1:
        raise ValueError(word)
    return count


def _number(word: str) -> int:
    number = int(word)
    if number < 0:
        raise ValueError(word)
    return number


_count.__name__ = _number.__name__ = "number"  # what argparse calls them in "invalid number value"
