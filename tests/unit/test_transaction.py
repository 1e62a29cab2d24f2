"""Changes of the bitmaps of several image files: how they go through, how they are refused, how they are finished."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcow2_plugin import Policy, check, create_image, info, open_image, vet
from qcow2_plugin.engine.dirty_bitmaps import unfinished
from qcow2_plugin.engine.dirty_bitmaps.bitmap_plan import BitmapChange, Verb, rotating
from qcow2_plugin.engine.header import read_header
from qcow2_plugin.errors import (
    BitmapError,
    CorruptImageError,
    HeaderFullError,
    ImageLockedError,
    MissingReferenceError,
    OptionError,
    Qcow2Error,
    ReadOnlyImageError,
    UnfinishedTransactionError,
)
from qcow2_plugin.format.header import BitmapsPointer, Header
from qcow2_plugin.format.transaction import Mark, Record, mark_of, marked
from qcow2_plugin.operations import transaction
from qcow2_plugin.operations.bitmap_health import bitmap_health
from qcow2_plugin.operations.bitmaps import add_bitmap, remove_bitmap
from qcow2_plugin.operations.transaction import bitmap_transaction, forget_transaction, recover_transaction
from qcow2_plugin.operations.transaction_record import RecordFile
from qcow2_plugin.storage.opener import open_given
from tests.support.builder import patch
from tests.support.hostile import assert_harmless_text, unharmed
from tests.support.image_checker import check_image
from tests.support.watching import audited_opens

MIB = 1 << 20
ROTATE = rotating(b"b0", b"b1")
NAMES = ("a.qcow2", "b.qcow2", "c.qcow2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as they are at first, when a transaction of them is prepared, and when it is committed."""
    folder = tmp_path_factory.mktemp("transaction")
    (folder / "disks").mkdir()
    for name in NAMES:
        create_image(folder / "disks" / name, MIB)
        add_bitmap(folder / "disks" / name, "b0")
    shutil.copytree(folder / "disks", folder / "first")
    interrupt(folder)
    return folder


def interrupt(folder: Path, record: str | None = None) -> None:
    """Run a transaction of the images in "disks", and leave what is there half-way in "prepared" and "committed"."""
    switch = RecordFile.switch

    def copying(file: RecordFile, told: Record) -> None:
        shutil.copytree(folder / "disks", folder / "prepared")
        switch(file, told)
        shutil.copytree(folder / "disks", folder / "committed")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RecordFile, "switch", copying)
        bitmap_transaction({folder / "disks" / name: ROTATE for name in NAMES}, record=record)


@pytest.fixture(autouse=True)
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made / "first", tmp_path / "disks")
    monkeypatch.chdir(tmp_path / "disks")
    return tmp_path


def names_in(path: str) -> list[str]:
    with open_image(path) as image:
        return [bitmap.name.decode() for bitmap in image.bitmaps()]


def assert_sound(*paths: str) -> None:
    for path in paths:
        assert check_image(Path(path).read_bytes()).is_sound


# ---- what goes through


def test_all_images_change_and_nothing_is_left() -> None:
    bitmap_transaction({name: ROTATE for name in NAMES})
    for name in NAMES:
        assert [(each.name, each.state.value, each.enabled) for each in bitmap_health(name)] == [
            ("b0", "usable", False),
            ("b1", "usable", True),
        ]
        assert check_image(Path(name).read_bytes()).all_leaks == 0
    assert sorted(os.listdir()) == sorted(NAMES)


def test_open_images_and_paths_together() -> None:
    with open_image("a.qcow2", writable=True) as image:
        image.pwrite(b"before", 0)
        bitmap_transaction({image: ROTATE, "b.qcow2": [BitmapChange(Verb.CLEAR, b"b0")], Path("c.qcow2"): ROTATE})
        image.pwrite(b"after", 512 << 10)
    with open_image("a.qcow2") as image:
        assert [extent.guest_offset for extent in image.dirty_extents("b0")] == [0]
        assert [extent.guest_offset for extent in image.dirty_extents("b1")] == [512 << 10]


def test_of_one_image_only_the_header_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecordFile, "create", None)
    bitmap_transaction({"a.qcow2": ROTATE, "b.qcow2": []})
    bitmap_transaction({"c.qcow2": ROTATE, "b.qcow2": [BitmapChange(Verb.ENABLE, b"b0")]})  # enabled already
    assert (names_in("a.qcow2"), names_in("b.qcow2"), names_in("c.qcow2")) == (["b0", "b1"], ["b0"], ["b0", "b1"])
    bitmap_transaction({})


