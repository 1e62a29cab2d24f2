"""The files of one backing chain, opened one after the other from the top down.

Only the top image and its data file are ever opened for writing: what lies below may be shared with other overlays.

Every name that an image brings goes through the opener, seen from the top image's directory, so that a confined chain
as a whole stays below it. `References`, if there are any, are asked about each name: whether they know where the file
is, and if not, whether that which was found as usual may be opened. No file may appear twice, whatever its names, which
rules out loops; and no format is guessed, because whoever fills a raw disk chooses what its first bytes look like.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

from qcow2_plugin.errors import MissingReferenceError, ReferenceDeniedError, UnsupportedFeatureError, printable
from qcow2_plugin.format.header import Header
from qcow2_plugin.format.transaction import MAX_RECORD_SIZE
from qcow2_plugin.storage import Storage
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.opener import Identity, Policy, Vet, open_given, open_reference

MAX_DEPTH = 64
"""Layers of a chain, the top one and a raw bottom included."""

Path = str | os.PathLike[str]

_Kept = TypeVar("_Kept", bound=Storage)


class Reference(NamedTuple):
    """A name in an image: `referrer`, the path of that image, names its `role` ("data file", "backing file").

    `depth` is that of the file: 1 is what belongs to the top image, as its data file. `writable` says whether it is
    to be written to, `policy` what is followed as usual.
    """

    role: str
    name: bytes
    referrer: str
    depth: int
    writable: bool
    policy: Policy


class References(Protocol):
    """Whoever knows more about names in images than a policy can say."""

    def open(self, reference: Reference, vet: Vet) -> Storage | None:
        """The file that is meant, open and locked, for which `vet` raised nothing; None to look it up as usual."""

    def authorize(self, reference: Reference, identity: Identity, path: str) -> None:
        """Raises ReferenceDeniedError unless the file, which was looked up as usual by `path`, may be opened."""


class ChainFiles:
    """Opens the files of one chain and keeps them in `resources`.

    `writable` opens the top image and its data file for writing, too, and `force_share` has no say in that. `policy` is
    for names found in images, which start at `base_directory` (None: the top image's directory). `backing_format` is
    for backing files whose format is not recorded. `references` are asked about these names, except where a record of
    a transaction is.
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
        references: References | None = None,
    ) -> None:
        self._resources = resources
        self._policy = policy
        self._writable = writable
        self._directory = None if base_directory is None else os.fspath(base_directory)
        self._below = b""
        self._backing_format = backing_format
        self._force_share = force_share
        self._references = references
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

    def open_data_file(self, header: Header, image: Storage, given: Path | None = None) -> Storage | None:
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
        reference = self._reference(header.data_file, "data file", image)
        return self._open_located(reference) or self._open_named(reference)

    def open_backing_file(
        self, header: Header, image: Storage, given: Path | None = None
    ) -> tuple[Storage, str] | None:
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
            opened: Storage | None = self._open_given(given, "backing file")
        else:
            opened = self._open_located(self._reference(header.backing_file, "backing file", image))
        if opened is not None:
            self._directory, self._below = os.path.dirname(opened.path), b""
            return opened, backing_format
        opened = self._open_named(self._reference(header.backing_file, "backing file", image))
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

    def _reference(self, name: bytes, role: str, image: Storage) -> Reference:
        return Reference(role, name, image.path, self._depth, self._opens_writable, self._policy)

    def _open_located(self, reference: Reference) -> Storage | None:
        """The file, if it is where only the `References` know."""
        if self._references is None:
            return None
        opened = self._references.open(reference, partial(self._refuse_twice, reference.role))
        return None if opened is None else self._keep(opened, reference.role)

    def _open_named(self, reference: Reference) -> Storage:
        opened = open_reference(
            reference.name,
            reference.role,
            policy=self._policy,
            directory=self._directory or "",
            below=self._below,
            referrer=reference.referrer,
            writable=reference.writable,
            force_share=self._force_share,
            vet=partial(self._refuse_named, reference),
        )
        return self._keep(opened, reference.role)

    @property
    def _opens_writable(self) -> bool:
        return self._writable and self._depth == 1

    def _refuse_twice(self, role: str, identity: Identity, path: str) -> None:
        earlier = self._roles.get(identity)
        if earlier is not None:
            raise ReferenceDeniedError(f"the {role} is the same file as the {earlier} above it", file=path)

    def _refuse_named(self, reference: Reference, identity: Identity, path: str) -> None:
        self._refuse_twice(reference.role, identity, path)
        if self._references is not None:
            self._references.authorize(reference, identity, path)

    def _keep(self, storage: _Kept, role: str) -> _Kept:
        self._resources.callback(storage.close)
        self._roles[storage.identity] = role
        return storage
