"""Runs a workload on an image in memory, writes down what reaches its files, and keeps the model of its disk.

While nothing goes wrong the disk must read as the model says, after every request; at the end nothing may be wrong with
the image. What may be left after a crash is judged by `oracles`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from qcow2_plugin.engine.writable import WritableImage
from tests.crash.history import History, as_sectors, text
from tests.crash.kinds import Kind
from tests.crash.opening import read_disk
from tests.crash.workloads import Request
from tests.support.image_checker import check_image
from tests.support.in_memory import open_in_memory
from tests.support.recording import Log, RecordingStorage, touched

MakeStorage = Callable[[Log, int, bytes], RecordingStorage]


class WrongError(AssertionError):
    """The engine did something wrong. The message is one line."""


def record(log: Log, number: int, content: bytes) -> RecordingStorage:
    """A storage that only writes down."""
    return RecordingStorage(log, number, content, "image" if number == 0 else "data")


@dataclass
class Scenario:
    """A workload under way on an image of some kind. `initial` are its files, and `view` its disk, at first."""

    kind: Kind
    initial: tuple[bytes, ...]
    view: bytes
    make_storage: MakeStorage = record
    log: Log = field(default_factory=Log)
    stored: list[tuple[int, int]] = field(default_factory=list)
    """Requests that closed the image, and when they had: then its bitmaps are true."""

    def __post_init__(self) -> None:
        self.history = History(self.view, self.kind.backing or b"")
        self.doubtful: set[int] = set()
        self.storages = [self.make_storage(self.log, number, each) for number, each in enumerate(self.initial)]
        self.image = self._open()
        self.is_open = True
        is_dirty = bool(self.initial[0][79] & 1)
        self.before = check_image(self.initial[0], guess_refcounts=is_dirty)

    @classmethod
    def of(cls, kind: Kind, make_storage: MakeStorage = record) -> Scenario:
        """On the image of a kind as it is made."""
        return cls(kind, kind.files, kind.view, make_storage)

    def _open(self) -> WritableImage:
        data = self.storages[1] if len(self.storages) > 1 else None
        return open_in_memory(self.storages[0], data, self.kind.backing)

    def run(self, requests: Sequence[Request]) -> None:
        """All requests, one after the other, each of which has to succeed. Raises WrongError."""
        for request in requests:
            self.do(request)
            problem = self.problem()
            if problem:
                raise WrongError(f"after {request}: {problem}")

    def do(self, request: Request) -> None:
        """One request; whatever the engine raises comes through, with the model still waiting for its end."""
        request = self.clipped(request)
        number = self.history.begin(str(request), self.log.now)
        self.announce(number, request)
        sectors = set(touched(request.offset, request.length))
        self.doubtful |= sectors
        self.ask(request, number)
        self.doubtful -= sectors
        self.ended(number, request)

    def clipped(self, request: Request) -> Request:
        """The request as the disk is large enough for."""
        if request.verb in ("flush", "resize", "reopen", "close"):
            return request
        size = len(self.history.view)
        offset = request.offset % size
        return request._replace(offset=offset, length=min(request.length, size - offset))

    def announce(self, number: int, request: Request) -> None:
        """Tell the model what the request may do."""
        history, (verb, offset, length) = self.history, request
        if verb in ("write", "write durably"):
            history.write(number, offset, text(f"op{number}", offset, length))
        elif verb in ("zero", "zero and unmap"):
            history.zero(number, offset, length)
        elif verb == "discard":
            history.discard(number, offset, length)
        elif verb == "resize":
            history.resize(number, offset)

    def ask(self, request: Request, number: int) -> None:
        """Have the engine do it."""
        image, (verb, offset, length) = self.image, request
        if verb in ("write", "write durably"):
            image.write_from(text(f"op{number}", offset, length), offset, durable=verb == "write durably")
        elif verb in ("zero", "zero and unmap"):
            image.write_zeroes(offset, length, may_unmap=verb == "zero and unmap")
        elif verb == "discard":
            image.discard(offset, length)
        elif verb == "resize":
            image.resize(offset, allow_shrink=True)
        elif verb == "flush":
            image.flush()
        else:
            self.is_open = False
            image.close()

    def ended(self, number: int, request: Request) -> None:
        """Tell the model that the request has succeeded."""
        if request.verb in ("flush", "reopen", "close"):
            self.history.flushed(number, self.log.now)
        else:
            self.history.end(number, self.log.now, durable=request.verb in ("write durably", "resize"))
        if request.verb in ("reopen", "close"):
            self.stored.append((number, self.log.now))
        if request.verb == "reopen":
            self.image = self._open()
            self.is_open = True

    def problem(self) -> str | None:
        """What is wrong with the disk as it reads now, while nothing is under way."""
        if not self.is_open:
            return None
        view = read_disk(self.image)
        told = self.history.settle(self.log.now, view)
        if told is None and self.is_raw:
            told = self._raw_problem(view)
        return told

    def _raw_problem(self, view: bytes) -> str | None:
        """What is wrong with a raw data file; where a request failed last, it may differ from the disk."""
        data = bytes(self.storages[1].content[: len(view)]).ljust(len(view), b"\0")
        wrong = set(np.flatnonzero((as_sectors(data) != as_sectors(view)).any(axis=1)).tolist()) - self.doubtful
        return f"sector {min(wrong)} of the raw data file differs from the disk" if wrong else None

    @property
    def is_raw(self) -> bool:
        """The data file is to be a raw image of the disk."""
        return len(self.storages) > 1 and bool(self.initial[0][95] & 2)

    @property
    def contents(self) -> tuple[bytes, ...]:
        """The files as they are now."""
        return tuple(bytes(storage.content) for storage in self.storages)
