"""relocate and attach: another name in the header and nothing else; what does not fit is refused, byte for byte."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin import Policy, add_bitmap, check, create_image, create_snapshot, info, open_image
from qcow2_plugin.engine.dirty_bitmaps import unfinished
from qcow2_plugin.engine.header import read_header
from qcow2_plugin.errors import (
    DetachError,
    HeaderFullError,
    ImageLockedError,
    MissingReferenceError,
    NotQcow2Error,
    OptionError,
    Qcow2Error,
    ReferenceDeniedError,
    RelocateError,
    UnfinishedTransactionError,
)
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.transaction import Mark, marked
from qcow2_plugin.operations import relocate as module
from qcow2_plugin.operations.adopt import adopt
from qcow2_plugin.operations.detach import detach
from qcow2_plugin.operations.info import Qcow2Info
from qcow2_plugin.operations.relocate import Relocated, attach, relocate
from tests.support.builder import ImageBuilder
from tests.support.command import qcow2
from tests.support.crash_states import Crashes
from tests.support.fields import set_field
from tests.support.file_calls import FileCalls, contents
from tests.support.lockbytes import QEMU_READER, QEMU_WRITER, holding
from tests.support.recording import Log, RecordingStorage
from tests.support.tools import convert_to_raw, qemu_img, qemu_img_json
from tests.support.watching import no_descriptor_left

KIB, MIB = 1 << 10, 1 << 20
LONG = "n" * 200


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("disk.raw").write_bytes(os.urandom(300 * KIB))
    (tmp_path / "sub").mkdir()
    (tmp_path / "images").mkdir()
    return tmp_path


def overlay() -> None:
    """overlay.qcow2 with a bitmap and a snapshot over base.qcow2."""
    create_image("base.qcow2", MIB)
    with open_image("base.qcow2", writable=True) as image:
        image.pwrite(b"base" * 10_000, 5000)
    create_image("overlay.qcow2", backing_file="base.qcow2", backing_format="qcow2")
    create_snapshot("overlay.qcow2", "before")
    with open_image("overlay.qcow2", writable=True) as image:
        image.pwrite(b"top" * 1000, 200 * KIB)
    add_bitmap("overlay.qcow2", "daily")


def told(name: str) -> Qcow2Info:
    found = info(name).qcow2
    assert found is not None
    return found


@contextmanager
def nothing_changes(kind: type[Exception], message: str) -> Iterator[None]:
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with no_descriptor_left(), pytest.raises(kind, match=message):
        yield
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


# ---- names


@pytest.mark.parametrize(
    ("to", "form", "name", "needs_trust"),
    [
        ("moved.raw", None, "moved.raw", False),
        ("sub/moved.raw", None, "sub/moved.raw", False),
        ("../moved.raw", None, "/moved.raw", True),
        ("../moved.raw", "relative", "../moved.raw", True),
        ("moved.raw", "absolute", "/images/moved.raw", True),
        ("a:b", None, "/images/a:b", True),
    ],
)
@pytest.mark.parametrize("missing", [False, True])
def test_the_name_of_a_data_file(
    missing: bool, to: str, form: module.Form | None, name: str, needs_trust: bool
) -> None:
    folder = Path.cwd()
    (folder / "images" / "sub").mkdir()
    shutil.copy("disk.raw", "images/disk.raw")
    adopt("images/disk.raw", "images/disk.qcow2", bitmap="daily")
    if not missing:
        os.rename("images/disk.raw", f"images/{to}")
    expected = f"{folder}{name}" if name.startswith("/") else name
    found = relocate("images/disk.qcow2", data_file=f"images/{to}", form=form, missing=missing)
    assert found == Relocated(expected.encode(), None, ("data file",) if needs_trust else ())
    if missing:
        os.rename("images/disk.raw", f"images/{to}")
    with open_image("images/disk.qcow2", policy=Policy.TRUSTED if needs_trust else Policy.CONFINED) as image:
        assert image.pread(300 * KIB, 0) == Path(f"images/{to}").read_bytes()
        assert list(image.dirty_extents("daily")) == []
    assert check("images/disk.qcow2", policy=Policy.TRUSTED, deep=True).is_sound
    assert told("images/disk.qcow2").data_file == expected


def test_a_directory_that_is_reached_through_a_link(folder: Path) -> None:
    """ ".." of a link is the parent of where it leads."""
    (folder / "far" / "images").mkdir(parents=True)
    (folder / "link").symlink_to("far/images")
    shutil.copy("disk.raw", "link/disk.raw")
    adopt("link/disk.raw", "link/disk.qcow2")
    assert relocate("link/disk.qcow2", data_file="disk.raw", form="relative").data_file == b"../../disk.raw"
    with open_image("link/disk.qcow2", policy=Policy.TRUSTED) as image:
        assert image.pread(MIB // 4, 0) == Path("disk.raw").read_bytes()[: MIB // 4]


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("form", [None, "absolute"])
def test_a_name_behind_a_link_and_back(form: module.Form | None, missing: bool, folder: Path) -> None:
    (folder / "far" / "away").mkdir(parents=True)
    (folder / "link").symlink_to("far/away")
    adopt("disk.raw", "disk.qcow2")
    if not missing:
        shutil.copy("disk.raw", "far/disk.raw")
    expected = "far/disk.raw" if form is None else f"{folder}/far/disk.raw"
    found = relocate("disk.qcow2", data_file="link/../disk.raw", form=form, missing=missing)
    assert found.data_file == expected.encode()


def test_a_link_is_followed_only_by_those_who_trust(folder: Path) -> None:
    adopt("disk.raw", "disk.qcow2")
    (folder / "link.raw").symlink_to("disk.raw")
    assert relocate("disk.qcow2", data_file="link.raw") == Relocated(b"link.raw", None, ("data file",))
    with pytest.raises(ReferenceDeniedError, match="symlink"):
        open_image("disk.qcow2")


@pytest.mark.parametrize("name", ["other.qcow2", f"sub/{LONG}"])
def test_the_name_of_a_backing_file(name: str) -> None:
    overlay()
    view = convert_to_raw(Path("overlay.qcow2"))
    os.rename("base.qcow2", name)
    assert relocate("overlay.qcow2", backing_file=name) == Relocated(None, name.encode(), ())
    assert convert_to_raw(Path("overlay.qcow2")) == view
    qemu_img("check", "overlay.qcow2")
    known = qemu_img_json("info", "overlay.qcow2")
    assert (known["backing-filename"], known["backing-filename-format"]) == (name, "qcow2")
    with open_image("overlay.qcow2") as image:
        assert image.pread(MIB, 0) == view
        assert [each.name for each in image.bitmaps()] == [b"daily"]
        assert image.at_snapshot("before").pread(MIB, 0) == convert_to_raw(Path(name))


def test_both_at_once_and_another_format() -> None:
    create_image("base.raw.qcow2", 64 * KIB)
    create_image("disk.qcow2", MIB, data_file="old.raw", backing_file="base.raw.qcow2", backing_format="qcow2")
    os.rename("old.raw", "new.raw")
    found = relocate("disk.qcow2", data_file="new.raw", backing_file="disk.raw", backing_format="raw")
    assert found == Relocated(b"new.raw", b"disk.raw", ())
    assert convert_to_raw(Path("disk.qcow2"))[: 300 * KIB] == Path("disk.raw").read_bytes()


def test_version_2() -> None:
    create_image("base.qcow2", MIB)
    create_image("overlay.qcow2", version=2, backing_file="base.qcow2", backing_format="qcow2")
    os.rename("base.qcow2", "b2.qcow2")
    relocate("overlay.qcow2", backing_file="b2.qcow2")
    qemu_img("check", "overlay.qcow2")
    assert told("overlay.qcow2").backing_file == "b2.qcow2"


def test_a_format_that_was_not_recorded() -> None:
    ImageBuilder(MIB, 16).backing(b"base.raw", None).build(Path("overlay.qcow2"))
    with nothing_changes(RelocateError, "format of the backing file is not recorded; say it"):
        relocate("overlay.qcow2", backing_file="disk.raw")
    relocate("overlay.qcow2", backing_file="disk.raw", backing_format="raw")
    assert told("overlay.qcow2").backing_format == "raw"


def test_promises_that_nobody_here_keeps_are_taken_back() -> None:
    adopt("disk.raw", "disk.qcow2", bitmap="daily")
    set_field(Path("disk.qcow2"), "autoclear_features", 1 << 40 | 3)
    os.rename("disk.raw", "d.raw")
    relocate("disk.qcow2", data_file="d.raw")
    assert Header.parse(Path("disk.qcow2").read_bytes()[:65536]).autoclear_features == 3


# ---- what is refused


def test_what_the_image_has_not() -> None:
    create_image("plain.qcow2", MIB)
    with nothing_changes(RelocateError, "no external data file"):
        relocate("plain.qcow2", data_file="disk.raw")
    with nothing_changes(RelocateError, "has no backing file; 'qemu-img rebase' gives it one"):
        relocate("plain.qcow2", backing_file="disk.raw", backing_format="raw")
    with nothing_changes(OptionError, "say which file"):
        relocate("plain.qcow2")
    with nothing_changes(OptionError, "cannot be compared"):
        relocate("plain.qcow2", data_file="disk.raw", missing=True, verify=True)
    with nothing_changes(OptionError, "backing_format, but no backing_file"):
        relocate("plain.qcow2", data_file="disk.raw", backing_format="raw")
    with nothing_changes(RelocateError, "no external data file"):
        attach("plain.qcow2", "disk.raw")


def test_no_file_gets_two_parts(folder: Path) -> None:
    overlay()
    create_image("top.qcow2", data_file="top.raw", backing_file="overlay.qcow2", backing_format="qcow2")
    os.link("overlay.qcow2", "hardlink")
    os.symlink("top.qcow2", "symlink")
    for name in ("top.qcow2", "symlink", "overlay.qcow2", "hardlink", "base.qcow2"):
        with nothing_changes(ReferenceDeniedError, "the same file as"):
            relocate("top.qcow2", data_file=name)
    for name in ("top.qcow2", "symlink", "top.raw"):
        with nothing_changes(ReferenceDeniedError, "the same file as"):
            relocate("top.qcow2", backing_file=name, backing_format="raw")
    with nothing_changes(ReferenceDeniedError, "the same file as"):
        relocate("top.qcow2", backing_file="disk.raw", data_file="disk.raw", backing_format="raw")


def test_no_file_that_is_not_there_gets_two_parts() -> None:
    create_image("base.qcow2", MIB)
    create_image("top.qcow2", data_file="top.raw", backing_file="base.qcow2", backing_format="qcow2")
    with nothing_changes(RelocateError, "as its data file and as its backing file"):
        relocate("top.qcow2", backing_file="gone", data_file="gone", missing=True)
    os.unlink("top.raw")
    with nothing_changes(RelocateError, "as its data file and as its backing file"):
        relocate("top.qcow2", backing_file="top.raw", missing=True)


def test_no_loop() -> None:
    overlay()
    create_image("top.qcow2", backing_file="overlay.qcow2", backing_format="qcow2")
    for name in ("top.qcow2", "overlay.qcow2"):
        with nothing_changes(ReferenceDeniedError, "the same file as"):
            relocate("overlay.qcow2", backing_file=name)


def test_a_file_that_is_not_there_or_is_something_else(folder: Path) -> None:
    overlay()
    adopt("disk.raw", "disk.qcow2")
    with nothing_changes(FileNotFoundError, "nowhere"):
        relocate("disk.qcow2", data_file="nowhere")
    with nothing_changes(FileNotFoundError, "nowhere"):
        relocate("overlay.qcow2", backing_file="nowhere")
    with nothing_changes(NotQcow2Error, "is a directory"):
        relocate("disk.qcow2", data_file="sub")
    with nothing_changes(NotQcow2Error, "not a qcow2"):
        relocate("overlay.qcow2", backing_file="disk.raw")
    with nothing_changes(NotQcow2Error, "not a qcow2"):
        relocate("overlay.qcow2", backing_file="disk.raw", missing=True)  # it is there
    create_image("broken.qcow2", backing_file="base.qcow2", backing_format="qcow2")
    relocate("broken.qcow2", backing_file="gone", missing=True)
    with nothing_changes(MissingReferenceError, "gone"):
        relocate("overlay.qcow2", backing_file="broken.qcow2")


def test_a_data_file_that_is_too_short(folder: Path) -> None:
    adopt("disk.raw", "disk.qcow2")
    Path("short.raw").write_bytes(bytes(299 * KIB))
    with nothing_changes(RelocateError, "has 306176 bytes, too few for the data of the disk of 307200"):
        relocate("disk.qcow2", data_file="short.raw")
    create_image("b.qcow2", MIB, data_file="b.raw")
    with open_image("b.qcow2", writable=True) as image:
        image.pwrite(b"x" * 70000, 0)
    os.truncate("b.raw", 131072)
    os.rename("b.raw", "c.raw")
    relocate("b.qcow2", data_file="c.raw")
    os.truncate("c.raw", 70000)
    with nothing_changes(RelocateError, "too few"):
        relocate("b.qcow2", data_file="c.raw")


def test_a_raw_data_file_that_holds_what_the_image_calls_zeros(folder: Path) -> None:
    image = ImageBuilder(MIB, 16).data_file(folder / "disk.data", b"disk.data", raw=True)
    for cluster in range(16):
        image.zero(cluster) if cluster == 7 else image.data(cluster, b"data")
    image.build(folder / "disk.qcow2")
    content = bytearray(Path("disk.data").read_bytes().ljust(MIB, b"\0"))
    Path("good.raw").write_bytes(content)
    content[7 * 65536 + 9] = 1
    Path("bad.raw").write_bytes(content)
    os.unlink("disk.data")
    message = "not the raw disk of the image: at guest offset 0x70009"
    with nothing_changes(RelocateError, message):
        relocate("disk.qcow2", data_file="bad.raw")
    with nothing_changes(RelocateError, message):
        attach("disk.qcow2", "bad.raw")
    attach("disk.qcow2", "good.raw")
    assert check("disk.qcow2", deep=True).is_sound


def test_names_that_cannot_be_recorded(folder: Path) -> None:
    adopt("disk.raw", "disk.qcow2", cluster_size=512)
    os.rename("disk.raw", "x" * 250)
    with nothing_changes(RelocateError, "driver or URL prefix"):
        relocate("disk.qcow2", data_file="a:b", form="relative", missing=True)
    for name in ("", "sub/", "sub/..", "."):
        with nothing_changes(RelocateError, "it is not that of a file"):
            relocate("disk.qcow2", data_file=name, missing=True)
    with nothing_changes(RelocateError, "longer than 1023"):
        relocate("disk.qcow2", data_file="/".join(["y" * 250] * 5), missing=True)
    with nothing_changes(HeaderFullError, "no room"):
        relocate("disk.qcow2", data_file=f"sub/{'x' * 250}/{'x' * 200}", missing=True)
    relocate("disk.qcow2", data_file="x" * 250)


def test_what_others_use(folder: Path) -> None:
    overlay()
    adopt("disk.raw", "disk.qcow2")
    for locked, verb in (
        ("disk.qcow2", {"data_file": "disk.raw"}),
        ("overlay.qcow2", {"backing_file": "base.qcow2"}),
    ):
        with holding(folder / locked, QEMU_READER), nothing_changes(ImageLockedError, "stop it"):
            relocate(locked, **verb)  # type: ignore[arg-type] # paths
    for locked, name, verb in (
        ("disk.raw", "disk.qcow2", {"data_file": "disk.raw"}),
        ("base.qcow2", "overlay.qcow2", {"backing_file": "base.qcow2"}),
    ):
        with holding(folder / locked, QEMU_WRITER), nothing_changes(ImageLockedError, "stop it"):
            relocate(name, **verb)  # type: ignore[arg-type] # paths
        with holding(folder / locked, QEMU_READER):
            relocate(name, **verb)  # type: ignore[arg-type] # paths


def test_a_corrupt_image() -> None:
    adopt("disk.raw", "disk.qcow2")
    set_field(Path("disk.qcow2"), "incompatible_features", 6)
    with nothing_changes(RelocateError, "marked as corrupt"):
        relocate("disk.qcow2", data_file="disk.raw")


def test_an_unfinished_transaction() -> None:
    adopt("disk.raw", "disk.qcow2", bitmap="daily")
    with unfinished.header_alone("disk.qcow2") as (storage, header):
        mark = Mark(b"0" * 16, header.bitmaps, b"gone.transaction")
        unfinished.store(storage, header, marked(header, mark))
    with nothing_changes(UnfinishedTransactionError, "qcow2 bitmap recover"):
        relocate("disk.qcow2", data_file="disk.raw")
    with nothing_changes(DetachError, "qcow2 bitmap recover"):
        detach("disk.qcow2", dry_run=True, lose_bitmaps=True)
    with nothing_changes(UnfinishedTransactionError, "qcow2 bitmap recover"):
        detach("disk.qcow2", lose_bitmaps=True)


# ---- the same contents


@pytest.mark.parametrize("raw", [False, True])
def test_verified_data_files(raw: bool) -> None:
    create_image("disk.qcow2", MIB, data_file="old.raw", data_file_raw=raw)
    with open_image("disk.qcow2", writable=True) as image:
        image.pwrite(b"x" * 70000, 100 * KIB)
    shutil.copy("old.raw", "new.raw")
    content = bytearray(Path("old.raw").read_bytes())
    for place in (100 * KIB + 17, 90 * KIB):  # in data, and in zeros beside it
        changed = bytearray(content)
        changed[place] ^= 1
        Path("changed.raw").write_bytes(changed)
        with nothing_changes(RelocateError, f"differ at offset {place:#x}"):
            relocate("disk.qcow2", data_file="changed.raw", verify=True)
    relocate("disk.qcow2", data_file="new.raw", verify=True)
    relocate("disk.qcow2", data_file="new.raw", verify=True)  # it is the same file
    os.unlink("new.raw")
    with nothing_changes(MissingReferenceError, "new.raw"):
        relocate("disk.qcow2", data_file="old.raw", verify=True)
    relocate("disk.qcow2", data_file="old.raw")


def test_verified_backing_files() -> None:
    overlay()
    view = convert_to_raw(Path("base.qcow2"))
    Path("flat.raw").write_bytes(view.rstrip(b"\0"))
    qemu_img("convert", "-c", "-O", "qcow2", "base.qcow2", "packed.qcow2")
    relocate("overlay.qcow2", backing_file="packed.qcow2", verify=True)
    relocate("overlay.qcow2", backing_file="flat.raw", backing_format="raw", verify=True)
    for place in (5003, 700 * KIB):
        changed = bytearray(view)
        changed[place] ^= 1
        Path("changed.raw").write_bytes(changed)
        with nothing_changes(RelocateError, f"differ at offset {place:#x} of the disk"):
            relocate("overlay.qcow2", backing_file="changed.raw", backing_format="raw", verify=True)
    Path("short.raw").write_bytes(view[: 20 * KIB])
    with nothing_changes(RelocateError, f"differ at offset {20 * KIB:#x} of the disk"):
        relocate("overlay.qcow2", backing_file="short.raw", backing_format="raw", verify=True)
    os.unlink("flat.raw")
    with nothing_changes(MissingReferenceError, "flat.raw"):
        relocate("overlay.qcow2", backing_file="base.qcow2", backing_format="qcow2", verify=True)
    relocate("overlay.qcow2", backing_file="base.qcow2", backing_format="qcow2")


def test_verified_for_a_snapshot_of_a_larger_disk() -> None:
    """What only the snapshot sees of the backing file counts, too."""
    create_image("base.qcow2", 2 * MIB)
    with open_image("base.qcow2", writable=True) as image:
        image.pwrite(b"x" * 1000, 2 * MIB - 5000)
    create_image("overlay.qcow2", backing_file="base.qcow2", backing_format="qcow2")
    create_snapshot("overlay.qcow2", "large")
    with open_image("overlay.qcow2", writable=True) as image:
        image.resize(MIB, allow_shrink=True)
    qemu_img("convert", "-O", "qcow2", "base.qcow2", "copy.qcow2")
    create_image("empty.qcow2", 2 * MIB)
    with nothing_changes(RelocateError, f"differ at offset {2 * MIB - 5000:#x} of the disk"):
        relocate("overlay.qcow2", backing_file="empty.qcow2", verify=True)
    relocate("overlay.qcow2", backing_file="copy.qcow2", verify=True)


def test_a_new_file_that_goes_meanwhile(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Nothing is asked of it once the name is changed, so that an error would say that it is not."""
    adopt("disk.raw", "disk.qcow2")
    shutil.copy("disk.raw", "d.raw")
    calls = FileCalls(monkeypatch)

    def unlink() -> None:
        if calls.calls:  # the first one is about the file, and the others change the image
            calls.before = lambda: None
            os.unlink("d.raw")

    calls.before = unlink
    assert relocate("disk.qcow2", data_file="d.raw") == Relocated(b"d.raw", None, ())
    assert not (folder / "d.raw").exists()
    assert told("disk.qcow2").data_file == "d.raw"


