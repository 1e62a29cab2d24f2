"""Drives, the child process and what becomes of its answers. That libguestfs takes them, tests/interop tells."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.adapters.backup.hookspecs import hookimpl
from qcow2_plugin.adapters.backup.manager import Hooks
from qcow2_plugin.adapters.guestfs import Drive, Guest, GuestError, NoGuestfsError, appliance, inspect, read_guest_file
from qcow2_plugin.adapters.guestfs.drive import guestfs_drive
from qcow2_plugin.adapters.nbdkit_process import private_directory
from qcow2_plugin.errors import OptionError

FILE = Drive("disk.qcow2", "raw", "/data/my disk,1.raw")
SOCKET = Drive("disk.qcow2", "nbd", "/run/a b%/socket")
WRITABLE = Drive("disk.qcow2", "nbd", "/run/socket", writable=True)
TIMEOUT = 30.0
STAND_IN = '''
"""The guestfs module as far as the child uses it. What a guest says is in GUEST."""
import json
GUEST = json.loads(r"""%s""")

class GuestFS:
    def __init__(self, python_return_dict):
        self.settings = {}
    def set_backend(self, name):
        self.settings["backend"] = name
    def set_backend_setting(self, name, value):
        self.settings[name] = value
    def add_drive_opts(self, path, **options):
        assert (options["format"], options["readonly"]) == ("raw", True), options
    def launch(self):
        if GUEST.get("broken") or GUEST.get("needs_tcg") and "force_tcg" not in self.settings:
            raise RuntimeError("launch failed\\nDo: export LIBGUESTFS_DEBUG=1")
    def __getattr__(self, name):
        def call(*arguments, **options):
            if name not in GUEST:
                raise RuntimeError(f"{name}: no")
            told = GUEST[name]
            if isinstance(told, dict) and "by" in told:
                told = told["by"].get(arguments[0])
            if told == "refused":
                raise RuntimeError(f"{name}: no")
            if told == "not text":
                raise UnicodeDecodeError("utf-8", b"\\xff", 0, 1, "invalid")
            return bytes(told, "latin-1")[arguments[2]:][:arguments[1]] if name == "pread" else told
        return call
'''
GUEST: dict[str, Any] = {
    "ping_daemon": None,
    "list_devices": ["/dev/sda"],
    "list_partitions": ["/dev/sda1"],
    "list_filesystems": {"/dev/sda1": "ext4"},
    "blockdev_getsize64": 4096,
    "part_to_dev": "/dev/sda",
    "part_list": [{"part_num": 1, "part_start": 512, "part_end": 1023, "part_size": 512}],
    "part_get_parttype": "msdos",
    "part_get_mbr_id": 131,
    "vfs_label": "root",
    "vfs_uuid": "1-2",
    "mount_ro": None,
    "umount_all": None,
    "statvfs": {"bavail": 3, "frsize": 1024},
    "inspect_os": ["/dev/sda1"],
    "inspect_get_mountpoints": {"/": "/dev/sda1"},
    "inspect_get_type": "linux",
    "inspect_get_major_version": 12,
    "inspect_get_hostname": "name",
}

READABLE = {"exists": True, "is_dir": False, "is_file": True, "filesize": 5, "pread": "bytes"}

Fake = Callable[[str], Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Makes a shell script the Python of the child."""

    def make(script: str) -> Path:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(appliance, "_PYTHONS", (str(path),))
        monkeypatch.setattr(appliance, "_known", type(appliance._known)())
        return path

    return make


Guests = Callable[..., None]


@pytest.fixture
def guest(tmp_path: Path, fake: Fake) -> Guests:
    """Makes the child run with the stand-in of libguestfs, and with a guest that says `GUEST` and what is given."""

    def make(**told: Any) -> None:
        (tmp_path / "guestfs.py").write_text(STAND_IN % json.dumps({**GUEST, **told}))
        run = "runpy.run_path(sys.argv[2], run_name='__main__')"
        start = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); {run}"
        fake(f'exec "{sys.executable}" -c "{start}" "$@"')

    return make


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


# ---- drives


