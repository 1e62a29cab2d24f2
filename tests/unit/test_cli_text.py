"""adapters/cli/text: sizes, tables and messages."""

from __future__ import annotations

import io
import sys

import pytest

from qcow2_plugin.adapters.cli import text
from qcow2_plugin.errors import NotQcow2Error
from qcow2_plugin.storage.opener import Policy


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1000448, "977 KiB"),
        ((1 << 20) - 1, "1024 KiB"),
        (1 << 20, "1 MiB"),
        (64 << 40, "64 TiB"),
        (2 << 60, "2 EiB"),
        ((1 << 63) - 1, "8 EiB"),
    ],
)
def test_short_sizes(count: int, shown: str) -> None:
    assert text.short_size(count) == shown


def test_sizes_say_the_bytes_too() -> None:
    assert text.size(64 << 20) == "64 MiB (67108864 bytes)"
    assert text.size(512) == "512 bytes"


@pytest.mark.parametrize(
    ("word", "count"),
    [("0", 0), ("4096", 4096), ("64k", 65536), ("64K", 65536), ("1M", 1 << 20), ("1.5G", 3 << 29), ("1t", 1 << 40)],
)
def test_sizes_are_read(word: str, count: int) -> None:
    assert text.parse_size(word) == count


@pytest.mark.parametrize("word", ["", "k", "-1", "1x", "0.3k", "nan", "1.5", "0x10", "infk", "1e3"])
def test_what_is_no_size(word: str) -> None:
    with pytest.raises(ValueError):
        text.parse_size(word)


def test_tables_and_fields_are_aligned() -> None:
    shown = text.table(("ID", "SIZE"), [("1", "10 KiB"), ("long", "1")], right=frozenset({1}))
    assert shown == "  ID      SIZE\n  1     10 KiB\n  long       1\n"
    assert text.fields([("a", "1"), ("long", "2")]) == "a     1\nlong  2\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_headings_are_bold_on_a_terminal_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert text.heading("Title") == "Title"
    monkeypatch.setattr(sys, "stdout", _Terminal())
    assert text.heading("Title") == "\x1b[1mTitle\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert text.heading("Title") == "Title"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (NotQcow2Error("no image", file="a\x1bb"), "no image (a\\x1bb)"),
        (FileNotFoundError(2, "No such file", "a\nb"), "No such file (a\\nb)"),
        (OSError(5, "I/O error"), "I/O error"),
        (OSError("odd"), "odd"),
    ],
)
def test_an_error_is_one_safe_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    text.fail(error)
    assert capsys.readouterr().err == f"qcow2: error: {line}\n".replace("\\n)", "\\x0ab)").replace("a\\nb", "a\\x0ab")


def test_the_policies_are_those_of_the_opener() -> None:
    assert list(text.POLICIES) == [policy.value for policy in Policy]
