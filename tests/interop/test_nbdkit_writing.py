"""The plugin in a real nbdkit, written to by real clients: what arrives, what is refused and how, what stays."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import nbd
import pytest

from qcow2_plugin import open_image
from tests.support.builder import ImageBuilder
from tests.support.full_disk import full_disk
from tests.support.holders import qemu_io_holding
from tests.support.lockbytes import QEMU_READER, QEMU_WRITER, locked_bytes
from tests.support.nbd_disk import NbdDisk
from tests.support.registers import ZERO, Event, violation
from tests.support.tools import (
    PLUGIN,
    Server,
    ToolError,
    convert_to_raw,
    nbd_connect,
    nbdkit,
    qemu_img,
    qemu_img_json,
    qemu_io,
    run,
)

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB
SIZE = 4 * MIB + 1536
HOLE, ZEROS = nbd.STATE_HOLE, nbd.STATE_ZERO

KINDS = {
    "plain": "",
    "small clusters": "cluster_size=512,refcount_bits=1",
    "big clusters": "cluster_size=2M,refcount_bits=64",
    "old": "compat=0.10",
    "extended L2": "extended_l2=on,cluster_size=16k",
    "lazy refcounts": "lazy_refcounts=on",
    "backing": "backing_file=base.qcow2,backing_fmt=qcow2",
    "data file": "data_file=%s",
    "raw data file": "data_file=%s,data_file_raw=on",
}


def make(directory: Path, kind: str = "plain", size: int = SIZE) -> dict[str, str | Path]:
    """An image of this kind with something in it, a snapshot if it can have one, and a bitmap; the plugin's parameters.

    QEMU's commands run outside `directory`, so its data file has an absolute name, which the parameters allow.
    """
    path, base, data = directory / "disk.qcow2", directory / "base.qcow2", directory / "disk.data"
    if kind == "backing":
        qemu_img("create", "-q", "-f", "qcow2", base, str(size - 100 * KIB))
        qemu_io(base, f"write -P 98 1000 {MIB}", f"write -P 99 {2 * MIB} 200k", f"write -P 97 {size - 130 * KIB} 20k")
    options = KINDS[kind].replace("%s", str(data))
    qemu_img("create", "-q", "-f", "qcow2", *(["-o", options] if options else []), path, str(size))
    qemu_io(path, "write -P 1 100k 300k", f"write -P 2 {size - 70 * KIB} 60k", "write -z 1M 64k")
    if kind not in ("data file", "raw data file", "small clusters"):
        qemu_io(path, "write -c -P 3 2M 64k") if kind == "plain" else None
        qemu_img("snapshot", "-c", "before", path)
    if kind != "old":
        qemu_img("bitmap", "--add", path, "since")
    return {"file": path, **({"data-file": data} if data.exists() else {})}


def content(params: Mapping[str, str | Path]) -> bytes:
    return convert_to_raw(params["file"])


def assert_clean(params: Mapping[str, str | Path]) -> None:
    """qemu-img check finds nothing, not even leaks."""
    checked = qemu_img_json("check", params["file"])
    assert (checked["check-errors"], checked.get("leaks", 0), checked.get("corruptions", 0)) == (0, 0, 0)


def assert_sound(params: Mapping[str, str | Path]) -> None:
    """As after a crash: qemu-img check finds leaks at most."""
    try:
        qemu_img("check", params["file"])
    except ToolError as found:
        assert found.returncode == 3, found  # leaks


@contextlib.contextmanager
def killed(params: Mapping[str, str | Path], *options: str) -> Iterator[Server]:
    """A server that the block must kill."""
    with pytest.raises(ToolError, match=f"ended with {-signal.SIGKILL}"), nbdkit(params, *options) as server:
        yield server


def connect(server: Server) -> nbd.NBD:
    """A connection that nobody shuts down."""
    handle = nbd.NBD()
    handle.connect_uri(server.uri)
    return handle


def kill(server: Server) -> None:
    server.process.kill()
    server.process.wait(20)


@contextlib.contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(nbd.Error) as caught:
        yield
    assert caught.value.errnum == number, caught.value


def unchecked(handle: nbd.NBD) -> nbd.NBD:
    """The handle, which now sends requests that libnbd knows to be wrong."""
    handle.set_strict_mode(0)
    return handle


# -- what is written is there --


def work(handle: nbd.NBD, disk: bytearray, rng: random.Random, count: int) -> None:
    """`count` requests of all kinds, each of which `disk` sees as well; what a discard leaves is asked."""
    for _ in range(count):
        length = min(rng.choice([1, 511, 512, 4096, 5000, CLUSTER, 3 * CLUSTER, rng.randrange(1, MIB)]), len(disk))
        offset = rng.randrange(len(disk) - length + 1)
        offset -= rng.choice([0, offset % 512, offset % CLUSTER])
        end = offset + length
        flags = rng.choice([0, 0, 0, nbd.CMD_FLAG_FUA])
        verb = rng.choice(["write", "write", "write", "zero", "zero", "trim", "read", "flush"])
        if verb == "write":
            disk[offset:end] = rng.randbytes(length)
            handle.pwrite(bytes(disk[offset:end]), offset, flags)
        elif verb == "zero":
            disk[offset:end] = bytes(length)
            handle.zero(length, offset, flags | rng.choice([0, nbd.CMD_FLAG_NO_HOLE]))
        elif verb == "trim":
            handle.trim(length, offset, flags)
            found = handle.pread(length, offset)
            assert all(new in (0, old) for new, old in zip(found, disk[offset:end], strict=True))
            disk[offset:end] = found
        elif verb == "read":
            assert handle.pread(length, offset) == disk[offset:end]
        else:
            handle.flush()


@pytest.mark.parametrize("threads", [1, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_there(kind: str, threads: int, tmp_path: Path) -> None:
    params = make(tmp_path, kind)
    disk = bytearray(content(params))
    for seed in range(2):
        with nbdkit(params, "-t", str(threads)) as server, nbd_connect(server.uri) as handle:
            work(handle, disk, random.Random(f"{kind} {seed}"), 120)
            assert handle.pread(SIZE, 0) == disk
            assert server.stderr_text() == ""
        assert_clean(params)
        assert content(params) == disk
        if kind == "raw data file":
            raw = Path(params["data-file"]).read_bytes()
            assert raw[:SIZE] == disk
            assert not any(raw[SIZE:])


def test_nothing_is_written_that_nobody_wrote(tmp_path: Path) -> None:
    params = make(tmp_path)
    before = Path(params["file"]).read_bytes()
    with nbdkit(params) as server, nbd_connect(server.uri) as handle:
        handle.pread(SIZE, 0)
        handle.flush()
    assert Path(params["file"]).read_bytes() == before


def test_what_the_disk_can_do_is_told(tmp_path: Path) -> None:
    params = make(tmp_path)
    with nbdkit(params) as server:
        with nbd_connect(server.uri) as handle:
            assert not handle.is_read_only()
            assert handle.can_flush()
            assert handle.can_fua()
            assert handle.can_trim()
            assert handle.can_zero()
            assert handle.can_fast_zero()
            assert handle.can_multi_conn()
        with nbd_connect(server.uri, "snapshot=before") as handle:
            assert handle.is_read_only()
            assert handle.can_multi_conn()
        assert 'description: "disk.qcow2, writable"' in run("nbdinfo", "--json", server.uri).replace('n"', "n")


def test_large_requests_and_the_end_of_the_disk(tmp_path: Path) -> None:
    params = make(tmp_path, size=100 * MIB + 512)
    end = 100 * MIB + 512
    expected = bytearray(content(params))
    rng = random.Random(1)
    with nbdkit(params) as server, nbd_connect(server.uri) as handle:
        for length, offset in [(32 * MIB, 1), (64 * MIB, 33 * MIB + 511), (1, end - 1), (513, end - 513)]:
            expected[offset : offset + length] = rng.randbytes(length)
            handle.pwrite(bytes(expected[offset : offset + length]), offset)
        handle.zero(70 * MIB, 777)
        expected[777 : 777 + 70 * MIB] = bytes(70 * MIB)
        handle.trim(end - 80 * MIB, 80 * MIB)
        expected[80 * MIB :] = bytes(end - 80 * MIB)
        handle.zero(1, end - 1)
        handle.trim(1, end - 1)
        unchecked(handle)
        for length, offset in [(1, end), (2, end - 1), (512, end - 511), (1, end + 1), (0, 0), (0, end)]:
            with refused(errno.ENOSPC):
                handle.pwrite(bytes(length), offset)
            with refused(errno.ENOSPC):
                handle.zero(length, offset)
            with refused(errno.EINVAL):
                handle.trim(length, offset)
        assert handle.pread(40 * MIB, 60 * MIB + 512) == expected[60 * MIB + 512 :]
    assert_clean(params)
    assert content(params) == expected


# -- zeros and discards --


@pytest.mark.parametrize(("flags", "state"), [(0, HOLE | ZEROS), (nbd.CMD_FLAG_NO_HOLE, ZEROS)])
def test_zeros_give_space_back_only_where_they_may(flags: int, state: int, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    ImageBuilder(8 * CLUSTER).data(0, b"a").data(1, b"b").data(2, b"c").build(path)
    with nbdkit({"file": path}) as server, nbd_connect(server.uri) as handle:
        handle.zero(CLUSTER, CLUSTER, flags)
        assert NbdDisk(handle).states() == [
            (0, CLUSTER, 0),
            (CLUSTER, CLUSTER, state),
            (2 * CLUSTER, CLUSTER, 0),
            (3 * CLUSTER, 5 * CLUSTER, HOLE | ZEROS),
        ]
    (entry,) = [entry for entry in qemu_img_json("map", path) if entry["start"] == CLUSTER]
    assert (entry["data"], entry["zero"], "offset" in entry) == (False, True, state == ZEROS)
    assert_clean({"file": path})


def test_a_discard_gives_space_back(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    with nbdkit({"file": path}) as server, nbd_connect(server.uri) as handle:
        handle.pwrite(b"x" * 8 * MIB, 0, nbd.CMD_FLAG_FUA)
        full = path.stat().st_blocks * 512
        assert full >= 8 * MIB
        handle.trim(6 * MIB, MIB, nbd.CMD_FLAG_FUA)
        assert NbdDisk(handle).states() == [
            (0, MIB, 0),
            (MIB, 6 * MIB, HOLE | ZEROS),
            (7 * MIB, MIB, 0),
        ]
        assert handle.pread(6 * MIB, MIB) == bytes(6 * MIB)
        handle.flush()
        assert path.stat().st_blocks * 512 <= full - 5 * MIB
    assert_clean({"file": path})


def test_fast_zeros_are_fast_or_refused_before_anything_changes(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    ImageBuilder(8 * CLUSTER).data(0, b"a" * CLUSTER).data(1, b"b" * CLUSTER).build(path)
    with nbdkit({"file": path}) as server, nbd_connect(server.uri) as handle:
        before = handle.pread(8 * CLUSTER, 0)
        for length, offset in [(512, 0), (CLUSTER + 1, 0), (2 * CLUSTER - 1, 1)]:
            with refused(errno.ENOTSUP):
                handle.zero(length, offset, nbd.CMD_FLAG_FAST_ZERO)
        assert handle.pread(8 * CLUSTER, 0) == before
        for flags in (nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, 0):
            handle.zero(CLUSTER, CLUSTER, flags | nbd.CMD_FLAG_FAST_ZERO)
            handle.zero(CLUSTER + 3, 5 * CLUSTER - 1, flags | nbd.CMD_FLAG_FAST_ZERO)  # zeros already
        assert handle.pread(8 * CLUSTER, 0) == b"a" * CLUSTER + bytes(7 * CLUSTER)
        assert server.stderr_text() == ""  # to be refused is no failure
    assert_clean({"file": path})


def test_zeros_that_must_be_written_are_written(tmp_path: Path) -> None:
    """Version 2 has no word for zeros above a backing file."""
    base, path = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    ImageBuilder(4 * CLUSTER).data(0, b"a" * CLUSTER).data(1, b"b" * CLUSTER).build(base)
    options = "compat=0.10,backing_file=base.qcow2,backing_fmt=qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(4 * CLUSTER))
    with nbdkit({"file": path}) as server, nbd_connect(server.uri) as handle:
        with refused(errno.ENOTSUP):
            handle.zero(CLUSTER, 0, nbd.CMD_FLAG_FAST_ZERO)
        assert handle.pread(1, 0) == b"a"
        handle.zero(CLUSTER, 0)
        handle.trim(CLUSTER, CLUSTER)
        assert handle.pread(2 * CLUSTER, 0) == bytes(CLUSTER) + b"b" * CLUSTER
    assert_clean({"file": path})
    assert convert_to_raw(path) == bytes(CLUSTER) + b"b" * CLUSTER + bytes(2 * CLUSTER)


# -- durable --


@pytest.mark.parametrize("kind", KINDS)
def test_a_flush_on_any_connection_is_for_all(kind: str, tmp_path: Path) -> None:
    params = make(tmp_path, kind)
    expected = bytearray(content(params))
    rng = random.Random(2)
    with killed(params) as server:
        first, second = connect(server), connect(server)
        for offset in (0, 150 * KIB + 7, 2 * MIB + 1, SIZE - 40000):
            expected[offset : offset + 40000] = rng.randbytes(40000)
            first.pwrite(bytes(expected[offset : offset + 40000]), offset)
            assert second.pread(40000, offset) == expected[offset : offset + 40000]
        second.flush()
        first.pwrite(b"not flushed", 3 * MIB)
        kill(server)
    assert_sound(params)
    found = content(params)
    expected[3 * MIB : 3 * MIB + 11] = found[3 * MIB : 3 * MIB + 11]
    assert found == expected


@pytest.mark.parametrize("verb", ["write", "zero", "trim"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_durable_request_is_there_after_a_crash(kind: str, verb: str, tmp_path: Path) -> None:
    params = make(tmp_path, kind)
    expected = bytearray(content(params))
    start, length = 128 * KIB, 3 * CLUSTER + 1000
    with killed(params) as server:
        handle = connect(server)
        if verb == "write":
            handle.pwrite(b"durable!" * (length // 8), start, nbd.CMD_FLAG_FUA)
            expected[start : start + length] = b"durable!" * (length // 8)
        elif verb == "zero":
            handle.zero(length, start, nbd.CMD_FLAG_FUA)
            expected[start : start + length] = bytes(length)
        else:
            handle.trim(length, start, nbd.CMD_FLAG_FUA)
            expected[start : start + length] = handle.pread(length, start)
            assert kind == "big clusters" or not any(expected[2 * CLUSTER : 4 * CLUSTER])
        kill(server)
    assert_sound(params)
    assert content(params) == expected


def test_what_was_acknowledged_is_stored_when_the_server_ends(tmp_path: Path) -> None:
    """Neither client flushes, and one does not even say goodbye."""
    params = make(tmp_path)
    expected = bytearray(content(params))
    with nbdkit(params) as server:
        with nbd_connect(server.uri) as handle:
            handle.pwrite(b"polite" * 20000, 3 * MIB)
            expected[3 * MIB : 3 * MIB + 120_000] = b"polite" * 20000
        rude = connect(server)
        rude.pwrite(b"rude" * 20000, 5)
        expected[5:80_005] = b"rude" * 20000
        del rude
    assert_clean(params)
    assert content(params) == expected


@pytest.mark.parametrize("kind", ["plain", "small clusters", "data file"])
def test_sigterm_under_load_keeps_what_was_acknowledged(kind: str, tmp_path: Path) -> None:
    params = make(tmp_path, kind)
    block = 4096
    old = content(params)
    sent: dict[int, bytes] = {}
    acknowledged: dict[int, bytes] = {}

    def write(uri: str, seed: int) -> None:
        rng = random.Random(seed)
        with contextlib.suppress(nbd.Error), nbd_connect(uri) as handle:
            for number in rng.sample(range(seed, SIZE // block, 4), SIZE // block // 5):  # no two write the same
                sent[number] = rng.randbytes(block)
                handle.pwrite(sent[number], number * block)
                acknowledged[number] = sent[number]

    with nbdkit(params) as server:
        writers = [threading.Thread(target=write, args=(server.uri, seed)) for seed in range(4)]
        for writer in writers:
            writer.start()
        while len(acknowledged) < 100:
            time.sleep(0.001)
        server.process.send_signal(signal.SIGTERM)
        for writer in writers:
            writer.join()
        assert server.process.wait(20) == 0
    assert_clean(params)
    found = content(params)
    for number, data in sent.items():
        now = found[number * block :][:block]
        assert now == data or (number not in acknowledged and now == old[number * block :][:block]), number
    untouched = [number for number in range(SIZE // block) if number not in sent]
    assert all(found[number * block :][:block] == old[number * block :][:block] for number in untouched)


def test_writes_are_told_that_the_server_ends(tmp_path: Path) -> None:
    with nbdkit(make(tmp_path)) as server, nbd_connect(server.uri) as handle:
        handle.pwrite(b"x", 0)
        server.process.send_signal(signal.SIGTERM)
        with refused(errno.ESHUTDOWN):
            while True:
                handle.pwrite(b"x", 0)


def test_in_the_background_it_writes_and_locks_too(tmp_path: Path) -> None:
    params = make(tmp_path)
    socket, pid_file = tmp_path / "socket", tmp_path / "pid"
    words = ["nbdkit", "-U", str(socket), "-P", str(pid_file), "python", str(PLUGIN), "file=disk.qcow2"]
    subprocess.run(words, cwd=tmp_path, check=True, timeout=30, stdin=subprocess.DEVNULL)
    pid = int(pid_file.read_text())
    try:
        assert locked_bytes(Path(params["file"])) == set(QEMU_WRITER)
        with nbd_connect(f"nbd+unix:///?socket={socket}") as handle:
            handle.pwrite(b"in the background", 3 * MIB)
    finally:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while locked_bytes(Path(params["file"])):
        assert time.monotonic() < deadline, "nbdkit keeps the image"
        time.sleep(0.01)
    assert_clean(params)
    assert content(params)[3 * MIB :].startswith(b"in the background")


# -- writable or not --


@pytest.mark.parametrize(
    ("before", "after", "is_read_only"),
    [
        ("", "", False),
        ("-r", "", True),
        ("-nr", "", True),
        ("--readonly", "", True),
        ("--rea", "", True),
        ("", "-r", True),
        ("-e -r", "", False),
        ("-er", "", False),
        ("--export -r", "-r", True),
        ("-- ", "", False),
        ("", "readonly=true", True),
        ("-r", "readonly=true", True),
        ("", "readonly=false", False),
        ("", "snapshot=before", True),
        ("", "bitmap=since", True),
        ("", "force-share=true", True),
        ("", "allow-damaged=true", True),
    ],
)
def test_read_only_is_what_nbdkit_makes_of_its_command_line(
    before: str, after: str, is_read_only: bool, tmp_path: Path
) -> None:
    """The client sees what nbdkit decided, the locks what the plugin did."""
    params = make(tmp_path)
    report = tmp_path / "report"
    command = (
        f'nbdinfo --is read-only "nbd+unix:///?socket=$unixsocket"; echo $? > {report}; '
        f"qemu-io -r -f qcow2 -c length {params['file']} > /dev/null 2>&1; echo $? >> {report}"
    )
    words = ["-U", "-", *before.split(), "python", str(PLUGIN), f"file={params['file']}", *after.split()]
    run("nbdkit", "--run", command, *words)
    assert report.read_text().split() == (["0", "0"] if is_read_only else ["2", "1"])


@pytest.mark.parametrize(("options", "more"), [(["-r"], {}), ([], {"readonly": "true"})], ids=["-r", "readonly=true"])
def test_a_read_only_server_takes_no_writes(options: list[str], more: dict[str, str], tmp_path: Path) -> None:
    params = make(tmp_path)
    before = Path(params["file"]).read_bytes()
    with nbdkit({**params, **more}, *options) as server, nbd_connect(server.uri) as handle:
        assert handle.is_read_only()
        assert locked_bytes(Path(params["file"])) == set(QEMU_READER)
        unchecked(handle)
        with refused(errno.EPERM):
            handle.pwrite(b"x", 0)
        with refused(errno.EPERM):
            handle.zero(1, 0)
        with refused(errno.EPERM):
            handle.trim(1, 0)
        with nbdkit(params, "-r"):  # another reader
            pass
    assert Path(params["file"]).read_bytes() == before


def test_a_cow_filter_leaves_a_writable_image_alone(tmp_path: Path) -> None:
    params = make(tmp_path)
    before = Path(params["file"]).read_bytes()
    with nbdkit(params, "--filter=cow") as server, nbd_connect(server.uri) as handle:
        handle.pwrite(b"new", 0, nbd.CMD_FLAG_FUA)
        assert handle.pread(3, 0) == b"new"
    assert Path(params["file"]).read_bytes() == before


@pytest.mark.parametrize("name", ["cache", "readahead", "blocksize", "fua", "nozero", "stats", "checkwrite"])
def test_filters_pass_writes_on(name: str, tmp_path: Path) -> None:
    params = make(tmp_path, size=4 * MIB)
    data = random.Random(3).randbytes(MIB) + bytes(MIB)
    if name == "checkwrite":
        data = content(params)[: 2 * MIB]
    more = {"stats": {"statsfile": "/dev/null"}, "blocksize": {"minblock": "4k", "maxdata": "64k"}}.get(name, {})
    with nbdkit({**params, **more}, f"--filter={name}") as server, nbd_connect(server.uri) as handle:
        handle.pwrite(data, 0)
        handle.flush()
        assert handle.pread(2 * MIB, 0) == data
    assert_clean(params)
    assert content(params)[: 2 * MIB] == data


def complaint_of(words: list[str]) -> str:
    """The one line that nbdkit, which must not start, says on `words`."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    return line


