"""What every storage keeps that can be changed, tried on each; and what only a local file can show.

The model is a `bytearray` and Python's slicing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2_plugin.storage import Buffer, WritableStorage, file, space
from qcow2_plugin.storage.file import FileStorage
from tests.support.full_disk import full_disk
from tests.support.memory_storage import MemoryStorage

CONTENT = random.Random(1).randbytes(200_003)
END = len(CONTENT)
MIB = 1 << 20

Make = Callable[[bytes], WritableStorage]


def open_file(path: Path, flags: int = os.O_RDWR) -> FileStorage:
    return FileStorage(os.open(path, flags), str(path))


@pytest.fixture(params=["file", "memory"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Storages with a given content, closed at the end of the test."""
    made: list[WritableStorage] = []

    def make_storage(content: bytes) -> WritableStorage:
        if request.param == "memory":
            made.append(MemoryStorage(content))
        else:
            path = tmp_path / str(len(made))
            path.write_bytes(content)
            made.append(open_file(path))
        return made[-1]

    yield make_storage
    for storage in made:
        storage.close()


def content_of(storage: WritableStorage) -> bytes:
    return storage.pread(storage.size() + 1, 0)


def written(content: bytes, data: bytes, host_offset: int) -> bytes:
    """The model: `content` with `data` at an offset, grown with zeros as needed."""
    if not data:
        return content
    whole = bytearray(content.ljust(host_offset, b"\0"))
    whole[host_offset : host_offset + len(data)] = data
    return bytes(whole)


def zeroed(content: bytes, host_offset: int, length: int) -> bytes:
    return written(content, bytes(max(min(length, len(content) - host_offset), 0)), host_offset)


PLACES = [0, 1, 4096, 65_533, END - 5, END, END + 1, END + 100_000]
LENGTHS = [0, 1, 5, 4096, 70_001, 1_500_000]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("host_offset", PLACES)
@pytest.mark.parametrize("length", LENGTHS)
def test_write_from_writes_all_and_grows(make: Make, length: int, host_offset: int, kind: type[Buffer]) -> None:
    storage, data = make(CONTENT), random.Random(2).randbytes(length)
    storage.write_from(kind(data), host_offset)
    assert content_of(storage) == written(CONTENT, data, host_offset)


def test_a_part_of_a_larger_buffer_is_written(make: Make) -> None:
    storage = make(CONTENT)
    storage.write_from(memoryview(bytearray(b"abcdef"))[1:4], 7)
    storage.write_vector([memoryview(b"uvwxyz")[2:], memoryview(bytearray(b"123"))[:1]], 100)
    assert content_of(storage) == written(written(CONTENT, b"bcd", 7), b"wxyz1", 100)


@pytest.mark.parametrize("host_offset", PLACES)
@pytest.mark.parametrize("count", [0, 1, 2, 1023, 1024, 1025, 5000])
def test_write_vector_writes_all_one_after_the_other(make: Make, count: int, host_offset: int) -> None:
    storage = make(CONTENT)
    pieces = [random.Random(number).randbytes(number % 97) for number in range(count)]
    storage.write_vector(pieces, host_offset)
    assert content_of(storage) == written(CONTENT, b"".join(pieces), host_offset)


def test_write_vector_takes_any_sequence_of_any_buffers(make: Make) -> None:
    storage = make(b"")
    storage.write_vector((b"ab", bytearray(b"cd"), memoryview(b"ef"), b""), 1)
    storage.write_vector([b"", b""], 100)
    assert content_of(storage) == b"\0abcdef"


@pytest.mark.parametrize("may_punch", [False, True])
@pytest.mark.parametrize("host_offset", PLACES)
@pytest.mark.parametrize("length", [*LENGTHS, 1 << 60])
def test_write_zeroes_stops_at_the_end(make: Make, length: int, host_offset: int, may_punch: bool) -> None:
    storage = make(CONTENT)
    storage.write_zeroes(host_offset, length, may_punch=may_punch)
    assert content_of(storage) == zeroed(CONTENT, host_offset, length)


@pytest.mark.parametrize("host_offset", PLACES)
@pytest.mark.parametrize("length", [*LENGTHS, 1 << 60])
def test_punch_touches_its_range_only(make: Make, length: int, host_offset: int) -> None:
    storage = make(CONTENT)
    storage.punch(host_offset, length)
    left = content_of(storage)
    if left[host_offset : host_offset + length].strip(b"\0"):
        assert left == CONTENT
    else:
        assert left == zeroed(CONTENT, host_offset, length)


