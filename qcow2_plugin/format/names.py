"""Names of snapshots and bitmaps as text: they are bytes in an image, UTF-8 by convention, whatever the locale says."""


def to_bytes(name: str | bytes) -> bytes:
    """The name as it is stored."""
    return name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name


def to_text(name: bytes) -> str:
    """The name as text; bytes that are not UTF-8 become surrogates, so that `to_bytes` gives them back."""
    return name.decode("utf-8", "surrogateescape")
