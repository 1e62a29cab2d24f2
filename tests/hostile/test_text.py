"""Text that an image chose, where people or programs read it: nothing of it acts on a terminal.

Errors, what `info` tells of problems, and what an NBD client is shown. The names themselves are given to callers as
they are; showing them is the caller's business, and `printable` is there for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2_plugin.adapters.nbd import Server
from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import Qcow2Error, printable
from qcow2_plugin.operations.info import info
from qcow2_plugin.storage.opener import Policy
from tests.support.builder import ImageBuilder
from tests.support.fields import DATA_FILE
from tests.support.holders import qemu_io_holding
from tests.support.hostile import IMAGE, assert_harmless_text, unharmed
from tests.support.lockbytes import QEMU_WRITER, holding, locked_bytes
from tests.support.watching import audited_opens

MIB = 1 << 20
TEXTS = [
    b"\x1b[2J\x1b]0;title\x07",
    b"line\r\nqcow2: all is well",
    b"\x9b31m\x85",
    "\u202eflow\u2066\u200f\u061c".encode(),
    "\u2028\u2029\ufeff\u00ad".encode(),
    b"\x7f\b\b\b\v\f",
    b"\xff\xfe\xc3",
    b"\xed\xa0\x80",
    b"\\x1b",
    bytes(range(1, 32)),
]


def backing(text: bytes) -> ImageBuilder:
    return ImageBuilder(MIB).backing(text, b"raw")


def backing_with_driver(text: bytes) -> ImageBuilder:
    return ImageBuilder(MIB).backing(text + b":x", b"raw")


def backing_above(text: bytes) -> ImageBuilder:
    return ImageBuilder(MIB).backing(b"../" + text, b"raw")


def backing_format(text: bytes) -> ImageBuilder:
    return ImageBuilder(MIB).backing(b"base", text[:15])


def data_file(text: bytes) -> ImageBuilder:
    return ImageBuilder(MIB, incompatible=4).extension(DATA_FILE, text)


def feature(text: bytes) -> ImageBuilder:
    return ImageBuilder(MIB, incompatible=1 << 40).feature_names([(0, 40, text[:46])])


@pytest.mark.parametrize("text", TEXTS, ids=repr)
@pytest.mark.parametrize(
    "make",
    [backing, backing_with_driver, backing_above, backing_format, data_file, feature],
    ids=lambda make: make.__name__,
)
@pytest.mark.parametrize("policy", list(Policy))
def test_errors_show_what_an_image_says(
    policy: Policy, make: Callable[[bytes], ImageBuilder], text: bytes, tmp_path: Path
) -> None:
    path = tmp_path / IMAGE
    make(text).build(path)
    with unharmed(tmp_path), pytest.raises(Qcow2Error) as caught:
        open_image(path, policy=policy)
    message = str(caught.value)
    assert_harmless_text(message)
    if make is backing and b"\0" not in text:
        assert printable(text) in message


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_errors_show_the_name_of_the_file(text: bytes, tmp_path: Path) -> None:
    path = os.fsdecode(os.path.join(os.fsencode(tmp_path), text))
    for content in (b"", b"QFI\xfb" + bytes(200)):
        Path(path).write_bytes(content)
        with pytest.raises(Qcow2Error) as caught:
            open_image(path)
        assert_harmless_text(str(caught.value))
        assert printable(path) in str(caught.value)
    os.unlink(path)
    with pytest.raises(FileNotFoundError) as missing:
        open_image(path)
    assert_harmless_text(str(missing.value))


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_what_an_nbd_client_is_shown(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    image = ImageBuilder(MIB).data(0, b"x").snapshot(b"1", text).snapshot(text, b"name").snapshot(b"3", b"name")
    image.bitmap(text, [(0, 1)]).bitmap(b"sound", [(0, 1)]).build(path)
    server = Server(lambda number: None, int)
    server.configure("file", str(path))
    server.open()
    try:
        shown = server.exports()
        for word in [word for export in shown for word in export]:
            assert_harmless_text(word)
        assert {name for name, _ in shown} >= {"", "snapshot=1", "snapshot=3", "bitmap=sound"}
        hidden = [f"{kind}={os.fsdecode(text)}" for kind in ("snapshot", "bitmap")]
        for name in hidden:
            connection = server.connect(name)
            assert_harmless_text(connection.description())
            connection.close()
        for wrong in ("snapshot=none", "bitmap=none", ""):
            with pytest.raises(Qcow2Error) as caught:
                server.connect(wrong + os.fsdecode(text))
            assert_harmless_text(str(caught.value))
    finally:
        server.close()


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_info_gives_names_as_they_are(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    image = ImageBuilder(MIB, incompatible=4).extension(DATA_FILE, text).backing(text, text[:15])
    image.snapshot(text, text).bitmap(text, [(0, 1)]).build(path)
    with unharmed(tmp_path), audited_opens() as names:
        found = info(path).qcow2
    assert found is not None
    shown = [found.backing_file, found.data_file, found.snapshots[0].id, found.snapshots[0].name, found.bitmaps[0].name]
    assert [os.fsencode(name or "") for name in shown] == [text] * 5
    assert os.fsencode(found.backing_format or "") == text[:15]
    assert [name for name in names if not name.startswith("/proc/self/fd/")] == [str(path)]


def test_info_does_not_disturb_a_writer(tmp_path: Path) -> None:
    """One file, open for reading, while QEMU has it open for writing."""
    path = tmp_path / IMAGE
    ImageBuilder(MIB).data(0, b"x").backing(b"json:{}", b"raw").snapshot(b"1", b"one").build(path)
    with holding(path, QEMU_WRITER), unharmed(tmp_path):
        before = locked_bytes(path)
        with pytest.raises(Qcow2Error):
            info(path)
        found = info(path, force_share=True)
        assert found.virtual_size == MIB
        assert locked_bytes(path) == before
    ImageBuilder(MIB).data(0, b"x").build(path)
    with qemu_io_holding(path):
        assert info(path, force_share=True).virtual_size == MIB
        with pytest.raises(Qcow2Error) as caught:
            info(path)
        assert_harmless_text(str(caught.value))