@pytest.mark.parametrize("size", [0, 1, 4096, END - 1, END, END + 1, 5 * MIB])
def test_truncate_moves_the_end_and_what_was_cut_is_gone(make: Make, size: int) -> None:
    storage = make(CONTENT)
    storage.truncate(size)
    assert content_of(storage) == CONTENT[:size].ljust(size, b"\0")
    storage.truncate(6 * MIB)
    assert content_of(storage) == CONTENT[:size].ljust(6 * MIB, b"\0")


@pytest.mark.parametrize("host_offset", PLACES)
@pytest.mark.parametrize("length", LENGTHS)
def test_preallocate_grows_and_keeps_what_is_there(make: Make, length: int, host_offset: int) -> None:
    storage = make(CONTENT)
    storage.preallocate(host_offset, length)
    end = host_offset + length if length else 0
    assert content_of(storage) == CONTENT.ljust(end, b"\0")


def test_a_barrier_changes_nothing(make: Make) -> None:
    storage = make(CONTENT)
    storage.write_from(b"new", 5)
    storage.barrier()
    storage.barrier()
    assert content_of(storage) == written(CONTENT, b"new", 5)


CHANGES: list[Callable[[WritableStorage], object]] = [
    lambda storage: storage.write_from(b"x", 0),
    lambda storage: storage.write_vector([b"x", b"y"], 0),
    lambda storage: storage.write_zeroes(0, 1, may_punch=False),
    lambda storage: storage.write_zeroes(0, 1, may_punch=True),
    lambda storage: storage.punch(0, 4096),
    lambda storage: storage.truncate(5),
    lambda storage: storage.preallocate(0, 5),
    lambda storage: storage.barrier(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_after_close_every_change_says_ebadf(make: Make, change: Callable[[WritableStorage], object]) -> None:
    storage = make(CONTENT)
    storage.close()
    with pytest.raises(OSError) as caught:
        change(storage)
    assert caught.value.errno == errno.EBADF


def test_threads_write_beside_each_other_while_it_grows(make: Make) -> None:
    storage = make(b"")
    count, length = 6, 1000

    def work(number: int) -> None:
        for step in range(100):
            place = (step * count + number) * length
            if step % 2:
                storage.write_from(bytes([number + 1]) * length, place)
            else:
                storage.write_vector([bytes([number + 1]) * 400, bytes([number + 1]) * (length - 400)], place)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content_of(storage) == b"".join(bytes([number + 1]) * length for number in range(count)) * 100


Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "vector", "zero", "punch away", "truncate", "preallocate"]),
        st.integers(0, 20_000),
        st.integers(0, 20_000),
    ),
    max_size=12,
)


