"""One backup: from images that nobody writes to, to a point in a repository, whatever crashes in between.

**Order.**

    1  the journal is there, durably: which images, which point
    2  plugins begin                                                       `qcow2_backup_begin`
    3  every image is opened for reading, and its level is judged          `levels`, `sampling`
    4  the point in time: one transaction over all images                  `rotation`
    5  every image is opened for reading again, and stays so; nothing has been written to it since 4
    6  plugins see the plan, and what it will cost                         `qcow2_backup_plan`
    7  the members come into being at the target, durably                  `members`
    8  plugins have the last word                                          `qcow2_backup_prepare`
    9  the manifest is published, durably. This is the moment at which the point is there, with all of its disks
    10 plugins hear of it                                                  `qcow2_backup_commit`
    11 the images lose the bitmaps that nobody needs any more              `rotation`
    12 the journal is removed

**A crash** before 9 leaves a point that never was: what its bitmaps recorded is merged into those that were frozen at
4, which record again; what it has left at the target is removed. A crash after 9 leaves a point with a loose end: 10
and 11 are done again. Which of the two it is says the repository alone, and the bitmaps say what is to be done by their
names; the journal tells only where to look. Each step may be done twice, so recovery may crash as well. A next backup
recovers first, and `recover` does nothing else.

**An error** before 9 is a crash that clears up behind itself, plugins in reverse order. An error while 9 goes on (a
network) may mean either: then the repository is asked; if it does not answer, all stays as it is, journal included.

**Who else may be there.** Between 3 and 4, and between 4 and 5, the images are open to others for a moment. Writes in
the former are in the frozen bitmap, if they went through the image: data and backing files have to be at 5 what they
were at 3, or the job ends. A write in the latter would be in a member without being of its point in time, so the new
bitmaps have to be empty at 5, too. At any time a program that writes makes opening fail.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.backup import names, rotation
from qcow2_plugin.adapters.backup.hook_values import JobResult
from qcow2_plugin.adapters.backup.journal import Entry, Journal, default_path
from qcow2_plugin.adapters.backup.members import Writer
from qcow2_plugin.adapters.backup.model import DiskPlan, DiskRequest, Job, Manifest, ProgressEvent
from qcow2_plugin.adapters.backup.planning import Context, JudgedDisk, Settings, judged, planned
from qcow2_plugin.adapters.backup.recovery import Outcome, decide_transaction, recover_entry, remove_leftovers
from qcow2_plugin.adapters.backup.repository import Repository
from qcow2_plugin.adapters.backup.rotation import own_bitmaps, settle
from qcow2_plugin.adapters.backup.sources import Source, bitmap_granularity, fingerprint, fingerprints, sources_of
from qcow2_plugin.errors import BackupError, LooseEndError, Qcow2Error
from qcow2_plugin.operations.bitmap_health import BitmapState, bitmap_health
from qcow2_plugin.operations.transaction import bitmap_transaction
from qcow2_plugin.storage.directory import absolute_path
from qcow2_plugin.storage.opener import Policy

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.manager import Hooks
    from qcow2_plugin.adapters.backup.target import BackupTarget
    from qcow2_plugin.engine.dirty_bitmaps.bitmap_plan import BitmapChange
    from qcow2_plugin.engine.image import Image

_NO_REPOSITORY = "00000000"
"""Stands for the id of one that was not made yet."""

Path = str | os.PathLike[str]
Progress = Callable[[ProgressEvent], None]


def run_backup(
    disks: Sequence[DiskRequest],
    target: BackupTarget,
    *,
    hooks: Hooks,
    settings: Settings | None = None,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Back up disks that nobody writes to, as of one moment; the point that was made, durably.

    The repository is made where there is none. `journal` is a name for a file that is there as long as the job runs,
    by default beside the first image; if there is one of a job that was interrupted, that is recovered first.
    `progress` is told by any thread.

    Raises BackupError; ImageLockedError if a program has an image open for writing; PluginError; what opening and
    reading the images raises, and the target: then there is no such point, and the images are as they were. If the
    message says that something is left to do, the next backup does it.
    """
    chosen = settings or Settings()
    sources = sources_of(disks, chosen.policy, hooks.references())
    repository = Repository.open_or_create(target)
    with Journal(_journal_path(journal, sources, repository)) as file:
        entry = file.read()
        if entry is not None:
            recover_entry(entry, file, repository, hooks, chosen.policy)
        file.end()
        points = repository.points()
        for source in sources:
            settle(source, repository.id, points)
        created = int(time.time())
        context = Context(repository, _job(sources, repository, chosen, created=created), hooks, chosen)
        file.begin(Entry.of(context.job, target.uri, created))
        return _Run(sources, context, file, progress).run(created)


