"""The distinct values of an array of numbers, as the reading of tables needs them all the time."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

Number = TypeVar("Number", np.int64, np.uint64)


def distinct(*parts: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """The numbers of these arrays, each once, ascending.

    `np.unique` has them by hashing since 2.3, which takes ten times as long, and loads masked arrays for it.
    """
    numbers = np.sort(np.concatenate(parts) if len(parts) > 1 else parts[0])
    is_first = np.ones(len(numbers), dtype=np.bool_)
    np.not_equal(numbers[1:], numbers[:-1], out=is_first[1:])
    return numbers[is_first]
