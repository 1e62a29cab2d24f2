"""What the clusters of a member hold, held against a list; and images of every size, in closed form."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2_plugin.errors import OptionError
from qcow2_plugin.format import member_layout
from qcow2_plugin.format.entries import COPIED, OFFSET_MASK, ZERO
from qcow2_plugin.format.geometry import Geometry
from qcow2_plugin.format.member_layout import ClusterUses, MemberLayout

SMALL = Geometry(9)  # 64 entries an L2 table

Marks = st.lists(st.tuples(st.booleans(), st.integers(0, 700), st.integers(0, 400)), max_size=8)


@given(Marks, st.integers(1, 700), st.sampled_from([64, 256]))
def test_uses_are_a_list_of_uses(marks: list[tuple[bool, int, int]], cluster_count: int, stretch: int) -> None:
    before, member_layout._STRETCH = member_layout._STRETCH, stretch
    try:
        uses = ClusterUses(SMALL, cluster_count * 512)
        wanted = ["nothing"] * cluster_count
        for is_data, start, length in marks:
            first, end = min(start, cluster_count), min(start + length, cluster_count)
            (uses.mark_data if is_data else uses.mark_zero)(first, end)
            wanted[first:end] = ["data" if is_data else "zero"] * (end - first)
        data = [(run.first + step, run.rank + step) for run in uses.data_runs() for step in range(run.cluster_count)]
        zeros = [first + step for first, count in uses.zero_runs() for step in range(count)]
        assert data == [
            (cluster, rank) for rank, cluster in enumerate(place for place, use in enumerate(wanted) if use == "data")
        ]
        assert zeros == [cluster for cluster, use in enumerate(wanted) if use == "zero"]
        assert uses.count_data() == len(data)
        in_use = {cluster // 64 for cluster, use in enumerate(wanted) if use != "nothing"}
        assert in_use <= set(uses.indexes())
        check_front(uses, wanted)
    finally:
        member_layout._STRETCH = before


def check_front(uses: ClusterUses, wanted: list[str]) -> None:
    """Follow the tables, as a reader would, to every cluster."""
    layout = MemberLayout(uses)
    front = b"".join(layout.front(b"header"))
    assert len(front) == layout.data_offset
    l1 = np.frombuffer(front, ">u8", layout.l1_size, layout.l1_table_offset)
    data_offset = layout.data_offset
    for cluster, use in enumerate(wanted):
        l2_offset = int(l1[cluster // 64]) & OFFSET_MASK
        entry = int(np.frombuffer(front, ">u8", 64, l2_offset)[cluster % 64]) if l2_offset else 0
        if use == "data":
            assert entry == COPIED | data_offset
            data_offset += 512
        else:
            assert entry == (ZERO if use == "zero" else 0)
    assert data_offset == layout.file_size
    table = np.frombuffer(front, ">u8", layout.refcount_table_clusters * 64, layout.refcount_table_offset)
    refcounts = np.concatenate([np.frombuffer(front, ">u2", 256, int(offset)) for offset in table if offset])
    used = layout.file_size // 512
    assert (refcounts[:used] == 1).all()
    assert not refcounts[used:].any()


def test_what_is_all_alike_takes_no_memory() -> None:
    tracemalloc.start()
    uses = ClusterUses(Geometry(16), 64 << 40)
    uses.mark_data(0, 1 << 30)
    assert uses.count_data() == 1 << 30
    assert next(uses.data_runs()).cluster_count == 1 << 16
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_disk_that_cannot_be_is_refused() -> None:
    with pytest.raises(OptionError, match="too large"):
        ClusterUses(SMALL, 1 << 50)
