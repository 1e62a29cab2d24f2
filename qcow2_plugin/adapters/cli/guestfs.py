"""`qcow2 guestfs`: the command lines by which guestfish and the virt-* commands get at an image, printed or run."""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import shutil
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from types import FrameType
from typing import TYPE_CHECKING, Any

from qcow2_plugin.adapters.cli import guests, text
from qcow2_plugin.adapters.cli.signals import ended_by_signals
from qcow2_plugin.errors import printable
from qcow2_plugin.storage.directory import absolute_path

if TYPE_CHECKING:
    from qcow2_plugin.adapters.guestfs.drive import Drive

_DESCRIPTION = """\
Get at the disks with guestfish or any virt-* command of libguestfs. The command lines are printed, for you to run; with
--run the command runs at once, and the images are served for as long as it takes.

A raw data file that is the disk by itself is read directly. All else is served by nbdkit, writing (--rw) in particular,
so that dirty bitmaps know what changed. COMMAND is given the disks in front of its own arguments; it is "guestfish -i"
if there is none, which finds the guest and mounts it.
"""
_EXAMPLES = """\
examples:
  qcow2 guestfs disk.qcow2                                      what to type
  qcow2 guestfs --run disk.qcow2                                a guestfish shell, read-only
  qcow2 guestfs --run disk.qcow2 -- guestfish -i cat /etc/fstab
  qcow2 guestfs --run system.qcow2 data.qcow2 -- virt-df -h
  qcow2 guestfs --rw --run disk.qcow2 -- virt-customize --hostname web1
"""
_WITH_MODE = frozenset({"guestfish", "guestmount", "virt-rescue"})
"""Commands that take --ro and --rw; the others are of one kind."""
_WRITING = frozenset({"virt-copy-in", "virt-customize", "virt-edit", "virt-format", "virt-sysprep", "virt-tar-in"})
"""Commands that write and take no --ro, so that they would write to a raw data file as well."""
_DEFAULT_COMMAND = ("guestfish", "-i")
_PRINTED = (_DEFAULT_COMMAND, ("virt-filesystems", "--all", "--long", "-h"), ("virt-inspector",))
_FOR_READING = ("snapshot", "allow_damaged", "force_share")
_PATHS = frozenset({"data_file", "backing_file", "base_directory"})
_INSTALL = (
    "install it with 'apt install guestfish guestfs-tools linux-image-amd64' (Debian; Ubuntu: linux-image-generic) or "
    "'dnf install guestfs-tools libguestfs' (Fedora)"
)


class _Parser(argparse.ArgumentParser):
    """What stands behind "--" is the command, whatever it looks like."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]  # overloaded in typeshed
        words = list(args or ())
        place = words.index("--") if "--" in words else len(words)
        known, unknown = super().parse_known_args(words[:place], namespace)
        known.command = words[place + 1 :]
        return known, unknown


def add_to(verbs: text.Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "guestfs",
        help="use guestfish and the virt-* commands on images",
        usage="qcow2 guestfs [OPTION...] IMAGE... [-- COMMAND [ARGUMENT...]]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.__class__ = _Parser
    parser.add_argument("--run", action="store_true", help="run the command, with the images served meanwhile")
    parser.add_argument(
        "--rw", action="store_true", help="let it write to the disks; nobody else may use them meanwhile"
    )
    text.add_opening(parser)
    guests.add_images(parser)
    parser.set_defaults(start=_run, usage_error=parser.error)


def _run(arguments: argparse.Namespace) -> int:
    opening = guests.opening(arguments)
    if arguments.rw:
        for name in _FOR_READING:
            if getattr(arguments, name):
                arguments.usage_error(f"--{name.replace('_', '-')} is for reading only, it does not go with --rw")
    elif arguments.command and os.path.basename(arguments.command[0]) in _WRITING:
        arguments.usage_error(f"{os.path.basename(arguments.command[0])} writes to the disks, which takes --rw")
    if arguments.run:
        return _run_command(arguments, opening)
    _print_commands(arguments, opening)
    return 0


# ---- running


def _run_command(arguments: argparse.Namespace, opening: dict[str, Any]) -> int:
    """The command's exit code, 128 + N if a signal N ended it, as a shell has it."""
    from qcow2_plugin.adapters.cli.server import STOP_SIGNALS, Children, exit_code
    from qcow2_plugin.adapters.guestfs.appliance import NoGuestfsError
    from qcow2_plugin.adapters.guestfs.drive import guestfs_drive

    command = arguments.command or _DEFAULT_COMMAND
    if shutil.which(command[0]) is None:
        raise NoGuestfsError(f"{printable(command[0])} is not installed; {_INSTALL}")
    with ended_by_signals(), ExitStack() as resources:
        drives = [
            resources.enter_context(guestfs_drive(image, writable=arguments.rw, **opening))
            for image in arguments.images
        ]
        children = Children()
        for number in STOP_SIGNALS:
            # Ctrl-C is for the command, which has it from the terminal and may live on; handlers are not inherited.
            handler = _ignore if number is signal.SIGINT else children.stop
            resources.callback(signal.signal, number, signal.signal(number, handler))
        return exit_code(children.start(_words(command, drives), **_settings()))


