"""`qcow2 bitmap`: dirty bitmaps changed, rotated, examined, cleared away; with the options of `qemu-img bitmap`.

Behind the verb comes either what `qemu-img bitmap` takes, or one of the words of `_WORDS` with options of its own. A
file of such a name is written ./NAME.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from qcow2_plugin.adapters.cli import text
from qcow2_plugin.errors import printable

if TYPE_CHECKING:
    from qcow2_plugin.engine.dirty_bitmaps.bitmap_plan import BitmapChange
    from qcow2_plugin.operations.bitmap_health import BitmapHealth

_NEEDS_FULL = 3
_DESCRIPTION = """\
Change a persistent dirty bitmap: a record, inside the image, of which blocks of the disk have changed since some
moment. Backup programs copy these blocks and no others.

Actions may be combined, and are carried out in this order by one change of the image: after a crash all of them have
happened, or none. The image must not be in use.
"""
_MORE = """\
more words in place of the actions, each with its own help:
  qcow2 bitmap health FILE [NAME ...]                    can the next backup be an incremental one; if not, why
  qcow2 bitmap rotate --old NAME --new NAME FILE ...     freeze one bitmap and begin another, on all files or none
  qcow2 bitmap prune FILE                                remove bitmaps that nobody can use any more
  qcow2 bitmap recover RECORD                            finish a change of several files that was interrupted

examples:
  qcow2 bitmap --add disk.qcow2 since-monday
  qcow2 bitmap --disable disk.qcow2 since-monday
  qcow2 bitmap --add --disable --merge since-monday --merge since-tuesday disk.qcow2 both
  qcow2 bitmap --merge since-monday -b overlay.qcow2 -F qcow2 base.qcow2 since-monday
"""


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "bitmap",
        help="dirty bitmaps: what has changed since the last backup",
        usage="qcow2 bitmap ACTION ... [-g SIZE] [-b SOURCE_FILE [-F FORMAT]] [option ...] FILE BITMAP\n"
        "       qcow2 bitmap {health,rotate,prune,recover} ...",
        description=_DESCRIPTION,
        epilog=_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _declare_actions(parser)
    parse_actions = parser.parse_known_args

    def parse(words: Sequence[str] | None = None, namespace: Any = None) -> Any:
        if words and words[0] in _WORDS:
            return _parser_of(words[0]).parse_known_args(words[1:], namespace)
        return parse_actions(words, namespace)

    parser.parse_known_args = parse  # type: ignore[method-assign,assignment] # no subparsers beside other positional arguments


def _parser_of(word: str) -> argparse.ArgumentParser:
    description, epilog, declare = _WORDS[word]
    parser = argparse.ArgumentParser(
        prog=f"qcow2 bitmap {word}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    declare(parser)
    return parser


def _add_opening(parser: argparse.ArgumentParser) -> None:
    text.add_policy(parser, "confined", "for the data file; backing files are not opened; default: confined")
    parser.add_argument("--data-file", metavar="FILE", help="the external data file, instead of the name in the image")
    parser.add_argument(
        "--base-directory", metavar="DIR", help="where relative names in images start (default: the image's directory)"
    )


# -- the actions of qemu-img --


class _Then(argparse.Action):
    """One more action, in the order in which they are told."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        told = [*namespace.actions, (self.const, values)]
        namespace.actions = told


