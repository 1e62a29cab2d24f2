"""`qcow2 plugins`: which plugins there are, and what they take part in."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.cli import hook_options, text
from qcow2_plugin.errors import printable

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.plugins import Listed

_DESCRIPTION = """\
List the plugins that backups and restores call: the built-in ones, those of installed packages (entry points of the
group "qcow2_plugin") and those named here; why one is not used, and the hooks that each has. --hooks lists the hooks
that there are. Exit code 1 with --strict-plugins: one of them cannot be used.
"""
_EXAMPLES = """\
examples:
  qcow2 plugins
  qcow2 plugins --plugin ./my_plugin.py --strict-plugins    is there a mistake in my plugin?
  qcow2 plugins --hooks                                     what can a plugin take part in?
"""


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "plugins",
        help="which plugins take part in backups?",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", choices=("human", "json"), default="human", help="json is a list of objects")
    parser.add_argument("--hooks", action="store_true", help="list the hooks, not the plugins")
    hook_options.add_to(parser)
    parser.set_defaults(start=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.hooks:
        return _list_hooks(arguments.output)
    with hook_options.load(arguments) as hooks:
        plugins = hooks.plugins
    if arguments.output == "json":
        import json
        from dataclasses import asdict

        print(json.dumps([asdict(plugin) for plugin in plugins], indent=4))
    else:
        for plugin in plugins:
            print(text.heading(printable(plugin.name)))
            print(text.fields(_facts(plugin), "  "), end="")
    return 0


def _facts(plugin: Listed) -> Iterator[tuple[str, str]]:
    version = f" {printable(plugin.version)}" if plugin.version else ""
    yield "from", printable(plugin.source) + version
    if plugin.trouble is not None:
        yield "not used", plugin.trouble
    if plugin.hooks:
        yield "hooks", ", ".join(plugin.hooks)


def _list_hooks(output: str) -> int:
    from qcow2_plugin.adapters.backup.hookspecs import API_LEVEL, REFERENCE, described

    rows = [(hook.name, hook.call_class.value, hook.promise) for hook in described()]
    if output == "json":
        import json

        print(json.dumps([dict(zip(("name", "class", "promise"), row, strict=True)) for row in rows], indent=4))
    else:
        print(f"Hooks of level {API_LEVEL}:")
        print(text.table(("HOOK", "CLASS", "WHAT IT IS FOR"), rows), end="")
        print(f"How to write a plugin, and all about each hook: {printable(REFERENCE)}")
    return 0
