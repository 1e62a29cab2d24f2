"""`qcow2 create`: how options are told, what is printed, and how it ends when that is wrong."""

from __future__ import annotations

import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from qcow2_plugin import info
from tests.support.command import process_environment, qcow2, qcow2_json, qcow2_process
from tests.support.watching import no_descriptor_left

MIB = 1 << 20


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(*arguments: str) -> str:
    ended = qcow2("create", *arguments)
    assert (ended.status, ended.stderr) == (0, "")
    return ended.stdout


def details(path: str = "disk.qcow2") -> dict[str, object]:
    told = qcow2_json("info", path)
    return {
        "virtual-size": told["virtual-size"],
        "cluster-size": told["cluster-size"],
        **told["format-specific"]["data"],
    }


def test_one_line_says_what_was_made() -> None:
    line = "Formatting 'disk.qcow2', fmt=qcow2 cluster_size=65536 extended_l2=off compression_type=zlib size=1048576 "
    assert made("disk.qcow2", "1M") == line + "lazy_refcounts=off refcount_bits=16\n"
    assert made("-q", "disk.qcow2", "1M") == ""
    assert "size=1024 lazy" in made("disk.qcow2", "1000")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("-o cluster_size=4k", {"cluster-size": 4096}),
        ("--cluster-size=2M", {"cluster-size": 2 * MIB}),
        ("-o compat=0.10", {"compat": "0.10"}),
        ("-o compat=v2", {"compat": "0.10"}),
        ("--compat v3", {"compat": "1.1"}),
        ("-o lazy_refcounts=on", {"lazy-refcounts": True}),
        ("-o lazy_refcounts=yes", {"lazy-refcounts": True}),
        ("-o lazy_refcounts", {"lazy-refcounts": True}),
        ("-o lazy_refcounts=off", {"lazy-refcounts": False}),
        ("--lazy-refcounts", {"lazy-refcounts": True}),
        ("-o refcount_bits=1,extended_l2=true", {"refcount-bits": 1, "extended-l2": True}),
        ("--refcount-bits=64 --extended-l2", {"refcount-bits": 64, "extended-l2": True}),
        ("-o compression_type=zstd -o cluster_size=512", {"compression-type": "zstd", "cluster-size": 512}),
        ("--compression-type=zstd -f qcow2", {"compression-type": "zstd"}),
        ("-o cluster_size=4k -o cluster_size=8k", {"cluster-size": 8192}),
        ("-o cluster_size=4k --cluster-size=16k", {"cluster-size": 16384}),
        ("--cluster-size=16k -o cluster_size=4k", {"cluster-size": 4096}),
        ("-o data_file=disk.data,data_file_raw=on", {"data-file": "disk.data", "data-file-raw": True}),
        ("-o data_file=a,,b", {"data-file": "a,b", "data-file-raw": False}),
        ("-o data_file=a=b", {"data-file": "a=b"}),
        ("--data-file=a,b --data-file-raw", {"data-file": "a,b", "data-file-raw": True}),
    ],
)
def test_options_are_told_in_either_way(words: str, expected: dict[str, object]) -> None:
    made("-q", *words.split(), "disk.qcow2", "1M")
    told = details()
    assert {key: told[key] for key in expected} == expected


@pytest.mark.parametrize(
    "words", ["disk.qcow2 -o size=2M", "-o size=2048k disk.qcow2", "disk.qcow2 2M", "disk.qcow2 2097152"]
)
def test_the_size_is_told_in_either_way(words: str) -> None:
    made(*words.split())
    assert details()["virtual-size"] == 2 * MIB


def test_a_backing_file_is_told_in_either_way(folder: Path) -> None:
    made("base.qcow2", "3M")
    for words in (
        "-b base.qcow2 -F qcow2",
        "-o backing_file=base.qcow2,backing_fmt=qcow2",
        "--backing-file=base.qcow2 --backing-format=qcow2",
        "-b none -o backing_fmt=qcow2,backing_file=base.qcow2",
    ):
        line = made(*words.split(), "disk.qcow2")
        assert "size=3145728 backing_file=base.qcow2 backing_fmt=qcow2 lazy" in line
    made("-u", "-b", "none", "-F", "raw", "disk.qcow2", "1M")
    assert qcow2_json("info", "disk.qcow2")["backing-filename"] == "none"