def test_an_image_that_may_not_be_written_is_told_with_the_way_out(tmp_path: Path) -> None:
    params = make(tmp_path)
    Path(params["file"]).chmod(0o444)
    powerless = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    words = [*powerless, "nbdkit", "-U", "-", "python", str(PLUGIN), f"file={params['file']}"]
    line = complaint_of([*words, "--run", "true"])
    assert "cannot open for writing: Permission denied" in line
    assert "give nbdkit -r" in line
    assert str(params["file"]) in line
    run(*words, "-r", "--run", "true")


def test_who_uses_the_image_excludes_us_and_we_them(tmp_path: Path) -> None:
    params = make(tmp_path)
    path = Path(params["file"])
    words = ["nbdkit", "-U", "-", "python", str(PLUGIN), f"file={path}", "--run", "true"]
    with qemu_io_holding(path):
        assert "permission to write" in complaint_of(words)
    with qemu_io_holding(path, "-r"):
        assert str(path) in complaint_of(words)
        run(*words, "-r")
    with nbdkit(params):
        assert locked_bytes(path) == set(QEMU_WRITER)
        for command in ("write 0 512", "read 0 512"):
            with pytest.raises(ToolError, match='Failed to get "'):
                qemu_io(path, command)
        for verb in ("check", "info"):
            with pytest.raises(ToolError, match="Failed to get shared"):
                qemu_img(verb, path)
        qemu_img("info", "-U", path)
        assert str(path) in complaint_of(words)
        assert str(path) in complaint_of([*words, "-r"])
        overlay = tmp_path / "overlay.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", path.name, "-F", "qcow2", overlay, "1M")
        assert str(path) in complaint_of([*words[:-3], f"file={overlay}", *words[-2:]])


