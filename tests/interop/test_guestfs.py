"""libguestfs on our drives: what it finds in a guest, and what becomes of what it writes.

A launch of its appliance takes a quarter of a minute of CPU where there is no KVM, so there are few: one looks at all
kinds of images, one writes.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from qcow2_plugin import add_bitmap, check, create_image, open_image
from qcow2_plugin.adapters.guestfs import Drive, Guest, appliance, guestfs_drive, inspect
from tests.support import qemu_bitmaps
from tests.support.command import COMMAND, process_environment
from tests.support.guest import MIB, ROOT_LENGTH, ROOT_OFFSET, SIZE, TinyGuest
from tests.support.tools import qemu_img, qemu_img_json, qemu_io, run

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/inspect_guest.py"
TIMEOUT = 900  # seconds; for a machine that is busy with other things
pytestmark = [
    pytest.mark.timeout(TIMEOUT + 60),
    pytest.mark.skipif(
        not (
            shutil.which("guestfish")
            and subprocess.run(
                ["/usr/bin/python3", "-I", "-c", "import guestfs"], capture_output=True, check=False
            ).returncode
            == 0
        ),
        reason="libguestfs is not installed (python3-guestfs, guestfish)",
    ),
    pytest.mark.skipif(
        not any(
            os.access(kernel, os.R_OK)
            for kernel in glob.glob("/boot/vmlinu[xz]-*") + glob.glob("/lib/modules/*/vmlinuz")
        ),
        reason="no kernel here that libguestfs could start",
    ),
]
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
"""GPT's type for file systems of Linux."""
KINDS = ("raw", "plain", "compressed", "chain", "snapshot")
WITH_SECOND = "plain"
"""The guest with a second partition."""


def garbage(length: int) -> bytes:
    return np.random.default_rng(7).bytes(length)


def raw_data_file(raw: Path) -> Path:
    path = raw.with_suffix(".qcow2")
    create_image(path, data_file=raw, data_file_raw=True, keep_data_file=True)
    return path


def chain_of_three(raw: Path) -> Path:
    """The disk over three images; what lies below what counts is garbage."""
    base, middle, top = (raw.with_name(f"{raw.stem}-{name}.qcow2") for name in ("base", "middle", "top"))
    qemu_img("convert", "-O", "qcow2", raw, base)
    disk = raw.read_bytes()
    with open_image(base, writable=True) as image:
        image.pwrite(garbage(8 * MIB), MIB)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", middle)
    with open_image(middle, writable=True) as image:
        image.pwrite(garbage(4 * MIB), MIB)
        image.pwrite(disk[5 * MIB : 9 * MIB], 5 * MIB)
    qemu_img("create", "-q", "-f", "qcow2", "-b", middle.name, "-F", "qcow2", top)
    with open_image(top, writable=True) as image:
        image.pwrite(disk[MIB : 5 * MIB], MIB)
    return top


def with_snapshot(raw: Path) -> Path:
    """The guest as the snapshot "then" keeps it; now there is nothing of it."""
    path = raw.with_suffix(".qcow2")
    qemu_img("convert", "-O", "qcow2", raw, path)
    qemu_img("snapshot", "-c", "then", path)
    qemu_io(path, f"write -q -P 0xee 0 {SIZE}")
    return path


