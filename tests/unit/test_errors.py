"""What errors say, and that no text of an image can act on a terminal through them."""

from __future__ import annotations

import errno

import pytest

from qcow2_plugin import errors
from qcow2_plugin.errors import CorruptImageError, Qcow2Error, TruncatedImageError, about_file, printable

NBD_ERRNOS = {
    errno.EPERM,
    errno.EIO,
    errno.ENOMEM,
    errno.EINVAL,
    errno.ENOSPC,
    errno.EOVERFLOW,
    errno.ENOTSUP,
    errno.ESHUTDOWN,
}
CLASSES = [thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, Qcow2Error)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain name.qcow2", "plain name.qcow2"),
        (b"plain name.qcow2", "plain name.qcow2"),
        ("", ""),
        ("C:\\disk", "C:\\\\disk"),
        ("\x1b[31mred", "\\x1b[31mred"),
        (b"\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("line\r\nline\ttab\0", "line\\x0d\\x0aline\\x09tab\\x00"),
        ("\x7f\x80\x9b\x9f", "\\x7f\\x80\\x9b\\x9f"),
        (b"\x9b", "\\x9b"),
        (b"\xff\xfe", "\\xff\\xfe"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\u2066\u2028\u2029\u200b\ufeff", "\\u2066\\u2028\\u2029\\u200b\\ufeff"),
        ("\ud800", "\\ud800"),
        ("\ue000", "\\ue000"),
        ("\U000e0041", "\\U000e0041"),
        ("K\u00e4se \u65e5\u672c", "K\u00e4se \u65e5\u672c"),
        ("K\u00e4se".encode(), "K\u00e4se"),
        ("\u00e4\\", "\u00e4\\\\"),
    ],
)
def test_printable(text: str | bytes, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(("length", "shown"), [(1023, 1023), (1100, 1100), (1101, 1103), (1 << 20, 1103)])
def test_printable_cuts_what_is_longer_than_any_name(length: int, shown: int) -> None:
    assert len(printable("x" * length)) == shown


def test_there_are_error_classes() -> None:
    assert len(CLASSES) > 10


@pytest.mark.parametrize("kind", CLASSES)
def test_every_errno_can_travel_over_nbd(kind: type[Qcow2Error]) -> None:
    assert kind.errno in NBD_ERRNOS


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_has_a_promise(kind: type[Qcow2Error]) -> None:
    assert kind.__doc__


def test_the_file_is_named_behind_the_detail() -> None:
    assert str(Qcow2Error("something is wrong", file="disk.qcow2")) == "something is wrong (disk.qcow2)"
    assert str(Qcow2Error("something is wrong")) == "something is wrong"


def test_the_file_name_is_printable() -> None:
    assert str(Qcow2Error("wrong", file="\x1b[2J.qcow2")) == "wrong (\\x1b[2J.qcow2)"


def test_a_corrupt_structure_says_what_and_where() -> None:
    error = CorruptImageError("L2 table", "entry 17 has reserved bits 0x1e0", host_offset=0x50000, file="image.qcow2")
    assert str(error) == "L2 table at host offset 0x50000: entry 17 has reserved bits 0x1e0 (image.qcow2)"
    assert (error.structure, error.host_offset) == ("L2 table", 0x50000)


def test_a_place_of_zero_is_a_place() -> None:
    assert str(CorruptImageError("header", "is odd", host_offset=0)) == "header at host offset 0x0: is odd"
    assert str(CorruptImageError("header", "is odd")) == "header: is odd"


def test_truncated_is_a_kind_of_corrupt() -> None:
    assert issubclass(TruncatedImageError, CorruptImageError)


def test_about_file_fills_in_the_file() -> None:
    with pytest.raises(CorruptImageError, match=r"odd \(disk\.qcow2\)$"), about_file("disk.qcow2"):
        raise CorruptImageError("header", "is odd")


def test_about_file_keeps_a_file_that_is_known() -> None:
    with pytest.raises(Qcow2Error) as caught, about_file("outer"):
        raise Qcow2Error("wrong", file="inner")
    assert caught.value.file == "inner"


def test_about_file_leaves_other_errors_alone() -> None:
    with pytest.raises(OSError, match="No space") as caught, about_file("disk.qcow2"):
        raise OSError(errno.ENOSPC, "No space")
    assert caught.value.filename is None
