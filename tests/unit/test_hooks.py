"""The call classes: who is asked, in which order, and what a failure of a plugin means."""

from __future__ import annotations

import errno
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from qcow2_plugin.adapters.backup import hookspecs
from qcow2_plugin.adapters.backup.calls import MAX_FAILURES, MAX_WAITING
from qcow2_plugin.adapters.backup.hook_values import (
    BaseChoice,
    Batch,
    Complaint,
    Decision,
    JobResult,
    JournalEntry,
    Location,
    Restore,
)
from qcow2_plugin.adapters.backup.hookspecs import hookimpl
from qcow2_plugin.adapters.backup.manager import Hooks
from qcow2_plugin.adapters.backup.model import ProgressEvent
from qcow2_plugin.adapters.backup.secrets import Secret
from qcow2_plugin.engine.files import Reference
from qcow2_plugin.errors import OptionError, PluginError, ReferenceDeniedError, TargetError
from qcow2_plugin.storage.opener import Policy
from tests.support.jobs import POINT, job, manifest, plan

NAMED = Reference("data file", b"disk.raw", "/images/disk.qcow2", 1, False, Policy.CONFINED)
FOUND = Location(uri="/images/disk.raw", plugin=None)
ENTRY = JournalEntry(
    job_id="job-1", repository_id="0011aabb", point=POINT, disks=("vda",), phase="copy", started=None, is_published=None
)
RESTORE = Restore(manifest=manifest(), disk="vda", destination="/images/new.raw", format="raw")
PATIENCE = 20.0  # seconds for what takes none


def plugin(**hooks: Callable[..., object]) -> object:
    """A plugin with these functions, whose names lack the prefix."""
    made = type("Plugin", (), {})()
    made.QCOW2_PLUGIN_API = hookspecs.API_LEVEL
    for name, function in hooks.items():
        setattr(made, f"qcow2_{name}", hookimpl(function))
    return cast(object, made)


def failing(error: BaseException) -> Callable[..., object]:
    def hook() -> object:
        raise error

    return hook


def answering(answer: object) -> Callable[..., object]:
    def hook() -> object:
        return answer

    return hook


