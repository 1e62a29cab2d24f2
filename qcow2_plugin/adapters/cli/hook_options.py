"""The options about plugins, for the verbs that call their hooks."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.cli import text

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.manager import Hooks


def add_to(parser: argparse.ArgumentParser) -> None:
    """--plugin, --no-plugins, --block-plugin and --strict-plugins."""
    group = parser.add_argument_group(
        "plugins", "Programs of others that take part, as 'qcow2 plugins' lists them; they may do all that you may."
    )
    group.add_argument(
        "--plugin",
        dest="plugins",
        action="append",
        default=[],
        metavar="NAME",
        help="use this one, too: a Python module, or the path of one (with a / or .py); may be given several times",
    )
    group.add_argument(
        "--no-plugins", action="store_true", help="use none that are installed, only what is built in or named here"
    )
    group.add_argument(
        "--block-plugin",
        dest="blocked_plugins",
        action="append",
        default=[],
        metavar="NAME",
        help="do not use this one, be it built in; may be given several times",
    )
    group.add_argument(
        "--strict-plugins", action="store_true", help="fail if one cannot be used, instead of going on without it"
    )


def load(arguments: argparse.Namespace) -> Hooks:
    """The plugins that these options ask for. Raises PluginError."""
    from qcow2_plugin.adapters.backup.manager import Hooks

    return Hooks.load(
        use_installed=not arguments.no_plugins,
        plugins=arguments.plugins,
        blocked=arguments.blocked_plugins,
        strict=arguments.strict_plugins,
        report=text.warn,
    )