# ---- attach


def test_attach_to_an_image_without_a_name() -> None:
    adopt("disk.raw", "disk.qcow2", bitmap="daily")
    qemu_img("amend", "-f", "qcow2", "-o", "data_file=", "disk.qcow2")
    with pytest.raises(MissingReferenceError):
        open_image("disk.qcow2")
    assert attach("disk.qcow2", "disk.raw") == Relocated(b"disk.raw", None, ())
    assert attach("disk.qcow2", "disk.raw", form="absolute").needs_trust
    assert check("disk.qcow2", deep=True, policy=Policy.TRUSTED).is_sound


def test_attach_is_not_for_an_image_whose_data_file_is_there() -> None:
    adopt("disk.raw", "disk.qcow2")
    shutil.copy("disk.raw", "copy.raw")
    with nothing_changes(RelocateError, "and that is there; use 'qcow2 relocate --data-file'"):
        attach("disk.qcow2", "copy.raw")
    os.unlink("disk.raw")
    attach("disk.qcow2", "copy.raw")
    assert told("disk.qcow2").data_file == "copy.raw"


@pytest.mark.parametrize("name", [b"json:{}", b"a\0b", b"nbd://x"])
def test_attach_looks_for_no_strange_names(name: bytes, folder: Path) -> None:
    image = ImageBuilder(256 * KIB, 16).data_file(folder / "x", name).data(0, b"a")
    image.build(folder / "disk.qcow2")
    attach("disk.qcow2", "disk.raw")
    assert told("disk.qcow2").data_file == "disk.raw"


