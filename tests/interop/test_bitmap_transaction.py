"""QEMU and changes of bitmaps on several images: it reads what they leave, and what it does in between is not lost.

And a program that is killed, at every step, in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qcow2_plugin import create_image, open_image
from qcow2_plugin.engine.dirty_bitmaps.bitmap_plan import rotating
from qcow2_plugin.format.transaction import Record
from qcow2_plugin.operations.bitmap_health import bitmap_health
from qcow2_plugin.operations.bitmaps import add_bitmap
from qcow2_plugin.operations.transaction import bitmap_transaction, recover_transaction
from qcow2_plugin.operations.transaction_record import RecordFile
from tests.crash.campaign import DEPTH
from tests.support.command import process_environment
from tests.support.image_checker import check_image
from tests.support.tools import ToolError, qemu_img, qemu_img_json, qemu_io

MIB = 1 << 20
NAMES = ("a.qcow2", "b.qcow2")
ROTATE = rotating(b"b0", b"b1")
STEPS = 10_000 if DEPTH > 1 else 30


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as QEMU has made them, when a transaction of them is prepared, and when it is committed."""
    folder = tmp_path_factory.mktemp("transaction")
    (folder / "disks").mkdir()
    disks = [folder / "disks" / name for name in NAMES]
    for disk in disks:
        qemu_img("create", "-q", "-f", "qcow2", disk, "8M")
        qemu_img("bitmap", "--add", disk, "b0")
        qemu_io(disk, "write -P 1 1M 64k")
    shutil.copytree(folder / "disks", folder / "first")
    switch = RecordFile.switch

    def copying(file: RecordFile, record: Record) -> None:
        shutil.copytree(folder / "disks", folder / "prepared")
        switch(file, record)
        shutil.copytree(folder / "disks", folder / "committed")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RecordFile, "switch", copying)
        bitmap_transaction({disk: ROTATE for disk in disks})
    return folder


@pytest.fixture(autouse=True)
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made / "first", tmp_path / "disks")
    monkeypatch.chdir(tmp_path / "disks")
    return tmp_path


def told(path: str | Path) -> dict[str, list[str]]:
    """Names and flags as QEMU has them."""
    bitmaps = qemu_img_json("info", "-f", "qcow2", path)["format-specific"]["data"].get("bitmaps", [])
    return {each["name"]: each["flags"] for each in bitmaps}


OLD = {"b0": ["auto"]}
NEW = {"b0": [], "b1": ["auto"]}


def check(path: str | Path, *, leaks: bool = False) -> None:
    try:
        qemu_img("check", "-f", "qcow2", path)
    except ToolError as error:
        assert leaks, error
        assert error.returncode == 3, error


