"""The LUKS1 header inside an encrypted image, as far as it can be read without a secret.

Digests, salts and key material are not looked at.

Source: LUKS On-Disk Format Specification 1.2.1, "PHDR"; docs/interop/qcow2.rst, "Full disk encryption header pointer".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from qcow2_plugin.errors import CorruptImageError, UnsupportedFeatureError
from qcow2_plugin.format.geometry import SECTOR_SIZE

HEADER_LENGTH = 592
SLOT_COUNT = 8
_MAGIC = b"LUKS\xba\xbe"
_FIXED = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")
_SLOT_ACTIVE = 0x00AC71F3
_SLOT_INACTIVE = 0x0000DEAD
_MAX_KEY_LENGTH = 128
_ONE_SIZE_CIPHERS = {"des": "des", "des3_ede": "3des"}


@dataclass(frozen=True, slots=True)
class KeySlot:
    """One place for a secret; `key_offset` in bytes from the start of the LUKS area."""

    active: bool
    iterations: int
    key_offset: int
    stripes: int


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """`cipher`, `mode` and `hash` as stored; `payload_offset` in bytes from the start of the LUKS area."""

    cipher: str
    mode: str
    hash: str
    payload_offset: int
    key_length: int
    """Bytes of the master key."""
    master_key_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...]

    @classmethod
    def parse(cls, area: bytes) -> LuksHeader:
        """The header that `area` begins with. Raises CorruptImageError, UnsupportedFeatureError (version)."""
        if len(area) < HEADER_LENGTH:
            raise _corrupt("is cut off")
        magic, version, cipher, mode, hash_name, payload, key_length, _digest, _salt, iterations, uuid = (
            _FIXED.unpack_from(area)
        )
        if magic != _MAGIC:
            raise _corrupt("does not begin with the magic of LUKS")
        if version != 1:
            raise UnsupportedFeatureError(f"LUKS version {version} is not supported, only 1 is")
        if not 0 < key_length <= _MAX_KEY_LENGTH:
            raise _corrupt(f"has a master key of {key_length} bytes")
        return cls(
            _text(cipher, "cipher name"),
            _text(mode, "cipher mode"),
            _text(hash_name, "hash"),
            payload * SECTOR_SIZE,
            key_length,
            iterations,
            _text(uuid, "UUID"),
            tuple(_parse_slot(area, index) for index in range(SLOT_COUNT)),
        )

    @property
    def cipher_algorithm(self) -> str:
        """Cipher with the size of its key in bits, as "aes-256"; XTS has two keys."""
        bits = self.key_length * 8 // (2 if self.cipher_mode == "xts" else 1)
        return _ONE_SIZE_CIPHERS.get(self.cipher, f"{self.cipher}-{bits}")

    @property
    def cipher_mode(self) -> str:
        """The first part of `mode`: "xts" of "xts-plain64"."""
        return self.mode.partition("-")[0]

    @property
    def iv_generator(self) -> str:
        """The second part of `mode`: "essiv" of "cbc-essiv:sha256"."""
        return self.mode.partition("-")[2].partition(":")[0]

    @property
    def iv_hash(self) -> str | None:
        """The last part of `mode`: "sha256" of "cbc-essiv:sha256", None if it has none."""
        return self.mode.partition(":")[2] or None


def _parse_slot(area: bytes, index: int) -> KeySlot:
    state, iterations, _salt, key_sector, stripes = _SLOT.unpack_from(area, _FIXED.size + index * _SLOT.size)
    if state not in (_SLOT_ACTIVE, _SLOT_INACTIVE):
        raise _corrupt(f"key slot {index} has state {state:#x}")
    return KeySlot(state == _SLOT_ACTIVE, iterations, key_sector * SECTOR_SIZE, stripes)


def _text(stored: bytes, what: str) -> str:
    text, terminator, _ = stored.partition(b"\0")
    if not terminator:
        raise _corrupt(f"has a {what} without end")
    return text.decode(errors="surrogateescape")


def _corrupt(detail: str) -> CorruptImageError:
    return CorruptImageError("LUKS header", detail)
