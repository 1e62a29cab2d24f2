"""Backup software that takes part in `qcow2 backup`: a vault in one SQLite file, and signed points.

    qcow2 backup disk.qcow2 --plugin examples/vendor_plugin.py --to vault:backups.sqlite --target-option key=file:KEY

A package would name this module as an entry point of the group "qcow2_plugin", and nobody would have to say --plugin.
"""

import hmac
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator

from qcow2_plugin.adapters.backup.hook_values import Complaint
from qcow2_plugin.adapters.backup.hookspecs import hookimpl
from qcow2_plugin.adapters.backup.model import Manifest
from qcow2_plugin.adapters.backup.secrets import Secret
from qcow2_plugin.adapters.backup.target import BackupTarget, check_name, exactly
from qcow2_plugin.errors import TargetError

QCOW2_PLUGIN_API = 1
_SCHEMA = """PRAGMA synchronous = EXTRA; CREATE TABLE IF NOT EXISTS blobs (name TEXT PRIMARY KEY);
    CREATE TABLE IF NOT EXISTS chunks (name TEXT, number INTEGER, content BLOB, PRIMARY KEY (name, number));"""
_keys: list[Secret] = []


class Vault(BackupTarget):
    """Blobs as rows of a database: what is stored in one transaction is there as a whole, or not at all."""

    def __init__(self, path: str) -> None:
        self.uri = f"vault:{path}"
        self._database = sqlite3.connect(path, isolation_level="IMMEDIATE", check_same_thread=False)
        self._database.executescript(_SCHEMA)

    def put(self, name: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        """Keep `size` bytes under `name`."""
        self.remove(name)
        self._change("INSERT INTO blobs VALUES (?)", name, exactly(chunks, size))

    def publish(self, name: str, content: bytes) -> None:
        """Keep `content` under a name that nothing has."""
        self._change("INSERT INTO blobs VALUES (?)", name, [content])

    def names(self) -> list[str]:
        """The names of all that is kept, sorted."""
        return [name for (name,) in self._database.execute("SELECT name FROM blobs ORDER BY name")]

    def get(self, name: str) -> Iterator[bytes]:
        """The content, in chunks."""
        if check_name(name) not in self.names():
            raise FileNotFoundError(2, "the vault has no such blob", name)
        stored = "SELECT content FROM chunks WHERE name = ? ORDER BY number"
        return (content for (content,) in self._database.execute(stored, (name,)))

    def remove(self, name: str) -> None:
        """Let nothing have this name any more."""
        self._change("DELETE FROM blobs WHERE name = ?", name, [])

    def close(self) -> None:
        """No other call comes any more."""
        self._database.close()

    def _change(self, statement: str, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        try:
            with self._database:  # commits, or takes everything back
                self._database.execute(statement, (check_name(name),))
                self._database.execute("DELETE FROM chunks WHERE name = ?", (name,))
                rows = ((name, *numbered) for numbered in enumerate(chunks))
                self._database.executemany("INSERT INTO chunks VALUES (?, ?, ?)", rows)
        except sqlite3.IntegrityError as error:
            raise FileExistsError(17, "the vault has that already", name) from error
        except sqlite3.Error as error:
            raise TargetError(f"the vault cannot store {name}: {error}") from error


@hookimpl
def qcow2_open_target(uri: str, options: dict[str, str], secret: Callable[[str, str], Secret]) -> Vault | None:
    """The vault, whose points are signed with the secret that its option `key` names."""
    if not uri.startswith("vault:"):
        return None
    _keys[:] = [secret(options["key"], uri)]
    return Vault(uri.removeprefix("vault:"))


@hookimpl
def qcow2_backup_prepare(manifest: Manifest) -> dict[str, str] | None:
    """What becomes part of the manifest. To raise in here would be to refuse the point."""
    return {"signature": _signature(manifest)} if _keys else None


@hookimpl
def qcow2_verify(manifest: Manifest) -> Iterator[Complaint]:
    """What `qcow2 verify` says about points of others, or changed ones."""
    if _keys and manifest.extra.get("vendor_plugin", {}).get("signature") != _signature(manifest):
        yield Complaint(disk=None, text="it is not signed with our key")


def _signature(manifest: Manifest) -> str:
    disks = [(each.disk, each.virtual_size, each.content_digest) for each in manifest.members]
    return hmac.digest(_keys[0].reveal(), json.dumps([manifest.point, disks]).encode(), "sha256").hex()