def test_a_data_file_in_use_is_refused(tmp_path: Path) -> None:
    params = make(tmp_path, "data file")
    with nbdkit(params):
        assert locked_bytes(Path(params["data-file"])) == set(QEMU_WRITER)
        other = tmp_path / "other.qcow2"
        options = f"data_file={tmp_path / 'x'}"
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, other, str(SIZE))
        words = ["nbdkit", "-U", "-", "python", str(PLUGIN), f"file={other}", f"data-file={params['data-file']}"]
        assert str(params["data-file"]) in complaint_of([*words, "--run", "true"])


# -- snapshots and bitmaps --


def test_a_snapshot_stays_what_it_is(tmp_path: Path) -> None:
    params = make(tmp_path)
    then = content(params)
    now = bytearray(then)
    with nbdkit(params) as server, nbd_connect(server.uri) as disk, nbd_connect(server.uri, "snapshot=1") as snapshot:
        assert snapshot.pread(SIZE, 0) == then
        work(disk, now, random.Random(4), 100)
        assert snapshot.pread(SIZE, 0) == then
        with nbd_connect(server.uri, "snapshot=before") as again:
            assert again.pread(SIZE, 0) == then
        with refused(errno.EPERM):
            unchecked(snapshot).pwrite(b"x", 0)
    assert_clean(params)
    assert content(params) == now
    assert convert_to_raw(params["file"], extra=["-l", "before"]) == then


