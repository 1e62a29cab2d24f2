"""nbdkit's command line: what makes a server read-only, in every spelling that nbdkit takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcow2_plugin.adapters.command_line import (
    PARAMETERS,
    ParameterError,
    Parameters,
    asks_for_read_only,
    dump_parameters,
    help_text,
)
from qcow2_plugin.storage.opener import Policy


@pytest.mark.parametrize(
    "words",
    [
        "-r python plugin.py file=x",
        "-fr python plugin.py",
        "-rf python plugin.py",
        "python plugin.py file=x -r",
        "--readonly python plugin.py",
        "--read-only python plugin.py",
        "--re python plugin.py",
        "-P -r -r python plugin.py",
        "-U - -r python plugin.py",
        "--pidfile=-x -r python plugin.py",
        "-t4 -vr python plugin.py",
        "--tls=off --tls-verify-peer -r python plugin.py",
        "--exit-with-parent -nr python plugin.py",
        "python plugin.py file=x --run -x -r",
    ],
)
def test_it_is_read_only(words: str) -> None:
    assert asks_for_read_only(words.split())


@pytest.mark.parametrize(
    "words",
    [
        "",
        "python plugin.py file=x",
        "python plugin.py file=-r",
        "-P -r python plugin.py",
        "-Pr python plugin.py",
        "-fUr python plugin.py",
        "--pidfile -r python plugin.py",
        "--pid -r python plugin.py",
        "--pidfile=-r python plugin.py",
        "--run -r python plugin.py",
        "--run=--readonly python plugin.py",
        "-t 4 -- python plugin.py -r",
        "- python r",
        "--foreground --port 10809 python plugin.py",
    ],
)
def test_it_is_writable(words: str) -> None:
    assert not asks_for_read_only(words.split())


def given(**words: str) -> Parameters:
    parameters = Parameters()
    for name, value in {"file": "disk.qcow2", **words}.items():
        parameters.set(name.replace("_", "-"), value, int)
    parameters.check()
    return parameters


@pytest.mark.parametrize("asked", [False, True])
def test_the_parameter_decides_whatever_nbdkit_was_told(asked: bool) -> None:
    assert given().is_writable(read_only_server=asked) is not asked
    assert given(readonly="true").is_writable(read_only_server=asked) is False
    assert given(readonly="false").is_writable(read_only_server=asked) is True


@pytest.mark.parametrize("only", [{"snapshot": "1"}, {"bitmap": "b"}, {"allow_damaged": "on"}, {"force_share": "1"}])
def test_what_is_for_reading_makes_it_read_only(only: dict[str, str]) -> None:
    assert not given(**only).is_writable(read_only_server=False)
    assert not given(**only, readonly="true").is_writable(read_only_server=False)
    with pytest.raises(ParameterError, match="is for reading only"):
        given(**only, readonly="false")


def test_what_is_not_asked_for_does_not() -> None:
    assert given(allow_damaged="false", force_share="no").is_writable(read_only_server=False)
    assert given(allow_damaged="false", readonly="false").is_writable(read_only_server=True)


def test_values_are_taken_as_what_they_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/away")
    assert given(data_file="link/../data").data_file == str(tmp_path / "far" / "data")
    parameters = given(data_file="a/../data", policy="trusted", cache_size="17", backing_format="raw")
    assert parameters.file == str(tmp_path / "disk.qcow2")
    assert parameters.data_file == str(tmp_path / "data")
    assert parameters.policy is Policy.TRUSTED
    assert parameters.cache_size == 17
    assert parameters.backing_format == "raw"


def test_every_parameter_is_told_of() -> None:
    assert len(dump_parameters().splitlines()) == len(PARAMETERS)
    assert all(f"{name}=" in help_text() for name in PARAMETERS)
