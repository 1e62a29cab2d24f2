"""Kept thread states are given back: a server does not grow with its connections."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbd

from tests.support.builder import ImageBuilder
from tests.support.tools import PLUGIN, Server, nbdkit

COUNTING_PLUGIN = Path(__file__).resolve().parents[1] / "support" / "counting_plugin.py"
CONNECTIONS = 2000
WARM_UP = 200
WORKERS = 16
MAX_GROWTH = 4 << 10  # KiB
BLOCK = 4096


def left_behind(server: Server) -> tuple[int, int]:
    """Thread states, and those that wait for their thread, as the server counts them while it answers."""
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(server.uri)
    told: dict[str, str] = {}
    handle.opt_list(lambda name, description: told.update({name: description}))
    handle.opt_abort()
    return int(told["states"]), int(told["left behind"])


def settled(server: Server) -> tuple[int, int]:
    """The smallest numbers that the server comes to: the last connections may still be closing."""
    found = left_behind(server)
    for _ in range(50):
        time.sleep(0.01)
        found = min(found, left_behind(server))
    return found


def resident_kib(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def read_with_all_workers(server: Server, size: int) -> None:
    """One connection that has more requests under way than the server has workers, each of which is held up."""
    handle = nbd.NBD()
    handle.connect_uri(server.uri)
    buffers = [nbd.Buffer(BLOCK) for _ in range(2 * WORKERS)]
    for number, buffer in enumerate(buffers):
        handle.aio_pread(buffer, number * BLOCK % size)
    while handle.aio_in_flight():
        handle.poll(-1)
    handle.shutdown()


def test_memory_is_flat_over_many_connections(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    builder = ImageBuilder(1 << 20)
    for cluster in range(16):
        builder.data(cluster, b"%d" % cluster)
    builder.build(path)
    params: dict[str, str | Path] = {"file": path, "rdelay": "1ms"}  # long enough for every worker to get a request
    with nbdkit(params, "-t", str(WORKERS), "--filter=delay", plugin=COUNTING_PLUGIN) as server:
        for _ in range(WARM_UP):
            read_with_all_workers(server, 1 << 20)
        (early, _), early_resident = settled(server), resident_kib(server)
        for _ in range(CONNECTIONS - WARM_UP):
            read_with_all_workers(server, 1 << 20)
        (late, waiting), late_resident = settled(server), resident_kib(server)
    assert waiting <= WORKERS
    assert late <= early + waiting
    assert early <= 2 + WORKERS
    assert late_resident - early_resident <= MAX_GROWTH


def run_foreign_threads(*arguments: str) -> dict[str, Any]:
    """The answer of tests/support/foreign_threads.py, run by the Python that runs the tests."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.foreign_threads", *arguments],
        cwd=PLUGIN.parent,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_a_kept_state_is_found_again_and_given_back() -> None:
    rounds = 400
    answer = run_foreign_threads(str(rounds), str(WORKERS))
    assert answer["again"] == rounds * (WORKERS + 1)
    assert answer["late"]["states"] <= answer["early"]["states"] + answer["left_behind"]
    assert answer["left_behind"] <= WORKERS
    assert answer["late"]["resident_kib"] - answer["early"]["resident_kib"] <= MAX_GROWTH


def test_what_is_not_given_back_is_noticed() -> None:
    """The measure itself: without `give_back` states and memory grow with every connection."""
    rounds = 400
    answer = run_foreign_threads(str(rounds), str(WORKERS), "--leak")
    grown = answer["late"]["states"] - answer["early"]["states"]
    assert grown == (rounds - rounds // 4) * (WORKERS + 1)
    assert answer["late"]["resident_kib"] - answer["early"]["resident_kib"] > MAX_GROWTH