def test_a_bitmap_that_records_writes_is_no_export_while_there_may_be_some(tmp_path: Path) -> None:
    params = make(tmp_path)
    path = params["file"]
    qemu_img("bitmap", "--add", path, "over")
    qemu_io(path, "write -P 5 3M 64k")
    qemu_img("bitmap", "--disable", path, "over")
    with nbdkit(params) as server:
        listed = run("nbdinfo", "--list", "--no-content", server.uri)
        assert 'export="bitmap=over"' in listed
        assert "since" not in listed
        with pytest.raises(nbd.Error), nbd_connect(server.uri, "bitmap=since"):
            pytest.fail("it is served")
        assert 'bitmap "since" records what is written' in server.stderr_text()
        assert "Traceback" not in server.stderr_text()
        with nbd_connect(server.uri) as disk, nbd_connect(server.uri, "bitmap=over") as over:
            before = NbdDisk(over).states()
            assert (3 * MIB, CLUSTER, 0) in before
            disk.pwrite(b"new", 3 * MIB)
            disk.pwrite(b"x" * MIB, 2 * MIB)
            disk.flush()
            assert over.pread(3, 3 * MIB) == b"new"
            assert NbdDisk(over).states() == before
            with nbd_connect(server.uri, "bitmap=over") as again:
                assert NbdDisk(again).states() == before
    with nbdkit(params, "-r") as server, nbd_connect(server.uri, "bitmap=since") as since:
        dirty = [(offset, length) for offset, length, flags in NbdDisk(since).states() if not flags]
        assert dirty == [(2 * MIB, MIB + CLUSTER)]
    assert_clean(params)