# ---- crashes and failures


@pytest.mark.parametrize("name", ["d.raw", LONG], ids=["short", "long"])
@pytest.mark.parametrize("role", ["data file", "backing file"])
def test_a_crash_leaves_the_old_name_or_the_new_one(
    role: str, name: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    overlay()
    adopt("disk.raw", "disk.qcow2", bitmap="daily")
    image, options = (
        ("disk.qcow2", {"data_file": name}) if role == "data file" else ("overlay.qcow2", {"backing_file": name})
    )
    os.rename("disk.raw" if role == "data file" else "base.qcow2", name)
    content, log = Path(image).read_bytes(), Log()
    storage = RecordingStorage(log, 0, content, image)

    @contextmanager
    def header_alone(path: object) -> Iterator[tuple[RecordingStorage, Header]]:
        yield storage, read_header(storage)

    monkeypatch.setattr(module, "header_alone", header_alone)
    relocate(image, **options)  # type: ignore[arg-type] # paths
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    old, new = (_names(read_header(each)) for each in (RecordingStorage(Log(), 0, content), storage))
    assert old != new
    crashes, seen = Crashes(log, (content,)), set()
    for plan in crashes.plans():
        state = bytes(crashes.state(plan).files[0].content())
        seen.add(state)
        assert _names(read_header(RecordingStorage(Log(), 0, state))) in (old, new)
        assert state[65536:] == content[65536:]
    assert len(seen) >= 2
    for state in sorted(seen)[:: 1 + len(seen) // 12]:
        Path(image).write_bytes(state)
        relocate(image, **options)  # type: ignore[arg-type] # paths
        assert _names(Header.parse(Path(image).read_bytes()[:65536])) == new
        qemu_img("check", image)


def _names(header: Header) -> tuple[Any, ...]:
    kept = sorted((each.type, each.data) for each in header.extensions if each.type != 0x6803F857)
    return header.backing_file, kept, header.incompatible_features, header.autoclear_features, header.size


@pytest.mark.parametrize("options", [{"data_file": LONG}, {"backing_file": "b.qcow2", "verify": True}], ids=str)
def test_after_a_failure_the_name_is_the_old_one_or_the_new_one(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    overlay()
    adopt("disk.raw", "disk.qcow2", bitmap="daily")
    shutil.copy("disk.raw", LONG)
    shutil.copy("base.qcow2", "b.qcow2")
    image = "disk.qcow2" if "data_file" in options else "overlay.qcow2"
    before = contents(folder)
    old = _names(Header.parse(before[image][:65536]))
    relocate(image, **options)
    new = _names(Header.parse(Path(image).read_bytes()[:65536]))
    Path(image).write_bytes(before[image])
    calls, at = FileCalls(monkeypatch, with_reads=True), 0
    while True:
        calls.arm(at, OSError(errno.ENOSPC, "fails"))
        error: Exception | None = None
        try:
            with no_descriptor_left():
                relocate(image, **options)
        except (OSError, Qcow2Error) as caught:
            error = caught
        if not calls.has_failed:
            break
        wrote = any(call.name == "write_from" for call in calls.calls[:at])
        calls.arm(None, OSError())
        after = contents(folder)
        names = _names(Header.parse(after[image][:65536]))
        assert names == new if error is None else names in (old, new)
        assert wrote or after == before
        assert {name: after[name] for name in after if name != image} == {n: before[n] for n in before if n != image}
        qemu_img("check", image)
        Path(image).write_bytes(before[image])
        at += 1
    assert at > 5


# ---- the commands


def test_the_commands(folder: Path) -> None:
    overlay()
    adopt("disk.raw", "disk.qcow2")
    os.rename("disk.raw", "sub/disk.raw")
    ended = qcow2("attach", "disk.qcow2", "sub/disk.raw")
    assert (ended.status, ended.stdout) == (0, "data file: sub/disk.raw\n")
    assert "QEMU looks for the data file in its working directory" in ended.stderr
    ended = qcow2("relocate", "--absolute", "--data-file=sub/disk.raw", "disk.qcow2")
    assert ended.stdout == f"data file: {folder}/sub/disk.raw\n"
    assert "takes --policy=trusted or --data-file" in ended.stderr
    ended = qcow2("relocate", "-q", "-p", "--verify", "--policy=trusted", "--data-file=sub/disk.raw", "disk.qcow2")
    assert (ended.status, ended.stdout) == (0, "")
    shutil.copy("base.qcow2", "../b.qcow2")
    ended = qcow2("relocate", "-b", "../b.qcow2", "-F", "qcow2", "--relative", "--verify", "overlay.qcow2")
    assert ended.stdout == "backing file: ../b.qcow2\n"
    assert "takes --policy=trusted or --backing-file" in ended.stderr
    assert qcow2("relocate", "overlay.qcow2").status == 2
    create_image("both.qcow2", MIB, data_file="../both.raw", backing_file="base.qcow2", backing_format="qcow2")
    ended = qcow2("relocate", "--data-file=../both.raw", "-b", "base.qcow2", "both.qcow2")
    assert f'note: the data file is recorded as "{folder.parent}/both.raw"' in ended.stderr
    assert "--backing-file" not in ended.stderr
    assert qcow2("relocate", "--missing", "-b", "later.qcow2", "overlay.qcow2").status == 0
    ended = qcow2("relocate", "-b", "overlay.qcow2", "overlay.qcow2")
    assert (ended.status, "same file as the image" in ended.stderr) == (1, True)
