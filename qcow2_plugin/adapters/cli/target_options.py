"""Where backups are kept: the options that name a target, for the verbs that open one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from qcow2_plugin.adapters.cli import hook_options

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.manager import Hooks
    from qcow2_plugin.adapters.backup.repository import Repository
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


@contextmanager
def opened(uri: str, arguments: argparse.Namespace) -> Iterator[tuple[BackupTarget, Hooks]]:
    """The target that was named, and the plugins that take part, as long as the block runs; a signal to end ends it as
    Ctrl-C does. Raises TargetError, PluginError, OSError."""
    from qcow2_plugin.adapters.cli.signals import ended_by_signals

    with (
        ended_by_signals(),
        hook_options.load(arguments) as hooks,
        closing(hooks.target(uri, dict(arguments.target_options))) as target,
    ):
        yield target, hooks


@contextmanager
def opened_repository(uri: str, arguments: argparse.Namespace) -> Iterator[tuple[Repository, Hooks]]:
    """The repository that is there, otherwise as `opened`. Raises ManifestError, too, if there is none."""
    from qcow2_plugin.adapters.backup.repository import Repository

    with opened(uri, arguments) as (target, hooks):
        yield Repository.open(target), hooks


def pair(word: str) -> tuple[str, str]:
    """ "NAME=VALUE"; argparse turns the ValueError into a usage error."""
    name, is_pair, value = word.partition("=")
    if not is_pair or not name:
        raise ValueError(word)
    return name, value


pair.__name__ = "NAME=VALUE"  # what argparse calls it in "invalid NAME=VALUE value"
