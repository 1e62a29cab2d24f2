"""The files of one backing chain, opened one after the other from the top down.

Only the top image and its data file are ever opened for writing: what lies below may be shared with other overlays.

Every name that an image brings goes through the opener, seen from the top image's directory, so that a confined chain
as a whole stays below it. No file may appear twice, whatever its names, which rules out loops; and no format is
guessed, because whoever fills a raw disk chooses what its first bytes look like.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial

from qcow2_plugin.errors import MissingReferenceError, ReferenceDeniedError, UnsupportedFeatureError, printable
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.transaction import MAX_RECORD_SIZE
from qcow2_plugin.storage import Storage
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.opener import Identity, Policy, open_given, open_reference

MAX_DEPTH = 64
"""Layers of a chain, the top one and a raw bottom included."""

Path = str | os.PathLike[str]


class ChainFiles:
    """Opens the files of one chain and keeps them in `resources`.

    `writable` opens the top image and its data file for writing, too, and `force_share` has no say in that. `policy` is
    for names found in images, which start at `base_directory` (None: the top image's directory). `backing_format` is
    for backing files whose format is not recorded.
    """

    def __init__(
        self,
        resources: ExitStack,
        *,
        policy: Policy,
        writable: bool = False,
        base_directory: Path | None = None,
        backing_format: str | None = None,
        force_share: bool = False,
    ) -> None:
        self._resources = resources
        self._policy = policy
        self._writable = writable
        self._directory = None if base_directory is None else os.fspath(base_directory)
        self._below = b""
        self._backing_format = backing_format
        self._force_share = force_share
        self._roles: dict[Identity, str] = {}
        self._depth = 1

    def open_top(self, path: Path) -> FileStorage:
        """The image that the caller names. Raises as `open_given` does."""
        if self._directory is None:
            self._directory = os.path.dirname(os.fspath(path))
        return self._open_given(path, "image")

    def start_at(self, image: FileStorage) -> None:
        """The top image, which the caller has open already, and closes."""
        if self._directory is None:
            self._directory = os.path.dirname(image.path)
        self._roles[image.identity] = "image"

    def open_data_file(self, header: Header, image: Storage, given: Path | None = None) -> FileStorage | None:
        """The external data file of `image`, which has `header`; None if it keeps its data itself.

        `given` is opened instead of what the image names. Raises as the opener does; MissingReferenceError if nobody
        names the file; ReferenceDeniedError if it belongs to the chain already, or is given and not wanted.
        """
        if not header.has_data_file:
            if given is not None:
                raise ReferenceDeniedError("the image has no external data file to name", file=image.path)
            return None
        if given is not None:
            return self._open_given(given, "data file")
        if header.data_file is None:
            raise MissingReferenceError(
                "the image needs an external data file but does not name it; name it yourself (option data-file)",
                file=image.path,
            )
        return self._open_named(header.data_file, "data file", image)

    def open_backing_file(
        self, header: Header, image: Storage, given: Path | None = None
    ) -> tuple[FileStorage, str] | None:
        """The backing file of `image`, which has `header`, and its format; None if there is none.

        `given` is opened instead of what the image names. Raises as `open_data_file` does; ReferenceDeniedError if the
        format is unknown or the chain too deep, UnsupportedFeatureError if the format is neither qcow2 nor raw.
        """
        if header.backing_file is None:
            if given is not None:
                raise ReferenceDeniedError("the image has no backing file to name", file=image.path)
            return None
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ReferenceDeniedError(f"the backing chain is deeper than {MAX_DEPTH} files", file=image.path)
        backing_format = self._format_of_backing(header, image)
        if given is not None:
            opened = self._open_given(given, "backing file")
            self._directory, self._below = os.path.dirname(os.fspath(given)), b""
        else:
            opened = self._open_named(header.backing_file, "backing file", image)
            self._below = os.path.dirname(os.path.join(self._below, header.backing_file))
        return opened, backing_format

    def read_record(self, name: bytes, image: Storage) -> bytes:
        """The transaction record that the top image names, or enough of it to see that it is none.

        Raises as the opener does; OSError.
        """
        record = open_reference(
            name, "transaction record", policy=self._policy, directory=self._directory or "", referrer=image.path
        )
        try:
            return record.pread(MAX_RECORD_SIZE + 1, 0)
        finally:
            record.close()

    def _format_of_backing(self, header: Header, image: Storage) -> str:
        if header.backing_format is not None:
            backing_format = os.fsdecode(header.backing_format)
        elif self._backing_format is not None:
            backing_format = self._backing_format
        else:
            raise ReferenceDeniedError(
                "the format of the backing file is not recorded and is not guessed; record it with "
                "'qemu-img rebase -u -F FORMAT -b FILE', or say it (option backing-format)",
                file=image.path,
            )
        if backing_format not in ("qcow2", "raw"):
            raise UnsupportedFeatureError(
                f'backing file format "{printable(backing_format)}" is not supported', file=image.path
            )
        return backing_format

    def _open_given(self, path: Path, role: str) -> FileStorage:
        opened = open_given(
            path, writable=self._opens_writable, force_share=self._force_share, vet=partial(self._refuse_twice, role)
        )
        return self._keep(opened, role)

    def _open_named(self, name: bytes, role: str, image: Storage) -> FileStorage:
        opened = open_reference(
            name,
            role,
            policy=self._policy,
            directory=self._directory or "",
            below=self._below,
            referrer=image.path,
            writable=self._opens_writable,
            force_share=self._force_share,
            vet=partial(self._refuse_twice, role),
        )
        return self._keep(opened, role)

    @property
    def _opens_writable(self) -> bool:
        return self._writable and self._depth == 1

    def _refuse_twice(self, role: str, identity: Identity, path: str) -> None:
        earlier = self._roles.get(identity)
        if earlier is not None:
            raise ReferenceDeniedError(f"the {role} is the same file as the {earlier} above it", file=path)

    def _keep(self, storage: FileStorage, role: str) -> FileStorage:
        self._resources.callback(storage.close)
        self._roles[storage.identity] = role
        return storage
