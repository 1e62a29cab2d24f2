"""A copy of a file, with its holes.

Source: lseek(2), SEEK_DATA and SEEK_HOLE.
"""

from __future__ import annotations

from qcow2_plugin.storage import Storage, WritableStorage

_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)


def copy_content(source: Storage, target: WritableStorage) -> None:
    """Let `target`, which is empty, hold what `source` does; where that is zeros there are holes. Raises OSError."""
    size = source.size()
    target.truncate(size)
    for offset, length, is_data in source.data_ranges(0, size):
        if not is_data:
            continue
        for start in range(offset, offset + length, _CHUNK):
            chunk = source.pread(min(_CHUNK, offset + length - start), start)
            if chunk != _ZEROS[: len(chunk)]:
                target.write_from(chunk, start)
