"""The journal of a job: a small file that is there from before the first change until nothing is left to do.

Owns its form, and the moments at which it is durable. Refuses to know what has to be done about it: that says the
repository (was the point published?), and the bitmaps themselves tell what they lack (`rotation`). So a journal that is
lost costs nothing but what is at the target of a point that never was, and the hook that would have heard of it.

Who runs the job has the file locked. One that is there and not locked is of a job that did not end by itself.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from qcow2_plugin.adapters.backup import names
from qcow2_plugin.adapters.backup.manifest import parse_object
from qcow2_plugin.adapters.backup.model import DiskRequest, Job
from qcow2_plugin.errors import BackupError, ImageLockedError, ManifestError, OptionError, printable
from qcow2_plugin.storage import directory
from qcow2_plugin.storage.device import is_device
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.opener import create_given, open_given

FORMAT = 1
MAX_SIZE = 1 << 20
_RECORD_ENDING = ".bitmaps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What a journal tells. `started` is seconds since 1970, UTC; `target` is where the point was to be kept."""

    job_id: str
    repository_id: str
    point: str
    target: str
    started: int
    disks: tuple[DiskRequest, ...]

    @classmethod
    def of(cls, job: Job, target: str, started: int) -> Entry:
        """For a job that begins; the images by absolute paths."""
        disks = tuple(DiskRequest(disk=each.disk, path=directory.absolute_path(each.path)) for each in job.disks)
        return cls(
            job_id=job.job_id,
            repository_id=job.repository_id,
            point=job.point,
            target=target,
            started=started,
            disks=disks,
        )

    @property
    def job(self) -> Job:
        """The job, as far as it is known."""
        return Job(job_id=self.job_id, repository_id=self.repository_id, point=self.point, disks=self.disks, level=None)


def default_path(images: Sequence[str], directory_of_target: str | None, repository_id: str) -> str:
    """Where the journal of a job is: beside the first image that is a file, or else at the target.

    What is beside a block device is not there any more after a restart. Raises OptionError if it has to be named.
    """
    files = [os.path.dirname(directory.absolute_path(each)) for each in images if not is_device(each)]
    place = files[0] if files else directory_of_target
    if place is None:
        raise OptionError(
            "all images are block devices, and a file beside them would not outlive a restart of the system; name a "
            "file for the journal (option journal)"
        )
    return os.path.join(place, f".qcow2-backup-{repository_id}.journal")


class Journal:
    """The file `path`, an absolute name; a context manager that lets go of its lock."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.record = path + _RECORD_ENDING
        """A name for what decides the transaction over all images."""
        self._storage: FileStorage | None = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._storage is not None:
            self._storage.close()

    def begin(self, entry: Entry) -> None:
        """Make it, durably, and keep it locked. Raises FileExistsError if there is one; OSError."""
        packed = json.dumps({"format": FORMAT} | dataclasses.asdict(entry), indent=1).encode()
        self._storage = create_given(self.path, mode=0o600)
        try:
            self._storage.write_from(packed, 0)
            self._storage.barrier()
            directory.make_names_durable(os.path.dirname(self.path))
        except BaseException:
            with suppress(OSError):  # the error that led here says more
                self.end()
            raise

    def read(self) -> Entry | None:
        """What it tells, None if there is none or nothing had begun; it is locked from now on.

        Raises BackupError if a job is running, or it is no journal; OSError.
        """
        try:
            self._storage = open_given(self.path, writable=True)
        except FileNotFoundError:
            return None
        except ImageLockedError as error:
            raise BackupError("the job that keeps this journal is running", file=self.path) from error
        packed = self._storage.pread(MAX_SIZE + 1, 0)
        if not packed.strip(b"\0"):  # it was not durable yet, and nothing begins before it is
            return None
        try:
            return _entry(packed)
        except ManifestError as error:
            raise BackupError(
                f"this is no journal of a backup: {error.detail}; if it is damaged, remove it: the next backup puts "
                "right what the bitmaps tell",
                file=self.path,
            ) from error

    def end(self) -> None:
        """Nothing is left to do. Raises OSError."""
        if self._storage is None:
            return
        directory.remove(self.path, self._storage.identity)
        directory.make_names_durable(os.path.dirname(self.path))
        self._storage.close()
        self._storage = None


def _entry(packed: bytes) -> Entry:
    """Raises ManifestError."""
    content = parse_object(packed, MAX_SIZE)
    texts = {key: content.get(key) for key in ("job_id", "repository_id", "point", "target")}
    disks = content.get("disks")
    if content.get("format") != FORMAT or not all(isinstance(value, str) for value in texts.values()):
        raise ManifestError("it is of another format")
    if not isinstance(disks, list) or not isinstance(content.get("started"), int):
        raise ManifestError("it lacks disks or a time")
    names.check_repository(str(texts["repository_id"]))
    names.sequence_of(str(texts["point"]))
    return Entry(
        started=content["started"], disks=tuple(map(_disk, disks)), **{key: str(value) for key, value in texts.items()}
    )


def _disk(content: object) -> DiskRequest:
    if not isinstance(content, dict) or not isinstance(content.get("path"), str):
        raise ManifestError(f"{printable(str(content))!r} is no disk")
    if "\0" in content["path"]:
        raise ManifestError("a path has a NUL byte")
    return DiskRequest(disk=names.check_disk(str(content.get("disk"))), path=content["path"])
