"""What every storage keeps, tried on each; and what only a local file can show.

The model is a `bytes` object and Python's slicing.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qcow2_plugin.extent import clear
from qcow2_plugin.storage import Storage, file
from qcow2_plugin.storage.file import FileStorage
from tests.support.memory import MemoryStorage

CONTENT = bytes(range(1, 252)) * 800 + b"end"  # of no round length, without zeros
END = len(CONTENT)

Make = Callable[[bytes], Storage]


@pytest.fixture(params=["file", "memory"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Storages with a given content, closed at the end of the test."""
    made: list[Storage] = []

    def make_storage(content: bytes) -> Storage:
        if request.param == "memory":
            made.append(MemoryStorage(content))
        else:
            path = tmp_path / str(len(made))
            path.write_bytes(content)
            made.append(FileStorage(os.open(path, os.O_RDONLY), str(path)))
        return made[-1]

    yield make_storage
    for storage in made:
        storage.close()


def read(storage: Storage, length: int, host_offset: int) -> bytes:
    """What `read_into` leaves in a buffer that held something else, in the middle of a larger one."""
    whole = bytearray(b"\xaa" * (length + 2))
    storage.read_into(memoryview(whole)[1:-1], host_offset)
    assert (whole[0], whole[-1]) == (0xAA, 0xAA)
    return bytes(whole[1:-1])


def expected(length: int, host_offset: int) -> bytes:
    return CONTENT[host_offset : host_offset + length].ljust(length, b"\0")


RANGES = [
    (0, 0),
    (1, 0),
    (512, 0),
    (4096, 4096),
    (7, 65533),
    (END, 0),
    (END + 1, 0),
    (1, END - 1),
    (2, END - 1),
    (70000, END - 5),
    (1, END),
    (300000, END),
    (4096, END + 123456),
    (16, 1 << 56),
    (0, END + 1),
]


@pytest.mark.parametrize(("length", "host_offset"), RANGES)
def test_read_into_fills_the_buffer_with_zeros_past_the_end(make: Make, length: int, host_offset: int) -> None:
    assert read(make(CONTENT), length, host_offset) == expected(length, host_offset)


@pytest.mark.parametrize(("length", "host_offset"), RANGES)
def test_pread_stops_at_the_end(make: Make, length: int, host_offset: int) -> None:
    assert make(CONTENT).pread(length, host_offset) == CONTENT[host_offset : host_offset + length]


def test_an_empty_storage_is_all_zeros(make: Make) -> None:
    storage = make(b"")
    assert storage.size() == 0
    assert storage.pread(10, 0) == b""
    assert read(storage, 10, 0) == bytes(10)
    assert list(storage.data_ranges(0, 10)) == [(0, 10, False)]


def test_sizes(make: Make) -> None:
    storage = make(CONTENT)
    assert storage.size() == END
    assert storage.allocated_size() >= END


@pytest.mark.parametrize(("length", "offset"), RANGES)
def test_data_ranges_tile_the_range_and_what_is_no_data_is_zero(make: Make, length: int, offset: int) -> None:
    storage = make(CONTENT)
    reached = offset
    for start, run, is_data in storage.data_ranges(offset, length):
        assert start == reached
        assert run > 0
        assert is_data or read(storage, min(run, 1 << 20), start) == bytes(min(run, 1 << 20))
        reached += run
    assert reached == offset + length


def test_data_ends_where_the_storage_ends(make: Make) -> None:
    assert list(make(CONTENT).data_ranges(10, END + 90)) == [(10, END - 10, True), (END, 100, False)]


@pytest.mark.parametrize(("offset", "length"), [(0, END), (0, 0), (END, 10), (1 << 70, 1), (-5, 3), (5, -3)])
def test_prefetch_never_fails_and_changes_nothing(make: Make, offset: int, length: int) -> None:
    storage = make(CONTENT)
    storage.prefetch(offset, length)
    assert storage.pread(END, 0) == CONTENT
    storage.close()
    storage.prefetch(offset, length)


def test_identity_tells_storages_apart(make: Make) -> None:
    one, other = make(CONTENT), make(CONTENT)
    assert one.identity == one.identity
    assert one.identity != other.identity


def test_it_has_a_name_for_messages(make: Make) -> None:
    assert make(b"").path


def test_after_close_every_call_says_ebadf_and_close_does_nothing(make: Make) -> None:
    storage = make(CONTENT)
    storage.close()
    calls: list[Callable[[], object]] = [
        lambda: read(storage, 1, 0),
        lambda: storage.pread(1, 0),
        storage.size,
        storage.allocated_size,
        lambda: list(storage.data_ranges(0, 1)),
    ]
    for call in calls:
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EBADF
    storage.close()


def test_threads_do_not_disturb_each_other(make: Make) -> None:
    storage = make(CONTENT)
    wrong: list[tuple[int, int]] = []

    def work(number: int) -> None:
        for step in range(200):
            length, host_offset = 100 + number, (step * 997 + number * 31) % END
            list(storage.data_ranges(host_offset, length))  # moves the file position, if there is one
            if read(storage, length, host_offset) != expected(length, host_offset) or storage.size() != END:
                wrong.append((number, step))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# What only a file can show.


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "file"
    found.write_bytes(CONTENT)
    return found


@pytest.fixture
def storage(path: Path) -> Iterator[FileStorage]:
    opened = FileStorage(os.open(path, os.O_RDONLY), str(path))
    yield opened
    opened.close()


def test_size_follows_the_file(storage: FileStorage, path: Path) -> None:
    os.truncate(path, 100)
    assert storage.size() == 100
    assert read(storage, 200, 0) == CONTENT[:100] + bytes(100)
    os.truncate(path, 5000)
    assert storage.size() == 5000


