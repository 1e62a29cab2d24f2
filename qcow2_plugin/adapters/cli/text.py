"""Words, numbers and tables for people, and the options that verbs share.

Everything that comes from an image goes through `printable` before it gets here or in here: `table` and `fields` take
text that is safe already.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qcow2_plugin.errors import printable

POLICIES = ("inspect", "confined", "trusted")
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_SUFFIXES = "kMGTPE"
_OPENING = (
    *("snapshot", "data_file", "backing_file", "backing_format", "base_directory", "allow_damaged", "force_share"),
)

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]  # the only name that argparse has for it


def prepare_streams() -> None:
    """Make stdout and stderr take any character; what their encoding lacks is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_stdout() -> None:
    """Send what stdout still holds nowhere, since it cannot go where it should; else the flush at exit complains."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def fail(error: Exception) -> None:
    """One line on stderr that says what went wrong."""
    try:
        sys.stdout.flush()
    except OSError:  # which is, or comes on top of, `error`
        discard_stdout()
    print(f"qcow2: error: {_message(error)}", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(f"qcow2: note: {note}", file=sys.stderr)


def warn(message: str) -> None:
    """One line on stderr about something that does not stop the work."""
    sys.stdout.flush()
    print(f"qcow2: note: {message}", file=sys.stderr)


def warn_of_trust(role: str, name: str | bytes) -> None:
    """A note about a name in an image that the usual policy does not follow."""
    option = role.replace(" ", "-")
    warn(f'the {role} is recorded as "{printable(name)}"; to open the image takes --policy=trusted or --{option}')


def _message(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    reason = error.strerror or str(error)
    names = (error.filename, error.filename2)
    files = ", ".join(printable(name) for name in names if isinstance(name, str | bytes))
    return f"{reason} ({files})" if files else reason


def size(byte_count: int) -> str:
    """As "64 MiB (67108864 bytes)"."""
    short = short_size(byte_count)
    return short if short.endswith("bytes") else f"{short} ({byte_count} bytes)"


def short_size(byte_count: int) -> str:
    """As "64 MiB", with one decimal where it says something."""
    unit = min(max(byte_count.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    scaled = f"{byte_count / (1 << 10 * unit):.1f}".removesuffix(".0")
    return f"{scaled} {_UNITS[unit]}"


def parse_size(word: str) -> int:
    """Bytes of "4096", "64k", "1.5G"; argparse turns the ValueError into a usage error."""
    if "_" in word or not word.isascii():
        raise ValueError(word)
    digits, factor = word, 1
    if word and word[-1].lower() in _SUFFIXES.lower():
        digits, factor = word[:-1], 1 << 10 * (1 + _SUFFIXES.lower().index(word[-1].lower()))
    value = float(digits) * factor if "." in digits else int(digits) * factor
    if value < 0 or value != int(value):
        raise ValueError(word)
    return int(value)


parse_size.__name__ = "size"  # what argparse calls it in "invalid size value"


def heading(words: str) -> str:
    """A section's title; bold on a terminal."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        return f"\x1b[1m{words}\x1b[0m"
    return words


def fields(pairs: Iterable[tuple[str, str]], indent: str = "") -> str:
    """Lines of a name and a value, the values in one column."""
    known = list(pairs)
    width = max((len(name) for name, _ in known), default=0)
    return "".join(f"{indent}{name:<{width}}  {value}\n" for name, value in known)


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, right: frozenset[int] = frozenset()) -> str:
    """Columns under titles; those whose number is in `right` are aligned there."""
    lines = [list(titles), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    return "".join(
        "  "
        + "  ".join(_padded(cell, widths[column], column in right) for column, cell in enumerate(line)).rstrip()
        + "\n"
        for line in lines
    )


def _padded(cell: str, width: int, to_the_right: bool) -> str:
    return cell.rjust(width) if to_the_right else cell.ljust(width)


def add_output(parser: argparse.ArgumentParser) -> None:
    """--output."""
    parser.add_argument(
        "--output", choices=("human", "json"), default="human", help="json has the keys and values of qemu-img"
    )


def add_policy(parser: argparse.ArgumentParser, default: str | None, note: str) -> None:
    """--policy."""
    parser.add_argument(
        "--policy",
        choices=POLICIES,
        default=default,
        help=f"which files that images name are opened: none; plain names below the image's directory; any ({note})",
    )


def add_force_share(parser: argparse.ArgumentParser) -> None:
    """-U."""
    parser.add_argument(
        "-U", "--force-share", action="store_true", help="read although another program may be writing to the image"
    )


def add_image(parser: argparse.ArgumentParser) -> None:
    """IMAGE."""
    parser.add_argument("image", metavar="IMAGE", help="a qcow2 file or block device")


def add_opening(parser: argparse.ArgumentParser) -> None:
    """The options of `open_image`, for verbs that read a disk."""
    add_policy(parser, "confined", "default: confined")
    parser.add_argument("--data-file", metavar="FILE", help="the external data file, instead of the name in the image")
    add_below(parser)
    parser.add_argument("--snapshot", metavar="ID", help="the disk as this internal snapshot (ID or name) keeps it")
    parser.add_argument(
        "--allow-damaged", action="store_true", help="read what a truncated image lacks as zeros, instead of refusing"
    )
    add_force_share(parser)


def opening(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_opening` was given, as options of `open_image`."""
    from qcow2_plugin.storage.opener import Policy

    return {"policy": Policy(arguments.policy), **{name: getattr(arguments, name) for name in _OPENING}}


def add_below(parser: argparse.ArgumentParser) -> None:
    """The options about backing files."""
    parser.add_argument("--backing-file", metavar="FILE", help="the backing file, instead of the name in the image")
    parser.add_argument(
        "--backing-format", choices=("qcow2", "raw"), help="format of backing files where the image does not record it"
    )
    parser.add_argument(
        "--base-directory", metavar="DIR", help="where relative names in images start (default: the image's directory)"
    )