# ---- what is refused


def test_a_refusal_by_one_changes_none() -> None:
    before = [Path(name).read_bytes() for name in NAMES]
    remove = [BitmapChange(Verb.REMOVE, b"other")]
    with pytest.raises(MissingReferenceError, match="other"):
        bitmap_transaction({"a.qcow2": ROTATE, "b.qcow2": ROTATE, "c.qcow2": remove})
    with pytest.raises(BitmapError):
        bitmap_transaction({"a.qcow2": ROTATE, "b.qcow2": [BitmapChange(Verb.ADD, b"b0")]})
    with open_image("c.qcow2"), pytest.raises(ImageLockedError):
        bitmap_transaction({"a.qcow2": ROTATE, "c.qcow2": ROTATE})
    with pytest.raises(FileNotFoundError):
        bitmap_transaction({"a.qcow2": ROTATE, "d.qcow2": ROTATE})
    with open_image("c.qcow2") as image, pytest.raises(ReadOnlyImageError):
        bitmap_transaction({"a.qcow2": ROTATE, image: ROTATE})
    assert [Path(name).read_bytes()[:65536] for name in NAMES] == [content[:65536] for content in before]
    assert [names_in(name) for name in NAMES] == [["b0"]] * 3
    assert sorted(os.listdir()) == sorted(NAMES)
    assert_sound(*NAMES)


