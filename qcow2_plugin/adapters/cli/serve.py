"""`qcow2 serve`: the options of serving an image over NBD, and what they are called in nbdkit's plugin."""

from __future__ import annotations

import argparse

from qcow2_plugin.adapters.cli import text

DEFAULT_THREADS = 16
"""Requests of one connection that are worked on at once. Measured with 4 KiB random reads at depth 32: from a disk 16
threads read three times as much as one, because the disk works on many at once; from memory one thread is fastest, as
several only wait for their turn in Python, and four for compressed images."""
DEFAULT_ADDRESS = "127.0.0.1"
_PASSED_ON = ("data_file", "backing_file", "backing_format", "base_directory", "snapshot", "bitmap", "cache_size")
_FLAGS = ("allow_damaged", "force_share")
_FOR_READING = ("snapshot", "bitmap", *_FLAGS)
_DESCRIPTION = """\
Serve a qcow2 image over NBD until Ctrl-C, read-only unless --writable is given. The URI is printed, and what to type
in another terminal. Clients also find every internal snapshot and dirty bitmap, as exports of their own
("snapshot=ID", "bitmap=NAME"), which are always read-only.
"""
_EXAMPLES = """\
examples:
  qcow2 serve disk.qcow2
  qcow2 serve --socket=/run/disk.sock --snapshot=1 disk.qcow2
  qcow2 serve --port=10809 disk.qcow2
  qcow2 serve --run 'nbdcopy "$uri" disk.raw' disk.qcow2
  qcow2 serve --writable --run 'nbdcopy disk.raw "$uri"' disk.qcow2
"""


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "serve",
        help="serve the disk over NBD",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-w",
        "--writable",
        action="store_true",
        help="let clients write to the disk; what they were told is written is stored when serving ends",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket", metavar="PATH", help="Unix socket to listen on (default: a new private one)")
    where.add_argument("--port", type=_port, metavar="N", help="TCP port to listen on, instead of a socket")
    parser.add_argument("--address", help=f"address for --port (default: {DEFAULT_ADDRESS}, this machine only)")
    parser.add_argument(
        "--run", metavar="COMMAND", help="serve for as long as this shell command runs; it finds the URI in $uri"
    )
    parser.add_argument(
        "--threads",
        type=_count,
        default=DEFAULT_THREADS,
        metavar="N",
        help=f"requests worked on at once (default: {DEFAULT_THREADS}, best for disks; for files in memory 1 is best, "
        "4 if compressed)",
    )
    text.add_opening(parser)
    parser.add_argument("--bitmap", metavar="NAME", help="serve what this dirty bitmap marks; clean ranges are holes")
    parser.add_argument(
        "--cache-size", type=text.parse_size, metavar="SIZE", help="memory for mapping tables (default: 32M)"
    )
    text.add_image(parser)
    parser.set_defaults(start=_run, usage_error=parser.error)


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.adapters.cli import server

    if arguments.address is not None and arguments.port is None:
        arguments.usage_error("--address goes with --port")
    for name in _FOR_READING if arguments.writable else ():
        if getattr(arguments, name):
            arguments.usage_error(f"--{name.replace('_', '-')} is for reading only, it does not go with --writable")
    return server.serve(
        _parameters(arguments),
        writable=arguments.writable,
        socket=arguments.socket,
        port=arguments.port,
        address=arguments.address or DEFAULT_ADDRESS,
        threads=arguments.threads,
        command=arguments.run,
    )


def _parameters(arguments: argparse.Namespace) -> list[str]:
    """The plugin's part of nbdkit's command line."""
    from qcow2_plugin.adapters.nbdkit_process import plugin_parameters

    options = {name: getattr(arguments, name) for name in (*_PASSED_ON, *_FLAGS)}
    return plugin_parameters(arguments.image, writable=arguments.writable, policy=arguments.policy, **options)


def _port(word: str) -> int:
    port = int(word)
    if not 0 < port < 65536:
        raise ValueError(word)
    return port


def _count(word: str) -> int:
    count = int(word)
    if count < 1:
        raise ValueError(word)
    return count


_port.__name__, _count.__name__ = "port", "number"  # what argparse calls them in "invalid port value"
