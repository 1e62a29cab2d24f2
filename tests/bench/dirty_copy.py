"""Copies what a dirty bitmap marks out of an NBD server, as backup tools do: `dirty_copy.py URI BITMAP TARGET`.

The other side of a measurement. It asks libnbd for the map of the bitmap, reads what is dirty, in pieces of up to
2 MiB with several of them under way, and writes it to the same place of a sparse file.
"""

from __future__ import annotations

import os
import sys
from functools import partial

import nbd

PIECE = 2 << 20
AT_ONCE = 16
DIRTY = 1
SPAN = 2 << 30


def main(uri: str, bitmap: str, target: str) -> int:
    """Copy, durably."""
    context = f"qemu:dirty-bitmap:{bitmap}"
    handle = nbd.NBD()
    handle.add_meta_context(context)
    handle.connect_uri(uri)
    size = handle.get_size()
    ranges: list[tuple[int, int]] = []
    at = 0
    while at < size:
        found: list[int] = []

        def told(_context: str, _offset: int, entries: list[int], _error: int, found: list[int] = found) -> int:
            found += entries
            return 0

        handle.block_status(min(SPAN, size - at), at, told)
        for length, flags in zip(found[::2], found[1::2], strict=True):
            if flags & DIRTY:
                ranges.append((at, min(length, size - at)))
            at += length
    file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.ftruncate(file, size)

    def arrived(buffer: nbd.Buffer, offset: int, _error: int) -> int:
        os.pwrite(file, buffer.to_buffer(), offset)
        return 1

    for start, length in ranges:
        for offset in range(start, start + length, PIECE):
            while handle.aio_in_flight() >= AT_ONCE:
                handle.poll(-1)
            buffer = nbd.Buffer(min(PIECE, start + length - offset))
            handle.aio_pread(buffer, offset, partial(arrived, buffer, offset))
    while handle.aio_in_flight():
        handle.poll(-1)
    handle.shutdown()
    os.fsync(file)
    os.close(file)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
