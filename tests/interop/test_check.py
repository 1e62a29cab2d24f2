"""Checking, held against `qemu-img check`: the same numbers, the same exit code, whatever is wrong with an image.

Where we find more, the table of damages says so, and it is counted apart.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin import CheckResult, Policy, check
from qcow2_plugin.errors import Qcow2Error
from tests.support.command import qcow2
from tests.support.damage import SOUND, metadata_words, mutate
from tests.support.damage_ways import DAMAGES, Fields
from tests.support.depth import examples
from tests.support.tools import create_luks, qemu_img, qemu_io, run

NUMBERS = {
    "corruptions": "corruptions", "leaks": "leaks", "check-errors": "check_errors",
    "image-end-offset": "image_end_offset", "total-clusters": "total_clusters",
    "allocated-clusters": "allocated_clusters", "fragmented-clusters": "fragmented_clusters",
    "compressed-clusters": "compressed_clusters",
}  # fmt: skip
MUTANTS = examples(240).max_examples
GROUPS = 8


def ask_qemu(path: Path) -> tuple[int, dict[str, Any] | None]:
    """The exit code of `qemu-img check` and its answer, None if it has none."""
    done = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", "--output=json", str(path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        env={**os.environ, "LC_ALL": "C"},
        check=False,
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else None


def exit_code_without_ours(found: CheckResult) -> int:
    """What the exit code would be if we looked for no more than QEMU."""
    if found.aborted is not None or found.check_errors:
        return 1
    return 2 if found.corruptions else 3 if found.leaks else 0


def assert_equal(path: Path, what: str = "") -> CheckResult | None:
    """QEMU and we find the same in an image; what we found, None if neither can check it."""
    code, answer = ask_qemu(path)
    try:
        found = check(path, policy=Policy.TRUSTED)
    except Qcow2Error as error:
        assert (code, answer) == (1, None), f"{what}: {error}"
        return None
    assert exit_code_without_ours(found) == code, (what, found)
    if answer is None:
        assert found.aborted is not None, (what, found)
        return found
    numbers = {key: getattr(found, field) for key, field in NUMBERS.items()}
    assert numbers == {key: answer.get(key, 0) for key in NUMBERS}, (what, found.findings)
    assert found.aborted is None, what
    return found


@pytest.mark.parametrize("name", SOUND)
def test_sound_images(tmp_path: Path, name: str) -> None:
    path = SOUND[name](tmp_path)
    found = assert_equal(path)
    assert found is not None and found.is_sound and not found.findings and found.exit_code == 0


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_images(tmp_path: Path, name: str) -> None:
    damage = DAMAGES[name]
    found = assert_equal(damage.make(tmp_path))
    assert found is not None
    kinds = {finding.kind for finding in found.findings if not finding.is_ours}
    assert kinds >= damage.kinds
    assert {finding.kind for finding in found.findings if finding.is_ours} >= damage.ours
    assert (found.aborted is not None) is damage.aborts
    if not damage.kinds:
        assert not kinds
    if damage.ours:
        assert found.extra_corruptions and found.exit_code == 2


def test_every_row_is_there_for_images_of_either_maker() -> None:
    rows = {name.rpartition(" (")[0] for name in DAMAGES}
    both = {row for row in rows if f"{row} (built)" in DAMAGES and f"{row} (QEMU)" in DAMAGES}
    assert len(rows) > 60 and len(both) > 45


@pytest.mark.parametrize("group", range(GROUPS))
def test_images_with_one_word_changed_at_random(tmp_path: Path, group: int) -> None:
    originals = []
    for name in list(SOUND)[group::GROUPS]:
        folder = tmp_path / name
        folder.mkdir()
        content = SOUND[name](folder).read_bytes()
        originals.append((name, content, metadata_words(content)))
    path = tmp_path / "mutant.qcow2"
    for seed in range(MUTANTS // GROUPS):
        name, content, words = originals[seed % len(originals)]
        what, mutant = mutate(content, words, random.Random(f"{group} {seed}"))
        path.write_bytes(mutant)
        assert_equal(path, f"{name}, seed {seed}: {what}")


@pytest.mark.parametrize("name", ["QEMU 64k", "rich 12", "QEMU subclusters", "QEMU compressed"])
def test_images_with_many_words_changed_at_random(tmp_path: Path, name: str) -> None:
    content = SOUND[name](tmp_path).read_bytes()
    words = metadata_words(content)
    path = tmp_path / "mutant.qcow2"
    for seed in range(MUTANTS // 40):
        dice = random.Random(f"{name} {seed}")
        mutant = content
        for _ in range(dice.randrange(2, 12)):
            mutant = mutate(mutant, [word for word in words if word[1] + 8 <= len(mutant)], dice)[1]
        path.write_bytes(mutant)
        assert_equal(path, f"{name}, seed {seed}")


# ---- the command


def answers(path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    ended = qcow2("check", "--output=json", "--policy=trusted", *options, path)
    return ended.status, json.loads(ended.stdout)


@pytest.mark.parametrize(
    "name", ["refcount too high (QEMU)", "leaked cluster (built)", "refcount table entry unaligned (built)"]
)
def test_the_command_answers_as_qemu_img(tmp_path: Path, name: str) -> None:
    path = DAMAGES[name].make(tmp_path)
    assert answers(path) == ask_qemu(path)


def test_a_sound_image_answers_as_qemu_img_key_by_key(tmp_path: Path) -> None:
    path = SOUND["QEMU compressed"](tmp_path)
    ended = qcow2("check", "--output=json", path)
    theirs = qemu_img("check", "--output=json", path)
    assert ended.stdout == theirs
    assert ended.stderr == ""


def test_a_check_that_cannot_be_completed_prints_no_json(tmp_path: Path) -> None:
    path = DAMAGES["bitmap directory unreadable (QEMU)"].make(tmp_path)
    assert ask_qemu(path) == (1, None)
    ended = qcow2("check", "--output=json", path)
    assert (ended.status, ended.stdout) == (1, "")
    assert "not completed" in ended.stderr


def test_a_dirty_image_stays_dirty(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "8M")
    subprocess.run(
        ["qemu-io", "-c", "write 0 1M", "-c", "flush", "-c", "sigraise 9", str(path)], capture_output=True, check=False
    )
    before = path.read_bytes()
    assert Fields(path).word(72) & 1
    found = assert_equal(path)
    assert found is not None and found.corruptions and found.needs_rebuild
    assert path.read_bytes() == before


def test_a_corrupt_image_can_be_checked(tmp_path: Path) -> None:
    path = SOUND["QEMU 64k"](tmp_path)
    fields = Fields(path)
    fields.put(72, 2)
    path.write_bytes(fields.content)
    found = assert_equal(path)
    assert found is not None and found.is_sound


def test_unknown_autoclear_bits_stay(tmp_path: Path) -> None:
    path = SOUND["QEMU 64k"](tmp_path)
    fields = Fields(path)
    fields.put(88, 1 << 40)
    path.write_bytes(fields.content)
    assert qcow2("check", "-q", path).status == 0
    assert Fields(path).word(88) == 1 << 40


def test_backing_files_are_not_opened(tmp_path: Path) -> None:
    base, path = tmp_path / "base.qcow2", tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "4M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path)
    qemu_io(path, "write 0 64k")
    base.unlink()
    assert check(path).is_sound


@pytest.mark.parametrize("method", ["aes", "luks"])
def test_an_encrypted_image_needs_no_key(tmp_path: Path, method: str) -> None:
    path = tmp_path / "image.qcow2"
    secret = ("--object", "secret,id=s,data=x")
    if method == "luks":
        create_luks(path, 4 << 20, "x")
    else:
        qemu_img("create", "-q", "-f", "qcow2", *secret, "-o", "encrypt.format=aes,encrypt.key-secret=s", path, "4M")
    options = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
    run("qemu-io", *secret, "--image-opts", "-c", "write 0 200k", "-c", "write 3M 1k", options)
    answer = json.loads(qemu_img("check", "--output=json", *secret, "--image-opts", options))
    found = check(path)
    assert found.is_sound
    assert {key: getattr(found, field) for key, field in NUMBERS.items()} == {
        key: answer.get(key, 0) for key in NUMBERS
    }
