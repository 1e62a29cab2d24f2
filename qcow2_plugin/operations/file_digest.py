"""The digest of a file as it is stored, whatever it holds: BLAKE3, which is as fast as a disk on one processor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

from blake3 import blake3

from qcow2_plugin.storage.blobs import read_blob

Chunk = bytes | bytearray | memoryview


def file_digest(path: str | os.PathLike[str]) -> tuple[str, int]:
    """The digest of a regular file in hexadecimal, and its size in bytes. Raises OSError."""
    return digest_of(read_blob(os.fspath(path)))


def digest_of(chunks: Iterable[Chunk]) -> tuple[str, int]:
    """The digest of `chunks` in a row in hexadecimal, and how many bytes they are. Raises what they do."""
    passed, digest = chunks_digest(chunks)
    size = sum(len(chunk) for chunk in passed)
    return digest(), size


def chunks_digest(chunks: Iterable[Chunk]) -> tuple[Iterator[Chunk], Callable[[], str]]:
    """The same chunks, and a way to have the digest of all those that were taken, in hexadecimal."""
    digest = blake3()

    def passed() -> Iterator[Chunk]:
        for chunk in chunks:
            digest.update(chunk)
            yield chunk

    return passed(), digest.hexdigest
