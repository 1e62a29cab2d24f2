"""The lock bytes, between open file descriptions of one process: to OFD locks they are as good as two programs."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qcow2_plugin.errors import ImageLockedError
from qcow2_plugin.storage.locks import lock_for_reading, lock_for_writing
from tests.support.lockbytes import ALL, QEMU_FORCE_SHARE, QEMU_READER, QEMU_WRITER, holding, locked_bytes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "image.qcow2"
    found.write_bytes(b"short")  # locks reach beyond the end of the file
    return found


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    opened = os.open(path, os.O_RDONLY)
    yield opened
    with suppress(OSError):  # some tests close it themselves
        os.close(opened)


def test_a_reader_holds_the_bytes_that_qemu_holds(path: Path, fd: int) -> None:
    lock_for_reading(fd, str(path), force_share=False)
    assert locked_bytes(path) == set(QEMU_READER)


def test_force_share_holds_only_the_byte_that_says_somebody_reads(path: Path, fd: int) -> None:
    lock_for_reading(fd, str(path), force_share=True)
    assert locked_bytes(path) == set(QEMU_FORCE_SHARE)


@pytest.mark.parametrize("byte", ALL)
def test_which_bytes_of_others_exclude_a_reader(path: Path, fd: int, byte: int) -> None:
    with holding(path, [byte]):
        if byte not in (101, 103, 200):
            lock_for_reading(fd, str(path), force_share=False)
            return
        with pytest.raises(ImageLockedError) as caught:
            lock_for_reading(fd, str(path), force_share=False)
        assert locked_bytes(path) == {byte}  # nothing of ours is left
    meaning = {101: "holds the permission to write", 103: "holds the permission to resize"}
    assert meaning.get(byte, "forbids the permission to read") in str(caught.value)
    assert f"byte {byte}" in str(caught.value)
    assert "force-share" in str(caught.value)
    assert caught.value.file == str(path)


def test_force_share_passes_by_every_shared_lock(path: Path, fd: int) -> None:
    with holding(path, ALL):
        lock_for_reading(fd, str(path), force_share=True)


def test_readers_coexist(path: Path, fd: int) -> None:
    with holding(path, QEMU_READER), path.open("rb") as second:
        lock_for_reading(fd, str(path), force_share=False)
        lock_for_reading(second.fileno(), str(path), force_share=False)


def test_a_writer_excludes_a_reader_until_it_ends(path: Path, fd: int) -> None:
    with holding(path, QEMU_WRITER), pytest.raises(ImageLockedError):
        lock_for_reading(fd, str(path), force_share=False)
    lock_for_reading(fd, str(path), force_share=False)


@pytest.mark.parametrize("force_share", [False, True])
def test_an_exclusive_lock_excludes_every_reader(path: Path, fd: int, force_share: bool) -> None:
    with holding(path, [100], exclusive=True):
        with pytest.raises(ImageLockedError, match=r"for itself \(byte 100, read\)"):
            lock_for_reading(fd, str(path), force_share=force_share)
        assert locked_bytes(path) == {100}


def test_an_exclusive_lock_on_the_last_byte_leaves_nothing_of_ours(path: Path, fd: int) -> None:
    with holding(path, [203], exclusive=True):
        with pytest.raises(ImageLockedError, match="byte 203, resize"):
            lock_for_reading(fd, str(path), force_share=False)
        assert locked_bytes(path) == {203}


def test_locks_go_with_their_own_descriptor_and_no_other(path: Path, fd: int) -> None:
    lock_for_reading(fd, str(path), force_share=False)
    with path.open("rb"):
        pass  # would drop POSIX locks
    assert locked_bytes(path) == set(QEMU_READER)
    os.close(fd)
    assert locked_bytes(path) == set()


def test_a_writer_holds_what_qemu_holds(path: Path) -> None:
    with path.open("r+b") as writer:
        lock_for_writing(writer.fileno(), str(path))
        assert locked_bytes(path) == set(QEMU_WRITER)
    assert locked_bytes(path) == set()


@pytest.mark.parametrize("byte", ALL)
def test_which_bytes_of_others_exclude_a_writer(path: Path, byte: int) -> None:
    with path.open("r+b") as writer, holding(path, [byte]):
        if byte not in (101, 103, 200, 201, 203):
            lock_for_writing(writer.fileno(), str(path))
            return
        with pytest.raises(ImageLockedError) as caught:
            lock_for_writing(writer.fileno(), str(path))
        assert locked_bytes(path) == {byte}  # nothing of ours is left
    meanings = {
        101: "holds the permission to write",
        103: "holds the permission to resize",
        200: "forbids the permission to read",
        201: "forbids the permission to write",
        203: "forbids the permission to resize",
    }
    assert meanings[byte] in str(caught.value)
    assert f"byte {byte} is locked); stop it first" in str(caught.value)
    assert "force-share" not in str(caught.value)  # no way for a writer
    assert caught.value.file == str(path)


@pytest.mark.parametrize("other", [QEMU_READER, QEMU_WRITER])
def test_a_writer_is_excluded_by_readers_and_writers(path: Path, other: tuple[int, ...]) -> None:
    with path.open("r+b") as writer, holding(path, other):
        with pytest.raises(ImageLockedError):
            lock_for_writing(writer.fileno(), str(path))
        assert locked_bytes(path) == set(other)


def test_a_writer_goes_beside_a_force_share_reader_whoever_comes_first(path: Path, fd: int) -> None:
    with path.open("r+b") as writer:
        lock_for_reading(fd, str(path), force_share=True)
        lock_for_writing(writer.fileno(), str(path))
        with path.open("rb") as later:
            lock_for_reading(later.fileno(), str(path), force_share=True)


def test_an_exclusive_lock_excludes_a_writer(path: Path) -> None:
    with path.open("r+b") as writer, holding(path, [103], exclusive=True):
        with pytest.raises(ImageLockedError, match=r"for itself \(byte 103, resize\)"):
            lock_for_writing(writer.fileno(), str(path))
        assert locked_bytes(path) == {103}


@pytest.mark.parametrize("other", ["reader", "writer"])
def test_of_a_writer_and_another_that_start_together_never_both_go_on(path: Path, other: str) -> None:
    rounds = 300
    barrier = threading.Barrier(2)
    went_on: list[list[str]] = [[] for _ in range(rounds)]

    def work(name: str) -> None:
        for number in range(rounds):
            with path.open("r+b") as opened:
                barrier.wait()
                with suppress(ImageLockedError):
                    if name == "reader":
                        lock_for_reading(opened.fileno(), str(path), force_share=False)
                    else:
                        lock_for_writing(opened.fileno(), str(path))
                    went_on[number].append(name)
                barrier.wait()  # nobody lets go before both have tried

    threads = [threading.Thread(target=work, args=(name,)) for name in (other, "writer")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(map(len, went_on)) == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
class TestFileSystemWithoutLocks:
    @pytest.fixture(autouse=True)
    def no_locks(self, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> bytes:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "fcntl", refuse)

    def test_it_is_refused_with_the_way_out(self, path: Path, fd: int, number: int) -> None:
        with pytest.raises(ImageLockedError, match="force-share") as caught:
            lock_for_reading(fd, str(path), force_share=False)
        assert os.strerror(number) in str(caught.value)

    def test_a_writer_is_refused_without_a_way_out(self, path: Path, number: int) -> None:
        with path.open("r+b") as writer, pytest.raises(ImageLockedError, match="nobody else uses the file") as caught:
            lock_for_writing(writer.fileno(), str(path))
        assert os.strerror(number) in str(caught.value)
        assert "force-share" not in str(caught.value)

    def test_force_share_accepts_it(self, path: Path, fd: int) -> None:
        lock_for_reading(fd, str(path), force_share=True)


@pytest.mark.parametrize("force_share", [False, True])
def test_other_errors_pass_through(path: Path, force_share: bool) -> None:
    with path.open("wb") as write_only, pytest.raises(OSError) as caught:
        lock_for_reading(write_only.fileno(), str(path), force_share=force_share)
    assert caught.value.errno == errno.EBADF  # a read lock needs a descriptor that can read
