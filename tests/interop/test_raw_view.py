"""The raw view of a data file beside QEMU: who keeps whom out."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcow2_plugin.errors import ImageLockedError
from qcow2_plugin.operations.create import create_image
from qcow2_plugin.operations.raw_view import raw_view
from tests.support.holders import qemu_io_holding


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # where QEMU looks for the data file
    create_image(tmp_path / "disk.qcow2", 1 << 20, data_file=tmp_path / "disk.raw", data_file_raw=True)
    return tmp_path / "disk.qcow2"


def test_a_writer_is_refused_meanwhile_and_readers_are_not(image: Path) -> None:
    data = image.with_suffix(".raw")
    with raw_view(image):
        with pytest.raises(AssertionError, match="Failed to get"), qemu_io_holding(image):
            pass
        with pytest.raises(AssertionError, match="Failed to get"), qemu_io_holding(data, "-f", "raw"):
            pass
        with qemu_io_holding(image, "-r"), raw_view(image):
            pass
    with qemu_io_holding(image):
        pass


def test_what_qemu_writes_has_no_raw_view(image: Path) -> None:
    with qemu_io_holding(image):
        with pytest.raises(ImageLockedError, match="permission to write"), raw_view(image):
            pass
        with raw_view(image, force_share=True) as view:
            assert view.virtual_size == 1 << 20