@pytest.fixture(params=["prepared", "committed"])
def stage(request: pytest.FixtureRequest, made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Leaves the test where a crash has left the images."""
    stage: str = request.param
    shutil.copytree(made / stage, folder / stage)
    monkeypatch.chdir(folder / stage)
    return stage


def record() -> str:
    (found,) = Path().glob("*.transaction")
    return str(found)


def test_qemu_reads_what_is_left_and_goes_on_from_there() -> None:
    bitmap_transaction({name: ROTATE for name in NAMES})
    for name in NAMES:
        check(name)
        assert told(name) == NEW
        qemu_io(name, "write -P 2 4M 64k")
        assert told(name) == NEW
        assert [(each.state.value, each.dirty_size) for each in bitmap_health(name)] == [
            ("usable", 65536),
            ("usable", 65536),
        ]
    for name in NAMES:
        qemu_img("bitmap", "--merge", "b0", name, "b1")
    bitmap_transaction({name: rotating(b"b1", b"b2") for name in NAMES})
    check("a.qcow2")
    assert [each.dirty_size for each in bitmap_health("a.qcow2")] == [65536, 131072, 0]


def test_qemu_sees_the_old_bitmaps_in_the_middle_and_no_errors_but_leaks(stage: str) -> None:
    for name in NAMES:
        check(name, leaks=True)
        assert told(name) == OLD


def test_after_recovery_qemu_agrees(stage: str) -> None:
    recover_transaction(record())
    for name in NAMES:
        check(name, leaks=True)
        assert told(name) == (OLD if stage == "prepared" else NEW)
        qemu_img("check", "-q", "-r", "leaks", name)
        check(name)
        (b0, *_) = bitmap_health(name)
        assert (b0.state.value, b0.dirty_size) == ("usable", 65536)


@pytest.mark.parametrize(
    "command",
    [
        ("qemu-io", "-f", "qcow2", "-c", "write -P 3 6M 64k", "a.qcow2"),
        ("qemu-img", "check", "-q", "-r", "leaks", "a.qcow2"),
        ("qemu-img", "bitmap", "--add", "a.qcow2", "more"),
        ("qemu-img", "resize", "-q", "a.qcow2", "16M"),
        ("qemu-img", "snapshot", "-c", "now", "a.qcow2"),
    ],
    ids=lambda command: " ".join(command[:3]),
)
def test_what_qemu_does_in_between_is_not_lost(stage: str, command: tuple[str, ...]) -> None:
    subprocess.run(command, check=True, capture_output=True)
    found = told("a.qcow2")
    assert found["b0"] == ["auto"]
    with open_image("a.qcow2") as image:
        assert sorted(bitmap.name.decode() for bitmap in image.bitmaps()) == sorted(found)
    outcomes = [outcome for _, outcome in recover_transaction(record())]
    assert outcomes == ["void", "old" if stage == "prepared" else "new"]
    assert told("a.qcow2") == found, "it follows the disk still"
    check("a.qcow2", leaks=True)
    health = {each.name: each for each in bitmap_health("a.qcow2")}
    assert health["b0"].state.value == "usable"
    assert health["b0"].dirty_size == (131072 if command[0] == "qemu-io" else 65536)
    qemu_img("check", "-q", "-r", "leaks", "a.qcow2")
    check("a.qcow2")


# ---- killed

KILLED = """
import os, shutil, signal, sys
from qcow2_plugin.engine.dirty_bitmaps.bitmap_plan import rotating
from qcow2_plugin.operations.transaction import bitmap_transaction
from qcow2_plugin.storage import directory
from qcow2_plugin.storage.file import FileStorage

first, names, steps = sys.argv[1], sys.argv[2].split(), int(sys.argv[3])
left = calls = 0

def counted(original):
    def call(*arguments, **options):
        global left, calls
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left, calls = left - 1, calls + 1
        return original(*arguments, **options)
    return call

for owner, verbs in ((FileStorage, ("write_from", "write_vector", "barrier")),
                     (directory, ("write_new", "make_names_durable")), (os, ("replace", "unlink"))):
    for verb in verbs:
        setattr(owner, verb, counted(getattr(owner, verb)))

def run(folder, limit):
    global left
    shutil.copytree(first, folder)
    left = limit
    bitmap_transaction({os.path.join(folder, name): rotating(b"b0", b"b1") for name in names})

run("all", -1)
for step in sorted({step * calls // steps for step in range(steps)}):
    folder = f"killed-{step}"
    child = os.fork()
    if not child:
        run(folder, step)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
print(calls)
"""


def test_a_program_that_is_killed_at_every_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or at some of them, evenly spread."""
    monkeypatch.chdir(folder)
    words = [sys.executable, "-c", KILLED, str(folder / "disks"), " ".join(NAMES), str(STEPS)]
    calls = int(subprocess.run(words, capture_output=True, env=process_environment(), text=True, check=True).stdout)
    assert calls > 40
    sides = set()
    folders = sorted(folder.glob("killed-*"))
    assert len(folders) > min(STEPS, calls) // 2
    for number, here in enumerate(folders):
        monkeypatch.chdir(here)
        sides.add(side_after(here, asks_qemu=number % 6 == 0))
    assert sides == {"old", "new"}


def side_after(here: Path, *, asks_qemu: bool) -> str:
    """On which side all images are, after recovery."""
    seen = [bitmaps_in(name) for name in NAMES]
    for found in here.glob("*.transaction"):
        recover_transaction(found)
    bitmaps = [bitmaps_in(name) for name in NAMES]
    assert bitmaps == seen, "readers saw something else"
    assert bitmaps in ([["b0"]] * 2, [["b0", "b1"]] * 2), here.name
    for name in NAMES:
        assert check_image(Path(name).read_bytes()).is_sound
        if asks_qemu:
            check(name, leaks=True)
            assert told(name) == (OLD if len(bitmaps[0]) == 1 else NEW)
        assert bitmap_health(name)[0].dirty_size == 65536
    left = {each.name for each in here.iterdir()} - set(NAMES)
    assert all(name.endswith(".transaction.new") for name in left), left
    return "old" if len(bitmaps[0]) == 1 else "new"


def bitmaps_in(path: str) -> list[str]:
    with open_image(path) as image:
        return [bitmap.name.decode() for bitmap in image.bitmaps()]


# ---- threads


def test_writers_go_on_meanwhile_and_every_write_is_in_a_bitmap(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images are written to by threads while their bitmaps are rotated again and again."""
    rotations, granule = 8, 4096
    images = []
    for name in ("x.qcow2", "y.qcow2"):
        create_image(name, 8 * MIB)
        add_bitmap(name, "r0", granularity=granule)
        images.append(open_image(name, writable=True))
    written: list[list[tuple[int, int]]] = [[], []]
    turn = 0
    stop = threading.Event()

    def write(number: int) -> None:
        place = 0
        while not stop.is_set():
            before = turn
            images[number].pwrite(b"w" * 100, place % (8 * MIB))
            if before == turn:
                written[number].append((before, place % (8 * MIB)))
            place += granule * 37

    threads = [threading.Thread(target=write, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for rotation in range(rotations):
        old, new = b"r%d" % rotation, b"r%d" % (rotation + 1)
        turn = -1  # in one of them, but who knows in which
        bitmap_transaction({image: rotating(old, new) for image in images})
        turn = rotation + 1
        stop.wait(0.02)
    stop.set()
    for thread in threads:
        thread.join()
    for image in images:
        image.close()
    assert not [name for name in os.listdir() if name.endswith(".transaction")]
    for number, name in enumerate(("x.qcow2", "y.qcow2")):
        check(name)
        with open_image(name) as image:
            marked = {}
            for rotation in range(rotations + 1):
                bitmap = image.dirty_bitmap(f"r{rotation}")
                marked[rotation] = {
                    place
                    for start, length in bitmap.ranges(0, 8 * MIB)
                    for place in range(start // granule, (start + length) // granule)
                }
        assert written[number]
        for rotation, place in written[number]:
            if rotation >= 0:
                assert place // granule in marked[rotation]
            else:
                assert any(place // granule in each for each in marked.values())
