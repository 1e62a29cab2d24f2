"""Our locks against those of QEMU's own programs, both ways."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcow2_plugin.errors import ImageLockedError
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.opener import Policy, open_given, open_reference
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
