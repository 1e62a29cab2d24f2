"""What an export may be written to, by which names, and who may read it then; the two files of a data file image."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import NotQcow2Error, OptionError
from qcow2_plugin.operations import adopt as adopting
from qcow2_plugin.operations import export as exporting
from qcow2_plugin.operations.adopt import adopt
from qcow2_plugin.operations.create import create_image
from qcow2_plugin.operations.export import export_as_data_file, export_raw
from tests.support.command import process_environment
from tests.support.small_disk import DISK, SIZE, make_small_disk


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_small_disk(tmp_path / "image.qcow2")


@pytest.fixture
def wanted() -> bytes:
    return DISK


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "disk.raw"


def test_a_target_that_is_there_stays(image: Path, target: Path) -> None:
    target.write_bytes(b"old")
    with pytest.raises(FileExistsError):
        export_raw(image, target)
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_image_is_no_target(overwrite: bool, image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    os.link(image, tmp_path / "link")
    with pytest.raises((FileExistsError, OptionError)):
        export_raw(image, tmp_path / "link", overwrite=overwrite)
    assert image.read_bytes() == before


def test_a_directory_or_a_fifo_is_no_target(image: Path, target: Path) -> None:
    with pytest.raises(NotQcow2Error, match="directory"):
        export_raw(image, target.parent, overwrite=True)
    os.mkfifo(target)
    with pytest.raises(NotQcow2Error, match="FIFO"):
        export_raw(image, target, overwrite=True)


@pytest.mark.parametrize("name", ["n" * 255, "\N{SNOWMAN}" * 85])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_name_may_be_as_long_as_any(name: str, overwrite: bool, image: Path, target: Path, wanted: bytes) -> None:
    long = target.with_name(name)
    export_raw(image, long, overwrite=overwrite)
    assert os.listdir(target.parent) == [name]
    assert long.read_bytes() == wanted


@pytest.mark.parametrize("is_there", [False, True])
def test_a_file_is_replaced_where_a_symlink_leads(is_there: bool, image: Path, target: Path, wanted: bytes) -> None:
    link = image.with_name("link")
    link.symlink_to("out/disk.raw")
    if is_there:
        target.write_bytes(b"old")
    with pytest.raises(FileExistsError):
        export_raw(image, link)
    export_raw(image, link, overwrite=True)
    assert link.is_symlink()
    assert target.read_bytes() == wanted
    assert os.listdir(target.parent) == [target.name]


def test_another_name_of_a_file_that_is_replaced_keeps_it(image: Path, target: Path, wanted: bytes) -> None:
    target.write_bytes(b"old")
    os.link(target, image.with_name("kept"))
    export_raw(image, target, overwrite=True)
    assert target.read_bytes() == wanted
    assert image.with_name("kept").read_bytes() == b"old"


@pytest.mark.parametrize(("given", "kept"), [(0o600, 0o600), (0o640, 0o640), (0o444, 0o644), (0o660, 0o640)])
def test_nobody_may_read_the_copy_who_may_not_read_the_image(given: int, kept: int, image: Path, target: Path) -> None:
    image.chmod(given)
    old = os.umask(0o022)
    try:
        export_raw(image, target)
    finally:
        os.umask(old)
    assert stat.S_IMODE(target.stat().st_mode) == kept


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize(("given", "kept"), [(0o640, 0o600), (0o644, 0o644), (0o604, 0o600)])
def test_no_other_group_may_read_the_copy(given: int, kept: int, image: Path, target: Path) -> None:
    os.chown(image, 0, 12345)
    image.chmod(given)
    old = os.umask(0o022)
    try:
        export_raw(image, target)
        target.parent.chmod(0o2755)
        os.chown(target.parent, 0, 12345)
        export_raw(image, target.with_name("theirs"))
    finally:
        os.umask(old)
    assert stat.S_IMODE(target.stat().st_mode) == kept
    theirs = target.with_name("theirs").stat()
    assert (theirs.st_gid, stat.S_IMODE(theirs.st_mode)) == (12345, 0o640 if given == 0o640 else kept)


def test_a_failed_image_takes_its_data_file_with_it(image: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(adopting, "adopt", fail)
    with pytest.raises(OSError, match="full"):
        export_as_data_file(image, target.with_name("new.qcow2"), target)
    assert os.listdir(target.parent) == []


def _copies_nothing(*_: object, **__: object) -> None:
    pytest.fail("something is copied although nothing can come of it")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cluster_size": 1000}, "power of two"),
        ({"cluster_size": 4096, "extended_l2": True}, "extended_l2 needs"),
        ({"overwrite": True}, "made anew"),
        ({"sparse_size": 1}, "sectors"),
    ],
)
def test_what_speaks_against_an_image_is_known_before_anything_is_copied(
    options: dict[str, Any], reason: str, image: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "copy_out", _copies_nothing)
    with pytest.raises(OptionError, match=reason):
        export_as_data_file(image, target.with_name("new.qcow2"), target, **options)
    assert os.listdir(target.parent) == []


@pytest.mark.parametrize(("size", "reason"), [(0, "0 bytes"), (200 << 30, "512")])
def test_a_disk_of_no_size_for_it_is_refused_before_anything_is_copied(
    size: int, reason: str, tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_image(tmp_path / "sized.qcow2", size)
    monkeypatch.setattr(exporting, "copy_out", _copies_nothing)
    with pytest.raises(OptionError, match=reason):
        export_as_data_file(tmp_path / "sized.qcow2", target.with_name("new.qcow2"), target, cluster_size=512)
    assert os.listdir(target.parent) == []


def test_two_files_need_two_names_and_directories_that_are_there(
    image: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "copy_out", _copies_nothing)
    image.with_name("link").symlink_to("out")
    with pytest.raises(OptionError, match="two files"):
        export_as_data_file(image, image.with_name("link") / target.name, target)
    with pytest.raises(FileNotFoundError):
        export_as_data_file(image, target.parent / "none" / "new.qcow2", target)
    with pytest.raises(OptionError, match="too late"), open_image(image) as opened:
        export_as_data_file(opened, target.with_name("new.qcow2"), target, force_share=True)
    assert os.listdir(target.parent) == []


_KILLED_BETWEEN = """
import os, sys
from qcow2_plugin.operations import adopt, export
adopt.adopt = lambda *_, **__: os._exit(9)
export.export_as_data_file(*sys.argv[1:])
"""


def test_killed_between_its_two_files_the_first_is_whole(image: Path, target: Path, wanted: bytes) -> None:
    new = target.with_name("new.qcow2")
    process = subprocess.run(
        [sys.executable, "-c", _KILLED_BETWEEN, image, new, target], env=process_environment(), check=False
    )
    assert process.returncode == 9
    assert os.listdir(target.parent) == [target.name]
    assert target.read_bytes() == wanted
    with pytest.raises(FileExistsError):
        export_as_data_file(image, new, target)
    adopt(target, new)
    with open_image(new) as opened:
        assert opened.pread(SIZE, 0) == wanted
