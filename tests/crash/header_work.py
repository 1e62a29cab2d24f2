"""Header clusters of many shapes, changes to them, and what a crash or a failure in the midst may leave.

It owns the shapes and the changes, and the one rule: the header says, as it did before, or as it says afterwards, never
a mixture. What a header says is read by `image_checker`, independent of the engine; how it is laid out, and the table
of feature names, do not count.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from qcow2_plugin.engine.image_file import ImageFile, MetadataMap, Structure
from qcow2_plugin.errors import HeaderFullError
from qcow2_plugin.format.header import Header
from tests.crash.scenario import WrongError
from tests.support.crash_states import Crashes
from tests.support.fields import BACKING_FORMAT, BITMAPS, DATA_FILE, FEATURE_NAMES, Extension
from tests.support.headers import header_bytes
from tests.support.image_checker import HeaderFacts
from tests.support.memory_storage import MemoryStorage
from tests.support.recording import Log, RecordingStorage

UNKNOWN = 0x3F0A11CE
NAMES = Extension(FEATURE_NAMES, bytes(range(1, 193)) * 2)
FORMAT = Extension(BACKING_FORMAT, b"raw")
DATA = Extension(DATA_FILE, b"disk.raw")
OTHER = Extension(UNKNOWN, b"of somebody else " * 7, padding=0xFF)
LONG, LONGER = b"l" * 1000, b"L" * 1023


def bitmaps(number: int) -> bytes:
    return struct.pack(">IIQQ", 1, 0, 32, number << 16)


POINTER = Extension(BITMAPS, bitmaps(1))


def _shape(**told: Any) -> bytes:
    return header_bytes(**{"autoclear_features": 1, **told})


SHAPES: dict[str, bytes] = {
    "as QEMU makes it": _shape(extensions=[NAMES]),
    "overlay": _shape(extensions=[FORMAT, NAMES], backing=b"base.raw"),
    "overlay, long name": _shape(extensions=[FORMAT, NAMES], backing=LONG),
    "bitmaps behind the first sector": _shape(extensions=[FORMAT, NAMES, POINTER, OTHER], backing=b"base.raw"),
    "bitmaps across the first sector": _shape(extensions=[NAMES, POINTER]),
    "data file": _shape(extensions=[DATA, NAMES], incompatible_features=4),
    "everything": _shape(extensions=[POINTER, DATA, FORMAT, OTHER, NAMES], backing=LONGER, compatible_features=1 << 40),
    "small clusters": _shape(cluster_bits=12, extensions=[FORMAT], backing=LONG),
    "smallest clusters": _shape(cluster_bits=9, extensions=[FORMAT], backing=b"base.raw"),
    "unknown fields": _shape(extensions=[NAMES], header_length=136, tail=b"new ones" * 3),
    "short header": _shape(extensions=[NAMES], header_length=104),
    "no end marker": _shape(extensions=[FORMAT], end_marker=False, backing=b"base.raw"),
    "name at the end": _shape(extensions=[NAMES], backing_file_offset=65000, backing_file_size=500),
    "version 2": header_bytes(version=2, extensions=[FORMAT], backing=b"base.raw"),
    "version 2, long name": header_bytes(version=2, extensions=[FORMAT, OTHER], backing=LONG),
    "version 2, smallest clusters": header_bytes(version=2, cluster_bits=9),
}

Change = Callable[[Header], dict[str, Any]]


def _with(*changes: tuple[int, bytes | None], **fields: Any) -> Change:
    def change(header: Header) -> dict[str, Any]:
        for kind, data in changes:
            header = header.with_extension(kind, data)
        return {"extensions": header.extensions, **fields}

    return change


def _upgrade(header: Header) -> dict[str, Any]:
    upgraded = replace(header, version=3, header_length=112, additional_fields=bytes(7))
    upgraded = upgraded.with_extension(FEATURE_NAMES, upgraded.usual_feature_names)
    return {
        **{name: getattr(upgraded, name) for name in ("version", "header_length", "additional_fields")},
        "extensions": upgraded.extensions,
    }


def _downgrade(header: Header) -> dict[str, Any]:
    return {
        **{"version": 2, "header_length": 72, "additional_fields": b"", "incompatible_features": 0},
        **{"compatible_features": 0, "autoclear_features": 0},
        "extensions": header.with_extension(FEATURE_NAMES, None).extensions,
    }


CHANGES: dict[str, Change] = {
    "bitmaps": _with((BITMAPS, bitmaps(2)), autoclear_features=1),
    "no bitmaps": _with((BITMAPS, None), autoclear_features=0),
    "other bitmaps and the features": _with((BITMAPS, bitmaps(3)), autoclear_features=3),
    "short name": _with((BACKING_FORMAT, b"qcow2"), backing_file=b"other.qcow2"),
    "long name": _with((BACKING_FORMAT, b"raw"), backing_file=LONGER[:-1] + b"!"),
    "no name": _with((BACKING_FORMAT, None), backing_file=None, size=1 << 19),
    "data file": _with((DATA_FILE, b"/a/longer/name/of/the/data/file.raw")),
    "long data file": _with((DATA_FILE, LONGER)),
    "no data file, no names": _with((DATA_FILE, None), (FEATURE_NAMES, None)),
    "upgrade": _upgrade,
    "downgrade": _downgrade,
}
CASES = [
    (shape, change)
    for shape, content in SHAPES.items()
    for change in CHANGES
    if change != ("downgrade" if content[7] == 2 else "upgrade")
    and not (content[7] == 2 and "bitmaps" in change)  # it has no autoclear features
]


class Said(NamedTuple):
    """What a header says."""

    facts: HeaderFacts
    extensions: tuple[tuple[int, bytes], ...]
    additional_fields: bytes

    @classmethod
    def by(cls, content: bytes | bytearray) -> Said:
        """Raises WrongError if it is no header."""
        try:
            header = Header.parse(bytes(content))
            facts = HeaderFacts.read(content)
        except Exception as error:
            raise WrongError(f"the header cannot be read: {error}") from error
        told = sorted(each for each in facts.extensions if each[0] != FEATURE_NAMES)
        return cls(replace(facts, extensions=()), tuple(told), header.additional_fields)


@dataclass
class Work:
    """One change to one header."""

    shape: str
    change: str

    def open(self, storage: MemoryStorage) -> ImageFile:
        header = Header.parse(bytes(storage.content))
        return ImageFile(storage, header, MetadataMap([(Structure.HEADER, np.zeros(1, dtype=np.int64))]))

    def apply(self, file: ImageFile) -> None:
        file.update_header(**CHANGES[self.change](file.header))
        file.barrier()

    def recorded(self) -> tuple[Log, bytes]:
        """The log of the change, and the header cluster after it. Raises HeaderFullError."""
        log = Log()
        storage = RecordingStorage(log, 0, SHAPES[self.shape])
        file = self.open(storage)
        self.apply(file)
        if Header.parse(bytes(storage.content)) != file.header:
            raise WrongError("the header on disk is not the one in memory")
        return log, bytes(storage.content)

    def states(self, log: Log) -> Iterator[bytes]:
        """Every header cluster that a crash can leave, once."""
        crashes = Crashes(log, (SHAPES[self.shape],))
        seen = set()
        for plan in crashes.plans():
            state = crashes.state(plan)
            if state.key not in seen:
                seen.add(state.key)
                yield bytes(state.files[0].content())

    def crash(self) -> int:
        """Judge every state, and do the change again from there; how many there are. Raises WrongError."""
        try:
            log, after = self.recorded()
        except HeaderFullError:
            return 0
        old, new = Said.by(SHAPES[self.shape]), Said.by(after)
        count = 0
        for state in self.states(log):
            count += 1
            said = Said.by(state)
            if said not in (old, new):
                raise WrongError(f"{self.shape}, {self.change}: a mixture: {said}")
            self._do_again(state, new)
        return count

    def _do_again(self, state: bytes, new: Said) -> None:
        storage = MemoryStorage(state)
        file = self.open(storage)
        try:
            self.apply(file)
            if Said.by(storage.content) != new:
                raise WrongError("done again, the change leads elsewhere")
            new = Said.by(storage.content)
            file.update_header(extensions=file.header.with_extension(UNKNOWN + 1, b"one more").extensions)
        except HeaderFullError:  # two headers beside each other leave no room for a third
            if Said.by(storage.content) not in (Said.by(state), new):
                raise WrongError("a change that was refused has changed something") from None
            return
        names = [data for kind, data in HeaderFacts.read(storage.content).extensions if kind == FEATURE_NAMES]
        if any(len(data) % 48 for data in names):
            raise WrongError("a bridge stays for good")
