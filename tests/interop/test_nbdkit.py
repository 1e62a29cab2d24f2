"""The plugin in a real nbdkit, asked by real clients: what is read, what is listed, what is refused and how.

Nearly all servers here are read-only; test_nbdkit_writing has the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import nbd
import pytest

from qcow2_plugin import open_image
from qcow2_plugin.adapters.exports import BitmapView
from tests.support.agreement import RawDisk, assert_reads_as, assert_tiles, converted, odd_ranges
from tests.support.builder import ImageBuilder
from tests.support.holders import qemu_io_holding
from tests.support.mixture import fill, pattern_files
from tests.support.nbd_disk import NbdDisk, states_of
from tests.support.tools import PLUGIN, Server, ToolError, nbd_connect, nbdkit, qemu_img, qemu_img_json, qemu_io, run

MIB = 1 << 20
SIZE = 10 * MIB + 1536
CLUSTER = 65536


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with everything: compressed clusters, a backing file, two snapshots of other sizes, two bitmaps."""
    directory = tmp_path_factory.mktemp("served")
    base, path = directory / "base.qcow2", directory / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "6M")
    fill(base, 6 * MIB, CLUSTER, seed=1, compressed=True)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", path, "3M")
    for number, (name, size) in enumerate({"small": 3 * MIB + 512, "large": 12 * MIB}.items()):
        qemu_img("resize", "-q", path, str(size))
        fill(path, size, CLUSTER, seed=2 + number, compressed=number == 0)
        qemu_img("snapshot", "-c", name, path)
    qemu_img("resize", "-q", "--shrink", path, str(SIZE))
    qemu_img("bitmap", "--add", "-g", "4096", path, "monday")
    fill(path, SIZE, CLUSTER, seed=4, count=8)
    qemu_img("bitmap", "--add", "-g", "65536", path, "tuesday")
    fill(path, SIZE, CLUSTER, seed=5, count=8)
    return path


@pytest.fixture(scope="module")
def expected(disk: Path) -> Iterator[RawDisk]:
    with converted(disk) as raw:
        yield raw


def reading(
    params: Mapping[str, str | Path], *options: str, plugin: Path = PLUGIN
) -> contextlib.AbstractContextManager[Server]:
    return nbdkit({"readonly": "true", **params}, *options, plugin=plugin)


@contextlib.contextmanager
def served(params: Mapping[str, str | Path], *options: str, export: str = "") -> Iterator[NbdDisk]:
    with reading(params, *options) as server, nbd_connect(server.uri, export) as handle:
        yield NbdDisk(handle)


# -- ways to run it --


@pytest.mark.parametrize("threads", [1, 16])
def test_a_disk_is_served_as_it_is(threads: int, disk: Path, expected: RawDisk) -> None:
    with served({"file": disk}, "-t", str(threads)) as export, open_image(disk) as image:
        assert_reads_as(export, expected, near=(CLUSTER, 3 * MIB, 6 * MIB))
        assert export.states() == states_of(image.extents())
        handle = export.handle
        assert handle.is_read_only()
        assert handle.can_multi_conn()
        assert handle.can_cache()
        assert handle.get_block_size(nbd.SIZE_MINIMUM) == 1
        assert handle.get_block_size(nbd.SIZE_PREFERRED) == CLUSTER


@pytest.mark.parametrize(
    ("filters", "params"),
    [
        (["cow"], {}),
        (["readahead"], {}),
        (["blocksize"], {"minblock": "64k", "maxdata": "128k"}),
        (["cow", "readahead"], {}),
        (["cache"], {}),
    ],
    ids=["cow", "readahead", "blocksize", "cow and readahead", "cache"],
)
@pytest.mark.parametrize("threads", [1, 16])
def test_filters_show_the_same_disk(
    filters: list[str], params: dict[str, str], threads: int, disk: Path, expected: RawDisk
) -> None:
    options = [f"--filter={name}" for name in filters]
    with served({"file": disk, **params}, "-t", str(threads), *options) as export:
        rounded = export.virtual_size  # blocksize rounds down to whole blocks
        assert expected.size - CLUSTER < rounded <= expected.size
        for offset in range(0, rounded, 100_001):
            length = min(100_001, rounded - offset)
            assert export.handle.pread(length, offset) == expected.pread(length, offset)
        assert_tiles(list(export.extents()), rounded)


