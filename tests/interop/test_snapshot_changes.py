"""Internal snapshots that we make, apply and delete, as QEMU reads them, and that QEMU makes, as we change them."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from qcow2_plugin import (
    apply_snapshot,
    create_image,
    create_snapshot,
    delete_snapshot,
    info,
    list_snapshots,
    open_image,
)
from qcow2_plugin.errors import (
    CorruptImageError,
    MissingReferenceError,
    ReadOnlyImageError,
    ResizeError,
    SnapshotError,
    UnsupportedFeatureError,
)
from tests.support.agreement import assert_reads_as, converted
from tests.support.builder import ImageBuilder
from tests.support.mixture import fill
from tests.support.tools import convert_to_raw, qemu_img, qemu_img_json, qemu_io

KIB, MIB = 1 << 10, 1 << 20

IMAGES = {
    "plain": "compat=1.1",
    "version 2": "compat=0.10",
    "small clusters": "cluster_size=512,refcount_bits=64",
    "2 MiB clusters": "cluster_size=2097152",
    "subclusters": "extended_l2=on,cluster_size=16384",
    "zstd, lazy": "compression_type=zstd,cluster_size=4096,lazy_refcounts=on,refcount_bits=32",
    "preallocated": "preallocation=metadata,cluster_size=4096",
}


def new(path: Path, options: str, size: int = 3000 * KIB) -> int:
    """An image with something in it; its cluster size."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(size))
    cluster_size = int(qemu_img_json("info", path)["cluster-size"])
    fill(path, size, cluster_size, seed=0, compressed="preallocation" not in options, count=12)
    return cluster_size


def check(path: Path) -> None:
    found = qemu_img_json("check", path)
    assert not found.get("corruptions") and not found.get("leaks") and not found["check-errors"], found


def listed_by_qemu(path: Path) -> list[tuple[str, str]]:
    return [(entry["id"], entry["name"]) for entry in qemu_img_json("info", path).get("snapshots", [])]


