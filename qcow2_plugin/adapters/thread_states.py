"""Keep the Python thread states of nbdkit's threads, and give them back.

nbdkit serves a connection from threads that Python did not start. Around every callback it calls `PyGILState_Ensure`
and `PyGILState_Release`; the first makes a thread state for a thread that has none, the second destroys it again, and
since Python 3.11 the first Python frame of a fresh state also maps a chunk of memory that goes with it. For a read of
4 KiB that is more work than the read.

The remedy is one `PyGILState_Ensure` more than `PyGILState_Release`: then the state stays with its thread, and the
next callback finds it. What is kept must be given back or every connection would leak. nbdkit joins a connection's
worker threads before it calls `close` for it, on the connection's own thread. So there

* the state of the current thread is released by the one `PyGILState_Release` that was left out; nbdkit's own release,
  when the callback returns, then destroys it as ever;
* the state of a thread that is gone is cleared and deleted with `PyThreadState_Clear` and `PyThreadState_Delete`,
  which are made for that: nobody else can use it any more.

Deleting happens on a short-lived thread of Python's own. Since Python 3.12 `PyThreadState_Delete` makes the thread that
calls it forget its own state, whoever's state is deleted; nbdkit's own release, when the callback returns, would not
find it and abort the process. A thread that Python started needs no such note.

A thread is gone if the kernel does not list it. One that is still listed (a joined thread may be for a moment, or a
filter's own thread that lives on) keeps its state until the next connection closes and looks again.

Only CPython with its one lock works this way; elsewhere nothing is kept and everything works as nbdkit made it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from _thread import allocate_lock, get_ident, get_native_id, start_new_thread
from collections.abc import Iterator
from contextlib import suppress

_GILSTATE_LOCKED = 0  # what a PyGILState_Ensure answers if the lock is held already, as it is in Python code

_can_keep = (
    sys.implementation.name == "cpython"
    and getattr(sys, "_is_gil_enabled", lambda: True)()
    and os.path.isdir("/proc/self/task")
)
_python = ctypes.pythonapi
_python.PyThreadState_Get.restype = ctypes.c_void_p
_python.PyThreadState_Clear.argtypes = [ctypes.c_void_p]
_python.PyThreadState_Delete.argtypes = [ctypes.c_void_p]

_left_behind: dict[int, int] = {}
"""Thread states of threads that outlived their connection, and the native ids of those threads."""


class KeptThreadStates:
    """The threads of one connection whose states are kept.

    Callbacks of several connections may interrupt each other anywhere in Python code. So whoever is to delete a state
    takes it out of its dictionary first, by `popitem`, which cannot be interrupted: nobody else can have it then.
    """

    def __init__(self) -> None:
        self.idents: set[int] = set()
        """Threads that need no `keep` any more; look here first, it is the cheapest question there is."""
        self._states: dict[int, int] = {}
        self._own_states: dict[int, int] = {}

    def keep(self) -> None:
        """Keep the state of the current thread from now on."""
        ident = get_ident()
        self.idents.add(ident)
        if not _can_keep:
            return
        _python.PyGILState_Ensure()
        state = _python.PyThreadState_Get()
        self._states[state] = get_native_id()
        self._own_states[ident] = state

    def give_back(self) -> None:
        """Undo every `keep`; all threads but the current one must have ended their callbacks for good."""
        own = self._own_states.pop(get_ident(), None)
        if own is not None and self._states.pop(own, None) is not None:
            _python.PyGILState_Release(_GILSTATE_LOCKED)
        gone, alive = [], []
        for state, native_id in [*_taken_from(_left_behind), *_taken_from(self._states)]:
            if _is_gone(native_id):
                gone.append(state)
            else:
                alive.append((state, native_id))
        _left_behind.update(alive)
        self._own_states.clear()
        self.idents.clear()
        if gone:
            _delete_elsewhere(gone)


def _taken_from(states: dict[int, int]) -> Iterator[tuple[int, int]]:
    """Everything in `states`, taken out one by one; others may be doing the same."""
    with suppress(KeyError):  # popitem's word for empty
        while True:
            yield states.popitem()


def _is_gone(native_id: int) -> bool:
    """True if the kernel says that this process has no such thread."""
    try:
        os.stat(f"/proc/self/task/{native_id}")
    except FileNotFoundError:
        return True
    except OSError:  # whatever it is, it does not prove that the thread is gone
        return False
    return False


def _delete_elsewhere(states: list[int]) -> None:
    """Delete thread states on a thread of Python's own, and wait until that is done."""
    done = allocate_lock()
    done.acquire()

    def delete() -> None:
        for state in states:
            _python.PyThreadState_Clear(state)
            _python.PyThreadState_Delete(state)
        done.release()

    start_new_thread(delete, ())
    done.acquire()
