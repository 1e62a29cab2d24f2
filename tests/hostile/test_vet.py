"""A verdict on an image from a stranger: exact fields, one file opened, nothing followed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2_plugin import Policy, Verdict, vet
from qcow2_plugin.errors import printable
from tests.support.builder import ImageBuilder, patch
from tests.support.command import qcow2
from tests.support.watching import audited_opens, no_descriptor_left

MIB = 1 << 20
SOUND: dict[str, object] = {
    "policy": "confined",
    "accepted": True,
    "reasons": (),
    "is_qcow2": True,
    "virtual_size": MIB,
    "encryption": "none",
    "dirty": False,
    "corrupt": False,
    "needs_data_file": False,
    "data_file": None,
    "needs_backing_file": False,
    "backing_file": None,
    "backing_format": None,
}
UNREADABLE = {
    **dict.fromkeys(SOUND),
    "policy": "confined",
    "accepted": False,
    "is_qcow2": True,
}


def backed(name: bytes, backing_format: bytes | None = b"qcow2") -> ImageBuilder:
    return ImageBuilder(MIB).backing(name, backing_format)


def with_data(path: Path, name: bytes | None) -> ImageBuilder:
    return ImageBuilder(MIB).data_file(path.parent / "data", name)


def against_backing(name: str, rule: str) -> dict[str, object]:
    reasons = (f"its backing file would not be opened: {rule}",)
    told = {"needs_backing_file": True, "backing_file": name, "backing_format": "qcow2"}
    return {"accepted": False, "reasons": reasons, **told}


def against_data(name: str, rule: str) -> dict[str, object]:
    reasons = (f"its data file would not be opened: {rule}",)
    return {"accepted": False, "reasons": reasons, "needs_data_file": True, "data_file": name}


ABSOLUTE = "it is absolute"
COMPONENT = 'it has an empty, "." or ".." component'
PREFIX = "it has a driver or URL prefix, and names are plain file names here"

CASES: dict[str, tuple[Callable[[Path], ImageBuilder], dict[str, object]]] = {
    "plain": (lambda _: ImageBuilder(MIB), {}),
    "version 2": (lambda _: ImageBuilder(MIB, version=2), {}),
    "empty disk": (lambda _: ImageBuilder(0), {"virtual_size": 0}),
    "dirty": (lambda _: ImageBuilder(MIB, incompatible=1), {"dirty": True}),
    "corrupt": (lambda _: ImageBuilder(MIB, incompatible=2), {"corrupt": True}),
    "size that is no multiple of a sector": (lambda _: ImageBuilder(MIB, header={"size": MIB + 1}), {}),
    "backing file": (
        lambda _: backed(b"base.qcow2"),
        {"needs_backing_file": True, "backing_file": "base.qcow2", "backing_format": "qcow2"},
    ),
    "backing file below": (
        lambda _: backed(b"sub/base", b"raw"),
        {"needs_backing_file": True, "backing_file": "sub/base", "backing_format": "raw"},
    ),
    "backing file, absolute": (lambda _: backed(b"/etc/passwd"), against_backing("/etc/passwd", ABSOLUTE)),
    "backing file, up": (lambda _: backed(b"../base"), against_backing("../base", COMPONENT)),
    "backing file, down and up": (lambda _: backed(b"a/../../b"), against_backing("a/../../b", COMPONENT)),
    "backing file, here": (lambda _: backed(b"."), against_backing(".", COMPONENT)),
    "backing file, json": (lambda _: backed(b"json:{}"), against_backing("json:{}", PREFIX)),
    "backing file, nbd": (lambda _: backed(b"nbd://host/x"), against_backing("nbd://host/x", PREFIX)),
    "backing file, http": (lambda _: backed(b"http://host/x"), against_backing("http://host/x", PREFIX)),
    "backing file, fd": (lambda _: backed(b"fd:3"), against_backing("fd:3", PREFIX)),
    "backing file, NUL": (lambda _: backed(b"a\0b"), against_backing("a\0b", "it holds a NUL byte")),
    "backing file, empty": (lambda _: backed(b""), against_backing("", "it is empty")),
    "backing file without format": (
        lambda _: backed(b"base", None),
        {
            "accepted": False,
            "reasons": ("the format of the backing file is not recorded",),
            "needs_backing_file": True,
            "backing_file": "base",
        },
    ),
    "data file": (lambda path: with_data(path, b"data"), {"needs_data_file": True, "data_file": "data"}),
    "data file, absolute": (lambda path: with_data(path, b"/etc/passwd"), against_data("/etc/passwd", ABSOLUTE)),
    "data file, up": (lambda path: with_data(path, b"../data"), against_data("../data", COMPONENT)),
    "data file, json": (lambda path: with_data(path, b"json:{}"), against_data("json:{}", PREFIX)),
    "data file, host_device": (
        lambda path: with_data(path, b"host_device:/dev/x"),
        against_data("host_device:/dev/x", PREFIX),
    ),
    "data file without name": (
        lambda path: with_data(path, None),
        {"accepted": False, "reasons": ("it needs a data file and does not name it",), "needs_data_file": True},
    ),
    "raw bit without data file": (
        lambda _: ImageBuilder(MIB, autoclear=2),
        {"accepted": False, "reasons": ("header: the raw data file bit is set without a data file",)},
    ),
    "unknown feature": (
        lambda _: ImageBuilder(MIB, incompatible=1 << 17),
        {
            "accepted": False,
            "reasons": ("the image uses unknown incompatible features (0x20000): bit 17",),
        },
    ),
    "AES": (
        lambda _: ImageBuilder(MIB, header={"crypt_method": 1}),
        {"accepted": False, "reasons": ("the image is encrypted (AES), which is not supported",), "encryption": "aes"},
    ),
    "LUKS": (
        lambda _: ImageBuilder(MIB).luks(b"LUKS\xba\xbe" + bytes(600)),
        {
            "accepted": False,
            "reasons": ("the image is encrypted (LUKS), which is not supported",),
            "encryption": "luks",
        },
    ),
    "version 4": (
        lambda _: ImageBuilder(MIB, header={"version": 4}),
        {**UNREADABLE, "reasons": ("qcow2 version 4 is not supported, only 2 and 3 are",)},
    ),
    "cluster bits": (
        lambda _: ImageBuilder(MIB, header={"cluster_bits": 22}),
        {**UNREADABLE, "reasons": ("header at host offset 0x14: cluster_bits is 22, not 9 to 21",)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_verdicts(name: str, tmp_path: Path) -> None:
    make, expected = CASES[name]
    path = tmp_path / "image"
    make(path).build(path)
    with no_descriptor_left(), audited_opens() as opened:
        verdict = vet(path)
    assert dataclasses.asdict(verdict) == {**SOUND, **expected}
    assert {Path(each).name for each in opened if not each.startswith("/proc/")} == {"image"}
    assert all(printable(reason) == reason for reason in verdict.reasons)

    told = qcow2("vet", "--output=json", path)
    assert told.status == (0 if verdict.accepted else 3)
    as_json = {key.replace("-", "_"): value for key, value in json.loads(told.stdout).items()}
    assert Verdict(**{**as_json, "reasons": tuple(as_json["reasons"])}) == verdict
    for_people = qcow2("vet", path)
    assert for_people.status == told.status
    assert ("accepted" if verdict.accepted else "refused") in for_people.stdout


def test_every_policy_judges_by_its_own_rules(tmp_path: Path) -> None:
    path = tmp_path / "image"
    backed(b"/srv/base.qcow2").build(path)
    assert [vet(path, policy=policy).accepted for policy in Policy] == [False, False, True]
    backed(b"base.qcow2").build(path)
    assert [vet(path, policy=policy).accepted for policy in Policy] == [False, True, True]


def test_a_file_that_is_no_image_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "image"
    for content in (b"", b"QFI\xfb", bytes(512), b"#!/bin/sh\n"):
        path.write_bytes(content)
        verdict = vet(path)
        assert not verdict.is_qcow2
        assert not verdict.accepted


def test_names_are_told_without_control_characters(tmp_path: Path) -> None:
    path = tmp_path / "image"
    backed(b"/a\x1b[31m\r\xe2\x80\xae").build(path)
    patch(path, 0, b"QFI\xfb")
    assert "\x1b" not in qcow2("vet", path).stdout
    assert json.loads(qcow2("vet", "--output=json", path).stdout)["backing-file"] == "/a\x1b[31m\r\u202e"
