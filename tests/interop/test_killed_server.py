"""The server is killed while clients write: what they had flushed is there, and the image is whole, judged by QEMU.

Two kinds of clients work at once, each on its own part of the disk: ours, whose journal says afterwards what may be
there, and fio, which reads back what it writes and checks it. Then the same for a server that is asked to end, where
nothing that was answered may be missing and not even a cluster may leak.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qcow2_plugin import Policy, open_image
from tests.support.journal import SECTOR, Journal
from tests.support.load import Load
from tests.support.tools import Server, ToolError, convert_to_raw, nbdkit, qemu_img, qemu_io

MIB = 1 << 20
JOURNALED = 6 * MIB + 3 * SECTOR
"""Bytes of the disk that the journal is about."""
FIO_OFFSET, FIO_SIZE = 8 * MIB, 2 * MIB
"""Where the first of fio's jobs works, and how much each has for itself."""
FIO_JOBS = 3
DISK = FIO_OFFSET + (FIO_JOBS + 1) * FIO_SIZE
FIO_STARTED = "fio.started"
LEAKS = 3
"""Exit code of qemu-img check when clusters are leaked and all else is well."""
PATIENCE = 30  # seconds for fio to notice that its server has gone


@dataclass(frozen=True)
class Kind:
    """A kind of image; `options` are those of qemu-img create."""

    name: str
    cluster_size: int
    options: str = ""
    backing: bool = False
    snapshot: bool = False

    @property
    def raw_data_file(self) -> bool:
        return "data_file_raw" in self.options

    def create(self, folder: Path) -> Path:
        """An image of `DISK` bytes."""
        path = folder / "disk.qcow2"
        backing: tuple[str | Path, ...] = ()
        if self.backing:
            base = folder / "base.raw"
            base.write_bytes(random.Random(7).randbytes(DISK // 2))
            backing = ("-b", base.name, "-F", "raw")
        options = ",".join(filter(None, (f"cluster_size={self.cluster_size}", self.options.format(folder))))
        qemu_img("create", "-q", "-f", "qcow2", *backing, "-o", options, path, str(DISK))
        if self.snapshot:
            qemu_io(path, f"write -q -P 77 12k {DISK // 2}")
            qemu_img("snapshot", "-c", "before", path)
        return path


KINDS = (
    Kind("64 KiB clusters", 65536),
    Kind("512 byte clusters", 512),
    Kind("4 KiB clusters over a backing file", 4096, backing=True),
    Kind("data file", 65536, "data_file={0}/disk.data"),
    Kind("raw data file, 4 KiB clusters", 4096, "data_file={0}/disk.data,data_file_raw=on"),
    Kind("subclusters", 65536, "extended_l2=on"),
    Kind("clusters shared with a snapshot", 4096, snapshot=True),
)


@contextlib.contextmanager
def killed(parameters: dict[str, str | Path], *options: str) -> Iterator[Server]:
    """A server that must have died of SIGKILL when the block ends."""
    with pytest.raises(ToolError) as ended, nbdkit(parameters, *options) as server:
        yield server
    assert ended.value.returncode == -signal.SIGKILL, str(ended.value)


def served(path: Path) -> dict[str, str | Path]:
    return {"file": path, "policy": "trusted"}  # data files are named by absolute paths, as QEMU needs them


def some_time(seed: int) -> None:
    time.sleep(random.Random(seed).uniform(0.2, 0.8))


# -- fio --


def fio_command(server: Server, output: Path, *options: str) -> list[str]:
    """Jobs with a connection each: some that check what they write, and one that trims and writes again."""
    return [
        *("fio", "--ioengine=nbd", f"--uri={server.uri}", "--eta=never", "--output-format=json", f"--output={output}"),
        f"--exec_prerun=touch {FIO_STARTED}",
        *("--iodepth=8", "--fsync=32", "--end_fsync=1", f"--size={FIO_SIZE}", *options),
        *("--name=verified", f"--numjobs={FIO_JOBS}", f"--offset={FIO_OFFSET}", f"--offset_increment={FIO_SIZE}"),
        *("--rw=randwrite", "--bsrange=512-48k", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"),
        *("--name=trimmed", f"--offset={FIO_OFFSET + FIO_JOBS * FIO_SIZE}", "--rw=randtrimwrite", "--bs=16k"),
    ]


def verify_with_fio(server: Server, folder: Path, *options: str) -> None:
    """A whole run of fio that must not find anything wrong."""
    done = subprocess.run(
        fio_command(server, folder / "fio.json", *options),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert requests_of_fio(folder)


def requests_of_fio(folder: Path) -> int:
    """How many fio's last run completed."""
    told = (folder / "fio.json").read_text()
    jobs = json.loads(told[told.index("{") :])["jobs"]
    return sum(int(job[direction]["total_ios"]) for job in jobs for direction in ("read", "write", "trim"))


@contextlib.contextmanager
def fio_beside(server: Server, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """fio at work until its server goes; it may not find anything wrong before."""
    command = fio_command(server, folder / "fio.json", "--verify_backlog=32", "--time_based", "--runtime=60")
    fio = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder
    )
    try:
        while not (folder / FIO_STARTED).exists():
            assert fio.poll() is None
            time.sleep(0.01)
        yield fio
        told = fio.communicate(timeout=PATIENCE)[1]
    finally:
        fio.kill()
        fio.wait()
    assert "verify" not in told, told
    assert requests_of_fio(folder)


# -- what is left --


def problems_of(path: Path) -> int:
    """The exit code of qemu-img check."""
    try:
        qemu_img("check", path)
    except ToolError as error:
        assert error.returncode == LEAKS, str(error)
        return LEAKS
    return 0


def disk_of(kind: Kind, path: Path) -> bytes:
    """What QEMU reads; we read the same, and it is what a raw data file holds."""
    disk = convert_to_raw(path)
    with open_image(path, policy=Policy.TRUSTED) as image:
        assert image.pread(DISK, 0) == disk
    if kind.raw_data_file:
        assert path.with_suffix(".data").read_bytes()[:DISK] == disk
    return disk


@pytest.mark.parametrize("seed", range(20), ids=lambda seed: f"{seed}, {KINDS[seed % len(KINDS)].name}")
def test_a_killed_server_has_kept_what_was_flushed(seed: int, tmp_path: Path) -> None:
    kind = KINDS[seed % len(KINDS)]
    path = kind.create(tmp_path)
    journal = Journal(disk_of(kind, path)[:JOURNALED])
    with (
        killed(served(path)) as server,
        fio_beside(server, tmp_path) as fio,
        Load(server.uri, journal, unit=kind.cluster_size, seed=seed) as load,
    ):
        some_time(seed)
        assert fio.poll() is None, "fio has given up before the server was killed"
        load.expect_the_end()
        server.process.kill()
    assert load.failures == []
    problems = problems_of(path)
    disk = disk_of(kind, path)
    assert journal.objections_after_kill(disk[:JOURNALED]) == []

    next_journal = Journal(disk[:JOURNALED], name=1)
    with (
        nbdkit(served(path)) as server,
        Load(server.uri, next_journal, unit=kind.cluster_size, seed=seed) as load,
    ):
        time.sleep(0.2)
    assert load.failures == []
    assert problems_of(path) <= problems
    assert next_journal.objections_after_shutdown(disk_of(kind, path)[:JOURNALED]) == []


def test_a_server_that_forgets_what_was_flushed_is_found_out(tmp_path: Path) -> None:
    kind = KINDS[0]
    path = kind.create(tmp_path)
    journal = Journal(bytes(JOURNALED))
    forgetful = {**served(path), "cache": "unsafe"}
    with (
        killed(forgetful, "--filter=cache") as server,
        Load(server.uri, journal, unit=kind.cluster_size, seed=0) as load,
    ):
        some_time(0)
        load.expect_the_end()
        server.process.kill()
    assert load.failures == []
    assert journal.objections_after_kill(disk_of(kind, path)[:JOURNALED])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_server_asked_to_end_has_kept_all_that_it_answered(kind: Kind, tmp_path: Path) -> None:
    path = kind.create(tmp_path)
    journal = Journal(disk_of(kind, path)[:JOURNALED])
    with (
        nbdkit(served(path)) as server,
        Load(server.uri, journal, unit=kind.cluster_size, seed=99) as load,
    ):
        some_time(99)
        load.expect_the_end()
        server.process.terminate()
    assert load.failures == []
    assert problems_of(path) == 0
    assert journal.objections_after_shutdown(disk_of(kind, path)[:JOURNALED]) == []


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_fio_finds_what_it_wrote(kind: Kind, tmp_path: Path) -> None:
    path = kind.create(tmp_path)
    with nbdkit(served(path)) as server:
        verify_with_fio(server, tmp_path, "--verify_backlog=64", "--loops=3")
    assert problems_of(path) == 0
    disk = disk_of(kind, path)
    with nbdkit(served(path)) as server:
        verify_with_fio(server, tmp_path, "--verify_only=1")
    assert disk_of(kind, path) == disk
