"""Strategies for L2 words: everything that fits in 64 bits, and more often what comes close to making sense.

Written from the published format, independent of qcow2_plugin.
"""

from __future__ import annotations

from hypothesis import strategies as st

from tests.support.fields import ALL_PARTS, COMPRESSED, COPIED, ZERO

_FLAGS = st.sampled_from([0, 0, 0, COPIED, COPIED, ZERO, ZERO | COPIED])
_RESERVED = st.sampled_from([0, 0, 0, 0, 0, 2, 0x1FE, 1 << 56, 0x3F << 56])


@st.composite
def words(draw: st.DrawFn, cluster_bits: int, clusters: int = 64) -> int:
    """An L2 entry; the plausible ones point into the first `clusters` host clusters, or just past them."""
    host_offset: int
    copied: int
    sectors: int
    shape = draw(st.integers(0, 9))
    if shape == 0:
        return draw(st.integers(0, 2**64 - 1))
    if shape == 1:
        return draw(_FLAGS)
    if shape in (2, 3):
        offset_bits = 70 - cluster_bits
        sectors = draw(st.one_of(st.integers(0, 3), st.integers(0, 2 ** (62 - offset_bits) - 1)))
        sectors = min(sectors, 2 ** (62 - offset_bits) - 1)
        host_offset = draw(st.integers(0, (clusters + 2) << cluster_bits))
        copied = draw(st.sampled_from([0, 0, 0, 0, 0, COPIED]))
        return COMPRESSED | sectors << offset_bits | host_offset | copied
    host_offset = draw(st.integers(0, clusters + 1)) << cluster_bits
    if shape == 4:  # anywhere, mostly not at the start of a cluster
        host_offset = draw(st.integers(0, 2**47)) << 9 & 2**56 - 1
    return host_offset | draw(_FLAGS) | draw(_RESERVED)


@st.composite
def bitmaps(draw: st.DrawFn) -> int:
    """The second word of an extended entry."""
    shape = draw(st.integers(0, 6))
    if shape == 0:
        return draw(st.integers(0, 2**64 - 1))
    if shape in (1, 2):
        return draw(st.sampled_from([0, ALL_PARTS, ALL_PARTS << 32]))
    allocated = draw(st.integers(0, ALL_PARTS))
    zero = draw(st.integers(0, ALL_PARTS)) & ~allocated
    return allocated * (shape != 3) | zero << 32
