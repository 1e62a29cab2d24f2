"""A key of a restic repository that is soon derived from its passphrase.

restic spends half a second on that in every call, which protects repositories and makes their tests slow. The key file
is opened as restic's design document tells, and sealed again with the least work that scrypt can be asked for.

Source: restic's doc/design.rst, "Keys, Encryption and MAC".
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

_LEAST_N = 2
_MAC = 16


class _Keys(NamedTuple):
    encryption: bytes
    mac_key: bytes
    mac_r: bytes


def weaken(repository: Path, passphrase: str) -> None:
    """Nothing happens where openssl is not installed."""
    if shutil.which("openssl") is None:
        return
    (file,) = (repository / "keys").iterdir()
    key = json.loads(file.read_bytes())
    salt = base64.b64decode(key["salt"])
    master = _opened(base64.b64decode(key["data"]), _derived(passphrase, salt, key["N"], key["r"], key["p"]))
    key["N"], key["r"], key["p"] = _LEAST_N, 1, 1
    key["data"] = base64.b64encode(_sealed(master, _derived(passphrase, salt, _LEAST_N, 1, 1))).decode()
    content = json.dumps(key).encode()
    file.with_name(hashlib.sha256(content).hexdigest()).write_bytes(content)
    file.unlink()


def _derived(passphrase: str, salt: bytes, n: int, r: int, p: int) -> _Keys:
    derived = hashlib.scrypt(passphrase.encode(), salt=salt, n=n, r=r, p=p, dklen=64, maxmem=1 << 30)
    return _Keys(derived[:32], derived[32:48], derived[48:])


def _opened(sealed: bytes, keys: _Keys) -> bytes:
    nonce, hidden, mac = sealed[:16], sealed[16:-_MAC], sealed[-_MAC:]
    assert hmac.compare_digest(mac, _poly1305(hidden, keys, nonce))
    return _aes("-aes-256-ctr", keys.encryption, hidden, nonce)


def _sealed(plain: bytes, keys: _Keys) -> bytes:
    nonce = os.urandom(16)
    hidden = _aes("-aes-256-ctr", keys.encryption, plain, nonce)
    return nonce + hidden + _poly1305(hidden, keys, nonce)


def _poly1305(message: bytes, keys: _Keys, nonce: bytes) -> bytes:
    """Poly1305-AES: RFC 8439, 2.5, with the nonce under AES as its s."""
    r = int.from_bytes(keys.mac_r, "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    s = int.from_bytes(_aes("-aes-128-ecb", keys.mac_key, nonce), "little")
    total = 0
    for start in range(0, len(message), 16):
        total = (total + int.from_bytes(message[start : start + 16] + b"\1", "little")) * r % ((1 << 130) - 5)
    return ((total + s) % (1 << 128)).to_bytes(16, "little")


def _aes(cipher: str, key: bytes, content: bytes, nonce: bytes = b"") -> bytes:
    command = ["openssl", "enc", cipher, "-nopad", "-K", key.hex(), *(["-iv", nonce.hex()] if nonce else [])]
    return subprocess.run(command, input=content, capture_output=True, check=True).stdout
