"""The header: packing gives the bytes back, and no bytes at all do more than raise this package's errors."""

from __future__ import annotations

import itertools
import struct
import time
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qcow2_plugin.errors import Qcow2Error
from qcow2_plugin.format.header import Header, header_cluster_size
from tests.support.depth import examples
from tests.support.fields import (
    BACKING_FORMAT,
    BITMAPS,
    DATA_FILE,
    ENCRYPTION,
    FEATURE_NAMES,
    HEADER_FIELDS,
    Extension,
)
from tests.support.headers import header_bytes

UINT64 = st.integers(0, 2**64 - 1)
KNOWN = [0, BACKING_FORMAT, ENCRYPTION]
EXTENSIONS = st.builds(
    Extension,
    st.one_of(st.sampled_from([DATA_FILE, FEATURE_NAMES, BITMAPS]), st.integers(1, 2**32 - 1)).filter(
        lambda kind: kind not in KNOWN
    ),
    st.binary(max_size=100),
    padding=st.integers(0, 255),
)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """Any valid header cluster: both versions, every geometry, unknown fields, bits and extensions."""
    cluster_bits = draw(st.integers(11, 16))
    version = draw(st.sampled_from([2, 3]))
    extensions = draw(st.lists(EXTENSIONS, max_size=5))
    if draw(st.booleans()):
        padding = draw(st.integers(0, 255))
        extensions.append(Extension(BACKING_FORMAT, draw(st.binary(max_size=15)), padding=padding))
    aligned = st.integers(0, 2**39).map(lambda cluster: cluster << cluster_bits)
    size = draw(st.one_of(st.just(0), st.integers(0, 1 << 33)))
    needed = -(-(size & ~511) // (1 << 2 * cluster_bits - 4))
    told: dict[str, int] = {
        "size": size,
        "l1_size": draw(st.integers(needed, 4 << 20)),
        "l1_table_offset": draw(aligned),
        "refcount_table_offset": draw(aligned),
        "refcount_table_clusters": draw(st.integers(1, (8 << 20) >> cluster_bits)),
        "nb_snapshots": draw(st.integers(0, 65536)),
        "snapshots_offset": draw(aligned),
        "crypt_method": draw(st.sampled_from([0, 0, 1, 2])),
    }
    if told["crypt_method"] == 2:
        extensions.append(Extension(ENCRYPTION, struct.pack(">QQ", 1 << cluster_bits, draw(st.integers(0, 2**40)))))
    header_length, tail = 112, b""
    if version == 3:
        header_length = draw(st.sampled_from([104, 112, 120, 160]))
        tail = draw(st.binary(max_size=header_length - 112)) if header_length > 112 else b""
        compression = draw(st.integers(0, 1)) if header_length > 104 else 0
        extended = draw(st.booleans()) if cluster_bits >= 14 else False
        told |= {
            "incompatible_features": draw(UINT64) & ~(1 << 3 | 1 << 4) | compression << 3 | extended << 4,
            "compatible_features": draw(UINT64),
            "autoclear_features": draw(UINT64),
            "refcount_order": draw(st.integers(0, 6)),
            "compression_type": compression,
        }
    return header_bytes(
        version=version,
        cluster_bits=cluster_bits,
        extensions=draw(st.permutations(extensions)),
        end_marker=draw(st.booleans()),
        backing=draw(st.one_of(st.none(), st.binary(max_size=200))),
        header_length=header_length,
        tail=tail,
        **told,
    )


@given(headers())
@examples(300)
def test_packing_gives_the_bytes_back(cluster: bytes) -> None:
    header = Header.parse(cluster)
    packed = header.pack()
    assert cluster.startswith(packed)
    assert not any(cluster[len(packed) :])
    assert Header.parse(packed.ljust(len(cluster), b"\0")) == header


def look_at(cluster: bytes) -> None:
    """Everything that can be asked of a header; only this package's errors are allowed."""
    try:
        header_cluster_size(cluster)
        header = Header.parse(cluster)
    except Qcow2Error:
        return
    assert cluster.startswith(header.pack()[:72]) or header.backing_file is None
    assert header.virtual_size % 512 == 0
    assert header.l1_size <= 4 << 20
    assert header.snapshot_count <= 65536
    assert all(table.host_offset + table.length < 2**63 for table in header.tables)
    asks: list[Callable[[], object]] = [header.require_known_features, lambda: header.bitmaps]
    for ask in asks:
        try:
            ask()
        except Qcow2Error as error:
            assert str(error).isprintable()
    assert (header.encryption is None) == (header.encryption_method.value != 2)


@given(st.binary(max_size=600))
@example(b"")
@examples(200)
def test_arbitrary_bytes(cluster: bytes) -> None:
    look_at(cluster)


@given(st.binary(max_size=600), st.sampled_from([2, 3]), st.integers(9, 21))
@examples(300)
def test_arbitrary_bytes_behind_a_sound_start(rest: bytes, version: int, cluster_bits: int) -> None:
    look_at(b"QFI\xfb" + struct.pack(">IQII", version, 0, 0, cluster_bits) + rest)


@given(headers(), st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=6), st.integers(0, 1 << 16))
@examples(300)
def test_a_sound_header_with_some_bytes_changed_and_cut(
    cluster: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    changed = bytearray(cluster)
    for position, value in changes:
        changed[position] = value
    look_at(bytes(changed))
    look_at(bytes(changed[:length]))


@given(headers(), st.integers(0, 200))
def test_every_cut_of_a_sound_header(cluster: bytes, length: int) -> None:
    look_at(cluster[:length])


def extremes(name: str) -> list[int]:
    largest = 2 ** (8 * struct.calcsize(HEADER_FIELDS[name][1])) - 1
    return [0, 1, largest - 1, largest]


@pytest.mark.parametrize("version", [2, 3])
def test_every_field_at_its_extremes_alone_and_with_another(version: int) -> None:
    """Security A20, for the parser."""
    sound = header_bytes(
        version=version, cluster_bits=9, size=0, l1_size=1, backing=b"base", extensions=[Extension(DATA_FILE, b"name")]
    )
    settings = [(name, value) for name in HEADER_FIELDS for value in extremes(name)]
    count = 0
    start = time.thread_time()
    for first, second in itertools.product(settings, repeat=2):
        if first[0] > second[0]:
            continue
        changed = bytearray(sound)
        for name, value in (first, second):
            offset, code = HEADER_FIELDS[name]
            struct.pack_into(">" + code, changed, offset, value)
        look_at(bytes(changed))
        count += 1
    assert count > 2500
    assert time.thread_time() - start < 0.01 * count
