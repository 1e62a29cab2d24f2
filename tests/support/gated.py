"""A storage in memory that stops a call when a test wants it to, and work that runs beside the test meanwhile.

It owns the moment: a call is held before it does anything, or after it has done everything, until its gate is opened.
What may happen while it is held, and what must not, is the test's business.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

from qcow2_plugin.storage import Buffer
from tests.support.memory_storage import MemoryStorage

PATIENCE = 20  # seconds until something that has to happen must have happened
SOON = 0.1  # seconds in which something that may happen at once would have happened

Call = Literal["read_into", "write_from", "write_zeroes", "punch", "truncate", "barrier"]
Fits = Callable[[int, bytes], bool]
"""Asked with the host offset and the bytes to write, 0 and none where the call has no such thing."""
Result = TypeVar("Result")


class Gate:
    """Where one call is held."""

    def __init__(self) -> None:
        self._reached, self._opened = threading.Event(), threading.Event()

    def wait(self) -> None:
        """Until a call is held here."""
        assert self.holds_after(PATIENCE), "no call has come to the gate"

    def holds_after(self, seconds: float) -> bool:
        """True if a call has come by then."""
        return self._reached.wait(seconds)

    def open(self) -> None:
        """Let it go on; if none has come yet, none is held."""
        self._opened.set()

    def hold(self) -> None:
        """What the storage does with the call."""
        self._reached.set()
        assert self._opened.wait(PATIENCE), "nobody has opened the gate"


class GatedStorage(MemoryStorage):
    """Counts barriers, too: those that have returned."""

    def __init__(self, content: bytes | bytearray = b"", path: str = "memory") -> None:
        super().__init__(content, path)
        self.barriers = 0
        self._gates: list[tuple[Call, bool, Fits, Gate]] = []

    def hold(self, call: Call, fits: Fits = lambda host_offset, data: True, *, done: bool = False) -> Gate:
        """A gate for the next call of this name that `fits`, before it has done anything or, if `done`, after."""
        gate = Gate()
        self._gates.append((call, done, fits, gate))
        return gate

    def read_into(self, buffer: memoryview, host_offset: int) -> None:
        """Fill all of `buffer` from `host_offset`."""
        self._pass("read_into", host_offset)
        super().read_into(buffer, host_offset)
        self._pass("read_into", host_offset, done=True)

    def write_from(self, buffer: Buffer, host_offset: int) -> None:
        """Write all of `buffer` at `host_offset`."""
        self._pass("write_from", host_offset, buffer)
        super().write_from(buffer, host_offset)
        self._pass("write_from", host_offset, buffer, done=True)

    def write_zeroes(self, host_offset: int, length: int, *, may_punch: bool) -> None:
        """Zeros up to the end at most."""
        self._pass("write_zeroes", host_offset)
        size = min(length, self.size() - host_offset)
        if size > 0:
            super().write_from(bytes(size), host_offset)
        self._pass("write_zeroes", host_offset, done=True)

    def punch(self, host_offset: int, length: int) -> None:
        """What is given back reads as zeros."""
        self._pass("punch", host_offset)
        size = min(length, self.size() - host_offset)
        if size > 0:
            super().write_from(bytes(size), host_offset)
        self._pass("punch", host_offset, done=True)

    def truncate(self, size: int) -> None:
        """Move the end to `size`."""
        self._pass("truncate", size)
        super().truncate(size)
        self._pass("truncate", size, done=True)

    def barrier(self) -> None:
        """Ends nothing here, but is counted."""
        self._pass("barrier")
        super().barrier()
        self.barriers += 1
        self._pass("barrier", done=True)

    def _pass(self, call: Call, host_offset: int = 0, data: Buffer = b"", *, done: bool = False) -> None:
        for each in list(self._gates):
            if each[:2] == (call, done) and each[2](host_offset, bytes(data)):
                self._gates.remove(each)
                each[3].hold()
                return


class Running(Generic[Result]):
    """`work` in a thread of its own, which does not keep the program alive."""

    def __init__(self, work: Callable[..., Result], *arguments: Any, **options: Any) -> None:
        self._outcome: list[Result | BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(work, arguments, options), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[..., Result], arguments: Any, options: Any) -> None:
        try:
            self._outcome.append(work(*arguments, **options))
        except BaseException as error:
            self._outcome.append(error)

    def result(self) -> Result:
        """What the work returned, when it has ended; what it raised is raised here."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the work does not end"
        (outcome,) = self._outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    @property
    def waits(self) -> bool:
        """True if the work has not ended soon."""
        self._thread.join(SOON)
        return self._thread.is_alive()
