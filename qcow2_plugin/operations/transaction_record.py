"""The file that decides a transaction: how it comes to be, changes its mind once, and goes.

Owns the moments at which it is durable. Refuses to know what the images do about it.
"""

from __future__ import annotations

import os
from contextlib import suppress

from qcow2_plugin.errors import UnfinishedTransactionError, about_file
from qcow2_plugin.format.transaction import MAX_RECORD_SIZE, Record
from qcow2_plugin.storage import directory
from qcow2_plugin.storage.opener import open_given

_SUCCESSOR = ".new"


class RecordFile:
    """The record at `path`, an absolute name."""

    def __init__(self, path: str) -> None:
        self.path = path

    def create(self, record: Record) -> None:
        """Make it, durably; it is never there in part. Raises FileExistsError and other OSError; then there is none of
        ours."""
        temporary = self.path + _SUCCESSOR
        if os.path.lexists(temporary) and not os.path.lexists(self.path):  # what a crash has left, nobody's successor
            os.unlink(temporary)
        directory.write_new(temporary, record.pack())
        try:
            directory.give_name(temporary, self.path)
        except BaseException:
            with suppress(OSError):  # the error that led here says more
                os.unlink(temporary)
            raise
        try:
            directory.make_names_durable(os.path.dirname(self.path))
        except BaseException:
            with suppress(OSError):  # the error that led here says more
                os.unlink(self.path)
            raise

    def switch(self, record: Record) -> None:
        """Put `record` in its place, durably, in one step.

        Raises OSError, and then the old one is there; UnfinishedTransactionError if nobody knows which one a crash
        would leave.
        """
        successor = self.path + _SUCCESSOR
        directory.write_new(successor, record.pack())
        try:
            os.replace(successor, self.path)
            directory.make_names_durable(os.path.dirname(self.path))
        except BaseException as error:
            if _is_removed(successor):  # so it has replaced nothing, whatever the error says
                raise
            raise UnfinishedTransactionError(
                f"whether the transaction is committed is not known ({error}); "
                "finish it with 'qcow2 bitmap recover RECORD'",
                file=self.path,
            ) from error

    def remove(self) -> None:
        """Nobody needs it any more. Raises OSError."""
        os.unlink(self.path)
        with suppress(FileNotFoundError):  # where a crash has left one
            os.unlink(self.path + _SUCCESSOR)
        directory.make_names_durable(os.path.dirname(self.path))

    def read(self) -> Record:
        """Raises CorruptImageError if it is no record, what `open_given` does, OSError."""
        storage = open_given(self.path)
        try:
            with about_file(self.path):
                return Record.parse(storage.pread(MAX_RECORD_SIZE + 1, 0))
        finally:
            storage.close()


def _is_removed(path: str) -> bool:
    """Remove the file; False if there is none, or it cannot be."""
    try:
        os.unlink(path)
    except OSError:
        return False
    return True
