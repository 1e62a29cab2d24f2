"""Bad images behind nbdkit: EIO for what is bad, everything else goes on, one harmless line tells the operator.

Also what a client is shown: names that an image chose never reach a terminal as they are, and no name and no number of
them keeps the list of exports from being told.
"""

from __future__ import annotations

import ctypes
import errno
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbd
import pytest

from qcow2_plugin.adapters.nbd import Server as InProcess
from tests.support.builder import BuiltImage, ImageBuilder, patch, set_field
from tests.support.fields import COMPRESSED, COPIED
from tests.support.hostile import IMAGE, assert_harmless_text, quick
from tests.support.tools import Server, ToolError, convert_to_raw, nbd_connect, nbdkit, qemu_img, run

MIB = 1 << 20
CLUSTER = 1 << 16
HOLE = 3
ESCAPES = b"\x1b[2J\r\n\x07\x9b\xe2\x80\xae\x7f"
BAD_L2_ENTRIES = {
    "unaligned": 0x50200,
    "past the end of the file": 1 << 50,
    "compressed and COPIED": COPIED | COMPRESSED | 5 * CLUSTER,
    "compressed past the end of the file": COMPRESSED | 1 << 50,
}
STREAMS = {"no deflate": b"\xff" * 100, "half a deflate stream": b"\x00\xff\xff\x00\x00abc"}


def lines(server: Server) -> list[str]:
    """What the operator sees, line by line."""
    found = [line for line in server.stderr_text().splitlines() if line.strip()]
    for line in found:
        assert_harmless_text(line)
    return found


def states(handle: nbd.NBD, offset: int, length: int) -> list[tuple[int, int]]:
    """(length, flags) of the block status."""
    found: list[tuple[int, int]] = []

    def collect(context: str, start: int, entries: list[int], error: object) -> int:
        found.extend(zip(entries[::2], entries[1::2], strict=True))
        return 0

    handle.block_status(length, offset, collect)
    return found


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(nbd.Error) as caught:
        call()
    assert caught.value.errnum == errno.EIO


@contextmanager
def served(path: Path) -> Iterator[tuple[Server, nbd.NBD]]:
    with nbdkit({"file": path}, "-r") as server, nbd_connect(server.uri) as handle:
        yield server, handle


@pytest.mark.parametrize("word", BAD_L2_ENTRIES.values(), ids=BAD_L2_ENTRIES.keys())
def test_a_bad_l2_entry_is_an_io_error_for_its_cluster(word: int, tmp_path: Path) -> None:
    path = tmp_path / "image\x1b[2J\x07.qcow2"
    ImageBuilder(MIB).data(0, b"first").entry(2, word).data(3, b"third").build(path)
    with served(path) as (server, handle):
        assert states(handle, 0, 2 * CLUSTER) == [(CLUSTER, 0), (CLUSTER, HOLE)]
        assert not lines(server)  # nothing has failed so far
        refused(lambda: handle.pread(512, 2 * CLUSTER))
        assert len(lines(server)) == 1
        assert handle.pread(5, 0) == b"first"
        assert handle.pread(5, 3 * CLUSTER) == b"third"
        refused(lambda: handle.pread(4 * CLUSTER, 0))
        refused(lambda: states(handle, 2 * CLUSTER, CLUSTER))
        assert states(handle, 3 * CLUSTER, 2 * CLUSTER) == [(CLUSTER, 0), (CLUSTER, HOLE)]
        assert len(lines(server)) == 3
        assert all("L2 entry" in line for line in lines(server))


