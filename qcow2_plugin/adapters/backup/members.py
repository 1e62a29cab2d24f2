"""One member: from an open image and a plan to files at the target, with what its manifest tells of them.

Where the target is a directory, the file comes into being there, under a temporary name, and is moved. Elsewhere it is
streamed, and made beforehand in a temporary directory only if it is compressed, because then nobody can tell its size
before. A member builds on the member of its parent by that file's bare name, so any tool finds it there.

The digest of the disk is made of what is copied, over the leaves of the member that it builds on: nothing is read for
it again, but blocks of which a part has changed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from qcow2_plugin.adapters.backup import names
from qcow2_plugin.adapters.backup.hook_values import Batch
from qcow2_plugin.adapters.backup.model import DiskPlan, Member, ProgressEvent
from qcow2_plugin.adapters.backup.sources import member_cluster_size, options_of
from qcow2_plugin.adapters.backup.target import staged
from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import BackupError, printable
from qcow2_plugin.operations.changes import changes
from qcow2_plugin.operations.content_digest import content_digest, recorder
from qcow2_plugin.operations.file_digest import chunks_digest, digest_of, file_digest
from qcow2_plugin.operations.write_member import THREADS, member_chunks, write_member
from qcow2_plugin.storage.blobs import size_of

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.planning import Context, JudgedDisk
    from qcow2_plugin.engine.copy_out import Told
    from qcow2_plugin.engine.digest_tree import Recorder
    from qcow2_plugin.engine.image import Image

_TOLD_EVERY = 0.2
"""Seconds between two events of progress."""
_BATCH_SIZE, _BATCH_TIME = 64 << 20, 1.0
"""Bytes of a disk, or seconds, of which plugins are told together."""

Tell = Callable[[ProgressEvent], None]


class _File(NamedTuple):
    """A file at the target."""

    size: int
    digest: str | None


class Writer:
    """Makes the members of one job."""

    def __init__(self, context: Context, tell: Tell) -> None:
        """`tell` is told how far it is, by any thread."""
        self._context = context
        self._target = context.repository.target
        self._tell = tell

    def write(self, image: Image, disk: JudgedDisk, plan: DiskPlan) -> Member:
        """Keep the member that is planned, durably, and its leaves.

        Raises what reading the image does, and the target; BackupError if it is not what it should be; OSError.
        """
        point = self._context.job.point
        parent = None if plan.base is None else names.member_name(plan.base, plan.disk)
        name = names.member_name(point, plan.disk)
        made = self._recorder(image, disk)
        batches = _Batches(self._context, plan.disk)
        options = {
            "virtual_size": plan.virtual_size,
            "cluster_size": member_cluster_size(image),
            "backing_file": parent,
            "backing_format": None if parent is None else "qcow2",
            "on_block": None if made is None else batches.around(made),
            "progress": self._progress_of(plan.disk, "write"),
        }
        file = self._write_file(name, image, disk, plan, options)
        batches.end(plan.virtual_size, plan.estimate.dirty_data)
        content = leaves_file = None
        if made is not None:
            leaves = made.finish(THREADS)
            content, leaves_file = leaves.root(), names.leaves_name(point, plan.disk)
            packed = leaves.pack()
            self._target.put(leaves_file, [packed], len(packed))
        if self._context.settings.verify:
            self._verify(name, file, plan.disk, content)
        return Member(
            disk=plan.disk,
            level=plan.level,
            reason=plan.reason,
            virtual_size=plan.virtual_size,
            file=name,
            file_size=file.size,
            file_digest=file.digest,
            parent_point=plan.base,
            parent_file=parent,
            bitmap=disk.new,
            content_digest=content,
            leaves_file=leaves_file,
            options=options_of(disk.source.path),
            source=printable(disk.source.path),
            fingerprint=disk.fingerprint,
        )

    def _recorder(self, image: Image, disk: JudgedDisk) -> Recorder | None:
        """What makes the digest, None if there can be none."""
        if not self._context.settings.digest or (disk.base is not None and disk.leaves is None):
            return None
        return recorder(image, disk.leaves)

    def _write_file(self, name: str, image: Image, disk: JudgedDisk, plan: DiskPlan, options: dict[str, Any]) -> _File:
        bitmaps = None if disk.base is None else plan.bitmaps
        found = changes(image, bitmaps, base_size=disk.base_size, with_clean=False)
        compression, is_digested = self._context.settings.compression, self._context.settings.digest
        if self._target.directory is None and compression is None:
            size, chunks = member_chunks(image, found, **options)
            with closing(cast("Generator[bytes, None, None]", chunks)) as read:
                passed, digest = chunks_digest(read)
                self._target.put(name, map(memoryview, passed), size)
                return _File(size, digest())
        with staged(self._target, name) as path:
            write_member(image, found, path, compression=compression, **options)
            file = _File(size_of(path), file_digest(path)[0] if is_digested else None)
            self._target.put_file(name, path)
        return file

    def _verify(self, name: str, file: _File, disk: str, content: str | None) -> None:
        """Raises BackupError unless what the target has now is what was to be kept."""
        progress = self._progress_of(disk, "verify")
        if file.digest is not None and digest_of(self._target.get(name)) != (file.digest, file.size):
            raise BackupError(f"member {name} was read back, and is not what was written", file=self._target.uri)
        if content is None or self._target.directory is None:
            return
        with open_image(os.path.join(self._target.directory, name)) as rebuilt:
            found = content_digest(rebuilt, progress=progress).root
        if found != content:
            raise BackupError(
                f"disk {disk} was rebuilt from {name} and what it builds on, and is not the disk that was backed up; "
                "something was changed there, or the bitmaps lacked changes: make a full backup",
                file=self._target.uri,
            )

    def _progress_of(self, disk: str, phase: str) -> Callable[[int, int], None]:
        told_at = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal told_at
            now = time.monotonic()
            if done == total or now - told_at > _TOLD_EVERY:
                told_at = now
                job_id = self._context.job.job_id
                self._tell(ProgressEvent(job_id=job_id, phase=phase, disk=disk, done=done, total=total))

        return progress


class _Batches:
    """Tells plugins of what was written of a disk, in parts. Any thread may tell it of more."""

    def __init__(self, context: Context, disk: str) -> None:
        self._hooks, self._job = context.hooks, context.job
        self._disk = disk
        self._start = self._end = self._stored = 0
        self._is_told = False
        self._time = time.monotonic()
        self._lock = threading.Lock()

    def around(self, recorder: Recorder) -> Told:
        """What tells the recorder, and then this."""
        self._is_told = True

        def told(guest_offset: int, length: int, data: memoryview | None) -> None:
            recorder.told(guest_offset, length, data)
            if data is not None:
                self._add(guest_offset + length, length)

        return told

    def end(self, virtual_size: int, data: int) -> None:
        """All is written; `data` bytes of it, if it was not told."""
        self._tell(virtual_size, self._stored if self._is_told else data)

    def _add(self, end: int, length: int) -> None:
        with self._lock:
            self._stored += length
            self._end = max(self._end, end)
            is_late = time.monotonic() - self._time > _BATCH_TIME
            if self._end - self._start >= _BATCH_SIZE or is_late:
                self._tell(self._end, self._stored)

    def _tell(self, end: int, stored: int) -> None:
        length = end - self._start
        self._hooks.batch(
            self._job,
            Batch(disk=self._disk, guest_offset=self._start, length=length, stored=max(min(stored, length), 0)),
        )
        self._start, self._stored = end, 0
        self._time = time.monotonic()
