"""`qcow2 restore`: a disk out of a repository of backups."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.cli import hook_options, progress, target_options, text
from qcow2_plugin.errors import printable

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.restore import Restored

_DESCRIPTION = """\
Make FILE the disk as a point of the repository of backups at TARGET keeps it: an image like the one that was backed up,
or another kind. All files that it is made of are looked at before anything is written. FILE has its name when it is
whole and on disk, not before. A block device is written in place.
"""
_EXAMPLES = """\
examples:
  qcow2 restore --from /backups/guest disk.qcow2
      the newest point, as the image was
  qcow2 restore --from /backups/guest --point 20261125t131500z-0007 --disk root root.qcow2
  qcow2 restore --from /backups/guest --as raw --verify disk.raw
  qcow2 restore --from /backups/guest --as raw --overwrite /dev/vg0/guest
  qcow2 restore --from /backups/guest --as external-data-file new.qcow2
      new.qcow2, which keeps the books, and new.raw, which is the disk
"""


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "restore",
        help="make a disk out of a backup",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--from", dest="source", required=True, metavar="TARGET", help=f"the backups: {target_options.TARGETS}"
    )
    parser.add_argument("--point", default="latest", metavar="POINT", help="which point, by its id (default: latest)")
    parser.add_argument("--disk", metavar="NAME", help="which of its disks (needed if there are several)")
    parser.add_argument(
        "--as",
        dest="form",
        choices=("saved", "raw", "qcow2", "external-data-file"),
        default="saved",
        help="an image as the source was, a raw image, an image with all in it, or one around a raw image (default: "
        "saved)",
    )
    parser.add_argument("--new-data-file", metavar="FILE", help="the raw image of the last (default: FILE, in .raw)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a file, once the new one is whole; write to a block device"
    )
    parser.add_argument("--verify", action="store_true", help="read what was made again, and compare its digest")
    parser.add_argument("--scratch", metavar="DIR", help="where the chain is fetched to (default: the usual place)")
    progress.add_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing")
    parser.add_argument("--output", choices=("human", "json"), default="human", help="json tells sizes in bytes")
    parser.add_argument("file", metavar="FILE", help="the file to make, or a block device")
    target_options.add_options(parser)
    hook_options.add_to(parser)
    parser.set_defaults(start=_run)


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.adapters.backup.restore import Request, restore

    request = Request(
        to=arguments.file,
        form=arguments.form,
        data_file=arguments.new_data_file,
        overwrite=arguments.overwrite,
        verify=arguments.verify,
    )
    with (
        progress.asked_for(arguments, "restore", "restored") as tell,
        target_options.opened_repository(arguments.source, arguments) as (repository, hooks),
    ):
        restored = restore(
            repository,
            arguments.point,
            arguments.disk,
            request,
            hooks=hooks,
            scratch=arguments.scratch,
            progress=tell,
        )
    if arguments.output == "json":
        print(json.dumps(asdict(restored), indent=4))
    elif not arguments.quiet:
        _tell(restored)
    return 0


def _tell(restored: Restored) -> None:
    where = printable(restored.target)
    if restored.data_file is not None:
        where += f"' with '{printable(restored.data_file)}"
    checked = "; read again and equal" if restored.is_verified else ""
    print(f"Restored '{where}': {restored.disk} of {restored.point}, {text.size(restored.virtual_size)}{checked}")
