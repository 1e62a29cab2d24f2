"""Many connections that close at once give back each thread state once."""

from __future__ import annotations

import sys
import threading

import pytest

from qcow2_plugin.adapters import thread_states


def test_no_state_is_given_back_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    deleted: list[int] = []
    left_behind = dict.fromkeys(range(1, 20_001), 0)  # thread id 0: no thread has it
    monkeypatch.setattr(thread_states, "_left_behind", left_behind)
    monkeypatch.setattr(thread_states, "_delete_elsewhere", deleted.extend)
    start = threading.Barrier(8)

    def close() -> None:
        start.wait()
        for _ in range(50):
            thread_states.KeptThreadStates().give_back()

    threads = [threading.Thread(target=close) for _ in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sorted(deleted) == list(range(1, 20_001))
    assert not left_behind
