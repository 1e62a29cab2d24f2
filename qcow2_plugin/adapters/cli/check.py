"""`qcow2 check`: is an image sound, and putting right what is not. Answers and exit codes are those of qemu-img.

The answer goes to stdout, single findings and progress to stderr, so that a program can read the one and a person the
other. Wrong usage ends with 1 here, because 2 says that the image is damaged.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NoReturn

from qcow2_plugin.adapters.cli import text
from qcow2_plugin.adapters.cli.progress import Progress
from qcow2_plugin.errors import printable

if TYPE_CHECKING:
    from qcow2_plugin.engine.checking.findings import CheckResult, Finding

_NOT_COMPLETED = 1
_DESCRIPTION = """\
Check a qcow2 image: does everything that it refers to exist, once, in a place where it can be, and are its clusters
counted right? Nothing is changed, unless -r says so. An image must not be in use while it is checked.

A leak is space that counts as used and is not: a waste, no danger. A corruption means that data may be lost, or will be
when the image is written to: make a copy before anything else, or repair into one (--to).
"""
_EPILOG = """\
exit codes:
  0  nothing is wrong (any more)       2  there are corruptions
  1  the check was not completed       3  there are leaks, and nothing worse

examples:
  qcow2 check disk.qcow2
  qcow2 check --findings disk.qcow2                 every finding, and what a repair would do about it
  qcow2 check -r leaks disk.qcow2                   free leaked space
  qcow2 check -r all --to=repaired.qcow2 disk.qcow2 repair a copy, leave the image alone
  qcow2 check --output=json disk.qcow2 | jq .corruptions
"""
_NUMBERS = (
    ("image-end-offset", "image_end_offset"),
    ("compressed-clusters", "compressed_clusters"),
    ("total-clusters", "total_clusters"),
    ("corruptions-fixed", "corruptions_fixed"),
    ("corruptions", "corruptions"),
    ("check-errors", "check_errors"),
    ("leaks", "leaks"),
    ("leaks-fixed", "leaks_fixed"),
    ("allocated-clusters", "allocated_clusters"),
)
"""Keys in the order in which qemu-img prints them, and the fields with their values."""
_TOLD = 20
"""Findings of one kind that are told one by one, unless all are asked for."""
_LISTED = 10000
"""Findings of one kind that --findings lists."""


class _Parser(argparse.ArgumentParser):
    """Ends with 1 after wrong usage."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(_NOT_COMPLETED, f"{self.prog}: error: {printable(message)}\n")


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "check",
        help="is an image sound? and repair it",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.__class__ = _Parser
    parser.add_argument("-f", "--format", choices=("qcow2",), help="the only format that is checked")
    text.add_output(parser)
    parser.add_argument(
        "-r",
        "--repair",
        choices=("leaks", "all"),
        help="free leaked space, which harms nobody; or mend everything that qemu-img does",
    )
    parser.add_argument(
        "--repair-ours", action="store_true", help="with -r all: also what is only done on request (see --findings)"
    )
    parser.add_argument(
        "--to",
        metavar="NEW",
        help="repair a copy of the image, which is not changed itself; an external data file is not copied",
    )
    parser.add_argument(
        "--findings", action="store_true", help="list the findings: where, what, and what a repair would do"
    )
    parser.add_argument("--stop-after", type=_count, metavar="N", help="look no further after so many findings")
    parser.add_argument(
        "--deep", action="store_true", help="read a raw data file where the image says zeros: it must hold zeros too"
    )
    parser.add_argument("-p", "--progress", action="store_true", help="show how far it is, on stderr")
    parser.add_argument("-q", "--quiet", action="store_true", help="no answer but the exit code")
    text.add_policy(parser, "confined", "default: confined; backing files are never opened")
    parser.add_argument("--data-file", metavar="FILE", help="the external data file, instead of the name in the image")
    parser.add_argument(
        "--base-directory", metavar="DIR", help="where a relative name in the image starts (default: its directory)"
    )
    text.add_force_share(parser)
    text.add_image(parser)
    parser.set_defaults(start=_run)


def _count(word: str) -> int:
    if not word.isdecimal() or not int(word):
        raise ValueError(word)
    return int(word)


_count.__name__ = "count"  # what argparse calls it in "invalid count value"


def _run(arguments: argparse.Namespace) -> int:
    from qcow2_plugin.operations.check import check
    from qcow2_plugin.storage.opener import Policy

    progress = Progress("checked", asked=arguments.progress)
    try:
        result = check(
            arguments.image,
            repair=arguments.repair,
            repair_ours=arguments.repair_ours,
            to=arguments.to,
            deep=arguments.deep,
            stop_after=arguments.stop_after,
            max_findings=_LISTED if arguments.findings else _TOLD,
            progress=progress.tell,
            policy=Policy(arguments.policy),
            data_file=arguments.data_file,
            base_directory=arguments.base_directory,
            force_share=arguments.force_share,
        )
    finally:
        progress.clear()
    if not arguments.findings:
        _tell_findings(result)
    if not arguments.quiet:
        _print(arguments, result)
    if result.aborted is not None:
        sys.stdout.flush()
        print(f"qcow2: error: the check was not completed: {result.aborted}", file=sys.stderr)
    return result.exit_code


# ---- single findings


def _tell_findings(result: CheckResult) -> None:
    """One line a finding on stderr, and how many more there are."""
    lines = [f"qcow2: {_line(finding)}" for finding in result.findings]
    lines += [f"qcow2: {kind}: {count} more" for kind, count in _left_out(result)]
    if lines:
        sys.stdout.flush()
        print("\n".join(lines), file=sys.stderr)