@pytest.mark.parametrize("options", IMAGES.values(), ids=IMAGES.keys())
def test_qemu_and_we_in_turn(options: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    cluster_size = new(path, options)
    kept: dict[str, bytes] = {}
    for number, (is_ours, name) in enumerate([(True, "a"), (False, "b"), (True, "c"), (False, "d"), (True, "e")]):
        kept[name] = convert_to_raw(path)
        if is_ours:
            assert create_snapshot(path, name).id == str(number + 1)
        else:
            qemu_img("snapshot", "-c", name, path)
        check(path)
        fill(path, 3000 * KIB, cluster_size, seed=number + 1, compressed=False, count=6)
        with open_image(path, writable=True) as image:
            image.pwrite(random.Random(number).randbytes(50000), number * 300000 + 77)
    assert listed_by_qemu(path) == [(str(number), name) for number, name in enumerate("abcde", start=1)]
    assert [each.snapshot.name for each in list_snapshots(path)] == list("abcde")
    steps = [(True, "apply", "b"), (False, "delete", "a"), (True, "delete", "b"), (False, "apply", "c"),
             (True, "apply", "e"), (True, "delete", "c"), (False, "delete", "d"), (True, "delete", "e")]  # fmt: skip
    for is_ours, verb, name in steps:
        before = convert_to_raw(path)
        if is_ours:
            (apply_snapshot if verb == "apply" else delete_snapshot)(path, name)
        else:
            qemu_img("snapshot", "-a" if verb == "apply" else "-d", name, path)
        check(path)
        assert convert_to_raw(path) == (kept[name] if verb == "apply" else before)
        if verb == "delete":
            del kept[name]
        for each, expected in kept.items():
            assert convert_to_raw(path, extra=("-l", f"snapshot.name={each}")) == expected
            with open_image(path, snapshot=each) as image:
                assert image.pread(image.virtual_size, 0) == expected
        fill(path, 3000 * KIB, cluster_size, seed=ord(name), compressed=False, count=4)
    assert not listed_by_qemu(path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_as_many_snapshots_as_a_refcount_can_count(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MIB, refcount_bits=bits)
    with open_image(path, writable=True) as image:
        image.pwrite(b"x" * 70000, 1000)
        image.flush()
    most = (1 << bits) - 2 if bits <= 8 else 40
    with open_image(path, writable=True) as image:
        for number in range(most):
            assert create_snapshot(image, f"s{number}").id == str(number + 1)
    check(path)
    if bits > 8:
        return
    before = path.read_bytes()
    with pytest.raises(SnapshotError, match=f"more references than {bits} bits can count; give the image wider"):
        create_snapshot(path, "one too many")
    assert path.read_bytes() == before
    check(path)
    if most:
        delete_snapshot(path, "1")
        create_snapshot(path, "one more")
        check(path)


def test_what_a_snapshot_needs_is_counted_as_qemu_counts_it(tmp_path: Path) -> None:
    """Many small compressed clusters in one host cluster: each of them is a reference."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "refcount_bits=8", path, "64M")
    qemu_io(path, *(f"write -c -P {cluster} {cluster * 64}k 64k" for cluster in range(100)))
    expected = convert_to_raw(path)
    create_snapshot(path, "one")
    with pytest.raises(SnapshotError):
        create_snapshot(path, "two")
    check(path)
    qemu_io(path, "write -P 9 0 64M")
    apply_snapshot(path, "one")
    check(path)
    assert convert_to_raw(path) == expected


# ---- names and numbers


def test_an_id_comes_before_a_name(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MIB)
    for value, name in enumerate(("2", "1", "1"), start=1):
        with open_image(path, writable=True) as image:
            image.pwrite(bytes([value]) * 4096, 0)
        assert create_snapshot(path, name).id == str(value)
    assert apply_snapshot(path, "1").name == "2"
    with open_image(path) as image:
        assert image.pread(1, 0) == b"\1"
    assert delete_snapshot(path, "1").name == "2"
    assert delete_snapshot(path, "1").id == "2"  # the first of that name
    assert listed_by_qemu(path) == [("3", "1")]
    assert create_snapshot(path, "new").id == "4"
    delete_snapshot(path, "new")
    assert create_snapshot(path, "new").id == "4"
    check(path)


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 256])
def test_names_that_qemu_could_not_find_again_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MIB)
    before = path.read_bytes()
    with pytest.raises(SnapshotError, match="cannot be named"):
        create_snapshot(path, name)
    assert path.read_bytes() == before
    assert create_snapshot(path, "\udcff" + "y" * 254).name == "\udcff" + "y" * 254
    check(path)


def test_what_is_not_there_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MIB)
    create_snapshot(path, "then")
    before = path.read_bytes()
    for change in (apply_snapshot, delete_snapshot):
        with pytest.raises(MissingReferenceError, match='no internal snapshot "now"'):
            change(path, "now")
    assert path.read_bytes() == before
    with open_image(path) as image, pytest.raises(ReadOnlyImageError):
        create_snapshot(image, "new")


# ---- other sizes


@pytest.mark.parametrize("options", ["cluster_size=65536", "cluster_size=512", "extended_l2=on,cluster_size=16384"])
def test_a_snapshot_brings_its_size_along(options: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    cluster_size = new(path, options)
    sizes = {"one": 3000 * KIB, "two": 700 * KIB + 1536, "three": 5000 * KIB + 512}
    kept = {}
    for name, size in sizes.items():
        with open_image(path, writable=True) as image:
            image.resize(size, allow_shrink=True)
        fill(path, size, cluster_size, seed=size, compressed=False, count=8)
        kept[name] = convert_to_raw(path)
        create_snapshot(path, name)
    check(path)
    for name in ("two", "three", "one", "two", "one"):
        apply_snapshot(path, name)
        check(path)
        assert info(path).virtual_size == sizes[name]
        assert convert_to_raw(path) == kept[name]
        fill(path, sizes[name], cluster_size, seed=1, compressed=False, count=4)
    qemu_img("snapshot", "-a", "three", path)
    check(path)
    with open_image(path, writable=True) as image:
        apply_snapshot(image, "two")
        assert image.virtual_size == sizes["two"]
        assert image.pread(sizes["two"], 0) == kept["two"]
        apply_snapshot(image, "three")
        assert image.pread(sizes["three"], 0) == kept["three"]
        image.pwrite(b"end", sizes["three"] - 3)
    check(path)


def test_a_disk_of_no_size(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "0")
    create_snapshot(path, "nothing")
    check(path)
    with open_image(path, writable=True) as image:
        image.resize(MIB)
        image.pwrite(b"x", 5)
        apply_snapshot(image, "nothing")
        assert not image.virtual_size
    check(path)
    delete_snapshot(path, "nothing")
    check(path)


def test_a_version_2_disk_keeps_its_size(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image = ImageBuilder(MIB, version=2).data(0, b"x" * 512)
    image.snapshot(b"1", b"old", extra=b"").snapshot(b"2", b"larger", extra=struct.pack(">QQ", 0, 2 * MIB))
    image.build(path)
    with pytest.raises((SnapshotError, CorruptImageError)):
        apply_snapshot(path, "larger")
    apply_snapshot(path, "old")
    check(path)


# ---- beside the disk


def test_backing_files_stay_what_they_are(tmp_path: Path) -> None:
    below, path = tmp_path / "below.raw", tmp_path / "disk.qcow2"
    below.write_bytes(random.Random(1).randbytes(900 * KIB))
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", below.name, "-F", "raw", path, "1M")
    qemu_io(path, "write -P 1 0 100k", "discard 200k 100k")
    expected = convert_to_raw(path)
    create_snapshot(path, "then")
    qemu_io(path, "write -P 2 50k 400k", "write -z 800k 200k")
    below_before = below.read_bytes()
    below.rename(tmp_path / "away")  # not needed for this
    apply_snapshot(path, "then")
    (tmp_path / "away").rename(below)
    assert convert_to_raw(path) == expected
    delete_snapshot(path, "then")
    check(path)
    assert convert_to_raw(path) == expected
    assert below.read_bytes() == below_before


def test_an_image_with_a_data_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MIB, data_file=tmp_path / "disk.data")
    with pytest.raises(UnsupportedFeatureError, match="external data file cannot have internal snapshots"):
        create_snapshot(path, "then")


def test_vm_state_and_unknown_extra_data_are_kept(tmp_path: Path) -> None:
    """The state lies behind the disk, in the active disk and in a snapshot of a smaller one."""
    path = tmp_path / "disk.qcow2"
    coverage = 512 * 64  # guest bytes below one L1 entry
    size = 3 * coverage
    state = {number: bytes([number]) * 512 for number in range(1, 4)}
    image = ImageBuilder(size, 9, l1_size=8).data(0, b"now!" * 128)
    for number, data in state.items():
        image.data(3 * 64 + number, data)
    then = image.map(2 * coverage, l1_size=6).data(0, b"then" * 128)
    for number, data in state.items():
        then.data(2 * 64 + number, data)
    extra = struct.pack(">QQQ", 2048, 2 * coverage, 77) + b"something that nobody knows"
    image.snapshot(b"7", b"running", then, extra=extra, vm_state_size=5, vm_clock_nsec=123456789).build(path)
    create_snapshot(path, "new")
    (running, new_one) = [each.snapshot for each in list_snapshots(path)]
    assert (running.vm_state_size, running.icount, running.vm_clock_nanoseconds) == (2048, 77, 123456789)
    assert (new_one.id, new_one.vm_state_size, new_one.icount, new_one.virtual_size) == ("8", 0, None, size)
    check(path)
    apply_snapshot(path, "running")
    check(path)
    with open_image(path) as opened:
        assert opened.snapshots()[0].extra == extra
        assert opened.virtual_size == 2 * coverage
        assert opened.pread(512, 0) == b"then" * 128
    content = path.read_bytes()
    assert all(data in content for data in state.values())
    with open_image(path, writable=True) as opened:
        opened.resize(4 * coverage)  # what lies behind the disk must not show
        assert opened.pread(2 * coverage, 2 * coverage) == bytes(2 * coverage)
    apply_snapshot(path, "new")
    delete_snapshot(path, "running")
    delete_snapshot(path, "new")
    check(path)


# ---- bitmaps


def test_bitmaps_have_to_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "1M")
    qemu_io(path, "write -P 1 0 200k")
    create_snapshot(path, "then")
    qemu_img("bitmap", "--add", "-g", "4k", path, "follows")
    qemu_img("bitmap", "--add", "-g", "4k", "--disable", path, "rests")
    create_snapshot(path, "with bitmaps")
    flags = {each["name"]: each["flags"] for each in qemu_img_json("info", path)["format-specific"]["data"]["bitmaps"]}
    assert flags == {"follows": ["auto"], "rests": []}
    delete_snapshot(path, "with bitmaps")
    qemu_io(path, "write -P 2 40k 8k")
    before = path.read_bytes()
    with pytest.raises(SnapshotError, match=r'dirty bitmaps \("follows"\).*option mark-bitmaps'):
        apply_snapshot(path, "then")
    with open_image(path) as image:
        assert list(image.dirty_bitmap("follows").ranges(0, MIB)) == [(40 * KIB, 8 * KIB)]
    assert path.read_bytes()[8192:] == before[8192:] or convert_to_raw(path)[40960:40962] == b"\2\2"
    with open_image(path, writable=True) as image:
        image.pwrite(b"3" * 5000, 100 * KIB)
        image.pwrite(b"3" * 5000, 300 * KIB)
        apply_snapshot(image, "then", mark_bitmaps=True)
        image.pwrite(b"4", 500 * KIB)
    with open_image(path) as image:
        marked = list(image.dirty_bitmap("follows").ranges(0, MIB))
        assert marked == [(40 * KIB, 8 * KIB), (100 * KIB, 8 * KIB), (300 * KIB, 8 * KIB), (500 * KIB, 4 * KIB)]
        assert not list(image.dirty_bitmap("rests").ranges(0, MIB))
    check(path)


def test_what_a_larger_snapshot_brings_is_marked(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MIB)
    create_snapshot(path, "large")
    with open_image(path, writable=True) as image:
        image.resize(256 * KIB, allow_shrink=True)
    qemu_img("bitmap", "--add", "-g", "64k", path, "follows")
    apply_snapshot(path, "large", mark_bitmaps=True)
    with open_image(path) as image:
        assert list(image.dirty_bitmap("follows").ranges(0, MIB)) == [(256 * KIB, 768 * KIB)]
    check(path)
    create_snapshot(path, "larger")
    with open_image(path, writable=True) as image:
        image.resize(64 * KIB, allow_shrink=True)
        apply_snapshot(image, "larger", mark_bitmaps=True)
    check(path)


def test_a_bitmap_that_cannot_follow_refuses_another_size(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image = ImageBuilder(MIB).data(0, b"x").bitmap(b"stale", flags=3)
    image.snapshot(b"1", b"small", image.map(512 * KIB))
    image.build(path)
    with pytest.raises(ResizeError, match='"stale" cannot follow'):
        apply_snapshot(path, "small", mark_bitmaps=True)
    check(path)


# ---- sizes


def test_sizes_are_what_deleting_gives_back(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, 16 * MIB)
    for number in range(4):
        with open_image(path, writable=True) as image:
            image.pwrite(bytes([number + 1]) * (2 * MIB), number * MIB)
        create_snapshot(path, f"s{number}")
    for wanted in ("s1", "s3", "s0", "s2"):
        (size,) = [each.own_size for each in list_snapshots(path, with_sizes=True) if each.snapshot.name == wanted]
        with open_image(path, writable=True) as image:
            sizes = {each.snapshot.name: each for each in list_snapshots(image, with_sizes=True)}
            assert sizes[wanted].own_size == size
            before = in_use(path)
            image.flush()
        delete_snapshot(path, wanted)
        freed = before - in_use(path)
        table_size = 0 if wanted != "s2" else 65536  # the last one takes the snapshot table along
        assert freed == (size or 0) + table_size


def test_sizes_are_told_however_the_image_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MIB)
    create_snapshot(path, "then")
    told = list_snapshots(path, with_sizes=True)
    assert told[0].own_size == 65536
    for writable in (False, True):
        with open_image(path, writable=writable) as image:
            assert list_snapshots(image, with_sizes=True) == told
            assert list_snapshots(image)[0].own_size is None


def in_use(path: Path) -> int:
    """Bytes of clusters with a refcount."""
    content = path.read_bytes()
    table, clusters = struct.unpack_from(">QI", content, 48)
    total = 0
    for place in struct.unpack_from(f">{clusters * 8192}Q", content, table):
        if place:
            total += sum(count != 0 for count in struct.unpack_from(">32768H", content, place))
    return total * 65536


def test_all_of_it_is_read_as_qemu_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    new(path, "cluster_size=4096")
    create_snapshot(path, "then")
    with converted(path, "-l", "then") as expected, open_image(path, snapshot="then") as image:
        assert_reads_as(image, expected)
    told = qemu_img("snapshot", "-l", path).splitlines()
    assert told[2].split()[:2] == ["1", "then"]
