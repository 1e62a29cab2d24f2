"""What an open image knows of itself follows an amendment."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcow2_plugin import amend, delete_snapshot
from qcow2_plugin.errors import ImageClosedError
from tests.support.builder import ImageBuilder
from tests.support.in_memory import InMemory


def test_the_disk_of_a_snapshot_that_an_upgrade_wrote_anew_is_closed_with_it(tmp_path: Path) -> None:
    builder = ImageBuilder(64 << 10, 12, version=2).data(0, b"kept")
    builder.snapshot(b"1", b"one", None, extra=b"")
    image = InMemory(builder, tmp_path).disk
    disk = image.at_snapshot("one")
    amend(image, compat="1.1")
    assert disk.pread(4, 0) == b"kept"
    delete_snapshot(image, "one")
    with pytest.raises(ImageClosedError):
        disk.pread(4, 0)
