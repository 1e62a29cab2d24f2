"""Values of a backup that nobody has made, for tests of those who are told of them."""

from __future__ import annotations

from qcow2_plugin.adapters.backup.model import DiskPlan, DiskRequest, Estimate, Job, Level, Manifest

REPOSITORY = "0011aabb"
POINT = "20261125t131500z-0007"


def job(job_id: str = "job-1") -> Job:
    return Job(
        job_id=job_id,
        repository_id=REPOSITORY,
        point=POINT,
        disks=(DiskRequest(disk="vda", path="/images/vda.qcow2"),),
        level=None,
    )


def plan(dirty: int = 65536) -> DiskPlan:
    return DiskPlan(
        disk="vda",
        path="/images/vda.qcow2",
        level=Level.INCREMENTAL,
        reason=None,
        base="20261124t131500z-0006",
        bitmaps=("qcow2-backup.0011aabb.20261124t131500z-0006",),
        virtual_size=1 << 30,
        estimate=Estimate(dirty_data=dirty, dirty_zero=0, dirty_hole=0, clean=(1 << 30) - dirty),
    )


def manifest() -> Manifest:
    return Manifest(repository_id=REPOSITORY, point=POINT, sequence=7, created=1_795_526_100, members=())
