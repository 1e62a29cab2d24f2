"""Repairing a copy: the image stays as it is, whatever comes of it."""

from __future__ import annotations

import os
from contextlib import ExitStack

from qcow2_plugin.engine.checking.check import read_header_for_check
from qcow2_plugin.engine.checking.findings import DEFAULT_MAX_FINDINGS, CheckResult, Progress
from qcow2_plugin.engine.files import ChainFiles
from qcow2_plugin.engine.repairing.repair import Mode, repair_image
from qcow2_plugin.operations.new_files import NewFiles
from qcow2_plugin.storage.copying import copy_content
from qcow2_plugin.storage.directory import require_unused
from qcow2_plugin.storage.opener import Policy

Path = str | os.PathLike[str]


def repair_to(
    path: Path,
    to: Path,
    *,
    mode: Mode,
    repair_ours: bool = False,
    policy: Policy = Policy.CONFINED,
    data_file: Path | None = None,
    base_directory: Path | None = None,
    force_share: bool = False,
    max_findings: int | None = DEFAULT_MAX_FINDINGS,
    progress: Progress | None = None,
) -> CheckResult:
    """Copy an image to `to`, which must not exist, and repair the copy; it has its name when that is done, durably.

    Of the image only the file itself is copied, with its holes, and to nobody who may not read or write the image. An
    external data file is read, never changed; the copy names the same one, so a relative name wants it in the same
    directory. Backing files are not opened. `force_share` copies although another program may write to the image; the
    copy may then be one of no moment.

    The result is that of `repair_image`. Raises what that raises; FileExistsError; what opening the files does. After
    an error there is no copy.
    """
    require_unused(to)
    with ExitStack() as resources, NewFiles() as files:
        chain = ChainFiles(resources, policy=policy, base_directory=base_directory, force_share=force_share)
        source = chain.open_top(path)
        header = read_header_for_check(source)
        data = chain.open_data_file(header, source, data_file)
        made = files.make_for(to, "copy")
        copy = made.storage
        os.chmod(made.path, 0o777 & copy.mode() & source.mode())
        copy_content(source, copy)
        result = repair_image(
            copy,
            header,
            mode=mode,
            repair_ours=repair_ours,
            data=data,
            max_findings=max_findings,
            progress=progress,
        )
        copy.barrier()
        made.give_name(to)
    return result
