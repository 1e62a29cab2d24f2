"""The contract of targets: those that keep it pass, and each way of breaking it is found and named."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from qcow2_plugin.adapters.backup.target import BackupTarget, check_name, exactly
from qcow2_plugin.adapters.backup.targets.directory import DirectoryTarget
from qcow2_plugin.testing import check_target

Kept = dict[str, bytes]


class MemoryTarget(BackupTarget):
    """Keeps the contract, as far as memory can."""

    def __init__(self, kept: Kept) -> None:
        self.uri = "memory:"
        self.kept = kept

    def put(self, name: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        self.kept.pop(check_name(name), None)
        self.kept[name] = b"".join(exactly(chunks, size))

    def publish(self, name: str, content: bytes) -> None:
        if self.kept.setdefault(check_name(name), content) is not content:
            raise FileExistsError(name)

    def names(self) -> list[str]:
        return sorted(self.kept)

    def get(self, name: str) -> Iterator[bytes]:
        if check_name(name) not in self.kept:
            raise FileNotFoundError(name)
        yield self.kept[name]

    def remove(self, name: str) -> None:
        self.kept.pop(check_name(name), None)


class Unordered(MemoryTarget):
    def names(self) -> list[str]:
        return sorted(self.kept, reverse=True)


class Forgetful(MemoryTarget):
    def names(self) -> list[str]:
        return sorted(self.kept)[:-1]


class Hoarding(MemoryTarget):
    def remove(self, name: str) -> None:
        check_name(name)


class Strict(MemoryTarget):
    def remove(self, name: str) -> None:
        del self.kept[check_name(name)]


class Careless(MemoryTarget):
    """Stores what comes, whatever was announced."""

    def put(self, name: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        self.kept.pop(check_name(name), None)
        self.kept[name] = b"".join(chunks)


class Partial(MemoryTarget):
    """Keeps what came before the failure."""

    def put(self, name: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        self.kept[check_name(name)] = b""
        for chunk in exactly(chunks, size):
            self.kept[name] += chunk


class Swallowing(MemoryTarget):
    def put(self, name: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        try:
            super().put(name, chunks, size)
        except RuntimeError:
            self.remove(name)


class Keeping(MemoryTarget):
    """What was there stays, if what comes is not whole."""

    def put(self, name: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        self.kept[check_name(name)] = b"".join(exactly(chunks, size))


class Overwriting(MemoryTarget):
    def publish(self, name: str, content: bytes) -> None:
        self.kept[check_name(name)] = content


class LastOne(MemoryTarget):
    """Says that the name is there, after it gave it to somebody else."""

    def publish(self, name: str, content: bytes) -> None:
        was_there = check_name(name) in self.kept
        self.kept[name] = content
        if was_there:
            raise FileExistsError(name)


class Empty(MemoryTarget):
    def get(self, name: str) -> Iterator[bytes]:
        yield self.kept.get(check_name(name), b"")


class Trusting(MemoryTarget):
    def publish(self, name: str, content: bytes) -> None:
        if self.kept.setdefault(name, content) is not content:
            raise FileExistsError(name)


class Elsewhere(MemoryTarget):
    def put_file(self, name: str, path: str) -> None:
        self.put(name, [b"file"], 4)


class Shouting(MemoryTarget):
    def __init__(self, kept: Kept) -> None:
        super().__init__(kept)
        self.uri = "memory:\x1b[31m"


def opened_by(kind: type[MemoryTarget]) -> Callable[[], BackupTarget]:
    kept: Kept = {"mine": b"mine"}
    return lambda: kind(kept)


def test_those_that_keep_it_pass(tmp_path: Path) -> None:
    kept: Kept = {"mine": b"mine"}
    check_target(lambda: MemoryTarget(kept))
    assert kept == {"mine": b"mine"}
    check_target(lambda: DirectoryTarget(tmp_path / "new"))
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (Unordered, "names are sorted"),
        (Forgetful, "names tells"),
        (Hoarding, "nothing has the name after remove"),
        (Careless, "put raises TargetError when fewer bytes come"),
        (Partial, "nothing has the name after the chunks of put raised"),
        (Swallowing, "put raises what its chunks raise"),
        (Keeping, "nothing has the name after the chunks of put raised"),
        (Overwriting, "at most one succeeds"),
        (LastOne, "what the first published stays as it is"),
        (Empty, "get raises FileNotFoundError"),
        (Trusting, "is no name"),
        (Elsewhere, "put_file keeps the file"),
        (Shouting, "uri is printable"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_every_breach_is_named(kind: type[MemoryTarget], rule: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(rule)):
        check_target(opened_by(kind))


def test_a_second_removal_is_no_error() -> None:
    with pytest.raises(KeyError):
        check_target(opened_by(Strict))
