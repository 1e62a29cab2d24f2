"""The part of HOOKS.md that the code says itself: each hook, and each value that hooks are given.

    python -m tests.support.hook_reference      writes it anew

Owns how docstrings become Markdown; refuses to add a word.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from qcow2_plugin.adapters.backup import hook_values, hookspecs, model

DOCUMENT = Path(hookspecs.REFERENCE)
START = "## The hooks\n"


def examples() -> Iterator[tuple[str, str]]:
    """Each hook with the example in its docstring."""
    for hook in hookspecs.described():
        _, example = _split(hook.name)
        yield hook.name, example


def reference() -> str:
    """Everything from `START` on."""
    lines = [START]
    for hook in hookspecs.described():
        words, example = _split(hook.name)
        lines += [f"### {hook.name}({', '.join(hook.arguments)})", "", f"*{hook.call_class.value}*. {words}", ""]
        lines += ["```python", example, "```", ""]
    lines += ["## What hooks are given and answer", ""]
    for module in (model, hook_values):
        for value in _values(module):
            lines += [f"### {value.__name__}", "", *_about(value), ""]
    return "\n".join(lines).rstrip() + "\n"


def written() -> str:
    """What HOOKS.md has from `START` on."""
    return START + DOCUMENT.read_text().partition(START)[2]


def _split(hook: str) -> tuple[str, str]:
    words, example = re.split(r"\n\n(?= *@hookimpl)", inspect.getdoc(getattr(hookspecs, hook)) or "")
    return words, textwrap.dedent(example).strip()


def _values(home: ModuleType) -> Iterator[type]:
    for value in vars(home).values():
        if inspect.isclass(value) and dataclasses.is_dataclass(value) and value.__module__ == home.__name__:
            yield value


def _about(value: type) -> Iterator[str]:
    yield (inspect.getdoc(value) or "").strip()
    yield ""
    for field in dataclasses.fields(value):
        yield f"* `{field.name}`: `{field.type}`"


if __name__ == "__main__":
    head = DOCUMENT.read_text().partition(START)[0]
    DOCUMENT.write_text(head + reference())
