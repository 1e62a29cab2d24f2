"""fio's nbd engine: one job, one connection, its report. Refuses to know which server answers."""

from __future__ import annotations

import json
from typing import NamedTuple

from .processes import BenchError, output_of
from .report import REQUESTS, Unit


class Workload(NamedTuple):
    """One way of reading or writing: `direction` is fio's word for it, `options` how it is done."""

    name: str
    direction: str
    options: tuple[str, ...]
    unit: Unit


def rate(uri: str, workload: Workload, *options: str) -> float:
    """One run; requests per second, or MiB per second, as the workload's unit says. `options` say how long it lasts."""
    told = report(uri, workload.direction, *workload.options, *options)
    return told["iops"] if workload.unit is REQUESTS else told["bw_bytes"] / 2**20


def report(uri: str, direction: str, *options: str) -> dict[str, float]:
    """The part of fio's report that is about this direction."""
    told = output_of(
        ["fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", *options, "--eta=never", "--output-format=json"]
    )
    job = json.loads(told[told.index("{") :])["jobs"][0]
    if job["error"]:
        raise BenchError(f"fio ended with error {job['error']}")
    figures: dict[str, float] = job[direction]
    return figures
