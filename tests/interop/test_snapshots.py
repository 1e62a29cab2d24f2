"""Internal snapshots made by qemu-img, of disks that changed their size, read as qemu-img reads them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcow2_plugin import open_image
from qcow2_plugin.errors import MissingReferenceError
from tests.support.agreement import RawDisk, assert_reads_as, assert_tiles, converted
from tests.support.mixture import fill
from tests.support.tools import qemu_img, qemu_img_json, qemu_io
from tests.support.watching import no_descriptor_left

KIB = 1 << 10

IMAGES = {
    "plain": "compat=1.1",
    "small clusters": "cluster_size=512,refcount_bits=64",
    "large clusters": "cluster_size=2097152",
    "subclusters": "extended_l2=on,cluster_size=16384",
    "lazy": "lazy_refcounts=on,refcount_bits=8",
    "preallocated": "preallocation=metadata",
    "zstd": "compression_type=zstd,cluster_size=4096",
}
STEPS = {
    "one": 3000 * KIB,
    "two": 5000 * KIB + 512,
    "three": 700 * KIB + 1536,
    "four": 700 * KIB + 1536,
    "now": 9000 * KIB,
}
"""Names of the snapshots in the order they are taken, and the size of the disk then."""


def cluster_size_of(path: Path) -> int:
    return int(qemu_img_json("info", path)["cluster-size"])


@pytest.mark.parametrize("options", IMAGES.values(), ids=IMAGES.keys())
def test_every_snapshot_reads_as_qemu_reads_it(options: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "1536K")
    for number, (name, size) in enumerate(STEPS.items()):
        qemu_img("resize", "-q", "--shrink", path, str(size))
        is_first = number == 0 and "preallocation" not in options
        fill(path, size, cluster_size_of(path), seed=number, compressed=is_first, count=12)
        if name != "now":
            qemu_img("snapshot", "-c", name, path)

    with converted(path) as expected, open_image(path) as image:
        assert_reads_as(image, expected)
        listed = [(snapshot.id.decode(), snapshot.name.decode()) for snapshot in image.snapshots()]
        told = qemu_img_json("info", path)["snapshots"]
        assert listed == [(entry["id"], entry["name"]) for entry in told]
        for snapshot_id, name in listed:
            with applied(path, snapshot_id) as then:
                assert then.size == STEPS[name]
                for wanted in (snapshot_id, name, name.encode()):
                    shown = image.at_snapshot(wanted)
                    assert_reads_as(shown, then, near=list(STEPS.values()))
                    assert_tiles(list(shown.extents()), then.size)
                with open_image(path, snapshot=name) as opened:
                    assert_reads_as(opened, then)
                with converted(path, "-l", f"snapshot.id={snapshot_id}") as shown_by_qemu:
                    common = min(then.size, shown_by_qemu.size)  # qemu-img 7.2 keeps to the size of the active disk
                    assert shown.pread(common, 0) == shown_by_qemu.pread(common, 0)


@contextlib.contextmanager
def applied(path: Path, snapshot_id: str) -> Iterator[RawDisk]:
    """The disk that qemu-img makes of a snapshot when it goes back to it, in a copy of the image."""
    copy = path.with_name("copy.qcow2")
    shutil.copyfile(path, copy)
    qemu_img("snapshot", "-a", snapshot_id, copy)
    with converted(copy) as disk:
        yield disk


def test_a_snapshot_of_version_2_has_the_size_of_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", path, "1M")
    qemu_io(path, "write -P 1 0 1M")
    qemu_img("snapshot", "-c", "then", path)
    qemu_io(path, "write -P 2 64k 64k")
    with converted(path, "-l", "then") as expected, open_image(path, snapshot="then") as image:
        assert_reads_as(image, expected)
        assert image.pread(1, 65536) == b"\1"


def test_an_id_comes_before_a_name(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    for value, name in enumerate(("2", "1", "1"), start=1):
        qemu_io(path, f"write -P {value} 0 64k")
        qemu_img("snapshot", "-c", name, path)  # they get the IDs 1, 2 and 3
    qemu_io(path, "write -P 9 0 64k")
    with open_image(path) as image:
        for wanted in ("1", "2", "3"):
            with converted(path, "-l", wanted) as expected:
                assert image.at_snapshot(wanted).pread(1, 0) == expected.pread(1, 0) == bytes([int(wanted)])
    qemu_img("snapshot", "-d", "2", path)  # by name: it has the ID 1
    with open_image(path, snapshot="1") as image, converted(path, "-l", "1") as expected:
        assert image.pread(1, 0) == expected.pread(1, 0) == b"\2"


def test_snapshots_that_were_deleted_and_applied(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    for value, name in enumerate(("a", "b", "c"), start=1):
        qemu_io(path, f"write -P {value} {value * 64}k 256k")
        qemu_img("snapshot", "-c", name, path)
    qemu_img("snapshot", "-d", "b", path)
    qemu_img("snapshot", "-a", "a", path)
    qemu_io(path, "write -P 4 100k 100k")
    with open_image(path) as image:
        with converted(path) as expected:
            assert_reads_as(image, expected)
        for name in ("a", "c"):
            with converted(path, "-l", name) as expected:
                assert_reads_as(image.at_snapshot(name), expected)
        with pytest.raises(MissingReferenceError, match='no internal snapshot "b"'):
            image.at_snapshot("b")


@pytest.mark.parametrize("wanted", ["", "2", "Then", "then ", "snapshot=then"])
def test_a_snapshot_that_does_not_exist_is_refused(wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_img("snapshot", "-c", "then", path)
    with no_descriptor_left(), pytest.raises(MissingReferenceError, match="no internal snapshot"):
        open_image(path, snapshot=wanted)