class Handle:
    """Takes down what a drive asks of libguestfs."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def add_drive_opts(self, *arguments: Any, **options: Any) -> None:
        self.calls.append((arguments, options))


@pytest.mark.parametrize(
    ("drive", "expected"),
    [
        (FILE, (("/data/my disk,1.raw",), {"format": "raw", "readonly": True})),
        (SOCKET, (("",), {"format": "raw", "readonly": True, "protocol": "nbd", "server": ["unix:/run/a b%/socket"]})),
        (WRITABLE, (("",), {"format": "raw", "readonly": False, "protocol": "nbd", "server": ["unix:/run/socket"]})),
    ],
)
def test_it_is_added_to_a_handle(drive: Drive, expected: Any) -> None:
    handle = Handle()
    drive.add_to(handle)
    assert handle.calls == [expected]


def test_the_words_for_commands() -> None:
    assert FILE.arguments() == ["--format=raw", "-a", "/data/my disk,1.raw"]
    assert SOCKET.guestfish_arguments() == ["--ro", "--format=raw", "-a", "nbd://?socket=/run/a%20b%25/socket"]
    assert WRITABLE.guestfish_arguments() == ["--rw", "--format=raw", "-a", "nbd://?socket=/run/socket"]


@pytest.mark.parametrize("option", [{"snapshot": "1"}, {"allow_damaged": True}, {"force_share": True}])
def test_what_is_for_reading_is_not_writable(option: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="for reading only"), guestfs_drive("x.qcow2", writable=True, **option):
        pass


# ---- the child process


def test_the_request_and_the_answer(tmp_path: Path, fake: Fake) -> None:
    fake(f"cat > {tmp_path}/request; printf '{{\"what\": 1}}\\npay\\nload'; echo noise >&2")
    answer = appliance.ask("read", [FILE, WRITABLE], payload_limit=100, path="/etc")
    assert answer == ({"what": 1}, b"pay\nload")
    assert json.loads((tmp_path / "request").read_bytes()) == {
        "verb": "read",
        "drives": [
            {"kind": "raw", "path": FILE.path},
            {"kind": "nbd", "path": WRITABLE.path},
        ],
        "asked_by": os.getpid(),
        "without_kvm": False,
        "path": "/etc",
        "payload_limit": 100,
    }


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo broken; cat >/dev/null", "an answer that is none"),
        ("echo []", "an answer that is none"),
        ("printf '%0100000d' 0 | tr 0 '['", "an answer that is none"),
        ("printf 'a\\nb\\033[31mred\\nlast\\n' >&2; exit 3", r"without an answer; a; b\\x1b\[31mred; last"),
        ("cat >/dev/null; kill -SEGV $$", "without an answer"),
        ("""echo '{"failure": "\\u001b[2Jguest"}'""", r"^\\x1b\[2Jguest$"),
        ("yes | tr -d '\\n'", "more than"),
    ],
)
def test_answers_that_are_none(script: str, message: str, fake: Fake) -> None:
    fake(script)
    with pytest.raises(GuestError, match=message):
        appliance.ask("inspect", [FILE], timeout=TIMEOUT)


def test_a_noisy_child_costs_no_memory(fake: Fake) -> None:
    fake("cat >/dev/null; yes noise | head -c 30000000 >&2; echo '{}'")
    assert appliance.ask("inspect", [FILE], timeout=TIMEOUT).told == {}


def test_at_the_time_limit_all_that_it_started_ends(
    tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appliance, "_GRACE_SECONDS", 0.2)
    fake(f"trap '' TERM; sleep 60 & echo $! $$ > {tmp_path}/pids; wait; wait")
    begun = time.monotonic()
    with pytest.raises(GuestError, match=r"longer than 0\.5 seconds"):
        appliance.ask("inspect", [FILE], timeout=0.5)
    assert time.monotonic() - begun < 10
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_at_ctrl_c_all_that_it_started_ends(tmp_path: Path, fake: Fake) -> None:
    fake(f"sleep 60 & echo $! $$ > {tmp_path}/pids; wait")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            appliance.ask("inspect", [FILE], timeout=TIMEOUT)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_it_leaves_nothing_in_the_temporary_directory(
    tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    fake('cat >/dev/null; echo left > "$XDG_RUNTIME_DIR/overlay"; echo "{\\"at\\": \\"$LIBGUESTFS_TMPDIR\\"}"')
    told = appliance.ask("inspect", [FILE]).told
    assert told["at"]
    assert not os.path.exists(told["at"])
    assert not list(folder.iterdir())


def test_a_temporary_directory_whose_name_is_not_utf8_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libguestfs could not be told of the sockets in there."""
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with private_directory() as made:
        assert made.parent == Path("/tmp")


