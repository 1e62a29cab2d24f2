"""`qcow2 amend`: the -o options of qemu-img, what is refused, and what is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin import create_image, info
from qcow2_plugin.operations.info import Qcow2Info
from tests.support.command import qcow2

MIB = 1 << 20


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told() -> Qcow2Info:
    found = info("disk.qcow2").qcow2
    assert found is not None
    return found


def test_options_are_told_as_to_qemu_img() -> None:
    create_image("disk.qcow2", MIB, version=2)
    ended = qcow2("amend", "-f", "qcow2", "-o", "compat=v3,refcount_bits=64", "-o", "lazy_refcounts", "disk.qcow2")
    assert (ended.status, ended.stdout, ended.stderr) == (0, "", "")
    assert (told().version, told().refcount_bits, told().lazy_refcounts) == (3, 64, True)
    ended = qcow2("amend", "-q", "-o", "compat=0.10,refcount_bits=16,size=2M", "disk.qcow2")
    assert ended.status == 0
    assert (told().version, info("disk.qcow2").virtual_size) == (2, 2 * MIB)


def test_a_smaller_size_takes_a_word() -> None:
    create_image("disk.qcow2", 2 * MIB)
    ended = qcow2("amend", "-o", "size=1M", "disk.qcow2")
    assert ended.status == 1
    assert "may shrink" in ended.stderr
    assert qcow2("amend", "--shrink", "-o", "size=1M", "disk.qcow2").status == 0
    assert info("disk.qcow2").virtual_size == MIB


def test_progress_is_told_in_the_words_of_qemu_img() -> None:
    create_image("disk.qcow2", MIB)
    ended = qcow2("amend", "-p", "-o", "refcount_bits=64", "disk.qcow2")
    assert ended.stdout.endswith("    (100.00/100%)\r\n")
    assert qcow2("amend", "-p", "-q", "-o", "refcount_bits=16", "disk.qcow2").stdout == ""


@pytest.mark.parametrize("word", ["help", "?", "size=1M,help"])
def test_help_lists_what_can_be_changed(word: str) -> None:
    ended = qcow2("amend", "-o", word)
    assert ended.status == 0
    names = [line.partition("=")[0] for line in ended.stdout.splitlines()]
    assert names == ["compat", "lazy_refcounts", "refcount_bits", "size", "data_file", "data_file_raw"]


@pytest.mark.parametrize(
    "option", ["cluster_size=64k", "compression_type=zlib", "extended_l2=off", "backing_file=base,backing_fmt=raw"]
)
def test_what_cannot_be_changed_may_be_said(option: str, folder: Path) -> None:
    (folder / "base").write_bytes(bytes(MIB))
    below: dict[str, Any] = {"backing_file": "base", "backing_format": "raw"} if "backing" in option else {}
    create_image("disk.qcow2", MIB, **below)
    assert qcow2("amend", "-o", f"{option},lazy_refcounts=on", "disk.qcow2").status == 0
    assert told().lazy_refcounts


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("cluster_size=4k", "cluster_size of an image cannot be changed to 4096; make a new image that has it"),
        ("compression_type=zstd", "compression_type of an image cannot be changed to zstd"),
        ("extended_l2=on", "extended_l2 of an image cannot be changed"),
        ("preallocation=off", "preallocation of an image cannot be changed"),
        ("backing_file=x", "backing_file of an image cannot be changed to x; use `qemu-img rebase`"),
        ("backing_fmt=raw", "backing_fmt of an image cannot be changed to raw; use `qemu-img rebase`"),
        ("refcount_bits=3", "refcounts have 1, 2, 4, 8, 16, 32 or 64 bits, not 3 (disk.qcow2)"),
        ("data_file=x", "data_file is for images that have an external data file"),
    ],
)
def test_what_is_refused_is_told(option: str, message: str, folder: Path) -> None:
    create_image("disk.qcow2", MIB)
    before = (folder / "disk.qcow2").read_bytes()
    ended = qcow2("amend", "-o", f"lazy_refcounts=on,{option}", "disk.qcow2")
    assert (ended.status, ended.stdout) == (1, "")
    assert message in ended.stderr
    assert (folder / "disk.qcow2").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("disk.qcow2", "required: -o"),
        ("-o compat=1.1", "required: IMAGE"),
        ("-o compat=2 disk.qcow2", '"2" is no value for compat=1.1|0.10'),
        ("-o lazy_refcounts=maybe disk.qcow2", '"maybe" is no value for lazy_refcounts=on|off'),
        ("-o refcount_bits=some disk.qcow2", '"some" is no value for refcount_bits=BITS'),
        ("-o bogus=1 disk.qcow2", 'there is no "bogus"; -o help lists what there is'),
        ("-o encrypt.state=active disk.qcow2", '"encrypt.state" cannot be: encrypted images are not supported'),
        ("-f raw -o size=1M disk.qcow2", "invalid choice: 'raw'"),
        ("--force -o size=1M disk.qcow2", "unrecognized arguments: --force"),
    ],
)
def test_wrong_usage_says_what_is_wrong(words: str, message: str) -> None:
    create_image("disk.qcow2", MIB)
    ended = qcow2("amend", *words.split())
    assert (ended.status, ended.stdout) == (2, "")
    assert message in ended.stderr


def test_a_data_file_gets_another_name(folder: Path) -> None:
    create_image("disk.qcow2", MIB, data_file="disk.raw")
    (folder / "disk.raw").rename("moved.raw")
    assert qcow2("amend", "-o", "data_file=moved.raw", "disk.qcow2").status == 1
    assert qcow2("amend", "-o", "data_file=moved.raw", "--data-file=moved.raw", "disk.qcow2").status == 0
    assert told().data_file == "moved.raw"
    assert qcow2("amend", "-o", "data_file_raw=on", "disk.qcow2").status == 0
    assert told().data_file_raw
    assert qcow2("amend", "-o", "data_file=,data_file_raw=off", "disk.qcow2").status == 0
    assert (told().data_file, told().data_file_raw) == (None, False)


NOTE = "qcow2: note: QEMU looks for the data file in its working directory, not beside the image\n"


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ("-o data_file=new.raw", NOTE),
        ("-q -o data_file=new.raw", ""),
        ("-o data_file=/somewhere/new.raw", ""),
        ("-o data_file=", ""),
        ("-o lazy_refcounts=on", ""),
    ],
)
def test_a_name_that_qemu_looks_for_elsewhere_is_noted(words: str, note: str) -> None:
    create_image("disk.qcow2", MIB, data_file="disk.raw")
    ended = qcow2("amend", *words.split(), "disk.qcow2")
    assert (ended.status, ended.stdout, ended.stderr) == (0, "", note)