def _line(finding: Finding) -> str:
    place = "" if finding.host_offset is None else f" at host offset {finding.host_offset:#x}"
    index = "" if finding.index is None else f", entry {finding.index}"
    guest = "" if finding.guest_offset is None else f" (guest offset {finding.guest_offset:#x})"
    times = "" if finding.count == 1 else f"; {finding.count} times"
    return f"{finding.finding_class.value}: {finding.structure}{place}{index}{guest}: {finding.detail}{times}"


def _left_out(result: CheckResult) -> Iterator[tuple[str, int]]:
    """The kinds of which not all findings are kept, and how many are not."""
    kept: dict[str, int] = {}
    for finding in result.findings:
        kept[finding.kind] = kept.get(finding.kind, 0) + finding.count
    for kind, count in result.kinds.items():
        if count > kept.get(kind, 0):
            yield kind, count - kept.get(kind, 0)


# ---- the answer


def _print(arguments: argparse.Namespace, result: CheckResult) -> None:
    if arguments.output == "json":
        if result.aborted is None or arguments.findings:
            _print_json(arguments, result)
        return
    if arguments.findings:
        print(_list(result), end="")
    if result.aborted is None:
        print(_summary(result), end="")


def _print_json(arguments: argparse.Namespace, result: CheckResult) -> None:
    import json

    told: dict[str, object] = {}
    for key, field in _NUMBERS:
        value = getattr(result, field)
        if value or key == "check-errors":
            told[key] = value
    told |= {"filename": arguments.to or arguments.image, "format": "qcow2"}
    if result.fragmented_clusters:
        told["fragmented-clusters"] = result.fragmented_clusters
    told |= _more_json(arguments, result)
    print(json.dumps(told, indent=4))


def _more_json(arguments: argparse.Namespace, result: CheckResult) -> Mapping[str, object]:
    """Keys that qemu-img does not have: what only we find, and what was asked for."""
    more: dict[str, object] = {}
    if result.extra_corruptions:
        more["extra-corruptions"] = result.extra_corruptions
    if result.extra_corruptions_fixed:
        more["extra-corruptions-fixed"] = result.extra_corruptions_fixed
    if result.stopped:
        more["stopped"] = True
    if arguments.findings:
        if result.aborted is not None:
            more["aborted"] = result.aborted
        more["findings"] = [_as_json(finding) for finding in result.findings]
        left_out = dict(_left_out(result))
        if left_out:
            more["findings-left-out"] = left_out
    return more


def _as_json(finding: Finding) -> Mapping[str, object]:
    return {
        "kind": finding.kind,
        "class": finding.finding_class.value,
        "structure": finding.structure,
        "host-offset": finding.host_offset,
        "guest-offset": finding.guest_offset,
        "index": finding.index,
        "detail": finding.detail,
        "repair": finding.repair,
        "count": finding.count,
        "extra": finding.is_ours,
    }


def _list(result: CheckResult) -> str:
    """All findings, for people."""
    lines = []
    for finding in result.findings:
        ours = " [not looked for by qemu-img]" if finding.is_ours else ""
        lines.append(f"{finding.kind}{ours}\n  {_line(finding)}\n")
        lines.append(f"  repair: {finding.repair or 'nothing is done about it'}\n")
    lines += [f"{kind}\n  {count} more\n" for kind, count in _left_out(result)]
    return "".join(lines) + ("\n" if lines else "")


def _summary(result: CheckResult) -> str:
    fixed = ", ".join(
        _number(count, word)
        for count, word in (
            (result.corruptions_fixed, "corruption"),
            (result.extra_corruptions_fixed, "corruption that qemu-img does not look for"),
            (result.leaks_fixed, "leaked cluster"),
        )
        if count
    )
    lines = [f"Repaired: {fixed}. The image was checked once more:"] if fixed else []
    if result.is_sound and not result.stopped:
        lines.append("Nothing is wrong with the image.")
    if result.corruptions:
        found = _number(result.corruptions, "corruption")
        lines.append(f"{found}: data may be lost, or will be when the image is written to.")
    if result.extra_corruptions:
        found = _number(result.extra_corruptions, "corruption")
        lines.append(f"{found} that qemu-img does not look for: data may be lost, or will be.")
    if result.leaks:
        lines.append(f"{_number(result.leaks, 'leaked cluster')}: space is wasted, data is in no danger.")
    if result.check_errors:
        lines.append(f"{_number(result.check_errors, 'place')} could not be checked.")
    if result.stopped:
        lines.append("The check stopped here, as it was asked to; there may be more.")
    elif result.total_clusters and result.allocated_clusters:
        lines.append(_use(result))
    if result.image_end_offset:
        lines.append(f"Image end offset: {result.image_end_offset}")
    return "\n".join(lines) + "\n"


def _use(result: CheckResult) -> str:
    allocated, total = result.allocated_clusters, result.total_clusters
    return (
        f"{allocated}/{total} = {100 * allocated / total:.2f}% allocated, "
        f"{100 * result.fragmented_clusters / allocated:.2f}% fragmented, "
        f"{100 * result.compressed_clusters / allocated:.2f}% compressed clusters"
    )


def _number(count: int, word: str) -> str:
    """As "1 leaked cluster", "2 leaked clusters"."""
    first, _, rest = word.partition(" that")
    plural = first if count == 1 else first + "s"
    return f"{count} {plural}" + (f" that{rest}" if rest else "")