def test_allocated_size_does_not_count_holes(storage: FileStorage, path: Path) -> None:
    before = storage.allocated_size()
    os.truncate(path, 1 << 40)
    assert storage.size() == 1 << 40
    assert storage.allocated_size() <= before + 4096


def test_identity_is_the_inode_not_the_name(storage: FileStorage, path: Path) -> None:
    hard_link = path.with_name("other name")
    os.link(path, hard_link)
    other = FileStorage(os.open(hard_link, os.O_RDONLY), str(hard_link))
    status = path.stat()
    assert other.identity == storage.identity == (status.st_dev, status.st_ino)
    other.close()


def test_close_gives_back_the_descriptor_once(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    storage = FileStorage(fd, str(path))
    storage.close()
    with pytest.raises(OSError):
        os.fstat(fd)
    reused = os.open(path, os.O_RDONLY)
    assert reused == fd  # the system hands out the lowest free number: a second close would hit this one
    storage.close()
    os.fstat(reused)
    os.close(reused)


def test_holes_are_told_from_data(storage: FileStorage, path: Path) -> None:
    mib = 1 << 20
    with path.open("wb") as sparse:
        sparse.truncate(8 * mib)
        for place in (1, 4):
            sparse.seek(place * mib)
            sparse.write(b"x" * mib)
        sparse.flush()
        os.fsync(sparse.fileno())
    assert list(storage.data_ranges(0, 9 * mib)) == [
        (0, mib, False),
        (mib, mib, True),
        (2 * mib, 2 * mib, False),
        (4 * mib, mib, True),
        (5 * mib, 4 * mib, False),
    ]
    assert list(storage.data_ranges(mib + 5, 10)) == [(mib + 5, 10, True)]
    assert list(storage.data_ranges(2 * mib - 5, 10)) == [(2 * mib - 5, 5, True), (2 * mib, 5, False)]
    assert list(storage.data_ranges(6 * mib, 10)) == [(6 * mib, 10, False)]


def test_a_file_cut_short_while_its_holes_are_listed_ends_in_a_hole(storage: FileStorage, path: Path) -> None:
    mib = 1 << 20
    with path.open("wb") as sparse:
        sparse.seek(mib)
        sparse.write(b"x" * mib)
    ranges = storage.data_ranges(0, 2 * mib)
    assert next(ranges) == (0, mib, False)
    os.truncate(path, 10)
    assert list(ranges) == [(mib, mib, False)]


def test_prefetching_nothing_asks_for_nothing(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []  # to the system a length of 0 is all the rest of the file
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, length, advice: asked.append((offset, length)))
    storage.prefetch(0, 0)
    storage.prefetch(5, 10)
    assert asked == [(5, 10)]


real_lseek = os.lseek


def refusing_lseek(fd: int, offset: int, whence: int) -> int:
    """lseek(2) of a file system that knows no holes."""
    if whence in (os.SEEK_DATA, os.SEEK_HOLE):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return real_lseek(fd, offset, whence)


@pytest.mark.parametrize(
    ("offset", "length", "ranges"),
    [
        (0, END, [(0, END, True)]),
        (5, END, [(5, END - 5, True), (END, 5, False)]),
        (END, 5, [(END, 5, False)]),
        (END + 7, 5, [(END + 7, 5, False)]),
    ],
)
def test_without_hole_support_everything_up_to_the_end_is_data(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch, offset: int, length: int, ranges: list[tuple[int, int, bool]]
) -> None:
    monkeypatch.setattr(os, "lseek", refusing_lseek)
    assert list(storage.data_ranges(offset, length)) == ranges


def test_short_reads_are_continued(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def short_preadv(fd: int, buffers: tuple[memoryview], offset: int) -> int:
        calls.append(offset)
        return os.preadv(fd, (buffers[0][:1000],), offset)

    monkeypatch.setattr(file, "preadv", short_preadv)
    assert read(storage, 4500, 50) == CONTENT[50:4550]
    assert calls == [50, 1050, 2050, 3050, 4050]
    assert read(storage, 4500, END - 1500) == CONTENT[-1500:] + bytes(3000)


def test_short_preads_are_continued(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    real_pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: real_pread(fd, min(length, 1000), offset))
    assert storage.pread(4500, 50) == CONTENT[50:4550]
    assert storage.pread(4500, END - 1500) == CONTENT[-1500:]


def test_a_buffer_need_not_be_a_memoryview_but_must_be_of_bytes(storage: FileStorage) -> None:
    for host_offset in (0, END - 5):
        buffer = bytearray(b"\xaa" * 16)
        storage.read_into(buffer, host_offset)  # type: ignore[arg-type] # what C code may hand over
        assert buffer == expected(16, host_offset)
        with pytest.raises(TypeError, match="not of format 'Q'"):
            storage.read_into(memoryview(bytearray(16)).cast("Q"), host_offset)


def test_errors_of_the_system_pass_through(tmp_path: Path) -> None:
    directory = FileStorage(os.open(tmp_path, os.O_RDONLY), str(tmp_path))
    with pytest.raises(IsADirectoryError):
        read(directory, 1, 0)
    directory.close()


@example(length=0, start=0)
@example(length=65536, start=0)
@example(length=3 * 65536 + 1, start=1)
@given(length=st.integers(0, 300_000), start=st.integers(0, 100))
def test_clear_touches_its_view_and_nothing_else(length: int, start: int) -> None:
    whole = bytearray(b"\xaa" * (start + length + 100))
    clear(memoryview(whole)[start : start + length])
    assert whole == b"\xaa" * start + bytes(length) + b"\xaa" * 100
