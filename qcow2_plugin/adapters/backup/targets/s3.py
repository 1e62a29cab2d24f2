"""A bucket of an S3 store as a target, through obstore: every blob is an object below a prefix.

An object appears when its upload is completed, whole and durable. `publish` asks the store to refuse if the name is
there (If-None-Match), as AWS and the usual servers do. What a kill leaves of an upload is no object; a life cycle rule
of the bucket removes such parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from qcow2_plugin.adapters.backup.secrets import Secret
from qcow2_plugin.adapters.backup.target import BackupTarget, check_name, exactly, is_name, missing_blob, taken_name
from qcow2_plugin.errors import OptionError, TargetError, printable

if TYPE_CHECKING:
    from obstore.store import S3Config

_LEAST_PART = 8 << 20
_MOST_PARTS = 9000  # S3 allows 10000
_PARTS_AT_ONCE = 4
_CHUNK = 1 << 20


class S3Target(BackupTarget):
    """The objects of s3://BUCKET/PREFIX at the `endpoint`, which is AWS's if None.

    `credentials` are "KEY:SECRET"; without them they come from where AWS's tools look for them. Raises OptionError
    and TargetError.
    """

    def __init__(self, uri: str, endpoint: str | None = None, region: str | None = None, *, credentials: Secret | None):
        place = urlsplit(uri)
        if not place.netloc or "@" in place.netloc or place.query or place.fragment:
            raise OptionError("a place in S3 is written s3://BUCKET/PREFIX")
        self.uri = printable(uri)
        key, _, secret = credentials.reveal().decode().strip().partition(":") if credentials else ("", "", "")
        known = {"endpoint": endpoint, "region": region, "access_key_id": key, "secret_access_key": secret}
        with _translated(self.uri):
            self._store = S3Store(
                place.netloc,
                prefix=place.path.strip("/") or None,
                config=cast("S3Config", {name: value for name, value in known.items() if value}),
                client_options={"allow_http": (endpoint or "").startswith("http://")},
            )

    def put(self, name: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        """As the base class says."""
        self.remove(name)
        part = max(_LEAST_PART, -(-size // _MOST_PARTS))
        with _translated(name):
            obstore.put(self._store, name, exactly(chunks, size), chunk_size=part, max_concurrency=_PARTS_AT_ONCE)

    def publish(self, name: str, content: bytes) -> None:
        """As the base class says."""
        with _translated(check_name(name)):
            try:
                obstore.put(self._store, name, content, mode="create", use_multipart=False)
            except AlreadyExistsError as error:
                raise taken_name(name, self.uri) from error

    def names(self) -> list[str]:
        """As the base class says."""
        with _translated("the list"):
            return sorted(
                kept["path"] for batch in obstore.list(self._store) for kept in batch if is_name(kept["path"])
            )

    def get(self, name: str) -> Iterator[bytes]:
        """As the base class says."""
        with _translated(check_name(name)):
            try:
                found = obstore.get(self._store, name)
            except FileNotFoundError as error:
                raise missing_blob(name, self.uri) from error
            yield from map(bytes, found.stream(min_chunk_size=_CHUNK))

    def remove(self, name: str) -> None:
        """As the base class says."""
        with _translated(check_name(name)):
            obstore.delete(self._store, name)


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, BaseError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # not the store's
            raise
        first_line, _, _ = str(error).partition("\n")
        raise TargetError(f"{what}: the store says: {printable(first_line)}") from error
