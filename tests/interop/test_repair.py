"""Repairs beside `qemu-img check -r`: the same numbers, images that QEMU finds nothing wrong with, nothing lost."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings

from qcow2_plugin.engine.repairing.repair import Mode
from qcow2_plugin.errors import CorruptImageError, Qcow2Error
from qcow2_plugin.operations.check import check
from qcow2_plugin.operations.repair_copy import repair_to
from tests.support import broken
from tests.support.broken import BROKEN
from tests.support.damage import DATA, SOUND, metadata_words, mutate
from tests.support.damage_ways import DAMAGES
from tests.support.fields import patch
from tests.support.image_checker import check_image
from tests.support.repairing import lost, readable, repair, snapshot_ids
from tests.support.tools import convert_to_raw, qemu_img, qemu_io

NUMBERS = ("check-errors", "corruptions", "leaks", "corruptions-fixed", "leaks-fixed")
QEMU_FAILS = ("block entry with reserved bits", "block entry unaligned")
"""What QEMU 7.2 gives up on with `-r all`."""


class Checked(NamedTuple):
    """What `qemu-img check` said; no numbers if it did not come to its end."""

    exit_code: int
    numbers: tuple[int, ...] | None


def qemu_check(content: bytes, folder: Path, *options: str) -> Checked:
    path = folder / "checked.qcow2"
    path.write_bytes(content)
    done = subprocess.run(
        ["qemu-img", "check", "--output=json", *options, "-f", "qcow2", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if not done.stdout:
        return Checked(done.returncode, None)
    told: dict[str, Any] = json.loads(done.stdout)
    return Checked(done.returncode, tuple(told.get(name, 0) for name in NUMBERS))


@pytest.mark.parametrize("mode", ["leaks", "all"])
@pytest.mark.parametrize("name", BROKEN)
def test_numbers_exit_code_and_what_is_left(name: str, mode: Mode, tmp_path: Path) -> None:
    content = bytes(broken.broken(name, tmp_path).content)
    theirs = qemu_check(content, tmp_path, "-r", mode)
    try:
        repaired = repair(content, mode)
    except Qcow2Error as error:
        assert theirs.exit_code == 1 or not BROKEN[name].as_qemu, error
        return
    result = repaired.result
    ours = (result.check_errors, result.corruptions, result.leaks, result.corruptions_fixed, result.leaks_fixed)
    if BROKEN[name].as_qemu and not (name in QEMU_FAILS and mode == "all"):
        assert Checked(result.exit_code, ours) == theirs
    assert lost(readable(content), readable(repaired.content)) == []
    after = qemu_check(repaired.content, tmp_path)
    assert after == Checked(result.exit_code, (*ours[:3], 0, 0))
    if mode == "all" and BROKEN[name].mended:
        assert after.exit_code == 0
        assert not check_image(repaired.content).all_leaks


KNOWN_DIFFERENCES = {
    "refcount table entry": "QEMU cannot rebuild here",
    "L1 entry without an offset (QEMU)": "QEMU cannot rebuild here",
    "too many snapshots (QEMU)": "QEMU gives up on a table of zeros; we leave it",
    "refcount block outside": "QEMU makes the file longer, which it counts as well",
    "all refcounts outside": "QEMU makes the file longer, which it counts as well",
    "L2 table unaligned": "what it named is not given back",
    "L2 table outside": "what it named is not given back",
    "snapshot L1 table": "what it named is not given back",
    "snapshot table outside": "what it named is not given back",
    "L1 table outside": "what it named is not given back",
    "cut in the middle": "new refcounts have no place that nothing points to",
}
MAKERS = ("(built)",) if settings().max_examples <= 100 else ("(built)", "(QEMU)")


@pytest.mark.parametrize("mode", ["leaks", "all"])
@pytest.mark.parametrize(
    "name", [name for name in DAMAGES if name.endswith(MAKERS) and not name.startswith("too many snapshots (built)")]
)
def test_every_damage_that_a_check_finds(name: str, mode: Mode, tmp_path: Path) -> None:
    """Where QEMU says something else than we do is in the list, with the reason."""
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    mine.mkdir()
    path = DAMAGES[name].make(mine)
    shutil.copytree(mine, theirs)
    expected = qemu_check(path.read_bytes(), theirs, "-r", mode)
    data_file = mine / DATA if (mine / DATA).exists() else None
    content = path.read_bytes()
    has_lost_snapshots = content[60:64] != (theirs / "checked.qcow2").read_bytes()[60:64]  # as it does beside bitmaps
    is_known = name.startswith(tuple(KNOWN_DIFFERENCES)) or has_lost_snapshots
    try:
        result = check(path, repair=mode, data_file=data_file)
    except Qcow2Error:
        assert expected.exit_code == 1 or is_known
        return
    ours = (result.check_errors, result.corruptions, result.leaks, result.corruptions_fixed, result.leaks_fixed)
    exit_code = replace(result, extra_corruptions=0).exit_code
    assert is_known or Checked(exit_code, ours) == expected
    if name.startswith("too many snapshots"):
        return  # QEMU looks at no image with so many
    assert qemu_check(path.read_bytes(), theirs) == Checked(exit_code, (*ours[:3], 0, 0))


@pytest.mark.parametrize("name", QEMU_FAILS)
def test_qemu_cannot_and_we_can(name: str, tmp_path: Path) -> None:
    content = bytes(broken.broken(name, tmp_path).content)
    assert qemu_check(content, tmp_path, "-r", "all").exit_code == 1
    assert qemu_check(repair(content, "all").content, tmp_path).exit_code == 0


def test_leaks_alone_do_not_rebuild(tmp_path: Path) -> None:
    """As `qemu-img check -r leaks`, which ends with 1."""
    content = bytes(broken.broken("no refcounts", tmp_path).content)
    assert qemu_check(content, tmp_path, "-r", "leaks") == Checked(1, None)
    with pytest.raises(CorruptImageError, match=r"^refcounts: have to be rebuilt, which '-r all' does"):
        repair(content, "leaks")


@pytest.mark.parametrize("mode", ["leaks", "all"])
def test_snapshots_survive_where_qemu_loses_them(mode: Mode, tmp_path: Path) -> None:
    """With bitmaps in the image, QEMU 7.2 writes a header without snapshots, and then frees what they had."""
    content = bytes(broken.broken("several, and bitmaps", tmp_path).content)
    ids = list(snapshot_ids(content))
    assert len(ids) == 2
    repaired = repair(content, mode).content
    assert list(snapshot_ids(repaired)) == ids
    assert lost(readable(content), readable(repaired)) == []
    before, after = check_image(content), check_image(repaired)
    assert after.bitmaps == before.bitmaps and after.bitmaps
    qemu_check(content, tmp_path, "-r", mode)
    assert list(snapshot_ids((tmp_path / "checked.qcow2").read_bytes())) == []


@pytest.mark.parametrize("name", ["L2 table past the end", "snapshot L1 table unaligned", "L2 table unaligned"])
def test_what_a_lost_table_named_is_not_given_back(name: str, tmp_path: Path) -> None:
    """It looks leaked, and QEMU frees it; once the pointer is right again, everything is there."""
    whole = bytes(broken.whole(BROKEN[name].base, tmp_path).content)
    image = broken.broken(name, tmp_path)
    damaged = bytes(image.content)
    theirs = qemu_check(damaged, tmp_path, "-r", "leaks")
    assert theirs.numbers is not None and theirs.numbers[-1] > 0
    assert repair(damaged, "leaks").content == damaged
    repaired = bytearray(repair(damaged, "all").content)
    places = [place for place in range(len(whole)) if whole[place] != damaged[place]]
    for place in places:
        repaired[place] = whole[place]
    assert qemu_check(bytes(repaired), tmp_path).exit_code == 0
    assert readable(repaired) == readable(whole)


# ---- images that QEMU made


def lived(path: Path, options: str) -> None:
    """Allocated, overwritten, compressed, discarded, with snapshots."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "64M")
    qemu_io(path, "write -P 1 0 3M", "write -c -P 2 8M 256k", "write -P 3 40M 1M", "write -z 50M 1M")
    qemu_img("snapshot", "-c", "first", path)
    qemu_io(path, "write -P 4 1M 1M", "discard 40M 512k", "write -P 5 60M 300k")
    qemu_img("snapshot", "-c", "second", path)
    qemu_io(path, "write -P 6 2M 100k")


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=64",
        "cluster_size=64k,refcount_bits=8",
        "cluster_size=16k,extended_l2=on",
        "compat=0.10,cluster_size=4k",
    ],
)
def test_refcounts_are_lost_altogether(options: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    lived(path, options)
    expected = [convert_to_raw(path), *(convert_to_raw(path, extra=("-l", name)) for name in ("first", "second"))]
    content = path.read_bytes()
    table, clusters = int.from_bytes(content[48:56], "big"), int.from_bytes(content[56:60], "big")
    size = 1 << content[23]
    patch(path, table, random.Random(1).randbytes(clusters * size))
    result = repair_to(path, tmp_path / "repaired.qcow2", mode="all")
    assert result.is_sound
    assert result.corruptions_fixed
    repaired = tmp_path / "repaired.qcow2"
    qemu_img("check", repaired)
    found = [convert_to_raw(repaired), *(convert_to_raw(repaired, extra=("-l", name)) for name in ("first", "second"))]
    assert found == expected
    qemu_io(repaired, "write -P 7 20M 3M", "discard 0 1M")
    qemu_img("snapshot", "-d", "first", repaired)
    qemu_img("check", repaired)


# ---- images of which some words were changed at random

SMALL = [
    "plain 9",
    "refcounts of 1 bit",
    "refcounts of 2 bits",
    "version 2",
    "subclusters",
    "zero prealloc",
    "QEMU 512",
    "QEMU 1 bit",
    "QEMU subclusters",
]
MUTATIONS = 3 * settings().max_examples // 100


@pytest.mark.timeout(120 if MUTATIONS < 10 else 3600)
@pytest.mark.parametrize("mode", ["leaks", "all"])
@pytest.mark.parametrize("kind", SMALL)
def test_whatever_is_changed_nothing_gets_worse(kind: str, mode: Mode, tmp_path: Path) -> None:
    """Nothing that could be read is lost, QEMU sees what we see, and a second repair finds nothing to do."""
    sound = SOUND[kind](tmp_path).read_bytes()
    words = metadata_words(sound)
    dice = random.Random(f"{kind} {mode}")
    for number in range(MUTATIONS):
        told, content = mutate(sound, words, dice)
        if dice.random() < 0.4:
            more, content = mutate(content, words, dice)
            told = f"{told}; {more}"
        if any(content[60:64]) and not any(content[64:72]):
            continue  # the header as a snapshot table changes with every repair
        try:
            repaired = repair(content, mode)
        except Qcow2Error:
            continue
        result = repaired.result
        assert lost(readable(content), readable(repaired.content)) == [], f"{number}: {told}"
        assert not repair(repaired.content, mode).log.calls, f"{number}: {told}"
        numbers = (result.check_errors, result.corruptions, result.leaks, 0, 0)
        checked = qemu_check(repaired.content, tmp_path)
        assert checked.numbers in (numbers, None), f"{number}: {told}"
