"""One image, written by us and by QEMU in turn, step by step: both see the same disk at all times, `qemu-img check`
finds nothing, and what others keep in the image (snapshots, bitmaps, a raw data file) stays true. Snapshots are made,
applied and deleted by either."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from qcow2_plugin import Image, Policy, apply_snapshot, create_snapshot, delete_snapshot, open_image
from tests.support.depth import examples
from tests.support.model import Model, Places, Request, assert_reads_as
from tests.support.tools import convert_to_raw, qemu_img, qemu_img_json, qemu_io

KIB = 1 << 10
STEPS = 20
CHECK_EVERY = 5
SNAPSHOT, BITMAP = "then", "changed"
QEMU_IO = ("-f", "qcow2", "-t", "unsafe", "-d", "unmap")

IS_DEEP = settings().max_examples > 100
SEEDS = st.integers(0, 2**32 - 1)
PHASES = tuple(Phase) if IS_DEEP else (Phase.explicit, Phase.generate)  # looking for less takes hundreds of runs

pytestmark = pytest.mark.timeout(3600 if IS_DEEP else 120)


@dataclass(frozen=True)
class Kind:
    """How an image is made, and what of it has to be known. `below` are the bytes of its backing file."""

    options: str
    cluster_size: int
    virtual_size: int
    subclusters: int = 1
    refcount_bits: int = 16
    below: int = 0
    below_form: str = "raw"
    compressed: int = 0
    has_snapshot: bool = False
    has_bitmap: bool = False

    @property
    def version(self) -> int:
        return 2 if "compat=0.10" in self.options else 3

    @property
    def has_room_for_snapshots(self) -> bool:
        return "data_file" not in self.options and self.refcount_bits > 1

    @property
    def places(self) -> Places:
        size = self.cluster_size
        entries = size // (8 if self.subclusters == 1 else 16)
        return Places(size, size // self.subclusters, (entries * size, size * 8 // self.refcount_bits * size))


KINDS = {
    "512": Kind("cluster_size=512,refcount_bits=64", 512, 100 * KIB, refcount_bits=64, compressed=20),
    "4k": Kind("cluster_size=4k,compression_type=zstd", 4096, 2100 * KIB + 512, compressed=12),
    "64k": Kind("cluster_size=64k", 65536, 1000 * KIB + 512, compressed=4),
    "version 2": Kind("cluster_size=512,compat=0.10", 512, 70 * KIB, compressed=20),
    "version 2 over raw": Kind("cluster_size=1k,compat=0.10", 1024, 140 * KIB + 512, below=90 * KIB + 512),
    "over raw": Kind("cluster_size=2k", 2048, 300 * KIB + 512, below=200 * KIB + 1536, compressed=8),
    "over more": Kind("cluster_size=1k", 1024, 150 * KIB + 512, below=400 * KIB + 512, below_form="qcow2"),
    "extended": Kind("cluster_size=16k,extended_l2=on", 16384, 600 * KIB + 512, 32, compressed=6),
    "extended over qcow2": Kind(
        "cluster_size=16k,extended_l2=on,lazy_refcounts=on", 16384, 500 * KIB + 512, 32, below=400 * KIB + 1536,
        below_form="qcow2",
    ),
    "data file": Kind("cluster_size=1k,data_file={data}", 1024, 150 * KIB + 512),
    "raw data file": Kind("cluster_size=512,data_file={data},data_file_raw=on", 512, 80 * KIB),
    "extended raw": Kind(
        "cluster_size=16k,extended_l2=on,data_file={data},data_file_raw=on", 16384, 300 * KIB + 512, 32
    ),
    "snapshot": Kind("cluster_size=512", 512, 90 * KIB, compressed=20, has_snapshot=True),
    "extended snapshot": Kind("cluster_size=16k,extended_l2=on", 16384, 300 * KIB, 32, compressed=4, has_snapshot=True),
    "1-bit refcounts": Kind(
        "cluster_size=512,refcount_bits=1,lazy_refcounts=on", 512, 90 * KIB, refcount_bits=1, compressed=20
    ),
    "bitmap": Kind("cluster_size=512", 512, 90 * KIB, compressed=20, has_bitmap=True),
    "data file and bitmap": Kind("cluster_size=1k,data_file={data}", 1024, 90 * KIB, has_bitmap=True),
}  # fmt: skip


class Both(RuleBasedStateMachine):
    """The state machine. `kind` and `folder` are set by whoever runs it; `folder` has the pristine image in it."""

    kind: Kind
    folder: Path
    pristine: Model

    def __init__(self) -> None:
        super().__init__()
        self.path = self.folder / "disk.qcow2"
        for name in ("disk.qcow2", "disk.data"):
            if (self.folder / f"pristine-{name}").exists():
                shutil.copy(self.folder / f"pristine-{name}", self.folder / name)
        self.model = copy_of(self.pristine)
        self.smallest = self.model.virtual_size
        self.ours: Image | None = None
        self.snapshots: dict[str, Model] = {}
        self.steps = self.made = 0

    def teardown(self) -> None:
        try:
            self.look()
            if self.kind.has_bitmap:
                self.assert_bitmap_marks_all_changes()
        finally:
            self.hand_over()

    # ---- whose turn it is

    def image(self) -> Image:
        if self.ours is None:
            self.ours = open_image(self.path, policy=Policy.TRUSTED, writable=True, cache_size=20000)
        return self.ours

    def hand_over(self) -> None:
        if self.ours is not None:
            ours, self.ours = self.ours, None
            ours.close()

    def step(self) -> None:
        self.steps += 1
        if self.steps % CHECK_EVERY == 0:
            self.look()

    def chance_of(self, seed: int) -> random.Random:
        """The same seed makes other requests in another step."""
        return random.Random(f"{seed}/{self.steps}")

    # ---- rules

    @initialize(cold=st.booleans())
    def begin(self, cold: bool) -> None:
        if not cold:
            self.image()

    @rule(seed=SEEDS, count=st.integers(1, 20), then=st.sampled_from(["", "", "flush", "close", "read"]))
    def we_change_it(self, seed: int, count: int, then: str) -> None:
        chance = self.chance_of(seed)
        for _ in range(count):
            request = self.request(chance)
            request.apply(self.image())
            self.model.apply(request)
            first = max(request.offset - 700, 0)
            length = min(request.length + 1400, self.model.virtual_size - first)
            assert self.image().pread(length, first) == self.model.read(first, length)
        if then == "flush":
            self.image().flush()
        elif then == "close":
            self.hand_over()
        elif then == "read":
            assert_reads_as(self.image(), self.model)
        self.step()

    @rule(seed=SEEDS, count=st.integers(1, 6))
    def qemu_changes_it(self, seed: int, count: int) -> None:
        chance = self.chance_of(seed)
        requests = [self.request(chance) for _ in range(count)]
        self.hand_over()
        qemu_io(self.path, *(each.command(self.folder) for each in requests), options=QEMU_IO)
        for request in requests:
            self.model.apply(request)
        self.step()

    def request(self, chance: random.Random) -> Request:
        request = self.kind.places.request(chance, self.model.virtual_size)
        note(str(request))
        return request

    @rule(seed=SEEDS, preallocation=st.sampled_from(["off", "off", "metadata", "full"]), is_ours=st.booleans())
    def resize(self, seed: int, preallocation: str, is_ours: bool) -> None:
        if self.kind.version == 2 and self.snapshots:
            return  # they do not say what size they have
        size, old_size = self.new_size(self.chance_of(seed)), self.model.virtual_size
        if is_ours or (self.kind.version == 2 and self.kind.below):  # QEMU cannot hide a backing file there
            if size <= old_size or (self.kind.below and self.kind.subclusters == 1):
                preallocation = "off"
            self.image().resize(size, allow_shrink=True, preallocation=preallocation)
            self.resized(size)
        else:
            self.hand_over()
            qemu_img("resize", "-q", "-f", "qcow2", "--shrink", self.path, str(size))
            self.resized(size)
            cluster_end = -(-old_size // self.kind.cluster_size) * self.kind.cluster_size
            self.take_what_qemu_uncovers(old_size, min(size, cluster_end))
        self.step()

    def take_what_qemu_uncovers(self, start: int, end: int) -> None:
        """QEMU leaves in the last cluster what was behind the end of the disk."""
        if start < end:
            self.model.write(start, convert_to_raw(self.path)[start:end])

    def new_size(self, chance: random.Random) -> int:
        """In sectors, near the size that it was made with."""
        unit = chance.choice([512, 512, self.kind.cluster_size])
        size = max((self.kind.virtual_size + chance.randint(-40, 60) * unit) // unit * unit, 512)
        note(f"from {self.model.virtual_size} to {size} bytes")
        return size

    def resized(self, size: int) -> None:
        self.model.resize(size)
        self.smallest = min(self.smallest, size)

    @precondition(lambda self: self.kind.has_room_for_snapshots)
    @rule(seed=SEEDS, verb=st.sampled_from("ccad"), is_ours=st.booleans())
    def snapshot(self, seed: int, verb: str, is_ours: bool) -> None:
        names = list(self.snapshots)
        if verb == "c":
            self.made += 1
            name = f"s{self.made}"
            self.snapshots[name] = copy_of(self.model)
        elif names:
            name = self.chance_of(seed).choice(names)
        else:
            return
        note(f"{verb} {name}")
        if verb == "a":
            self.model = copy_of(self.snapshots[name])
            self.smallest = min(self.smallest, self.model.virtual_size)
        elif verb == "d":
            del self.snapshots[name]
        if is_ours or (verb == "a" and self.kind.has_bitmap):  # QEMU does not mark what changes
            self.change_snapshots(verb, name)
        else:
            self.hand_over()
            qemu_img("snapshot", f"-{verb}", name, self.path)
        self.step()

    def change_snapshots(self, verb: str, name: str) -> None:
        if verb == "c":
            create_snapshot(self.image(), name)
        elif verb == "a":
            apply_snapshot(self.image(), name, mark_bitmaps=True)
        else:
            delete_snapshot(self.image(), name)
        assert_reads_as(self.image(), self.model)

    # ---- what must hold

    def look(self) -> None:
        """Everything, by QEMU."""
        self.hand_over()
        qemu_img("check", "-f", "qcow2", self.path)
        raw = self.folder / "model.raw"
        self.model.save(raw)
        qemu_img("compare", "-f", "qcow2", "-F", "raw", self.path, raw)
        if "data_file_raw=on" in self.kind.options:
            data = (self.folder / "disk.data").read_bytes()
            wanted = self.model.read(0, self.model.virtual_size)
            assert data[: len(wanted)].ljust(len(wanted), b"\0") == wanted
        if self.kind.has_snapshot:
            self.assert_snapshot_is_as_it_was()
        for number, (name, expected) in enumerate(self.snapshots.items()):
            with open_image(self.path, policy=Policy.TRUSTED, snapshot=name) as image:
                assert_reads_as(image, expected)
            if number == self.steps % len(self.snapshots):
                found = convert_to_raw(self.path, extra=("-l", f"snapshot.name={name}"))
                length = min(len(found), expected.virtual_size)
                assert found[:length] == expected.read(0, length)

    def assert_snapshot_is_as_it_was(self) -> None:
        """QEMU reads it as far as the disk goes now, whatever the size was then."""
        found = convert_to_raw(self.path, extra=("-l", f"snapshot.name={SNAPSHOT}"))
        length = min(len(found), self.pristine.virtual_size)
        assert found[:length] == self.pristine.read(0, length)
        with open_image(self.path, snapshot=SNAPSHOT) as image:
            assert_reads_as(image, self.pristine)

    def assert_bitmap_marks_all_changes(self) -> None:
        (bitmap,) = qemu_img_json("info", self.path)["format-specific"]["data"]["bitmaps"]
        assert bitmap["flags"] == ["auto"]
        with open_image(self.path, policy=Policy.TRUSTED) as image:
            marked = bytearray(image.virtual_size)
            for offset, length in image.dirty_bitmap(BITMAP).ranges(0, image.virtual_size):
                marked[offset : offset + length] = b"\1" * length
            for offset in range(0, min(self.smallest, image.virtual_size), 512):
                if self.model.read(offset, 512) != self.pristine.read(offset, 512):
                    assert any(marked[offset : offset + 512]), f"sector {offset // 512} has changed and is not marked"


def copy_of(model: Model) -> Model:
    content = model.read(0, model.virtual_size)
    return Model(model.virtual_size, model.cluster_size, content=content, discards=model.discards)


def make(kind: Kind, folder: Path) -> Model:
    """The pristine image: written to here and there by QEMU, with a snapshot or a bitmap if it is to have one."""
    path, data = folder / "disk.qcow2", folder / "disk.data"
    chance = random.Random(kind.options)
    below = chance.randbytes(kind.below)
    words: list[str | Path] = ["-o", kind.options.format(data=data)]
    if below:
        (folder / "below.raw").write_bytes(below)
        name = "below.raw"
        if kind.below_form == "qcow2":
            name = "below.qcow2"
            qemu_img("convert", "-f", "raw", "-O", "qcow2", folder / "below.raw", folder / name)
        words += ["-b", folder / name, "-F", kind.below_form]
    qemu_img("create", "-q", "-f", "qcow2", *words, path, str(kind.virtual_size))
    model = Model(
        kind.virtual_size, kind.cluster_size, content=below, discards=not (kind.version == 2 and bool(kind.below))
    )
    size = kind.cluster_size
    commands = []
    for cluster in range(kind.compressed):
        data_file = folder / f"compressed-{cluster}"
        data_file.write_bytes(bytes(random.Random(cluster).choices(b"qcow2 data", k=size // 2)) * 2)
        commands.append(f"write -c -s {data_file} {cluster * size} {size}")
        model.write(cluster * size, data_file.read_bytes())
    requests = [kind.places.request(chance, kind.virtual_size) for _ in range(12)]
    qemu_io(path, *commands, *(each.command(folder) for each in requests), options=QEMU_IO)
    for request in requests:
        model.apply(request)
    if kind.has_snapshot:
        qemu_img("snapshot", "-c", SNAPSHOT, path)
    if kind.has_bitmap:
        qemu_img("bitmap", "--add", "-g", "512", path, BITMAP)
    for name in ("disk.qcow2", "disk.data"):
        if (folder / name).exists():
            os.rename(folder / name, folder / f"pristine-{name}")
    return model


@pytest.mark.parametrize("name", KINDS)
def test_we_and_qemu_write_one_image_in_turn(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    body = {"kind": kind, "folder": tmp_path, "pristine": make(kind, tmp_path)}
    machine: type[RuleBasedStateMachine] = type("Turns", (Both,), body)
    run_state_machine_as_test(machine, settings=settings(examples(12), stateful_step_count=STEPS, phases=PHASES))
