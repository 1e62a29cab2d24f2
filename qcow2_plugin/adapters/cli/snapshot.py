"""`qcow2 snapshot`: internal snapshots made, applied, deleted and listed, with the options of qemu-img."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from qcow2_plugin.adapters.cli import text
from qcow2_plugin.adapters.cli.info import clock, date, snapshot_as_json
from qcow2_plugin.errors import printable

if TYPE_CHECKING:
    from qcow2_plugin.operations.snapshots import ListedSnapshot

_DESCRIPTION = """\
Make, apply, delete or list the internal snapshots of an image. SNAPSHOT is an ID or else a name. Applying one loses
what the disk holds now; make another snapshot before, if that is to be kept.
"""
_EXAMPLES = """\
examples:
  qcow2 snapshot -c before-upgrade disk.qcow2
  qcow2 snapshot -l disk.qcow2
  qcow2 snapshot -l --sizes --output=json disk.qcow2
  qcow2 snapshot -a before-upgrade disk.qcow2
  qcow2 snapshot -d 1 disk.qcow2
"""
_TITLES = ("ID", "TAG", "VM SIZE", "DATE (UTC)", "VM CLOCK", "ICOUNT", "DISK")
_SIZE_TITLES = ("OWN SIZE", "REFERRED")


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "snapshot",
        help="make, apply, delete and list internal snapshots",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("-l", "--list", action="store_true", help="list all snapshots (the default)")
    action.add_argument("-c", "--create", metavar="NAME", help="keep the disk as it is now under this name")
    action.add_argument("-a", "--apply", metavar="SNAPSHOT", help="let the disk be as this snapshot keeps it")
    action.add_argument("-d", "--delete", metavar="SNAPSHOT", help="forget this snapshot")
    parser.add_argument(
        "--mark-bitmaps",
        action="store_true",
        help="with -a: mark what changes in the enabled dirty bitmaps, instead of refusing an image that has some",
    )
    parser.add_argument(
        "--sizes",
        action="store_true",
        help="with -l: also what deleting each snapshot would give back, and how much it refers to",
    )
    parser.add_argument("--output", choices=("human", "json"), help="of -l; default: human")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing; only -l says anything")
    text.add_force_share(parser)
    text.add_image(parser)
    parser.set_defaults(start=_run, complain=parser.error)


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.operations import snapshots

    wanted = next((each for each in (arguments.create, arguments.apply, arguments.delete) if each is not None), None)
    if wanted is not None and arguments.force_share:
        arguments.complain("-U is for -l: an image that others use must not be changed")
    if wanted is not None and (arguments.sizes or arguments.output):
        arguments.complain("--sizes and --output go with -l")
    if arguments.mark_bitmaps and arguments.apply is None:
        arguments.complain("--mark-bitmaps goes with -a")
    if arguments.create is not None:
        snapshots.create_snapshot(arguments.image, arguments.create)
    elif arguments.apply is not None:
        snapshots.apply_snapshot(arguments.image, arguments.apply, mark_bitmaps=arguments.mark_bitmaps)
    elif arguments.delete is not None:
        snapshots.delete_snapshot(arguments.image, arguments.delete)
    elif not arguments.quiet:
        listed = snapshots.list_snapshots(
            arguments.image, with_sizes=arguments.sizes, force_share=arguments.force_share
        )
        print(_as_json(listed) if arguments.output == "json" else _as_table(listed), end="")
    return 0


def _as_json(listed: list[ListedSnapshot]) -> str:
    """A list; the keys of qemu-img's `info` and our own "virtual-size", with sizes "own-size" and "referred-size"."""
    return json.dumps([_entry_as_json(each) for each in listed], indent=4) + "\n"


def _entry_as_json(listed: ListedSnapshot) -> dict[str, Any]:
    told = {**snapshot_as_json(listed.snapshot), "virtual-size": listed.snapshot.virtual_size}
    if listed.own_size is None:
        return told
    return {**told, "own-size": listed.own_size, "referred-size": listed.referred_size}


def _as_table(listed: list[ListedSnapshot]) -> str:
    if not listed:
        return ""
    has_sizes = listed[0].own_size is not None
    titles = _TITLES + (_SIZE_TITLES if has_sizes else ())
    return "Snapshot list:\n" + text.table(titles, map(_row, listed), right=frozenset({2, 4, 5, 6, 7, 8}))


def _row(listed: ListedSnapshot) -> tuple[str, ...]:
    snapshot = listed.snapshot
    row = (
        printable(snapshot.id),
        printable(snapshot.name),
        text.short_size(snapshot.vm_state_size),
        date(snapshot.date_seconds),
        clock(snapshot.vm_clock_nanoseconds),
        "" if snapshot.icount is None else str(snapshot.icount),
        text.short_size(snapshot.virtual_size),
    )
    if listed.own_size is None or listed.referred_size is None:
        return row
    return (*row, text.short_size(listed.own_size), text.short_size(listed.referred_size))
