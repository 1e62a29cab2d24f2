"""Whole images, written in every order: after each request the disk is what it was told to be, however it is read, its
map says the same in both ways of asking and is true, a raw data file is the disk; and what was flushed is on disk."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from qcow2_plugin.errors import OutOfRangeError, ResizeError
from qcow2_plugin.extent import Extent, ExtentKind, merge
from tests.support.agreement import assert_tiles
from tests.support.builder import ImageBuilder
from tests.support.depth import examples
from tests.support.fields import ALL_PARTS
from tests.support.image_checker import BITMAP_AUTO, BITMAP_IN_USE, Report
from tests.support.in_memory import InMemory, hide_nothing
from tests.support.model import Model, Places

STEPS = 20
SNAPSHOT = "1"
IS_DEEP = settings().max_examples > 100
SEEDS = st.integers(0, 2**32 - 1)
PHASES = tuple(Phase) if IS_DEEP else (Phase.explicit, Phase.generate)  # looking for less takes hundreds of runs

pytestmark = pytest.mark.timeout(3600 if IS_DEEP else 120)


@dataclass(frozen=True)
class Form:
    """What all images of a test have in common."""

    cluster_bits: tuple[int, ...] = (9, 9, 10, 12)
    version: int = 3
    extended: bool = False
    data_file: str = ""
    has_snapshot: bool = False
    has_bitmap: bool = False

    @property
    def kinds(self) -> list[str]:
        """What clusters may be."""
        kinds = ["data", "data", "none"] + ["zero", "kept"] * (self.version == 3)
        kinds += [] if self.data_file else ["packed"]
        return kinds + ["parts"] * 3 * self.extended


FORMS = {
    "standard": Form(),
    "version 2": Form(version=2),
    "extended": Form((14,), extended=True),
    "data file": Form((9, 10), data_file="plain"),
    "raw data file": Form((9, 10), data_file="raw"),
    "extended in a data file": Form((14,), extended=True, data_file="plain"),
    "extended in a raw data file": Form((14,), extended=True, data_file="raw"),
    "snapshot": Form(has_snapshot=True),
    "extended and snapshot": Form((14,), extended=True, has_snapshot=True),
    "bitmaps": Form((9, 10), has_bitmap=True),
}


class Disk(RuleBasedStateMachine):
    """The state machine. `form` and `folder` are set by whoever runs it."""

    form: Form
    folder: Path

    @initialize(data=st.data())
    def make(self, data: st.DataObject) -> None:
        form = self.form
        bits = data.draw(st.sampled_from(form.cluster_bits))
        clusters = 14 if form.extended else data.draw(st.sampled_from([1, 70, 150]))
        refcount_bits = data.draw(st.sampled_from([16, 16, 4 if form.has_snapshot else 1, 8, 64]))
        compression = data.draw(st.sampled_from(["deflate", "zstd"]))
        if form.version == 2:
            refcount_bits, compression = 16, "deflate"
        size = 1 << bits
        image = ImageBuilder(
            clusters * size - data.draw(st.sampled_from([0, 512 % size])),
            bits,
            version=form.version,
            extended_l2=form.extended,
            refcount_bits=refcount_bits,
            compression=compression,
            pack=refcount_bits > 4,
        )
        if form.data_file:
            image.data_file(self.folder / "data", b"data", raw=form.data_file == "raw")
        chance = random.Random(data.draw(st.integers(0, 2**32)))
        fill(image, clusters, form.kinds, chance)
        if form.has_snapshot:
            image.snapshot(SNAPSHOT.encode(), b"then")
        if form.has_bitmap:
            image.bitmap(b"kept", [(0, 1)], granularity_bits=9, flags=BITMAP_AUTO)
            image.bitmap(b"disabled", [(0, 1)], granularity_bits=12)
        backing = None
        if form.data_file != "raw" and data.draw(st.booleans()):
            length = data.draw(st.sampled_from([0, 1, clusters * size // 2 + 77, clusters * size + 9000]))
            backing = chance.randbytes(length)
        view = image.expected(backing or b"")
        if form.data_file == "raw":
            hide_nothing(image)
        cache_size = data.draw(st.sampled_from([0, 3000, 20000, 1 << 22]))
        note(f"{image.virtual_size} bytes, {bits=} {refcount_bits=} {cache_size=} backing={backing and len(backing)}")
        self.then = view if form.has_snapshot else None
        self.first_view = view
        self.smallest = len(view)
        self.memory = InMemory(image, self.folder, backing=backing, cache_size=cache_size)
        self.model = Model(len(view), size, content=view, discards=form.version > 2 or backing is None)
        self.places = Places(size, size // 32 if form.extended else size, (image.l2_entries * size,))
        self.chance = chance
        self.steps = 0

    # ---- rules

    def chance_of(self, seed: int) -> random.Random:
        """The same seed makes other requests in another step."""
        self.steps += 1
        return random.Random(f"{seed}/{self.steps}")

    @rule(seed=SEEDS, count=st.integers(1, 12), then=st.sampled_from(["", "", "flush", "reopen"]))
    def change(self, seed: int, count: int, then: str) -> None:
        chance = self.chance_of(seed)
        for _ in range(count):
            pick = chance.random()
            if pick < 0.1:
                self.write_durably(chance)
            elif pick < 0.2:
                self.zero_fast(chance)
            else:
                request = self.places.request(chance, self.model.virtual_size)
                note(str(request))
                request.apply(self.memory.disk)
                self.model.apply(request)
            self.look()
        if then == "flush":
            self.memory.disk.flush()
            assert self.memory.view() == self.model.read(0, self.model.virtual_size)
        elif then == "reopen":
            self.close()
            self.memory.reopen()

    def write_durably(self, chance: random.Random) -> None:
        offset, length = self.places.range(chance, self.model.virtual_size)
        data = chance.randbytes(length)
        note(f"write {length} bytes at {offset} durably")
        self.memory.disk.write_from(data, offset, durable=True)
        self.model.write(offset, data)
        assert self.memory.view() == self.model.read(0, self.model.virtual_size)

    def zero_fast(self, chance: random.Random) -> None:
        """Done, or refused and nothing has changed."""
        offset, length = self.places.range(chance, self.model.virtual_size)
        note(f"zero {length} bytes at {offset}, only if that is fast")
        try:
            self.memory.disk.write_zeroes(offset, length, may_unmap=chance.random() < 0.5, only_fast=True)
        except OSError:
            return
        self.model.zero(offset, offset + length)

    @rule(seed=SEEDS, preallocation=st.sampled_from(["off", "off", "metadata", "falloc"]))
    def resize(self, seed: int, preallocation: str) -> None:
        size = self.new_size(self.chance_of(seed))
        needs_room = size > self.model.virtual_size
        if not needs_room or (self.memory.backing is not None and not self.form.extended):
            preallocation = "off"
        note(f"resize to {size} with preallocation {preallocation}")
        self.memory.disk.resize(size, allow_shrink=True, preallocation=preallocation)
        self.model.resize(size)
        self.smallest = min(self.smallest, size)

    @rule(offset=st.integers(-2, 1), length=st.integers(1, 600))
    def refuse(self, offset: int, length: int) -> None:
        """What is not inside the disk, and a size that would cut it."""
        disk, size = self.memory.disk, self.model.virtual_size
        with pytest.raises(ResizeError):
            disk.resize(size - 512)
        offset = offset if offset < 0 else size - length + 1 + offset
        with pytest.raises(OutOfRangeError):
            disk.pwrite(bytes(length), offset)
        with pytest.raises(OutOfRangeError):
            disk.write_zeroes(offset, length)
        with pytest.raises(OutOfRangeError):
            disk.discard(offset, length)

    def new_size(self, chance: random.Random) -> int:
        """In sectors, around the size of now, or many times as much."""
        size = self.model.virtual_size
        if chance.random() < 0.1 and size < 1 << 20:
            return size * 5
        unit = chance.choice([512, self.model.cluster_size])
        size = min(size, 1 << 20) + chance.randint(-20, 25) * unit
        return max(size // unit * unit, 512)

    # ---- what must hold

    @invariant()
    def look(self) -> None:
        self.it_reads_as_it_was_told()
        self.its_map_is_true()
        self.its_raw_data_file_is_the_disk()

    def it_reads_as_it_was_told(self) -> None:
        disk, size = self.memory.disk, self.model.virtual_size
        assert disk.virtual_size == size
        assert disk.pread(size, 0) == self.model.read(0, size)
        for _ in range(5):
            offset, length = self.places.range(self.chance, size)
            found = bytearray(b"\xa5" * (length + 2))
            disk.read_into(memoryview(found)[1:-1], offset)
            assert found == b"\xa5" + self.model.read(offset, length) + b"\xa5"

    def its_map_is_true(self) -> None:
        """Both ways of asking tell the same, and what they tell is so."""
        disk, size = self.memory.disk, self.model.virtual_size
        extents = list(disk.extents(whole_chain=False))
        assert_tiles(extents, size)
        assert normal(extents) == normal(disk.written.resolve(0, size))
        storage = self.memory.data or self.memory.storage
        for extent in extents:
            wanted = self.model.read(extent.guest_offset, extent.length)
            if extent.kind is ExtentKind.DATA:
                assert extent.host_offset is not None
                assert storage.pread(extent.length, extent.host_offset).ljust(extent.length, b"\0") == wanted
            elif extent.kind is ExtentKind.ZERO or (
                extent.kind is ExtentKind.UNALLOCATED and self.memory.backing is None
            ):
                assert not any(wanted)

    def its_raw_data_file_is_the_disk(self) -> None:
        if self.form.data_file == "raw":
            assert self.memory.data is not None
            size = self.model.virtual_size
            assert self.memory.data.pread(size, 0).ljust(size, b"\0") == self.model.read(0, size)

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.close()

    def close(self) -> None:
        """The file is as if nobody had ever left it in a hurry."""
        self.memory.disk.close()
        report = self.memory.assert_clean()
        assert self.memory.view() == self.model.read(0, self.model.virtual_size)
        if self.then is not None:
            assert self.memory.view(SNAPSHOT) == self.then
        if self.form.has_bitmap:
            self.assert_bitmaps_tell(report)

    def assert_bitmaps_tell(self, report: Report) -> None:
        """The enabled one all that has changed since it was made, the disabled one what it told then."""
        kept, disabled = report.bitmaps
        assert (kept.flags, disabled.flags) == (BITMAP_AUTO, 0), BITMAP_IN_USE
        assert kept.granules is not None and disabled.granules == frozenset({0})
        for sector in range(min(self.smallest, self.model.virtual_size) // 512):
            if self.model.read(sector * 512, 512) != self.first_view[sector * 512 : (sector + 1) * 512]:
                assert sector in kept.granules, f"sector {sector} has changed"


def fill(image: ImageBuilder, clusters: int, kinds: list[str], chance: random.Random) -> None:
    """Stretches of clusters of random kinds."""
    cluster = 0
    while cluster < clusters:
        kind = chance.choice(kinds)
        end = min(cluster + chance.randint(1, 6), clusters)
        for index in range(cluster, end):
            tell(image, index, kind, chance)
        cluster = end


def tell(image: ImageBuilder, index: int, kind: str, chance: random.Random) -> None:
    payload = chance.randbytes(image.cluster_size)
    if kind == "data":
        image.data(index, payload)
    elif kind == "zero":
        image.zero(index)
    elif kind == "kept":
        image.zero(index, preallocated=True, payload=payload)
    elif kind == "packed":
        image.compressed(index, payload[: image.cluster_size // 3])
    elif kind == "parts":
        allocated = chance.getrandbits(32)
        image.subclusters(index, payload, allocated=allocated, zero=chance.getrandbits(32) & ~allocated & ALL_PARTS)


def normal(extents: list[Extent]) -> list[Extent]:
    """Merged, and without the places of compressed clusters, which only one way of asking tells."""
    return list(
        merge(each._replace(host_offset=None) if each.kind is ExtentKind.COMPRESSED else each for each in extents)
    )


@pytest.mark.parametrize("name", FORMS)
def test_a_disk_is_what_it_was_told_to_be(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcow2_plugin.engine.writable._MIN_CHANGED_SIZE", 0)  # small caches write back all the time
    machine: type[RuleBasedStateMachine] = type("Written", (Disk,), {"form": FORMS[name], "folder": tmp_path})
    run_state_machine_as_test(machine, settings=settings(examples(16), stateful_step_count=STEPS, phases=PHASES))