def plan_backup(
    disks: Sequence[DiskRequest], target: BackupTarget, *, hooks: Hooks, settings: Settings | None = None
) -> list[DiskPlan]:
    """What `run_backup` would do now, and what it would read; nothing is changed. Raises as `run_backup` does."""
    chosen = settings or Settings()
    sources = sources_of(disks, chosen.policy, hooks.references())
    is_there = names.REPOSITORY_FILE in target.names()
    repository = Repository.open(target) if is_there else Repository(target, _NO_REPOSITORY)
    job = _job(sources, repository, chosen, created=int(time.time()), is_dry_run=True)
    context = Context(repository, job, hooks, chosen)
    plans = []
    for source in sources:
        with source.open() as image:
            left = rotation.unsettled(
                own_bitmaps(bitmap_health(image), repository.id), repository.points(), source.disk
            )
            if left:
                raise BackupError(
                    "an interrupted backup has left its bitmaps behind, which the next one puts right first",
                    file=source.path,
                )
            disk = judged(source, image, context)
            plans.append(planned(disk, image, None if disk.base is None else disk.base.marking))
    return plans


def recover(
    target: BackupTarget,
    *,
    hooks: Hooks,
    disks: Sequence[DiskRequest],
    journal: Path | None = None,
    policy: Policy = Policy.CONFINED,
) -> Outcome | None:
    """Finish an interrupted job, or let it never have happened; which of them, None if nothing tells of one.

    `disks` and `journal` are what the job was told; without a journal the names of the disks' bitmaps tell. Raises
    BackupError if the journal is of another repository, or the job runs; what stands in the way, and then the journal
    stays.
    """
    sources = sources_of(disks, policy, hooks.references())
    repository = Repository.open(target)
    with Journal(_journal_path(journal, sources, repository)) as file:
        entry = file.read()
        verdict = None if entry is None else recover_entry(entry, file, repository, hooks, policy)
        file.end()
    points = repository.points()
    for source in sources:
        settle(source, repository.id, points)
    return verdict


def _journal_path(given: Path | None, sources: Sequence[Source], repository: Repository) -> str:
    if given is not None:
        return absolute_path(given)
    return default_path([source.path for source in sources], repository.target.directory, repository.id)


def _job(
    sources: Sequence[Source], repository: Repository, settings: Settings, *, created: int, is_dry_run: bool = False
) -> Job:
    point, _ = repository.next_point(created)
    return Job(
        job_id=secrets.token_hex(8),
        repository_id=repository.id,
        point=point,
        disks=tuple(DiskRequest(disk=source.disk, path=source.path) for source in sources),
        level=settings.level,
        is_dry_run=is_dry_run,
        labels=dict(settings.labels or {}),
    )


# -- a job whose journal is there, to its end --


