"""Any header becomes any other one of its image, and a crash leaves the one or the other; or nothing changes."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qcow2_plugin.engine.image_file import ImageFile, MetadataMap, Structure
from qcow2_plugin.errors import HeaderFullError
from qcow2_plugin.format.header import Header
from tests.crash.header_work import Said
from tests.support.crash_states import Crashes
from tests.support.depth import examples
from tests.support.fields import BITMAPS, DATA_FILE, FEATURE_NAMES, Extension
from tests.support.headers import header_bytes
from tests.support.recording import Log, RecordingStorage

KINDS = (BITMAPS, DATA_FILE, FEATURE_NAMES, 0x1111, 0x2222)
LENGTHS = st.sampled_from([0, 1, 8, 24, 100, 384, 400, 900])


@st.composite
def extensions(draw: st.DrawFn) -> list[Extension]:
    kinds = draw(st.lists(st.sampled_from(KINDS), unique=True))
    filler = draw(st.integers(1, 255))
    lengths = [48 * draw(st.integers(0, 9)) if kind == FEATURE_NAMES else draw(LENGTHS) for kind in kinds]
    return [Extension(kind, bytes([filler]) * length) for kind, length in zip(kinds, lengths, strict=True)]


@st.composite
def names(draw: st.DrawFn) -> bytes | None:
    length = draw(st.sampled_from([None, 1, 8, 300, 700, 1023]))
    return None if length is None else bytes([draw(st.integers(65, 90))]) * length


@st.composite
def clusters(draw: st.DrawFn) -> bytes:
    """A header cluster into which everything fits."""
    version = draw(st.sampled_from([2, 3]))
    told: dict[str, Any] = {"version": version, "cluster_bits": draw(st.sampled_from([12, 13, 16]))}
    if version == 3:
        told["header_length"] = draw(st.sampled_from([104, 112, 128, 600]))
    content = header_bytes(extensions=draw(extensions()), backing=draw(names()), length=1 << 16, **told)
    return content[: 1 << told["cluster_bits"]]


@examples(60)
@given(content=clusters(), more=st.lists(st.tuples(extensions(), names(), st.integers(1, 1 << 20)), min_size=1))
def test_a_header_becomes_another_one(content: bytes, more: list[tuple[list[Extension], bytes | None, int]]) -> None:
    try:
        header = Header.parse(content)
    except Exception:  # what was told did not fit
        return
    log = Log()
    storage = RecordingStorage(log, 0, content)
    file = ImageFile(storage, header, MetadataMap([(Structure.HEADER, np.zeros(1, dtype=np.int64))]))
    for wanted, name, size in more:
        before, start = bytes(storage.content), log.now
        target = file.header
        for known in target.extensions:
            target = target.with_extension(known.type, None)
        for each in wanted:
            target = target.with_extension(each.type, each.data)
        try:
            file.update_header(extensions=target.extensions, backing_file=name, size=size << 9)
        except HeaderFullError:
            assert (bytes(storage.content), log.now) == (before, start)
            continue
        file.barrier()
        old, new = Said.by(before), Said.by(storage.content)
        assert new.extensions == tuple(sorted((e.type, e.data) for e in wanted if e.type != FEATURE_NAMES))
        assert (new.facts.backing_name, new.facts.size) == (name or b"", size << 9)
        crashes = Crashes(Log(log.calls[start:]), (before,))
        for plan in crashes.plans():
            assert Said.by(crashes.state(plan).files[0].content()) in (old, new)