def _declare_actions(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_argument_group("actions")
    for verb, help in (
        ("add", "add the bitmap, empty and enabled: it records every change from now on"),
        ("remove", "remove it"),
        ("clear", "forget what it has recorded"),
        ("enable", "let it record changes again"),
        ("disable", "let it stay as it is"),
    ):
        actions.add_argument(f"--{verb}", action=_Then, nargs=0, dest="actions", const=verb, default=[], help=help)
    actions.add_argument(
        "--merge",
        action=_Then,
        dest="actions",
        const="merge",
        default=[],
        metavar="SOURCE_BITMAP",
        help="add to it what this bitmap has recorded",
    )
    parser.add_argument(
        "-g", "--granularity", type=text.parse_size, metavar="SIZE", help="with --add: bytes that one bit stands for"
    )
    parser.add_argument("-b", "--source-file", metavar="FILE", help="with --merge: the image that has SOURCE_BITMAP")
    parser.add_argument("-F", "--source-format", choices=("qcow2",), help="its format, which can be no other")
    parser.add_argument("-f", "--format", choices=("qcow2",), help="the only format that is known here")
    _add_opening(parser)
    parser.add_argument("file", metavar="FILE", help="a qcow2 file or block device")
    parser.add_argument("bitmap", metavar="BITMAP", help="the name of the bitmap")
    parser.set_defaults(start=lambda arguments: _change(parser, arguments))


def _change(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    _require_sense(parser, arguments)
    from qcow2_plugin.operations.bitmaps import change_bitmaps
    from qcow2_plugin.storage.opener import Policy

    changes = [_change_of(verb, source, arguments) for verb, source in arguments.actions]
    change_bitmaps(
        arguments.file,
        changes,
        policy=Policy(arguments.policy),
        data_file=arguments.data_file,
        base_directory=arguments.base_directory,
    )
    return 0


def _require_sense(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    verbs = {verb for verb, _ in arguments.actions}
    if not verbs:
        parser.error("one of --add, --remove, --clear, --enable, --disable, --merge is needed")
    if arguments.granularity is not None and "add" not in verbs:
        parser.error("-g is for --add only")
    if arguments.source_file is not None and "merge" not in verbs:
        parser.error("-b is for --merge only")
    if arguments.source_format is not None and arguments.source_file is None:
        parser.error("-F is for -b only")


def _change_of(verb: str, source: str | None, arguments: argparse.Namespace) -> BitmapChange:
    import os

    from qcow2_plugin.engine.dirty_bitmaps.bitmap_plan import BitmapChange, Verb
    from qcow2_plugin.format.names import to_bytes
    from qcow2_plugin.operations.bitmaps import content_of
    from qcow2_plugin.storage.opener import Policy

    name = to_bytes(arguments.bitmap)
    if verb == "add":
        return BitmapChange(Verb.ADD, name, arguments.granularity)
    if source is None or verb != "merge":
        return BitmapChange(Verb(verb), name)
    other = arguments.source_file
    if other is None or os.path.samefile(other, arguments.file):
        return BitmapChange(Verb.MERGE, name, source=to_bytes(source))
    return BitmapChange(Verb.MERGE, name, source=content_of(other, source, policy=Policy(arguments.policy)))


# -- health --

_HEALTH = """\
Tell for every dirty bitmap of an image, or for those named, whether an incremental backup can be made from it: if not,
why, and what to do next. Exactly one file is opened, read-only: safe for images from strangers.

Exit code 0: all of them can be used. 3: some cannot, so the next backup of this disk has to be a full one.
"""
_HEALTH_EXAMPLES = """\
states:
  usable         it marks everything that has changed
  in-use         a program is writing to the image, and has the bits in its memory
  inconsistent   the last program that wrote to the image did not close it
  wrong-size     the disk was resized without it
  missing        there is no bitmap of this name
  stale          a program that does not know bitmaps has written to the image
  unknown        its type or flags are none that are known
  damaged        it, or the list of bitmaps, is where it cannot be
  unfinished     a change of the bitmaps of several images was interrupted

examples:
  qcow2 bitmap health disk.qcow2
  qcow2 bitmap health --output=json disk.qcow2 since-monday | jq '."needs-full"'
"""


def _declare_health(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", choices=("human", "json"), default="human", help="json is for programs")
    text.add_force_share(parser)
    parser.add_argument("file", metavar="FILE", help="a qcow2 file or block device")
    parser.add_argument("names", metavar="NAME", nargs="*", help="a bitmap (default: all)")
    parser.set_defaults(start=_health)


def _health(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.operations.bitmap_health import bitmap_health

    found = bitmap_health(arguments.file, arguments.names or None, force_share=arguments.force_share)
    if arguments.output == "json":
        _print_json(arguments.file, found)
    else:
        print(_for_people(found), end="")
    return _NEEDS_FULL if any(each.needs_full for each in found) else 0


def _print_json(path: str, found: list[BitmapHealth]) -> None:
    import json

    told = {
        "filename": path,
        "needs-full": any(each.needs_full for each in found),
        "bitmaps": [
            {
                "name": each.name,
                "state": each.state.value,
                "needs-full": each.needs_full,
                "enabled": each.enabled,
                "granularity": each.granularity,
                "dirty-bytes": each.dirty_size,
                "reason": each.reason,
                "next-step": each.next_step,
            }
            for each in found
        ],
    }
    print(json.dumps(told, indent=4))


def _for_people(found: list[BitmapHealth]) -> str:
    if not found:
        return "The image has no dirty bitmaps.\n"
    recording = {True: "enabled", False: "disabled", None: "-"}
    rows = [
        (
            each.state.value,
            recording[each.enabled],
            "-" if each.granularity is None else text.short_size(each.granularity),
            "-" if each.dirty_size is None else text.short_size(each.dirty_size),
            _title(each),
        )
        for each in found
    ]
    told = text.table(("STATE", "RECORDING", "GRANULARITY", "MARKED", "NAME"), rows, right=frozenset({2, 3}))
    for each in found:
        if each.reason is not None:
            told += f"\n{_title(each)}: {each.reason}\n  {each.next_step}\n"
    return told


def _title(each: BitmapHealth) -> str:
    return "(all bitmaps)" if each.name is None else printable(each.name)


# -- rotate --

_ROTATE = """\
Freeze one bitmap and begin another at the same moment, on every file: what has changed until now is in the old one,
what changes from now on will be in the new one. If there are several files (the disks of one machine), it happens on
all of them or on none, whatever crashes in between.
"""
_ROTATE_EXAMPLES = """\
For the time that it takes there is a small file, the record, beside the first image. If that is still there after a
crash, 'qcow2 bitmap recover' with its name finishes the change on all files; so does, for each file, the next program
of this package that writes to it, if it may follow the name.

examples:
  qcow2 bitmap rotate --old since-monday --new since-tuesday disk.qcow2
  qcow2 bitmap rotate --old b7 --new b8 root.qcow2 home.qcow2 /srv/big.qcow2
"""


def _declare_rotate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--old", metavar="NAME", required=True, help="the bitmap to freeze, which must be enabled")
    parser.add_argument("--new", metavar="NAME", required=True, help="the bitmap to begin")
    parser.add_argument(
        "-g", "--granularity", type=text.parse_size, metavar="SIZE", help="of the new one (default: as the old one)"
    )
    parser.add_argument("--record", metavar="FILE", help="a name for the record, instead of one beside the first image")
    _add_opening(parser)
    parser.add_argument("files", metavar="FILE", nargs="+", help="a qcow2 file or block device")
    parser.set_defaults(start=lambda arguments: _rotate(parser, arguments))


def _rotate(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if arguments.data_file is not None and len(arguments.files) > 1:
        parser.error("--data-file is for one FILE only")
    from qcow2_plugin.engine.dirty_bitmaps.bitmap_plan import rotating
    from qcow2_plugin.format.names import to_bytes
    from qcow2_plugin.operations.transaction import bitmap_transaction
    from qcow2_plugin.storage.opener import Policy

    changes = rotating(to_bytes(arguments.old), to_bytes(arguments.new), arguments.granularity)
    bitmap_transaction(
        {file: changes for file in arguments.files},
        record=arguments.record,
        policy=Policy(arguments.policy),
        data_file=arguments.data_file,
        base_directory=arguments.base_directory,
    )
    return 0


# -- prune --

_PRUNE = """\
Remove the bitmaps that nobody can use any more: those of a writer that did not end properly, of a disk of another
size, or of before a program wrote that does not know bitmaps. The names of what is gone are printed.
"""
_PRUNE_EXAMPLES = """\
examples:
  qcow2 bitmap prune disk.qcow2
  qcow2 bitmap prune --include=unknown disk.qcow2     those of a kind that is unknown here, and no others
  qcow2 bitmap prune --drop-all disk.qcow2            all, unseen, where the list of bitmaps is damaged; leaves leaks
"""


def _declare_prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--include",
        metavar="STATE",
        action="append",
        choices=("inconsistent", "wrong-size", "stale", "unknown"),
        help="bitmaps in this state instead, may be told again: inconsistent, wrong-size, stale, unknown",
    )
    parser.add_argument(
        "--drop-all", action="store_true", help="take all bitmaps from the image, good ones too, by its header alone"
    )
    _add_opening(parser)
    parser.add_argument("file", metavar="FILE", help="a qcow2 file or block device")
    parser.set_defaults(start=_prune)


def _prune(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.operations.bitmap_pruning import PRUNED, drop_bitmaps, prune_bitmaps
    from qcow2_plugin.storage.opener import Policy

    if arguments.drop_all:
        for each in drop_bitmaps(arguments.file):
            print(f"removed {_title(each)}")
        return 0
    removed = prune_bitmaps(
        arguments.file,
        include=arguments.include or PRUNED,
        policy=Policy(arguments.policy),
        data_file=arguments.data_file,
        base_directory=arguments.base_directory,
    )
    for name in removed:
        print(f"removed {printable(name)}")
    return 0


# -- recover --

_RECOVER = """\
Finish a change of the bitmaps of several images that was interrupted, by its record: the file bitmaps-*.transaction
beside the first image, or where it was told to be. Either all images get the new bitmaps or all keep the old ones,
which was decided when the change was interrupted. Doing it twice does no harm. The record is gone afterwards.

Of the images nothing but the headers is touched.
"""
_RECOVER_EXAMPLES = """\
what is told of an image:
  new       it has the new bitmaps
  old       it has the bitmaps of before
  settled   nothing was left to do
  void      another program has written to it since, and it has the bitmaps which that has left

examples:
  qcow2 bitmap recover bitmaps-1f2e3d4c5b6a7988.transaction
  qcow2 bitmap recover --lost disk.qcow2         the record is gone for good: back to the bitmaps of before
"""


def _declare_recover(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lost", action="store_true", help="FILE is an image whose record is lost: take it back to its old bitmaps"
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help="a record, or with --lost an image")
    parser.set_defaults(start=_recover)


def _recover(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.operations.transaction import forget_transaction, recover_transaction

    for file in arguments.files:
        if arguments.lost:
            print(f"{'old' if forget_transaction(file) else 'settled':<8} {printable(file)}")
            continue
        for path, outcome in recover_transaction(file):
            print(f"{outcome:<8} {printable(path)}")
    return 0


_WORDS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "health": (_HEALTH, _HEALTH_EXAMPLES, _declare_health),
    "rotate": (_ROTATE, _ROTATE_EXAMPLES, _declare_rotate),
    "prune": (_PRUNE, _PRUNE_EXAMPLES, _declare_prune),
    "recover": (_RECOVER, _RECOVER_EXAMPLES, _declare_recover),
}
