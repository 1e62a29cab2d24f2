"""An image is amended again and again while others write to it and read from it."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

from qcow2_plugin import amend, create_image, open_image
from qcow2_plugin.engine.image import Image
from tests.support.tools import qemu_img

SIZE, AREA, WRITERS = 8 << 20, 1 << 20, 4
STEPS: list[dict[str, Any]] = [
    {"refcount_bits": 64},
    {"compat": "0.10", "refcount_bits": 16},
    {"compat": "1.1", "refcount_bits": 8},
    {"lazy_refcounts": True, "refcount_bits": 32},
    {"size": SIZE + AREA},
]


def write(image: Image, number: int, view: bytearray, stop: threading.Event, errors: list[BaseException]) -> None:
    """Each writer has an area of its own, of which it knows everything."""
    chance, base = random.Random(number), number * AREA
    try:
        while not stop.is_set():
            offset = chance.randrange(AREA - 9000)
            length = chance.randrange(1, 9000)
            if chance.random() < 0.3:
                image.write_zeroes(base + offset, length, may_unmap=chance.random() < 0.5)
                view[offset : offset + length] = bytes(length)
            else:
                data = chance.randbytes(length)
                image.pwrite(data, base + offset)
                view[offset : offset + length] = data
            if chance.random() < 0.1:
                assert image.pread(AREA, base) == view
    except BaseException as error:
        errors.append(error)


def test_amending_does_not_disturb_anybody(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, SIZE, cluster_size=4096)
    views = [bytearray(AREA) for _ in range(WRITERS)]
    errors: list[BaseException] = []
    stop = threading.Event()
    with open_image(path, writable=True) as image:
        threads = [
            threading.Thread(target=write, args=(image, number, view, stop, errors))
            for number, view in enumerate(views)
        ]
        for thread in threads:
            thread.start()
        try:
            for step in STEPS * 2:
                amend(image, **step)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not errors, errors
        assert image.pread(WRITERS * AREA, 0) == b"".join(views)
    qemu_img("check", path)
    with open_image(path) as image:
        assert image.pread(WRITERS * AREA, 0) == b"".join(views)
