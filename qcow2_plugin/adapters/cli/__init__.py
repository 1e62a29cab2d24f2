"""The `qcow2` command: a parser, one module per verb, and how failures end.

Exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong usage, 3 refused by `vet` or, by `bitmap health`, no
incremental backup or, by `verify`, something wrong with a backup or, by `backup`, a loose end, 130 interrupted, 129 and
143 told to end, 141 the reader went away; `serve` ends with the code of nbdkit or of its command, `guestfs --run` with
that of its command, `check` with those of qemu-img (1 wrong usage too, 2 corruptions, 3 leaks).
A verb's module is imported when the verb is asked for, and what its work needs when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from qcow2_plugin.adapters.cli import text
from qcow2_plugin.adapters.cli.signals import Ended
from qcow2_plugin.errors import Qcow2Error

_VERBS = frozenset(
    (
        "adopt",
        "amend",
        "attach",
        "backup",
        "bitmap",
        "cat",
        "check",
        "create",
        "detach",
        "digest",
        "export",
        "extents",
        "guestfs",
        "info",
        "inspect",
        "map",
        "plugins",
        "points",
        "prune",
        "relocate",
        "resize",
        "restore",
        "serve",
        "snapshot",
        "verify",
        "vet",
    )
)
_FAILED = 1
_INTERRUPTED = 130
_READER_GONE = 141
_EXAMPLES = """\
examples:
  qcow2 create disk.qcow2 20G           a new, empty image
  qcow2 info disk.qcow2                 what the image says about itself
  qcow2 map --output=json disk.qcow2    where every byte comes from, as qemu-img tells it
  qcow2 check disk.qcow2                is it sound?
  qcow2 snapshot -c before disk.qcow2   keep the disk as it is now
  qcow2 serve disk.qcow2                serve it over NBD until Ctrl-C
  qcow2 vet upload.qcow2                may this image from a stranger be opened?

Each verb has its own help: qcow2 VERB --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (by default those of the process); the exit code.

    Raises SystemExit for wrong usage (2) and --help (0).
    """
    # numpy's library for linear algebra, of which nothing is used here, would start threads that wait busily at first.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    text.prepare_streams()
    words = sys.argv[1:] if argv is None else argv
    arguments = _parser(words[:1]).parse_args(words)
    try:
        status: int = arguments.start(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        text.discard_stdout()
        return _READER_GONE
    except KeyboardInterrupt as error:
        return error.status if isinstance(error, Ended) else _INTERRUPTED
    except (Qcow2Error, OSError, MemoryError) as error:
        text.fail(error)
        return _FAILED
    return status


class _Version(argparse.Action):
    """--version; asks for the version only when it is wanted, because that takes longer than starting."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"qcow2 {version('qcow2-plugin')}")
        parser.exit()


def _parser(first: Sequence[str]) -> argparse.ArgumentParser:
    """A parser for command lines that begin with the word `first`, if there is one."""
    parser = argparse.ArgumentParser(
        prog="qcow2",
        description="Make qcow2 disk images, look into them, take care of them and serve them, without QEMU.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="print the version and end")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name in set(first) & _VERBS or sorted(_VERBS):
        import_module(f"{__name__}.{name}").add_to(verbs)
    return parser
