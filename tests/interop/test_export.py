"""Exports held against `qemu-img convert -O raw`: every kind of image, byte for byte, and as sparse."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import ImageLockedError, OptionError
from qcow2_plugin.extent import ExtentKind
from qcow2_plugin.operations.adopt import adopt
from qcow2_plugin.operations.export import export_as_data_file, export_raw
from tests.support.command import COMMAND, qcow2
from tests.support.export_kinds import KINDS, Kind
from tests.support.holders import qemu_io_holding
from tests.support.loop import loop_device
from tests.support.sharing import xfs
from tests.support.tools import qemu_img, qemu_img_json, qemu_io

_BY_NAME = {make.__name__: make for make in KINDS}


@pytest.fixture(params=_BY_NAME, scope="module")
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return _BY_NAME[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def wanted(kind: Kind) -> Path:
    """What qemu-img makes of it."""
    path = kind.path.with_suffix(".wanted")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", *kind.extra, kind.path, path)
    return path


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("ways", [{}, {"offload": True}, {"share": False, "threads": 1}, {"sparse_size": 65536}])
def test_an_export_is_what_qemu_img_makes(ways: dict[str, Any], kind: Kind, wanted: Path, tmp_path: Path) -> None:
    target = tmp_path / "disk.raw"
    result = export_raw(kind.path, target, verify=True, **ways, **kind.options)
    assert target.read_bytes() == wanted.read_bytes()
    assert (
        result.written + result.shared + result.offloaded + result.zeros
        == result.virtual_size
        == os.stat(wanted).st_size
    )
    assert os.listdir(tmp_path) == [target.name]


def test_an_export_is_as_sparse(kind: Kind, wanted: Path, tmp_path: Path) -> None:
    target = tmp_path / "disk.raw"
    export_raw(kind.path, target, share=False, **kind.options)
    with open_image(kind.path, **kind.options) as image:
        cluster_size = image.header.geometry.cluster_size
        data_count = sum(extent.kind in (ExtentKind.DATA, ExtentKind.COMPRESSED) for extent in image.extents())
    assert allocated(target) <= allocated(wanted) + max(cluster_size, 4096) * data_count


def test_zeros_as_they_are_stored_stay(tmp_path: Path) -> None:
    image, target = tmp_path / "image.qcow2", tmp_path / "disk.raw"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    qemu_io(image, "write -q -P 0 0 512k")
    export_raw(image, target, sparse_size=0, share=False)
    assert allocated(target) == 512 << 10
    target.unlink()
    export_raw(image, target, share=False)
    assert allocated(target) == 0


def test_an_image_open_for_writing_is_exported_with_what_was_not_synced(tmp_path: Path) -> None:
    path, target = tmp_path / "image.qcow2", tmp_path / "disk.raw"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    with open_image(path, writable=True) as image:
        image.pwrite(b"a" * 70000, 1000)
        export_raw(image, target, verify=True)
        image.pwrite(b"b" * 70000, 300000)
        with pytest.raises(FileExistsError):
            export_raw(image, target)
        export_raw(image, target, overwrite=True)
        assert target.read_bytes() == image.pread(1 << 20, 0)


def test_a_snapshot_of_an_open_image_is_exported(tmp_path: Path) -> None:
    path, target = tmp_path / "image.qcow2", tmp_path / "disk.raw"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_io(path, "write -q -P 1 0 64k")
    qemu_img("snapshot", "-c", "then", path)
    qemu_io(path, "write -q -P 2 0 64k")
    with open_image(path) as image:
        export_raw(image, target, snapshot="then")
        with pytest.raises(OptionError, match="too late"):
            export_raw(image, tmp_path / "other.raw", snapshot="then", force_share=True)
    assert target.read_bytes() == b"\1" * 65536 + bytes((1 << 20) - 65536)


def test_as_a_data_file(kind: Kind, wanted: Path, tmp_path: Path) -> None:
    image, data = tmp_path / "new.qcow2", tmp_path / "new.raw"
    export_as_data_file(kind.path, image, data, extended_l2=True, **kind.options)
    assert data.read_bytes() == wanted.read_bytes()
    options = f"driver=qcow2,file.filename={image},data-file.driver=file,data-file.filename={data}"
    qemu_img("compare", "--image-opts", options, f"driver=raw,file.filename={wanted}")
    qemu_img("check", "-q", "--image-opts", options)
    told = qemu_img_json("info", image)["format-specific"]["data"]
    assert told["data-file-raw"] and told["extended-l2"]


def test_what_qemu_writes_is_refused_and_shared_by_force(tmp_path: Path) -> None:
    image, target = tmp_path / "image.qcow2", tmp_path / "disk.raw"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    with qemu_io_holding(image):
        with pytest.raises(ImageLockedError):
            export_raw(image, target)
        assert not target.exists()
        export_raw(image, target, force_share=True)


def test_a_target_that_qemu_writes_is_not_replaced(tmp_path: Path) -> None:
    image, target = tmp_path / "image.qcow2", tmp_path / "disk.raw"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    target.write_bytes(b"old!" * (1 << 18))
    with qemu_io_holding(target, "-f", "raw"), pytest.raises(ImageLockedError):
        export_raw(image, target, overwrite=True)
    assert target.read_bytes() == b"old!" * (1 << 18)


@pytest.mark.parametrize("make", [_BY_NAME["active"], _BY_NAME["three_layers"], _BY_NAME["raw_data_file"]])
def test_blocks_are_shared_where_the_file_system_can(make: Callable[[Path], Kind], tmp_path: Path) -> None:
    with xfs(tmp_path) as directory:
        kind = make(directory)
        wanted = tmp_path / "wanted"
        qemu_img("convert", "-f", "qcow2", "-O", "raw", *kind.extra, kind.path, wanted)
        before = os.statvfs(directory).f_bfree
        result = export_raw(kind.path, directory / "disk.raw", verify=True, **kind.options)
        assert (directory / "disk.raw").read_bytes() == wanted.read_bytes()
        assert result.shared > 1 << 20
        os.sync()
        used = (before - os.statvfs(directory).f_bfree) * os.statvfs(directory).f_frsize
        assert used < result.shared // 2
        copied = export_raw(kind.path, directory / "copy.raw", share=False, **kind.options)
        assert copied.shared == 0
        assert (directory / "copy.raw").read_bytes() == wanted.read_bytes()
        away = export_raw(kind.path, tmp_path / "away.raw", offload=True, **kind.options)
        assert away.shared == 0
        assert (tmp_path / "away.raw").read_bytes() == wanted.read_bytes()


def test_a_block_device_is_written_in_place_zeros_and_all(tmp_path: Path) -> None:
    kind = _BY_NAME["raw_backing"](tmp_path)
    wanted, disk = tmp_path / "wanted", tmp_path / "disk"
    qemu_img("convert", "-O", "raw", kind.path, wanted)
    size = wanted.stat().st_size
    disk.write_bytes(b"\xee" * (size + 65536))
    with loop_device(disk, read_only=False) as device:
        with pytest.raises(OptionError, match="overwrite"):
            export_raw(kind.path, device)
        assert export_raw(kind.path, device, overwrite=True, verify=True).is_device
    assert disk.read_bytes() == wanted.read_bytes() + b"\xee" * 65536


def test_a_block_device_that_leads_to_a_part_of_the_disk_stays_as_it_is(tmp_path: Path) -> None:
    image, base, volume = tmp_path / "image.qcow2", tmp_path / "base.raw", tmp_path / "volume"
    content = os.urandom(1 << 20)
    for path in (base, volume):
        path.write_bytes(content)
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.name, image, "1M")
    qemu_io(image, "write -q -P 1 0 64k")
    with loop_device(base, read_only=False) as device, pytest.raises(OptionError, match="part of the disk"):
        export_raw(image, device, overwrite=True)
    with loop_device(volume, read_only=False) as device:
        adopt(device, tmp_path / "adopted.qcow2")
        os.mknod(tmp_path / "alias", stat.S_IFBLK | 0o600, os.stat(device).st_rdev)
        for name in (device, tmp_path / "alias"):
            with pytest.raises(OptionError, match="part of the disk"):
                export_raw(tmp_path / "adopted.qcow2", name, overwrite=True, data_file=device)
    assert base.read_bytes() == volume.read_bytes() == content


def test_a_block_device_that_is_read_only_is_named(tmp_path: Path) -> None:
    image, disk = tmp_path / "image.qcow2", tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    disk.write_bytes(bytes(1 << 20))
    with loop_device(disk) as device, pytest.raises(OSError, match=r"permitted|denied|Read-only") as caught:
        export_raw(image, device, overwrite=True)
    assert caught.value.filename == device


def test_a_block_device_that_is_too_small_or_in_use_stays_as_it_is(tmp_path: Path) -> None:
    image, disk = tmp_path / "image.qcow2", tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", image, "32M")
    disk.write_bytes(b"\xee" * (1 << 20))
    with loop_device(disk, read_only=False) as device, pytest.raises(OptionError, match="less than the disk"):
        export_raw(image, device, overwrite=True)
    assert disk.read_bytes() == b"\xee" * (1 << 20)
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", disk], check=True, capture_output=True)
    with loop_device(disk, read_only=False) as device:
        subprocess.run(["mount", device, mounted], check=True)
        try:
            with pytest.raises(ImageLockedError, match="in use"):
                export_raw(image, device, overwrite=True)
        finally:
            subprocess.run(["umount", mounted], check=True)


def test_killed_in_the_middle_there_is_no_file_of_that_name(tmp_path: Path) -> None:
    image, target = tmp_path / "image.qcow2", tmp_path / "disk.raw"
    content = tmp_path / "content"
    content.write_bytes(os.urandom(1 << 20) * 128)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", content, image)
    content.unlink()
    killed = 0
    for delay in (0.0, 0.01, 0.02, 0.04):
        process = subprocess.Popen([*COMMAND, "export", "--no-reflink", image, target], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob("*.partial")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL and not target.exists():
            killed += 1
        elif target.exists():
            assert qcow2("export", image, tmp_path / "whole.raw").status == 0
            assert target.read_bytes() == (tmp_path / "whole.raw").read_bytes()
            break
        for leftover in tmp_path.glob("*.partial"):
            leftover.unlink()
    assert killed


def _large(path: Path) -> Path:
    content = path.with_name("content")
    content.write_bytes(os.urandom(1 << 20) * 64)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", content, path)
    content.unlink()
    return path


def _started(image: Path, target: Path, *words: str) -> subprocess.Popen[bytes]:
    """An export that has begun to copy."""
    command = [*words, *COMMAND, "export", "--no-reflink", "--verify", str(image), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not list(target.parent.glob("*.partial")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_asks_to_end_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    image = _large(tmp_path / "image.qcow2")
    process = _started(image, tmp_path / "disk.raw")
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (128 + number, b"")
    assert os.listdir(tmp_path) == [image.name]


def test_without_a_terminal_it_goes_on_if_it_is_told_to(tmp_path: Path) -> None:
    image = _large(tmp_path / "image.qcow2")
    process = _started(image, tmp_path / "disk.raw", "nohup")
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0
    qemu_img("compare", "-F", "raw", image, tmp_path / "disk.raw")


def test_the_command(tmp_path: Path) -> None:
    kind = _BY_NAME["active"](tmp_path)
    target = tmp_path / "disk.raw"
    ended = qcow2("export", "--output=json", "--verify", kind.path, target)
    told = json.loads(ended.stdout)
    assert ended.status == 0
    assert told["virtual-size"] == target.stat().st_size
    assert told["verified"] is True
    assert told["device"] is False
    assert sum(told[way] for way in ("written", "shared", "offloaded", "zeros")) == told["virtual-size"]
    qemu_img("compare", "-F", "raw", kind.path, target)
    assert qcow2("export", kind.path, target).status == 1
    assert qcow2("export", "--overwrite", "-C", kind.path, target).status == 0
    assert qcow2("export", "--extended-l2", kind.path, tmp_path / "no").status == 1
    ended = qcow2("export", "--as=external-data-file", kind.path, tmp_path / "new.qcow2")
    assert ended.status == 0
    assert "new.raw" in ended.stdout
    qemu_img("compare", "-F", "raw", kind.path, tmp_path / "new.raw")