@pytest.mark.parametrize("kind", ["file", "memory"])
@given(steps=STEPS)
def test_any_sequence_of_changes_leaves_what_the_model_says(
    tmp_path_factory: pytest.TempPathFactory, kind: str, steps: Sequence[Step]
) -> None:
    if kind == "memory":
        storage: WritableStorage = MemoryStorage()
    else:
        storage = open_file(tmp_path_factory.getbasetemp() / "model", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    model = b""
    for number, (verb, place, length) in enumerate(steps):
        data = random.Random(number).randbytes(length)
        if verb == "write":
            storage.write_from(data, place)
            model = written(model, data, place)
        elif verb == "vector":
            storage.write_vector([data[: length // 3], b"", data[length // 3 :]], place)
            model = written(model, data, place)
        elif verb in ("zero", "punch away"):
            storage.write_zeroes(place, length, may_punch=verb == "punch away")
            model = zeroed(model, place, length)
        elif verb == "truncate":
            storage.truncate(place)
            model = model[:place].ljust(place, b"\0")
        else:
            storage.preallocate(place, length)
            model = model.ljust(place + length if length else 0, b"\0")
        assert content_of(storage) == model
    storage.close()


# What only a file can show.


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "file"
    found.write_bytes(CONTENT)
    return found


@pytest.fixture
def storage(path: Path) -> Iterator[FileStorage]:
    opened = open_file(path)
    yield opened
    opened.close()


class Pwritev:
    """pwritev(2) that writes `limit` bytes at most (after `whole` calls that write all), and remembers its calls."""

    def __init__(self, limit: int, whole: int = 0) -> None:
        self.limit, self.whole = limit, whole
        self.calls: list[tuple[int, int]] = []  # number of buffers, offset

    def __call__(self, fd: int, buffers: Sequence[Buffer], host_offset: int) -> int:
        self.calls.append((len(buffers), host_offset))
        if len(self.calls) <= self.whole:
            return os.pwritev(fd, buffers, host_offset)
        return os.pwrite(fd, b"".join(buffers)[: self.limit], host_offset)


def test_a_write_is_one_call(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    pwritev = Pwritev(MIB)
    monkeypatch.setattr(file, "pwritev", pwritev)
    storage.write_from(bytes(5000), 50)
    storage.write_vector([b"a"] * 1024, 100)
    storage.write_vector([b"a"] * 1025, 100)
    assert pwritev.calls == [(1, 50), (1024, 100), (1024, 100), (1, 1124)]


def test_short_writes_are_continued(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    pwritev = Pwritev(1000)
    monkeypatch.setattr(file, "pwritev", pwritev)
    data = random.Random(3).randbytes(4500)
    storage.write_from(data, 50)
    assert [place for _, place in pwritev.calls] == [50, 1050, 2050, 3050, 4050]
    assert content_of(storage) == written(CONTENT, data, 50)


@pytest.mark.parametrize("limit", [1, 7, 100, 999])
def test_short_writes_of_a_vector_are_continued(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(file, "pwritev", Pwritev(limit))
    pieces = [random.Random(number).randbytes(number % 5) for number in range(1300)]
    storage.write_vector(pieces, END - 10)
    assert content_of(storage) == written(CONTENT, b"".join(pieces), END - 10)


@pytest.mark.parametrize(
    "write", [lambda storage: storage.write_from(b"abc", 0), lambda storage: storage.write_vector([b"a", b"bc"], 0)]
)
@pytest.mark.parametrize("limit", [0, 1])
def test_a_system_that_writes_nothing_is_an_error_not_a_loop(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch, limit: int, write: Callable[[FileStorage], None]
) -> None:
    def stuck(fd: int, buffers: Sequence[Buffer], host_offset: int) -> int:
        return limit if host_offset == 0 else 0

    monkeypatch.setattr(file, "pwritev", stuck)
    with pytest.raises(OSError) as caught:
        write(storage)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, storage.path)


def test_a_buffer_must_be_of_bytes(storage: FileStorage) -> None:
    words = memoryview(bytearray(16)).cast("Q")
    with pytest.raises(TypeError, match="not of format 'Q'"):
        storage.write_from(words, 0)
    with pytest.raises(TypeError, match="not of format 'Q'"):
        storage.write_vector([b"a", words], 0)


@pytest.mark.parametrize(
    "punch",
    [lambda storage: storage.punch(MIB, MIB), lambda storage: storage.write_zeroes(MIB, MIB, may_punch=True)],
)
def test_punching_gives_back_space(storage: FileStorage, punch: Callable[[FileStorage], None]) -> None:
    storage.write_from(b"x" * 3 * MIB, 0)
    storage.barrier()
    before = storage.allocated_size()
    punch(storage)
    assert storage.allocated_size() <= before - MIB + 8192
    assert list(storage.data_ranges(0, 3 * MIB)) == [(0, MIB, True), (MIB, MIB, False), (2 * MIB, MIB, True)]


def test_zeros_that_may_not_punch_keep_space(storage: FileStorage) -> None:
    storage.write_from(b"x" * 3 * MIB, 0)
    storage.barrier()
    before = storage.allocated_size()
    storage.write_zeroes(MIB, MIB, may_punch=False)
    assert storage.allocated_size() >= before
    assert storage.pread(MIB, MIB) == bytes(MIB)


def test_preallocating_takes_space(storage: FileStorage) -> None:
    storage.preallocate(8 * MIB, 4 * MIB)
    assert 4 * MIB <= storage.allocated_size() < 8 * MIB
    storage.preallocate(0, 12 * MIB)
    assert storage.allocated_size() >= 12 * MIB
    assert storage.size() == 12 * MIB


class Fallocate:
    """fallocate(2) that fails with `number` so many times before it does what it should; remembers its modes."""

    def __init__(self, number: int, times: int = 1 << 30) -> None:
        self.number, self.times = number, times
        self.modes: list[int] = []
        self.real = space._fallocate

    def __call__(self, fd: int, mode: int, host_offset: int, length: int) -> int:
        self.modes.append(mode)
        if len(self.modes) <= self.times:
            ctypes.set_errno(self.number)
            return -1
        return int(self.real(fd, mode, host_offset, length))


PUNCH, ZERO = 0x02 | 0x01, 0x10 | 0x01  # FALLOC_FL_PUNCH_HOLE, _ZERO_RANGE, each with _KEEP_SIZE: linux/falloc.h
CANNOT = [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL]


@pytest.mark.parametrize("number", CANNOT)
@pytest.mark.parametrize("unknown", [0, 1, 2])
@pytest.mark.parametrize("modes", [[PUNCH, ZERO], [ZERO]])
def test_where_one_way_of_zeroing_is_not_known_the_next_is_taken(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch, modes: list[int], unknown: int, number: int
) -> None:
    storage.write_from(b"x" * 4 * MIB, END)
    before = content_of(storage)
    fallocate = Fallocate(number, unknown)
    monkeypatch.setattr(space, "_fallocate", fallocate)
    storage.write_zeroes(1001, 3 * MIB + 7, may_punch=PUNCH in modes)
    assert fallocate.modes == modes[: unknown + 1]
    assert content_of(storage) == zeroed(before, 1001, 3 * MIB + 7)


@pytest.mark.parametrize("number", CANNOT)
def test_punch_is_a_hint(storage: FileStorage, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    fallocate = Fallocate(number)
    monkeypatch.setattr(space, "_fallocate", fallocate)
    storage.punch(0, 8192)
    assert fallocate.modes == [PUNCH]
    assert content_of(storage) == CONTENT


def test_an_interrupted_call_is_repeated(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    fallocate = Fallocate(errno.EINTR, 3)
    monkeypatch.setattr(space, "_fallocate", fallocate)
    storage.write_zeroes(0, 8192, may_punch=True)
    assert fallocate.modes == [PUNCH] * 4
    assert content_of(storage) == zeroed(CONTENT, 0, 8192)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EPERM])
@pytest.mark.parametrize("change", CHANGES[2:5])
def test_errors_of_fallocate_pass_through(
    storage: FileStorage, monkeypatch: pytest.MonkeyPatch, number: int, change: Callable[[WritableStorage], object]
) -> None:
    monkeypatch.setattr(space, "_fallocate", Fallocate(number))
    with pytest.raises(OSError) as caught:
        change(storage)
    assert caught.value.errno == number


@pytest.mark.parametrize("change", CHANGES[:-1])
def test_a_file_open_for_reading_only_does_not_change(path: Path, change: Callable[[WritableStorage], object]) -> None:
    storage = open_file(path, os.O_RDONLY)
    with pytest.raises(OSError) as caught:
        change(storage)
    assert caught.value.errno in (errno.EBADF, errno.EINVAL)  # EINVAL: ftruncate(2)
    storage.close()
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    "change",
    [
        lambda storage: storage.write_from(b"y" * 4 * MIB, END),
        lambda storage: storage.write_vector([b"y" * 3000] * 3000, END),
        lambda storage: storage.preallocate(END, 4 * MIB),
    ],
)
def test_a_full_disk_says_so_and_keeps_what_was_there(
    tmp_path: Path, change: Callable[[WritableStorage], object]
) -> None:
    with full_disk(tmp_path, MIB) as disk:
        storage = open_file(disk.directory / "file", os.O_RDWR | os.O_CREAT)
        storage.write_from(CONTENT, 0)
        with pytest.raises(OSError) as caught:
            change(storage)
        assert caught.value.errno == disk.errno
        assert storage.pread(END, 0) == CONTENT
        storage.truncate(0)
        storage.write_from(CONTENT, 0)
        storage.barrier()
        assert content_of(storage) == CONTENT
        storage.close()


@pytest.mark.parametrize("write", CHANGES[:2])
def test_errors_of_the_system_pass_through(write: Callable[[WritableStorage], object]) -> None:
    full = FileStorage(os.open("/dev/full", os.O_RDWR), "/dev/full")
    with pytest.raises(OSError) as caught:
        write(full)
    assert caught.value.errno == errno.ENOSPC
    full.close()


def test_an_error_of_the_barrier_passes_through() -> None:
    reading_end, writing_end = os.pipe()
    pipe = FileStorage(writing_end, "pipe")
    with pytest.raises(OSError) as caught:
        pipe.barrier()
    assert caught.value.errno == errno.EINVAL  # fdatasync(2): not something that can be synced
    pipe.close()
    os.close(reading_end)


@pytest.mark.parametrize(("number", "is_told"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_reader_where_nothing_can_be_made_durable(
    number: int, is_told: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only file system (squashfs, ISO 9660) knows no fdatasync, and has nothing to be made durable."""

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    path.touch()
    monkeypatch.setattr(os, "fdatasync", fail)
    reader = FileStorage(os.open(path, os.O_RDONLY), str(path))
    writer = FileStorage(os.open(path, os.O_RDWR), str(path))
    with pytest.raises(OSError) if is_told else nullcontext():
        reader.barrier()
    with pytest.raises(OSError):
        writer.barrier()
    reader.close()
    writer.close()


def test_a_barrier_syncs_this_file(storage: FileStorage, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(os.fstat(fd).st_ino))
    storage.barrier()
    assert synced == [path.stat().st_ino]
