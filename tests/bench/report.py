"""Rounds in, tables out: medians, per-round ratios, markdown for a README, JSON for machines.

Refuses to know how a figure was measured and whether it is good.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .processes import output_of


class Unit(NamedTuple):
    """What a figure counts, and whether more of it is better."""

    name: str
    more_is_better: bool


REQUESTS = Unit("req/s", True)
MEBIBYTES_PER_SECOND = Unit("MiB/s", True)
MILLISECONDS = Unit("ms", False)
MEBIBYTES = Unit("MiB", False)


class Row(NamedTuple):
    """One workload: for each contender, in the order of the columns, one figure per round. Ours comes first."""

    name: str
    unit: Unit
    rounds: Mapping[str, list[float]]

    def medians(self) -> dict[str, float]:
        """Each contender's median figure."""
        return {contender: statistics.median(figures) for contender, figures in self.rounds.items()}

    def ratios(self) -> dict[str, list[float]]:
        """For each other contender, round by round, how many times better ours was in that same round."""
        ours, *others = self.rounds
        more = self.unit.more_is_better
        return {
            other: [
                mine / theirs if more else theirs / mine
                for mine, theirs in zip(self.rounds[ours], self.rounds[other], strict=True)
            ]
            for other in others
        }


@dataclass
class Section:
    """One table. `compared` False leaves the ratio columns out."""

    title: str
    note: str
    compared: bool = True
    rows: list[Row] = field(default_factory=list)


def interleave(rounds: int, name: str, contenders: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """A B C, A B C, ...: every contender once per round, so that a slow minute of the machine hits all of them."""
    figures: dict[str, list[float]] = {contender: [] for contender in contenders}
    for number in range(1, rounds + 1):
        for contender, measure in contenders.items():
            figures[contender].append(measure())
        told = ", ".join(f"{contender} {shown(values[-1])}" for contender, values in figures.items())
        progress(f"{name} [{number}/{rounds}] {told}")
    return figures


def progress(line: str) -> None:
    """Tell the person who waits; standard output stays for the tables."""
    print(line, file=sys.stderr, flush=True)


def machine() -> dict[str, str]:
    """What the figures depend on, without anything that names the machine or its owner."""
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "nbdkit": version_of("nbdkit"),
        "qemu": version_of("qemu-img"),
        "fio": version_of("fio"),
    }


def version_of(program: str) -> str:
    """The first dotted number that `program --version` prints."""
    found = re.search(r"\d+(\.\d+)+", output_of([program, "--version"]))
    return found.group() if found else "unknown"


def markdown(header: Mapping[str, str], how: str, sections: list[Section]) -> str:
    """The whole report, ready to paste."""
    facts = ", ".join(f"{value} cores" if name == "cores" else f"{name} {value}" for name, value in header.items())
    return "\n\n".join([f"Measured with {facts}. {how}", *(table(section) for section in sections if section.rows)])


def table(section: Section) -> str:
    """One section: a column per contender, and beside each one that is not ours how many times better ours was."""
    contenders = list(dict.fromkeys(contender for row in section.rows for contender in row.rounds))
    columns = ["", contenders[0]]
    for other in contenders[1:]:
        columns += [other, f"ours vs {other}"] if section.compared else [other]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for row in section.rows:
        medians, ratios = row.medians(), row.ratios()
        cells = [row.name, figure(medians.get(contenders[0]), row.unit)]
        for other in contenders[1:]:
            cells.append(figure(medians.get(other), row.unit))
            if section.compared:
                cells.append(f"**{statistics.median(ratios[other]):.2f} x**" if other in ratios else "")
        lines.append(cells)
    drawn = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"**{section.title}.** {section.note}\n\n{drawn}"


def figure(value: float | None, unit: Unit) -> str:
    """A figure with its unit, or an empty cell where a contender does not take part."""
    return "" if value is None else f"{shown(value)} {unit.name}"


def shown(value: float) -> str:
    """Three digits that matter."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def as_json(header: Mapping[str, str], options: Mapping[str, object], sections: list[Section]) -> dict[str, object]:
    """Everything that was measured, every round of it."""
    return {
        "machine": dict(header),
        "options": dict(options),
        "sections": [
            {
                "title": section.title,
                "rows": [
                    {
                        "name": row.name,
                        "unit": row.unit.name,
                        "more_is_better": row.unit.more_is_better,
                        "rounds": dict(row.rounds),
                        "medians": row.medians(),
                        "ratios": {
                            other: {"rounds": ratios, "median": statistics.median(ratios)}
                            for other, ratios in (row.ratios() if section.compared else {}).items()
                        },
                    }
                    for row in section.rows
                ],
            }
            for section in sections
        ],
    }
