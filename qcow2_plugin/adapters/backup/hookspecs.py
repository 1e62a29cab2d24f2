"""The hooks: a table of contents. What a plugin can take part in, and what becomes of a job if it fails.

A plugin is a module (or an object) that marks functions of these names with `hookimpl`, takes those of their arguments
that it wants, by name, and says `QCOW2_PLUGIN_API = 1`. It is found as an entry point of the group `qcow2_plugin`, or
named on the command line. HOOKS.md beside this file is the reference for authors.

Each hook is of one class, which says how it is called and what its failure means (`CallClass`). No wrappers: who could
change what another plugin answers would be asked in its stead.
"""

from __future__ import annotations

import enum
import inspect
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import pluggy

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.hook_values import (
        BaseChoice,
        Batch,
        Complaint,
        Decision,
        JobResult,
        JournalEntry,
        Location,
        Restore,
        Verdict,
    )
    from qcow2_plugin.adapters.backup.model import DiskPlan, Job, Manifest, ProgressEvent
    from qcow2_plugin.adapters.backup.secrets import Secret
    from qcow2_plugin.adapters.backup.target import BackupTarget
    from qcow2_plugin.adapters.guestfs.inspection import Guest
    from qcow2_plugin.engine.files import Reference
    from qcow2_plugin.storage import WritableStorage

PROJECT = "qcow2_plugin"
"""Name of the markers and of the group of entry points."""
PREFIX = "qcow2_"
REFERENCE = os.path.join(os.path.dirname(__file__), "HOOKS.md")
"""What authors of plugins read."""
API_LEVEL = 1
"""Rises when a plugin that worked might not any more."""

hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin as the implementation of the hook of its name."""
hookspec = pluggy.HookspecMarker(PROJECT)


class CallClass(enum.Enum):
    """How a hook is called, and what the failure of a plugin in it means."""

    VETO = "veto"
    """All are asked. One that refuses or fails refuses for all; and somebody has to allow it."""
    PROVIDER = "provider"
    """Asked one after the other until one answers something else than None. A failure is that of the operation: nobody
    else is asked then.
    """
    PARTICIPANT = "participant"
    """Called one after the other; the first failure ends the job, and `abort` runs in reverse order for all that had
    begun. Once the point is published, failures are reported, and nothing is undone.
    """
    COLLECT = "collect"
    """All are asked and all answers count. A failure is an answer, too: a bad one."""
    OBSERVER = "observer"
    """Told in the background, each plugin in a thread of its own, in order. A failure is reported and changes nothing;
    three of them, or a call that takes too long, and the plugin is told nothing more.
    """


_Function = TypeVar("_Function", bound=Callable[..., Any])
CLASSES: dict[str, CallClass] = {}
"""Every hook by its name."""


def _hook(call_class: CallClass) -> Callable[[_Function], _Function]:
    def declare(function: _Function) -> _Function:
        CLASSES[function.__name__] = call_class
        return hookspec(function, firstresult=call_class is not CallClass.OBSERVER)

    return declare


_veto = _hook(CallClass.VETO)
_provider = _hook(CallClass.PROVIDER)
_participant = _hook(CallClass.PARTICIPANT)
_collect = _hook(CallClass.COLLECT)
_observer = _hook(CallClass.OBSERVER)


# Files that images name


@_provider
def qcow2_locate_reference(reference: Reference) -> str | None:
    """Where is the data or backing file that an image names?

    A path, or a URI that `qcow2_open_storage` knows; None leaves it to the policy. What is located elsewhere is opened
    only if `qcow2_authorize_reference` allows it.

        @hookimpl
        def qcow2_locate_reference(reference):
            if reference.role == "data file" and reference.name.startswith(b"volume-"):
                return "/dev/volumes/" + reference.name.decode()
    """


@_veto
def qcow2_authorize_reference(reference: Reference, location: Location) -> Decision | None:
    """May this file be opened because that image names it?

    Asked when the name is resolved, right before the file is opened. None is no opinion. The policy of the job allows
    what it would open itself, and has no opinion on what a plugin located: that plugin has to allow it.

        @hookimpl
        def qcow2_authorize_reference(reference, location):
            if location.plugin == "volumes":
                return Decision(location.uri.startswith("/dev/volumes/"), "no volume of ours")
    """


@_provider
def qcow2_open_storage(location: str, writable: bool) -> WritableStorage | None:
    """Open what a location names, and lock it for reading or for writing.

    The caller closes it. What it needs is in `qcow2_plugin.storage`: `Storage`, `WritableStorage` if `writable`.

        @hookimpl
        def qcow2_open_storage(location, writable):
            if location.startswith("rbd:"):
                return RbdStorage(location, writable)
    """


# Places and secrets


@_provider
def qcow2_open_target(uri: str, options: dict[str, str], secret: Callable[[str, str], Secret]) -> BackupTarget | None:
    """The place of backups that `uri` names.

    The caller closes it. `options` are the ones of the command line for it; `secret` is called with an id and a
    purpose, and asks the plugins in turn (`qcow2_resolve_secret`).

        @hookimpl
        def qcow2_open_target(uri, options, secret):
            if uri.startswith("tape:"):
                return TapeTarget(uri, secret(options["key"], uri))
    """


@_provider
def qcow2_resolve_secret(secret_id: str, purpose: str) -> Secret | None:
    """The secret of that id.

    `purpose` says in words what it is for.

        @hookimpl
        def qcow2_resolve_secret(secret_id, purpose):
            if secret_id.startswith("vault:"):
                return Secret(ask_vault(secret_id))
    """


# A backup, in the order in which things happen


@_participant
def qcow2_backup_begin(job: Job) -> None:
    """A job is about to begin.

    Its journal is written, no image was touched yet. Raise to refuse it.

        @hookimpl
        def qcow2_backup_begin(job):
            if is_maintenance():
                raise RuntimeError("no backups during maintenance")
    """


@_provider
def qcow2_select_base(job: Job, disk: str, candidates: tuple[str, ...]) -> BaseChoice | None:
    """Which point does the next member of `disk` build on?

    `candidates` are those it could, by what image and repository say, the newest first. None takes the newest. To
    choose another one costs, because its increment is bigger; what is no candidate is refused.

        @hookimpl
        def qcow2_select_base(job, disk, candidates):
            if is_sunday():
                return BaseChoice(point=None, reason="a full one every Sunday")
    """


@_participant
def qcow2_backup_plan(job: Job, plans: tuple[DiskPlan, ...]) -> None:
    """What will be done about each disk, and how many bytes of it are to be moved.

    Nothing was read yet. Raise to refuse it.

        @hookimpl
        def qcow2_backup_plan(job, plans):
            if sum(plan.estimate.dirty_data for plan in plans) > room_left():
                raise RuntimeError("the vault has no room for that")
    """


@_observer
def qcow2_batch_written(job: Job, batch: Batch) -> None:
    """Part of a disk was written to the target.

    It is not durable yet. A plugin that does not keep up misses some.

        @hookimpl
        def qcow2_batch_written(batch):
            metrics.count("backup_bytes", batch.stored)
    """


@_observer
def qcow2_progress(event: ProgressEvent) -> None:
    """How far a job is.

    A plugin that does not keep up misses some.

        @hookimpl
        def qcow2_progress(event):
            metrics.gauge("backup_done", event.done / max(event.total, 1))
    """


@_participant
def qcow2_backup_prepare(job: Job, manifest: Manifest) -> dict[str, Any] | None:
    """All data is durable at the target, nothing is published.

    Raise to refuse the point even now. What is answered must be JSON; it becomes part of the manifest's `extra`, under
    the plugin's name.

        @hookimpl
        def qcow2_backup_prepare(job, manifest):
            return {"signature": sign(manifest)}
    """


@_participant
def qcow2_backup_commit(job: Job, manifest: Manifest) -> None:
    """The point is published and will not be undone.

    May come again after a crash, so a second time must do no harm.

        @hookimpl
        def qcow2_backup_commit(job, manifest):
            catalogue.put(manifest.point, job.job_id)
    """


@_participant
def qcow2_backup_abort(job: Job, phase: str, error: str) -> None:
    """There will be no such point: undo what `qcow2_backup_begin` did.

    `phase` says when the job ended, `error` why. Called in reverse order for all plugins whose begin was called, that
    of the one which failed included; after a crash for all there are. An exception is reported, and the next one is
    called.

        @hookimpl
        def qcow2_backup_abort(job, phase, error):
            catalogue.forget(job.job_id)
    """


@_provider
def qcow2_backup_recover(entry: JournalEntry) -> Verdict | None:
    """A job was interrupted: was its point made, or did it never happen?

    "commit" or "abort". None leaves it to the catalogue of the repository. An answer that contradicts the catalogue
    stops the recovery: nothing is done until they agree.

        @hookimpl
        def qcow2_backup_recover(entry):
            return "commit" if catalogue.has(entry.point) else None
    """


@_observer
def qcow2_job_finished(job: Job, result: JobResult) -> None:
    """A job has ended, well or not.

    @hookimpl
    def qcow2_job_finished(job, result):
        if result.error is not None:
            page_somebody(job.job_id, result.error)
    """


# Afterwards


@_collect
def qcow2_verify(manifest: Manifest, level: int) -> Iterable[Complaint] | None:
    """What speaks against this point?

    `level` is how deep it is verified: 0 names and sizes, 1 files, 2 disks.

        @hookimpl
        def qcow2_verify(manifest):
            if not is_signed(manifest):
                yield Complaint(disk=None, text="its signature is not ours")
    """


@_participant
def qcow2_restore_begin(restore: Restore) -> None:
    """A disk is about to be restored.

    Nothing is written yet. Raise to refuse it.

        @hookimpl
        def qcow2_restore_begin(restore):
            if is_in_use(restore.destination):
                raise RuntimeError("the machine is running")
    """


@_participant
def qcow2_restore_commit(restore: Restore) -> None:
    """The disk is there, whole and durable.

    @hookimpl
    def qcow2_restore_commit(restore):
        catalogue.note("restored", restore.disk)
    """


@_participant
def qcow2_restore_abort(restore: Restore, error: str) -> None:
    """The disk was not restored.

    What was written of it is gone, where that is possible. Called as `qcow2_backup_abort` is.

        @hookimpl
        def qcow2_restore_abort(restore, error):
            catalogue.note("not restored", restore.disk)
    """


@_observer
def qcow2_guest_inspected(guest: Guest) -> None:
    """libguestfs has looked into a disk.

    What it found are the guest's own words: text that may hold anything.

        @hookimpl
        def qcow2_guest_inspected(guest):
            inventory.update(guest.image, guest.operating_systems)
    """


class Described(NamedTuple):
    """A hook. `promise` is the first line of what is said about it, `arguments` are their names."""

    name: str
    call_class: CallClass
    promise: str
    arguments: tuple[str, ...]


def described() -> list[Described]:
    """All hooks, in their order above."""
    found = []
    for name, call_class in CLASSES.items():
        function = globals()[name]
        promise = (inspect.getdoc(function) or "").partition("\n")[0]
        found.append(Described(name, call_class, promise, tuple(inspect.signature(function).parameters)))
    return found
