"""`qcow2 info`: what people see, what is cut, what is broken, and names that would act on a terminal."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2_plugin.operations.info import DEFAULT_SNAPSHOT_LIMIT, info
from tests.support.builder import ImageBuilder, huge_empty, patch, set_field, shared_l2_bomb
from tests.support.command import process_environment, qcow2, qcow2_json
from tests.support.watching import no_descriptor_left

MIB = 1 << 20
NASTY = [
    b"\x1b[31mred",
    b"back\rover",
    b"bell\x07",
    "right\u202eleft".encode(),
    b"csi\x9b2J",
    b"two\nlines",
    b"\xff\xfe",
    b"a\\b",
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.qcow2"


def test_people_see_everything(path: Path) -> None:
    image = ImageBuilder(64 * MIB, extended_l2=True, compression="zstd", compatible=1).backing(b"sub/base", b"raw")
    image.snapshot(b"1", b"before upgrade", date_sec=86400, vm_clock_nsec=3_725_500_000_000)
    image.bitmap(b"backup", flags=2).bitmap(b"old", flags=1, granularity_bits=20).build(path)
    shown = qcow2("info", path).stdout
    for line in (
        f"image         {path}",
        "format        qcow2 version 3 (compat 1.1)",
        "virtual size  64 MiB (67108864 bytes)",
        "backing file  sub/base (raw)",
        f"              seen from here: {path.parent}/sub/base",
        "state         clean",
        "  cluster size  64 KiB (65536 bytes)",
        "  L2 entries    extended, subclusters of 2 KiB",
        "  refcounts     16 bits, lazy",
        "  compression   zstd",
        "Internal snapshots (1)",
        "  1   1970-01-02 00:00:00  64 MiB         -  01:02:05.500  before upgrade",
        "Dirty bitmaps (2)",
        "       64 KiB  enabled    yes                                          backup",
        "        1 MiB  disabled   no: it is in use or was not closed properly  old",
    ):
        assert line in [shown_line.rstrip() for shown_line in shown.splitlines()], f"{line}\n{shown}"


def test_people_see_states_and_data_files(path: Path) -> None:
    ImageBuilder(MIB, incompatible=3).data_file(path.with_name("d"), b"disk.data", raw=True).build(path)
    shown = qcow2("info", path).stdout
    assert "data file     disk.data (a raw image of the disk)" in shown
    assert "marked corrupt" in shown
    assert "dirty: refcounts may be stale" in shown
    ImageBuilder(MIB).data_file(path.with_name("d"), None).build(path)
    assert "data file     not named in the image\n" in qcow2("info", path).stdout


def nasty_images(name: bytes, folder: Path) -> list[ImageBuilder]:
    return [
        ImageBuilder(MIB).backing(name, name[:15]),
        ImageBuilder(MIB).data_file(folder / "data", name),
        ImageBuilder(MIB).snapshot(name, name),
        ImageBuilder(MIB).bitmap(name),
        ImageBuilder(MIB, incompatible=1 << 40).feature_names([(0, 40, name)]),
    ]


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("kind", range(5))
def test_no_name_acts_on_a_terminal(kind: int, name: bytes, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    nasty_images(name, path.parent)[kind].build(path)
    ended = qcow2("info", path)
    for character in ended.stdout + ended.stderr:
        assert character == "\n" or unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert "two\nlines" not in ended.stdout + ended.stderr


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("kind", range(4))
def test_json_keeps_every_byte_of_a_name(kind: int, name: bytes, path: Path) -> None:
    nasty_images(name, path.parent)[kind].build(path)
    ended = qcow2("info", "--output=json", path)
    assert ended.stdout.isascii()
    assert all(character == "\n" or character.isprintable() for character in ended.stdout)
    told = json.loads(ended.stdout)
    details = told["format-specific"]["data"]
    names = [
        lambda: told["backing-filename"],
        lambda: details["data-file"],
        lambda: told["snapshots"][0]["name"],
        lambda: details["bitmaps"][0]["name"],
    ]
    assert os.fsencode(names[kind]()) == name


def test_many_snapshots_are_cut_and_it_says_so(path: Path) -> None:
    image = ImageBuilder(MIB)
    for number in range(DEFAULT_SNAPSHOT_LIMIT + 1):
        image.snapshot(b"%d" % number, b"")
    image.build(path)
    ended = qcow2("info", "--output=json", path)
    told = json.loads(ended.stdout)
    assert len(told["snapshots"]) == DEFAULT_SNAPSHOT_LIMIT
    assert told["snapshot-count"] == DEFAULT_SNAPSHOT_LIMIT + 1
    assert "only the first 4096 of 4097 snapshots are listed; --all-snapshots" in ended.stderr
    assert "only the first 4096 of 4097" in qcow2("info", path).stdout
    told = qcow2_json("info", "--all-snapshots", path)
    assert len(told["snapshots"]) == DEFAULT_SNAPSHOT_LIMIT + 1
    assert "snapshot-count" not in told


Damage = Callable[[Path], object]


def broken_directory(path: Path) -> None:
    built = ImageBuilder(MIB).bitmap(b"one").build(path)
    patch(path, built.bitmap_entry_offsets[0], bytes(8))


def broken_snapshots(path: Path) -> None:
    ImageBuilder(MIB).snapshot(b"1", b"one").build(path)
    set_field(path, "snapshots_offset", 1 << 40)


def broken_luks(path: Path) -> None:
    ImageBuilder(MIB).luks(b"no LUKS".ljust(592, b"\0")).build(path)


def broken_extension(path: Path) -> None:
    ImageBuilder(MIB).bitmap(b"one").bitmaps_extension(reserved=7).build(path)


@pytest.mark.parametrize(
    ("damage", "key", "words"),
    [
        (broken_directory, "bitmaps", "the bitmaps cannot be read: bitmap directory: entry 0"),
        (broken_extension, "bitmaps", "the bitmaps cannot be read: bitmaps header extension: reserved field is 0x7"),
        (broken_snapshots, "snapshots", "the snapshots cannot be read: snapshot table"),
        (broken_luks, "cipher-alg", "the LUKS header cannot be read: LUKS header: does not begin"),
    ],
)
def test_what_is_broken_is_told_and_the_rest_too(damage: Damage, key: str, words: str, path: Path) -> None:
    damage(path)
    with no_descriptor_left():
        ended = qcow2("info", path)
    assert ended.status == 0
    assert "\nNotes\n" in ended.stdout
    assert words in ended.stdout
    ended = qcow2("info", "--output=json", path)
    assert ended.status == 0
    assert f'"{key}"' not in ended.stdout
    assert f"qcow2: note: {words}" in ended.stderr


HUGE: dict[str, Damage] = {
    "2 EiB": huge_empty,
    "64 TiB in 12 MiB": shared_l2_bomb,
    "65536 snapshots": lambda path: sparse(path, snapshots=True),
    "65535 bitmaps": lambda path: sparse(path, snapshots=False),
}


def sparse(path: Path, *, snapshots: bool) -> None:
    """Claims as many structures as the limits allow, in a file that holds zeros."""
    if snapshots:
        ImageBuilder(MIB, header={"nb_snapshots": 65536, "snapshots_offset": 1 << 20}).build(path)
    else:
        directory = {"nb_bitmaps": 65535, "directory_size": 67107840, "directory_offset": 1 << 20}
        ImageBuilder(MIB).bitmap(b"one").bitmaps_extension(**directory).build(path)
    os.truncate(path, 256 * MIB)


@pytest.mark.parametrize("name", HUGE)
def test_huge_claims_cost_little(name: str, path: Path) -> None:
    HUGE[name](path)
    info(path)  # what is imported late is imported now
    begin = time.thread_time()
    info(path)
    assert time.thread_time() - begin < 0.3


@pytest.mark.parametrize("name", HUGE)
def test_huge_claims_fit_in_little_memory(name: str, path: Path) -> None:
    """The whole command under 256 MiB of address space and 2 s of computing."""
    HUGE[name](path)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (256 * MIB, 256 * MIB))
        resource.setrlimit(resource.RLIMIT_CPU, (2, 2))

    done = subprocess.run(
        [sys.executable, "-m", "qcow2_plugin", "info", path],
        preexec_fn=limit,
        capture_output=True,
        env=process_environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
