"""Where a buffer holds something else than zeros, granule by granule.

Every chunk of an export passes here, so the usual case is quick: a few words of each granule show that there is
something, and only granules that look empty are read whole.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_SAMPLES = 4


def data_runs(buffer: memoryview, granule: int) -> list[tuple[int, int]]:
    """(start, end) of the runs of granules that are not all zeros; `buffer` is whole granules, of whole 512 bytes."""
    words = np.frombuffer(buffer, np.uint64).reshape(-1, granule // 8)
    is_data: npt.NDArray[np.bool_] = np.any(words[:, :: granule // 8 // _SAMPLES], axis=1)
    if is_data.all():
        return [(0, len(buffer))]
    looks_empty = np.flatnonzero(~is_data)
    is_data[looks_empty] = np.bitwise_or.reduce(words[looks_empty], axis=1) != 0
    edges = np.flatnonzero(np.diff(is_data, prepend=False, append=False)) * granule
    bounds: list[int] = edges.tolist()
    return list(zip(bounds[::2], bounds[1::2], strict=True))
