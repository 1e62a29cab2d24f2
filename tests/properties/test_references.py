"""What is done to whole arrays agrees with what is done to one entry, one cluster, one refcount after the other."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2_plugin.engine.allocator import Allocator
from qcow2_plugin.engine.header import read_header
from qcow2_plugin.engine.image_file import ImageFile, MetadataMap, Structure
from qcow2_plugin.engine.internal_snapshots import reaching
from qcow2_plugin.engine.internal_snapshots.differing import differing_ranges
from qcow2_plugin.engine.internal_snapshots.reaching import references, table_batches
from qcow2_plugin.engine.internal_snapshots.snapshots import read_snapshots
from qcow2_plugin.engine.metadata import read_metadata
from qcow2_plugin.errors import CorruptImageError
from qcow2_plugin.format.entries import COMPRESSED, OFFSET_MASK, compressed_location
from qcow2_plugin.format.geometry import Geometry
from tests.support.builder import ImageBuilder
from tests.support.depth import examples
from tests.support.memory_storage import MemoryStorage

GEOMETRIES = st.sampled_from([Geometry(9), Geometry(12), Geometry(14, extended_l2=True)])


def entry(chance: random.Random, geometry: Geometry, spread: int) -> int:
    """Any entry, mostly one that makes sense, of clusters near each other or far apart."""
    kind = chance.random()
    cluster = chance.randrange(1, spread)
    if kind < 0.3:
        return 0
    if kind < 0.45:
        sectors = chance.randrange(1 << geometry.cluster_bits - 8)
        place = cluster << geometry.cluster_bits | chance.randrange(geometry.cluster_size)
        return COMPRESSED | sectors << 70 - geometry.cluster_bits | place
    if kind < 0.55:
        return chance.getrandbits(64)
    return chance.choice([0, 1, 1 << 63, 1 << 63 | 1]) | cluster << geometry.cluster_bits


def counted_one_by_one(words: list[int], geometry: Geometry, times: int, counts: dict[int, int]) -> None:
    bits = geometry.cluster_bits
    for word in words[:: 2 if geometry.extended_l2 else 1]:
        if word & COMPRESSED:
            place, length = compressed_location(word, bits)
            clusters = range(place >> bits, (place + length - 1 >> bits) + 1)
        else:
            place = word & OFFSET_MASK
            has_cluster = place and not place % geometry.cluster_size
            clusters = range(place >> bits, (place >> bits) + 1) if has_cluster else range(0)
        for cluster in clusters:
            counts[cluster] = counts.get(cluster, 0) + times


@given(GEOMETRIES, st.integers(0, 2**32), st.sampled_from([300, 5000, 1 << 40]), st.sampled_from([1, 1 << 13, 1 << 20]))
@examples(40)
def test_references_of_whole_tables(geometry: Geometry, seed: int, spread: int, batch_size: int) -> None:
    chance = random.Random(seed)
    content = bytearray()
    expected: dict[int, int] = {}
    names: list[int] = []
    for table in range(6):
        words = [entry(chance, geometry, spread) for _ in range(geometry.cluster_size // 8)]
        if chance.random() < 0.3:  # in line
            step = 2 if geometry.extended_l2 else 1
            words[::step] = [(spread + number) << geometry.cluster_bits for number in range(geometry.l2_entries)]
        content += np.array(words, dtype=">u8").tobytes()
        times = chance.choice([0, 1, 1, 1, 2, 5])
        names += [table] * times
        if times:
            counted_one_by_one(words, geometry, times, expected)
    chance.shuffle(names)
    found: dict[int, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reaching, "_BATCH_SIZE", batch_size)
        for batch in table_batches(MemoryStorage(content), np.array(names, dtype=np.int64), geometry):
            clusters, counts = references(batch, geometry)
            assert (np.diff(clusters) > 0).all()
            for cluster, count in zip(clusters.tolist(), counts.tolist(), strict=True):
                found[cluster] = found.get(cluster, 0) + count
    assert found == expected


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_counting_up_and_down(bits: int, tmp_path: Path) -> None:
    chance = random.Random(bits)
    most = (1 << bits) - 1
    image = ImageBuilder(1 << 20, 9, refcount_bits=bits)
    known = {cluster: min(chance.choice([0, 1, 1, 3, most // 2 + 1, most - 1, most]), most) for cluster in range(900)}
    for cluster, count in known.items():
        image.refcount(cluster, count)
    storage = MemoryStorage(image.build(tmp_path / "image").path.read_bytes())
    header = read_header(storage)
    allocator, model = Allocator(ImageFile(storage, header, read_metadata(storage, header))), dict(known)
    for _ in range(300):
        is_up, is_sound = chance.random() < 0.5, chance.random() < 0.7
        chosen = {cluster: chance.choice([1, 1, 2]) for cluster in sorted(chance.sample(range(900), 40))}
        if is_sound:
            room = {each: min(model[each], most - model[each]) if is_up else model[each] for each in chosen}
            chosen = {each: min(count, room[each]) for each, count in chosen.items() if room[each]}
        clusters, counts = (np.array(list(each), dtype=np.int64) for each in (chosen.keys(), chosen.values()))
        is_low = any(model[cluster] < count for cluster, count in chosen.items())
        is_high = is_up and any(model[cluster] + count > most for cluster, count in chosen.items())
        change = allocator.count_up if is_up else allocator.count_down
        if is_low or is_high:
            with pytest.raises((CorruptImageError, OverflowError)):
                change(clusters, counts)
            allocator._file.failure = None
        else:
            change(clusters, counts)
            for cluster, count in chosen.items():
                model[cluster] += count if is_up else -count
        assert allocator.refcounts_of(np.arange(900)).tolist() == list(model.values())


@given(st.integers(0, 2**32))
@examples(30)
def test_the_map_of_structures(seed: int) -> None:
    chance = random.Random(seed)
    owners = {cluster: Structure.L2_TABLE for cluster in chance.sample(range(60), 10)}
    kept = set(chance.sample(range(60), 5))
    snapshot_tables = np.array(sorted(kept - owners.keys()), dtype=np.int64)
    found = MetadataMap(
        [
            (Structure.L2_TABLE, np.array(sorted(owners), dtype=np.int64)),
            (Structure.SNAPSHOT_L2_TABLE, snapshot_tables),
            (Structure.HEADER, np.array([100])),
        ],
        np.array(sorted(kept), dtype=np.int64),
    )
    owners.update({cluster: Structure.SNAPSHOT_L2_TABLE for cluster in kept - owners.keys()})
    for _ in range(20):
        chosen = chance.sample(range(60), chance.randrange(1, 8))
        step = chance.randrange(3)
        if step == 0:
            found.claim_all(Structure.L2_TABLE, np.array(chosen, dtype=np.int64))
            owners.update(dict.fromkeys(chosen, Structure.L2_TABLE))
        elif step == 1:
            found.release(chosen)
            for cluster in chosen:
                if owners.pop(cluster, None) and cluster in kept:
                    owners[cluster] = Structure.SNAPSHOT_L2_TABLE
        else:
            chosen = [cluster for cluster in chosen if cluster in owners]
            found.keep(np.array(chosen, dtype=np.int64))
            for cluster in kept - set(chosen):
                if owners.get(cluster) == Structure.SNAPSHOT_L2_TABLE:
                    del owners[cluster]
            kept = set(chosen)
        assert [found.owner(cluster) for cluster in range(60)] == [owners.get(cluster, 0) for cluster in range(60)]
        some = np.array(sorted(chance.sample(range(60), chance.randrange(0, 6))), dtype=np.int64)
        assert found.any_in(some) == any(cluster in owners for cluster in some.tolist())
        assert found.kept.tolist() == sorted(kept)


@given(st.integers(0, 2**32), st.booleans())
@examples(20)
def test_where_a_snapshot_differs(seed: int, is_extended: bool) -> None:
    """Told cluster by cluster: what neither has stored, or both have in one place, is the same."""
    chance = random.Random(seed)
    bits = 14 if is_extended else 9
    size = 1 << bits
    image = ImageBuilder(300 * size, bits, extended_l2=is_extended)
    then = image.map(chance.choice([150, 300, 400]) * size)
    expected = set()
    for cluster in range(300):
        if chance.random() < 0.1:
            image.data(cluster, b"now")
            expected.add(cluster)
        if chance.random() < 0.1 and cluster * size < then.virtual_size:
            then.data(cluster, b"then")
            expected.add(cluster)
    image.snapshot(b"1", b"then", then)
    with tempfile.TemporaryDirectory() as folder:
        storage = MemoryStorage(image.build(Path(folder) / "image").path.read_bytes())
    header = read_header(storage)
    (snapshot,) = read_snapshots(storage, header)
    found = list(differing_ranges(storage, header, snapshot))
    assert found == sorted(found)
    assert {cluster for start, end in found for cluster in range(start // size, end // size)} == expected
