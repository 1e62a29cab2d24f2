"""Where backups are kept: the options that name a target, for the verbs that open one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.manager import Hooks
    from qcow2_plugin.adapters.backup.target import BackupTarget

TARGETS = "a directory, s3://BUCKET/PREFIX, borg:REPOSITORY, restic:REPOSITORY, or what a plugin knows"


def add_options(parser: argparse.ArgumentParser) -> None:
    """--target-option."""
    parser.add_argument(
        "--target-option",
        dest="target_options",
        action="append",
        type=pair,
        default=[],
        metavar="NAME=VALUE",
        help="an option of the target, as endpoint=URL; secrets are named, not told: file:PATH; several times",
    )


def open_target(uri: str, arguments: argparse.Namespace, hooks: Hooks) -> BackupTarget:
    """The target that was named. Raises TargetError, PluginError, OSError."""
    return hooks.target(uri, dict(arguments.target_options))


def pair(word: str) -> tuple[str, str]:
    """ "NAME=VALUE"; argparse turns the ValueError into a usage error."""
    name, is_pair, value = word.partition("=")
    if not is_pair or not name:
        raise ValueError(word)
    return name, value


pair.__name__ = "NAME=VALUE"  # what argparse calls it in "invalid NAME=VALUE value"