def test_a_cow_filter_takes_writes_that_the_image_never_sees(disk: Path, expected: RawDisk) -> None:
    before = disk.read_bytes()
    with served({"file": disk}, "--filter=cow") as export:
        assert not export.handle.is_read_only()
        export.handle.pwrite(b"new" * 1000, 5 * MIB + 1)
        assert export.handle.pread(3002, 5 * MIB) == expected.pread(1, 5 * MIB) + b"new" * 1000 + expected.pread(
            1, 5 * MIB + 3001
        )
    assert disk.read_bytes() == before


def test_a_partition_is_cut_out(tmp_path: Path) -> None:
    entry = bytes([0, 0, 2, 0, 0x83, 0, 0, 0]) + (2048).to_bytes(4, "little") + (2049).to_bytes(4, "little")
    content = pattern_files(tmp_path)[-1].read_bytes() * 30
    whole = (bytes(446) + entry + bytes(48) + b"\x55\xaa" + content)[: 3 * MIB]
    (tmp_path / "disk.raw").write_bytes(whole)
    path = tmp_path / "disk.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", tmp_path / "disk.raw", path)
    with served({"file": path, "partition": "1"}, "--filter=partition") as export:
        assert export.virtual_size == 2049 * 512
        assert export.handle.pread(2049 * 512, 0) == whole[MIB : MIB + 2049 * 512]


def test_run_gives_clients_the_disk_and_ends_with_them(disk: Path, expected: RawDisk, tmp_path: Path) -> None:
    copy = tmp_path / "copy.raw"
    run("nbdkit", "-r", "-U", "-", "python", PLUGIN, f"file={disk}", "--run", f'nbdcopy "$uri" "{copy}"')
    assert copy.read_bytes() == expected.pread(SIZE, 0)
    with pytest.raises(ToolError) as failed:
        run("nbdkit", "-r", "-U", "-", "python", PLUGIN, f"file={disk}", "--run", "exit 7")
    assert failed.value.returncode == 7


@contextlib.contextmanager
def in_background(directory: Path, *words: str) -> Iterator[str]:
    """nbdkit started in `directory`, gone into the background; its URI. Ends it with SIGTERM."""
    socket, pid_file = directory / "socket", directory / "pid"
    socket.unlink(missing_ok=True)  # nbdkit leaves it
    command = ["nbdkit", "-r", "-U", str(socket), "-P", str(pid_file), "python", str(PLUGIN), *words]
    subprocess.run(command, cwd=directory, check=True, timeout=30, stdin=subprocess.DEVNULL)
    pid = int(pid_file.read_text())
    try:
        yield f"nbd+unix:///?socket={socket}"
    finally:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 20
        while not has_ended(pid):
            assert time.monotonic() < deadline, "nbdkit does not end at SIGTERM"
            time.sleep(0.01)