def test_a_missing_module_says_what_to_install(fake: Fake) -> None:
    fake("""cat >/dev/null; echo '{"no_guestfs": true}'""")
    with pytest.raises(NoGuestfsError, match=r"apt install python3-guestfs.*dnf install python3-libguestfs"):
        appliance.ask("inspect", [FILE])


def test_a_missing_python_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appliance, "_PYTHONS", ("/nowhere/python3",))
    with pytest.raises(NoGuestfsError, match="apt install python3-guestfs"):
        appliance.ask("inspect", [FILE])


@pytest.mark.parametrize(
    ("kernels", "readable", "message"),
    [((), False, "no Linux kernel"), (("k",), False, "chmod 0644"), (("k",), True, "libguestfs-test-tool")],
)
def test_a_launch_that_fails_says_what_to_do(
    kernels: tuple[str, ...], readable: bool, message: str, guest: Guests, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest(broken=True)
    monkeypatch.setattr("glob.glob", lambda _: kernels)
    really = os.access
    monkeypatch.setattr("os.access", lambda path, mode: readable if path == "k" else really(path, mode))
    with pytest.raises(NoGuestfsError, match=rf"{message}.*\(launch failed\)"):
        inspect([FILE])


def test_kvm_is_left_out_where_it_does_not_work_and_that_is_remembered(guest: Guests) -> None:
    guest()
    inspect([FILE])
    assert not appliance._known.without_kvm
    guest(needs_tcg=True)
    inspect([FILE])
    assert appliance._known.without_kvm


# ---- what it finds


def test_what_a_guest_says(guest: Guests) -> None:
    guest()
    (found,) = inspect([FILE])
    (partition,), (system,), (root,) = found.partitions, found.file_systems, found.operating_systems
    assert (found.virtual_size, found.partition_table, found.kind) == (4096, "msdos", "raw")
    assert (partition.device, partition.start, partition.length, partition.type) == ("/dev/sda1", 512, 512, "0x83")
    assert (system.type, system.label, system.uuid, system.free) == ("ext4", "root", "1-2", 3072)
    assert (root.type, root.distribution, root.major, root.host_name) == ("linux", None, 12, "name")
    assert root.applications is None


def test_names_that_are_no_text_cost_only_themselves(guest: Guests) -> None:
    guest(vfs_label="not text", inspect_get_hostname="not text", list_filesystems="not text", vfs_type="xfs")
    (found,) = inspect([FILE], applications=True)
    assert [(each.device, each.type, each.label) for each in found.file_systems] == [
        ("/dev/sda1", "xfs", None),
        ("/dev/sda", "xfs", None),
    ]
    assert found.operating_systems[0].host_name is None
    assert found.operating_systems[0].applications is None


def test_a_guest_whose_fstab_is_no_text_has_a_root_all_the_same(guest: Guests) -> None:
    guest(**READABLE, inspect_get_mountpoints="not text", inspect_list_applications2=[])
    (found,) = inspect([FILE], applications=True)
    assert found.operating_systems[0].mount_points == {"/": "/dev/sda1"}
    assert found.operating_systems[0].applications == ()
    assert read_guest_file(FILE, "/etc/motd") == b"bytes"


def test_an_answer_that_is_no_text_is_told(guest: Guests) -> None:
    guest(**READABLE, mount_ro="not text")
    with pytest.raises(GuestError, match="codec can't decode"):
        read_guest_file(FILE, "/etc/motd", device="/dev/sda1")


def test_an_appliance_that_dies_of_a_guest_does_not_look_like_an_empty_guest(guest: Guests) -> None:
    guest(ping_daemon="refused", inspect_os="refused", mount_ro="refused")
    with pytest.raises(GuestError, match="virtual machine died of what is on the disks: ping_daemon: no"):
        inspect([FILE])


def test_drives_that_can_be_written_to_are_only_read(guest: Guests) -> None:
    guest()  # which insists on it
    inspect([WRITABLE])


def test_a_child_whose_parent_was_killed_ends_before_it_launches(
    guest: Guests, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest()
    monkeypatch.setattr("os.getpid", lambda: 1)
    with pytest.raises(GuestError, match="without an answer"):
        inspect([FILE])


def test_long_names_and_long_lists_are_cut(guest: Guests) -> None:
    part = GUEST["part_list"][0]
    application = {"app2_name": "n" * 300, "app2_version": "1", "app2_release": "", "app2_arch": ""}
    guest(
        inspect_get_hostname="h" * 100000,
        part_list=[{**part, "part_num": number} for number in range(5000)],
        inspect_list_applications2=[application] * 21000,
    )
    (found,) = inspect([FILE], applications=True)
    (system,) = found.operating_systems
    assert len(found.partitions) == 128
    assert len(system.host_name or "") == 4096
    assert system.applications is not None
    assert (len(system.applications), len(system.applications[0].name)) == (20000, 256)
    assert (system.applications[0].release, system.applications[0].architecture) == (None, None)


def test_a_label_that_two_disks_have_means_the_own_disk(guest: Guests) -> None:
    guest(
        list_devices=["/dev/sda", "/dev/sdb"],
        list_partitions=["/dev/sda1", "/dev/sdb1"],
        list_filesystems={"/dev/sda1": "ext4", "/dev/sda2": "ext4", "/dev/sdb1": "ext4", "/dev/sdb2": "ext4"},
        part_to_dev={"by": {f"/dev/sd{disk}{part}": f"/dev/sd{disk}" for disk in "ab" for part in "12"}},
        vfs_label={"by": {f"/dev/sd{disk}{part}": part for disk in "ab" for part in "12"}},
        vfs_uuid={"by": {f"/dev/sd{disk}{part}": part for disk in "ab" for part in "12"}},
        inspect_os=["/dev/sda1", "/dev/sdb1"],
        inspect_get_mountpoints={"/": "/dev/sda1", "/home": "/dev/sda2", "/other": "/dev/mapper/x"},
    )
    first, second = inspect([FILE, SOCKET])
    assert first.operating_systems[0].mount_points == {
        "/": "/dev/sda1",
        "/home": "/dev/sda2",
        "/other": "/dev/mapper/x",
    }
    assert second.operating_systems[0].mount_points == {
        "/": "/dev/sdb1",
        "/home": "/dev/sdb2",
        "/other": "/dev/mapper/x",
    }


@pytest.mark.parametrize("known_by", ["label", "name"])
def test_another_guests_disk_is_not_mounted(known_by: str, guest: Guests) -> None:
    """Two guests of one installer: their labels or the names in their fstabs are the same, their UUIDs are not."""
    devices = [f"/dev/sd{disk}{part}" for disk in "ab" for part in "12"]
    label = {"by": {device: device[-1] for device in devices}} if known_by == "label" else ""
    guest(
        list_devices=["/dev/sda", "/dev/sdb"],
        list_partitions=devices,
        list_filesystems=dict.fromkeys(devices, "ext4"),
        part_to_dev={"by": {device: device[:-1] for device in devices}},
        vfs_label=label,
        vfs_uuid={"by": {device: f"uuid-{device}" for device in devices}},
        inspect_os=["/dev/sda1", "/dev/sdb1"],
        inspect_get_mountpoints={"/": "/dev/sda1", "/var": "/dev/sda2"},
    )
    first, second = inspect([FILE, SOCKET])
    assert first.operating_systems[0].mount_points == {"/": "/dev/sda1", "/var": "/dev/sda2"}
    assert second.operating_systems[0].mount_points == {"/": "/dev/sdb1", "/var": "/dev/sdb2"}


def test_a_second_disk_of_one_guest_is_its_own(guest: Guests) -> None:
    guest(
        list_devices=["/dev/sda", "/dev/sdb"],
        list_partitions=["/dev/sda1", "/dev/sdb1"],
        list_filesystems={"/dev/sda1": "ext4", "/dev/sdb1": "ext4"},
        part_to_dev={"by": {"/dev/sda1": "/dev/sda", "/dev/sdb1": "/dev/sdb"}},
        vfs_label="",
        vfs_uuid={"by": {"/dev/sda1": "a", "/dev/sdb1": "b"}},
        inspect_get_mountpoints={"/": "/dev/sda1", "/var": "/dev/sdb1"},
    )
    first, second = inspect([FILE, SOCKET])
    assert first.operating_systems[0].mount_points == {"/": "/dev/sda1", "/var": "/dev/sdb1"}
    assert second.operating_systems == ()


def test_copies_that_one_kernel_cannot_tell_apart_are_looked_at_one_by_one(guest: Guests) -> None:
    guest(
        list_devices=["/dev/sda", "/dev/sdb"],
        list_partitions=["/dev/sda1", "/dev/sdb1"],
        part_to_dev={"by": {"/dev/sda1": "/dev/sda", "/dev/sdb1": "/dev/sdb"}},
        blkid={"TYPE": "LVM2_member", "UUID": "same"},
    )
    first, second = inspect([FILE, SOCKET])
    assert (first.device, second.device) == ("/dev/sda", "/dev/sda")


def test_plugins_are_told_what_is_found(guest: Guests) -> None:
    told: list[Guest] = []

    class Inventory:
        QCOW2_PLUGIN_API = 1

        @hookimpl
        def qcow2_guest_inspected(self, guest: Guest) -> None:
            told.append(guest)

    guest()
    with Hooks.load(use_installed=False, own={"inventory": Inventory()}) as hooks:
        found = inspect([FILE], hooks=hooks)
    assert told == found
    assert told[0].operating_systems[0].host_name == "name"


def test_no_images_need_no_libguestfs(fake: Fake) -> None:
    fake("exit 1")
    assert inspect([]) == []


# ---- files


def test_a_file_is_read(guest: Guests) -> None:
    guest(**READABLE)
    assert read_guest_file(FILE, "/etc/motd") == b"bytes"
    assert read_guest_file(FILE, "/etc/motd", device="/dev/sda1") == b"bytes"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"exists": False}, "there is no /etc/motd in the guest"),
        ({"is_dir": True}, "/etc/motd is a directory in the guest"),
        ({"is_file": False}, "/etc/motd is no regular file in the guest"),
        ({"filesize": 101}, "/etc/motd has 101 bytes, more than the limit of 100"),
        ({"filesize": 50}, "became shorter"),
        ({"inspect_os": []}, "no operating system is found"),
        ({"inspect_os": ["/dev/sda1", "/dev/\x1b"]}, r"several operating systems, on /dev/sda1, /dev/\\x1b; name"),
        ({"mount_ro": "refused"}, "cannot be mounted"),
    ],
)
def test_a_file_that_cannot_be_read(told: dict[str, Any], message: str, guest: Guests) -> None:
    guest(**{**READABLE, **told})
    with pytest.raises(GuestError, match=message):
        read_guest_file(FILE, "/etc/motd", limit=100)


@pytest.mark.parametrize(("path", "device"), [("/etc/\udcff", None), ("/etc/motd", "/dev/\udcff")])
def test_names_that_the_module_cannot_take_are_refused(path: str, device: str | None) -> None:
    with pytest.raises(OptionError, match="only names in UTF-8"):
        read_guest_file(FILE, path, device=device)


@pytest.mark.parametrize("path", ["etc/motd", "", "/a\0b"])
def test_paths_begin_at_the_root(path: str) -> None:
    with pytest.raises(OptionError, match="begins with /"):
        read_guest_file(FILE, path)