# -- what goes wrong --


def test_a_full_file_system_is_told_as_such(tmp_path: Path) -> None:
    """Writes to what is there go on, and so do reads; space that comes back is used."""
    params = make(tmp_path, size=64 * MIB)
    expected = bytearray(content(params))
    (tmp_path / "small").mkdir()
    with full_disk(tmp_path / "small", 8 * MIB) as small:
        path, ballast = small.directory / "disk.qcow2", small.directory / "ballast"
        qemu_img("convert", "-O", "qcow2", params["file"], path)
        ballast.write_bytes(bytes(2 * MIB))
        with nbdkit({"file": path}) as server, nbd_connect(server.uri) as handle:
            with refused(errno.ENOSPC):
                for offset in range(8 * MIB, 64 * MIB, MIB):
                    handle.pwrite(b"f" * MIB, offset)
                    expected[offset : offset + MIB] = b"f" * MIB
            assert offset > 8 * MIB
            handle.pwrite(b"in place", 150 * KIB)
            expected[150 * KIB : 150 * KIB + 8] = b"in place"
            assert handle.pread(8, 150 * KIB) == b"in place"
            assert os.strerror(small.errno) in server.stderr_text()
            assert "Traceback" not in server.stderr_text()
            handle.flush()
            ballast.unlink()
            if small.errno == errno.ENOSPC:
                handle.pwrite(b"f" * MIB, offset)
            found = handle.pread(MIB, offset)
            assert found.count(b"f") + found.count(b"\0") == MIB
            expected[offset : offset + MIB] = found if small.errno != errno.ENOSPC else b"f" * MIB
        assert_clean({"file": path})
        with open_image(path) as image:
            assert image.pread(64 * MIB, 0) == expected


