"""HOOKS.md says what the code says, and its examples are plugins."""

from __future__ import annotations

import re
from typing import Any

import pytest

from qcow2_plugin.adapters.backup import hook_values, hookspecs, secrets
from qcow2_plugin.adapters.backup.hookspecs import CLASSES, CallClass
from qcow2_plugin.adapters.backup.manager import Hooks
from tests.support import hook_reference


def test_the_reference_is_made_from_the_code() -> None:
    assert hook_reference.written() == hook_reference.reference(), "run python -m tests.support.hook_reference"


def test_the_introduction_knows_every_class_and_no_other_hook() -> None:
    head = hook_reference.DOCUMENT.read_text().partition(hook_reference.START)[0]
    assert re.findall(r"^\| \*(\w+)\* \|", head, re.MULTILINE) == [each.value for each in CallClass]
    assert set(re.findall(r"`(qcow2_\w+)`", head)) <= {*CLASSES, "qcow2_plugin"}


def test_hooks_are_named_and_listed_in_one_place() -> None:
    assert all(hook.name.startswith(hookspecs.PREFIX) for hook in hookspecs.described())
    assert {hook.name for hook in hookspecs.described()} == {name for name in vars(hookspecs) if name[:6] == "qcow2_"}


@pytest.mark.parametrize(("hook", "example"), list(hook_reference.examples()), ids=lambda value: value[:30])
def test_each_example_is_a_plugin_with_that_hook(hook: str, example: str) -> None:
    names = {**vars(hookspecs), **vars(hook_values), **vars(secrets)}
    own: dict[str, Any] = {}
    exec(compile(example, hook, "exec"), names, own)
    plugin = type("Example", (), {**{name: staticmethod(each) for name, each in own.items()}, "QCOW2_PLUGIN_API": 1})
    hooks = Hooks.load(use_installed=False, own={"example": plugin()})
    assert [listed.hooks for listed in hooks.plugins if listed.name == "example"] == [(hook,)]
