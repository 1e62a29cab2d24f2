"""Manifests: what is written is read again, and what others have written is believed within limits only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2_plugin.adapters.backup import manifest as manifests
from qcow2_plugin.adapters.backup import names
from qcow2_plugin.adapters.backup.model import Level, Manifest, Member
from qcow2_plugin.errors import ManifestError

POINT = "20261125t131500z-0007"
PARENT = "20261124t131500z-0006"
FULL = Member(
    disk="root",
    level=Level.FULL,
    reason="there is no bitmap",
    virtual_size=1 << 30,
    file=f"{POINT}.root.qcow2",
    file_size=327680,
    file_digest="ab" * 32,
    parent_point=None,
    parent_file=None,
    bitmap="qcow2-backup.0123abcd.x",
    content_digest="cd" * 32,
    leaves_file=f"{POINT}.root.leaves",
    options={"cluster_size": 65536, "data_file_raw": True},
    source="/images/root \u202e.qcow2",
    fingerprint={"inode": 1, "size": 2, "mtime_ns": 3},
)
INCREMENT = replace(
    FULL,
    disk="data-1",
    level=Level.INCREMENTAL,
    file=f"{POINT}.data-1.qcow2",
    leaves_file=None,
    parent_point=PARENT,
    parent_file=f"{PARENT}.data-1.qcow2",
    fingerprint=None,
)
WHOLE = Manifest(
    repository_id="0123abcd",
    point=POINT,
    sequence=7,
    created=1_795_612_500,
    members=(FULL, INCREMENT),
    labels={"job": "nightly"},
    extra={"signer": {"key": [1, 2.5, None]}},
)


def test_what_is_packed_is_read_again() -> None:
    assert manifests.unpack(manifests.pack(WHOLE)) == WHOLE
    merged = replace(WHOLE, revision=2, members=(replace(FULL, file=f"{POINT}.root.r2.qcow2"), INCREMENT))
    assert manifests.unpack(manifests.pack(merged)) == merged


def resealed(change: Callable[[dict[str, Any]], object], whole: Manifest = WHOLE) -> bytes:
    """A manifest that somebody has changed, with a right digest."""
    content = json.loads(manifests.pack(whole))
    del content["digest"]
    change(content)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["digest"] = hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()
    return json.dumps(content).encode()


def of_member(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["members"][1].update(fields)


def test_a_resealed_manifest_is_right() -> None:
    assert manifests.unpack(resealed(lambda content: None)) == WHOLE


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda content: content.update(format=2), "newer version"),
        (lambda content: content.update(surprise=1), "surprise"),
        (lambda content: content.pop("labels"), "labels"),
        (lambda content: content.update(repository_id="../up"), "no id"),
        (lambda content: content.update(point="20261125t131500z-0008"), "is not number 7"),
        (lambda content: content.update(point="latest"), "is no point"),
        (lambda content: content.update(sequence=True), "no number"),
        (lambda content: content.update(created=-1), "no number"),
        (lambda content: content.update(created=1 << 64), "no number"),
        (lambda content: content.update(created=1 << 62), "year"),
        (lambda content: content.update(labels=[]), "no JSON object"),
        (lambda content: content.update(labels={"x": 1}), "a label"),
        (lambda content: content.update(labels={"x": "y" * 5000}), "a label"),
        (lambda content: content.update(extra=nested(3)), "no JSON object"),
        (lambda content: content.update(extra={"x": nested(20)}), "nested"),
        (lambda content: content.update(members=[]), "no member"),
        (lambda content: content.update(members={}), "no list"),
        (lambda content: content["members"].append(3), "no JSON object"),
        (lambda content: content["members"].append(content["members"][0]), "twice"),
        (of_member(disk="../../etc"), "no name for a disk"),
        (of_member(disk="Root"), "no name for a disk"),
        (of_member(level="huge"), "no level"),
        (of_member(level=[]), "no level"),
        (of_member(file="../../etc/shadow"), "no file of disk data-1"),
        (of_member(file="/etc/shadow"), "no file of disk data-1"),
        (of_member(file=f"{POINT}.root.qcow2"), "no file of disk data-1"),
        (of_member(file=f"{POINT}.data-1.r1.qcow2"), "no file of disk data-1"),
        (of_member(file_size="many"), "no number"),
        (of_member(file_digest="xyz"), "no digest"),
        (of_member(leaves_file=f"{POINT}.root.leaves"), "no leaves"),
        (of_member(level="full"), "a full member has no parent"),
        (of_member(parent_file=None), "any other has one"),
        (of_member(parent_point=None), "any other has one"),
        (of_member(level="full", parent_point=None), "a full member has no parent"),
        (of_member(parent_point=POINT, parent_file=f"{POINT}.data-1.qcow2"), "is not older"),
        (of_member(parent_file="disk.qcow2"), "no file of its parent"),
        (of_member(options=3), "no JSON object"),
        (of_member(fingerprint={"inode": "x"}), "no number"),
        (of_member(fingerprint=[]), "no JSON object"),
    ],
)
def test_what_cannot_be_is_refused(change: Callable[[dict[str, Any]], object], told: str) -> None:
    with pytest.raises(ManifestError, match=told):
        manifests.unpack(resealed(change))


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"[]",
        b"\xff",
        b"null",
        b'{"format": 1}',
        b'{"format": 1, "format": 1}',
        b'{"format": NaN}',
        b'{"format": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"x":' * 100_000,
        b" " * (manifests.MAX_SIZE + 1),
    ],
    ids=range(11),
)
def test_what_is_no_manifest_is_refused(packed: bytes) -> None:
    with pytest.raises(ManifestError):
        manifests.unpack(packed)


def test_a_changed_byte_is_noticed() -> None:
    packed = manifests.pack(WHOLE)
    changed = packed.replace(b"nightly", b"nighty ")
    with pytest.raises(ManifestError, match="digest"):
        manifests.unpack(changed)


def test_what_a_plugin_adds_must_be_json() -> None:
    for extra in ({"x": object()}, {"x": float("nan")}, {"x": {1, 2}}):
        with pytest.raises(ManifestError):
            manifests.pack(replace(WHOLE, extra=extra))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.sampled_from(sorted(json.loads(manifests.pack(WHOLE)))), _JSON)
def test_any_value_of_a_field_is_taken_or_refused(field: str, value: Any) -> None:
    taken_or_refused(lambda content: content.update({field: value}))


@given(st.sampled_from(sorted(json.loads(manifests.pack(WHOLE))["members"][0])), _JSON)
def test_any_value_of_a_member_is_taken_or_refused(field: str, value: Any) -> None:
    taken_or_refused(of_member(**{field: value}))


def taken_or_refused(change: Callable[[dict[str, Any]], object]) -> None:
    try:
        manifests.pack(manifests.unpack(resealed(change)))
    except ManifestError as error:
        assert str(error).isprintable()


@given(st.binary(max_size=200))
def test_any_bytes_raise_nothing_else(packed: bytes) -> None:
    with pytest.raises(ManifestError):
        manifests.unpack(packed)


def test_names_tell_what_they_are_of() -> None:
    assert names.point_id(1_795_612_500, 7) == "20261125t131500z-0007"
    assert names.manifest_of(names.manifest_name(POINT)) == (POINT, 0)
    assert names.manifest_of(names.manifest_name(POINT, 3)) == (POINT, 3)
    for name in (names.member_name(POINT, "a"), names.member_name(POINT, "a", 2), names.leaves_name(POINT, "a")):
        assert names.point_of(name) == POINT
        assert names.manifest_of(name) is None
    for name in ("repository.json", "notes.txt", "disk.qcow2", f"{POINT}", f"x{POINT}.root.qcow2"):
        assert names.point_of(name) is None


@pytest.mark.parametrize("fields", [{"revision": 1 << 62}, {"created": 1 << 62}])
def test_huge_numbers_cost_nothing_and_are_refused_where_they_are_none(fields: dict[str, Any]) -> None:
    content = manifests.plain(replace(WHOLE, **fields))
    content["digest"] = manifests._digest(content)
    packed = json.dumps(content).encode()
    if "revision" in fields:
        assert manifests.unpack(packed).revision == 1 << 62
        return
    with pytest.raises(ManifestError, match="year"):
        manifests.unpack(packed)
