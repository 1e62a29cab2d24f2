"""Exports when something goes wrong: no file of the wanted name, and what was there before stays."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.engine import copy_out as copying
from qcow2_plugin.engine.copy_proof import first_difference
from qcow2_plugin.errors import CorruptImageError, ExportError, OptionError
from qcow2_plugin.operations import export as exporting
from qcow2_plugin.operations.create import create_image
from qcow2_plugin.operations.export import export_raw
from qcow2_plugin.storage import file as file_module
from qcow2_plugin.storage import opener
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.offload import Offload
from tests.support.builder import ImageBuilder
from tests.support.full_disk import full_disk
from tests.support.small_disk import DISK, SIZE, make_small_disk

System = Callable[..., Any]


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


@pytest.fixture
def paths(image: Path, target: Path) -> tuple[Path, Path]:
    return image, target


def failing(real: System, number: int, at: int = 0) -> System:
    """`real`, which fails from its call number `at` on."""
    calls = iter(range(1 << 30))

    def call(*arguments: Any, **more: Any) -> Any:
        if next(calls) >= at:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **more)

    return call


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize(("at", "threads"), [(0, 1), (1, 3), (5, 1), (5, 3)])
def test_a_write_that_fails_leaves_nothing(
    number: int, at: int, threads: int, paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, target = paths
    before = descriptors()
    monkeypatch.setattr(file_module, "pwritev", failing(os.pwritev, number, at))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        export_raw(image, target, share=False, threads=threads)
    assert (caught.value.errno, caught.value.filename) == (number, str(target))
    assert os.listdir(target.parent) == []
    assert descriptors() == before


@pytest.mark.parametrize("threads", [1, 3])
def test_a_read_that_fails_leaves_nothing(
    threads: int, image: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "preadv", failing(os.preadv, errno.EIO, 2))
    with pytest.raises(OSError, match="Input/output") as caught:
        export_raw(image, target, share=False, threads=threads)
    assert caught.value.filename == str(image)
    assert os.listdir(target.parent) == []


@pytest.mark.parametrize("call", ["fdatasync", "ftruncate", "link", "fsync", "lseek"])
def test_any_call_that_fails_leaves_nothing(
    call: str, image: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(getattr(os, call), errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            export_raw(image, target)
    assert os.listdir(target.parent) == []


@pytest.mark.parametrize("call", ["fdatasync", "ftruncate", "replace"])
def test_a_file_to_be_replaced_stays_until_the_end(
    call: str, image: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(getattr(os, call), errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            export_raw(image, target, overwrite=True)
    assert os.listdir(target.parent) == [target.name]
    assert target.read_bytes() == b"old"


def test_a_file_that_is_replaced_is_never_undone(
    image: Path, target: Path, wanted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync, errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            export_raw(image, target, overwrite=True)
    assert target.read_bytes() == wanted
    assert os.listdir(target.parent) == [target.name]


def test_a_full_disk(image: Path, target: Path) -> None:
    with full_disk(target.parent, 1 << 20) as disk:
        with pytest.raises(OSError, match=os.strerror(disk.errno)) as caught:
            export_raw(image, target)
        assert caught.value.errno == disk.errno
        assert os.listdir(target.parent) == []


@pytest.mark.parametrize("call", ["fdatasync", "ftruncate", "fsync"])
def test_an_error_names_the_file_that_it_is_about(
    call: str, image: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(getattr(os, call), errno.EIO))
        with pytest.raises(OSError, match="Input/output") as caught:
            export_raw(image, target)
    assert caught.value.filename == str(target.parent if call == "fsync" else target)


@pytest.mark.parametrize("name", ["image", "target"])
def test_an_error_of_reading_again_names_the_file(
    name: str, paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, target = paths
    bad = image if name == "image" else target.parent
    is_copied = []
    real_sync = os.fdatasync

    def fdatasync(fd: int) -> None:
        is_copied.append(True)
        real_sync(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)

    def preadv(fd: int, buffers: Any, at: int) -> int:
        if is_copied and os.readlink(f"/proc/self/fd/{fd}").startswith(str(bad)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(fd, buffers, at)

    monkeypatch.setattr(file_module, "preadv", preadv)
    with pytest.raises(OSError, match="Input/output") as caught:
        export_raw(image, target, share=False, verify=True)
    assert caught.value.filename == str(paths[name == "target"])
    assert os.listdir(target.parent) == []


def test_the_copy_is_dropped_from_memory_before_it_is_read_again(
    image: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noted(call: str, real: System) -> System:
        def noting(*told: Any) -> Any:
            calls.append(call)
            return real(*told)

        return noting

    monkeypatch.setattr(os, "fdatasync", noted("fdatasync", os.fdatasync))
    monkeypatch.setattr(os, "posix_fadvise", noted("posix_fadvise", os.posix_fadvise))
    monkeypatch.setattr(exporting, "first_difference", noted("compared", first_difference))
    export_raw(image, target, verify=True)
    assert calls == ["fdatasync", "posix_fadvise", "compared"]


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_progress_goes_on_to_its_end(verify: bool, threads: int, many: Path, target: Path) -> None:
    told: list[tuple[int, int]] = []
    export_raw(many, target, verify=verify, threads=threads, progress=lambda *step: told.append(step))
    done = [step[0] for step in told]
    total = 2 * SIZE if verify else SIZE
    assert done == sorted(done)
    assert {step[1] for step in told} == {total}
    assert told[-1] == (total, total)
    assert len(set(done)) > 30


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_of_whoever_watches_leaves_nothing(threads: int, many: Path, target: Path) -> None:
    def fail(done: int, total: int) -> None:
        if done > SIZE // 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        export_raw(many, target, threads=threads, progress=fail)
    assert os.listdir(target.parent) == []


def test_an_interruption_leaves_nothing(image: Path, target: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_raw(image, target, progress=interrupt)
    assert os.listdir(target.parent) == []


def test_an_interruption_right_after_the_file_was_made_leaves_nothing(
    image: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(fd: int, path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(opener, "lock_for_writing", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_raw(image, target)
    assert os.listdir(target.parent) == []


def test_a_corrupt_cluster_leaves_nothing(tmp_path: Path, target: Path) -> None:
    builder = ImageBuilder(SIZE).data(0, b"good").compressed(3, b"x", stream=b"\xff" * 100)
    builder.build(tmp_path / "bad.qcow2")
    with pytest.raises(CorruptImageError):
        export_raw(tmp_path / "bad.qcow2", target)
    assert os.listdir(target.parent) == []


def test_short_writes_and_reads_go_on(
    image: Path, target: Path, wanted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "pwritev", lambda fd, some, at: os.pwrite(fd, bytes(some[0])[:1000], at))
    monkeypatch.setattr(file_module, "preadv", lambda fd, some, at: os.preadv(fd, (some[0][:3000],), at))
    export_raw(image, target, share=False)
    assert target.read_bytes() == wanted


class Kernel:
    """Stands in for FICLONERANGE of a file system that has it, or fails as it is told to; counts its calls."""

    def __init__(self, number: int = 0, at: int = 0) -> None:
        self.calls = 0
        self._number = number
        self._at = at

    def __call__(self, fd: int, request: int, argument: bytes) -> int:
        assert request == 0x4020940D
        self.calls += 1
        if self._number and self.calls > self._at:
            raise OSError(self._number, os.strerror(self._number))
        source = int.from_bytes(argument[:8], "little")
        source_offset, length, offset = (int.from_bytes(argument[n : n + 8], "little") for n in (8, 16, 24))
        block = os.fstatvfs(fd).f_frsize
        assert source_offset % block == length % block == offset % block == 0
        os.pwrite(fd, os.pread(source, length, source_offset).ljust(length, b"\0"), offset)
        return 0


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """An image in which every second cluster is one extent."""
    builder = ImageBuilder(SIZE)
    for cluster in range(0, 64, 2):
        builder.data(cluster, bytes([cluster + 1]) * 65536)
    builder.build(tmp_path / "many.qcow2")
    return tmp_path / "many.qcow2"


@pytest.mark.parametrize(
    "number", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.ETXTBSY]
)
@pytest.mark.parametrize("at", [0, 3])
def test_blocks_that_cannot_be_shared_are_copied_and_it_is_not_tried_again(
    number: int, at: int, many: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(number, at)
    monkeypatch.setattr(fcntl, "ioctl", kernel)
    result = export_raw(many, target, threads=1, verify=True)
    assert kernel.calls == at + 1
    assert result.shared == at * 65536
    assert result.written == (32 - at) * 65536


@pytest.mark.parametrize("call", ["share", "copy"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_what_is_no_lack_of_means_stops_the_export(
    call: str, number: int, many: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if call == "share":
        monkeypatch.setattr(fcntl, "ioctl", Kernel(number, 2))
    else:
        monkeypatch.setattr(os, "copy_file_range", failing(os.copy_file_range, number, 2))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        export_raw(many, target, share=call == "share", offload=True)
    assert caught.value.filename == str(target)
    assert os.listdir(target.parent) == []


def test_blocks_are_shared(many: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "ioctl", Kernel())
    result = export_raw(many, target, verify=True)
    assert (result.shared, result.written, result.zeros) == (SIZE // 2, 0, SIZE // 2)


def test_only_whole_blocks_at_the_same_place_in_their_blocks_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    monkeypatch.setattr(fcntl, "ioctl", kernel)
    (tmp_path / "a").write_bytes(os.urandom(100_000))
    (tmp_path / "b").touch()
    source, copy = (FileStorage(os.open(tmp_path / name, os.O_RDWR), name) for name in "ab")
    ways = Offload(source, copy, may_share=True, may_copy=False)
    assert ways.share(512, 512, 20_000) == (3584, 16384)
    assert ways.share(512, 1024, 20_000) == (0, 0)
    assert ways.share(4096, 0, 4095) == (0, 0)
    assert kernel.calls == 1
    source.close()
    copy.close()


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("at", [0, 3])
def test_a_kernel_that_does_not_copy_is_not_asked_again(
    number: int, at: int, many: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = itertools.count()
    call = failing(os.copy_file_range, number, at)
    monkeypatch.setattr(os, "copy_file_range", lambda *told: (next(asked), call(*told))[1])
    result = export_raw(many, target, offload=True, share=False, threads=1, verify=True)
    assert next(asked) == at + 1
    assert (result.offloaded, result.written) == (at * 65536, (32 - at) * 65536)


def test_short_copies_go_on(many: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda a, b, count, at, to: real(a, b, min(count, 5000), at, to))
    assert export_raw(many, target, offload=True, share=False, verify=True).offloaded == SIZE // 2


def test_a_copy_of_nothing_goes_through_memory(many: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    assert export_raw(many, target, offload=True, share=False, verify=True).written == SIZE // 2


def lying_ranges(self: FileStorage, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
    yield offset, length, False


def test_a_lie_about_holes_is_found_by_reading_again(
    image: Path, target: Path, wanted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileStorage, "data_ranges", lying_ranges)
    export_raw(image, target)
    assert target.read_bytes() == bytes(SIZE)
    target.unlink()
    with pytest.raises(ExportError, match="0x186a0"):
        export_raw(image, target, verify=True)
    assert os.listdir(target.parent) == []


def test_a_lie_about_holes_of_a_raw_backing_file_is_found(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(5000) + b"x" * 70000)
    create_image(tmp_path / "top.qcow2", SIZE, backing_file="base.raw", backing_format="raw")
    monkeypatch.setattr(FileStorage, "data_ranges", lying_ranges)
    with pytest.raises(ExportError, match="0x1388"):
        export_raw(tmp_path / "top.qcow2", target, verify=True)


@pytest.mark.parametrize("lie", ["nothing written", "a byte wrong", "shared something else"])
def test_lies_of_the_target_are_found(lie: str, many: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if lie == "shared something else":
        monkeypatch.setattr(fcntl, "ioctl", lambda *_: 0)
    elif lie == "nothing written":
        monkeypatch.setattr(file_module, "pwritev", lambda fd, some, at: sum(map(len, some)))
    else:
        monkeypatch.setattr(
            file_module, "pwritev", lambda fd, some, at: os.pwritev(fd, [b"?" + bytes(some[0])[1:]], at)
        )
    with pytest.raises(ExportError, match="differ at guest offset 0x0"):
        export_raw(many, target, verify=True, share=lie.startswith("shared"))
    assert os.listdir(target.parent) == []


def test_data_where_zeros_belong_are_found(many: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FileStorage.barrier

    def barrier(storage: FileStorage) -> None:
        os.pwrite(storage.fileno(), b"?", 65536 + 7)
        real(storage)

    monkeypatch.setattr(FileStorage, "barrier", barrier)
    with pytest.raises(ExportError, match="0x10007"):
        export_raw(many, target, verify=True)


@pytest.mark.parametrize(
    "options",
    [{"sparse_size": 100}, {"sparse_size": 16 << 20}, {"sparse_size": -512}, {"threads": 0}, {"threads": 999}],
)
def test_wrong_options(options: dict[str, int], image: Path, target: Path) -> None:
    with pytest.raises(OptionError):
        export_raw(image, target, **options)  # type: ignore[arg-type]  # wrong on purpose


def test_a_faked_device_is_zeroed_where_nothing_is(
    image: Path, target: Path, wanted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.write_bytes(b"\xee" * (SIZE + 5000))
    monkeypatch.setattr(exporting, "is_device", lambda path: True)
    result = export_raw(image, target, overwrite=True, verify=True)
    assert result.is_device
    assert target.read_bytes() == wanted + b"\xee" * 5000
    target.write_bytes(b"\xee" * (SIZE - 1))
    with pytest.raises(OptionError, match="less than the disk"):
        export_raw(image, target, overwrite=True)
    assert target.read_bytes() == b"\xee" * (SIZE - 1)


def test_zeros_that_are_stored_reach_a_faked_device(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = ImageBuilder(SIZE).data(0, b"x" * 65536).data(3, b"").data(8, bytes(65535) + b"y")
    builder.build(tmp_path / "zeros.qcow2")
    target.write_bytes(b"\xee" * SIZE)
    monkeypatch.setattr(exporting, "is_device", lambda path: True)
    for offload in (False, True):
        export_raw(tmp_path / "zeros.qcow2", target, overwrite=True, offload=offload)
        assert target.read_bytes() == builder.expected()


@pytest.mark.parametrize("cluster", [16, 17, 23])
def test_zeros_that_are_part_of_a_granule_take_no_space(cluster: int, tmp_path: Path, target: Path) -> None:
    builder = ImageBuilder(1 << 17, 9)
    for first in range(8):
        builder.data(first, b"x" * 512)
    builder.data(cluster, b"")
    builder.build(tmp_path / "small.qcow2")
    export_raw(tmp_path / "small.qcow2", target, threads=1, share=False)
    assert target.read_bytes() == builder.expected()
    assert target.stat().st_blocks * 512 == 4096


def test_what_stands_apart_in_a_file_is_asked_of_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = FileStorage.data_ranges

    def ranges(self: FileStorage, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        asked.append(offset)
        return real(self, offset, length)

    builder = ImageBuilder(SIZE)
    for cluster in range(64):
        builder.data(cluster, b"x" * 65536, host_offset=(10 + (cluster * 37) % 64) * 65536)
    builder.build(tmp_path / "scattered.qcow2")
    monkeypatch.setattr(FileStorage, "data_ranges", ranges)
    export_raw(tmp_path / "scattered.qcow2", tmp_path / "disk.raw")
    assert 0 < len(asked) < 16
    monkeypatch.setattr(copying, "_REMEMBERED", 2)
    export_raw(tmp_path / "scattered.qcow2", tmp_path / "again.raw", verify=True)