def has_ended(pid: int) -> bool:
    """Gone, or waiting for a parent that asks for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_names_on_the_command_line_may_be_relative_in_the_background(disk: Path, tmp_path: Path) -> None:
    """nbdkit is in the root directory when it serves."""
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "base").write_bytes(b"\1" * MIB)
    data = tmp_path / "given" / "disk.data"
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "none", "-F", "raw", "-o", f"data_file={data}", path, "1M")
    words = ["file=disk.qcow2", "data-file=given/disk.data", "backing-file=given/base"]
    with in_background(tmp_path, *words) as uri, nbd_connect(uri) as handle:
        assert handle.pread(MIB, 0) == b"\1" * MIB
    shutil.copy(disk, tmp_path / "copy.qcow2")
    words = ["file=copy.qcow2", f"base-directory={os.path.relpath(disk.parent, tmp_path)}"]
    with in_background(tmp_path, *words) as uri, nbd_connect(uri) as handle, converted(disk) as raw:
        assert_reads_as(NbdDisk(handle), raw)


def test_many_connections_read_at_once(disk: Path, expected: RawDisk) -> None:
    failures: list[BaseException] = []

    def read(uri: str, seed: int) -> None:
        try:
            with nbd_connect(uri) as handle:
                for offset, length in odd_ranges(SIZE, seed=seed, count=80):
                    assert handle.pread(length, offset) == expected.pread(length, offset)
        except BaseException as error:
            failures.append(error)

    with reading({"file": disk}, "-t", "16") as server:
        threads = [threading.Thread(target=read, args=(server.uri, seed)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_one_connection_with_many_requests_under_way(disk: Path, expected: RawDisk) -> None:
    with served({"file": disk}, "-t", "16") as export:
        ranges = list(odd_ranges(SIZE, seed=9, count=200))
        buffers = [nbd.Buffer(length) for _, length in ranges]
        cookies = [export.handle.aio_pread(buffer, offset) for buffer, (offset, _) in zip(buffers, ranges, strict=True)]
        while export.handle.aio_in_flight():
            export.handle.poll(-1)
        assert all(export.handle.aio_command_completed(cookie) for cookie in cookies)
        for buffer, (offset, length) in zip(buffers, ranges, strict=True):
            assert buffer.to_bytearray() == expected.pread(length, offset)


def test_large_requests_and_empty_ones(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "70M")
    pattern = pattern_files(tmp_path)[-1]
    qemu_io(path, f"write -s {pattern} 1M 40M")
    with served({"file": path}) as export, converted(path) as raw:
        handle = export.handle
        for offset in (0, 1, 33 * MIB + 511, 38 * MIB):
            assert handle.pread(32 * MIB, offset) == raw.pread(32 * MIB, offset)
        assert handle.pread(64 * MIB, 5) == raw.pread(64 * MIB, 5)
        handle.set_strict_mode(0)
        for length, offset in [(0, 0), (0, 70 * MIB), (1, 70 * MIB), (10, 70 * MIB - 5)]:
            with pytest.raises(nbd.Error) as refused:
                handle.pread(length, offset)
            assert refused.value.errno == "EINVAL"
        assert handle.pread(3, 70 * MIB - 3) == bytes(3)


def test_cache_requests_are_taken(disk: Path, expected: RawDisk) -> None:
    with served({"file": disk}) as export:
        export.handle.cache(SIZE, 0)
        for offset, length in odd_ranges(SIZE, count=30):
            export.handle.cache(length, offset)
        assert export.handle.pread(SIZE, 0) == expected.pread(SIZE, 0)


def test_sigterm_ends_it_with_a_client_connected(disk: Path) -> None:
    with reading({"file": disk}, "-t", "16") as server:
        handle = nbd.NBD()
        handle.connect_uri(server.uri)
        handle.pread(512, 0)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(nbd.Error) as refused:
            while True:
                handle.pread(512, 0)
        assert refused.value.errno == "ESHUTDOWN"
        with contextlib.suppress(nbd.Error):  # the server may have hung up before
            handle.shutdown()
        assert server.process.wait(20) == 0
        assert server.stderr_text() == ""


# -- block status --


def test_block_status_of_odd_ranges(disk: Path) -> None:
    with served({"file": disk}) as export, open_image(disk) as image:
        for offset, length in odd_ranges(SIZE, near=(3 * MIB, 6 * MIB), seed=3):
            assert export.states(offset, length) == states_of(image.extents(offset, length))
            ((first_length, first_flags),) = export.reply(length, offset, flags=nbd.CMD_FLAG_REQ_ONE)
            first, *_ = states_of(image.extents(offset, length))
            assert first_flags == first[2]
            assert 0 < first_length <= length


def test_block_status_knows_zeros_with_and_without_space(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    ImageBuilder(6 * CLUSTER).data(0, b"x").zero(1).zero(2, preallocated=True).compressed(4, b"y").build(path)
    with served({"file": path}) as export:
        hole, zero = nbd.STATE_HOLE | nbd.STATE_ZERO, nbd.STATE_ZERO
        flags = [0, hole, zero, hole, 0, hole]
        assert export.states() == [(cluster * CLUSTER, CLUSTER, flag) for cluster, flag in enumerate(flags)]


def test_more_states_than_one_reply_holds(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    builder = ImageBuilder(40_000 * 512, 9)
    for cluster in range(0, 40_000, 2):
        builder.zero(cluster, preallocated=True) if cluster % 4 else builder.data(cluster, b"z")
    builder.build(path)
    with served({"file": path}) as export, open_image(path) as image:
        assert 1 < len(export.reply(40_000 * 512, 0)) < 40_000
        assert export.states() == states_of(image.extents())


# -- exports --


def test_exports_are_listed_with_what_they_are(disk: Path) -> None:
    with reading({"file": disk}) as server:
        listed = json.loads(run("nbdinfo", "--json", "--list", server.uri))["exports"]
        described = {entry["export-name"]: entry["description"] for entry in listed}
        assert list(described) == ["", "snapshot=1", "snapshot=2", "bitmap=monday", "bitmap=tuesday"]
        assert described[""] == "disk.qcow2, read-only"
        for entry in qemu_img_json("info", disk)["snapshots"]:
            taken = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(entry["date-sec"]))
            assert described[f"snapshot={entry['id']}"] == (
                f'internal snapshot "{entry["name"]}" of disk.qcow2, taken {taken}'
            )
        assert described["bitmap=monday"] == 'dirty bitmap "monday" of disk.qcow2: data is dirty, a hole is clean'
        sizes = {entry["export-name"]: entry["export-size"] for entry in listed}
        assert sizes == {name: SIZE for name in described} | {"snapshot=1": 3 * MIB + 512, "snapshot=2": 12 * MIB}


@pytest.mark.parametrize(("number", "name"), [("1", "small"), ("2", "large")])
def test_a_snapshot_is_an_export(number: str, name: str, disk: Path, expected: RawDisk) -> None:
    with reading({"file": disk}, "-t", "16") as server, open_image(disk, snapshot=name) as image:
        for export_name in (f"snapshot={number}", f"snapshot={name}"):
            with nbd_connect(server.uri, export_name) as handle, nbd_connect(server.uri) as other:
                export = NbdDisk(handle)
                assert export.virtual_size == image.virtual_size
                assert export.handle.pread(image.virtual_size, 0) == image.pread(image.virtual_size, 0)
                assert export.states() == states_of(image.extents())
                assert_reads_as(NbdDisk(other), expected)
    with served({"file": disk, "snapshot": name}) as export, open_image(disk, snapshot=name) as image:
        assert export.handle.pread(image.virtual_size, 0) == image.pread(image.virtual_size, 0)
    with served({"file": disk, "snapshot": name}, export="snapshot=1") as export:
        assert export.virtual_size == 3 * MIB + 512


@pytest.mark.parametrize("name", ["monday", "tuesday"])
def test_a_bitmap_is_an_export_of_what_is_dirty(name: str, disk: Path, expected: RawDisk) -> None:
    clean = nbd.STATE_HOLE | nbd.STATE_ZERO
    with open_image(disk) as image:
        dirty = list(image.dirty_bitmap(name).ranges(0, SIZE))
    shown = bytearray(SIZE)
    for start, length in dirty:
        shown[start : start + length] = expected.pread(length, start)
    assert 0 < sum(length for _, length in dirty) < SIZE
    for params, export_name in (({}, f"bitmap={name}"), ({"bitmap": name}, "")):
        with served({"file": disk, **params}, export=export_name) as export:
            states = export.states()
            assert [(start, length) for start, length, flags in states if not flags] == dirty
            assert {flags for _, _, flags in states} == {0, clean}
            for offset, length in [(0, SIZE), *odd_ranges(SIZE, near=[start for start, _ in dirty])]:
                assert export.handle.pread(length, offset) == shown[offset : offset + length]
            export.handle.cache(SIZE, 0)
    with open_image(disk) as image:
        view = BitmapView(image, name.encode())
        for offset, length in odd_ranges(SIZE, seed=1):
            found = bytearray(b"\xa5" * length)  # nbdkit's own buffers come zeroed
            view.read_into(memoryview(found), offset)
            assert found == shown[offset : offset + length]


def test_an_incremental_backup_is_what_a_bitmap_calls_data(tmp_path: Path) -> None:
    path, backup = tmp_path / "disk.qcow2", tmp_path / "backup.raw"
    qemu_img("create", "-q", "-f", "qcow2", path, str(SIZE))
    fill(path, SIZE, CLUSTER, seed=1, compressed=True)
    with converted(path) as old:
        backup.write_bytes(old.pread(SIZE, 0))
    qemu_img("bitmap", "--add", path, "since")
    fill(path, SIZE, CLUSTER, seed=2)
    with converted(path) as new, reading({"file": path}) as server:
        assert backup.read_bytes() != new.pread(SIZE, 0)
        with nbd_connect(server.uri, "bitmap=since") as handle, open(backup, "r+b") as restored:
            for offset, length, flags in NbdDisk(handle).states():
                if not flags:
                    restored.seek(offset)
                    restored.write(handle.pread(length, offset))
        assert backup.read_bytes() == new.pread(SIZE, 0)


@pytest.mark.parametrize(
    "name", ["nope", "snapshot=3", "snapshot=", "bitmap=wednesday", "bitmap=", "Snapshot=1", "\x1b[31m", "x" * 4096]
)
def test_an_unknown_export_is_refused_and_the_others_go_on(name: str, disk: Path) -> None:
    with reading({"file": disk}) as server:
        with nbd_connect(server.uri) as handle:
            with pytest.raises(nbd.Error) as refused, nbd_connect(server.uri, name):
                pytest.fail("there is no such export")
            assert refused.value.errno in ("ENOENT", "EINVAL")
            assert len(handle.pread(512, 0)) == 512
        with nbd_connect(server.uri) as handle:
            assert len(handle.pread(512, 0)) == 512
        assert "\x1b" not in server.stderr_text()
        assert "Traceback" not in server.stderr_text()


def test_more_exports_than_are_served_at_once(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    builder = ImageBuilder(MIB).data(0, b"x")
    for number in range(1, 41):
        builder.snapshot(b"%d" % number, b"name")
    builder.build(path)
    with reading({"file": path}) as server, contextlib.ExitStack() as connections:
        first = connections.enter_context(nbd_connect(server.uri, "snapshot=1"))
        with contextlib.ExitStack() as others:
            for number in range(2, 17):
                others.enter_context(nbd_connect(server.uri, f"snapshot={number}"))
            with pytest.raises(nbd.Error), nbd_connect(server.uri, "snapshot=33"):
                pytest.fail("too many")
            with nbd_connect(server.uri, "snapshot=1") as again:
                assert again.pread(1, 0) == b"x"
        assert "more than 16 exports are in use at once" in server.stderr_text()
        wait_for_export(server.uri, "snapshot=33")
        assert first.pread(1, 0) == b"x"


def wait_for_export(uri: str, name: str) -> None:
    """Until the server has noticed that others have gone."""
    deadline = time.monotonic() + 20
    while True:
        try:
            with nbd_connect(uri, name) as handle:
                assert handle.pread(1, 0) == b"x"
            return
        except nbd.Error:
            assert time.monotonic() < deadline
            time.sleep(0.01)


# -- what goes wrong --


def test_a_corrupt_entry_is_eio_where_it_is_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    built = ImageBuilder(4 * CLUSTER).data(0, b"a").entry(1, 1 << 63 | 0x50200).data(2, b"c").build(path)
    with reading({"file": path}) as server, nbd_connect(server.uri) as handle:
        for length, offset in [(1, CLUSTER), (3 * CLUSTER, 0), (2, CLUSTER - 1)]:
            with pytest.raises(nbd.Error) as failed:
                handle.pread(length, offset)
            assert failed.value.errno == "EIO"
        assert handle.pread(1, 0) == b"a"
        assert handle.pread(1, 2 * CLUSTER) == b"c"
        export = NbdDisk(handle)
        assert export.reply(4 * CLUSTER, 0) == [(CLUSTER, 0)]
        with pytest.raises(nbd.Error) as failed:
            export.reply(CLUSTER, CLUSTER)
        assert failed.value.errno == "EIO"
        with pytest.raises(nbd.Error) as failed:
            handle.cache(CLUSTER, CLUSTER)
        assert failed.value.errno == "EIO"
        assert export.states(2 * CLUSTER, CLUSTER) == [(2 * CLUSTER, CLUSTER, 0)]
        complaint = f"L2 entry at host offset {built.l2_entry_offset(1):#x}: 0x8000000000050200 is invalid ({path})"
        assert complaint in server.stderr_text()
        assert "Traceback" not in server.stderr_text()


def complaint_of(params: Mapping[str, str | Path], *options: str) -> str:
    """The one line that nbdkit says when it does not start."""
    with pytest.raises(ToolError) as refused, reading(params, *options):
        pytest.fail("the server started")
    (line,) = [line for line in refused.value.stderr.splitlines() if line.strip()]
    assert line.startswith("nbdkit: error: ")
    return line


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ({"policy": "open"}, "policy=open is none of inspect, confined, trusted"),
        ({"allow-damaged": "maybe"}, 'allow-damaged=maybe is neither "true" nor "false"'),
        ({"force-share": ""}, 'force-share= is neither "true" nor "false"'),
        ({"readonly": "perhaps"}, 'readonly=perhaps is neither "true" nor "false"'),
        ({"readonly": "false", "snapshot": "small"}, "snapshot= is for reading only"),
        ({"readonly": "false", "bitmap": "monday"}, "bitmap= is for reading only"),
        ({"readonly": "false", "allow-damaged": "true"}, "allow-damaged= is for reading only"),
        ({"readonly": "false", "force-share": "true"}, "force-share= is for reading only"),
        ({"snapshot": "small", "bitmap": "monday"}, "snapshot= and bitmap= exclude each other"),
        ({"snapshot": "none"}, 'the image has no internal snapshot "none"'),
        ({"bitmap": "none"}, 'the image has no bitmap "none"'),
        ({"data-file": "x"}, "the image has no external data file"),
        ({"backing-file": "none"}, "No such file or directory"),
        ({"backing_file": "x"}, 'unknown parameter "backing_file"; known are: file, '),
        ({"file": ""}, "neither a regular file nor a block device"),
        ({"file": "/none"}, "No such file or directory: '/none'"),
        ({"file": "/dev/null"}, "this is a character device"),
        ({"file": PLUGIN}, "not a qcow2 image"),
        ({"policy": "inspect"}, "policy inspect opens nothing that an image names"),
    ],
    ids=str,
)
def test_wrong_parameters_are_told_in_one_line(params: dict[str, str | Path], complaint: str, disk: Path) -> None:
    assert complaint in complaint_of({"file": disk, **params})


def test_a_size_that_is_none_is_told_without_a_traceback(disk: Path) -> None:
    with pytest.raises(ToolError) as refused, reading({"file": disk, "cache-size": "lots"}):
        pytest.fail("the server started")
    assert "cache-size=lots" in refused.value.stderr
    assert "Traceback" not in refused.value.stderr


def test_a_missing_file_parameter_is_asked_for() -> None:
    assert "which image? add file=IMAGE.qcow2" in complaint_of({})


def test_a_reference_that_the_policy_denies_is_told_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(MIB))
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", tmp_path / "base", "-F", "raw", path)
    line = complaint_of({"file": path})
    assert f'backing file "{tmp_path}/base" is not opened: it is absolute' in line
    assert "policy trusted" in line
    with served({"file": path, "policy": "trusted"}) as export:
        assert export.virtual_size == MIB
    (tmp_path / "base").unlink()
    assert f'"{tmp_path}/base" does not exist' in complaint_of({"file": path, "policy": "trusted"})
    assert "/dev/full" in complaint_of({"file": path, "backing-file": "/dev/full"})


def test_an_image_in_use_is_refused_unless_sharing_is_forced(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    ImageBuilder(MIB).data(0, b"x").build(path)
    with qemu_io_holding(path):
        assert "permission to write" in complaint_of({"file": path})
        with served({"file": path, "force-share": "true"}) as export:
            assert export.handle.pread(1, 0) == b"x"
    with reading({"file": path}), pytest.raises(ToolError, match='Failed to get "write" lock'):
        qemu_io(path, "write 0 512")
    qemu_io(path, "write 0 512")


def test_an_encrypted_image_is_refused_by_the_name_of_its_method(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    ImageBuilder(MIB, header={"crypt_method": 1}).build(path)
    assert "the image is encrypted (AES)" in complaint_of({"file": path})


def test_a_truncated_image_is_served_only_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_io(path, "write -P 97 0 64k", "write -P 98 64k 64k")
    os.truncate(path, path.stat().st_size - CLUSTER)
    assert "the image is truncated" in complaint_of({"file": path})
    with served({"file": path, "allow-damaged": "true"}) as export:
        assert export.handle.pread(1, 0) == b"a"
        assert export.handle.pread(1, CLUSTER) == b"\0"


# -- the file itself --


def test_dump_plugin_lists_every_parameter() -> None:
    dumped = run("nbdkit", "python", PLUGIN, "--dump-plugin")
    listed = {line.partition("=")[0] for line in dumped.splitlines() if line.startswith("qcow2_")}
    assert listed == {
        f"qcow2_{name}" for name in (
            "file", "readonly", "policy", "data_file", "backing_file", "backing_format", "base_directory",
            "snapshot", "bitmap", "allow_damaged", "force_share", "cache_size",
            "backup", "point", "disk", "scratch",
        )
    }  # fmt: skip
    assert "thread_model=parallel" in dumped.splitlines()


def test_the_file_explains_itself() -> None:
    text = run("/usr/bin/python3", PLUGIN, "--help")
    for name in (
        "file=",
        "readonly=",
        "policy=",
        "snapshot=",
        "bitmap=",
        "cache-size=",
        "python ./nbdkit_plugin.py file=",
    ):
        assert name in text
    with pytest.raises(ToolError) as caught:
        run("/usr/bin/python3", PLUGIN)
    assert (caught.value.returncode, caught.value.stderr) == (2, text)


def test_without_the_package_one_line_says_what_to_do(disk: Path, tmp_path: Path) -> None:
    alone = shutil.copy(PLUGIN, tmp_path / "nbdkit_plugin.py")
    with pytest.raises(ToolError) as refused, reading({"file": disk}, plugin=Path(alone)):
        pytest.fail("the server started")
    (line,) = [line for line in refused.value.stderr.splitlines() if line.strip()]
    assert "No module named 'qcow2_plugin'" in line
    assert "bash examples/quickstart.sh" in line


def test_it_runs_from_any_directory_through_any_path(disk: Path, tmp_path: Path) -> None:
    relative = os.path.relpath(PLUGIN, tmp_path)
    for name in (relative, str(PLUGIN)):
        words = ["nbdkit", "-r", "-U", "-", "python", name, f"file={disk}", "--run", 'nbdinfo --size "$uri"']
        done = subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60)
        assert done.stdout == f"{SIZE}\n"
