"""Loading plugins: what is let in, and how each mistake is told with the name of the plugin."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2_plugin.adapters.backup.hookspecs import hookimpl
from qcow2_plugin.adapters.backup.manager import Hooks
from qcow2_plugin.adapters.backup.model import Job
from qcow2_plugin.adapters.backup.plugins import Listed
from qcow2_plugin.errors import PluginError
from tests.support.command import qcow2, qcow2_json
from tests.support.jobs import job

HEAD = "from qcow2_plugin.adapters.backup.hookspecs import hookimpl\nQCOW2_PLUGIN_API = 1\n"
GOOD = HEAD + "CALLED = []\n@hookimpl\ndef qcow2_backup_begin(job):\n    CALLED.append(job.job_id)\n"
MISTAKES = {
    "silent": ("x = 1\n", r"does not say for which hooks it was written; give it a line QCOW2_PLUGIN_API = 1"),
    "newer": (HEAD + "QCOW2_PLUGIN_API = 2\n", r"was written for level 2 of the hooks, and these are of level 1"),
    "fancy": (HEAD + "QCOW2_PLUGIN_API = True\n", r"was written for level True"),
    "misspelt": (
        HEAD + "@hookimpl\ndef qcow2_backup_begins(job): pass\n",
        r"there is no hook qcow2_backup_begins; is it qcow2_backup_begin\?",
    ),
    "unmarked": (HEAD + "def qcow2_verify(manifest): pass\n", r"function qcow2_verify is not marked with @hookimpl"),
    "greedy": (HEAD + "@hookimpl\ndef qcow2_progress(event, disk): pass\n", r"qcow2_progress.*disk"),
    "wrapping": (
        HEAD + "@hookimpl(wrapper=True)\ndef qcow2_backup_commit(job):\n    return (yield)\n",
        r"qcow2_backup_commit is a wrapper",
    ),
    "broken": ("import nothing_of_that_name\n", r"ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    "ending": ("raise SystemExit(3)\n", r"SystemExit: 3"),
    "wrong": ("def f(:\n", r"SyntaxError"),
    "loud": ("raise ValueError('\\x1b[31m')\n", r"ValueError: \\x1b\[31m"),
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs packages of one module each, by their sources."""

    def install(**sources: str) -> None:
        for name, source in sources.items():
            (tmp_path / f"vendor_{name}.py").write_text(source)
            info = tmp_path / f"vendor_{name}-1.5.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vendor-{name}\nVersion: 1.5\n")
            (info / "entry_points.txt").write_text(f"[qcow2_plugin]\n{name} = vendor_{name}\n")
            monkeypatch.delitem(sys.modules, f"vendor_{name}", raising=False)
        monkeypatch.syspath_prepend(tmp_path)

    return install


def by_name(hooks: Hooks, name: str) -> Listed:
    (listed,) = [plugin for plugin in hooks.plugins if plugin.name == name]
    return listed


def test_what_is_installed_is_found_and_called(installed: Callable[..., None]) -> None:
    installed(good=GOOD)
    reports: list[str] = []
    hooks = Hooks.load(report=reports.append)
    hooks.begin(job("job-9"))
    assert sys.modules["vendor_good"].CALLED == ["job-9"]
    assert not reports
    assert by_name(hooks, "good") == Listed(
        name="good", source="package vendor-good", version="1.5", hooks=("qcow2_backup_begin",), trouble=None
    )


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_and_the_others_work(mistake: str, installed: Callable[..., None]) -> None:
    source, reason = MISTAKES[mistake]
    installed(**{mistake: source, "a_good_one": GOOD, "z_good_one": GOOD})
    reports: list[str] = []
    hooks = Hooks.load(report=reports.append)
    (report,) = reports
    assert report.startswith(f'plugin "{mistake}" from package vendor-{mistake} cannot be used: ')
    assert report.endswith("; it is left out")
    assert re.search(reason, report)
    hooks.begin(job())
    for name in ("vendor_a_good_one", "vendor_z_good_one"):
        assert sys.modules[name].CALLED == ["job-1"]


@pytest.mark.parametrize("mistake", ["greedy", "misspelt", "wrapping", "unmarked"])
def test_what_is_left_out_is_left_out_as_a_whole(mistake: str, installed: Callable[..., None]) -> None:
    installed(half=GOOD + MISTAKES[mistake][0])
    Hooks.load(report=lambda line: None).begin(job())
    assert sys.modules["vendor_half"].CALLED == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_that_was_asked_for_must_work(mistake: str, tmp_path: Path) -> None:
    source, reason = MISTAKES[mistake]
    (tmp_path / f"{mistake}.py").write_text(source)
    with pytest.raises(PluginError, match=reason) as refused:
        Hooks.load(use_installed=False, plugins=[str(tmp_path / f"{mistake}.py")])
    assert refused.value.plugin == mistake