def test_a_file_that_must_not_grow_is_told_as_no_space(tmp_path: Path) -> None:
    params = make(tmp_path, size=64 * MIB)
    limit = 4 * MIB
    with nbdkit(params) as server, nbd_connect(server.uri) as handle:
        subprocess.run(["prlimit", f"--pid={server.process.pid}", f"--fsize={limit}"], check=True)
        with refused(errno.ENOSPC):
            for offset in range(8 * MIB, 64 * MIB, MIB):
                handle.pwrite(b"f" * MIB, offset)
        handle.pwrite(b"in place", 150 * KIB)
        handle.flush()
    assert Path(params["file"]).stat().st_size <= limit
    assert_clean(params)
    assert content(params)[150 * KIB :].startswith(b"in place")


def test_a_corrupt_entry_is_eio_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    ImageBuilder(8 * CLUSTER).data(0, b"a").entry(1, 1 << 63 | 0x50200).data(2, b"c").build(path)
    with nbdkit({"file": path}) as server, nbd_connect(server.uri) as handle:
        with refused(errno.EIO):
            handle.pwrite(b"x", CLUSTER)
        assert "L2 entry" in server.stderr_text()
        assert "Traceback" not in server.stderr_text()


@pytest.mark.parametrize("noticed", [False, True])
def test_a_server_that_cannot_store_all_says_so_and_fails(noticed: bool, tmp_path: Path) -> None:
    """Another program cuts the image file short while it is written; a client may have heard of that before."""
    params = make(tmp_path, "small clusters")
    failing = pytest.raises(ToolError, match="ended with 1")
    with failing as failed, nbdkit(params) as server, nbd_connect(server.uri) as handle:
        handle.pwrite(b"x" * MIB, 2 * MIB)
        os.truncate(params["file"], 4096)
        if noticed:
            for _ in range(2):
                with refused(errno.EIO):
                    handle.flush()
            with refused(errno.EIO):
                handle.pwrite(b"y", 2 * MIB)
    assert "what was written after the last flush may be lost" in failed.value.stderr
    assert "Traceback" not in failed.value.stderr


