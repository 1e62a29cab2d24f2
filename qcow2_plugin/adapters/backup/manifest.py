"""Manifests: a point as JSON, and JSON as a point, whoever has written it.

What is read is held against the limits here before it is believed: a manifest may come from a target that others write
to. No name in it leads anywhere but to a file of its own point (`names`). A digest of the whole is part of it, against
decay and not against people.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from qcow2_plugin.adapters.backup import names
from qcow2_plugin.adapters.backup.model import Level, Manifest, Member
from qcow2_plugin.errors import ManifestError, printable

FORMAT = 1
MAX_SIZE = 8 << 20
"""Bytes of a manifest."""
MAX_MEMBERS = 4096
_MAX_TEXT = 4096
_MAX_NUMBER = (1 << 63) - 1
_MAX_DEPTH = 16
_END_OF_TIME = 253_402_300_800
"""The year 10000, as seconds since 1970."""
_HEX = re.compile(r"(?:[0-9a-f]{2}){8,64}")

_Value = TypeVar("_Value")


def pack(manifest: Manifest) -> bytes:
    """The file of a point. Raises ManifestError if it could not be read again."""
    content = plain(manifest)
    content["digest"] = _digest(content)
    try:
        packed = json.dumps(content, indent=1, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ManifestError(f"what a plugin has added to the manifest is not JSON: {error}") from error
    unpack(packed)
    return packed


def unpack(packed: bytes) -> Manifest:
    """The point that `packed` tells of. Raises ManifestError."""
    content = parse_object(packed, MAX_SIZE)
    if content.get("format") != FORMAT:
        raise ManifestError(f"format {printable(str(content.get('format')))} is not {FORMAT}; use a newer version")
    if content.pop("digest", None) != _digest(content):
        raise ManifestError("it does not have the digest that it tells: it was damaged, or edited")
    del content["format"]
    _require_keys(content, Manifest)
    members = _list(content, "members", MAX_MEMBERS)
    manifest = Manifest(
        repository_id=names.check_repository(_text(content, "repository_id")),
        point=_text(content, "point"),
        sequence=_number(content, "sequence"),
        created=_number(content, "created"),
        revision=_number(content, "revision"),
        members=tuple(_member(member) for member in members),
        labels={key: _checked_text(value, "a label") for key, value in _object(content, "labels").items()},
        extra=_object(content, "extra"),
    )
    _check(manifest)
    return manifest


def parse_object(packed: bytes, limit: int) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes, without names that are there twice. Raises ManifestError."""
    if len(packed) > limit:
        raise ManifestError(f"it is longer than {limit} bytes")
    try:
        content = json.loads(packed.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"it is no JSON: {printable(str(error))}") from error
    if not isinstance(content, dict):
        raise ManifestError("it is no JSON object")
    _require_shallow(content, _MAX_DEPTH)
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _require_shallow(value: Any, depth: int) -> None:
    if not isinstance(value, dict | list):
        return
    if not depth:
        raise ManifestError(f"it is nested deeper than {_MAX_DEPTH} levels")
    inner: Iterable[Any] = value.values() if isinstance(value, dict) else value
    for one in inner:
        _require_shallow(one, depth - 1)


def plain(manifest: Manifest) -> dict[str, Any]:
    """All that a manifest tells, as JSON has it."""
    members = [dataclasses.asdict(member) | {"level": member.level.value} for member in manifest.members]
    return {"format": FORMAT} | dataclasses.asdict(manifest) | {"members": members}


def _digest(content: dict[str, Any]) -> str:
    try:
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ManifestError(f"it cannot be written as JSON: {printable(str(error))}") from error
    return hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _require_keys(content: dict[str, Any], shape: type) -> None:
    expected = {field.name for field in dataclasses.fields(shape)}
    missing = sorted(expected - content.keys())
    unknown = sorted(content.keys() - expected)
    if missing or unknown:
        raise ManifestError(f"it lacks {missing} or has what is not known, {printable(str(unknown))}")