def test_a_data_file_is_kept_or_overwritten(folder: Path) -> None:
    (folder / "disk.data").write_bytes(b"x" * MIB)
    words = ["--data-file=disk.data", "--data-file-raw"]
    ended = qcow2("create", *words, "disk.qcow2", "1M")
    assert ended.status == 1
    assert "keep_data_file" in ended.stderr
    for keep in (["--keep-data-file"], ["-o", "keep_data_file=on"]):
        made("-q", *words, *keep, "disk.qcow2")
        assert details()["virtual-size"] == MIB
        assert (folder / "disk.data").read_bytes() == b"x" * MIB
    made("-q", *words, "--keep-data-file", "--clip-data-file", "disk.qcow2", "4k")
    made("-q", *words, "--overwrite-data-file", "disk.qcow2", "2M")
    assert (folder / "disk.data").read_bytes() == bytes(2 * MIB)


def test_it_says_where_qemu_looks_for_a_data_file(folder: Path) -> None:
    (folder / "sub").mkdir()
    note = "qcow2: note: QEMU looks for the data file in its working directory, not beside the image\n"
    assert qcow2("create", "--data-file=a", "disk.qcow2", "1M").stderr == note
    assert qcow2("create", "-q", "--data-file=b", "disk.qcow2", "1M").stderr == ""
    assert qcow2("create", "--data-file=sub/c", "disk.qcow2", "1M").stderr == ""


