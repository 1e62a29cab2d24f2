"""When a data file is the raw disk: each reason against it, and the locks for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcow2_plugin.errors import (
    ImageLockedError,
    MissingReferenceError,
    NoRawViewError,
    Qcow2Error,
    ReferenceDeniedError,
    UnsupportedFeatureError,
)
from qcow2_plugin.operations.create import create_image
from qcow2_plugin.operations.raw_view import raw_view
from qcow2_plugin.storage.opener import Policy
from tests.support.fields import set_field
from tests.support.lockbytes import QEMU_READER, QEMU_WRITER, holding, locked_bytes

_SIZE = 1 << 20
_DATA_FILE, _CORRUPT, _DIRTY = 1 << 2, 1 << 1, 1 << 0


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    create_image(path, _SIZE, data_file=tmp_path / "disk.raw", data_file_raw=True)
    return path


def test_the_data_file_is_the_disk(image: Path) -> None:
    before = image.read_bytes()
    with raw_view(image) as view:
        assert view == (str(image.with_suffix(".raw")), _SIZE, _SIZE)
    assert image.read_bytes() == before


def test_a_longer_data_file_is_told_with_the_size_of_the_disk(image: Path) -> None:
    os.truncate(image.with_suffix(".raw"), _SIZE + 4096)
    with raw_view(image) as view:
        assert (view.virtual_size, view.file_size) == (_SIZE, _SIZE + 4096)


def test_relative_names_are_told_absolute(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(image.parent)
    with raw_view("disk.qcow2") as view:
        assert view.path == str(image.with_suffix(".raw"))


def test_the_path_leads_to_the_file_that_is_locked(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also through ".." behind a link, which is the parent of where the link leads."""
    (image.parent / "below" / "elsewhere").mkdir(parents=True)
    image.with_suffix(".raw").rename(image.parent / "below" / "disk.raw")
    (image.parent / "link").symlink_to("below/elsewhere")
    monkeypatch.chdir(image.parent)
    with raw_view(image, data_file="link/../disk.raw") as view:
        assert os.path.samefile(view.path, "below/disk.raw")


def test_a_dirty_image_has_a_raw_view(image: Path) -> None:
    set_field(image, "incompatible_features", _DATA_FILE | _DIRTY)
    with raw_view(image) as view:
        assert view.virtual_size == _SIZE


def refused(image: Path, reason: str, error: type[Qcow2Error] = NoRawViewError) -> None:
    with pytest.raises(error, match=reason), raw_view(image):
        pass


def test_no_data_file(tmp_path: Path) -> None:
    create_image(tmp_path / "plain.qcow2", _SIZE)
    refused(tmp_path / "plain.qcow2", "no external data file")


def test_a_data_file_that_promises_nothing(tmp_path: Path) -> None:
    create_image(tmp_path / "image.qcow2", _SIZE, data_file=tmp_path / "data")
    refused(tmp_path / "image.qcow2", "does not promise")


def test_a_corrupt_image(image: Path) -> None:
    set_field(image, "incompatible_features", _DATA_FILE | _CORRUPT)
    refused(image, "marked as corrupt")


def test_an_encrypted_image(image: Path) -> None:
    set_field(image, "crypt_method", 1)
    refused(image, "encrypted")


def test_a_backing_file(image: Path) -> None:
    content = bytearray(image.read_bytes())
    content[4096:4104] = b"base.raw"
    image.write_bytes(content)
    set_field(image, "backing_file_offset", 4096)
    set_field(image, "backing_file_size", 8)
    refused(image, 'backing file "base.raw"')


def test_an_unknown_feature(image: Path) -> None:
    set_field(image, "incompatible_features", _DATA_FILE | 1 << 40)
    refused(image, "feature", UnsupportedFeatureError)


def test_a_shorter_data_file(image: Path) -> None:
    os.truncate(image.with_suffix(".raw"), _SIZE - 1)
    refused(image, "less than the disk")


def test_a_missing_data_file_and_one_named_instead(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "disk"
    other.parent.mkdir()
    image.with_suffix(".raw").rename(other)
    refused(image, "does not exist", MissingReferenceError)
    with raw_view(image, data_file=other) as view:
        assert view.path == str(other)


def test_a_name_that_the_policy_forbids(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    image = tmp_path / "images" / "disk.qcow2"
    create_image(image, _SIZE, data_file=tmp_path / "disk.raw", data_file_raw=True)
    refused(image, "absolute", ReferenceDeniedError)
    with raw_view(image, policy=Policy.TRUSTED) as view:
        assert view.path == str(tmp_path / "disk.raw")


def test_both_files_are_locked_until_the_end(image: Path) -> None:
    data = image.with_suffix(".raw")
    with raw_view(image):
        assert locked_bytes(image) == set(QEMU_READER)
        assert locked_bytes(data) == set(QEMU_READER)
    assert locked_bytes(image) == locked_bytes(data) == set()


@pytest.mark.parametrize("name", ["disk.qcow2", "disk.raw"])
def test_a_writer_of_either_file_stands_against_it(name: str, image: Path) -> None:
    with holding(image.with_name(name), QEMU_WRITER):
        refused(image, "permission to write", ImageLockedError)
        with raw_view(image, force_share=True) as view:
            assert view.virtual_size == _SIZE


def test_nothing_stays_open_after_a_refusal(image: Path) -> None:
    os.truncate(image.with_suffix(".raw"), 0)
    before = len(os.listdir("/proc/self/fd"))
    refused(image, "less than the disk")
    assert len(os.listdir("/proc/self/fd")) == before
