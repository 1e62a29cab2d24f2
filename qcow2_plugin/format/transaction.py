"""A change of bitmaps on several images that is under way: the mark in each header, and the record that decides it.

The mark is a header extension of our own together with an autoclear feature bit. Every program that does not know the
bit clears it when it opens the image for writing, as the format demands, and before it changes anything. So a mark
without its bit says that somebody else has written since, and is void.

Source: docs/interop/qcow2.rst, "autoclear_features", "Header extensions".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from qcow2_plugin.errors import CorruptImageError
from qcow2_plugin.format.header import (
    AUTOCLEAR_BITMAPS,
    EXTENSION_BITMAPS,
    BitmapsPointer,
    Header,
)
from qcow2_plugin.format.names import to_bytes

EXTENSION_TRANSACTION = 0x51425458
"""Known to no other program."""
AUTOCLEAR_TRANSACTION = 1 << 63
"""The autoclear bit that is farthest from those in use."""
ID_SIZE = 16
MAX_RECORD_SIZE = 1 << 20
"""Bytes of a record."""
MAX_RECORD_NAME = 4095

_LAYOUT = 1
_MARK = struct.Struct(">16sIIQQ")
_TITLE = "bitmap transaction of qcow2 images"
_TEXTS = ("title", "id", "state", "begun")
_PREPARED, _COMMITTED = "prepared", "committed"


class Mark(NamedTuple):
    """What an image says of the transaction that it takes part in. Source: this module."""

    id: bytes
    new: BitmapsPointer | None
    """Where the bitmaps are once the transaction is committed; None: there are none."""
    record: bytes
    """Name of the record; a relative one starts at the image's directory."""

    def pack(self) -> bytes:
        """The data of the header extension."""
        count, size, offset = self.new or (0, 0, 0)
        return _MARK.pack(self.id, _LAYOUT, count, size, offset) + self.record

    @classmethod
    def parse(cls, data: bytes) -> Mark:
        """Raises CorruptImageError."""
        if not _MARK.size < len(data) <= _MARK.size + MAX_RECORD_NAME:
            raise _corrupt(f"is {len(data)} bytes long")
        transaction, layout, count, size, offset = _MARK.unpack_from(data)
        if layout != _LAYOUT:
            raise _corrupt(f"has the unknown layout {layout}")
        pointer = BitmapsPointer(count, size, offset) if count or size or offset else None
        return cls(transaction, pointer, data[_MARK.size :])


def is_marked(header: Header) -> bool:
    """True if the image has a mark that is not void."""
    has_bit = bool(header.autoclear_features & AUTOCLEAR_TRANSACTION)
    return has_bit and header.extension_data(EXTENSION_TRANSACTION) is not None


def mark_of(header: Header) -> Mark | None:
    """The mark of an image, None if it has none or a void one. Raises CorruptImageError."""
    return Mark.parse(header.extension_data(EXTENSION_TRANSACTION) or b"") if is_marked(header) else None


def marked(header: Header, mark: Mark) -> Header:
    """The header with this mark and no other."""
    return replace(
        header.with_extension(EXTENSION_TRANSACTION, mark.pack()),
        autoclear_features=header.autoclear_features | AUTOCLEAR_TRANSACTION,
    )


def unmarked(header: Header) -> Header:
    """The header without a mark, void or not: the bitmaps are as before the transaction."""
    return replace(
        header.with_extension(EXTENSION_TRANSACTION, None),
        autoclear_features=header.autoclear_features & ~AUTOCLEAR_TRANSACTION,
    )


def committed(header: Header, mark: Mark) -> Header:
    """The header without its mark, with the bitmaps as the transaction leaves them. Raises CorruptImageError."""
    bare = unmarked(header)
    if mark.new is None:
        return replace(
            bare.with_extension(EXTENSION_BITMAPS, None),
            autoclear_features=bare.autoclear_features & ~AUTOCLEAR_BITMAPS,
        )
    switched = replace(
        bare.with_extension(EXTENSION_BITMAPS, mark.new.pack()),
        autoclear_features=bare.autoclear_features | AUTOCLEAR_BITMAPS,
    )
    if switched.bitmaps != mark.new:  # which refuses what no pointer can be
        raise _corrupt("names no directory")
    return switched


@dataclass(frozen=True, slots=True)
class Record:
    """The file that decides a transaction. It exists from before the first image is marked until no image is."""

    id: bytes
    is_committed: bool
    images: tuple[str, ...]
    """Their names; relative ones start at the record's directory."""
    begun: str = ""
    """When, for people."""

    def pack(self) -> bytes:
        """As JSON, for people to read as well."""
        import json  # who opens images need not wait for it

        told = {
            "title": _TITLE,
            "id": self.id.hex(),
            "state": _COMMITTED if self.is_committed else _PREPARED,
            "begun": self.begun,
            "images": list(self.images),
        }
        return json.dumps(told, indent=2).encode() + b"\n"

    @classmethod
    def parse(cls, content: bytes) -> Record:
        """Raises CorruptImageError."""
        told = _parse_object(content)
        texts = {key: told.get(key) for key in _TEXTS}
        images = told.get("images")
        if texts["title"] != _TITLE or texts["state"] not in (_PREPARED, _COMMITTED):
            raise _corrupt_record("this is no record of one")
        if not isinstance(texts["id"], str) or not isinstance(texts["begun"], str):
            raise _corrupt_record("its id or time is missing")
        if not isinstance(images, list) or not all(map(_is_name, images)):
            raise _corrupt_record("it does not list its images")
        try:
            transaction = bytes.fromhex(texts["id"])
        except ValueError as error:
            raise _corrupt_record("its id is no number") from error
        if len(transaction) != ID_SIZE:
            raise _corrupt_record(f"its id has {len(transaction)} bytes")
        return cls(transaction, texts["state"] == _COMMITTED, tuple(images), texts["begun"])


def _is_name(told: object) -> bool:
    """True for text that a file can have as its name."""
    if not isinstance(told, str):
        return False
    try:
        return bool(told) and b"\0" not in to_bytes(told)
    except UnicodeEncodeError:
        return False


def _parse_object(content: bytes) -> dict[str, Any]:
    if len(content) > MAX_RECORD_SIZE:
        raise _corrupt_record(f"it is larger than {MAX_RECORD_SIZE} bytes")
    import json

    try:
        told = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _corrupt_record("it is no JSON") from error
    if not isinstance(told, dict):
        raise _corrupt_record("it is no JSON object")
    return told


def _corrupt(detail: str) -> CorruptImageError:
    way_out = "'qcow2 bitmap recover --lost IMAGE' takes it away, and leaves the bitmaps of before"
    return CorruptImageError("transaction header extension", f"{detail}; {way_out}")


def _corrupt_record(detail: str) -> CorruptImageError:
    return CorruptImageError("transaction record", detail)
