"""What is in a guest, found by libguestfs: partitions, file systems, operating systems, and single files.

Strings are the guest's own and may hold anything that text can; who prints them makes them `printable`. Names of
devices are those that guestfish has for the same images in the same order: /dev/sda for the first, /dev/sda1 for its
first partition.

All images that are given together are looked at in one launch, and can be disks of one guest. Images of strangers
that should not see each other are given one by one: whoever breaks out of the appliance's kernel in there is still in
a virtual machine, but among the disks of the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcow2_plugin.adapters.guestfs.appliance import DEFAULT_TIMEOUT, GuestError, ask
from qcow2_plugin.adapters.guestfs.drive import Drive, Path, guestfs_drive
from qcow2_plugin.adapters.nbdkit_process import is_utf8
from qcow2_plugin.errors import OptionError

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.manager import Hooks

DEFAULT_LIMIT = 64 << 20
"""Bytes of a file that is read out of a guest."""


@dataclass(frozen=True, slots=True)
class Partition:
    """An entry of a partition table. `start` and `length` in bytes; `type` is a GUID, or as "0x83" in a DOS table."""

    device: str
    number: int
    start: int
    length: int
    type: str | None


@dataclass(frozen=True, slots=True)
class FileSystem:
    """A file system or what stands where one could ("swap", "unknown"). `size` is that of its device, `free` what is
    left to write, both in bytes; None where libguestfs cannot tell.
    """

    device: str
    type: str
    label: str | None
    uuid: str | None
    size: int | None
    free: int | None


@dataclass(frozen=True, slots=True)
class Application:
    """An installed package."""

    name: str
    version: str
    release: str | None
    architecture: str | None


@dataclass(frozen=True, slots=True)
class OperatingSystem:
    """A system and its root `device`. `mount_points` by path; `applications` is None unless they were asked for and
    could be listed.
    """

    device: str
    type: str | None
    distribution: str | None
    major: int | None
    minor: int | None
    product_name: str | None
    host_name: str | None
    architecture: str | None
    package_format: str | None
    package_management: str | None
    mount_points: Mapping[str, str]
    applications: tuple[Application, ...] | None


@dataclass(frozen=True, slots=True)
class Guest:
    """What is on one disk. What spans several, as a volume of LVM can, is told of each."""

    image: str
    kind: str
    """"raw" if the data file was read itself, "nbd" if through nbdkit."""
    device: str
    virtual_size: int | None
    partition_table: str | None
    partitions: tuple[Partition, ...]
    file_systems: tuple[FileSystem, ...]
    operating_systems: tuple[OperatingSystem, ...]


def inspect(
    images: Sequence[Path | Drive],
    *,
    applications: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
    hooks: Hooks | None = None,
    **opening: Any,
) -> list[Guest]:
    """What is on these disks, in their order, found in one launch; nothing is written.

    An image is a path, opened with the options of `guestfs_drive`, or a drive that is one already. Copies of a disk
    with LVM, RAID or btrfs on it, which one kernel cannot tell apart, are looked at one after the other; `timeout`
    (seconds) is for each launch. Plugins, if there are `hooks`, have a say about the files that images name, and are
    told what was found.

    Raises OptionError; NoGuestfsError if libguestfs is missing or cannot start, GuestError if it gives up or needs
    longer; what `guestfs_drive` raises. Lock: as `guestfs_drive`, for all of them at once.
    """
    if not images:
        return []
    if hooks is None:
        return _inspected(images, applications, timeout, opening)
    guests = _inspected(images, applications, timeout, {**opening, "references": hooks.references()})
    for guest in guests:
        hooks.guest_inspected(guest)
    return guests


def _inspected(
    images: Sequence[Path | Drive], applications: bool, timeout: float, opening: Mapping[str, Any]
) -> list[Guest]:
    with _drives(images, opening) as drives:
        told = ask("inspect", drives, timeout=timeout, applications=applications).told
        if not told.get("clash"):
            return _guests(drives, told)
        return [
            guest
            for drive in drives
            for guest in _guests([drive], ask("inspect", [drive], timeout=timeout, applications=applications).told)
        ]


def read_guest_file(
    image: Path | Drive,
    path: str,
    *,
    device: str | None = None,
    limit: int = DEFAULT_LIMIT,
    timeout: float = DEFAULT_TIMEOUT,
    **opening: Any,
) -> bytes:
    """The content of the file at the absolute `path` in a guest, through symlinks as the guest follows them.

    The guest is the operating system on the disk, with what it mounts. `device` ("/dev/sda2") is the one file system
    to look in instead, for which `path` starts there: where there is no system, or more than one.

    Raises GuestError if there is no such file, if it is a directory or anything else that is no file, or longer than
    `limit` bytes; else as `inspect`.
    """
    if not path.startswith("/") or "\0" in path:
        raise OptionError("the path of a file in a guest begins with /")
    if not is_utf8(path + (device or "")):
        raise OptionError("the guestfs module takes only names in UTF-8, a file with another cannot be read by it")
    with _drives([image], opening) as drives:
        return ask("read", drives, timeout=timeout, payload_limit=limit, path=path, device=device).payload


@contextmanager
def _drives(images: Sequence[Path | Drive], opening: Mapping[str, Any]) -> Iterator[list[Drive]]:
    with ExitStack() as resources:
        yield [
            image if isinstance(image, Drive) else resources.enter_context(guestfs_drive(image, **opening))
            for image in images
        ]


def _guests(drives: Sequence[Drive], told: Any) -> list[Guest]:
    try:
        return [_guest(index, drive, told) for index, drive in enumerate(drives)]
    except (KeyError, TypeError, IndexError) as error:
        raise GuestError(f"libguestfs' process gave an answer that is none ({type(error).__name__})") from error


def _guest(index: int, drive: Drive, told: Any) -> Guest:
    disk = told["disks"][index]
    return Guest(
        image=os.fspath(drive.image),
        kind=drive.kind,
        device=disk["device"],
        virtual_size=disk["size"],
        partition_table=disk["partition_table"],
        partitions=tuple(Partition(**each) for each in disk["partitions"]),
        file_systems=tuple(FileSystem(**_own(each)) for each in told["file_systems"] if index in each["disks"]),
        operating_systems=tuple(_system(_own(each)) for each in told["systems"] if index in each["disks"]),
    )


def _own(told: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in told.items() if key != "disks"}


def _system(told: dict[str, Any]) -> OperatingSystem:
    applications = told.pop("applications", None)
    known = None if applications is None else tuple(Application(**each) for each in applications)
    return OperatingSystem(applications=known, **told)
