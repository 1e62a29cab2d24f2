"""`qcow2 check`: what it prints where, exit codes, wrong usage. That the numbers are QEMU's, tests/interop tells."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from qcow2_plugin.adapters.cli import check as module
from qcow2_plugin.adapters.cli import progress as progress_module
from qcow2_plugin.errors import OptionError
from qcow2_plugin.operations.check import check
from qcow2_plugin.storage.opener import open_given
from tests.support.command import qcow2, qcow2_process
from tests.support.damage import IMAGE, plain, with_data_file
from tests.support.damage_ways import DAMAGES
from tests.support.hostile import assert_harmless_text


def damaged(folder: Path, name: str) -> Path:
    return DAMAGES[f"{name} (built)"].make(folder)


def test_a_sound_image(tmp_path: Path) -> None:
    path = plain(12).build(tmp_path / IMAGE).path
    ended = qcow2("check", path)
    assert (ended.status, ended.stderr) == (0, "")
    assert ended.stdout == (
        "Nothing is wrong with the image.\n"
        "8/1024 = 0.78% allocated, 0.00% fragmented, 0.00% compressed clusters\n"
        f"Image end offset: {path.stat().st_size}\n"
    )


def test_an_empty_image_has_no_use_to_tell_of(tmp_path: Path) -> None:
    ended = qcow2("check", plain(12).__class__(1 << 20, 12).build(tmp_path / IMAGE).path)
    assert re.fullmatch(r"Nothing is wrong with the image\.\nImage end offset: \d+\n", ended.stdout)


@pytest.mark.parametrize(
    ("name", "status", "line"),
    [
        ("refcount too low", 2, "2 corruptions: data may be lost"),
        ("leaked cluster", 3, "1 leaked cluster: space is wasted, data is in no danger."),
        ("leaked clusters in a row", 3, "5 leaked clusters: "),
        ("refcount table entry unaligned", 1, "places could not be checked."),
        ("zero flag with subclusters", 2, "1 corruption that qemu-img does not look for: "),
    ],
)
def test_the_answer_and_the_exit_code(tmp_path: Path, name: str, status: int, line: str) -> None:
    ended = qcow2("check", damaged(tmp_path, name))
    assert ended.status == status
    assert line in ended.stdout
    assert ended.stderr.startswith("qcow2: ")
    assert qcow2("check", "-q", tmp_path / IMAGE).stdout == ""


def test_single_findings_go_to_stderr_and_not_endlessly(tmp_path: Path) -> None:
    path = damaged(tmp_path, "no refcount block")
    ended = qcow2("check", path)
    lines = ended.stderr.splitlines()
    assert len(lines) < 100
    line = (
        "qcow2: corruption: cluster at host offset 0x0: refcount 0, but 1 reference, here and in the clusters behind it"
    )
    assert f"{line}; 12 times\n" in ended.stderr


def test_what_is_left_out_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TOLD", 2)
    ended = qcow2("check", damaged(tmp_path, "no refcount block"))
    assert re.search(r"^qcow2: l2-copied-wrong: \d+ more$", ended.stderr, re.MULTILINE)


def test_the_list_for_people(tmp_path: Path) -> None:
    ended = qcow2("check", "--findings", damaged(tmp_path, "refcount too high"))
    assert ended.stderr == ""
    assert "refcount-leak\n  leak: cluster at host offset" in ended.stdout
    assert "\n  repair: lower the refcount" in ended.stdout
    folder = tmp_path / "other"
    folder.mkdir()
    ended = qcow2("check", "--findings", damaged(folder, "L1 entry with reserved bits"))
    assert "l1-entry-reserved\n" in ended.stdout and "repair: on request, clear the bits" in ended.stdout
    ended = qcow2("check", "--findings", damaged(folder, "L2 table unaligned"))
    assert "l2-table-unaligned\n" in ended.stdout and "nothing is done about it" in ended.stdout
    ended = qcow2("check", "--findings", damaged(folder, "zero flag with subclusters"))
    assert "zero-flag-reserved [not looked for by qemu-img]\n" in ended.stdout


def test_the_list_for_programs(tmp_path: Path) -> None:
    ended = qcow2("check", "--findings", "--output=json", damaged(tmp_path, "refcount too high"))
    answer = json.loads(ended.stdout)
    assert (ended.status, answer["corruptions"], answer["leaks"], ended.stderr) == (2, 1, 1, "")
    kinds = {each["kind"]: each for each in answer["findings"]}
    assert kinds.keys() == {"refcount-leak", "l2-copied-wrong"}
    assert kinds["l2-copied-wrong"]["guest-offset"] == 0
    assert kinds["refcount-leak"]["class"] == "leak"
    assert kinds["refcount-leak"]["extra"] is False


def test_without_the_list_the_keys_are_those_of_qemu_img(tmp_path: Path) -> None:
    answer = json.loads(qcow2("check", "--output=json", damaged(tmp_path, "refcount too high")).stdout)
    assert answer.keys() == {
        "image-end-offset", "total-clusters", "corruptions", "check-errors", "leaks", "allocated-clusters", "filename",
        "format",
    }  # fmt: skip


def test_what_only_we_find_has_a_key_of_its_own(tmp_path: Path) -> None:
    answer = json.loads(qcow2("check", "--output=json", damaged(tmp_path, "zero flag with subclusters")).stdout)
    assert answer["extra-corruptions"] == 1
    assert "corruptions" not in answer


def test_a_check_that_ends_early_says_why(tmp_path: Path) -> None:
    path = damaged(tmp_path, "too many snapshots")
    ended = qcow2("check", path)
    assert (ended.status, ended.stdout) == (1, "")
    assert "qcow2: error: the check was not completed: snapshot table at host offset" in ended.stderr
    answer = json.loads(qcow2("check", "--output=json", "--findings", path).stdout)
    assert "more than 65536" in answer["aborted"]


def test_stop_after(tmp_path: Path) -> None:
    path = damaged(tmp_path, "no refcount block")
    ended = qcow2("check", "--stop-after=3", "--output=json", "--findings", path)
    answer = json.loads(ended.stdout)
    assert (answer["stopped"], len(answer["findings"]), ended.status) == (True, 3, 2)
    assert "there may be more" in qcow2("check", "--stop-after=3", path).stdout


def test_progress_goes_to_stderr(tmp_path: Path) -> None:
    path = plain(12).build(tmp_path / IMAGE).path
    ended = qcow2_process("check", "--progress", "--output=json", path)
    assert ended.stderr == "100 % checked\n"
    json.loads(ended.stdout)
    assert qcow2_process("check", path).stderr == ""


class Terminal(io.StringIO):
    """What stderr is on a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("asked", "after", "shown"), [(True, 1e9, True), (False, 0, True), (False, 1e9, False)])