class Found(NamedTuple):
    """What was found on the drives of each kind, and how the child told it."""

    drives: dict[str, Drive]
    guests: dict[str, Guest]
    told: Any


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What one launch finds on a drive of each kind."""
    answers = []

    def noted(*arguments: Any, **options: Any) -> appliance.Answer:
        answers.append(appliance.ask(*arguments, **options))
        return answers[-1]

    folder = tmp_path_factory.mktemp("guests")
    raws = {}
    for number, kind in enumerate(KINDS):
        guest = TinyGuest(f"guest-{kind}", f"12.{number}", has_second=kind == WITH_SECOND)
        raws[kind] = guest.build(folder / f"{kind}.raw", folder / kind)
    images = {"raw": raw_data_file(raws["raw"]), "chain": chain_of_three(raws["chain"])}
    for kind, option in (("plain", "-p"), ("compressed", "-c")):
        images[kind] = folder / f"{kind}, %20 disk.qcow2"
        qemu_img("convert", option, "-O", "qcow2", raws[kind], images[kind])
    images["snapshot"] = with_snapshot(raws["snapshot"])
    with ExitStack() as resources, pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcow2_plugin.adapters.guestfs.inspection.ask", noted)
        drives = [
            resources.enter_context(guestfs_drive(images[kind], snapshot="then" if kind == "snapshot" else None))
            for kind in KINDS
        ]
        guests = inspect(drives, timeout=TIMEOUT)
    (answer,) = answers
    return Found(dict(zip(KINDS, drives, strict=True)), dict(zip(KINDS, guests, strict=True)), answer.told)


@pytest.mark.parametrize("kind", KINDS)
def test_a_guest_is_found(kind: str, found: Found) -> None:
    drive, guest = found.drives[kind], found.guests[kind]
    assert drive.kind == guest.kind == ("raw" if kind == "raw" else "nbd")
    assert (guest.virtual_size, guest.partition_table) == (SIZE, "gpt")
    first, *rest = guest.partitions
    assert (first.start, first.length, first.type) == (ROOT_OFFSET, ROOT_LENGTH, LINUX)
    assert first.device == f"{guest.device}1"
    root, *others = guest.file_systems
    assert (root.device, root.type, root.label, root.size) == (first.device, "ext4", "root", ROOT_LENGTH)
    assert root.uuid is not None
    assert root.free is not None
    assert 0 < root.free < ROOT_LENGTH
    assert [(empty.device, empty.type, empty.free) for empty in others] == [
        (second.device, "unknown", None) for second in rest
    ]
    assert len(rest) == (kind == WITH_SECOND)
    (system,) = guest.operating_systems
    assert (system.type, system.distribution) == ("linux", "debian")
    assert (system.major, system.minor) == (12, KINDS.index(kind))
    assert system.host_name == f"guest-{kind}"
    assert (system.architecture, system.package_format) == ("x86_64", "deb")
    assert system.mount_points == {"/": first.device}, "all have the same label, which the fstab names"


def test_the_data_file_of_a_raw_image_is_the_drive_itself(found: Found) -> None:
    drive = found.drives["raw"]
    assert drive.path == os.path.splitext(drive.image)[0] + ".raw"


def test_the_example_shows_the_guests_and_a_file(found: Found, tmp_path: Path) -> None:
    """What it finds is told again, so that only the file takes a launch."""
    request, answer, python = (tmp_path / name for name in ("request", "answer", "python"))
    answer.write_text(json.dumps(found.told) + "\n")
    python.write_text(
        f'#!/bin/sh\ncat >{request}\ngrep -q \'"verb": "inspect"\' {request} && exec cat {answer}\n'
        f'exec /usr/bin/python3 "$@" <{request}\n'
    )
    python.chmod(0o755)
    program = (
        "import runpy, sys\n"
        "from qcow2_plugin.adapters.guestfs import appliance\n"
        f"appliance._PYTHONS = ({str(python)!r},)\n"
        "sys.argv[:1] = []\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    images = [drive.image for drive in found.drives.values()]
    done = subprocess.run(
        [sys.executable, "-c", program, EXAMPLE, *images],
        capture_output=True,
        text=True,
        env=process_environment(),
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for image, (kind, guest) in zip(images, found.guests.items(), strict=True):
        place = lines.index(f"{image}: {len(guest.partitions)} partitions, read as {'raw' if kind == 'raw' else 'nbd'}")
        device = guest.partitions[0].device
        assert lines[place + 1] == f"  {device}: debian 12 guest-{kind} x86_64"
        assert lines[place + 2].startswith(f"  {device}: ext4, ")
    assert lines[-4:] == [
        *('  | PRETTY_NAME="Debian GNU/Linux 12.0"', '  | NAME="Debian GNU/Linux"', "  | ID=debian"),
        '  | VERSION_ID="12"',
    ]


# ---- writing


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, str]]:
    """Two disks after one session of guestfish that wrote to both; what it said."""
    folder = tmp_path_factory.mktemp("written")
    plain, guest = folder / "plain.qcow2", folder / "guest.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", plain, "64M")
    # What a file system will write over: old data below zero clusters, in all that it will use.
    qemu_io(plain, "write -q -P 0xdd 0 64M", "write -q -z 0 48M")
    raw = TinyGuest("writer", files={"etc/greeting": b"from the guest\n"}).build(folder / "guest.raw", folder / "tree")
    create_image(guest, data_file=raw, data_file_raw=True, keep_data_file=True)
    for image in (plain, guest):
        add_bitmap(image, "changes", granularity=65536)
        convert_to_file(image, image.with_suffix(".old"))
    (folder / "big").write_bytes(garbage(6 * MIB))
    script = f"""\
