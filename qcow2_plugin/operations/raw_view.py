"""The data file of an image as the raw disk that it is, for programs that know nothing of qcow2.

An external data file is all of the disk by itself only if the image promises so (raw data file bit), and only as long
as nobody changes either of the two files. So the header is judged as it is on disk, and both files stay locked as a
reader's for as long as the view is used. Nothing is written: the raw promise of an image that is open for writing
elsewhere would be somebody else's to keep. No data are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from qcow2_plugin.engine.files import ChainFiles, References
from qcow2_plugin.engine.header import read_header, refusals
from qcow2_plugin.errors import NoRawViewError, about_file, printable
from qcow2_plugin.format.header import EncryptionMethod, Header
from qcow2_plugin.storage.directory import absolute_path
from qcow2_plugin.storage.opener import Policy

Path = str | os.PathLike[str]


class RawView(NamedTuple):
    """A raw disk: the first `virtual_size` bytes of a file that has `file_size`, which may be more."""

    path: str
    """Absolute; the format of what it leads to is raw, and is not to be guessed."""
    virtual_size: int
    file_size: int


@contextmanager
def raw_view(
    path: Path,
    *,
    policy: Policy = Policy.CONFINED,
    data_file: Path | None = None,
    base_directory: Path | None = None,
    force_share: bool = False,
    references: References | None = None,
) -> Iterator[RawView]:
    """The raw disk in the data file of the image at `path`, to be read, never written, until the block ends.

    Whoever reads it must have done so by then: until then the locks keep writers from both files, but for
    `force_share`. The options are those of `open_image`.

    Raises NoRawViewError with the first reason why the data file is not the disk; what opening the files does,
    ImageLockedError among it. Source: docs/interop/qcow2.rst, "Raw external data".
    """
    with ExitStack() as resources:
        files = ChainFiles(
            resources, policy=policy, base_directory=base_directory, force_share=force_share, references=references
        )
        image = files.open_top(path)
        header = read_header(image)
        reason = _reason_against(header)
        if reason is not None:
            raise NoRawViewError(reason, file=image.path)
        with about_file(image.path):
            for refusal in refusals(header):
                raise refusal
        data = files.open_data_file(header, image, data_file)
        assert data is not None, "the header says that there is one"
        file_size = data.size()
        if file_size < header.virtual_size:
            raise NoRawViewError(
                f"the data file has {file_size} bytes, less than the disk of {header.virtual_size}: a raw reader would "
                "miss the rest, which reads as zeros",
                file=data.path,
            )
        yield RawView(absolute_path(data.path), header.virtual_size, file_size)


def _reason_against(header: Header) -> str | None:
    """Why the header does not make the data file the raw disk."""
    if not header.has_data_file:
        return "the image has no external data file, it keeps the disk itself"
    if header.corrupt:
        return "the image is marked as corrupt; repair it first with 'qcow2 check -r all'"
    if not header.data_file_raw:
        return "the image does not promise that its data file is a raw image of the disk (raw data file bit)"
    if header.encryption_method is not EncryptionMethod.NONE:
        return f"the image is encrypted ({header.encryption_method.name}), so its data file holds no plain disk"
    if header.backing_file is not None:
        return f'part of the disk may be in the backing file "{printable(header.backing_file)}"'
    return None