class _Run:
    """One job; nothing of an earlier one is left."""

    def __init__(
        self, sources: Sequence[Source], context: Context, journal: Journal, progress: Progress | None
    ) -> None:
        self._sources = sources
        self._context = context
        self._repository, self._job, self._hooks = context.repository, context.job, context.hooks
        self._journal = journal
        self._progress = progress
        self._phase = "begin"

    def run(self, created: int) -> Manifest:
        """The point, `created` in seconds since 1970, UTC. Raises as `run_backup` does."""
        try:
            manifest = self._make(created)
        except BaseException as error:
            self._hooks.finished(self._job, JobResult(manifest=None, error=str(error) or type(error).__name__))
            raise
        try:
            failures = self._hooks.commit(self._job, manifest)
            self._hooks.finished(self._job, JobResult(manifest=manifest, failures=tuple(map(str, failures))))
            self._settle()
            if not failures:  # else the next backup tells them again
                self._journal.end()
        except (Qcow2Error, OSError) as error:
            raise LooseEndError(f"point {manifest.point} is made, but {error}") from error
        except (KeyboardInterrupt, SystemExit) as error:
            raise LooseEndError(f"point {manifest.point} is made, but what follows was interrupted") from error
        return manifest

    def _make(self, created: int) -> Manifest:
        """Up to the moment at which the point is there."""
        try:
            self._hooks.begin(self._job)
            self._phase = "judge"
            disks = [self._judge(source) for source in self._sources]
            self._phase = "rotate"
            self._rotate(disks)
            with ExitStack() as opened:
                images = [opened.enter_context(disk.source.open()) for disk in disks]
                manifest = self._write(disks, images, created)
                self._phase = "publish"
                return self._publish(manifest)
        except _UnknownOutcome:
            raise
        except BaseException as error:
            self._abort(error)
            raise

    def _judge(self, source: Source) -> JudgedDisk:
        with source.open() as image:
            return judged(source, image, self._context)

    def _rotate(self, disks: Sequence[JudgedDisk]) -> None:
        """The point in time."""
        changes: dict[Image | Path, Sequence[BitmapChange]] = {}
        with ExitStack() as opened:
            for disk in disks:
                if disk.new is None:
                    continue
                image = opened.enter_context(disk.source.open_for_changes())
                data = fingerprint(image) or {}
                if not disk.is_that_of(image) or not data.items() <= (disk.fingerprint or {}).items():
                    raise BackupError("the image or its data file has just changed; try again", file=disk.source.path)
                own = own_bitmaps(bitmap_health(image), self._repository.id)
                told = disk.judgement
                changes[image] = rotation.at_point(
                    own, disk.new, frozen=told.frozen, adopted=told.adopted, granularity=bitmap_granularity(image)
                )
            bitmap_transaction(changes, record=self._journal.record)

    def _write(self, disks: Sequence[JudgedDisk], images: Sequence[Image], created: int) -> Manifest:
        """The point, with all that it names durable at the target."""
        for disk, image in zip(disks, images, strict=True):
            _require_untouched(disk, image)
        self._phase = "plan"
        plans = [
            planned(disk, image, None if disk.base is None else disk.base.bitmaps)
            for disk, image in zip(disks, images, strict=True)
        ]
        self._hooks.plan(self._job, plans)
        self._phase = "write"
        writer = Writer(self._context, self._tell)
        members = [writer.write(image, disk, plan) for disk, image, plan in zip(disks, images, plans, strict=True)]
        manifest = Manifest(
            repository_id=self._repository.id,
            point=self._job.point,
            sequence=names.sequence_of(self._job.point),
            created=created,
            members=tuple(members),
            labels=self._job.labels,
        )
        self._phase = "prepare"
        return replace(manifest, extra=self._hooks.prepare(self._job, manifest))

    def _tell(self, event: ProgressEvent) -> None:
        self._hooks.progress(event)
        if self._progress is not None:
            self._progress(event)

    def _publish(self, manifest: Manifest) -> Manifest:
        try:
            self._repository.publish(manifest)
        except BaseException as error:
            if self._is_published(manifest, error):
                return manifest
            if isinstance(error, FileExistsError):
                raise BackupError(
                    f"another job has made point {manifest.point} in the same second; try again",
                    file=self._repository.target.uri,
                ) from error
            raise
        return manifest

    def _is_published(self, manifest: Manifest, error: BaseException) -> bool:
        """Whether the point is there, although publishing it has failed. Raises _UnknownOutcome if nobody can tell."""
        repository = Repository(self._repository.target, self._repository.id)  # which remembers nothing
        try:
            return manifest in repository.points()
        except (Qcow2Error, OSError) as failure:
            raise _UnknownOutcome(
                f"whether point {manifest.point} is made is not known ({error}; then {failure}); the next backup finds "
                "out, or 'qcow2 backup --recover'",
                file=self._journal.path,
            ) from error

    def _abort(self, error: BaseException) -> None:
        self._hooks.abort(self._job, self._phase, error)
        try:
            decide_transaction(self._journal, self._sources)
            self._settle()
            remove_leftovers(self._repository, self._job)
            self._journal.end()
        except (Qcow2Error, OSError) as failure:
            error.add_note(str(failure))

    def _settle(self) -> None:
        """Raises BackupError if an image keeps what it should not."""
        points = self._repository.points()
        failures: list[Qcow2Error | OSError] = []
        for source in self._sources:
            try:
                settle(source, self._repository.id, points)
            except (Qcow2Error, OSError) as failure:
                failures.append(failure)
        if failures:
            raise BackupError(
                f"the bitmaps of {len(failures)} images are not as they should be yet ({failures[0]}); the next backup "
                "puts that right first"
            ) from failures[0]


class _UnknownOutcome(BackupError):
    """The point may be there or not."""


def _require_untouched(disk: JudgedDisk, image: Image) -> None:
    """Raises BackupError unless the image is as it was at the point in time."""
    is_untouched = disk.is_that_of(image) and fingerprints(image) == disk.fingerprint
    if disk.new is not None and is_untouched:
        (health,) = bitmap_health(image, [disk.new])
        is_untouched = health.state is BitmapState.USABLE and bool(health.enabled)
        is_untouched = is_untouched and not any(image.dirty_extents(disk.new))
    if not is_untouched:
        raise BackupError("a program has written to the image just after the point in time", file=disk.source.path)