def test_the_map_before_a_bad_l2_entry_is_told_to_who_asks_for_more(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    ImageBuilder(MIB).data(0, b"first").entry(2, 0x50200).data(3, b"third").build(path)
    with served(path) as (_, handle):
        assert states(handle, 0, MIB)[0] == (CLUSTER, 0)
        assert states(handle, CLUSTER, MIB - CLUSTER) == [(CLUSTER, HOLE)]


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
def test_a_bad_stream_is_an_io_error_for_its_cluster(stream: bytes, tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    image = ImageBuilder(MIB).compressed(0, b"first").compressed(1, b"", stream=stream).compressed(2, b"third")
    image.build(path)
    with served(path) as (server, handle):
        assert states(handle, 0, MIB) == [(3 * CLUSTER, 0), (13 * CLUSTER, HOLE)]
        refused(lambda: handle.pread(512, CLUSTER))
        refused(lambda: handle.pread(3 * CLUSTER, 0))
        assert handle.pread(5, 0) == b"first"
        assert handle.pread(5, 2 * CLUSTER) == b"third"
        assert len(lines(server)) == 2


def test_a_bad_l1_entry_is_an_io_error_for_what_is_below(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    coverage = CLUSTER // 8 * CLUSTER
    built = ImageBuilder(coverage + MIB).data(0, b"first").data(coverage // CLUSTER, b"second").build(path)
    patch(path, built.l1_offset, struct.pack(">Q", COPIED))
    with served(path) as (server, handle):
        refused(lambda: handle.pread(512, 0))
        refused(lambda: states(handle, coverage - CLUSTER, CLUSTER))
        assert handle.pread(6, coverage) == b"second"
        assert states(handle, coverage, MIB) == [(CLUSTER, 0), (15 * CLUSTER, HOLE)]
        assert len(lines(server)) == 2


def test_a_client_that_goes_on_asking_gets_answers(tmp_path: Path) -> None:
    """Many errors on several connections at once: no crash, no hang, one line each."""
    path = tmp_path / IMAGE
    ImageBuilder(MIB).data(0, b"first").entry(2, 0x50200).build(path)
    with nbdkit({"file": path}, "-r") as server:
        for _ in range(3):
            with nbd_connect(server.uri) as handle:
                assert read_often(handle, 2 * CLUSTER) == [errno.EIO] * 50
                assert handle.pread(5, 0) == b"first"
        assert len(lines(server)) == 150


def read_often(handle: nbd.NBD, offset: int) -> list[int]:
    """How 50 reads that are under way at once end."""
    ends: list[int] = []

    def ended(error: ctypes.c_int) -> int:
        ends.append(error.value)
        return 1

    for _ in range(50):
        handle.aio_pread(nbd.Buffer(512), offset, ended)
    while len(ends) < 50:
        handle.poll(-1)
    return ends


def test_an_image_that_cannot_be_opened_ends_nbdkit_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    ImageBuilder(MIB, incompatible=1 << 40).feature_names([(0, 40, b"feature" + ESCAPES)]).build(path)
    with pytest.raises(ToolError) as caught, nbdkit({"file": path}, "-r"):
        pass
    said = [line for line in caught.value.stderr.splitlines() if line.strip()]
    for line in said:
        assert_harmless_text(line)
    assert len(said) == 1
    assert "feature\\x1b[2J" in said[0]


# Names. The tools run nbdkit in the C locale, as a service manager does.


def test_a_path_may_be_any_text(tmp_path: Path) -> None:
    path = tmp_path / "\u00e4\u202e.qcow2"
    ImageBuilder(MIB).data(0, b"now").build(path)
    with served(path) as (server, handle):
        assert handle.pread(3, 0) == b"now"
        assert not lines(server)


@pytest.mark.parametrize("kind", ["snapshot", "bitmap"])
def test_a_name_in_utf_8_is_listed_and_can_be_asked_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    image = ImageBuilder(MIB).data(0, b"now")
    image.snapshot("\u00e4".encode(), b"").bitmap("\u00e4".encode(), [(0, 1)]).build(path)
    with nbdkit({"file": path}, "-r") as server:
        with nbd_connect(server.uri, f"{kind}=\u00e4") as handle:
            assert handle.pread(3, 0) == b"now"
        assert not lines(server)
        assert f'export="{kind}=\u00e4"' in run("nbdinfo", "--list", "--no-content", server.uri)


def named(path: Path) -> None:
    image = ImageBuilder(MIB).data(0, b"now")
    image.snapshot(b"1", b"name" + ESCAPES).snapshot(b"2" + ESCAPES, b"hidden").snapshot(b"3", b"three")
    image.bitmap(b"bitmap" + ESCAPES, [(0, 1)]).bitmap(b"sound", [(0, 1)]).build(path)


def test_names_of_an_image_do_not_reach_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    named(path)
    with nbdkit({"file": path}, "-r") as server:
        listed = run("nbdinfo", "--list", "--no-content", server.uri)
        for line in listed.splitlines():
            assert_harmless_text(line.replace("\t", ""))
        for export in ("snapshot=1", "snapshot=3", "bitmap=sound"):
            assert f'export="{export}"' in listed
        assert "hidden" not in listed
        assert "name\\x1b[2J" in listed


def test_names_that_cannot_be_listed_can_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    image = ImageBuilder(MIB).data(0, b"now")
    image.snapshot(b"2\x1b[2J", b"hidden", image.map().data(0, b"before")).build(path)
    with nbdkit({"file": path}, "-r") as server, nbd_connect(server.uri, "snapshot=2\x1b[2J") as handle:
        assert handle.pread(6, 0) == b"before"
        assert not lines(server)
        with pytest.raises(nbd.Error), nbd_connect(server.uri, "snapshot=\x1b[31mnone"):
            pass
        assert_harmless_text(lines(server)[0])


@pytest.mark.parametrize(
    "image",
    [
        ImageBuilder(MIB).snapshot(b"1", "\u202e".encode() * 1100),
        ImageBuilder(MIB).snapshot(b"1", b"\xff" * 65535),
        ImageBuilder(MIB).snapshot(b"1" * 65535, b"n" * 65535),
        ImageBuilder(MIB).snapshot("\u00e4".encode() * 1100, b"n"),
        ImageBuilder(MIB).bitmap("\u00e4".encode() * 511, [(0, 1)]),
        ImageBuilder(MIB).bitmap(b"x" * 1023, [(0, 1)]),
    ],
    ids=["long when escaped", "as long as can be", "ID and name", "long in bytes", "bitmap in UTF-8", "bitmap"],
)
def test_long_names_do_not_keep_the_list_from_being_told(image: ImageBuilder, tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    image.snapshot(b"9", b"short").data(0, b"now").build(path)
    with nbdkit({"file": path}, "-r") as server:
        assert 'export="snapshot=9"' in run("nbdinfo", "--list", "--no-content", server.uri)
        assert not lines(server)


def many_snapshots(path: Path, count: int) -> BuiltImage:
    """Entries with IDs and nothing else, at the end of the file, which all share one L1 table."""
    built = ImageBuilder(MIB).data(0, b"now").snapshot(b"0", b"").build(path)
    end = -(-path.stat().st_size // CLUSTER) * CLUSTER
    table = b"".join(
        struct.pack(">QIHHIIQII8s", built.snapshots[0].l1_offset, 1, 8, 0, 0, 0, 0, 0, 0, b"%08d" % number)
        for number in range(count)
    )
    with open(path, "r+b") as file:
        file.seek(end)
        file.write(table)
    set_field(path, "nb_snapshots", count)
    set_field(path, "snapshots_offset", end)
    return built


@pytest.mark.timeout(30)
def test_the_list_of_many_snapshots_is_told_in_time(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    many_snapshots(path, 1000)
    server = InProcess(lambda number: None, int)
    server.configure("file", str(path))
    server.open()
    try:
        with quick(0.3):
            assert len(server.exports()) == 1001
    finally:
        server.close()


@pytest.mark.timeout(60)
def test_more_snapshots_than_nbdkit_can_list_do_not_keep_the_disk_from_being_listed(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    many_snapshots(path, 11_000)
    with nbdkit({"file": path}, "-r") as server, nbd_connect(server.uri) as handle:
        assert handle.pread(3, 0) == b"now"
        try:
            listed = run("nbdinfo", "--list", "--no-content", server.uri, timeout=5)
        except subprocess.TimeoutExpired:
            pytest.fail("the list takes too long")
        assert 'export=""' in listed


# A disk that looks like an image.


def test_a_disk_that_holds_an_image_is_served_as_raw_bytes(tmp_path: Path) -> None:
    """What a guest writes to its disk must not decide how that disk is read the next time."""
    inner = tmp_path / "inner"
    ImageBuilder(MIB).data(0, b"inner").backing(b"/etc/passwd", b"raw").build(inner)
    content = inner.read_bytes()
    image = ImageBuilder(len(content))
    for start in range(0, len(content), CLUSTER):
        image.data(start // CLUSTER, content[start : start + CLUSTER])
    image.build(tmp_path / IMAGE)
    with nbdkit({"file": tmp_path / IMAGE}, "-r") as server:
        target = tmp_path / "copied"
        qemu_img("convert", "-f", "raw", "-O", "raw", server.uri, target)
        assert target.read_bytes() == content == convert_to_raw(tmp_path / IMAGE)
        with nbd_connect(server.uri) as handle:
            assert handle.get_size() == len(content)
            assert handle.pread(4, 0) == b"QFI\xfb"