def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, asked: bool, after: float, shown: bool) -> None:
    """Shown when it is asked for or takes long, in one line that is gone in the end."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress_module, "_UNASKED_AFTER", after)
    progress = progress_module.Progress("checked", asked=asked)
    for done in range(0, 1000, 5):
        progress.tell(done, 1000)
    progress.clear()
    lines = terminal.getvalue().split("\r")
    assert "\n" not in terminal.getvalue()
    assert ("  7 % checked" in lines) is shown
    assert len(lines) == (103 if shown else 1)
    assert not lines[-1].strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "required: IMAGE"),
        ("--unknown disk.qcow2", "unrecognized arguments: --unknown"),
        ("disk.qcow2 other.qcow2", "unrecognized arguments: other.qcow2"),
        ("-r some disk.qcow2", "invalid choice: 'some'"),
        ("--stop-after=0 disk.qcow2", "invalid count value: '0'"),
        ("-f raw disk.qcow2", "invalid choice: 'raw'"),
    ],
)
def test_wrong_usage_does_not_end_like_a_damaged_image(words: str, message: str) -> None:
    ended = qcow2("check", *words.split())
    assert (ended.status, ended.stdout) == (1, "")
    assert ended.stderr.startswith("usage: qcow2 check")
    assert message in ended.stderr


def test_what_is_no_image_ends_with_1(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no image" * 100)
    ended = qcow2("check", "--output=json", tmp_path / "text")
    assert (ended.status, ended.stdout) == (1, "")
    assert qcow2("check", tmp_path / "nothing").status == 1


def test_help_teaches() -> None:
    ended = qcow2("check", "--help")
    assert ended.status == 0
    assert "exit codes:\n  0  nothing is wrong" in ended.stdout
    assert "qcow2 check -r all --to=repaired.qcow2 disk.qcow2" in ended.stdout


def test_names_in_an_image_are_printed_harmlessly(tmp_path: Path) -> None:
    path = plain(12).snapshot(b"\x1b[2J\xff", b"\r\n", l1_size=(4 << 20) + 1).build(tmp_path / IMAGE).path
    ended = qcow2("check", "--findings", path)
    assert ended.status == 2
    assert_harmless_text(ended.stdout.replace("\n", ""))
    assert r"\x1b[2J" in ended.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "copy"}, "say what to repair"),
        ({"repair_ours": True}, "say what to repair"),
        ({"repair": "leaks", "repair_ours": True}, "repair all"),
        ({"repair": "all", "stop_after": 5}, "for a check only"),
        ({"repair": "all", "deep": True}, "for a check only"),
        ({"repair": "all", "force_share": True}, "is not repaired"),
    ],
)
def test_options_that_contradict_each_other(tmp_path: Path, options: dict[str, object], message: str) -> None:
    path = plain(12).build(tmp_path / IMAGE).path
    with pytest.raises(OptionError, match=message):
        check(path, **options)  # type: ignore[arg-type] # of its own


def test_a_data_file_is_opened_under_the_policy(tmp_path: Path) -> None:
    path = with_data_file(tmp_path).build(tmp_path / IMAGE).path  # by an absolute name
    ended = qcow2("check", path)
    assert ended.status == 1
    assert "is not opened: it is absolute" in ended.stderr
    assert qcow2("check", "--policy=trusted", path).status == 0
    assert qcow2("check", "--data-file", tmp_path / "image.data", path).status == 0


def test_an_image_that_somebody_writes_to_is_not_checked_unless_asked(tmp_path: Path) -> None:
    path = plain(12).build(tmp_path / IMAGE).path
    storage = open_given(path, writable=True)
    try:
        ended = qcow2("check", path)
        assert ended.status == 1
        assert "qcow2: error: " in ended.stderr
        assert qcow2("check", "-U", path).status == 0
    finally:
        storage.close()


def test_nothing_changes(tmp_path: Path) -> None:
    path = damaged(tmp_path, "no refcount block")
    before = path.read_bytes(), path.stat().st_mtime_ns
    qcow2("check", path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert check(path).references is None
