"""The script that a Python with libguestfs runs: one request on stdin, one launch, one answer on stdout.

It is started by `appliance` and imports nothing of this package, nor may it need a newer Python than the oldest that a
distribution has. Everything about a guest is asked call by call, and what a call refuses, or answers with bytes that
are no text, is left out: a broken file system or a name made to trip us costs its own field and no other.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Told = dict[str, Any]

try:
    import guestfs
except ImportError:
    guestfs = None

_PR_SET_PDEATHSIG = 1
_TEXT_LIMIT = 4096  # characters of any one thing that a guest says
_LIST_LIMIT = 1000  # file systems, systems, mount points
_PARTITION_LIMIT = 128  # of one disk; as many as a GPT usually has room for
_APPLICATION_LIMIT = 20000
_NAME_LIMIT = 256  # characters of what is said of an application
_SPANNING = ("LVM2_member", "linux_raid_member", "btrfs")
_NOT_MOUNTED = ("swap", "unknown", "LVM2_member", "linux_raid_member", "crypto_LUKS", "BitLocker", "")


class _Failure(Exception):
    """What cannot be done, for people."""


def main() -> None:
    """One request, one answer."""
    request = json.loads(sys.stdin.buffer.read())
    if guestfs is None:
        _answer({"no_guestfs": True})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # QEMU gets it too, which ends the call that we are in
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != request["asked_by"]:
        sys.exit(1)  # it was killed before it could take us with it
    drives, without_kvm = request["drives"], request["without_kvm"]
    try:
        g, without_kvm = _launched(drives, without_kvm)
    except (RuntimeError, UnicodeError) as error:
        _answer({"failure": _first_line(error), "at_launch": True})
    told: Told = {"without_kvm": without_kvm}
    payload = b""
    try:
        if request["verb"] == "inspect":
            told.update(_inspect(g, len(drives), request["applications"]))
        else:
            payload = _read_file(g, request["path"], request["device"], request["payload_limit"])
    except _Failure as failure:
        told["failure"] = str(failure)
    except (RuntimeError, UnicodeError) as error:  # as when the appliance dies, or says what is no text
        told["failure"] = _first_line(error)
    _answer(told, payload)


def _answer(told: Told, payload: bytes = b"") -> NoReturn:
    """The last thing to do; at exit libguestfs ends QEMU and removes what it left."""
    sys.stdout.buffer.write(json.dumps(told).encode() + b"\n" + payload)
    sys.stdout.buffer.flush()
    sys.exit()


def _launched(drives: Sequence[Told], without_kvm: bool) -> tuple[Any, bool]:
    """A running handle with these drives, and whether it is one without KVM."""
    try:
        return _launch(drives, without_kvm), without_kvm
    except RuntimeError:
        if without_kvm:
            raise
        return _launch(drives, True), True


def _launch(drives: Sequence[Told], without_kvm: bool) -> Any:
    g = guestfs.GuestFS(python_return_dict=True)
    g.set_backend("direct")
    if without_kvm:
        g.set_backend_setting("force_tcg", "1")
    for drive in drives:
        place, options = drive["path"], {"format": "raw", "readonly": True}
        if drive["kind"] == "nbd":
            place, options = "", dict(options, protocol="nbd", server=["unix:" + drive["path"]])
        g.add_drive_opts(place, **options)
    g.launch()
    return g


def _ask(call: Callable[..., Any], *arguments: Any) -> Any:
    """What libguestfs answers; None if it cannot, or if the answer is not text."""
    try:
        return _clipped(call(*arguments))
    except (RuntimeError, UnicodeError):
        return None


def _clipped(value: Any) -> Any:
    """With no text longer than its limit."""
    return value[:_TEXT_LIMIT] if isinstance(value, str) else value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["libguestfs does not say why"])[0][:_TEXT_LIMIT]


# ---- inspection


def _inspect(g: Any, disk_count: int, applications: bool) -> Told:
    devices = g.list_devices()[:disk_count]
    tags = {device: _ask(g.blkid, device) or {} for device in (devices + g.list_partitions())[:_LIST_LIMIT]}
    if disk_count > 1 and _clash(g, tags, devices):
        return {"clash": True}
    systems = _file_systems(g)
    homes = {device: index for index, device in enumerate(devices)}
    guests = [
        {"device": device, "size": _ask(g.blockdev_getsize64, device), **_partition_table(g, device, tags)}
        for device in devices
    ]
    told_systems = [_told_file_system(g, name, kind, homes, tags) for name, kind in systems]
    roots = (_ask(g.inspect_os) or [])[:_LIST_LIMIT]
    places = {each["device"]: each for each in told_systems}
    taken = [places[root]["disks"] for root in roots if root in places]
    known = []
    for root in roots:
        mount_points = _own_mount_points(root, _mount_points(g, root), places, taken)
        known.append(_told_system(g, root, mount_points, applications, homes))
    _insist_on_life(g)
    return {"disks": guests, "file_systems": told_systems, "systems": known}


def _insist_on_life(g: Any) -> None:
    """Raises _Failure if the appliance is gone: after that every question is refused, as if nothing were there."""
    try:
        g.ping_daemon()
    except RuntimeError as error:
        raise _Failure(f"libguestfs' virtual machine died of what is on the disks: {_first_line(error)}") from error


def _partition_table(g: Any, device: str, tags: Mapping[str, Told]) -> Told:
    kind = _ask(g.part_get_parttype, device)
    partitions = [
        {
            "device": device + str(part["part_num"]),
            "number": part["part_num"],
            "start": part["part_start"],
            "length": part["part_size"],
            "type": _partition_type(g, kind, device, part["part_num"], tags),
        }
        for part in (_ask(g.part_list, device) or [])[:_PARTITION_LIMIT]
    ]
    return {"partition_table": kind, "partitions": partitions}


def _partition_type(g: Any, table: str | None, device: str, number: int, tags: Mapping[str, Told]) -> str | None:
    """GPT's GUID, or the number in a DOS table as 0x83."""
    if table == "gpt":
        guid = tags.get(f"{device}{number}", {}).get("PART_ENTRY_TYPE") or _ask(g.part_get_gpt_type, device, number)
        return guid.upper() if guid else None
    code = _ask(g.part_get_mbr_id, device, number)
    return None if code is None else f"0x{code:02x}"


