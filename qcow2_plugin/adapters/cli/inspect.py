"""`qcow2 inspect`: what is in a guest, for people and for programs."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.cli import guests, hook_options, text
from qcow2_plugin.adapters.cli.signals import ended_by_signals
from qcow2_plugin.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qcow2_plugin.adapters.guestfs.inspection import Guest, OperatingSystem

_DESCRIPTION = """\
Look into the guests on these disks: partitions, file systems and the room in them, operating systems. libguestfs does
it, in a small virtual machine that sees the disks read-only; without KVM that takes half a minute. Several images take
one launch, and may be the disks of one guest. Nothing is written to them.
"""
_EXAMPLES = """\
examples:
  qcow2 inspect disk.qcow2
  qcow2 inspect --output=json --applications disk.qcow2 | jq '.[].operating_systems[].applications'
  qcow2 inspect --snapshot=before-upgrade disk.qcow2
"""
_SHOWN_APPLICATIONS = 1000
_SHOWN_MOUNTS = 20
_SHOWN = 200
"""Characters of a guest's text in a table."""


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "inspect",
        help="which system, partitions and file systems are in the guest",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", choices=("human", "json"), default="human", help="json is a list with one object for each image"
    )
    parser.add_argument("--applications", action="store_true", help="list the installed packages, too")
    guests.add_timeout(parser)
    text.add_opening(parser)
    hook_options.add_to(parser)
    guests.add_images(parser)
    parser.set_defaults(start=_run, usage_error=parser.error)


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.adapters.guestfs.inspection import inspect

    opening = guests.opening(arguments)
    guests.tell_of_launch()
    with ended_by_signals(), hook_options.load(arguments) as hooks:
        found = inspect(
            arguments.images, applications=arguments.applications, timeout=arguments.timeout, hooks=hooks, **opening
        )
    if arguments.output == "json":
        from dataclasses import asdict

        print(json.dumps([asdict(guest) for guest in found], indent=4))
    else:
        sys.stdout.write("\n".join("".join(_for_people(guest)) for guest in found))
    return 0


def _for_people(guest: Guest) -> Iterator[str]:
    size = "" if guest.virtual_size is None else f", {text.short_size(guest.virtual_size)}"
    table = f", partition table {_shown(guest.partition_table)}" if guest.partition_table else ""
    yield text.heading(f"{printable(guest.image)} ({_shown(guest.device)}{size}{table})") + "\n"
    if guest.partitions:
        yield "Partitions:\n"
        rows = [
            (_shown(each.device), _size(each.start), _size(each.length), _shown(each.type)) for each in guest.partitions
        ]
        yield text.table(("DEVICE", "START", "SIZE", "TYPE"), rows, right=frozenset({1, 2}))
    if guest.file_systems:
        yield "File systems:\n"
        systems = [
            (
                *(_shown(each.device), _size(each.size), _size(each.free)),
                *(_shown(each.type), _shown(each.label), _shown(each.uuid)),
            )
            for each in guest.file_systems
        ]
        yield text.table(("DEVICE", "SIZE", "FREE", "TYPE", "LABEL", "UUID"), systems, right=frozenset({1, 2}))
    for system in guest.operating_systems:
        yield from _system(system)
    if not guest.operating_systems:
        yield "No operating system is found.\n"


def _system(system: OperatingSystem) -> Iterator[str]:
    version = ".".join(str(part) for part in (system.major, system.minor) if part is not None)
    packages = [word for word in (system.package_format, system.package_management) if word]
    mounts = [f"{_shown(device)} on {_shown(path)}" for path, device in sorted(system.mount_points.items())]
    more = [f"... and {len(mounts) - _SHOWN_MOUNTS} more"] if len(mounts) > _SHOWN_MOUNTS else []
    pairs = [
        ("product", _shown(system.product_name)),
        ("system", _shown(" ".join(word for word in (system.type, system.distribution, version) if word))),
        ("host name", _shown(system.host_name)),
        ("architecture", _shown(system.architecture)),
        ("packages", _shown(", ".join(packages))),
        ("mounts", ", ".join([*mounts[:_SHOWN_MOUNTS], *more]) or "-"),
    ]
    yield f"Operating system on {_shown(system.device)}:\n"
    yield text.fields([(name, value) for name, value in pairs if value != "-"], "  ")
    if system.applications is not None:
        yield f"Installed there ({len(system.applications)}):\n"
        shown = system.applications[:_SHOWN_APPLICATIONS]
        rows = [
            (
                _shown(each.name),
                _shown("-".join(word for word in (each.version, each.release) if word)),
                _shown(each.architecture),
            )
            for each in shown
        ]
        yield text.table(("NAME", "VERSION", "ARCHITECTURE"), rows)
        if len(shown) < len(system.applications):
            yield f"  ... and {len(system.applications) - len(shown)} more (--output=json has all)\n"


def _size(length: int | None) -> str:
    return "-" if length is None else text.short_size(length)


def _shown(words: str | None) -> str:
    if not words:
        return "-"
    safe = printable(words)
    return safe if len(safe) <= _SHOWN else safe[:_SHOWN] + "..."
