"""A program, not a test: connections as nbdkit makes them, in a Python of any version, and what they leave behind.

    python -m tests.support.foreign_threads ROUNDS WORKERS [--leak]

Each round is one connection: a thread that Python did not start, which starts and joins WORKERS more of them. Every
one of these threads is `fclose` on a stream of our own, so C code without any Python below it calls back twice, first
"write", then "close", as nbdkit calls a plugin. The first call keeps the thread's state; the second must find it
again, and in the connection's own thread it gives everything back, or with --leak forgets it. Printed as JSON: the
thread states of the interpreter and the resident memory in KiB after a quarter of the rounds and after all of them,
and how many of the second calls found the state of the first.

Only the standard library and the module on trial are needed.
"""

from __future__ import annotations

import ctypes
import json
import sys
from _thread import get_ident
from collections.abc import Callable
from pathlib import Path

from qcow2_plugin.adapters import thread_states
from qcow2_plugin.adapters.thread_states import KeptThreadStates

_WRITE = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_CLOSE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


class _CookieFunctions(ctypes.Structure):
    """cookie_io_functions_t of fopencookie(3)."""

    _fields_ = (("read", ctypes.c_void_p), ("write", _WRITE), ("seek", ctypes.c_void_p), ("close", _CLOSE))


_libc = ctypes.CDLL(None)
_libc.fopencookie.restype = ctypes.c_void_p
_libc.fopencookie.argtypes = [ctypes.c_void_p, ctypes.c_char_p, _CookieFunctions]
_libc.fputs.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
_libc.pthread_create.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
_libc.pthread_join.argtypes = [ctypes.c_ulong, ctypes.c_void_p]

_python = ctypes.pythonapi
_python.PyInterpreterState_Get.restype = ctypes.c_void_p
_python.PyInterpreterState_ThreadHead.restype = ctypes.c_void_p
_python.PyInterpreterState_ThreadHead.argtypes = [ctypes.c_void_p]
_python.PyThreadState_Next.restype = ctypes.c_void_p
_python.PyThreadState_Next.argtypes = [ctypes.c_void_p]
_python.PyThreadState_Get.restype = ctypes.c_void_p


class ForeignThread:
    """A thread that Python did not start; it calls `first`, then `second`, and ends."""

    def __init__(self, first: Callable[[], None], second: Callable[[], None]) -> None:
        def write(_cookie: int, _data: int, length: int) -> int:
            first()
            return length

        def close(_cookie: int) -> int:
            second()
            return 0

        self._functions = _CookieFunctions(None, _WRITE(write), None, _CLOSE(close))
        stream = _libc.fopencookie(None, b"w", self._functions)
        _libc.fputs(b"something to write", stream)
        self._thread = ctypes.c_ulong()
        if _libc.pthread_create(ctypes.byref(self._thread), None, _libc.fclose, stream):
            raise OSError("pthread_create failed")

    def join(self) -> None:
        if _libc.pthread_join(self._thread, None):
            raise OSError("pthread_join failed")


class Connection:
    """One connection with its workers. `found_again` counts the second calls that found the state of the first."""

    def __init__(self, worker_count: int, *, leak: bool) -> None:
        self.found_again = 0
        self._threads = KeptThreadStates()
        self._states: dict[int, int] = {}
        self._worker_count = worker_count
        self._leak = leak
        self.serving = ForeignThread(self._serve, self._close)

    def _keep(self) -> None:
        if get_ident() not in self._threads.idents:
            self._threads.keep()
        self._states[get_ident()] = _python.PyThreadState_Get()
        bytes(100).hex()  # some work with frames and memory

    def _call_again(self) -> None:
        self.found_again += self._states[get_ident()] == _python.PyThreadState_Get()

    def _serve(self) -> None:
        self._keep()
        workers = [ForeignThread(self._keep, self._call_again) for _ in range(self._worker_count)]
        for worker in workers:
            worker.join()

    def _close(self) -> None:
        self._call_again()
        if not self._leak:
            self._threads.give_back()


def count_thread_states() -> int:
    """The thread states of this interpreter, in use or not."""
    count = 0
    state = _python.PyInterpreterState_ThreadHead(_python.PyInterpreterState_Get())
    while state:
        count += 1
        state = _python.PyThreadState_Next(state)
    return count


def resident_kib() -> int:
    """VmRSS of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def main(rounds: int, worker_count: int, *, leak: bool) -> None:
    found_again = 0
    measured = []
    for number in range(1, rounds + 1):
        connection = Connection(worker_count, leak=leak)
        connection.serving.join()
        found_again += connection.found_again
        if number in (rounds // 4, rounds):
            measured.append({"states": count_thread_states(), "resident_kib": resident_kib()})
    left_behind = len(thread_states._left_behind)
    print(json.dumps({"early": measured[0], "late": measured[-1], "again": found_again, "left_behind": left_behind}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), leak="--leak" in sys.argv)
