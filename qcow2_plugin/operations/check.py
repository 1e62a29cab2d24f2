"""Checking an image, and putting right what is wrong with it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal

from qcow2_plugin.engine.checking.check import check_image, read_header_for_check
from qcow2_plugin.engine.checking.findings import DEFAULT_MAX_FINDINGS, CheckResult, Progress
from qcow2_plugin.engine.files import ChainFiles
from qcow2_plugin.errors import OptionError
from qcow2_plugin.storage.opener import Policy

Path = str | os.PathLike[str]
Repair = Literal["leaks", "all"]


def check(
    path: Path,
    *,
    repair: Repair | None = None,
    repair_ours: bool = False,
    to: Path | None = None,
    deep: bool = False,
    stop_after: int | None = None,
    max_findings: int | None = DEFAULT_MAX_FINDINGS,
    progress: Progress | None = None,
    policy: Policy = Policy.CONFINED,
    data_file: Path | None = None,
    base_directory: Path | None = None,
    force_share: bool = False,
) -> CheckResult:
    """Check the qcow2 image at `path`, and put right what `repair` says.

    Without `repair` nothing is changed, whatever state the image is in. "leaks" frees space that nothing refers to,
    "all" mends everything that `qemu-img check -r all` does, and with `repair_ours` also what only we find; the result
    is that of another check afterwards, with what was put right. `to` leaves the image alone and repairs a copy of that
    name, which must not exist.

    `deep` holds a raw data file against the image also where that says zeros. The check ends after `stop_after`
    findings; of each kind `max_findings` are kept (None: all). `progress` is called now and then.

    The external data file is opened, as `open_image` does it; backing files are not. `force_share` checks although
    another program may write to the image, which can then look damaged without being so.

    Raises OptionError for options that contradict each other; any Qcow2Error if the image is beyond checking or cannot
    be repaired; OSError. Memory: see `engine.checking.check`.
    """
    _require_sense(
        path, repair=repair, repair_ours=repair_ours, to=to, looks=deep or stop_after is not None, shares=force_share
    )
    if repair is None:
        found = _check(
            path,
            policy=policy,
            data_file=data_file,
            base_directory=base_directory,
            force_share=force_share,
            deep=deep,
            stop_after=stop_after,
            max_findings=max_findings,
            progress=progress,
        )
    elif to is None:
        found = _repair(
            path,
            repair,
            repair_ours=repair_ours,
            policy=policy,
            data_file=data_file,
            base_directory=base_directory,
            max_findings=max_findings,
            progress=progress,
        )
    else:
        from qcow2_plugin.operations.repair_copy import repair_to

        found = repair_to(
            path,
            to,
            mode=repair,
            repair_ours=repair_ours,
            policy=policy,
            data_file=data_file,
            base_directory=base_directory,
            force_share=force_share,
            max_findings=max_findings,
            progress=progress,
        )
    return replace(found, references=None, tables_not_alone=None)


def _require_sense(
    path: Path, *, repair: Repair | None, repair_ours: bool, to: Path | None, looks: bool, shares: bool
) -> None:
    """Raises OptionError if the options contradict each other."""
    detail = None
    if repair is None and (repair_ours or to is not None):
        detail = "say what to repair, leaks or all"
    elif repair_ours and repair != "all":
        detail = "what only we find is repaired with everything else only: repair all"
    elif repair is not None and looks:
        detail = "a repair looks at everything: leave out what is for a check only (deep, stop after)"
    elif repair is not None and to is None and shares:
        detail = "an image that others may write to is not repaired; stop them, or repair a copy"
    if detail is not None:
        raise OptionError(detail, file=os.fspath(path))


def _check(
    path: Path,
    *,
    policy: Policy,
    data_file: Path | None,
    base_directory: Path | None,
    force_share: bool,
    deep: bool,
    stop_after: int | None,
    max_findings: int | None,
    progress: Progress | None,
) -> CheckResult:
    with ExitStack() as resources:
        files = ChainFiles(resources, policy=policy, base_directory=base_directory, force_share=force_share)
        storage = files.open_top(path)
        header = read_header_for_check(storage)
        return check_image(
            storage,
            header,
            data=files.open_data_file(header, storage, data_file),
            deep=deep,
            stop_after=stop_after,
            max_findings=max_findings,
            progress=progress,
        )


def _repair(
    path: Path,
    repair: Repair,
    *,
    repair_ours: bool,
    policy: Policy,
    data_file: Path | None,
    base_directory: Path | None,
    max_findings: int | None,
    progress: Progress | None,
) -> CheckResult:
    from qcow2_plugin.engine.repairing.repair import repair_image  # who only checks need not wait for it

    with ExitStack() as resources:
        files = ChainFiles(resources, policy=policy, writable=True, base_directory=base_directory)
        storage = files.open_top(path)
        header = read_header_for_check(storage)
        return repair_image(
            storage,
            header,
            mode=repair,
            repair_ours=repair_ours,
            data=files.open_data_file(header, storage, data_file),
            max_findings=max_findings,
            progress=progress,
        )
