"""Bitmaps added, removed, cleared, merged, enabled and disabled by us and by QEMU: both do the same, and go on from
what the other has left. What bitmaps mark is asked of QEMU."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin import open_image
from qcow2_plugin.engine.dirty_bitmaps.bitmap_plan import BitmapChange, Verb
from qcow2_plugin.errors import BitmapError, MissingReferenceError, Qcow2Error
from qcow2_plugin.operations.bitmaps import (
    add_bitmap,
    change_bitmaps,
    clear_bitmap,
    content_of,
    disable_bitmap,
    enable_bitmap,
    merge_bitmap,
    remove_bitmap,
    rotate_bitmap,
)
from tests.support.builder import ImageBuilder, patch
from tests.support.image_checker import check_image
from tests.support.qemu_bitmaps import Ranges, add, create, dirty, flags, merged, rounded
from tests.support.tools import ToolError, qemu_img, qemu_img_json, qemu_io

KIB, MIB = 1 << 10, 1 << 20
AUTOCLEAR_OFFSET = 88
KINDS = ["cluster_size=512", "cluster_size=65536", "cluster_size=16384,extended_l2=on", "data_file"]
STEPS = 16
GRANULARITIES = [512, 4096, 65536, 1 << 20]
NAMES = ["a", "b", "c", "a long name " * 20]


def told(path: Path) -> list[dict[str, Any]]:
    """The bitmaps as qemu-img tells them."""
    data = qemu_img_json("info", path)["format-specific"]["data"]
    return [{**each, "flags": sorted(each["flags"])} for each in data.get("bitmaps", [])]


def assert_clean(path: Path) -> None:
    report = check_image(path.read_bytes())
    assert report.is_sound, [*report.corruptions, *report.damage]
    assert not report.all_leaks, f"{report.all_leaks} leaks"


def by_us(path: Path, verb: str, name: str, argument: Any = None) -> None:
    data_file = data_file_of(path)
    if verb == "add":
        add_bitmap(path, name, granularity=argument, enabled=len(name) != 1 or name < "c", data_file=data_file)
    elif verb == "merge":
        merge_bitmap(path, name, argument, data_file=data_file)
    else:
        change = {"remove": remove_bitmap, "clear": clear_bitmap, "enable": enable_bitmap, "disable": disable_bitmap}
        change[verb](path, name, data_file=data_file)


def data_file_of(path: Path) -> Path | None:
    data_file = Path(f"{path}.data")
    return data_file if data_file.exists() else None


def by_qemu(path: Path, verb: str, name: str, argument: Any = None) -> None:
    if verb == "add":
        extra = () if len(name) != 1 or name < "c" else ("--disable",)
        qemu_img("bitmap", "--add", *extra, *(() if argument is None else ("-g", str(argument))), path, name)
    elif verb == "merge":
        qemu_img("bitmap", "--merge", argument, path, name)
    else:
        qemu_img("bitmap", f"--{verb}", path, name)


@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=2M", "data_file"])
def test_what_we_do_is_what_qemu_does(tmp_path: Path, options: str) -> None:
    """Two images, one changed by us and one by QEMU, then the other way round: all along they have the same bitmaps."""
    chance = random.Random(options)
    size = 24 * MIB + 512
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        create(path, size, f"data_file={path}.data" if options == "data_file" else options)
    names: list[str] = []
    for step in range(STEPS):
        verb = chance.choice(["add", "add", "clear", "enable", "disable", "merge", "merge", "remove", "write", "write"])
        free = [name for name in NAMES if name not in names]
        if (verb == "add" and not free) or (verb != "add" and not names):
            verb = "write"
        if verb == "write":
            offset = chance.randrange(size - 4 * MIB)
            length = chance.choice([1, 512, 70000, 3 * MIB])
            for path in paths:
                write(path, step, offset, length, by=(by_us, by_qemu)[paths.index(path)])
        else:
            name = chance.choice(free if verb == "add" else names)
            argument = chance.choice(names) if verb == "merge" else chance.choice([None, *GRANULARITIES])
            for path, do in zip(paths, (by_us, by_qemu) if step % 2 else (by_qemu, by_us), strict=True):
                do(path, verb, name, argument)
            names = [each for each in names if (verb, each) != ("remove", name)] + [name] * (verb == "add")
        assert told(paths[0]) == told(paths[1])
        assert_clean(paths[0])
    for name in names:
        assert dirty(paths[0], name) == dirty(paths[1], name)
        by_us(paths[0], "remove", name)
    assert told(paths[0]) == []
    assert_clean(paths[0])
    assert not qemu_img_json("check", paths[0]).get("leaks")


def write(path: Path, value: int, offset: int, length: int, *, by: Callable[..., None]) -> None:
    if by is by_qemu:
        qemu_io(path, f"write -P {value} {offset} {length}")
        return
    with open_image(path, writable=True, data_file=data_file_of(path)) as image:
        image.pwrite(bytes([value]) * length, offset)


@pytest.mark.parametrize("options", [*KINDS, "cluster_size=4096,refcount_bits=1"])
def test_changes_of_an_image_that_is_being_written(tmp_path: Path, options: str) -> None:
    """Marks that are in memory alone count: everything that was written is where it belongs."""
    path = tmp_path / "disk.qcow2"
    size = 16 * MIB
    create(path, size, f"data_file={path}.data" if options == "data_file" else options)
    add(path, "epoch 0", 4096)
    add(path, "asleep", 512, "--disable")
    chance = random.Random(options)
    epochs: list[Ranges] = [[]]
    awake: Ranges = []
    everything: Ranges = []
    with open_image(path, writable=True, data_file=data_file_of(path)) as image:
        for step in range(40):
            offset, length = chance.randrange(size - MIB), chance.choice([1, 512, 70000, MIB])
            image.pwrite(b"x" * length, offset)
            epochs[-1].append((offset, length))
            everything.append((offset, length))
            if 10 <= step < 20:
                awake.append((offset, length))
            if step == 9:
                enable_bitmap(image, "asleep")
            elif step == 19:
                disable_bitmap(image, "asleep")
            elif step == 25:
                add_bitmap(image, "cleared")
            elif step == 29:
                clear_bitmap(image, "cleared")
                everything.clear()
            if step % 5 == 3:
                rotate_bitmap(image, f"epoch {len(epochs) - 1}", f"epoch {len(epochs)}")
                epochs.append([])
            if step % 10 == 7:
                image.flush()
            assert [each.in_use for each in image.bitmaps() if not each.auto] == [False] * (
                len(epochs) - 1 + (not 9 <= step < 19)
            )
        add_bitmap(image, "all", granularity=512, enabled=False)
        for number in range(len(epochs)):
            merge_bitmap(image, "all", f"epoch {number}")
    for number, ranges in enumerate(epochs):
        assert dirty(path, f"epoch {number}") == rounded(ranges, 4096, size)
        assert flags(path, f"epoch {number}") == ({"auto"} if number == len(epochs) - 1 else set())
    assert dirty(path, "all") == merged([each for ranges in epochs for each in rounded(ranges, 4096, size)])
    assert dirty(path, "asleep") == rounded(awake, 512, size)
    usual = min(max(int(qemu_img_json("info", path)["cluster-size"]), 4096), 65536)
    assert dirty(path, "cleared") == rounded(everything, usual, size)
    assert_clean(path)


@pytest.mark.parametrize("from_granularity", [512, 65536, 1 << 20])
@pytest.mark.parametrize("to_granularity", [512, 65536, 1 << 20])
def test_merging_across_images(tmp_path: Path, from_granularity: int, to_granularity: int) -> None:
    """Of other granularities, with clusters of other sizes; as QEMU merges them."""
    size = 40 * MIB + 1536
    first, second, by_them = tmp_path / "first", tmp_path / "second", tmp_path / "by qemu"
    create(first, size, "cluster_size=512")
    create(second, size, "cluster_size=65536")
    for path, granularity, offset in ((first, from_granularity, 3 * MIB), (second, to_granularity, 20 * MIB + 77)):
        add(path, "b", granularity)
        qemu_io(path, f"write {offset} 5M", f"write {size - 600} 600", "write 511 2")
    by_them.write_bytes(second.read_bytes())
    qemu_img("bitmap", "--merge", "b", "-b", first, "-F", "qcow2", by_them, "b")
    merge_bitmap(second, "b", "b", source_image=first)
    assert dirty(second, "b") == dirty(by_them, "b")
    assert_clean(second)
    with open_image(first, writable=True) as image:  # one that is open, with marks in memory
        image.pwrite(b"x", 30 * MIB)
        merge_bitmap(second, "b", "b", source_image=image)
        assert dirty(second, "b") == merged(
            dirty(by_them, "b") + rounded(rounded([(30 * MIB, 1)], from_granularity, size), to_granularity, size)
        )


def test_bitmaps_that_are_ones_all_over(tmp_path: Path) -> None:
    """Table entries that say so, ours and those that we find, are bits like others."""
    path = tmp_path / "disk"
    size = 40 * MIB + 512
    image = ImageBuilder(size, 9)
    image.bitmap(b"ones", [(0, size)], granularity_bits=9).bitmap(b"part", [(3 * MIB, MIB)], granularity_bits=12)
    image.build(path)
    add_bitmap(path, "fine", granularity=512)
    add_bitmap(path, "coarse", granularity=65536)
    change_bitmaps(path, [BitmapChange(Verb.MERGE, name, source=b"part") for name in (b"fine", b"coarse")])
    assert dirty(path, "fine") == dirty(path, "coarse") == [(3 * MIB, MIB)]
    for name in ("fine", "coarse", "part"):
        merge_bitmap(path, name, "ones")
        assert dirty(path, name) == [(0, size)]
    assert_clean(path)
    with open_image(path, writable=True) as opened:
        opened.pwrite(b"x", 0)
        opened.resize(60 * MIB)
    assert dirty(path, "fine") == [(0, size)]
    assert_clean(path)


def test_bitmaps_follow_the_size_of_the_disk_after_a_change(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 2 * MIB, "cluster_size=512")
    with open_image(path, writable=True) as image:
        add_bitmap(image, "on", granularity=512)
        image.pwrite(b"x", 2 * MIB - 512)
        image.resize(6 * MIB)
        image.pwrite(b"x", 5 * MIB)
        rotate_bitmap(image, "on", "next")
        image.resize(200 * MIB)
        image.pwrite(b"x", 150 * MIB)
        disable_bitmap(image, "next")
    assert dirty(path, "on") == [(2 * MIB - 512, 512), (5 * MIB, 512)]
    assert dirty(path, "next") == [(150 * MIB, 512)]
    assert flags(path, "on") == flags(path, "next") == set()
    assert_clean(path)


def test_several_changes_are_one(tmp_path: Path) -> None:
    """In their order; if one cannot be, none is."""
    path = tmp_path / "disk.qcow2"
    create(path, 8 * MIB)
    add(path, "a")
    qemu_io(path, "write 1M 64k")
    before = path.read_bytes()
    changes = [
        BitmapChange(Verb.ADD, b"b"),
        BitmapChange(Verb.MERGE, b"b", source=b"a"),
        BitmapChange(Verb.CLEAR, b"a"),
        BitmapChange(Verb.DISABLE, b"b"),
    ]
    with pytest.raises(MissingReferenceError, match='no bitmap "c"'):
        change_bitmaps(path, [*changes, BitmapChange(Verb.REMOVE, b"c")])
    assert path.read_bytes() == before
    change_bitmaps(path, changes)
    assert (dirty(path, "a"), dirty(path, "b")) == ([], [(MIB, 65536)])
    assert (flags(path, "a"), flags(path, "b")) == ({"auto"}, set())
    before = path.read_bytes()
    change_bitmaps(
        path, [BitmapChange(Verb.ADD, b"c"), BitmapChange(Verb.REMOVE, b"c"), BitmapChange(Verb.ENABLE, b"a")]
    )
    assert path.read_bytes() == before
    assert_clean(path)


def test_backing_files_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "/nowhere/at all", "-F", "qcow2", path, str(8 * MIB))
    add_bitmap(path, "a")
    assert flags(path, "a") == {"auto"}
    assert_clean(path)


def test_two_increments_of_a_disk_in_use(tmp_path: Path) -> None:
    """The example of `rotate_bitmap`: a full backup, then increments, while the guest goes on."""
    path = tmp_path / "disk.qcow2"
    create(path, 16 * MIB)
    qemu_io(path, "write -P 7 0 8M")
    chance = random.Random(1)
    with open_image(path, writable=True) as image:

        def guest_goes_on() -> None:
            for _ in range(20):
                image.pwrite(chance.randbytes(3000), chance.randrange(16 * MIB - 3000))

        add_bitmap(image, "since-full")
        guest_goes_on()  # a backup of a disk in use has some of it
        backup = bytearray(image.pread(16 * MIB, 0))
        for old, new in (("since-full", "since-1"), ("since-1", "since-2")):
            guest_goes_on()
            rotate_bitmap(image, old, new)
            at_rotation = image.pread(16 * MIB, 0)
            increment = {extent.guest_offset: extent.length for extent in image.dirty_extents(old)}
            guest_goes_on()
            for offset, length in increment.items():
                backup[offset : offset + length] = at_rotation[offset : offset + length]
            assert bytes(backup) == at_rotation
            remove_bitmap(image, old)
        assert [bitmap.name for bitmap in image.bitmaps()] == [b"since-2"]
    assert_clean(path)


def test_many_bitmaps(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, MIB, "cluster_size=512")
    names = [f"bitmap {number}" for number in range(300)]
    change_bitmaps(path, [BitmapChange(Verb.ADD, name.encode()) for name in names])
    assert [each["name"] for each in told(path)] == names
    change_bitmaps(path, [BitmapChange(Verb.REMOVE, name.encode()) for name in names[::2]])
    assert [each["name"] for each in told(path)] == names[1::2]
    assert_clean(path)


# ---- what QEMU refuses


REFUSED = {
    "no name": ("add", "", None),
    "a name that is too long": ("add", "n" * 1024, None),
    "a name that is taken": ("add", "there", None),
    "too fine": ("add", "new", 256),
    "no power of two": ("add", "new", 3000),
    "too coarse": ("add", "new", 4 << 30),
    "removing what is not there": ("remove", "missing", None),
    "clearing what is not there": ("clear", "missing", None),
    "enabling what is not there": ("enable", "missing", None),
    "disabling what is not there": ("disable", "missing", None),
    "merging what is not there": ("merge", "there", "missing"),
    "merging into what is not there": ("merge", "missing", "there"),
    "a source that is stale": ("merge", "there", "stale"),
    "a target that is stale": ("merge", "stale", "there"),
    "clearing what is stale": ("clear", "stale", None),
    "enabling what is stale": ("enable", "stale", None),
    "disabling what is stale": ("disable", "stale", None),
    "adding what is stale": ("add", "stale", None),
}


@pytest.fixture(scope="module")
def with_stale_bitmap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stale") / "disk.qcow2"
    create(path, MIB)
    add(path, "stale")
    leave_in_use(path)
    add(path, "there")
    return path


def leave_in_use(path: Path) -> None:
    commands = ["-c", "write 0 1", "-c", "flush", "-c", "sigraise 9"]
    done = subprocess.run(["qemu-io", "-f", "qcow2", *commands, path], capture_output=True, timeout=60, check=False)
    assert done.returncode == -9


@pytest.mark.parametrize("what", REFUSED)
def test_what_qemu_refuses_is_refused(tmp_path: Path, with_stale_bitmap: Path, what: str) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(with_stale_bitmap.read_bytes())
    content = path.read_bytes()
    with pytest.raises((BitmapError, MissingReferenceError)):
        by_us(path, *REFUSED[what])
    assert path.read_bytes() == content
    with pytest.raises(ToolError):
        by_qemu(path, *REFUSED[what])


def test_a_stale_bitmap_can_be_removed_and_stays_otherwise(tmp_path: Path, with_stale_bitmap: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(with_stale_bitmap.read_bytes())
    add_bitmap(path, "new")
    with open_image(path, writable=True) as image:
        image.pwrite(b"x", 0)
        rotate_bitmap(image, "new", "newer")
    assert flags(path, "stale") == {"auto", "in-use"}
    assert_clean(path)
    remove_bitmap(path, "stale")
    assert [each["name"] for each in told(path)] == ["there", "new", "newer"]
    assert_clean(path)


@pytest.mark.parametrize(
    ("size", "cluster_size", "granularity", "is_possible"),
    [
        (2 << 40, 65536, 512, True),
        ((2 << 40) + 512, 4096, 512, False),
        ((2 << 40) + 512, 65536, 512, False),
        (64 << 40, 65536, 8192, False),
        (MIB, 65536, 2 << 30, True),
    ],
)
def test_how_large_a_bitmap_may_be(
    tmp_path: Path, size: int, cluster_size: int, granularity: int, is_possible: bool
) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, size, f"cluster_size={cluster_size}")
    for do in (by_us, by_qemu):
        if not is_possible:
            with pytest.raises((BitmapError, ToolError)):
                do(path, "add", "b", granularity)
            continue
        do(path, "add", "b", granularity)
        if do is by_us:
            assert qemu_img_json("info", path)["format-specific"]["data"]["bitmaps"][0]["granularity"] == granularity
        remove_bitmap(path, "b")
        assert_clean(path)


def test_other_refusals(tmp_path: Path) -> None:
    path, old, larger = tmp_path / "disk.qcow2", tmp_path / "old.qcow2", tmp_path / "larger.qcow2"
    create(old, MIB, "compat=0.10")
    create(path, MIB)
    create(larger, 2 * MIB)
    add(path, "b", 65536, "--disable")
    add(larger, "b")
    changes: list[tuple[Callable[[], None], str]] = [
        (lambda: add_bitmap(old, "b"), "version 2 cannot have bitmaps"),
        (lambda: merge_bitmap(path, "b", "b", source_image=larger), "a disk of 2097152 bytes cannot be merged"),
        (lambda: rotate_bitmap(path, "b", "c"), '"b" is disabled, so what was changed since then is in no bitmap'),
        (lambda: rotate_bitmap(larger, "b", "b"), 'has a bitmap "b" already'),
        (lambda: add_bitmap(path, b"nul\0nul"), "cannot hold a NUL byte"),
        (lambda: add_bitmap(path, "x", granularity=0), "is a power of two"),
    ]
    for change, reason in changes:
        with pytest.raises(BitmapError, match=reason):
            change()
    with pytest.raises(ToolError, match="different sizes"):
        qemu_img("bitmap", "--merge", "b", "-b", larger, "-F", "qcow2", path, "b")
    empty = tmp_path / "empty.qcow2"
    create(empty, 0)
    with pytest.raises(BitmapError, match="cannot describe a disk of 0 bytes"):
        add_bitmap(empty, "b")


def test_a_directory_that_is_stale_is_forgotten(tmp_path: Path) -> None:
    """Somebody has changed the disk who knows no bitmaps."""
    path, by_them = tmp_path / "disk.qcow2", tmp_path / "by qemu"
    create(path, MIB)
    add(path, "b")
    patch(path, AUTOCLEAR_OFFSET, bytes(8))
    by_them.write_bytes(path.read_bytes())
    with pytest.raises(MissingReferenceError):
        remove_bitmap(path, "b")
    with pytest.raises(ToolError):
        qemu_img("bitmap", "--remove", by_them, "b")
    add_bitmap(path, "new")
    qemu_img("bitmap", "--add", by_them, "new")
    assert told(path) == told(by_them)
    leaks = [check_image(each.read_bytes()).all_leaks for each in (path, by_them)]
    assert leaks[0] == leaks[1] == 2
    qemu_img("check", "-r", "leaks", path)
    assert_clean(path)


UNKNOWN: dict[str, dict[str, Any]] = {
    "type": {"type": 7},
    "flags": {"flags": 2 | 1 << 9},
    "granularity": {"granularity_bits": 8},
    "size": {"table_size": 3},
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_bitmaps_of_unknown_kinds_are_kept_and_can_be_removed(tmp_path: Path, what: str) -> None:
    path = tmp_path / "disk.qcow2"
    builder = ImageBuilder(MIB, 9)
    builder.bitmap(b"strange", [(0, 65536)], **{"granularity_bits": 12, **UNKNOWN[what]})
    builder.bitmap(b"extra", [(0, 65536)], extra=b"extra data", granularity_bits=12)
    builder.bitmap(b"known", [(0, 65536)], extra=b"compatible", granularity_bits=12, flags=4).build(path)
    before = entries_of(path)
    with open_image(path, writable=True) as image:
        image.pwrite(b"x", 0)
        add_bitmap(image, "new")
        for name in ("strange", "extra"):
            with pytest.raises(BitmapError, match="all that can be done with it is to remove it"):
                clear_bitmap(image, name)
            with pytest.raises(BitmapError):
                merge_bitmap(image, "new", name)
        enable_bitmap(image, "known")
        merge_bitmap(image, "new", "known")
    after = entries_of(path)
    assert after[b"strange"][1:] == before[b"strange"][1:] and after[b"extra"] == before[b"extra"]
    assert after[b"known"][2] == b"compatible" and after[b"known"][0] == 4 | 2
    content = content_of(path, "new")
    assert content.granularity_bits == 12 and [index for index, _ in content.pieces] == [0]
    leaks = check_image(path.read_bytes()).all_leaks
    for name in ("strange", "extra", "known", "new"):
        remove_bitmap(path, name)
    report = check_image(path.read_bytes())
    assert report.is_sound and report.all_leaks <= leaks


def entries_of(path: Path) -> dict[bytes, tuple[int, int, bytes]]:
    with open_image(path) as image:
        return {each.name: (each.flags, each.type, each.extra) for each in image.bitmaps()}


def test_names_are_shown_safely(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, MIB)
    with pytest.raises(Qcow2Error) as caught:
        remove_bitmap(path, "\x1b[31m\nname")
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)