def _member(content: Any) -> Member:
    if not isinstance(content, dict):
        raise ManifestError("a member is no JSON object")
    _require_keys(content, Member)
    try:
        level = Level(content["level"])
    except ValueError as error:
        raise ManifestError(f"{printable(str(content['level']))!r} is no level") from error
    return Member(
        disk=names.check_disk(_text(content, "disk")),
        level=level,
        reason=_optional(content, "reason", _text),
        virtual_size=_number(content, "virtual_size"),
        file=_text(content, "file"),
        file_size=_number(content, "file_size"),
        file_digest=_optional(content, "file_digest", _hexadecimal),
        parent_point=_optional(content, "parent_point", _text),
        parent_file=_optional(content, "parent_file", _text),
        bitmap=_optional(content, "bitmap", _text),
        content_digest=_optional(content, "content_digest", _hexadecimal),
        leaves_file=_optional(content, "leaves_file", _text),
        options=_object(content, "options"),
        source=_text(content, "source"),
        fingerprint=_optional(content, "fingerprint", _fingerprint),
    )


def _optional(content: dict[str, Any], key: str, read: Callable[[dict[str, Any], str], _Value]) -> _Value | None:
    return None if content[key] is None else read(content, key)


def _checked_text(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise ManifestError(f"{what} is no text of at most {_MAX_TEXT} characters")
    return value


def _text(content: dict[str, Any], key: str) -> str:
    return _checked_text(content[key], key)


def _hexadecimal(content: dict[str, Any], key: str) -> str:
    value = _text(content, key)
    if not _HEX.fullmatch(value):
        raise ManifestError(f"{key} is no digest in hexadecimal")
    return value


def _checked_number(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_NUMBER:
        raise ManifestError(f"{what} is no number from 0 to {_MAX_NUMBER}")
    return value


def _number(content: dict[str, Any], key: str) -> int:
    return _checked_number(content[key], key)


def _object(content: dict[str, Any], key: str) -> dict[str, Any]:
    value = content[key]
    if not isinstance(value, dict) or any(len(name) > _MAX_TEXT for name in value):
        raise ManifestError(f"{key} is no JSON object")
    return value


def _list(content: dict[str, Any], key: str, limit: int) -> list[Any]:
    value = content[key]
    if not isinstance(value, list) or len(value) > limit:
        raise ManifestError(f"{key} is no list of at most {limit}")
    return value


def _fingerprint(content: dict[str, Any], key: str) -> dict[str, int]:
    return {name: _checked_number(value, f"{key}: {name}") for name, value in _object(content, key).items()}


def _check(manifest: Manifest) -> None:
    """Raises ManifestError unless all names are those of this point, and the members are different disks'."""
    if names.sequence_of(manifest.point) != manifest.sequence:
        raise ManifestError(f"point {manifest.point} is not number {manifest.sequence}")
    if manifest.created >= _END_OF_TIME:
        raise ManifestError("it was made after the year 9999")
    if not manifest.members:
        raise ManifestError("it has no member")
    disks = [member.disk for member in manifest.members]
    if len(set(disks)) != len(disks):
        raise ManifestError("a disk is in it twice")
    for member in manifest.members:
        _check_member(manifest, member)


def _check_member(manifest: Manifest, member: Member) -> None:
    revision = names.revision_of(member.file, manifest.point, member.disk)
    if revision is None or revision > manifest.revision:
        raise ManifestError(f"{printable(member.file)!r} is no file of disk {member.disk} at this point")
    if member.leaves_file not in (None, names.leaves_name(manifest.point, member.disk)):
        raise ManifestError(f"{printable(str(member.leaves_file))!r} are no leaves of disk {member.disk} at this point")
    is_full = member.level is Level.FULL
    if is_full != (member.parent_point is None) or is_full != (member.parent_file is None):
        raise ManifestError(f"disk {member.disk}: a full member has no parent, and any other has one")
    if member.parent_point is None:
        return
    if names.sequence_of(member.parent_point) >= manifest.sequence:
        raise ManifestError(f"disk {member.disk}: its parent {member.parent_point} is not older")
    if member.parent_file != names.member_name(member.parent_point, member.disk):
        raise ManifestError(f"disk {member.disk}: {printable(str(member.parent_file))!r} is no file of its parent")
