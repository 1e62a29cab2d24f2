"""The hooks in real backups and restores: their order, and what a plugin that fails in one of them leaves."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin import create_image, open_image
from qcow2_plugin.adapters.backup.hook_values import BaseChoice, Batch, Complaint, JobResult, JournalEntry
from qcow2_plugin.adapters.backup.hookspecs import CLASSES, CallClass, hookimpl
from qcow2_plugin.adapters.backup.job import plan_backup, run_backup
from qcow2_plugin.adapters.backup.manager import Hooks
from qcow2_plugin.adapters.backup.model import DiskPlan, DiskRequest, Job, Level, Manifest
from qcow2_plugin.adapters.backup.repository import Repository
from qcow2_plugin.adapters.backup.restore import Request, restore
from qcow2_plugin.adapters.backup.targets.directory import DirectoryTarget
from qcow2_plugin.adapters.backup.verify import verify
from qcow2_plugin.errors import BackupError, PluginError
from tests.support.tools import qemu_img, qemu_img_json

MIB = 1 << 20
BEFORE_PUBLISHING = ("qcow2_backup_begin", "qcow2_select_base", "qcow2_backup_plan", "qcow2_backup_prepare")


class Vendor:
    """Takes part in everything, notes it, and fails where it is told to."""

    QCOW2_PLUGIN_API = 1

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.fails_in: str | None = None
        self.base: BaseChoice | None = None
        self.verdict: str | None = None
        self.batches: list[Batch] = []
        self.results: list[JobResult] = []
        self.plans: tuple[DiskPlan, ...] = ()

    def note(self, hook: str) -> None:
        self.heard.append(hook)
        if hook == self.fails_in:
            raise RuntimeError("no room left")

    @hookimpl
    def qcow2_backup_begin(self, job: Job) -> None:
        self.note("qcow2_backup_begin")

    @hookimpl
    def qcow2_select_base(self, disk: str) -> BaseChoice | None:
        self.note("qcow2_select_base")
        return self.base

    @hookimpl
    def qcow2_backup_plan(self, plans: tuple[DiskPlan, ...]) -> None:
        self.plans = plans
        self.note("qcow2_backup_plan")

    @hookimpl
    def qcow2_batch_written(self, batch: Batch) -> None:
        self.batches.append(batch)

    @hookimpl
    def qcow2_backup_prepare(self, manifest: Manifest) -> dict[str, Any]:
        self.note("qcow2_backup_prepare")
        return {"receipt": len(manifest.members)}

    @hookimpl
    def qcow2_backup_commit(self, manifest: Manifest) -> None:
        self.note("qcow2_backup_commit")

    @hookimpl
    def qcow2_backup_abort(self, phase: str, error: str) -> None:
        self.note("qcow2_backup_abort")

    @hookimpl
    def qcow2_backup_recover(self, entry: JournalEntry) -> str | None:
        self.note("qcow2_backup_recover")
        return self.verdict

    @hookimpl
    def qcow2_job_finished(self, result: JobResult) -> None:
        self.results.append(result)

    @hookimpl
    def qcow2_verify(self, manifest: Manifest, level: int) -> list[Complaint]:
        return [Complaint(disk="vda", text=f"not signed, at level {level}")]

    @hookimpl
    def qcow2_restore_begin(self) -> None:
        self.note("qcow2_restore_begin")

    @hookimpl
    def qcow2_restore_commit(self) -> None:
        self.note("qcow2_restore_commit")

    @hookimpl
    def qcow2_restore_abort(self) -> None:
        self.note("qcow2_restore_abort")


class Work:
    """One image, one repository, one plugin."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.image = folder / "disk.qcow2"
        create_image(self.image, 8 * MIB)
        (folder / "backups").mkdir()
        self.target = DirectoryTarget(folder / "backups")
        self.vendor = Vendor()
        self.reports: list[str] = []
        self.hooks = Hooks.load(use_installed=False, own={"vendor": self.vendor}, report=self.reports.append)
        self.numbers = itertools.count()

    def change(self) -> None:
        number = next(self.numbers)
        with open_image(self.image, writable=True) as disk:
            disk.pwrite(bytes([number + 1]) * 70000, number * MIB // 2)

    def back_up(self) -> Manifest:
        self.vendor.heard.clear()
        return run_backup(self.disks, self.target, hooks=self.hooks)

    @property
    def disks(self) -> list[DiskRequest]:
        return [DiskRequest(disk="vda", path=str(self.image))]

    @property
    def points(self) -> list[str]:
        return [point.point for point in Repository.open(self.target).points()]

    def bitmaps(self) -> list[str]:
        told = qemu_img_json("info", "-f", "qcow2", self.image)["format-specific"]["data"].get("bitmaps", [])
        return sorted(bitmap["name"] for bitmap in told if "auto" in bitmap["flags"])

    def require_equal(self, manifest: Manifest) -> None:
        member = self.folder / "backups" / manifest.members[0].file
        qemu_img("compare", "-f", "qcow2", "-F", "qcow2", self.image, member)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


def test_a_backup_calls_them_in_the_order_that_is_documented(work: Work) -> None:
    work.change()
    work.back_up()
    work.change()
    manifest = work.back_up()
    work.hooks.close()
    assert work.vendor.heard == [*BEFORE_PUBLISHING, "qcow2_backup_commit"]
    assert manifest.extra == {"vendor": {"receipt": 1}}
    assert work.vendor.plans[0].level is Level.INCREMENTAL
    assert [result.manifest and result.manifest.point for result in work.vendor.results] == work.points
    ends = [batch.guest_offset + batch.length for batch in work.vendor.batches]
    assert ends, "parts are told of"
    assert not work.reports
    work.require_equal(manifest)


@pytest.mark.parametrize("hook", BEFORE_PUBLISHING)
def test_a_failure_before_the_point_is_there_leaves_all_as_it_was(work: Work, hook: str) -> None:
    work.change()
    work.back_up()
    work.change()
    files, bitmaps = work.target.names(), work.bitmaps()
    work.vendor.fails_in = hook
    with pytest.raises(PluginError, match=rf'plugin "vendor" failed in {hook}: RuntimeError: no room left'):
        work.back_up()
    assert work.vendor.heard[-1] == "qcow2_backup_abort"
    assert (work.target.names(), work.bitmaps()) == (files, bitmaps)
    work.vendor.fails_in = None
    work.change()
    manifest = work.back_up()
    assert manifest.members[0].level is Level.INCREMENTAL
    work.require_equal(manifest)
    work.hooks.close()
    assert [result.error is None for result in work.vendor.results] == [True, False, True]


def test_a_failure_after_the_point_is_there_is_told_again_to_the_plugin(work: Work) -> None:
    work.change()
    work.vendor.fails_in = "qcow2_backup_commit"
    first = work.back_up()
    assert work.points == [first.point]
    assert work.reports == ['plugin "vendor" failed in qcow2_backup_commit: RuntimeError: no room left']
    work.vendor.fails_in = None
    work.change()
    work.require_equal(work.back_up())
    assert work.vendor.heard[:3] == ["qcow2_backup_recover", "qcow2_backup_commit", "qcow2_backup_begin"]
    work.change()
    work.back_up()
    assert work.vendor.heard[0] == "qcow2_backup_begin"


def test_who_contradicts_the_catalogue_stops_the_recovery(work: Work) -> None:
    work.change()
    work.vendor.fails_in = "qcow2_backup_commit"
    work.back_up()
    work.vendor.fails_in = None
    work.vendor.verdict = "abort"
    before = work.target.names()
    with pytest.raises(BackupError, match="a plugin says abort where the repository says commit"):
        work.back_up()
    assert work.target.names() == before
    work.vendor.verdict = "commit"
    work.back_up()


def test_a_plugin_can_ask_for_a_full_one(work: Work) -> None:
    work.change()
    work.back_up()
    work.vendor.base = BaseChoice(point=None, reason="it is Sunday")
    (member,) = work.back_up().members
    assert (member.level, member.parent_file) == (Level.FULL, None)
    assert member.reason is not None and "it is Sunday" in member.reason
    work.vendor.base = BaseChoice(point="20010101t000000z-0001")
    with pytest.raises(PluginError, match="one of the candidates"):
        work.back_up()


def test_a_dry_run_asks_for_the_base_only(work: Work) -> None:
    work.change()
    work.back_up()
    work.vendor.heard.clear()
    plan_backup(work.disks, work.target, hooks=work.hooks)
    assert work.vendor.heard == ["qcow2_select_base"]


def test_complaints_are_findings(work: Work) -> None:
    work.change()
    manifest = work.back_up()
    (finding,) = verify(Repository.open(work.target), level=1, hooks=work.hooks).findings
    assert (finding.point, finding.disk) == (manifest.point, "vda")
    assert "not signed, at level 1" in finding.text and "vendor" in finding.text


@pytest.mark.parametrize(
    ("fails_in", "heard"),
    [
        (None, ["qcow2_restore_begin", "qcow2_restore_commit"]),
        ("qcow2_restore_begin", ["qcow2_restore_begin", "qcow2_restore_abort"]),
        ("qcow2_restore_commit", ["qcow2_restore_begin", "qcow2_restore_commit"]),
    ],
)
def test_a_restore_is_refused_or_told(work: Work, fails_in: str | None, heard: list[str]) -> None:
    work.change()
    work.back_up()
    work.vendor.heard.clear()
    work.vendor.fails_in = fails_in
    new = work.folder / "new.raw"

    def undertake() -> None:
        request = Request(to=str(new), form="raw")
        restore(Repository.open(work.target), "latest", "vda", request, hooks=work.hooks)

    if fails_in == "qcow2_restore_begin":
        with pytest.raises(PluginError, match="no room left"):
            undertake()
        assert not new.exists()
    else:
        undertake()
        qemu_img("compare", "-f", "qcow2", "-F", "raw", work.image, new)
    assert work.vendor.heard == heard


def test_this_plugin_has_every_hook_of_a_job() -> None:
    elsewhere = {name for name in CLASSES if name.partition("_")[2].split("_")[0] in ("locate", "authorize", "open")}
    elsewhere |= {"qcow2_resolve_secret", "qcow2_guest_inspected", "qcow2_progress"}
    assert set(CLASSES) - elsewhere == {name for name in vars(Vendor) if name in CLASSES}
    assert CLASSES["qcow2_progress"] is CallClass.OBSERVER
