"""After a crash: an interrupted job brought to one of its two ends. Which one, the repository says; see `job`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from qcow2_plugin.adapters.backup import names
from qcow2_plugin.adapters.backup.hook_values import JournalEntry
from qcow2_plugin.adapters.backup.journal import Entry, Journal
from qcow2_plugin.adapters.backup.model import Job
from qcow2_plugin.adapters.backup.repository import Repository
from qcow2_plugin.adapters.backup.rotation import distrust, settle
from qcow2_plugin.adapters.backup.sources import Source
from qcow2_plugin.errors import BackupError, Qcow2Error, printable
from qcow2_plugin.operations.bitmap_health import BitmapState, bitmap_health
from qcow2_plugin.operations.transaction import recover_transaction
from qcow2_plugin.operations.transaction_record import RecordFile
from qcow2_plugin.storage.directory import identity_of
from qcow2_plugin.storage.opener import Policy

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.manager import Hooks

Outcome = Literal["commit", "abort"]


def recover_entry(entry: Entry, journal: Journal, repository: Repository, hooks: Hooks, policy: Policy) -> Outcome:
    """Bring the job of a journal to one of its ends; the journal is left to be removed. Raises BackupError if it is of
    another repository, or nobody may decide; ImageLockedError; what the images and the target raise; PluginError."""
    if entry.repository_id != repository.id:
        raise BackupError(
            f"an interrupted backup to {printable(entry.target)} has left this journal; recover it there first",
            file=journal.path,
        )
    point = next((each for each in repository.points() if each.point == entry.point), None)
    verdict = _verdict(entry, journal, hooks, is_published=point is not None)
    there = [each for each in entry.disks if identity_of(each.path) is not None]  # what is gone needs nothing any more
    sources = [Source(each.disk, each.path, policy, hooks.references()) for each in there]
    suspects = [source for source in sources if source.is_written_behind()]  # while that can be seen
    decide_transaction(journal, sources)
    points = repository.points()
    for source in sources:
        if source in suspects:
            distrust(source, repository.id)
        else:
            settle(source, repository.id, points)
    if point is not None:
        hooks.commit(entry.job, point)
    else:
        hooks.abort(entry.job, "recover", "the job was interrupted")
        remove_leftovers(repository, entry.job)
    return verdict


def _verdict(entry: Entry, journal: Journal, hooks: Hooks, *, is_published: bool) -> Outcome:
    told = hooks.recover(
        JournalEntry(
            job_id=entry.job_id,
            repository_id=entry.repository_id,
            point=entry.point,
            disks=tuple(each.disk for each in entry.disks),
            phase="unknown",
            started=entry.started,
            is_published=is_published,
        )
    )
    known: Outcome = "commit" if is_published else "abort"
    if told != known:
        raise BackupError(
            f"an interrupted backup is to be recovered, and a plugin says {told or 'nothing'} where the repository "
            f"says {known}; neither is done",
            file=journal.path,
        )
    return known


def decide_transaction(journal: Journal, sources: Sequence[Source]) -> None:
    """Bring all images to one side of the transaction that may have been interrupted.

    A record that cannot be followed (it was not durable yet, or an image is gone) is removed if nobody waits for it.
    Raises what stands in the way.
    """
    if not os.path.lexists(journal.record):
        return
    try:
        recover_transaction(journal.record)
    except (Qcow2Error, OSError):
        if any(map(_is_undecided, sources)):
            raise
        RecordFile(journal.record).remove()


def _is_undecided(source: Source) -> bool:
    return any(each.state is BitmapState.UNFINISHED for each in bitmap_health(source.path))


def remove_leftovers(repository: Repository, job: Job) -> None:
    """What the target has of a point that never was. Another job may make one of the same id, so what is of disks that
    are not this job's stays. Raises what the target does."""
    own = (names.manifest_name(job.point), *(names.member_prefix(job.point, each.disk) for each in job.disks))
    for name in repository.leftovers():
        if name.startswith(own):
            repository.target.remove(name)
