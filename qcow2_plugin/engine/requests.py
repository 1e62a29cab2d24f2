"""Who is moving data right now: requests in flight, the guest clusters that some of them have to themselves, and
whether the disk is to change its size.

Data moves with no lock held, so what a request resolved may change under it. Three promises keep that harmless.

**In flight.** A request notes the current *epoch* under its thread's number before it looks at any table, and takes the
note away when its last byte has moved. Whoever takes a mapping away does so first and ends the epoch afterwards: then a
request with a later note has seen the change, and once `oldest` has passed that epoch nobody uses the old mapping any
more. Only then may its clusters be reused. The note is one dictionary entry, so the fast path needs no lock: it must
write the note *before* its look-up, and `end_epoch` must come *after* the change; under Python's lock no other order
can be seen. `drain` waits until all that are in flight have ended.

**Claims.** A request that changes where guest clusters live claims them from planning to commit: other changes of the
same clusters wait.

**Changes of the disk.** Whatever is more than a write through the lane is a change, from `begin_change` to
`end_change`. Whoever is `alone` waits until no change is going on, and none begins until it is done.

Nobody waits in a circle: who waits for a change to be possible, or for a claim, is not in flight meanwhile (it has
resolved nothing yet); who waits for a claim has none; who drains is alone, so that what it waits for waits for nothing.

**Lock.** The image's, which is `_changed`'s, for every method but `ended`, `changing` and `alone`, which take it.
"""

from __future__ import annotations

import threading
from _thread import get_ident
from collections.abc import Iterator
from contextlib import contextmanager

_NEVER = 1 << 62


class Requests:
    """The requests to one image; `lock` is the image's."""

    def __init__(self, lock: threading.Lock) -> None:
        self.in_flight: dict[int, int] = {}
        """Epochs by thread, written and deleted by the requests themselves, without a lock."""
        self.epoch = 0
        self.waiting = 0
        """How many wait for others; who ends a request looks here and calls `ended`."""
        self._lock = lock
        self._changed = threading.Condition(lock)
        self._claims: list[tuple[int, int]] = []
        self._changes = 0
        self._is_alone = False

    @property
    def oldest(self) -> int:
        """The earliest epoch in which a request that is in flight began."""
        return min(list(self.in_flight.values()), default=_NEVER)

    def end_epoch(self) -> int:
        """Begin a new epoch; the number of the one that ended."""
        self.epoch += 1
        return self.epoch - 1

    def claim(self, first: int, end: int) -> None:
        """Have guest clusters to oneself; `wait_until_free` came before, under the same lock."""
        self._claims.append((first, end))

    def release(self, first: int, end: int) -> None:
        """Give up a claim."""
        self._claims.remove((first, end))
        if self.waiting:
            self._changed.notify_all()

    def wait_until_free(self, first: int, end: int) -> bool:
        """Wait until nobody claims any of these guest clusters. True if that took a wait, and the world has changed.

        The request of the current thread, if it is in flight, begins anew after a wait.
        """
        has_waited = False
        while any([claimed < end and first < claimed_end for claimed, claimed_end in self._claims]):
            has_waited = True
            self._pause()
        return has_waited

    def begin_change(self) -> None:
        """Wait until changes may begin, and begin one; `end_change` has to follow. A request in flight begins anew."""
        while self._is_alone:
            self._pause()
        self._changes += 1

    def end_change(self) -> None:
        """The end of a change."""
        self._changes -= 1
        if self.waiting:
            self._changed.notify_all()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """A change. The current thread must not be in flight."""
        with self._lock:
            self.begin_change()
        try:
            yield
        finally:
            with self._lock:
                self.end_change()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other change goes on. The current thread must neither be in flight nor in a change."""
        with self._lock, self._waiting():
            while self._is_alone:
                self._changed.wait()
            self._is_alone = True
        try:
            with self._lock, self._waiting():
                while self._changes:
                    self._changed.wait()
            yield
        finally:
            with self._lock:
                self._is_alone = False
                self._changed.notify_all()

    @contextmanager
    def moving(self) -> Iterator[None]:
        """The current thread is in flight, as part of a longer change."""
        self.enter()
        try:
            yield
        finally:
            del self.in_flight[get_ident()]
            if self.waiting:
                self.ended()

    def leave(self) -> bool:
        """Take the note of the current thread away, if it has one; True if it had."""
        was_in_flight = self.in_flight.pop(get_ident(), None) is not None
        if was_in_flight and self.waiting:
            self._changed.notify_all()
        return was_in_flight

    def enter(self) -> None:
        """The current thread is in flight."""
        self.in_flight[get_ident()] = self.epoch

    def _pause(self) -> None:
        was_in_flight = self.leave()
        with self._waiting():
            self._changed.wait()
        if was_in_flight:
            self.enter()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def drain(self) -> None:
        """Wait until every request that is in flight has ended; the current thread, which is `alone`, must not be."""
        last = self.end_epoch()
        with self._waiting():
            while self.oldest <= last:
                self._changed.wait()

    def ended(self) -> None:
        """Called, without the lock, by whoever ended a request while somebody is `waiting`."""
        with self._lock:
            self._changed.notify_all()
