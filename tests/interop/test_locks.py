"""Our locks against those of QEMU's own programs, both ways."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import ImageLockedError
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.opener import Policy, create_given, open_given, open_reference
from tests.support.holders import qemu_io_holding
from tests.support.lockbytes import QEMU_FORCE_SHARE, QEMU_READER, QEMU_WRITER, locked_bytes
from tests.support.tools import ToolError, qemu_img, qemu_io


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    return path


def test_the_bytes_that_qemu_holds_are_those_we_know(image: Path) -> None:
    with qemu_io_holding(image):
        assert locked_bytes(image) == set(QEMU_WRITER)
    with qemu_io_holding(image, "-r"):
        assert locked_bytes(image) == set(QEMU_READER)
    with qemu_io_holding(image, "-r", "-U"):
        assert locked_bytes(image) == set(QEMU_FORCE_SHARE)


def test_an_image_that_qemu_writes_is_refused_until_qemu_ends(image: Path) -> None:
    with qemu_io_holding(image):
        with pytest.raises(ImageLockedError, match="permission to write"):
            open_given(image)
        assert locked_bytes(image) == set(QEMU_WRITER)
    open_given(image).close()


def test_a_hard_link_is_no_way_round(image: Path) -> None:
    other_name = image.with_name("other.qcow2")
    os.link(image, other_name)
    with qemu_io_holding(image), pytest.raises(ImageLockedError):
        open_given(other_name)


def test_force_share_reads_what_qemu_writes(image: Path) -> None:
    with qemu_io_holding(image):
        storage = open_given(image, force_share=True)
        assert storage.pread(4, 0) == b"QFI\xfb"
        storage.close()


@pytest.mark.parametrize("role", ["backing file", "data file"])
def test_files_that_an_image_names_are_locked_like_the_image(image: Path, role: str) -> None:
    def open_it(*, force_share: bool) -> FileStorage:
        return open_reference(
            image.name.encode(),
            role,
            policy=Policy.CONFINED,
            directory=str(image.parent),
            referrer="overlay.qcow2",
            force_share=force_share,
        )

    with qemu_io_holding(image):
        with pytest.raises(ImageLockedError):
            open_it(force_share=False)
        open_it(force_share=True).close()
    storage = open_it(force_share=False)
    assert locked_bytes(image) == set(QEMU_READER)
    storage.close()


def test_qemu_cannot_write_what_we_read_until_we_close_it(image: Path) -> None:
    storage = open_given(image)
    with pytest.raises(ToolError, match='Failed to get "write" lock'):
        qemu_io(image, "write 0 64k")
    with pytest.raises(ToolError, match="lock"):
        qemu_img("resize", image, "8M")
    storage.close()
    qemu_io(image, "write 0 64k")
    qemu_img("resize", image, "8M")


def test_qemu_can_read_what_we_read(image: Path) -> None:
    storage = open_given(image)
    qemu_img("info", image)
    qemu_img("check", image)
    with qemu_io_holding(image, "-r"):
        second = open_given(image)
        second.close()
    storage.close()


def test_force_share_does_not_keep_qemu_from_writing(image: Path) -> None:
    storage = open_given(image, force_share=True)
    qemu_io(image, "write 0 64k")
    storage.close()


# Writing.


@pytest.mark.parametrize("options", [(), ("-r",)])
def test_an_image_that_qemu_has_open_is_not_written(image: Path, options: tuple[str, ...]) -> None:
    with qemu_io_holding(image, *options):
        before = image.read_bytes()
        with pytest.raises(ImageLockedError):
            open_given(image, writable=True)
        with pytest.raises(ImageLockedError):
            open_image(image, writable=True)
        assert image.read_bytes() == before
    open_given(image, writable=True).close()


def test_qemu_that_reads_by_force_share_is_no_obstacle(image: Path) -> None:
    with qemu_io_holding(image, "-r", "-U"):
        open_given(image, writable=True).close()


def refuse_qemu(image: Path) -> None:
    """Fails unless qemu's programs neither write nor read the image, except by force-share."""
    with pytest.raises(ToolError, match="lock"):
        qemu_io(image, "write 0 64k")
    with pytest.raises(ToolError, match="lock"):
        qemu_io(image, "read 0 64k", options=("-r", "-f", "qcow2"))
    for words in (
        ("check", image),
        ("info", image),
        ("resize", image, "8M"),
        ("snapshot", "-c", "x", image),
        ("convert", "-f", "qcow2", "-O", "raw", image, image.with_name("copy")),
    ):
        with pytest.raises(ToolError, match="lock"):
            qemu_img(*words)
    qemu_img("info", "-U", image)


