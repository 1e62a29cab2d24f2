"""An image that takes part in a transaction which is not finished: what its bitmaps are, and its way out of that state.

The essay on transactions is in `operations.transaction`. Here is what one image does about one: its mark names a
record, and the record decides. Whoever reads sees the bitmaps as the record says, without a change on disk; whoever
writes has the header say so first. Where the record cannot be had nobody guesses: to readers the bitmaps cannot be
read, and a writer is refused.

Source: `format.transaction`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from qcow2_plugin.engine.header import read_header
from qcow2_plugin.errors import Qcow2Error, UnfinishedTransactionError, about_file, printable
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.transaction import (
    EXTENSION_TRANSACTION,
    Mark,
    Record,
    committed,
    is_marked,
    mark_of,
    unmarked,
)
from qcow2_plugin.storage import WritableStorage
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.opener import open_given

ReadRecord = Callable[[bytes], bytes]
"""The content of the record of this name; no more than shows that it is too large. Raises Qcow2Error, OSError."""


class Decided(NamedTuple):
    """The header as the record has it, and whether the transaction is committed."""

    header: Header
    is_committed: bool


def decide(header: Header, mark: Mark, record: Record, path: str) -> Decided:
    """What the header of the image at `path`, which has this mark, becomes.

    Raises UnfinishedTransactionError if the record is that of another transaction, CorruptImageError.
    """
    if record.id != mark.id:
        raise refusal(mark, "it is that of another transaction", path)
    with about_file(path):
        return Decided(committed(header, mark) if record.is_committed else unmarked(header), record.is_committed)


def look_up(header: Header, read_record: ReadRecord, path: str) -> Header:
    """The header without a mark, as the record has it; what has no mark stays as it is.

    Raises UnfinishedTransactionError if the record cannot be had, CorruptImageError.
    """
    with about_file(path):
        mark = mark_of(header)
    if mark is None:
        return header
    try:
        record = Record.parse(read_record(mark.record))
    except (Qcow2Error, OSError) as error:
        raise refusal(mark, _reason(error), path) from error
    return decide(header, mark, record, path).header


def refusal(mark: Mark, reason: str, path: str) -> UnfinishedTransactionError:
    """The error about an image whose record does not help, for that reason."""
    name = printable(mark.record)
    return UnfinishedTransactionError(
        f'a change of the bitmaps of several images was interrupted, and its record "{name}" cannot be used: {reason}; '
        "finish it with 'qcow2 bitmap recover RECORD', or, if that file is lost for good, take this image back with "
        "'qcow2 bitmap recover --lost IMAGE'",
        file=path,
    )


def store(storage: WritableStorage, stored: Header, settled: Header) -> None:
    """Put `settled`, of other extensions, autoclear features or backing file, in the place of `stored`, durably.

    Raises HeaderFullError, OSError; then the one or the other is there.
    """
    import numpy as np

    from qcow2_plugin.engine.image_file import ImageFile, MetadataMap, Structure  # who only looks need not wait for it

    file = ImageFile(storage, stored, MetadataMap([(Structure.HEADER, np.zeros(1, dtype=np.int64))]))
    file.update_header(
        extensions=settled.extensions,
        autoclear_features=settled.autoclear_features,
        backing_file=settled.backing_file,
    )
    file.barrier()


@contextmanager
def header_alone(path: str | os.PathLike[str]) -> Iterator[tuple[FileStorage, Header]]:
    """The image file at `path`, open for writing, and its header; nothing else of the image is looked at.

    Raises NotQcow2Error, UnsupportedFeatureError, CorruptImageError (header), ImageLockedError; OSError.
    """
    storage = open_given(path, writable=True)
    try:
        header = read_header(storage)
        with about_file(storage.path):
            header.require_known_features()
            yield storage, header
    finally:
        storage.close()


def has_void_mark(header: Header) -> bool:
    """True if another program has written to the image since it was marked: its mark means nothing any more."""
    return header.extension_data(EXTENSION_TRANSACTION) is not None and not is_marked(header)


def _reason(error: Qcow2Error | OSError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return error.detail