# -- clients --


def test_nbdcopy_and_qemu_fill_a_disk(tmp_path: Path) -> None:
    params = make(tmp_path)
    source = tmp_path / "source.raw"
    source.write_bytes(random.Random(5).randbytes(2 * MIB) + bytes(MIB) + b"end" * 100_000)
    expected = source.read_bytes() + content(params)[source.stat().st_size :]
    with nbdkit(params) as server:
        run("nbdcopy", "--flush", source, server.uri)
    assert_clean(params)
    assert content(params) == expected
    os.truncate(source, SIZE)
    with nbdkit(params) as server:
        qemu_img("convert", "-n", "-f", "raw", "-O", "raw", source, server.uri)
    assert_clean(params)
    assert content(params) == source.read_bytes()
    with nbdkit(params) as server:
        commands = ["write -P 7 1000 100k", "write -z -u 1M 1M", "write -f -P 8 3M 1k", "discard 2M 512k", "flush"]
        run("qemu-io", "-f", "raw", *(word for command in commands for word in ("-c", command)), server.uri)
        run("qemu-io", "-f", "raw", "-c", "read -P 7 1000 100k", "-c", "read -P 0 1M 1M", server.uri)
    assert_clean(params)
    assert content(params)[3 * MIB : 3 * MIB + 1024] == b"\x08" * 1024


