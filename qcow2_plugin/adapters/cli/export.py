"""`qcow2 export`: a raw copy of the disk, as a file, on a block device, or as the data file of a new image."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qcow2_plugin.adapters.cli import text
from qcow2_plugin.errors import OptionError, printable

if TYPE_CHECKING:
    from qcow2_plugin.operations.export import ExportResult

_DESCRIPTION = """\
Write what the guest sees, whatever the image is made of (backing files, compressed clusters, snapshots), to TARGET, as
a raw image. TARGET has its name when it is whole and on disk, not before. A block device is written in place.
"""
_EXAMPLES = """\
examples:
  qcow2 export disk.qcow2 disk.raw
  qcow2 export --snapshot=before disk.qcow2 before.raw
  qcow2 export --verify -p disk.qcow2 /mnt/disk.raw
      read both again before the copy gets its name
  qcow2 export --overwrite disk.qcow2 /dev/vg0/guest
  qcow2 export --as=external-data-file disk.qcow2 new.qcow2
      new.qcow2, which keeps the books, and new.raw, which is the disk
"""


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "export",
        help="write the disk to a raw file or a block device",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--as",
        dest="form",
        choices=("raw", "external-data-file"),
        default="raw",
        help="a raw image, or a new qcow2 image with a raw image as its data file (default: raw)",
    )
    parser.add_argument(
        "--new-data-file",
        metavar="FILE",
        help="with --as=external-data-file: the raw image (default: TARGET, ending in .raw)",
    )
    parser.add_argument("--extended-l2", action="store_true", help="with --as=external-data-file: map by subclusters")
    parser.add_argument(
        "--cluster-size",
        type=text.parse_size,
        metavar="SIZE",
        help="with --as=external-data-file: unit of the mapping (default: 64k)",
    )
    parser.add_argument(
        "-S",
        "--sparse-size",
        type=text.parse_size,
        default=4096,
        metavar="SIZE",
        help="least run of zeros that becomes a hole; 0 writes all zeros that are stored (default: 4k)",
    )
    parser.add_argument(
        "-C", "--copy-offload", action="store_true", help="let the system copy what it can, zeros included"
    )
    parser.add_argument(
        "--no-reflink", action="store_true", help="share no blocks with the image, even where the file system could"
    )
    parser.add_argument("--verify", action="store_true", help="read image and copy again, and compare them")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a file, once the copy is whole; write to a block device"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="how many work at once (default: 2)")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing")
    parser.add_argument("-p", "--progress", action="store_true", help="tell how far it is")
    parser.add_argument("--output", choices=("human", "json"), default="human", help="json tells sizes in bytes")
    text.add_opening(parser)
    text.add_image(parser)
    parser.add_argument("target", metavar="TARGET", help="the file to make, or a block device")
    parser.set_defaults(start=_run)


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.adapters.cli.progress import Progress
    from qcow2_plugin.adapters.cli.signals import ended_by_signals
    from qcow2_plugin.operations.export import export_as_data_file, export_raw

    progress = Progress("exported", asked=arguments.progress)
    options: dict[str, Any] = {
        "sparse_size": arguments.sparse_size,
        "offload": arguments.copy_offload,
        "share": not arguments.no_reflink,
        "verify": arguments.verify,
        "overwrite": arguments.overwrite,
        "threads": arguments.threads,
        "progress": None if arguments.quiet else progress.tell,
        **text.opening(arguments),
    }
    about_image = {
        "new_data_file": arguments.new_data_file,
        "cluster_size": arguments.cluster_size,
        "extended_l2": arguments.extended_l2 or None,
    }
    told = {name: value for name, value in about_image.items() if value is not None}
    try:
        with ended_by_signals():
            if arguments.form == "raw":
                if told:
                    raise OptionError(f"{', '.join(sorted(told))}: only with --as=external-data-file")
                result, data_file = export_raw(arguments.image, arguments.target, **options), None
            else:
                data_file = told.pop("new_data_file", None) or _beside(arguments.target)
                result, adopted = export_as_data_file(arguments.image, arguments.target, data_file, **told, **options)
    finally:
        progress.clear()
    if arguments.output == "json":
        print(json.dumps({"target": arguments.target, "data-file": data_file, **_as_json(result)}, indent=4))
    elif not arguments.quiet:
        _tell(arguments.target, data_file, result)
        if data_file is not None and adopted.needs_trust:
            text.warn_of_trust("data file", adopted.recorded_name)
    return 0


def _beside(target: str) -> str:
    """The usual name of the data file."""
    return f"{target.removesuffix('.qcow2')}.raw"


def _as_json(result: ExportResult) -> dict[str, Any]:
    return {name.removeprefix("is_").replace("_", "-"): value for name, value in asdict(result).items()}


def _tell(target: str, data_file: str | None, result: ExportResult) -> None:
    where = printable(target) if data_file is None else f"{printable(target)}' with '{printable(data_file)}"
    parts = (
        (result.written, "written"),
        (result.shared, "shared with the image"),
        (result.offloaded, "copied by the system"),
        (result.zeros, "zeros"),
    )
    ways = ", ".join(f"{text.short_size(count)} {way}" for count, way in parts if count)
    checked = "; read again and equal" if result.is_verified else ""
    print(f"Exported '{where}': {text.size(result.virtual_size)}{f' ({ways})' if ways else ''}{checked}")
    if result.is_device:
        text.warn("what of the block device is behind the end of the disk, if anything is, stayed as it was")
