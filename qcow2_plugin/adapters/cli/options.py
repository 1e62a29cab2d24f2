"""-o OPTION=VALUE,...: the list of options that qemu-img takes, for the verbs that take it, too."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from qcow2_plugin.adapters.cli import text
from qcow2_plugin.errors import printable

COMPATS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
"""Words for the version of the format."""
_SWITCHES = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


class Option(NamedTuple):
    """An option of -o; `parse` raises ValueError."""

    name: str
    parse: Callable[[str], Any]
    values: str
    help: str


def switch(word: str) -> bool:
    """Raises ValueError."""
    if word not in _SWITCHES:
        raise ValueError(word)
    return _SWITCHES[word]


def compat(word: str) -> str:
    """Raises ValueError."""
    if word not in COMPATS:
        raise ValueError(word)
    return word


compat.__name__ = "version"  # what argparse calls it in "invalid version value"


def add_to(
    parser: argparse.ArgumentParser,
    known: Mapping[str, Option],
    *,
    unlisted: Mapping[str, Option] | None = None,
    required: bool = False,
) -> None:
    """-o, which sets each option of the list as an argument of its name; it may be given several times.

    Help lists those that are `known`; `unlisted` ones are taken, too.
    """
    parser.add_argument(
        "-o",
        action=_OptionList,
        known=known,
        unlisted=unlisted or {},
        required=required,
        metavar="OPTION=VALUE,...",
        help="options by their names in qemu-img",
    )


class _OptionList(argparse.Action):
    """-o: sets each option of the list as its long form does."""

    def __init__(
        self, *arguments: Any, known: Mapping[str, Option], unlisted: Mapping[str, Option], **more: Any
    ) -> None:
        super().__init__(*arguments, **more)
        self._listed = known
        self._known = {**known, **unlisted}

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        words = _split(str(values))
        if not {"help", "?"}.isdisjoint(words):
            print(_list(self._listed), end="")
            parser.exit()
        for word in words:
            try:
                setattr(namespace, *_parse(word, self._known))
            except ValueError as error:
                raise argparse.ArgumentError(self, str(error)) from None


def _split(words: str) -> list[str]:
    """What stands between commas; two commas stand for one in a value."""
    return [word.replace("\0", ",") for word in words.replace(",,", "\0").split(",")]


def _parse(word: str, known: Mapping[str, Option]) -> tuple[str, Any]:
    """Name and value of "name=value", or of the name of a switch that is on. Raises ValueError with what is wrong."""
    name, has_value, value = word.partition("=")
    if name.startswith("encrypt"):
        raise ValueError(f'"{printable(name)}" cannot be: encrypted images are not supported')
    if name not in known:
        raise ValueError(f'there is no "{printable(name)}"; -o help lists what there is')
    option = known[name]
    if not has_value and option.parse is switch:
        return name, True
    try:
        return name, option.parse(value)
    except ValueError:
        raise ValueError(f'"{printable(value)}" is no value for {name}={option.values} ({option.help})') from None


def _list(known: Mapping[str, Option]) -> str:
    return text.fields((f"{option.name}={option.values}", option.help) for option in known.values())


def as_told(value: Any) -> str:
    """A parsed value in the words of -o."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def warn_of_data_file(name: str | None) -> None:
    """A note if this is the name of a data file that QEMU and we look for in different places."""
    if name and not os.path.isabs(name):
        text.warn("QEMU looks for the data file in its working directory, not beside the image")
