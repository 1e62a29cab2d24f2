"""Looks at images in processes that may not use much: `python -m tests.support.limited MEMORY SECONDS IMAGE...`.

Each image gets a process of its own, which may grow by MEMORY bytes of address space over the interpreter with the
package loaded, and work SECONDS. It is opened, mapped, read where it begins, and asked for `info`; or, if "--check"
stands before the images, checked. One line of JSON an image tells how that ended: the exit status (0 unless it died),
the seconds of work, the bytes of memory on top.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import Qcow2Error
from qcow2_plugin.operations.check import check
from qcow2_plugin.operations.info import info

_READ = 1 << 20
_RUNS = 1000


def main() -> None:
    memory, seconds = int(sys.argv[1]), int(sys.argv[2])
    names, look = sys.argv[3:], _look
    if names[0] == "--check":
        names, look = names[1:], _check
    for name in names:
        child = os.fork()
        if not child:
            os._exit(_look_within(memory, seconds, name, look))
        _, status, usage = os.wait4(child, 0)
        told = {
            "name": name,
            "status": os.waitstatus_to_exitcode(status),
            "seconds": usage.ru_utime + usage.ru_stime,
            "memory": usage.ru_maxrss * 1024 - _resident(),
        }
        print(json.dumps(told), flush=True)


def _look_within(memory: int, seconds: int, name: str, look: Callable[[str], None]) -> int:
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    try:
        look(name)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _look(name: str) -> None:
    """Everything that an image is asked for; errors of ours are answers."""
    with suppress(Qcow2Error):
        _open(name)
    with suppress(Qcow2Error):
        info(name)


def _check(name: str) -> None:
    with suppress(Qcow2Error):
        check(name)


def _open(name: str) -> None:
    with open_image(name) as image:
        for _ in islice(image.extents(), _RUNS):
            pass
        image.pread(min(image.virtual_size, _READ), 0)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