def _ignore(_signal: int, _frame: FrameType | None) -> None:
    """A signal handler."""


def _words(command: Sequence[str], drives: Sequence[Drive]) -> list[str]:
    """The command with the drives in front of its own arguments."""
    program = os.path.basename(command[0])
    words = [command[0]]
    if program in _WITH_MODE:
        words.append("--rw" if drives[0].writable else "--ro")
    return [*words, *(word for drive in drives for word in drive.arguments()), *command[1:]]


def _settings() -> dict[str, str]:
    """What libguestfs' commands need in their environment here, unless somebody has decided that already."""
    needed = {"LIBGUESTFS_BACKEND": "direct"}
    if not _kvm_can_work():
        needed["LIBGUESTFS_BACKEND_SETTINGS"] = "force_tcg"
    return {name: value for name, value in needed.items() if name not in os.environ}


def _kvm_can_work() -> bool:
    """False on a PC whose CPU has no virtualization: there can be a /dev/kvm all the same, and QEMU dies of it."""
    if os.uname().machine not in ("x86_64", "i686"):
        return True
    with open("/proc/cpuinfo") as processors:
        flags = next((line.split() for line in processors if line.startswith("flags")), [])
    return not {"vmx", "svm"}.isdisjoint(flags)


# ---- printing


def _print_commands(arguments: argparse.Namespace, opening: dict[str, Any]) -> None:
    drives, servers = [], []
    for number, image in enumerate(arguments.images, 1):
        drive = _future_drive(image, number, arguments.rw, opening)
        drives.append(drive)
        if drive.kind == "nbd":
            servers.append(["qcow2", "serve", *_serve_options(arguments), f"--socket={drive.path}", drive.image])
        else:
            print(f"# {printable(image)}: its raw data file is the disk and is read itself; nobody may write meanwhile")
    if servers:
        print(
            "# in terminals of their own, until Ctrl-C:" if len(servers) > 1 else "# in another terminal, until Ctrl-C:"
        )
        for words in servers:
            print(_typed(words))
        print("# then:")
    for name, value in _settings().items():
        print(f"export {name}={value}")
    for command in (arguments.command,) if arguments.command else _PRINTED:
        print(_typed(_words(command, drives)))
    print("# or in Python:")
    for drive in drives:
        print(f"# {_call(drive)}")


def _future_drive(image: str, number: int, writable: bool, opening: dict[str, Any]) -> Drive:
    """The drive as it will be when people serve the image themselves. The image is opened, to see that it can be."""
    from qcow2_plugin.adapters.guestfs.drive import Drive, guestfs_drive

    path = absolute_path(image)
    with guestfs_drive(path, **opening) as drive:
        if drive.kind == "raw" and not writable:
            return drive
    folder = os.environ.get("XDG_RUNTIME_DIR") or "/tmp"
    # Nobody else can have a socket of this name in /tmp already.
    return Drive(path, "nbd", os.path.join(folder, f"qcow2-{secrets.token_hex(4)}-{number}.sock"), writable)


def _serve_options(arguments: argparse.Namespace) -> list[str]:
    options = ["--writable"] if arguments.rw else []
    options += [f"--policy={arguments.policy}"] if arguments.policy != "confined" else []
    for name in ("snapshot", "data_file", "backing_file", "backing_format", "base_directory"):
        value = getattr(arguments, name)
        if value is not None:
            options.append(f"--{name.replace('_', '-')}={absolute_path(value) if name in _PATHS else value}")
    options += [f"--{name.replace('_', '-')}" for name in ("allow_damaged", "force_share") if getattr(arguments, name)]
    return options


def _typed(words: Sequence[str]) -> str:
    """The words as a shell takes them."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    """One word; as $'...' if it holds what could act on a terminal or is no text."""
    if word.isprintable():
        return shlex.quote(word)
    plain = range(0x20, 0x7F)
    known = (chr(byte) if byte in plain and byte not in b"'\\" else f"\\{byte:03o}" for byte in os.fsencode(word))
    return f"$'{''.join(known)}'"


def _call(drive: Drive) -> str:
    """The call of the guestfs module that adds it."""
    more = f'format="raw", readonly={not drive.writable}'
    if drive.kind == "nbd":
        return f'g.add_drive_opts("", protocol="nbd", server=[{"unix:" + drive.path!a}], {more})'
    return f"g.add_drive_opts({drive.path!a}, {more})"
