"""Reading the header of an image file, and other structures whole: what every look at an image begins with."""

from __future__ import annotations

from collections.abc import Iterator

from qcow2_plugin.errors import (
    CorruptImageError,
    Qcow2Error,
    TruncatedImageError,
    UnsupportedFeatureError,
    about_file,
)
from qcow2_plugin.format.header import EncryptionMethod, Header, header_cluster_size
from qcow2_plugin.storage import Storage

_PROBE_SIZE = 512


def read_header(storage: Storage) -> Header:
    """The header of the image in `storage`. Raises what `Header.parse` does, with the file's name; OSError."""
    with about_file(storage.path):
        return Header.parse(storage.pread(header_cluster_size(storage.pread(_PROBE_SIZE, 0)), 0))


def refusals(header: Header) -> Iterator[Qcow2Error]:
    """What speaks against reading guest data of an image with this header, whatever else is in the file."""
    try:
        header.require_known_features()
    except UnsupportedFeatureError as error:
        yield error
    if header.encryption_method is not EncryptionMethod.NONE:
        yield UnsupportedFeatureError(
            f"the image is encrypted ({header.encryption_method.name}), which is not supported"
        )
    if header.data_file_raw and not header.has_data_file:
        yield CorruptImageError("header", "the raw data file bit is set without a data file")


def read_structure(storage: Storage, structure: str, host_offset: int, length: int) -> bytes:
    """All `length` bytes of a structure. Raises TruncatedImageError if the file ends before; OSError."""
    if host_offset + length > storage.size():  # before any memory is taken for it
        raise TruncatedImageError(
            structure,
            "lies past the end of the file: the image is truncated",
            host_offset=host_offset,
            file=storage.path,
        )
    return storage.pread(length, host_offset)
