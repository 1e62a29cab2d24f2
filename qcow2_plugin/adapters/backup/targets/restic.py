"""A restic repository (0.14 or newer) as a target: every blob is a snapshot with one file.

The snapshots have one host and one tag, so that others may be in the repository. restic reads from a pipe and takes its
end for the end of the file, so it is stopped before that when not everything came. Only what a kill of this process
leaves may be a part, and never under a published name: what is published comes from a file.

restic makes a second snapshot of a file without a word. So who publishes looks afterwards: if there is another one, his
own is removed again. Of two at one moment both may fail, never do both succeed; until then the older counts.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import datetime

from qcow2_plugin.adapters.backup.secrets import Secret
from qcow2_plugin.adapters.backup.target import BackupTarget, check_name, exactly, is_name, missing_blob, taken_name
from qcow2_plugin.adapters.backup.targets.program import Program, without_password
from qcow2_plugin.errors import TargetError, printable

_OURS = ("--host", "qcow2-plugin", "--tag", "qcow2-plugin")
_LOCK_WAIT = 60  # seconds, about
_BACKUP = ("backup", *_OURS, "--stdin", "--stdin-filename")


class ResticTarget(BackupTarget):
    """The snapshots in the repository at `location`, as restic writes it, made by `restic init` before. Without a
    passphrase restic finds it by its own means (RESTIC_PASSWORD_FILE, RESTIC_PASSWORD_COMMAND)."""

    def __init__(self, location: str, passphrase: Secret | None = None) -> None:
        self.uri = f"restic:{printable(without_password(location))}"
        place = Secret(location.encode()) if without_password(location) != location else None
        words = ["restic", "--quiet", f"--repo={location}" if place is None else "--repository-file=/dev/fd/{place}"]
        keyed = ["env", "-u", "RESTIC_PASSWORD_COMMAND", *words, "--password-file=/dev/fd/{fd}"]
        self._restic = Program("restic", keyed if passphrase else words, passphrase, place)

    def put(self, name: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        """As the base class says."""
        self.remove(name)
        self._restic.feed_or_kill(*_BACKUP, name, chunks=exactly(chunks, size))

    def publish(self, name: str, content: bytes) -> None:
        """As the base class says."""
        self._require_unused(name, kept=0)
        with tempfile.TemporaryFile() as file:
            file.write(content)
            file.seek(0)
            made = self._restic.feed_file(*_BACKUP, name, "--json", file=file)
        try:
            self._require_unused(name, kept=1)
        except FileExistsError:
            self._forget(json.loads(made)["snapshot_id"])
            raise

    def names(self) -> list[str]:
        """As the base class says."""
        return sorted({name for name, _ in self._snapshots() if is_name(name)})

    def get(self, name: str) -> Iterator[bytes]:
        """As the base class says."""
        if not (ids := self._ids(name)):
            raise missing_blob(name, self.uri)
        yield from self._restic.stream("dump", ids[0], f"/{name}")

    def remove(self, name: str) -> None:
        """As the base class says. Space is given back by `restic prune`."""
        if ids := self._ids(name):
            self._forget(*ids)

    def _forget(self, *ids: str) -> None:
        """Needs the repository for itself: waits for others, not for the dead."""
        for patience in reversed(range(_LOCK_WAIT)):
            try:
                self._restic.change("forget", *ids)
            except TargetError as error:
                if "already locked" not in error.detail or not patience:
                    raise
                self._restic.change("unlock")
                time.sleep(1)
            else:
                return

    def _require_unused(self, name: str, *, kept: int) -> None:
        if len(self._ids(name)) > kept:
            raise taken_name(name, self.uri)

    def _ids(self, name: str) -> list[str]:
        """The snapshots with this name, oldest first."""
        check_name(name)
        return [snapshot for other, snapshot in self._snapshots() if other == name]

    def _snapshots(self) -> list[tuple[str, str]]:
        """Names and ids, oldest first."""
        listed = json.loads(self._restic.list("snapshots", "--json", *_OURS))
        listed.sort(key=lambda snapshot: datetime.fromisoformat(snapshot["time"]))
        return [(snapshot["paths"][0].removeprefix("/"), snapshot["id"]) for snapshot in listed]
