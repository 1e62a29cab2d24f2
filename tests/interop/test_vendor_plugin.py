"""examples/vendor_plugin.py, as somebody would use it who has never seen the package from within."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from qcow2_plugin import create_image, open_image
from qcow2_plugin.adapters.backup.job import run_backup
from qcow2_plugin.adapters.backup.manager import Hooks
from qcow2_plugin.adapters.backup.model import DiskRequest, Level
from qcow2_plugin.errors import PluginError
from qcow2_plugin.testing import check_target
from tests.support.command import qcow2
from tests.support.tools import qemu_img

PLUGIN = Path(__file__).resolve().parents[2] / "examples" / "vendor_plugin.py"
MIB = 1 << 20


@pytest.fixture
def hooks() -> Iterator[Hooks]:
    with Hooks.load(use_installed=False, plugins=[str(PLUGIN)], strict=True) as loaded:
        yield loaded


@pytest.fixture
def key(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "key").write_text("of the vault\n")
    return {"key": f"file:{tmp_path / 'key'}"}


def test_a_vendor_needs_less_than_a_hundred_lines() -> None:
    assert len(PLUGIN.read_text().splitlines()) < 100


def test_its_target_keeps_the_contract(hooks: Hooks, key: dict[str, str], tmp_path: Path) -> None:
    check_target(lambda: hooks.target(f"vault:{tmp_path / 'vault'}", key))


def test_without_a_key_it_says_so(hooks: Hooks, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r'plugin "vendor_plugin" failed in qcow2_open_target: KeyError'):
        hooks.target(f"vault:{tmp_path / 'vault'}", {})
    assert not (tmp_path / "vault").exists()


def test_backups_go_into_the_vault_signed_and_come_back(hooks: Hooks, key: dict[str, str], tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    create_image(image, 4 * MIB)
    with closing(hooks.target(f"vault:{tmp_path / 'vault'}", key)) as vault:
        for number, level in enumerate((Level.FULL, Level.INCREMENTAL)):
            with open_image(image, writable=True) as disk:
                disk.pwrite(b"%d" % number * 4096, number * MIB)
            manifest = run_backup([DiskRequest(disk="disk", path=str(image))], vault, hooks=hooks)
            assert manifest.members[0].level is level
            assert set(manifest.extra) == {"vendor_plugin"}
            assert hooks.verify(manifest, 0) == []
        for name in vault.names():
            (tmp_path / name).write_bytes(b"".join(vault.get(name)))
        qemu_img("compare", "-f", "qcow2", "-F", "qcow2", image, tmp_path / manifest.members[0].file)
    (tmp_path / "key").write_text("of somebody else\n")
    with closing(hooks.target(f"vault:{tmp_path / 'vault'}", key)):
        (finding,) = hooks.verify(manifest, 0)
    assert (finding.plugin, finding.disk, finding.text) == ("vendor_plugin", None, "it is not signed with our key")
    with closing(sqlite3.connect(tmp_path / "vault")) as database:
        assert database.execute("SELECT count(*) FROM blobs WHERE name LIKE '%.point.json'").fetchone() == (2,)


def test_the_command_works_with_it(key: dict[str, str], tmp_path: Path) -> None:
    image, new = tmp_path / "disk.qcow2", tmp_path / "new.raw"
    create_image(image, 4 * MIB)
    with open_image(image, writable=True) as disk:
        disk.pwrite(b"kept" * 1024, MIB)
    vault, options = f"vault:{tmp_path / 'vault'}", ("--plugin", PLUGIN, "--target-option", f"key={key['key']}")
    assert qcow2("backup", image, "--to", vault, *options).status == 0
    assert qcow2("restore", new, "--from", vault, "--as", "raw", *options).status == 0
    qemu_img("compare", "-f", "qcow2", "-F", "raw", image, new)
    assert qcow2("verify", vault, *options).status == 0
    (tmp_path / "key").write_text("of somebody else\n")
    ended = qcow2("verify", vault, *options)
    assert ended.status != 0
    assert "it is not signed with our key (plugin vendor_plugin)" in ended.stdout + ended.stderr
    ended = qcow2("backup", image, "--to", vault)
    assert (ended.status, ended.stdout) == (1, "")
    assert "is no place for backups that any plugin knows; see 'qcow2 plugins'" in ended.stderr
