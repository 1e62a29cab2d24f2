"""A secret: what must not be seen in a log, a trace, an error or a list of processes."""

from __future__ import annotations

from typing import NoReturn


class Secret:
    """Bytes that only who asks for them by `reveal` gets to see.

    Neither `repr`, `str` nor `format` show them, nor can a copy be pickled, so that whatever prints or keeps its
    arguments does no harm. `wipe` overwrites them; copies that `reveal` gave are the caller's to forget.
    """

    __slots__ = ("_content",)

    def __init__(self, content: bytes) -> None:
        self._content = bytearray(content)

    def reveal(self) -> bytes:
        """The secret itself."""
        return bytes(self._content)

    def wipe(self) -> None:
        """Overwrite the secret with zeros, then forget that there was one; a second call does nothing."""
        self._content[:] = bytes(len(self._content))
        self._content.clear()

    def __repr__(self) -> str:
        return "Secret(redacted)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a secret is not stored")
