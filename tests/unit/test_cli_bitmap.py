"""`qcow2 bitmap`: its grammar, what it prints, how it ends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qcow2_plugin import create_image, info
from qcow2_plugin.operations.bitmap_health import bitmap_health
from qcow2_plugin.operations.transaction_record import RecordFile
from tests.support.builder import ImageBuilder
from tests.support.command import Ended, process_environment, qcow2

MIB = 1 << 20
STATES = ("usable", "in-use", "inconsistent", "wrong-size", "missing", "stale", "unknown", "damaged", "unfinished")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    create_image("disk.qcow2", MIB)
    return tmp_path


def bitmap(words: str) -> Ended:
    return qcow2("bitmap", *words.split())


def good(words: str) -> str:
    ended = bitmap(words)
    assert (ended.status, ended.stderr) == (0, "")
    return ended.stdout


def flags(path: str = "disk.qcow2") -> dict[str, tuple[bool, int]]:
    found = info(path).qcow2
    assert found is not None
    return {each.name: (each.auto, each.granularity) for each in found.bitmaps}


# ---- the actions


def test_actions_one_by_one() -> None:
    assert good("--add disk.qcow2 b") == ""
    assert flags() == {"b": (True, 65536)}
    good("--disable -f qcow2 disk.qcow2 b")
    assert flags() == {"b": (False, 65536)}
    good("disk.qcow2 --enable b")
    assert flags() == {"b": (True, 65536)}
    good("--clear disk.qcow2 b")
    good("--remove disk.qcow2 b")
    assert flags() == {}


def test_actions_are_carried_out_in_order() -> None:
    good("--add -g 4k disk.qcow2 a")
    good("--add --disable --merge a disk.qcow2 b")
    assert flags() == {"a": (True, 4096), "b": (False, 65536)}
    good("--remove --add -g 512 disk.qcow2 a")
    assert flags()["a"] == (True, 512)
    ended = bitmap("--remove --clear disk.qcow2 a")
    assert ended.status == 1
    assert ended.stderr == 'qcow2: error: the image has no bitmap "a" (disk.qcow2)\n'
    assert "a" in flags(), "all or none"


def test_merging_from_another_file() -> None:
    create_image("other.qcow2", MIB)
    ImageBuilder(MIB).bitmap(b"b", [(0, 100_000)]).build("other.qcow2")
    good("--add disk.qcow2 b")
    good("--merge b -b other.qcow2 -F qcow2 disk.qcow2 b")
    (found,) = bitmap_health("disk.qcow2")
    assert found.dirty_size == 131072
    good("--add disk.qcow2 c")
    good("--merge b --source-file ./disk.qcow2 disk.qcow2 c")
    assert [each.dirty_size for each in bitmap_health("disk.qcow2")] == [131072, 131072]
    assert bitmap("--merge b -b nowhere disk.qcow2 c").status == 1


def test_files_named_like_words() -> None:
    for word in ("health", "rotate", "prune", "recover"):
        create_image(word, MIB)
        good(f"--add {word} b")
        good(f"--add ./{word} c")
        assert sorted(flags(word)) == ["b", "c"]
    assert "usable" in good("health health")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "required: FILE, BITMAP"),
        ("--add disk.qcow2", "required: BITMAP"),
        ("disk.qcow2 b", "one of --add, --remove, --clear, --enable, --disable, --merge is needed"),
        ("--merge disk.qcow2 b", "required: BITMAP"),
        ("-g 4k --remove disk.qcow2 b", "-g is for --add only"),
        ("--add -b other disk.qcow2 b", "-b is for --merge only"),
        ("--merge a -F qcow2 disk.qcow2 b", "-F is for -b only"),
        ("--add -g x disk.qcow2 b", "invalid size value: 'x'"),
        ("--add -f raw disk.qcow2 b", "invalid choice: 'raw'"),
        ("--add disk.qcow2 b c", "unrecognized arguments: c"),
        ("rotate --old a disk.qcow2", "required: --new"),
        ("rotate --old a --new b", "required: FILE"),
        ("rotate --old a --new b --data-file x disk.qcow2 e", "--data-file is for one FILE only"),
        ("prune --include=usable disk.qcow2", "invalid choice: 'usable'"),
        ("prune", "required: FILE"),
        ("recover", "required: FILE"),
        ("health", "required: FILE"),
        ("health --output=xml disk.qcow2", "invalid choice: 'xml'"),
    ],
)
def test_wrong_usage_says_what_is_wrong(words: str, message: str) -> None:
    ended = bitmap(words)
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.startswith("usage: qcow2 ")
    assert message in ended.stderr
    assert flags() == {}


@pytest.mark.parametrize("word", ["", "health", "rotate", "prune", "recover"])
def test_help_teaches(word: str) -> None:
    ended = bitmap(f"{word} --help")
    assert ended.status == 0
    assert ended.stdout.startswith("usage: qcow2 bitmap")
    assert f"examples:\n  qcow2 bitmap {word}".rstrip() in ended.stdout
    if not word:
        assert "qcow2 bitmap recover RECORD" in ended.stdout


# ---- health


def test_health_for_people() -> None:
    ImageBuilder(MIB).bitmap(b"good", [(0, 1)], flags=2).bitmap(b"lost", flags=3).build("disk.qcow2")
    ended = bitmap("health disk.qcow2")
    assert ended.status == 3
    assert ended.stdout == (
        "  STATE         RECORDING  GRANULARITY  MARKED  NAME\n"
        "  usable        enabled         64 KiB  64 KiB  good\n"
        "  inconsistent  enabled         64 KiB       -  lost\n"
        "\n"
        "lost: The last program that wrote to the image did not close it, so changes may be missing in the bitmap.\n"
        "  Make a full backup and remove the bitmap: qcow2 bitmap --remove disk.qcow2 lost\n"
    )
    assert bitmap("health disk.qcow2 good").status == 0
    assert bitmap("health disk.qcow2 good other").status == 3


def test_health_for_programs() -> None:
    ImageBuilder(MIB).bitmap(b"good", [(0, 1)], flags=2).bitmap(b"lost", flags=1).build("disk.qcow2")
    ended = bitmap("health --output=json disk.qcow2")
    told = json.loads(ended.stdout)
    assert ended.status == 3
    assert (told["filename"], told["needs-full"]) == ("disk.qcow2", True)
    assert told["bitmaps"][0] == {
        "name": "good",
        "state": "usable",
        "needs-full": False,
        "enabled": True,
        "granularity": 65536,
        "dirty-bytes": 65536,
        "reason": None,
        "next-step": None,
    }
    assert told["bitmaps"][1]["state"] == "inconsistent"
    assert {each["state"] for each in told["bitmaps"]} <= set(STATES)


def test_health_of_an_image_without_bitmaps() -> None:
    assert good("health disk.qcow2") == "The image has no dirty bitmaps.\n"
    assert json.loads(good("health --output=json disk.qcow2"))["bitmaps"] == []
    ended = bitmap("health nowhere.qcow2")
    assert (ended.status, ended.stderr) == (1, "qcow2: error: No such file or directory (nowhere.qcow2)\n")


def test_names_cannot_act_on_a_terminal() -> None:
    ImageBuilder(MIB).bitmap(b"\x1b[2J\xff\n", flags=1).build("disk.qcow2")
    ended = bitmap("health disk.qcow2")
    assert "\x1b" not in ended.stdout
    assert r"\x1b[2J\xff\n" in ended.stdout.replace(r"\x0a", r"\n")
    assert json.loads(bitmap("health --output=json disk.qcow2").stdout)["bitmaps"][0]["name"] == "\x1b[2J\udcff\n"
    assert r"\x1b" in good("prune disk.qcow2")


def test_every_state_is_explained() -> None:
    told = good("health --help")
    for state in STATES:
        assert f"\n  {state} " in told


# ---- rotate, prune, recover


def test_rotate() -> None:
    create_image("other.qcow2", MIB)
    for name in ("disk.qcow2", "other.qcow2"):
        good(f"--add -g 8k {name} b0")
    assert good("rotate --old b0 --new b1 disk.qcow2 other.qcow2") == ""
    assert good("rotate --old b1 --new b2 -g 512 disk.qcow2") == ""
    assert flags() == {"b0": (False, 8192), "b1": (False, 8192), "b2": (True, 512)}
    assert flags("other.qcow2") == {"b0": (False, 8192), "b1": (True, 8192)}
    ended = bitmap("rotate --old b1 --new b2 other.qcow2 disk.qcow2")
    assert ended.status == 1
    assert "(disk.qcow2)" in ended.stderr
    assert sorted(flags("other.qcow2")) == ["b0", "b1"]


def test_prune() -> None:
    ImageBuilder(MIB).bitmap(b"good").bitmap(b"lost", flags=1).bitmap(b"odd", type=5).build("disk.qcow2")
    assert good("prune disk.qcow2") == "removed lost\n"
    assert good("prune disk.qcow2") == ""
    assert good("prune --include=unknown --include=stale disk.qcow2") == "removed odd\n"
    assert good("prune --drop-all disk.qcow2") == "removed good\n"
    assert flags() == {}


def test_recover(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_image("other.qcow2", MIB)
    for name in ("disk.qcow2", "other.qcow2"):
        good(f"--add {name} b0")
    switch = RecordFile.switch

    def copying(file: RecordFile, told: object) -> None:
        switch(file, told)  # type: ignore[arg-type] # passed on
        shutil.copytree(folder, folder / "copy")

    monkeypatch.setattr(RecordFile, "switch", copying)
    good("rotate --old b0 --new b1 --record now disk.qcow2 other.qcow2")
    monkeypatch.chdir(folder / "copy")
    ended = bitmap("health disk.qcow2 b0")
    assert ended.status == 3
    assert "unfinished" in ended.stdout
    assert good("recover now") == f"new      {folder}/copy/disk.qcow2\nnew      {folder}/copy/other.qcow2\n"
    assert sorted(flags()) == sorted(flags("other.qcow2")) == ["b0", "b1"]
    ended = bitmap("recover now")
    assert (ended.status, ended.stderr) == (1, f"qcow2: error: No such file or directory ({folder}/copy/now)\n")
    assert good("recover --lost disk.qcow2") == "settled  disk.qcow2\n"
    ended = bitmap("recover disk.qcow2")
    assert ended.status == 1
    assert "transaction record" in ended.stderr


def test_wrong_usage_and_help_load_nothing_heavy() -> None:
    code = (
        "import sys; from qcow2_plugin.adapters.cli import main\n"
        "try: main(['bitmap', 'health', '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('numpy', 'qcow2_plugin.engine.image') if name in sys.modules], file=sys.stderr)"
    )
    assert told(code) == "[]\n"


def test_a_change_loads_no_part_of_numpy_that_it_does_not_need() -> None:
    """Masked arrays would be a tenth of its time."""
    code = (
        "import sys; from qcow2_plugin.adapters.cli import main\n"
        "main(['bitmap', '--add', 'disk.qcow2', 'one']); main(['bitmap', '--remove', 'disk.qcow2', 'one'])\n"
        "print([name for name in ('numpy.ma', 'subprocess', 'tempfile') if name in sys.modules], file=sys.stderr)"
    )
    assert told(code) == "[]\n"


def told(code: str) -> str:
    """What a program says on stderr."""
    words = [sys.executable, "-c", code]
    environment = process_environment()
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=True).stderr