def test_qemu_keeps_away_from_what_we_write(image: Path) -> None:
    storage = open_given(image, writable=True)
    before = image.read_bytes()
    assert locked_bytes(image) == set(QEMU_WRITER)
    refuse_qemu(image)
    assert image.read_bytes() == before
    storage.close()
    qemu_io(image, "write 0 64k")
    qemu_img("resize", image, "8M")


def test_qemu_keeps_away_from_what_we_create(image: Path) -> None:
    content = image.read_bytes()
    path = image.with_name("new.qcow2")
    storage = create_given(path)
    storage.write_from(content, 0)
    refuse_qemu(path)
    with pytest.raises(ToolError, match="lock"):
        qemu_img("create", "-f", "qcow2", path, "4M")
    storage.close()
    qemu_img("check", path)


def test_qemu_keeps_away_from_an_image_open_for_writing(image: Path) -> None:
    with open_image(image, writable=True):
        refuse_qemu(image)
    qemu_img("check", image)


@pytest.mark.parametrize("writable", [False, True])
def test_two_of_our_own_exclude_each_other(image: Path, writable: bool) -> None:
    other_name = image.with_name("other.qcow2")
    os.link(image, other_name)
    for name in (image, other_name):
        with open_image(image, writable=True):
            with pytest.raises(ImageLockedError):
                open_image(name, writable=writable)
            open_image(name, force_share=True).close()
        with open_image(image), open_image(name), pytest.raises(ImageLockedError):
            open_image(name, writable=True)
    open_image(image, writable=True).close()


def test_an_overlay_is_not_opened_while_its_base_is_written(image: Path) -> None:
    overlay = image.with_name("overlay.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", image.name, overlay)
    with open_image(image, writable=True):
        for writable in (False, True):
            with pytest.raises(ImageLockedError) as caught:
                open_image(overlay, writable=writable)
            assert caught.value.file == str(image)
        with pytest.raises(ToolError, match="lock"):
            qemu_io(overlay, "write 0 64k")
    with open_image(overlay, writable=True):
        with pytest.raises(ImageLockedError):
            open_image(image, writable=True)
        with pytest.raises(ToolError, match="lock"):
            qemu_io(image, "write 0 64k")
        open_image(image).close()
        qemu_img("check", image)


def test_two_overlays_of_one_base_are_written_side_by_side(image: Path) -> None:
    overlays = [image.with_name(name) for name in ("one", "other")]
    for overlay in overlays:
        qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", image.name, overlay)
    with open_image(overlays[0], writable=True):
        qemu_io(overlays[1], "write 0 64k")
        open_image(overlays[1], writable=True).close()


def test_a_data_file_belongs_to_one_writer(image: Path) -> None:
    data = image.with_name("data")
    images = [image.with_name(name) for name in ("one", "other")]
    for path in images:
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", path, "4M")
    with open_image(images[0], writable=True, data_file=data):
        for writable in (False, True):
            with pytest.raises(ImageLockedError) as caught:
                open_image(images[1], writable=writable, data_file=data)
            assert caught.value.file == str(data)
        with pytest.raises(ToolError, match="lock"):
            qemu_io(images[1], "write 0 64k")
        with pytest.raises(ToolError, match='Failed to get "write" lock'):
            qemu_io(data, "write 0 64k", options=("-f", "raw"))
    with qemu_io_holding(images[1]):
        before = data.read_bytes()
        with pytest.raises(ImageLockedError):
            open_image(images[0], writable=True, data_file=data)
        assert data.read_bytes() == before
    qemu_io(images[1], "write 0 64k")
    qemu_io(data, "write 0 64k", options=("-f", "raw"))
