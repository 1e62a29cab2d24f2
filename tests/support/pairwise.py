"""Few rows that together hold every pair of options: most bugs of combinations need no more than two of them.

It owns the choice of rows, which is the same in every run. It refuses to know what the options mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

Row = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]


def pairwise(factors: Mapping[str, Sequence[str]], conflicts: Callable[[Row], bool]) -> list[Row]:
    """Rows with one value of each factor; every pair of values is in one of them unless it conflicts.

    `conflicts` is asked about rows that are not complete yet, too. The first value of each factor must get along with
    everything that the others leave possible.
    """
    missing = [pair for pair in _pairs(factors) if not conflicts(dict(pair))]
    covered: set[Pair] = set()
    rows = []
    for pair in missing:
        if pair in covered:
            continue
        row = dict(pair)
        for name, values in factors.items():
            if name not in row:
                row[name] = _most_useful(row, name, values, covered, conflicts)
        row = {name: row[name] for name in factors}
        covered.update(itertools.combinations(row.items(), 2))
        rows.append(row)
    return rows


def _pairs(factors: Mapping[str, Sequence[str]]) -> list[Pair]:
    """All pairs, in the order of the factors."""
    options = [[(name, value) for value in values] for name, values in factors.items()]
    return [pair for first, second in itertools.combinations(options, 2) for pair in itertools.product(first, second)]


def _most_useful(
    row: Row, name: str, values: Sequence[str], covered: set[Pair], conflicts: Callable[[Row], bool]
) -> str:
    """The value that adds the most new pairs to the row."""
    possible = [value for value in values if not conflicts({**row, name: value})]
    assert possible, f"no value of {name} fits {row}"

    def new_pairs(value: str) -> int:
        mine = (name, value)
        return sum((other, mine) not in covered and (mine, other) not in covered for other in row.items())

    return max(possible, key=new_pairs)