def test_a_server_does_not_grow_with_its_writers(tmp_path: Path) -> None:
    params = make(tmp_path)

    def look() -> tuple[int, int]:
        process = Path(f"/proc/{server.process.pid}")
        return len(list((process / "fd").iterdir())), int((process / "statm").read_text().split()[1]) * 4

    with nbdkit(params) as server:
        for number in range(400):
            if number == 100:
                descriptors, resident_kib = look()
            with nbd_connect(server.uri) as handle:
                handle.pwrite(b"%d" % number, number * 8192 % SIZE)
                if number % 7 == 0:
                    handle.flush()
        late_descriptors, late_resident_kib = look()
        assert late_descriptors <= descriptors + 2
        assert late_resident_kib - resident_kib <= 4 << 10
    assert_clean(params)


# -- all at once --

SECTOR = 512
SHARED = 256 * KIB
CLIENTS = 8
REQUESTS = 150


@pytest.mark.parametrize("kind", ["plain", "small clusters", "extended L2", "backing", "data file"])
def test_concurrent_clients_see_one_disk(kind: str, tmp_path: Path) -> None:
    """Every sector behaves as if all requests to it had come one after the other."""
    params = make(tmp_path, kind)
    histories: list[list[tuple[str, int, list[int], int, int]]] = [[] for _ in range(CLIENTS)]
    with nbdkit(params) as server:
        with nbd_connect(server.uri) as handle:
            handle.zero(SHARED, 0)
        clients = [
            threading.Thread(target=client, args=(server.uri, number, histories[number])) for number in range(CLIENTS)
        ]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        with nbd_connect(server.uri) as handle:
            last = handle.pread(SHARED, 0)
    assert_clean(params)
    assert content(params)[:SHARED] == last
    assert all(len(history) == REQUESTS for history in histories)
    end = time.monotonic_ns()
    words = [*memoryview(last).cast("Q")]
    complete = [*(entry for history in histories for entry in history), ("read", 0, words, end, end + 1)]
    for sector in range(SHARED // SECTOR):
        for word in (64 * sector, 64 * sector + 63):
            assert violation(events_of(complete, word)) is None


def client(uri: str, number: int, history: list[tuple[str, int, list[int], int, int]]) -> None:
    """Random requests to the beginning of the disk; remembers (kind, first word, values, start, end) of each."""
    rng = random.Random(number)
    with nbd_connect(uri) as handle:
        for request in range(REQUESTS):
            sectors = rng.choice([1, 1, 2, 8, 16, rng.randrange(1, 200)])
            first = rng.randrange(SHARED // SECTOR - sectors + 1)
            length, offset = sectors * SECTOR, first * SECTOR
            kind = rng.choice(["write", "write", "write", "read", "read", "read", "zero", "discard"])
            values = [request * CLIENTS + number + 1] * (length // 8) if kind == "write" else [ZERO] * (length // 8)
            flags = rng.choice([0, 0, 0, 0, nbd.CMD_FLAG_FUA])
            start = time.monotonic_ns()
            if kind == "write":
                handle.pwrite(b"".join(value.to_bytes(8, "little") for value in values), offset, flags)
            elif kind == "zero":
                handle.zero(length, offset, flags | rng.choice([0, nbd.CMD_FLAG_NO_HOLE]))
            elif kind == "discard":
                handle.trim(length, offset, flags)
            else:
                values = [*memoryview(handle.pread(length, offset)).cast("Q")]
            history.append((kind, offset // 8, values, start, time.monotonic_ns()))
            if rng.random() < 0.03:
                handle.flush()


def events_of(entries: list[tuple[str, int, list[int], int, int]], word: int) -> Iterator[Event]:
    """What the clients did to one word."""
    for kind, first, values, start, end in entries:
        if first <= word < first + len(values):
            if kind == "zero":
                yield Event("write", ZERO, start, end)
            else:
                yield Event(kind, values[word - first], start, end)  # type: ignore[arg-type] # one of the kinds
