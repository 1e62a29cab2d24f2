"""format/luks: the LUKS1 header, field by field."""

from __future__ import annotations

import struct

import pytest

from qcow2_plugin.errors import CorruptImageError, Qcow2Error, UnsupportedFeatureError
from qcow2_plugin.format.luks import HEADER_LENGTH, LuksHeader

ACTIVE, INACTIVE = 0x00AC71F3, 0x0000DEAD


def header(
    *, magic: bytes = b"LUKS\xba\xbe", version: int = 1, cipher: bytes = b"aes", mode: bytes = b"xts-plain64",
    digest: bytes = b"sha256", payload: int = 4040, key_length: int = 64, states: tuple[int, ...] = (ACTIVE, INACTIVE),
    uuid: bytes = b"4811ce11",
) -> bytes:  # fmt: skip
    fixed = (magic, version, cipher, mode, digest, payload, key_length, bytes(20), bytes(32), 1000, uuid)
    packed = struct.pack(">6sH32s32s32sII20s32sI40s", *fixed)
    for slot in range(8):
        state = states[slot] if slot < len(states) else INACTIVE
        packed += struct.pack(">II32sII", state, 2000 + slot, bytes(32), 8 + 504 * slot, 4000)
    return packed


def test_every_field() -> None:
    parsed = LuksHeader.parse(header() + b"key material")
    assert (parsed.cipher_algorithm, parsed.cipher_mode, parsed.iv_generator) == ("aes-256", "xts", "plain64")
    assert (parsed.iv_hash, parsed.hash, parsed.uuid) == (None, "sha256", "4811ce11")
    assert (parsed.payload_offset, parsed.master_key_iterations) == (4040 * 512, 1000)
    assert [slot.active for slot in parsed.slots] == [True] + [False] * 7
    assert (parsed.slots[1].key_offset, parsed.slots[1].iterations) == (512 * 512, 2001)
    assert {slot.stripes for slot in parsed.slots} == {4000}


@pytest.mark.parametrize(
    ("cipher", "mode", "key_length", "expected"),
    [
        (b"aes", b"cbc-essiv:sha256", 32, ("aes-256", "essiv", "sha256")),
        (b"serpent", b"xts-plain", 32, ("serpent-128", "plain", None)),
        (b"des3_ede", b"cbc-plain64", 24, ("3des", "plain64", None)),
        (b"rot13", b"none", 1, ("rot13-8", "", None)),
    ],
)
def test_names_made_of_fields(
    cipher: bytes, mode: bytes, key_length: int, expected: tuple[str, str, str | None]
) -> None:
    parsed = LuksHeader.parse(header(cipher=cipher, mode=mode, key_length=key_length))
    assert (parsed.cipher_algorithm, parsed.iv_generator, parsed.iv_hash) == expected


@pytest.mark.parametrize(
    ("area", "match"),
    [
        (header()[:-1], "cut off"),
        (b"", "cut off"),
        (header(magic=b"LUKS\xba\xbf"), "magic"),
        (header(key_length=0), "0 bytes"),
        (header(key_length=2**32 - 1), "4294967295 bytes"),
        (header(cipher=b"a" * 32), "cipher name without end"),
        (header(mode=b"a" * 32), "cipher mode without end"),
        (header(digest=b"a" * 32), "hash without end"),
        (header(uuid=b"a" * 40), "UUID without end"),
        (header(states=(ACTIVE, 7)), "key slot 1 has state 0x7"),
    ],
)
def test_what_breaks_the_format_is_refused(area: bytes, match: str) -> None:
    with pytest.raises(CorruptImageError, match=match):
        LuksHeader.parse(area)


def test_version_2_is_not_supported() -> None:
    with pytest.raises(UnsupportedFeatureError, match="version 2"):
        LuksHeader.parse(header(version=2))


def test_any_byte_may_be_wrong() -> None:
    sound = header()
    for offset in range(HEADER_LENGTH):
        damaged = sound[:offset] + bytes([sound[offset] ^ 0xFF]) + sound[offset + 1 :]
        try:
            LuksHeader.parse(damaged)
        except Qcow2Error:
            continue
