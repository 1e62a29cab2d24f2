"""What an open image knows of itself follows an amendment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin import amend, delete_snapshot
from qcow2_plugin.engine import amending
from qcow2_plugin.engine.writable import WritableImage
from qcow2_plugin.errors import AmendError, CorruptImageError, FailedImageError, ImageClosedError
from tests.support.builder import ImageBuilder
from tests.support.image_checker import check_image
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


@pytest.mark.parametrize("other", [{"refcount_bits": 8}, {"lazy_refcounts": True}])
def test_a_downgrade_looks_again_at_what_others_have_amended(
    other: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = InMemory(ImageBuilder(64 << 10, 12).data(0, b"kept"), tmp_path)
    resize = told.disk.resize

    def amended_meanwhile(size: int, *, allow_shrink: bool) -> None:
        resize(size, allow_shrink=allow_shrink)
        amend(told.disk, **other)

    monkeypatch.setattr(told.disk, "resize", amended_meanwhile)
    if "refcount_bits" in other:
        with pytest.raises(AmendError, match="refcounts of 16 bits only"):
            amend(told.disk, compat="0.10", size=128 << 10)
    else:
        amend(told.disk, compat="0.10", size=128 << 10)
    told.disk.close()
    assert check_image(bytes(told.storage.content)).is_sound
    assert told.field("version") == (3 if "refcount_bits" in other else 2)


@pytest.mark.parametrize("interrupted", [2, 3])
def test_after_an_interrupted_change_of_the_width_nothing_is_counted_in_the_old_refcounts(
    interrupted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the barrier before the header, or at the one behind it."""
    told = InMemory(ImageBuilder(64 << 10, 12).data(0, b"kept"), tmp_path)
    amend(told.disk, lazy_refcounts=True)
    _interrupt(told, interrupted, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        amend(told.disk, refcount_bits=64)
    with pytest.raises(FailedImageError):
        told.disk.pwrite(bytes(4096), 32 << 10)
    told.disk.close()
    assert check_image(bytes(told.storage.content)).is_sound
    assert told.field("refcount_order") == (4 if interrupted == 2 else 6)


@pytest.mark.parametrize(("interrupted", "version"), [(3, 3), (4, 2), (5, 2)])
def test_after_an_interrupted_downgrade_zeros_are_written_as_the_version_has_them(
    interrupted: int, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = InMemory(ImageBuilder(64 << 10, 12).data(0, b"kept"), tmp_path)
    amend(told.disk, lazy_refcounts=True)
    _interrupt(told, interrupted, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        amend(told.disk, compat="0.10")
    assert told.field("version") == version
    told.disk.write_zeroes(0, 8192)
    assert told.disk.pread(8192, 0) == bytes(8192)
    told.disk.close()
    assert told.l2_entry(0)[0] & 1 == version - 2
    assert check_image(bytes(told.storage.content)).is_sound


def _interrupt(told: InMemory, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the barrier with this number, as a signal does that comes while it waits."""
    barrier, seen = told.storage.barrier, 0

    def interrupted() -> None:
        nonlocal seen
        seen += 1
        barrier()
        if seen == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(told.storage, "barrier", interrupted)


def test_an_upgrade_that_would_make_the_snapshot_table_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = ImageBuilder(64 << 10, 12, version=2).data(0, b"kept")
    told = InMemory(builder.snapshot(b"1", b"one", None, extra=b""), tmp_path)
    before = bytes(told.storage.content)
    monkeypatch.setattr(amending, "MAX_SNAPSHOT_TABLE_SIZE", 50)
    with pytest.raises(AmendError, match="delete some first"):
        amend(told.disk, compat="1.1")
    told.disk.close()
    assert bytes(told.storage.content) == before


def test_refcounts_that_count_nothing_are_found_out(tmp_path: Path) -> None:
    builder = ImageBuilder(64 << 10, 12).data(0, b"kept")
    for cluster in range(8):
        builder.refcount(cluster, 0)
    told = InMemory(builder, tmp_path)
    with pytest.raises(CorruptImageError, match="cluster 0x0 of the header is free"):
        amend(told.disk, refcount_bits=64)


def test_a_disk_that_is_cut_while_a_raw_data_file_is_proven_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = InMemory(ImageBuilder(4 << 20, 12).data_file(tmp_path / "disk.raw", b"disk.raw").data(0, b"kept"), tmp_path)
    prove = amending._require_equal

    def cut_meanwhile(image: WritableImage) -> list[int]:
        starts = prove(image)
        image.resize(1 << 20, allow_shrink=True)
        return starts

    monkeypatch.setattr(amending, "_require_equal", cut_meanwhile)
    amend(told.disk, data_file_raw=True)
    told.disk.close()
    assert check_image(bytes(told.storage.content)).is_sound
    assert told.disk.header.data_file_raw
