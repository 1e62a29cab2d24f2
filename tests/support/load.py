"""Clients that keep an NBD server busy and write down what they asked for, until they are stopped or the server ends.

Every client is a thread with a connection of its own, and all work on the same range: writes (some with FUA), zeros
(some that must not unmap, some that must be fast), trims, flushes, and reads that are judged at once. They own the
choice of requests, made by a seed. They refuse to judge what is left when the server has ended; that is the journal's.
"""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import nbd

from tests.support.journal import SECTOR, Journal, Kind

PATIENCE = 30  # seconds until a client must have noticed that its server has gone


class Load:
    """`connections` clients of the server at `uri`; the journal says how much of its disk is theirs.

    `unit` is the size in bytes that many requests are aligned to: the image's clusters. `failures` tells every error
    that was not expected and every read that the journal objects to.
    """

    def __init__(self, uri: str, journal: Journal, *, unit: int, seed: int, connections: int = 4) -> None:
        self.failures: list[str] = []
        self._journal = journal
        self._unit = max(unit // SECTOR, 1)
        self._stopping = threading.Event()
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(uri, random.Random(f"{seed}/{number}")), daemon=True)
            for number in range(connections)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        if any(thread.is_alive() for thread in self._threads):
            self.failures.append(f"a client has had no answer for {PATIENCE} s")

    def expect_the_end(self) -> None:
        """From now on the server may go: errors are no failures any more."""
        self._ending.set()

    def _run(self, uri: str, generator: random.Random) -> None:
        try:
            handle = nbd.NBD()
            handle.connect_uri(uri)
            while not self._stopping.is_set():
                self._choose(generator)(handle, generator)
            handle.shutdown()
        except nbd.Error as error:
            if not self._ending.is_set():
                self.failures.append(str(error))
        except Exception as error:
            self.failures.append(repr(error))

    def _choose(self, generator: random.Random) -> Callable[[nbd.NBD, random.Random], None]:
        requests = (self._write, self._read, self._zero, self._trim, self._flush)
        return generator.choices(requests, weights=(54, 20, 12, 10, 4))[0]

    def _write(self, handle: nbd.NBD, generator: random.Random) -> None:
        durable = generator.random() < 0.03
        request = self._journal.send(Kind.WRITE, *self._range(generator), durable=durable)
        flags = nbd.CMD_FLAG_FUA if durable else 0
        handle.pwrite(self._journal.content(request), request.first * SECTOR, flags)
        self._journal.answer(request)

    def _zero(self, handle: nbd.NBD, generator: random.Random) -> None:
        flags = generator.choice(
            (0, 0, 0, 0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_FAST_ZERO)
        )
        durable = flags == nbd.CMD_FLAG_FUA
        request = self._journal.send(Kind.ZERO, *self._range(generator), durable=durable)
        try:
            handle.zero(request.count * SECTOR, request.first * SECTOR, flags)
        except nbd.Error as error:
            if flags != nbd.CMD_FLAG_FAST_ZERO or error.errnum != errno.ENOTSUP:
                raise
            self._journal.refuse(request)
        else:
            self._journal.answer(request)

    def _trim(self, handle: nbd.NBD, generator: random.Random) -> None:
        request = self._journal.send(Kind.TRIM, *self._range(generator))
        handle.trim(request.count * SECTOR, request.first * SECTOR)
        self._journal.answer(request)

    def _flush(self, handle: nbd.NBD, generator: random.Random) -> None:
        sent = self._journal.send_flush()
        handle.flush()
        self._journal.answer_flush(sent)

    def _read(self, handle: nbd.NBD, generator: random.Random) -> None:
        first, count = self._range(generator)
        must_show = self._journal.answered(first, count)
        content = handle.pread(count * SECTOR, first * SECTOR)
        self.failures += self._journal.objections(first, content, must_show, torn=True)

    def _range(self, generator: random.Random) -> tuple[int, int]:
        """Where and how many: a few sectors, up to two clusters anywhere, or some whole clusters."""
        total, unit = self._journal.sector_count, self._unit
        first = generator.randrange(total)
        count = generator.randint(1, 8)
        match generator.randrange(3):
            case 1:
                count = generator.randint(1, 2 * unit)
            case 2:
                first -= first % unit
                count = generator.randint(1, 4) * unit
        return first, min(count, total - first)
