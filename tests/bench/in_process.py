"""The measurements that need the package imported, in a Python of their own: `python -m tests.bench.in_process`.

    open IMAGE COUNT    median milliseconds of open_image() and close()
    info IMAGE COUNT    median milliseconds of info()
    read IMAGE COUNT    peak memory in bytes, before the image is opened and after COUNT random 4 KiB reads

Prints one JSON object.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable

import qcow2_plugin

from .processes import peak_memory

READ_SIZE = 4096


def open_and_close(path: str) -> None:
    """One life of an image that nobody reads."""
    qcow2_plugin.open_image(path).close()


def milliseconds(call: Callable[[], object], count: int) -> float:
    """Median of `count` calls, after one that does not count."""
    call()
    durations = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        durations.append(time.perf_counter() - began)
    return 1000 * statistics.median(durations)


def read_at_random(path: str, count: int) -> dict[str, int]:
    """Peak memory around `count` reads spread over the whole disk."""
    buffer = memoryview(bytearray(READ_SIZE))
    generator = random.Random(20)
    before = peak_memory()
    with qcow2_plugin.open_image(path) as image:
        pages = image.virtual_size // READ_SIZE
        for _ in range(count):
            image.read_into(buffer, generator.randrange(pages) * READ_SIZE)
    return {"before": before, "peak": peak_memory()}


def main() -> None:
    """Do what the command line says."""
    verb, path, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answers: dict[str, Callable[[], dict[str, int] | dict[str, float]]] = {
        "open": lambda: {"milliseconds": milliseconds(lambda: open_and_close(path), count)},
        "info": lambda: {"milliseconds": milliseconds(lambda: qcow2_plugin.info(path), count)},
        "read": lambda: read_at_random(path, count),
    }
    print(json.dumps(answers[verb]()))


if __name__ == "__main__":
    main()
