"""QEMU accepts every header that a crash can leave while one header becomes another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.engine.header import read_header
from qcow2_plugin.engine.image_file import ImageFile
from qcow2_plugin.engine.metadata import read_metadata
from qcow2_plugin.format.header import Header
from tests.crash.header_work import CHANGES
from tests.support.crash_states import Crashes
from tests.support.fields import BACKING_FORMAT, BITMAPS
from tests.support.recording import Log, RecordingStorage
from tests.support.tools import ToolError, qemu_img, qemu_img_json

CREATED = {
    "plain": ["-o", "compat=1.1"],
    "overlay": ["-F", "raw", "-b", "base.raw"],
    "overlay, long name": ["-F", "raw", "-b", "./" * 450 + "base.raw"],
    "version 2, overlay": ["-o", "compat=0.10", "-F", "raw", "-b", "./" * 250 + "base.raw"],
    "small clusters": ["-o", "cluster_size=4096", "-F", "raw", "-b", "./" * 450 + "base.raw"],
}
CASES = [
    ("plain", "name"), ("plain", "bitmaps"), ("overlay", "name"), ("overlay", "bitmaps"), ("overlay", "no name"),
    ("overlay, long name", "name"), ("overlay, long name", "downgrade"), ("version 2, overlay", "upgrade"),
    ("version 2, overlay", "name"), ("small clusters", "name"), ("small clusters", "downgrade"),
]  # fmt: skip
NAME = "./" * 400 + "base.raw"


def fields(change: str, header: Header) -> dict[str, Any]:
    if change == "name":
        named = header.with_extension(BACKING_FORMAT, b"raw")
        return {"extensions": named.extensions, "backing_file": NAME.encode()}
    if change == "bitmaps":
        return {"extensions": header.with_extension(BITMAPS, None).extensions, "autoclear_features": 0}
    return CHANGES[change](header)


@pytest.mark.parametrize(("created", "change"), CASES)
def test_qemu_accepts_every_state(created: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.raw").write_bytes(bytes(1 << 20))
    qemu_img("create", "-q", "-f", "qcow2", *CREATED[created], "disk.qcow2", "1M")
    if change == "bitmaps":
        qemu_img("bitmap", "--add", "disk.qcow2", "b")
    initial = Path("disk.qcow2").read_bytes()
    log = Log()
    storage = RecordingStorage(log, 0, initial, "disk.qcow2")
    header = read_header(storage)
    file = ImageFile(storage, header, read_metadata(storage, header))
    file.update_header(**fields(change, header))
    crashes = Crashes(log, (initial,))
    contents = {bytes(crashes.state(plan).files[0].content()) for plan in crashes.plans()}
    assert len(contents) >= 2
    names = {None if each.backing_file is None else each.backing_file.decode() for each in (header, file.header)}
    for content in contents:
        Path("disk.qcow2").write_bytes(content)
        told = qemu_img_json("info", "disk.qcow2")
        assert told.get("backing-filename") in names
        try:
            qemu_img("check", "disk.qcow2")
        except ToolError as error:
            assert (change, error.returncode) == ("bitmaps", 3), error  # the bitmap's clusters leak