def _file_systems(g: Any) -> list[tuple[str, str]]:
    """(mountable, type) of every file system that libguestfs sees, in its order."""
    found = _ask(g.list_filesystems)
    if found is None:  # a subvolume with a name that is not text, say
        devices = (_ask(g.list_partitions) or []) + (_ask(g.list_devices) or [])
        found = {device: _ask(g.vfs_type, device) or "unknown" for device in devices}
    return list(found.items())[:_LIST_LIMIT]


def _told_file_system(g: Any, name: str, kind: str, homes: Mapping[str, int], tags: Mapping[str, Told]) -> Told:
    device = _ask(g.mountable_device, name) or name
    known = tags.get(device)
    told = {
        "device": _clipped(name),
        "disks": _disks_of(g, device, homes),
        "type": _clipped(kind),
        "label": None if known and "LABEL" not in known else _ask(g.vfs_label, name) or None,
        "uuid": known.get("UUID") if known else _ask(g.vfs_uuid, name) or None,
        "size": _ask(g.blockdev_getsize64, device),
        "free": None,
    }
    if kind not in _NOT_MOUNTED and _can_mount(g, name):
        space = _ask(g.statvfs, "/")
        if space is not None:
            told["free"] = space["bavail"] * space["frsize"]
        _ask(g.umount_all)
    return told


def _can_mount(g: Any, name: str, path: str = "/") -> bool:
    """Mounts a file system read-only; False if it cannot be."""
    try:
        g.mount_ro(name, path)
    except (RuntimeError, UnicodeError):
        return False
    return True


def _disks_of(g: Any, device: str, homes: Mapping[str, int]) -> list[int]:
    """The indexes of the disks that a device lies on."""
    whole = device if device in homes else _ask(g.part_to_dev, device)
    if whole in homes:
        return [homes[whole]]
    below = []
    if _ask(g.is_lv, device):
        group = device.split("/")[2]
        members = _ask(g.vgpvuuids, group) or []
        below = [pv for pv in _ask(g.pvs) or [] if (_ask(g.pvuuid, pv) or "").replace("-", "") in _plain(members)]
    elif device.startswith("/dev/md"):
        below = [member["mdstat_device"] for member in _ask(g.md_stat, device) or []]
    found = set()
    for member in below[:_LIST_LIMIT]:
        member_disk = member if member in homes else _ask(g.part_to_dev, member)
        if member_disk in homes:
            found.add(homes[member_disk])
    return sorted(found)


def _plain(uuids: Iterable[str]) -> set[str]:
    return {uuid.replace("-", "") for uuid in uuids}


def _clash(g: Any, tags: Mapping[str, Told], devices: Sequence[str]) -> bool:
    """True if two disks hold parts that the kernel would take for one, as copies of a disk with LVM, RAID or btrfs."""
    seen: dict[str, str | None] = {}
    for partition, known in tags.items():
        if known.get("TYPE") not in _SPANNING:
            continue
        own = known.get("UUID_SUB") or known.get("UUID") or ""
        disk = partition if partition in devices else _ask(g.part_to_dev, partition)
        if seen.setdefault(own, disk) != disk:
            return True
    return False


