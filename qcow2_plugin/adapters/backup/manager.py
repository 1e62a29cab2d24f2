"""The hooks as the flow calls them: typed questions, checked answers, and the rule of each class for failures.

Owns who is asked, in which order, and what an answer may be; the flow knows of no plugin, and no plugin of another.
What a plugin answers is held against what the hook may answer before it is used: a wrong answer is its failure.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from qcow2_plugin.adapters.backup.calls import OBSERVER_LIMIT, SLOW, Asked, Calls
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
from qcow2_plugin.adapters.backup.plugins import Listed, Plugins, Report
from qcow2_plugin.adapters.backup.secrets import Secret
from qcow2_plugin.errors import OptionError, PluginError, ReferenceDeniedError, TargetError, printable

if TYPE_CHECKING:
    from types import TracebackType

    from qcow2_plugin.adapters.backup.references import HookedReferences
    from qcow2_plugin.adapters.backup.target import BackupTarget
    from qcow2_plugin.adapters.guestfs.inspection import Guest
    from qcow2_plugin.engine.files import Reference
    from qcow2_plugin.storage import WritableStorage

_log = logging.getLogger(__name__)
_EXTRA_LIMIT = 64 << 10
"""Bytes that a plugin may add to a manifest."""
_COMPLAINTS_LIMIT = 1000
"""Of one plugin about one point."""
_STORAGE = ("path", "identity", "read_into", "pread", "size", "allocated_size", "data_ranges", "prefetch", "close")
_WRITABLE_STORAGE = ("write_from", "write_vector", "write_zeroes", "punch", "truncate", "preallocate", "barrier")


class Finding(NamedTuple):
    """What a plugin has against a point, about one disk or (None) all of it; safe to print."""

    plugin: str
    disk: str | None
    text: str


class Hooks:
    """All plugins that are in use, as one. Any thread may call; a context manager, whose end `close` is."""

    def __init__(self, plugins: Plugins, report: Report, *, slow: float, observer_limit: float) -> None:
        self.plugins: tuple[Listed, ...] = tuple(plugins.listed)
        self._report = report
        self._calls = Calls(plugins, report, slow=slow, observer_limit=observer_limit)
        self._backup = _Course(self._calls, report, "qcow2_backup_begin", "qcow2_backup_abort")
        self._restore = _Course(self._calls, report, "qcow2_restore_begin", "qcow2_restore_abort")

    @classmethod
    def load(
        cls,
        *,
        use_installed: bool = True,
        plugins: Sequence[str] = (),
        own: Mapping[str, object] | None = None,
        blocked: Collection[str] = (),
        strict: bool = False,
        report: Report = _log.warning,
        slow: float = SLOW,
        observer_limit: float = OBSERVER_LIMIT,
    ) -> Hooks:
        """The built-in plugins, those of installed packages if `use_installed`, those that `plugins` names (modules or
        files), and `own` ones by their names; none of these names in `blocked`.

        `report` is told what the user should know. `slow` and `observer_limit` in seconds, see `calls`. Raises
        PluginError if one that was asked for cannot be used; if `strict`, if any cannot.
        """
        found = Plugins(report, blocked=blocked, strict=strict)
        if use_installed:
            found.load_installed()
        found.load_named(plugins)
        found.load_own(own or {})
        found.end()
        return cls(found, report, slow=slow, observer_limit=observer_limit)

    def close(self) -> None:
        """Wait for the observers, as long as they may take."""
        self._calls.close()

    def __enter__(self) -> Hooks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Files that images name

    def references(self) -> HookedReferences | None:
        """What `open_image` asks about the files that images name (option `references`).

        None if nobody has a say in that but the policy, which the engine obeys anyway.
        """
        from qcow2_plugin.adapters.backup.references import HookedReferences

        hooks = ("qcow2_locate_reference", "qcow2_authorize_reference")
        if [asked.plugin for hook in hooks for asked in self._calls.asked(hook)] == ["builtin-references"]:
            return None
        return HookedReferences(self)

    def locate(self, reference: Reference) -> Location | None:
        """Where a plugin says that the file is; None leaves it to the policy. Raises PluginError."""
        uri, plugin = self._calls.first("qcow2_locate_reference", reference=reference)
        if uri is None:
            return None
        if not isinstance(uri, str) or not uri or "\0" in uri:
            raise _wrong(plugin, "qcow2_locate_reference", "a path or URI", uri)
        return Location(uri=uri, plugin=plugin)

    def authorize(self, reference: Reference, location: Location) -> None:
        """Raises ReferenceDeniedError unless somebody allows to open that file, and nobody refuses or fails."""
        is_allowed = False
        for asked in self._calls.asked("qcow2_authorize_reference"):
            try:
                decision = self._calls.ask("qcow2_authorize_reference", asked, reference=reference, location=location)
                if not (decision is None or (isinstance(decision, Decision) and isinstance(decision.reason, str))):
                    raise _wrong(asked.plugin, "qcow2_authorize_reference", "a Decision or None", decision)
            except PluginError as error:
                raise _denied(reference, str(error)) from error
            if decision is not None and not decision.is_allowed:
                raise _denied(reference, f"{printable(decision.reason)} (plugin {printable(asked.plugin)})")
            is_allowed |= decision is not None
        if not is_allowed:
            whose = "" if location.plugin is None else f', where plugin "{printable(location.plugin)}" has located it'
            raise _denied(reference, f"no plugin allows to open {printable(location.uri)}{whose}")

    def open_storage(self, location: str, *, writable: bool) -> WritableStorage:
        """What a location names, open and locked. Raises OptionError if nobody knows it; PluginError; OSError."""
        storage, plugin = self._calls.first("qcow2_open_storage", location=location, writable=writable)
        if storage is None:
            raise OptionError(f"no plugin can open {printable(location)}")
        needed = _STORAGE + _WRITABLE_STORAGE if writable else _STORAGE
        missing = [name for name in needed if not hasattr(storage, name)]
        if missing:
            raise _wrong(plugin, "qcow2_open_storage", f"a storage, which has {', '.join(missing)}", storage)
        opened: WritableStorage = storage
        return opened

    # Places and secrets

    def target(self, uri: str, options: Mapping[str, str] | None = None) -> BackupTarget:
        """The place of backups that `uri` names. Raises TargetError if nobody knows it; PluginError; OSError."""
        from qcow2_plugin.adapters.backup.target import BackupTarget
        from qcow2_plugin.adapters.backup.targets.program import without_password

        target, plugin = self._calls.first(
            "qcow2_open_target", uri=uri, options=dict(options or {}), secret=self.secret
        )
        if target is None:
            shown = printable(without_password(uri))
            raise TargetError(f"{shown} is no place for backups that any plugin knows; see 'qcow2 plugins'")
        if not isinstance(target, BackupTarget):
            raise _wrong(plugin, "qcow2_open_target", "a BackupTarget", target)
        return target

    def secret(self, secret_id: str, purpose: str) -> Secret:
        """The secret of that id. Raises OptionError if nobody has it; PluginError; OSError."""
        secret, plugin = self._calls.first("qcow2_resolve_secret", secret_id=secret_id, purpose=purpose)
        if secret is None:
            raise OptionError(
                f"no plugin has the secret {printable(secret_id) if ':' in secret_id else 'that was named'} "
                f"({printable(purpose)}), and no secret is told itself; "
                "the content of a file is file:PATH"
            )
        if not isinstance(secret, Secret):
            raise PluginError(plugin or "", "failed in qcow2_resolve_secret: what it answered is no Secret")
        return secret

    # A backup

    def begin(self, job: Job) -> None:
        """Before any image is touched. Raises PluginError, and then `abort` is to be called."""
        self._backup.begin(job.job_id, job=job)

    def select_base(self, job: Job, disk: str, candidates: tuple[str, ...]) -> BaseChoice:
        """The point to build on, one of `candidates` (the newest first), or none and why. Raises PluginError."""
        choice, plugin = self._calls.first("qcow2_select_base", job=job, disk=disk, candidates=candidates)
        if choice is None:
            return BaseChoice(point=None, reason="there is no point to build on")
        if not isinstance(choice, BaseChoice) or not isinstance(choice.reason, str):
            raise _wrong(plugin, "qcow2_select_base", "a BaseChoice", choice)
        if choice.point is not None and choice.point not in candidates:
            raise _wrong(plugin, "qcow2_select_base", "one of the candidates", choice.point)
        if choice.point is None and not choice.reason:
            return BaseChoice(point=None, reason=f'plugin "{plugin}" wants a full one')
        return replace(choice, reason=printable(choice.reason))

    def plan(self, job: Job, plans: Sequence[DiskPlan]) -> None:
        """Before anything is read. Raises PluginError, and then `abort` is to be called."""
        for asked in self._calls.asked("qcow2_backup_plan"):
            self._calls.ask("qcow2_backup_plan", asked, job=job, plans=tuple(plans))

    def batch(self, job: Job, batch: Batch) -> None:
        """Tell of a part that was written; returns at once."""
        self._calls.tell("qcow2_batch_written", may_miss=True, job=job, batch=batch)

    def progress(self, event: ProgressEvent) -> None:
        """Tell how far a job is; returns at once."""
        self._calls.tell("qcow2_progress", may_miss=True, event=event)

    def prepare(self, job: Job, manifest: Manifest) -> dict[str, Any]:
        """When all is durable and nothing published: what plugins add to the manifest's `extra`, by their names.

        Raises PluginError, and then `abort` is to be called.
        """
        extra = {}
        for asked in self._calls.asked("qcow2_backup_prepare"):
            added = self._calls.ask("qcow2_backup_prepare", asked, job=job, manifest=manifest)
            if added is not None:
                extra[asked.plugin] = _plain(asked.plugin, added)
        return extra

    def commit(self, job: Job, manifest: Manifest) -> list[PluginError]:
        """When the point is published: the failures, which were reported and change nothing, but should be tried again
        when the job is recovered.
        """
        return _all(self._calls, self._report, "qcow2_backup_commit", job=job, manifest=manifest)

    def abort(self, job: Job, phase: str, error: BaseException | str) -> None:
        """There will be no such point. Never raises what a plugin raises; a second call for a job does nothing."""
        self._backup.abort(job.job_id, job=job, phase=phase, error=str(error) or type(error).__name__)

    def recover(self, entry: JournalEntry) -> Verdict | None:
        """What is to become of an interrupted job; None if nobody knows: then nothing may be done about it yet.

        Raises PluginError.
        """
        verdict, plugin = self._calls.first("qcow2_backup_recover", entry=entry)
        if verdict not in (None, "commit", "abort"):
            raise _wrong(plugin, "qcow2_backup_recover", '"commit", "abort" or None', verdict)
        known: Verdict | None = verdict
        return known

    def finished(self, job: Job, result: JobResult) -> None:
        """Tell how a job ended; returns at once. `close` waits until everybody has heard."""
        self._calls.tell("qcow2_job_finished", job=job, result=result)

    # Afterwards

    def verify(self, manifest: Manifest, level: int) -> list[Finding]:
        """What plugins have against a point; a plugin that fails has that against it."""
        findings = []
        for asked in self._calls.asked("qcow2_verify"):
            listing = Asked(asked.plugin, _listing(asked))
            try:
                complaints = self._calls.ask("qcow2_verify", listing, manifest=manifest, level=level)
            except PluginError as error:
                complaints = [Complaint(disk=None, text=f"it cannot be verified: {error.detail}")]
            findings += [
                Finding(asked.plugin, None if each.disk is None else printable(each.disk), printable(each.text))
                for each in complaints
            ]
        return findings

    def restore_begin(self, restore: Restore) -> None:
        """Before anything is written. Raises PluginError, and then `restore_abort` is to be called."""
        self._restore.begin(restore.destination, restore=restore)

    def restore_commit(self, restore: Restore) -> list[PluginError]:
        """When the disk is there and durable: the failures, which were reported and change nothing."""
        return _all(self._calls, self._report, "qcow2_restore_commit", restore=restore)

    def restore_abort(self, restore: Restore, error: BaseException | str) -> None:
        """The disk was not restored. Never raises what a plugin raises."""
        self._restore.abort(restore.destination, restore=restore, error=str(error) or type(error).__name__)

    def guest_inspected(self, guest: Guest) -> None:
        """Tell what is in a guest; returns at once."""
        self._calls.tell("qcow2_guest_inspected", guest=guest)


class _Course:
    """What is begun by participants in order, and aborted in reverse."""

    def __init__(self, calls: Calls, report: Report, begin: str, abort: str) -> None:
        self._calls = calls
        self._report = report
        self._begin = begin
        self._abort = abort
        self._begun: dict[str, list[str]] = {}

    def begin(self, key: str, **arguments: Any) -> None:
        begun = self._begun[key] = []
        beginning = self._calls.asked(self._begin)
        for asked in beginning:
            begun.append(asked.plugin)
            self._calls.ask(self._begin, asked, **arguments)
        names = {asked.plugin for asked in beginning}
        begun[:0] = [asked.plugin for asked in self._calls.asked(self._abort) if asked.plugin not in names]

    def abort(self, key: str, **arguments: Any) -> None:
        aborting = {asked.plugin: asked for asked in self._calls.asked(self._abort)}
        begun = self._begun.get(key)
        self._begun[key] = []
        for plugin in reversed(list(aborting) if begun is None else begun):
            if plugin in aborting:
                _tried(self._calls, self._report, self._abort, aborting[plugin], arguments)


def _all(calls: Calls, report: Report, hook: str, **arguments: Any) -> list[PluginError]:
    """The failures of all that have `hook`."""
    failures = [_tried(calls, report, hook, asked, arguments) for asked in calls.asked(hook)]
    return [failure for failure in failures if failure is not None]


def _tried(calls: Calls, report: Report, hook: str, asked: Asked, arguments: dict[str, Any]) -> PluginError | None:
    try:
        calls.ask(hook, asked, **arguments)
    except PluginError as error:
        report(str(error))
        return error
    return None


def _listing(asked: Asked) -> Callable[..., list[Complaint]]:
    """The call with all that its generator, if it is one, does."""

    def call(**arguments: Any) -> list[Complaint]:
        complaints = []
        for complaint in asked.call(**arguments) or ():
            if not isinstance(complaint, Complaint):
                raise TypeError(f"{type(complaint).__name__} is no Complaint")
            if not isinstance(complaint.text, str) or not isinstance(complaint.disk, str | None):
                raise TypeError("a Complaint is about a disk by its name, or None, and its text is text")
            complaints.append(complaint)
            if len(complaints) == _COMPLAINTS_LIMIT:
                break
        return complaints

    return call


def _plain(plugin: str, added: object) -> Any:
    """A copy of what a plugin adds to a manifest, if it can be part of one."""
    try:
        packed = json.dumps(added, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PluginError(plugin, f"failed in qcow2_backup_prepare: its answer is not JSON: {error}") from error
    if not isinstance(added, dict) or len(packed) > _EXTRA_LIMIT:
        raise _wrong(plugin, "qcow2_backup_prepare", f"an object of at most {_EXTRA_LIMIT} bytes", added)
    return json.loads(packed)


def _wrong(plugin: str | None, hook: str, expected: str, answer: object) -> PluginError:
    shown = repr(answer) if isinstance(answer, str | bytes | int | None) else type(answer).__name__
    return PluginError(plugin or "", f"failed in {hook}: its answer is to be {expected}, not {printable(shown[:80])}")


def _denied(reference: Reference, reason: str) -> ReferenceDeniedError:
    return ReferenceDeniedError(
        f'{reference.role} "{printable(reference.name)}" is not opened: {reason}', file=reference.referrer
    )