def test_all_options_are_listed() -> None:
    names = [line.partition("=")[0] for line in made("-o", "help").splitlines()]
    assert names == [
        *("size", "compat", "cluster_size", "refcount_bits", "lazy_refcounts", "extended_l2", "compression_type"),
        *("preallocation", "backing_file", "backing_fmt", "data_file", "data_file_raw", "keep_data_file"),
        *("overwrite_data_file", "clip_data_file"),
    ]
    assert made("-o", "cluster_size=4k,?") == made("-o", "help")
    shown = made("--help")
    for name in set(names) - {"size", "backing_fmt"}:
        assert "--" + name.replace("_", "-") in shown
    assert "examples:\n  qcow2 create" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "required: FILE"),
        ("disk.qcow2 1q", "argument SIZE: invalid size value"),
        ("disk.qcow2 -1", "-1"),
        ("disk.qcow2 1M more", "unrecognized arguments: more"),
        ("-f raw disk.qcow2 1M", "invalid choice: 'raw'"),
        ("-o size=1M disk.qcow2 1M", "the size is given twice"),
        ("-o colour=red disk.qcow2 1M", 'there is no "colour"; -o help lists what there is'),
        ("-o nolazy_refcounts disk.qcow2 1M", 'there is no "nolazy_refcounts"'),
        ("-o cluster_size disk.qcow2 1M", '"" is no value for cluster_size=SIZE'),
        ("-o cluster_size=x disk.qcow2 1M", '"x" is no value for cluster_size=SIZE (unit of allocation'),
        ("-o refcount_bits=many disk.qcow2 1M", '"many" is no value for refcount_bits=BITS'),
        ("-o lazy_refcounts=maybe disk.qcow2 1M", '"maybe" is no value for lazy_refcounts=on|off'),
        ("-o compat=3 disk.qcow2 1M", '"3" is no value for compat=1.1|0.10'),
        ("--compat=3 disk.qcow2 1M", "argument --compat: invalid version value: '3'"),
        ("-o encryption=on disk.qcow2 1M", "encrypted images are not supported"),
        ("-o encrypt.format=luks disk.qcow2 1M", '"encrypt.format" cannot be: encrypted images are not supported'),
    ],
)
def test_wrong_usage_says_what_is_wrong_and_makes_nothing(words: str, message: str, folder: Path) -> None:
    ended = qcow2("create", *words.split())
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.startswith("usage: qcow2")
    assert message in ended.stderr
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("disk.qcow2", "say how large the disk is"),
        ("-b none -F qcow2 disk.qcow2", "No such file or directory (none)"),
        ("-u -b none -F qcow2 disk.qcow2", "say how large"),
        ("-b none disk.qcow2 1M", "never guessed"),
        ("-o preallocation=some disk.qcow2 1M", "it is one of off, metadata, falloc, full"),
        ("--preallocation=some disk.qcow2 1M", "it is one of off, metadata, falloc, full"),
        ("-o compat=0.10,lazy_refcounts=on disk.qcow2 1M", "compat=0.10"),
        ("--keep-data-file disk.qcow2 1M", "keep_data_file is about a data_file"),
        ("none/disk.qcow2 1M", "No such file or directory (none/disk.qcow2)"),
    ],
)
def test_a_failure_is_one_line_and_makes_nothing(words: str, message: str, folder: Path) -> None:
    with no_descriptor_left():
        ended = qcow2("create", *words.split())
    assert (ended.status, ended.stdout) == (1, "")
    assert ended.stderr.startswith("qcow2: error: ")
    assert ended.stderr.count("\n") == 1
    assert message in ended.stderr
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["\x1b[31mred", "back\rover", "right\u202eleft", "two\nlines", "\udcff", "a\\b"])
def test_no_name_acts_on_a_terminal(name: str, folder: Path) -> None:
    (folder / f"{name}base").write_bytes(bytes(512))
    endings = [
        qcow2("create", f"--data-file={name}data", "--data-file-raw", name, "1M"),
        qcow2("create", f"--data-file={name}data", name, "1M"),
        qcow2("create", "-b", f"{name}base", "-F", "raw", name),
        qcow2("create", "-b", name, "-F", name, "other", "1M"),
        qcow2("create", "-o", f"{name}=1", "other", "1M"),
        qcow2("create", "-o", f"cluster_size={name}", "other", "1M"),
        qcow2("create", f"--preallocation={name}", "other", "1M"),
    ]
    assert [ended.status for ended in endings] == [0, 1, 0, 1, 2, 2, 1]
    for ended in endings:
        for character in ended.stdout + ended.stderr:
            assert character == "\n" or unicodedata.category(character) not in {"Cc", "Cf", "Cs"}
        assert "two\nlines" not in ended.stdout + ended.stderr


def test_it_is_a_process_too(folder: Path) -> None:
    ended = qcow2_process("create", "disk.qcow2", "1M", folder=folder)
    assert (ended.status, ended.stderr) == (0, "")
    assert info("disk.qcow2").virtual_size == MIB


def test_it_starts_without_what_it_does_not_need() -> None:
    script = (
        "import sys; from qcow2_plugin.adapters.cli import main; "
        "main(['create', 'disk.qcow2', '1M']); print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env=process_environment(), timeout=60, check=True
    )
    modules = set(done.stderr.decode().split())
    assert "qcow2_plugin.operations.create" in modules
    assert not {"numpy", "isal", "subprocess", "tempfile", "qcow2_plugin.engine.chain"} & modules


@pytest.mark.parametrize("limit", [100_000, 260_000])
def test_a_full_disk_leaves_nothing(limit: int, folder: Path) -> None:
    """A file of ours may not become larger than `limit`: the system's own error, in the middle of it."""
    (folder / "raw.data").write_bytes(b"x" * 1000)
    script = (
        "import resource, sys; from qcow2_plugin.adapters.cli import main; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(main(sys.argv[1:]))"
    )
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for words in (
        "--preallocation=full disk.qcow2 1M",
        "--preallocation=falloc disk.qcow2 1M",
        "--data-file=disk.data --data-file-raw disk.qcow2 1M",
        "--data-file=raw.data --data-file-raw --keep-data-file disk.qcow2 1M",
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, "create", *words.split()],
            capture_output=True,
            env=process_environment(),
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.startswith(b"qcow2: error: File too large"), done.stderr
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