def test_an_image_that_is_elsewhere_by_now(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record would name another file."""
    with open_image("a.qcow2", writable=True) as image:
        for move in (lambda: os.rename("a.qcow2", "moved.qcow2"), lambda: shutil.copy("b.qcow2", "a.qcow2")):
            move()
            with pytest.raises(OptionError, match="no longer"):
                bitmap_transaction({image: ROTATE, "b.qcow2": ROTATE}, record="record")
        os.replace("moved.qcow2", "a.qcow2")
        bitmap_transaction({image: ROTATE, "b.qcow2": ROTATE}, record="record")


def test_the_same_image_by_two_names() -> None:
    os.link("a.qcow2", "same.qcow2")
    with pytest.raises(ImageLockedError):
        bitmap_transaction({"a.qcow2": ROTATE, "same.qcow2": ROTATE})
    assert names_in("a.qcow2") == ["b0"]


def test_a_record_that_exists_is_not_written_over() -> None:
    Path("record").write_text("mine")
    with pytest.raises(OptionError, match="the record exists"):
        bitmap_transaction({"a.qcow2": ROTATE, "b.qcow2": ROTATE}, record="record")
    assert Path("record").read_text() == "mine"
    with pytest.raises(FileNotFoundError):
        bitmap_transaction({"a.qcow2": ROTATE, "b.qcow2": ROTATE}, record="nowhere/record")
    assert names_in("a.qcow2") == names_in("b.qcow2") == ["b0"]


def test_the_record_is_beside_an_image_that_is_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In /dev it would be gone after a restart."""
    monkeypatch.setattr(stat, "S_ISBLK", lambda mode: True)
    with pytest.raises(OptionError, match="option record"):
        bitmap_transaction({"a.qcow2": ROTATE, "b.qcow2": ROTATE})
    assert names_in("a.qcow2") == ["b0"]
    bitmap_transaction({"a.qcow2": ROTATE, "b.qcow2": ROTATE}, record="record")
    assert names_in("a.qcow2") == ["b0", "b1"]


def test_a_header_without_room_for_the_mark() -> None:
    create_image("small.qcow2", MIB, cluster_size=512)
    add_bitmap("small.qcow2", "b0")
    far = Path("x" * 200) / ("y" * 200)
    far.mkdir(parents=True)
    with pytest.raises(HeaderFullError):
        bitmap_transaction({"small.qcow2": ROTATE, "b.qcow2": ROTATE}, record=far / "record")
    assert (names_in("small.qcow2"), names_in("b.qcow2"), os.listdir(far)) == (["b0"], ["b0"], [])
    assert check_image(Path("small.qcow2").read_bytes()).all_leaks == 0
    bitmap_transaction({"small.qcow2": ROTATE, "b.qcow2": ROTATE})
    assert names_in("small.qcow2") == ["b0", "b1"]


def test_the_way_back_is_tried_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(stored: bytes, old: Header, new: Header) -> tuple[bytes, Header]:
        if mark_of(new) is None:
            raise HeaderFullError("no room to go on")
        return stored, new

    monkeypatch.setattr(transaction, "rehearse", refuse)
    monkeypatch.setattr(RecordFile, "create", None)
    with pytest.raises(HeaderFullError, match="no room to go on"):
        bitmap_transaction({"a.qcow2": ROTATE, "b.qcow2": ROTATE})
    assert names_in("a.qcow2") == names_in("b.qcow2") == ["b0"]


# ---- what was interrupted


@pytest.fixture(params=["prepared", "committed"])
def interrupted(
    request: pytest.FixtureRequest, made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """Leaves the test where a crash has left the images; the names of the bitmaps that they have to have."""
    shutil.copytree(made / request.param, folder / "interrupted")
    monkeypatch.chdir(folder / "interrupted")
    yield ["b0"] if request.param == "prepared" else ["b0", "b1"]
    assert_sound(*NAMES)


def record() -> str:
    (found,) = Path().glob("*.transaction")
    return str(found)


def test_readers_see_what_the_record_says(interrupted: list[str]) -> None:
    before = [Path(name).read_bytes() for name in NAMES]
    for name in NAMES:
        assert names_in(name) == interrupted
        with open_image(name) as image:
            assert [each.state.value for each in bitmap_health(image)] == ["usable"] * len(interrupted)
    assert [Path(name).read_bytes() for name in NAMES] == before


def test_looks_at_one_file_say_that_it_is_in_doubt(interrupted: list[str]) -> None:
    found = info("a.qcow2").qcow2
    assert found is not None
    assert "in doubt" in found.problems[0]
    (whole,) = bitmap_health("a.qcow2")
    assert (whole.name, whole.state.value, whole.needs_full) == (None, "unfinished", True)
    assert whole.next_step == (
        f"Finish it: qcow2 bitmap recover {record()}; "
        "or, if that file is lost for good: qcow2 bitmap recover --lost a.qcow2"
    )
    assert record() in found.problems[0]
    (named,) = bitmap_health("a.qcow2", ["b0"])
    assert (named.name, named.state.value) == ("b0", "unfinished")


def test_an_image_that_is_to_get_its_first_bitmap_is_in_doubt_as_well() -> None:
    remove_bitmap("a.qcow2", "b0")
    put_mark(BitmapsPointer(1, 32, 1 << 16), b"record")
    assert [(each.name, each.state.value) for each in bitmap_health("a.qcow2")] == [(None, "unfinished")]
    assert [(each.name, each.state.value) for each in bitmap_health("a.qcow2", ["b1"])] == [("b1", "unfinished")]


def test_a_mark_that_cannot_be_read_has_a_way_out(folder: Path) -> None:
    put_mark(BitmapsPointer(1, 32, 1 << 16), b"")
    (whole,) = bitmap_health("a.qcow2")
    assert whole.next_step == "Go back to the bitmaps of before: qcow2 bitmap recover --lost a.qcow2"
    with pytest.raises(CorruptImageError, match="bitmap recover --lost"):
        open_image("a.qcow2", writable=True)
    assert forget_transaction("a.qcow2")
    assert names_in("a.qcow2") == ["b0"]


def test_a_service_that_vets_images_wants_none_of_it(interrupted: list[str]) -> None:
    verdict = vet("a.qcow2")
    assert not verdict.accepted
    assert "interrupted" in verdict.reasons[0]
    recover_transaction(record())
    assert vet("a.qcow2").accepted


def test_the_next_writer_settles_each_image(interrupted: list[str]) -> None:
    for name in NAMES:
        with open_image(name, writable=True) as image:
            assert [bitmap.name.decode() for bitmap in image.bitmaps()] == interrupted
            image.pwrite(b"x", 0)
        assert [each.name for each in bitmap_health(name)] == interrupted
    assert {outcome for _, outcome in recover_transaction(record())} == {"settled"}
    assert sorted(os.listdir()) == sorted(NAMES)


def test_recover_settles_all(interrupted: list[str]) -> None:
    expected = "old" if len(interrupted) == 1 else "new"
    add_bitmap("b.qcow2", "more")  # which settles it first
    outcomes = [(os.path.basename(path), outcome) for path, outcome in recover_transaction(record())]
    assert outcomes == [("a.qcow2", expected), ("b.qcow2", "settled"), ("c.qcow2", expected)]
    assert sorted(os.listdir()) == sorted(NAMES)
    assert names_in("a.qcow2") == interrupted
    assert names_in("b.qcow2") == [*interrupted, "more"]


def test_recover_asks_the_record_when_nobody_can_change_it_any_more(
    interrupted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction that still runs when it is read first may commit, switch one image, and crash."""
    decided = Path(record()).read_bytes()
    Path(record()).write_bytes(decided.replace(b'"committed"', b'"prepared"'))
    read = RecordFile.read

    def reading(file: RecordFile) -> Record:
        told = read(file)
        Path(file.path).write_bytes(decided)
        return told

    monkeypatch.setattr(RecordFile, "read", reading)
    recover_transaction(record())
    assert [names_in(name) for name in NAMES] == [interrupted] * 3


def test_recover_can_be_interrupted_too(interrupted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with open_image("b.qcow2"), pytest.raises(ImageLockedError):
        recover_transaction(record())
    outcomes = [outcome for _, outcome in recover_transaction(record())]
    assert outcomes == ["settled", "old" if len(interrupted) == 1 else "new", "settled"]
    assert [names_in(name) for name in NAMES] == [interrupted] * 3


def test_an_image_that_is_gone_keeps_the_record(interrupted: list[str]) -> None:
    os.rename("b.qcow2", "moved.qcow2")
    with pytest.raises(FileNotFoundError):
        recover_transaction(record())
    assert names_in("c.qcow2") == interrupted
    os.rename("moved.qcow2", "b.qcow2")
    recover_transaction(record())
    assert names_in("b.qcow2") == interrupted


def test_a_lost_record_is_not_guessed(interrupted: list[str]) -> None:
    os.unlink(record())
    before = Path("a.qcow2").read_bytes()
    with pytest.raises(UnfinishedTransactionError, match=r"does not exist.*bitmap recover --lost"):
        open_image("a.qcow2", writable=True)
    with open_image("a.qcow2") as image:
        assert image.pread(4, 0) == bytes(4)
        with pytest.raises(UnfinishedTransactionError, match="in doubt"):
            image.bitmaps()
        with pytest.raises(UnfinishedTransactionError):
            next(image.dirty_extents("b0"))
    assert Path("a.qcow2").read_bytes() == before
    assert forget_transaction("a.qcow2")
    assert not forget_transaction("a.qcow2")
    assert names_in("a.qcow2") == ["b0"]


def test_the_record_of_another_transaction_decides_nothing(interrupted: list[str]) -> None:
    content = Path(record()).read_bytes()
    Path(record()).write_bytes(content.replace(content[content.index(b'"id": "') + 7 :][:8], b"00000000"))
    with pytest.raises(UnfinishedTransactionError, match="of another transaction"):
        open_image("a.qcow2", writable=True)
    assert {outcome for _, outcome in recover_transaction(record())} == {"settled"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b" " * (2 << 20)])
def test_a_damaged_record_decides_nothing(interrupted: list[str], content: bytes) -> None:
    Path(record()).write_bytes(content)
    with pytest.raises(UnfinishedTransactionError, match="cannot be used"):
        open_image("a.qcow2", writable=True)
    with pytest.raises(CorruptImageError, match="transaction record"):
        recover_transaction(record())


def test_no_repair_before_it_is_settled(interrupted: list[str]) -> None:
    """It would free the clusters of one side."""
    assert check("a.qcow2").corruptions == 0
    with pytest.raises(UnfinishedTransactionError):
        check("a.qcow2", repair="leaks")
    recover_transaction(record())
    assert check("a.qcow2", repair="leaks").leaks == 0


def test_an_image_that_is_corrupt_as_well(interrupted: list[str]) -> None:
    """It is repaired afterwards: a repair would free the clusters of one side."""
    patch("a.qcow2", 79, b"\2")
    with pytest.raises(ReadOnlyImageError, match="corrupt"):
        open_image("a.qcow2", writable=True)
    recover_transaction(record())
    check("a.qcow2", repair="all")
    assert names_in("a.qcow2") == interrupted


def test_another_writer_in_between_makes_the_mark_void(interrupted: list[str]) -> None:
    patch("b.qcow2", 88, (1).to_bytes(8, "big"))  # as every program does that does not know the bit
    assert names_in("b.qcow2") == ["b0"]
    with open_image("b.qcow2", writable=True) as image:
        image.pwrite(b"x", 0)
    outcomes = [outcome for _, outcome in recover_transaction(record())]
    assert outcomes[1] == "void"
    assert names_in("b.qcow2") == ["b0"]
    assert names_in("a.qcow2") == interrupted
    remove_bitmap("b.qcow2", "b0")


@pytest.mark.parametrize("stage", ["prepared", "committed"])
def test_a_record_elsewhere_needs_trust(stage: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(folder, str(folder / "record"))
    monkeypatch.chdir(folder / stage)
    told = record_from(folder, stage)
    with pytest.raises(UnfinishedTransactionError, match="it is absolute"):
        open_image("a.qcow2", writable=True)
    with open_image("a.qcow2") as image, pytest.raises(UnfinishedTransactionError):
        image.bitmaps()
    expected = ["b0"] if stage == "prepared" else ["b0", "b1"]
    with open_image("a.qcow2", policy=Policy.TRUSTED) as image:
        assert [bitmap.name.decode() for bitmap in image.bitmaps()] == expected
    with open_image("a.qcow2", writable=True, policy=Policy.TRUSTED):
        pass
    assert names_in("a.qcow2") == expected
    recover_transaction(told)
    assert [names_in(name) for name in NAMES] == [expected] * 3
    assert not told.exists()


def record_from(folder: Path, stage: str) -> Path:
    """The record as it was, with the images where the copies are."""
    storage = open_given("a.qcow2")
    mark = mark_of(read_header(storage))
    storage.close()
    assert mark is not None
    assert mark.record == os.fsencode(folder / "record")
    told = folder / "record"
    told.write_bytes(Record(mark.id, stage == "committed", tuple(f"{stage}/{name}" for name in NAMES)).pack())
    return told


def put_mark(new: BitmapsPointer, record: bytes) -> None:
    """A mark in an image of a stranger."""
    storage = open_given("a.qcow2", writable=True)
    header = read_header(storage)
    unfinished.store(storage, header, marked(header, Mark(bytes(16), new, record)))
    storage.close()


@pytest.mark.parametrize(
    "name",
    [
        b"../record",
        b"/etc/passwd",
        b"link",
        b"fifo",
        b"nowhere/record",
        b"\x1b[2J",
        b"a\0b",
        b"x:y",
        b"folder",
        b"n" * 600,
    ],
    ids=repr,
)
def test_a_mark_follows_no_name_that_it_should_not(name: bytes, folder: Path) -> None:
    """A mark in an image of a stranger: the disk is read, and nothing else happens."""
    told = Record(bytes(16), True, ("a.qcow2",)).pack()
    (folder / "record").write_bytes(told)
    Path("link").symlink_to(folder / "record")
    os.mkfifo("fifo")
    Path("folder").mkdir()
    put_mark(BitmapsPointer(1, 32, 1 << 16), name)
    with unharmed(folder), audited_opens() as opened:
        with open_image("a.qcow2") as image:
            assert image.pread(4, 0) == bytes(4)
            with pytest.raises(Qcow2Error):
                image.bitmaps()
        with pytest.raises(UnfinishedTransactionError) as caught:
            open_image("a.qcow2", writable=True)
    assert_harmless_text(str(caught.value))
    assert "option transaction-record" not in str(caught.value)  # there is none
    absolute = {each for each in opened if each.startswith("/") and not each.startswith("/proc/self/fd/")}
    assert not absolute, "a name was followed"
    assert forget_transaction("a.qcow2")
    assert names_in("a.qcow2") == ["b0"]


def test_a_committed_directory_that_cannot_be_is_refused(folder: Path) -> None:
    Path("record").write_bytes(Record(bytes(16), True, ("a.qcow2",)).pack())
    for pointer in (BitmapsPointer(1, 32, 1 << 40), BitmapsPointer(1, 32, 0), BitmapsPointer(1, 32, 5)):
        put_mark(pointer, b"record")
        before = Path("a.qcow2").read_bytes()
        with pytest.raises(CorruptImageError):
            open_image("a.qcow2", writable=True)
        with pytest.raises(CorruptImageError):
            recover_transaction("record")
        with open_image("a.qcow2") as image:
            assert image.pread(4, 0) == bytes(4)
        assert Path("a.qcow2").read_bytes() == before
    assert forget_transaction("a.qcow2")
