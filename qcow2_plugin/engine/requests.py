"""Who is moving data right now: requests in flight, and the guest clusters that some of them have to themselves.

Data moves with no lock held, so what a request resolved may change under it. Two promises keep that harmless.

**In flight.** A request notes the current *epoch* under its thread's number before it looks at any table, and takes the
note away when its last byte has moved. Whoever takes a mapping away does so first and ends the epoch afterwards: then a
request with a later note has seen the change, and once `oldest` has passed that epoch nobody uses the old mapping any
more. Only then may its clusters be reused. The note is one dictionary entry, so the fast path needs no lock: it must
write the note *before* its look-up, and `end_epoch` must come *after* the change; under Python's lock no other order
can be seen.

**Claims.** A request that changes where guest clusters live claims them from planning to commit: other changes of the
same clusters wait. Whoever waits has no claim of its own and is not in flight meanwhile (it has resolved nothing yet),
so nobody waits in a circle. `drain` waits for all requests in flight: for changes after which not even a late byte may
arrive, as in a raw data file, whose clusters stay where they are whoever owns them.

**Lock.** The image's, which is `changed`'s, for every method.
"""

from __future__ import annotations

import threading
from _thread import get_ident

_NEVER = 1 << 62


class Requests:
    """The requests to one image; `lock` is the image's."""

    def __init__(self, lock: threading.Lock) -> None:
        self.in_flight: dict[int, int] = {}
        """Epochs by thread, written and deleted by the requests themselves, without a lock."""
        self.epoch = 0
        self.waiting = 0
        """How many wait for requests to end; who ends one looks here and calls `ended`."""
        self._lock = lock
        self._changed = threading.Condition(lock)
        self._claims: list[tuple[int, int]] = []

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
        self._changed.notify_all()

    def wait_until_free(self, first: int, end: int) -> bool:
        """Wait until nobody claims any of these guest clusters. True if that took a wait, and the world has changed.

        The request of the current thread, if it is in flight, begins anew after a wait.
        """
        has_waited = False
        while any(claimed < end and first < claimed_end for claimed, claimed_end in self._claims):
            has_waited = True
            self._pause()
        return has_waited

    def _pause(self) -> None:
        ident = get_ident()
        was_in_flight = self.in_flight.pop(ident, None) is not None
        if was_in_flight:
            self._changed.notify_all()
        self._changed.wait()
        if was_in_flight:
            self.in_flight[ident] = self.epoch

    def drain(self) -> None:
        """Wait until every request that is in flight has ended; the current thread's must not be."""
        last = self.end_epoch()
        self.waiting += 1
        try:
            while self.oldest <= last:
                self._changed.wait()
        finally:
            self.waiting -= 1

    def ended(self) -> None:
        """Called, without the lock, by whoever ended a request while somebody is `waiting`."""
        with self._lock:
            self._changed.notify_all()