def test_strict_means_that_all_must_work(installed: Callable[..., None]) -> None:
    installed(broken="import nothing_of_that_name\n")
    with pytest.raises(PluginError, match='plugin "broken"'):
        Hooks.load(strict=True)
    assert Hooks.load(strict=True, blocked={"broken"}).plugins
    assert Hooks.load(strict=True, use_installed=False).plugins


def test_a_blocked_one_is_not_even_loaded(installed: Callable[..., None]) -> None:
    installed(good=GOOD)
    reports: list[str] = []
    hooks = Hooks.load(blocked={"good", "goood"}, report=reports.append)
    assert "vendor_good" not in sys.modules
    assert by_name(hooks, "good").trouble == "blocked"
    assert reports == ['there is no plugin "goood" to block']


def test_two_of_one_name_are_not_two(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(GOOD)
    with pytest.raises(PluginError, match="there is another one of that name"):
        Hooks.load(use_installed=False, plugins=[str(tmp_path / "one.py")] * 2)


def test_a_plugin_can_be_a_class_a_module_or_an_object(installed: Callable[..., None]) -> None:
    installed(one=GOOD)
    hooks = Hooks.load(use_installed=False, plugins=["vendor_one"])
    assert by_name(hooks, "vendor_one").source == "module vendor_one"

    class Plugin:
        QCOW2_PLUGIN_API = 1

        @hookimpl
        def qcow2_backup_begin(self, job: Job) -> None:
            begun.append(job.job_id)

    begun: list[str] = []
    assert by_name(Hooks.load(use_installed=False, own={"object": Plugin()}), "object").trouble is None
    hooks = Hooks.load(use_installed=False, own={"class": Plugin})
    hooks.begin(job())
    assert begun == ["job-1"]


class TestTheVerb:
    def test_lists_for_people(self, installed: Callable[..., None], tmp_path: Path) -> None:
        installed(good=GOOD, misspelt=MISTAKES["misspelt"][0])
        ended = qcow2("plugins", "--block-plugin", "builtin-files")
        assert ended.status == 0
        assert "good\n  from   package vendor-good 1.5\n  hooks  qcow2_backup_begin\n" in ended.stdout
        assert "  not used  there is no hook qcow2_backup_begins; is it qcow2_backup_begin?\n" in ended.stdout
        assert "builtin-files\n  from      built in\n  not used  blocked\n" in ended.stdout
        assert ended.stderr.startswith('qcow2: note: plugin "misspelt"')

    def test_lists_for_programs(self, installed: Callable[..., None]) -> None:
        installed(good=GOOD)
        listed = {plugin["name"]: plugin for plugin in qcow2_json("plugins")}
        assert listed["good"]["hooks"] == ["qcow2_backup_begin"]
        assert "good" not in {plugin["name"] for plugin in qcow2_json("plugins", "--no-plugins")}

    def test_can_be_strict(self, installed: Callable[..., None]) -> None:
        installed(misspelt=MISTAKES["misspelt"][0])
        ended = qcow2("plugins", "--strict-plugins")
        assert (ended.status, ended.stdout) == (1, "")
        assert ended.stderr.startswith('qcow2: error: plugin "misspelt" from package vendor-misspelt cannot be used')

    def test_lists_the_hooks(self) -> None:
        (row,) = [hook for hook in qcow2_json("plugins", "--hooks") if hook["name"] == "qcow2_verify"]
        assert row == {"name": "qcow2_verify", "class": "collect", "promise": "What speaks against this point?"}
        for_people = qcow2("plugins", "--hooks").stdout
        assert "qcow2_verify               collect      What speaks" in for_people
        assert Path(for_people.splitlines()[-1].rpartition(": ")[2]).read_text().startswith("# Hooks")

    def test_ends_with_an_error_for_one_that_was_asked_for(self, tmp_path: Path) -> None:
        (tmp_path / "misspelt.py").write_text(MISTAKES["misspelt"][0])
        ended = qcow2("plugins", "--plugin", tmp_path / "misspelt.py")
        assert (ended.status, ended.stdout) == (1, "")
        assert ended.stderr.startswith(f'qcow2: error: plugin "misspelt" from file {tmp_path}')


def test_one_that_is_there_twice_stays_once(installed: Callable[..., None], tmp_path: Path) -> None:
    installed(good=GOOD)
    entries = tmp_path / "vendor_good-1.5.dist-info" / "entry_points.txt"
    entries.write_text(entries.read_text() + "same = vendor_good\n")
    reports: list[str] = []
    hooks = Hooks.load(report=reports.append)
    hooks.begin(job("job-1"))
    assert sys.modules["vendor_good"].CALLED == ["job-1"]
    assert "under another name" in str(by_name(hooks, "same").trouble)


def test_one_that_fails_when_it_is_looked_at_is_left_out(installed: Callable[..., None]) -> None:
    installed(good=GOOD, lazy="def __getattr__(name): raise RuntimeError('later')\n")
    reports: list[str] = []
    hooks = Hooks.load(report=reports.append)
    assert by_name(hooks, "lazy").trouble == "RuntimeError: later"
    assert by_name(hooks, "good").trouble is None