def _told_system(
    g: Any, root: str, mount_points: Mapping[str, str], applications: bool, homes: Mapping[str, int]
) -> Told:
    told = {
        "device": _clipped(root),
        "disks": _disks_of(g, _ask(g.mountable_device, root) or root, homes),
        "mount_points": mount_points,
    }
    for key, call in (
        ("type", g.inspect_get_type),
        ("distribution", g.inspect_get_distro),
        ("major", g.inspect_get_major_version),
        ("minor", g.inspect_get_minor_version),
        ("product_name", g.inspect_get_product_name),
        ("host_name", g.inspect_get_hostname),
        ("architecture", g.inspect_get_arch),
        ("package_format", g.inspect_get_package_format),
        ("package_management", g.inspect_get_package_management),
    ):
        value = _ask(call, root)
        told[key] = None if value in ("", "unknown") else value
    if applications:
        told["applications"] = _installed(g, root, mount_points)
    return told


def _mount_points(g: Any, root: str) -> dict[str, str]:
    """What the guest mounts where; of one whose fstab is not text the root alone."""
    return _ask(g.inspect_get_mountpoints, root) or {"/": root}


def _own_mount_points(
    root: str, mount_points: Mapping[str, str], places: Mapping[str, Told], taken: Sequence[list[int]]
) -> dict[str, str]:
    """Where the guest mounts what. A label, a UUID or a name as /dev/sda2 in its fstab can lead to a disk of another
    guest in this launch; those with a system on them are `taken`.
    """
    home = places.get(root, {}).get("disks")
    told = {}
    for path, device in list(mount_points.items())[:_LIST_LIMIT]:
        told[_clipped(path)] = _clipped(root if path == "/" else _on_disks(home, device, places, taken))
    return told


def _on_disks(home: list[int] | None, device: str, places: Mapping[str, Told], taken: Sequence[list[int]]) -> str:
    """The device, or what these disks have in its place."""
    meant = places.get(device)
    if meant is None or not home or meant["disks"] == home:
        return device
    own = {name: each for name, each in places.items() if each["disks"] == home}
    for key in ("uuid", "label"):
        for name, each in own.items():
            if meant[key] and each[key] == meant[key]:
                return name
    if meant["disks"] in taken:
        return next((name for name in own if _number(name) == _number(device)), device)
    return device


def _number(device: str) -> str:
    """As "2" of /dev/sda2."""
    return device[len(device.rstrip("0123456789")) :]


def _installed(g: Any, root: str, mount_points: Mapping[str, str]) -> list[Told] | None:
    """The packages, with the guest mounted; None if they cannot be listed."""
    if not _mount(g, mount_points):
        return None
    found = _ask(g.inspect_list_applications2, root)
    _ask(g.umount_all)
    if found is None:
        return None
    return [
        {
            "name": each["app2_name"][:_NAME_LIMIT],
            "version": each["app2_version"][:_NAME_LIMIT],
            "release": each["app2_release"][:_NAME_LIMIT] or None,
            "architecture": each["app2_arch"][:_NAME_LIMIT] or None,
        }
        for each in found[:_APPLICATION_LIMIT]
    ]


def _mount(g: Any, mount_points: Mapping[str, str]) -> bool:
    """Mounts a guest read-only, as far as it lets itself; True if its root is there."""
    for path in sorted(mount_points, key=len):
        if not _can_mount(g, mount_points[path], path) and path == "/":
            return False
    return "/" in mount_points


# ---- reading a file


def _read_file(g: Any, path: str, device: str | None, limit: int) -> bytes:
    if device is not None:
        try:
            g.mount_ro(device, "/")
        except RuntimeError as error:
            raise _Failure(f"{device} cannot be mounted: {_first_line(error)}") from error
    else:
        _mount_only_system(g)
    if not g.exists(path):
        raise _Failure(f"there is no {path} in the guest")
    if g.is_dir(path, followsymlinks=True):
        raise _Failure(f"{path} is a directory in the guest")
    if not g.is_file(path, followsymlinks=True):
        raise _Failure(f"{path} is no regular file in the guest")
    size = g.filesize(path)
    if size > limit:
        raise _Failure(f"{path} has {size} bytes, more than the limit of {limit}")
    return _read_whole(g, path, size)


def _mount_only_system(g: Any) -> None:
    roots = _ask(g.inspect_os) or []
    if not roots:
        raise _Failure("no operating system is found in the guest; name the file system that holds the file (device)")
    if len(roots) > 1:
        raise _Failure(
            f"there are several operating systems, on {', '.join(roots[:20])}; name the one to read from (device)"
        )
    if not _mount(g, _own_mount_points(roots[0], _mount_points(g, roots[0]), {}, ())):
        raise _Failure(f"the root file system {roots[0]} of the guest cannot be mounted")


def _read_whole(g: Any, path: str, size: int) -> bytes:
    """In pieces that fit into a message of libguestfs."""
    pieces, done = [], 0
    while done < size:
        piece = g.pread(path, min(size - done, 2 << 20), done)
        if not piece:
            raise _Failure(f"{path} became shorter while it was read")
        pieces.append(piece)
        done += len(piece)
    return b"".join(pieces)


if __name__ == "__main__":
    main()