run
mkfs ext4 /dev/sda
mount /dev/sda /
mkdir /folder
write /folder/file "written by guestfish"
upload {folder}/big /folder/big
sync
umount-all
mount /dev/sdb1 /
cat /etc/greeting
upload {folder}/big /home/big
rm /etc/greeting
fstrim /
sync
umount-all
shutdown
"""
    ended = subprocess.run(
        [*COMMAND, "guestfs", "--rw", "--run", str(plain), str(guest), "--", "guestfish"],
        input=script,
        capture_output=True,
        text=True,
        env=process_environment(),
        timeout=TIMEOUT,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    yield plain, guest, ended.stdout


def convert_to_file(image: Path, target: Path) -> None:
    with contextlib.chdir(image.parent):  # where QEMU looks for a data file
        qemu_img("convert", "-f", "qcow2", "-O", "raw", image, target)


def changed_ranges(before: Path, after: Path, granularity: int) -> list[int]:
    """The offsets of the granules whose bytes differ."""
    old, new = (np.fromfile(path, np.uint8).reshape(-1, granularity) for path in (before, after))
    return [int(index) * granularity for index in np.flatnonzero((old != new).any(axis=1))]


@pytest.mark.parametrize("which", [0, 1], ids=["zero clusters", "raw data file"])
def test_every_change_is_marked_and_nothing_is_damaged(
    which: int, written: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = (written[0], written[1])[which]
    monkeypatch.chdir(image.parent)
    new = image.with_suffix(".new")
    convert_to_file(image, new)
    changed = changed_ranges(image.with_suffix(".old"), new, 65536)
    assert len(changed) > 6 * MIB // 65536
    marked = qemu_bitmaps.dirty(image, "changes")
    assert all(any(start <= offset < start + length for start, length in marked) for offset in changed)
    assert sum(length for _, length in marked) < SIZE, "it says nothing if it marks all"
    qemu_img("check", image)
    assert check(image, deep=True).corruptions == 0


def test_zero_clusters_are_true(written: tuple[Path, Path, str]) -> None:
    """What was not written to still reads as zeros, though there is old data below; what was does not."""
    plain, new = written[0], written[0].with_suffix(".new")
    convert_to_file(plain, new)
    disk = np.fromfile(new, np.uint8)
    zeros = [each for each in qemu_img_json("map", plain) if each["zero"]]
    assert zeros
    for each in zeros:
        assert not disk[each["start"] : each["start"] + each["length"]].any()
    sectors = disk[: 48 * MIB].reshape(-1, 512)
    assert not (sectors == 0xDD).all(axis=1).any(), "what the zero clusters hid"


def test_the_raw_data_file_is_the_disk(written: tuple[Path, Path, str]) -> None:
    guest = written[1]
    convert_to_file(guest, guest.with_suffix(".again"))
    assert guest.with_suffix(".raw").read_bytes() == guest.with_suffix(".again").read_bytes()


def test_files_are_there_both_ways(written: tuple[Path, Path, str], tmp_path: Path) -> None:
    plain, guest, said = written
    assert said == "from the guest\n\n"
    disk = tmp_path / "plain.raw"
    convert_to_file(plain, disk)
    root = tmp_path / "root.raw"
    with open(guest.with_suffix(".raw"), "rb") as whole:
        whole.seek(ROOT_OFFSET)
        root.write_bytes(whole.read(ROOT_LENGTH))
    for system, path in ((disk, "/folder/big"), (root, "/home/big")):
        run("e2fsck", "-f", "-n", system)
        run("debugfs", "-R", f"dump {path} {tmp_path}/dumped", system)
        assert (tmp_path / "dumped").read_bytes() == garbage(6 * MIB)
    assert run("debugfs", "-R", "cat /folder/file", disk) == "written by guestfish"
    assert "File not found" in run("sh", "-c", f"debugfs -R 'cat /etc/greeting' {root} 2>&1")