class Speechless(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


class Told:
    """What was reported, and plugins that note that they are called."""

    def __init__(self) -> None:
        self.reports: list[str] = []
        self.calls: list[str] = []

    def hooks(self, own: Mapping[str, object], **options: Any) -> Hooks:
        return Hooks.load(use_installed=False, own=own, report=self.reports.append, **options)

    def noting(self, word: str, error: BaseException | None = None) -> Callable[..., object]:
        def hook() -> None:
            self.calls.append(word)
            if error is not None:
                raise error

        return hook


@pytest.fixture
def told() -> Told:
    return Told()


def test_the_last_one_to_come_is_asked_first_and_the_built_in_ones_last(told: Told) -> None:
    hooks = told.hooks({"a": plugin(backup_begin=told.noting("a")), "b": plugin(backup_begin=told.noting("b"))})
    hooks.begin(job())
    assert told.calls == ["b", "a"]
    assert hooks.select_base(job(), "vda", ("new", "old")).point == "new"

    class Modest:
        QCOW2_PLUGIN_API = 1

        @hookimpl(trylast=True)
        def qcow2_select_base(self) -> BaseChoice:
            return BaseChoice(point="old")

    assert told.hooks({"modest": Modest()}).select_base(job(), "vda", ("new", "old")).point == "old"


class TestVeto:
    def test_the_policy_allows_what_it_would_open(self, told: Told) -> None:
        hooks = told.hooks({})
        hooks.authorize(NAMED, FOUND)
        for name, policy in ((b"/etc/shadow", Policy.CONFINED), (b"disk.raw", Policy.INSPECT)):
            with pytest.raises(ReferenceDeniedError, match=r"builtin-references") as denied:
                hooks.authorize(NAMED._replace(name=name, policy=policy), FOUND)
            assert "/images/disk.qcow2" in str(denied.value)

    def test_one_that_refuses_refuses_for_all(self, told: Told) -> None:
        yes = plugin(authorize_reference=answering(Decision(True)))
        no = plugin(authorize_reference=answering(Decision(False, "not \x1btoday")))
        for own in ({"yes": yes, "no": no}, {"no": no, "yes": yes}):
            with pytest.raises(ReferenceDeniedError, match=r"not \\x1btoday \(plugin no\)"):
                told.hooks(own).authorize(NAMED, FOUND)

    @pytest.mark.parametrize(
        "error", [Speechless(), ValueError("x"), OSError(errno.EIO, "x"), SystemExit(0), RecursionError()]
    )
    def test_one_that_fails_refuses(self, told: Told, error: BaseException) -> None:
        with pytest.raises(ReferenceDeniedError, match=r'plugin "bad" failed in qcow2_authorize_reference'):
            told.hooks({"bad": plugin(authorize_reference=failing(error))}).authorize(NAMED, FOUND)

    @pytest.mark.parametrize("answer", [True, "yes", 0, Decision(False, cast(str, None))])
    def test_a_wrong_answer_refuses(self, told: Told, answer: object) -> None:
        with pytest.raises(ReferenceDeniedError, match=r'plugin "bad" .* is to be a Decision or None'):
            told.hooks({"bad": plugin(authorize_reference=answering(answer))}).authorize(NAMED, FOUND)

    def test_no_opinions_are_no_leave(self, told: Told) -> None:
        located = Location(uri="/dev/sda", plugin="volumes")
        with pytest.raises(ReferenceDeniedError, match=r'no plugin allows to open /dev/sda, where plugin "volumes"'):
            told.hooks({"shy": plugin(authorize_reference=answering(None))}).authorize(NAMED, located)
        with pytest.raises(ReferenceDeniedError, match="no plugin allows"):
            told.hooks({}, blocked={"builtin-references"}).authorize(NAMED, FOUND)
        told.hooks({"volumes": plugin(authorize_reference=answering(Decision(True)))}).authorize(NAMED, located)


class TestProvider:
    def test_the_first_answer_counts(self, told: Told) -> None:
        hooks = told.hooks(
            {
                "last": plugin(backup_recover=answering("abort")),
                "first": plugin(backup_recover=answering("commit")),
                "silent": plugin(backup_recover=told.noting("silent")),
            }
        )
        assert hooks.recover(ENTRY) == "commit"
        assert told.calls == ["silent"]

    def test_the_catalogue_knows_unless_nobody_could_look(self, told: Told) -> None:
        entry = JournalEntry(
            job_id="j", repository_id="0011aabb", point=POINT, disks=(), phase="copy", started=1, is_published=True
        )
        assert (told.hooks({}).recover(entry), told.hooks({}).recover(ENTRY)) == ("commit", None)

    def test_a_failure_is_the_failure_of_the_operation(self, told: Told) -> None:
        hooks = told.hooks({"bad": plugin(backup_recover=failing(OSError(errno.ENOSPC, "full \x07")))})
        with pytest.raises(
            PluginError, match=r'plugin "bad" failed in qcow2_backup_recover: OSError: .*full \\x07'
        ) as e:
            hooks.recover(ENTRY)
        assert (e.value.plugin, e.value.errno) == ("bad", errno.ENOSPC)

    def test_errors_of_built_in_plugins_stay_what_they_are(self, told: Told) -> None:
        with pytest.raises(FileNotFoundError):
            told.hooks({}).secret("file:/nowhere/at/all", "a test")

    @pytest.mark.parametrize(
        ("name", "answer", "call"),
        [
            ("backup_recover", "perhaps", lambda hooks: hooks.recover(ENTRY)),
            ("locate_reference", b"bytes", lambda hooks: hooks.locate(NAMED)),
            ("locate_reference", "", lambda hooks: hooks.locate(NAMED)),
            ("locate_reference", "a\0b", lambda hooks: hooks.locate(NAMED)),
            ("open_storage", object(), lambda hooks: hooks.open_storage("x", writable=False)),
            ("open_target", object(), lambda hooks: hooks.target("x:")),
            ("resolve_secret", b"bytes", lambda hooks: hooks.secret("x", "y")),
            ("select_base", "new", lambda hooks: hooks.select_base(job(), "vda", ("new",))),
            ("select_base", BaseChoice(point="other"), lambda hooks: hooks.select_base(job(), "vda", ("new",))),
            (
                "select_base",
                BaseChoice(point="new", reason=cast(str, 7)),
                lambda hooks: hooks.select_base(job(), "x", ("new",)),
            ),
            ("backup_prepare", [1], lambda hooks: hooks.prepare(job(), manifest())),
            ("backup_prepare", {"a": b"x"}, lambda hooks: hooks.prepare(job(), manifest())),
            ("backup_prepare", {"a": float("nan")}, lambda hooks: hooks.prepare(job(), manifest())),
            ("backup_prepare", {"a": "x" * 70000}, lambda hooks: hooks.prepare(job(), manifest())),
        ],
    )
    def test_wrong_answers_are_failures(
        self, told: Told, name: str, answer: object, call: Callable[[Hooks], object]
    ) -> None:
        with pytest.raises(PluginError, match=rf'plugin "bad" failed in qcow2_{name}: '):
            call(told.hooks({"bad": plugin(**{name: answering(answer)})}))

    def test_what_nobody_knows_is_an_error_that_says_so(self, told: Told) -> None:
        hooks = told.hooks({})
        with pytest.raises(TargetError, match="tape:0 is no place"):
            hooks.target("tape:0")
        with pytest.raises(OptionError, match="no plugin has the secret vault:x"):
            hooks.secret("vault:x", "a test")
        with pytest.raises(OptionError, match="no plugin can open rbd:x"):
            hooks.open_storage("rbd:x", writable=False)
        assert hooks.locate(NAMED) is None

    def test_a_base_is_one_of_the_candidates_or_none_and_why(self, told: Told) -> None:
        assert told.hooks({}).select_base(job(), "vda", ()).reason == "there is no point to build on"
        older = told.hooks({"x": plugin(select_base=answering(BaseChoice(point="old")))})
        assert older.select_base(job(), "vda", ("new", "old")).point == "old"
        full = told.hooks({"sunday": plugin(select_base=answering(BaseChoice(point=None)))})
        assert full.select_base(job(), "vda", ("new",)).reason == 'plugin "sunday" wants a full one'


class TestParticipants:
    def trio(self, told: Told, failing_in: str | None = None) -> Hooks:
        """Three plugins, asked as c, b, a; b fails in a hook."""
        own = {}
        for name in "abc":
            error = {failing_in: RuntimeError("no")} if name == "b" else {}
            phases = ("backup_begin", "backup_plan", "backup_prepare", "backup_commit", "backup_abort")
            own[name] = plugin(**{phase: told.noting(f"{name} {phase[7:]}", error.get(phase)) for phase in phases})
        return told.hooks(own)

    def test_what_was_begun_is_aborted_in_reverse_that_which_failed_included(self, told: Told) -> None:
        hooks = self.trio(told, "backup_begin")
        with pytest.raises(PluginError, match=r'plugin "b" failed in qcow2_backup_begin: RuntimeError: no'):
            hooks.begin(job())
        hooks.abort(job(), "begin", "no")
        assert told.calls == ["c begin", "b begin", "b abort", "c abort"]
        hooks.abort(job(), "begin", "again")
        assert len(told.calls) == 4, "a second abort does nothing"

    @pytest.mark.parametrize("phase", ["plan", "prepare"])
    def test_a_later_failure_aborts_all(self, told: Told, phase: str) -> None:
        hooks = self.trio(told, f"backup_{phase}")
        hooks.begin(job())
        with pytest.raises(PluginError, match=f"qcow2_backup_{phase}"):
            hooks.plan(job(), [plan()])
            hooks.prepare(job(), manifest())
        hooks.abort(job(), phase, "no")
        assert told.calls[-3:] == ["a abort", "b abort", "c abort"]
        assert f"a {phase}" not in told.calls

    def test_after_a_crash_all_are_aborted(self, told: Told) -> None:
        self.trio(told).abort(job(), "recovery", "killed")
        assert told.calls == ["a abort", "b abort", "c abort"]

    def test_who_only_aborts_is_told_when_all_had_begun(self, told: Told) -> None:
        hooks = told.hooks(
            {"quiet": plugin(backup_abort=told.noting("quiet")), "a": plugin(backup_begin=told.noting("a begins"))}
        )
        hooks.begin(job())
        hooks.abort(job(), "copy", KeyboardInterrupt())
        assert told.calls == ["a begins", "quiet"]

    def test_a_failing_abort_does_not_stop_the_others(self, told: Told) -> None:
        hooks = self.trio(told, "backup_abort")
        hooks.begin(job())
        hooks.abort(job(), "copy", OSError())
        assert told.calls[-3:] == ["a abort", "b abort", "c abort"]
        assert told.reports == ['plugin "b" failed in qcow2_backup_abort: RuntimeError: no']

    def test_a_commit_is_for_all_and_failures_are_told(self, told: Told) -> None:
        hooks = self.trio(told, "backup_commit")
        hooks.begin(job())
        (failure,) = hooks.commit(job(), manifest())
        assert told.calls[-3:] == ["c commit", "b commit", "a commit"]
        assert told.reports == [str(failure)]

    def test_what_plugins_add_is_theirs_alone(self, told: Told) -> None:
        added: dict[str, Any] = {"signature": [1]}
        hooks = told.hooks({"a": plugin(backup_prepare=answering(added)), "b": plugin(backup_prepare=answering(None))})
        extra = hooks.prepare(job(), manifest())
        added["signature"].append(2)
        assert extra == {"a": {"signature": [1]}}

    def test_a_restore_is_begun_and_aborted_alike(self, told: Told) -> None:
        hooks = told.hooks(
            {
                "a": plugin(restore_begin=told.noting("a"), restore_abort=told.noting("a ends")),
                "b": plugin(restore_begin=told.noting("b", OSError("no")), restore_abort=told.noting("b ends")),
                "c": plugin(restore_commit=told.noting("c", OSError("no")), restore_abort=told.noting("c ends")),
            }
        )
        with pytest.raises(PluginError, match="qcow2_restore_begin"):
            hooks.restore_begin(RESTORE)
        hooks.restore_abort(RESTORE, "no")
        assert told.calls == ["b", "b ends"]
        assert [str(each) for each in hooks.restore_commit(RESTORE)] == told.reports


def test_complaints_are_collected_and_a_failure_is_one(told: Told) -> None:
    def unsigned() -> Iterator[Complaint]:
        yield Complaint(disk="vda", text="no \x1bsignature")

    def breaking() -> Iterator[Complaint]:
        yield Complaint(disk=None, text="lost")
        raise KeyError("catalogue")

    def endless() -> Iterator[Complaint]:
        while True:
            yield Complaint(disk=None, text="again")

    hooks = told.hooks(
        {
            "a": plugin(verify=unsigned),
            "b": plugin(verify=breaking),
            "c": plugin(verify=answering(None)),
            "d": plugin(verify=answering(["text"])),
            "e": plugin(verify=endless),
            "f": plugin(verify=answering([Complaint(disk=cast(str, 7), text="x")])),
        }
    )
    found = hooks.verify(manifest(), 1)
    by_plugin = {name: [each for each in found if each.plugin == name] for name in "abcdef"}
    assert by_plugin["a"][0][1:] == ("vda", "no \\x1bsignature")
    assert "failed in qcow2_verify: KeyError" in by_plugin["b"][0].text
    assert not by_plugin["c"]
    assert "str is no Complaint" in by_plugin["d"][0].text
    assert len(by_plugin["e"]) == 1000
    assert "TypeError: a Complaint is about a disk" in by_plugin["f"][0].text


class TestObservers:
    def test_they_hear_everything_in_order(self, told: Told) -> None:
        heard: list[int] = []
        hooks = told.hooks({"a": plugin(batch_written=lambda batch: heard.append(batch.guest_offset))})
        with hooks:
            for number in range(200):
                hooks.batch(job(), Batch(disk="vda", guest_offset=number, length=1, stored=1))
        assert heard == list(range(200))

    def test_a_failing_one_is_muted_after_three_and_others_hear_on(self, told: Told) -> None:
        hooks = told.hooks(
            {"good": plugin(progress=told.noting("good")), "bad": plugin(progress=told.noting("bad", OSError("x")))}
        )
        with hooks:
            for done in range(10):
                hooks.progress(ProgressEvent(job_id="j", phase="copy", disk=None, done=done, total=10))
        assert (told.calls.count("good"), told.calls.count("bad")) == (10, MAX_FAILURES)
        assert told.reports[-1] == 'plugin "bad" failed 3 times; it is told nothing more'
        assert len(told.reports) == MAX_FAILURES + 1

    def test_a_stuck_one_holds_up_nobody(self, told: Told) -> None:
        release = threading.Event()
        own = {"stuck": plugin(job_finished=lambda: release.wait(PATIENCE)), "x": plugin(job_finished=told.noting("x"))}
        hooks = told.hooks(own, observer_limit=0.2)
        begun = time.monotonic()
        hooks.finished(job(), JobResult(manifest=manifest()))
        assert time.monotonic() - begun < 0.2
        hooks.close()
        assert time.monotonic() - begun < PATIENCE / 4
        assert told.calls == ["x"]
        assert told.reports == [
            'plugin "stuck" did not come back from qcow2_job_finished within 0.2 seconds; it is told nothing more'
        ]
        release.set()

    def test_a_stuck_one_is_found_while_the_job_runs(self, told: Told) -> None:
        release = threading.Event()
        hooks = told.hooks({"stuck": plugin(progress=lambda: release.wait(PATIENCE))}, observer_limit=0.1)
        event = ProgressEvent(job_id="j", phase="copy", disk=None, done=0, total=1)
        for _ in range(3):
            hooks.progress(event)
            time.sleep(0.2)
        assert len(told.reports) == 1
        assert "did not come back from qcow2_progress" in told.reports[0]
        release.set()
        hooks.close()

    def test_a_slow_one_misses_progress_but_not_the_end(self, told: Told) -> None:
        release = threading.Event()
        slow = plugin(progress=lambda: release.wait(PATIENCE), job_finished=told.noting("end"))
        hooks = told.hooks({"slow": slow})
        for done in range(2 * MAX_WAITING):
            hooks.progress(ProgressEvent(job_id="j", phase="copy", disk=None, done=done, total=1))
        hooks.finished(job(), JobResult(manifest=None, error="x"))
        release.set()
        hooks.close()
        assert told.calls == ["end"]
        (report,) = told.reports
        assert report.startswith('plugin "slow" was too slow to be told of')


def test_a_plugin_that_a_job_waits_for_is_named_while_it_does(told: Told) -> None:
    reported = threading.Event()

    def report(line: str) -> None:
        told.reports.append(line)
        reported.set()

    slow = plugin(backup_begin=lambda: reported.wait(PATIENCE))
    Hooks.load(use_installed=False, own={"slow": slow}, report=report, slow=0.05).begin(job())
    assert told.reports == ['waiting for plugin "slow" in qcow2_backup_begin for 0.05 seconds now']


def test_many_threads_may_tell(told: Told) -> None:
    heard: list[tuple[str, int]] = []
    noting = plugin(batch_written=lambda batch: heard.append((threading.current_thread().name, batch.guest_offset)))
    with told.hooks({"a": noting}) as hooks:

        def tell(first: int) -> None:
            for number in range(first, first + 50):
                hooks.batch(job(), Batch(disk="vda", guest_offset=number, length=1, stored=1))

        threads = [threading.Thread(target=tell, args=(first,)) for first in range(0, 400, 50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(number for _, number in heard) == list(range(400))
    assert {name for name, _ in heard} == {"plugin a"}


class TestSecrets:
    def test_nothing_but_reveal_shows_one(self) -> None:
        secret = Secret(b"hunter2")
        shown = [repr(secret), str(secret), f"{secret}", f"{[secret]}"]
        assert not any("hunter2" in each for each in shown)
        assert secret.reveal() == b"hunter2"
        with pytest.raises(TypeError):
            pickle.dumps(secret)
        secret.wipe()
        assert secret.reveal() == b""

    def test_none_reaches_a_trace(self, told: Told) -> None:
        hooks = told.hooks({"vault": plugin(resolve_secret=answering(Secret(b"hunter2")))})
        registry = hooks._calls._plugins.registry
        traced: list[str] = []
        registry.trace.root.setwriter(traced.append)
        registry.enable_tracing()
        assert hooks.secret("vault:x", "a test").reveal() == b"hunter2"
        wrong = told.hooks({"bad": plugin(resolve_secret=answering(b"hunter2"))})
        with pytest.raises(PluginError) as error:
            wrong.secret("vault:x", "a test")
        assert "hunter2" not in "".join([*traced, *told.reports, str(error.value)])

    def test_a_file_holds_one_with_or_without_a_line_end(self, told: Told, tmp_path: Path) -> None:
        file = tmp_path / "secret"
        for content, secret in ((b"a\n", b"a"), (b"a\r\n", b"a"), (b"a b", b"a b"), (b"a\n\n", b"a\n")):
            file.write_bytes(content)
            assert told.hooks({}).secret(f"file:{file}", "a test").reveal() == secret
        for content in (b"", b"\n", bytes(70000)):
            file.write_bytes(content)
            with pytest.raises(OptionError, match="secret"):
                told.hooks({}).secret(f"file:{file}", "a test")


def test_files_are_opened_by_path_and_by_uri(told: Told, tmp_path: Path) -> None:
    file = tmp_path / "disk.raw"
    file.write_bytes(b"x")
    for location in (str(file), f"file:{file}", f"file://{file}"):
        storage = told.hooks({}).open_storage(location, writable=False)
        assert storage.pread(1, 0) == b"x"
        storage.close()


def test_one_that_is_always_nearly_too_slow_does_not_hold_up_the_end(told: Told) -> None:
    slow = plugin(progress=lambda: time.sleep(0.1), job_finished=told.noting("end"))
    hooks = told.hooks({"slow": slow}, observer_limit=0.2)
    for done in range(50):
        hooks.progress(ProgressEvent(job_id="j", phase="copy", disk=None, done=done, total=1))
    hooks.finished(job(), JobResult(manifest=None, error="x"))
    begun = time.monotonic()
    hooks.close()
    assert time.monotonic() - begun < 2
    assert told.calls == ["end"]


def test_neither_a_password_in_a_place_nor_what_should_have_named_a_secret_is_shown(told: Told) -> None:
    hooks = told.hooks({})
    with pytest.raises(TargetError) as refused:
        hooks.target("tape://me:hunter2@host/")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(OptionError) as unknown:
        hooks.secret("hunter2", "a test")
    assert "hunter2" not in str(unknown.value)
