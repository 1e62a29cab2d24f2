"""`guestfs_drive` and the verbs around it, with nbdkit and without libguestfs: what is served, how, and who is told."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbd
import pytest

from qcow2_plugin import Policy, create_image, open_image
from qcow2_plugin.adapters.backup.hook_values import Decision, Location
from qcow2_plugin.adapters.backup.hookspecs import hookimpl
from qcow2_plugin.adapters.backup.manager import Hooks
from qcow2_plugin.adapters.guestfs import Drive, appliance, guestfs_drive
from qcow2_plugin.adapters.nbdkit_process import CannotServeError
from qcow2_plugin.engine.files import Reference
from qcow2_plugin.errors import ImageLockedError
from tests.support.builder import ImageBuilder
from tests.support.command import COMMAND, process_environment, qcow2, qcow2_process
from tests.support.hostile import assert_harmless_text
from tests.support.lockbytes import QEMU_READER, QEMU_WRITER, locked_bytes
from tests.support.tools import ToolError, nbd_connect, qemu_img, run

MIB = 1 << 20
NASTY = "\x1b[2Jname\r\n\u202e\ud83d"
TIMEOUT = 30  # seconds


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    then = ImageBuilder(2 * MIB).map().data(0, b"then")
    ImageBuilder(2 * MIB).data(0, b"now").snapshot(b"7", b"old", then).build(path)
    return path


def with_data_file(folder: Path, length: int = MIB, **options: Any) -> Path:
    path = folder / "raw.qcow2"
    with open(folder / "raw.data", "wb") as disk:
        disk.write(b"raw".ljust(length, b"\0"))
    create_image(path, data_file=folder / "raw.data", data_file_raw=True, keep_data_file=True, **options)
    return path


def uri(drive: Drive) -> str:
    return f"nbd+unix:///?socket={drive.path}"


# ---- drives


def test_any_image_is_served_read_only(image: Path) -> None:
    before = image.read_bytes()
    with guestfs_drive(image) as drive:
        assert (drive.kind, drive.format, drive.writable) == ("nbd", "raw", False)
        assert Path(drive.path).parent.stat().st_mode & 0o777 == 0o700
        assert locked_bytes(image) == set(QEMU_READER)
        with nbd_connect(uri(drive)) as handle:
            assert handle.is_read_only()
            assert bytes(handle.pread(3, 0)) == b"now"
    assert not Path(drive.path).parent.exists()
    assert locked_bytes(image) == set()
    assert image.read_bytes() == before


def test_a_snapshot_is_served(image: Path) -> None:
    with guestfs_drive(image, snapshot="old") as drive, nbd_connect(uri(drive)) as handle:
        assert bytes(handle.pread(4, 0)) == b"then"


def test_what_was_written_is_there_afterwards(image: Path) -> None:
    with guestfs_drive(image, writable=True) as drive:
        assert locked_bytes(image) == set(QEMU_WRITER)
        with nbd_connect(uri(drive)) as handle:
            handle.pwrite(b"new", MIB)
    with open_image(image) as opened:
        assert opened.pread(3, MIB) == b"new"
    qemu_img("check", image)


def test_a_raw_data_file_is_the_drive(tmp_path: Path) -> None:
    path = with_data_file(tmp_path)
    with guestfs_drive(path) as drive:
        assert (drive.kind, drive.path) == ("raw", str(tmp_path / "raw.data"))
        assert set(QEMU_READER) <= locked_bytes(path)
        assert set(QEMU_READER) <= locked_bytes(tmp_path / "raw.data")
        with pytest.raises(ImageLockedError):
            open_image(path, writable=True)
    assert locked_bytes(path) == locked_bytes(tmp_path / "raw.data") == set()


@pytest.mark.parametrize("how", ["longer", "written", "not raw"])
def test_a_data_file_that_is_not_the_disk_is_served(how: str, tmp_path: Path) -> None:
    path = with_data_file(tmp_path)
    if how == "longer":
        os.truncate(tmp_path / "raw.data", 2 * MIB)
    if how == "not raw":
        with contextlib.chdir(tmp_path):  # where QEMU looks for a data file
            qemu_img("amend", "-o", "data_file_raw=off", path)
    with guestfs_drive(path, writable=how == "written") as drive:
        assert drive.kind == "nbd"
        with nbd_connect(uri(drive)) as handle:
            assert handle.get_size() == MIB
            assert bytes(handle.pread(3, 0)) == b"raw"


def test_a_data_file_whose_name_the_module_cannot_take_is_served(tmp_path: Path) -> None:
    data = tmp_path / os.fsdecode(b"\xff.data")
    data.write_bytes(b"raw".ljust(MIB, b"\0"))
    create_image(tmp_path / "disk.qcow2", data_file=data, data_file_raw=True, keep_data_file=True)
    with guestfs_drive(tmp_path / "disk.qcow2") as drive:
        assert drive.kind == "nbd"
        with nbd_connect(uri(drive)) as handle:
            assert bytes(handle.pread(3, 0)) == b"raw"


@pytest.mark.parametrize("how", ["drive", "serve"])
def test_a_name_that_nbdkit_cannot_take_is_told(how: str, image: Path, tmp_path: Path) -> None:
    hidden = image.rename(tmp_path / os.fsdecode(b"disk\xff.qcow2"))
    if how == "drive":
        with pytest.raises(CannotServeError, match=r"UTF-8.*disk\\xff\.qcow2"), guestfs_drive(hidden):
            pass
    else:
        ended = qcow2("serve", "--run", "true", hidden)
        assert ended.status == 1
        assert "only names in UTF-8" in ended.stderr


def test_qemu_cannot_write_to_a_data_file_that_is_the_drive(tmp_path: Path) -> None:
    """As a command that writes would have it do."""
    with guestfs_drive(with_data_file(tmp_path)) as drive, pytest.raises(ToolError, match="write"):
        run("qemu-io", "-f", "raw", "-c", "write 0 512", drive.path)


def test_options_reach_the_plugin(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"base" * 512)
    overlay = tmp_path / "overlay.qcow2"
    ImageBuilder(MIB).backing(bytes(tmp_path / "base.raw"), None).build(overlay)
    with (
        guestfs_drive(overlay, policy=Policy.TRUSTED, backing_format="raw") as drive,
        nbd_connect(uri(drive)) as handle,
    ):
        assert bytes(handle.pread(4, 0)) == b"base"


def test_what_plugins_locate_is_served(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    qemu_img("create", "-f", "raw", tmp_path / "far" / "base.raw", "1M")
    with open(tmp_path / "far" / "base.raw", "r+b") as base:
        base.write(b"below")
    (tmp_path / "base.raw").symlink_to("far/base.raw")
    create_image(tmp_path / "data.qcow2", MIB, data_file=tmp_path / "data")
    os.rename(tmp_path / "data", tmp_path / "far" / "data")
    top = tmp_path / "top.qcow2"
    create_image(top, MIB, backing_file="base.raw", backing_format="raw", policy=Policy.TRUSTED)

    class Far:
        QCOW2_PLUGIN_API = 1

        @hookimpl
        def qcow2_locate_reference(self, reference: Reference) -> str:
            return str(tmp_path / "far" / reference.name.decode())

        @hookimpl
        def qcow2_authorize_reference(self, location: Location) -> Decision:
            return Decision(location.plugin == "far")

    references = Hooks.load(use_installed=False, own={"far": Far()}).references()
    for image, start in ((top, b"below"), (tmp_path / "data.qcow2", bytes(5))):
        with pytest.raises(CannotServeError), guestfs_drive(image):
            pass
        with guestfs_drive(image, references=references) as drive, nbd_connect(uri(drive)) as handle:
            assert bytes(handle.pread(5, 0)) == start


def test_an_image_that_cannot_be_served_is_told_by_nbdkits_words(tmp_path: Path) -> None:
    (tmp_path / "none\x1b.qcow2").write_bytes(b"")
    with (
        pytest.raises(CannotServeError, match=r"not a qcow2 image.*none\\+x1b\.qcow2") as failed,
        guestfs_drive(tmp_path / "none\x1b.qcow2", snapshot="1"),
    ):
        pass
    assert_harmless_text(str(failed.value))


def test_what_could_not_be_stored_is_an_error(image: Path) -> None:
    with (
        pytest.raises(CannotServeError, match="may be lost"),
        guestfs_drive(image, writable=True) as drive,
        nbd_connect(uri(drive)) as handle,
    ):
        handle.pwrite(b"new" * 1000, MIB)
        os.truncate(image, 512)


def test_an_error_in_the_block_comes_first(image: Path) -> None:
    with pytest.raises(ZeroDivisionError), guestfs_drive(image, writable=True) as drive:
        with nbd_connect(uri(drive)) as handle:
            handle.pwrite(b"new" * 1000, MIB)
            os.truncate(image, 512)
        raise ZeroDivisionError


# ---- qcow2 guestfs


def test_it_prints_commands_that_work(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("LIBGUESTFS_BACKEND", raising=False)
    hidden = image.rename(tmp_path / "my disk.qcow2")
    ended = qcow2("guestfs", "--snapshot=old", hidden)
    assert (ended.status, ended.stderr) == (0, "")
    lines = [shlex.split(line) for line in ended.stdout.splitlines() if not line.startswith("#")]
    (serve, *settings, guestfish, filesystems, inspector) = lines
    assert ["export", "LIBGUESTFS_BACKEND=direct"] in settings
    assert serve == ["qcow2", "serve", "--snapshot=old", serve[3], str(hidden)]
    socket = serve[3].removeprefix("--socket=")
    assert socket.startswith(f"{tmp_path}/")
    given = ["--format=raw", "-a", f"nbd://?socket={socket}"]
    assert guestfish == ["guestfish", "--ro", *given, "-i"]
    assert filesystems == ["virt-filesystems", *given, "--all", "--long", "-h"]
    assert inspector == ["virt-inspector", *given]
    with subprocess.Popen([*COMMAND, *serve[1:]], stdout=subprocess.PIPE, env=process_environment()) as server:
        assert server.stdout is not None
        server.stdout.readline()
        with nbd_connect(f"nbd+unix:///?socket={socket}") as handle:
            assert bytes(handle.pread(4, 0)) == b"then"
        server.terminate()


def test_it_prints_the_data_file_where_it_is_the_disk(tmp_path: Path) -> None:
    path = with_data_file(tmp_path)
    ended = qcow2("guestfs", path, "--", "virt-df", "-h")
    assert f"virt-df --format=raw -a {tmp_path}/raw.data -h\n" in ended.stdout
    assert "qcow2 serve" not in ended.stdout
    ended = qcow2("guestfs", "--rw", path, "--", "guestfish", "-a", "other")
    assert "qcow2 serve --writable --socket=" in ended.stdout
    assert "guestfish --rw --format=raw -a 'nbd://?socket=" in ended.stdout


@pytest.mark.parametrize("name", [b"a b'c,:%", b"-x", b"\x1b[2J\n\\'", "\u202e\u00fc".encode()])
def test_what_it_prints_is_safe_and_can_be_typed(name: bytes, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir()
    script = tmp_path / "words"
    script.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    script.chmod(0o755)
    ended = qcow2("guestfs", with_data_file(folder), "--", script)
    assert ended.status == 0, ended.stderr
    for line in ended.stdout.split("\n"):
        assert_harmless_text(line)
    typed = "\n".join(line for line in ended.stdout.splitlines() if not line.startswith("#"))
    said = run("bash", "-c", typed)
    assert os.fsencode(said).split(b"\0")[2] == bytes(folder / "raw.data")


@pytest.mark.parametrize("run", [(), ("--run",)])
def test_a_command_that_writes_takes_rw(run: tuple[str, ...], tmp_path: Path) -> None:
    ended = qcow2("guestfs", *run, with_data_file(tmp_path), "--", "/usr/bin/virt-customize", "--hostname=x")
    assert ended.status == 2
    assert "virt-customize writes to the disks" in ended.stderr


@pytest.mark.parametrize("option", ["--snapshot=7", "--allow-damaged", "-U"])
def test_reading_options_do_not_go_with_writing(option: str, image: Path) -> None:
    assert qcow2("guestfs", "--rw", option, image).status == 2


@pytest.mark.parametrize("verb", ["guestfs", "inspect"])
def test_a_file_below_is_for_one_image(verb: str, image: Path) -> None:
    ended = qcow2(verb, "--backing-file=x", image, image)
    assert ended.status == 2
    assert "--backing-file is for one image" in ended.stderr


def test_the_command_runs_with_the_images_served(image: Path, tmp_path: Path) -> None:
    script = tmp_path / "guestfish"
    script.write_text(
        f"#!{sys.executable}\n"
        "import sys, nbd\n"
        "print(sys.argv[1:3], sys.argv[5:])\n"
        "for uri in sys.argv[4:5]:\n"
        "    handle = nbd.NBD()\n"
        "    handle.connect_uri(uri.replace('nbd://', 'nbd+unix:///'))\n"
        "    print(bytes(handle.pread(4, 0)), handle.is_read_only())\n"
        "sys.exit(7)\n"
    )
    script.chmod(0o755)
    ended = qcow2_process("guestfs", "--run", "--snapshot=old", image, "--", script, "--", "-h", "a b")
    assert ended.status == 7, ended.stderr
    assert ended.stdout == "['--ro', '--format=raw'] ['--', '-h', 'a b']\nb'then' True\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_command_and_the_server(number: signal.Signals, image: Path, tmp_path: Path) -> None:
    script = tmp_path / "command"
    script.write_text("#!/bin/sh\necho $$ $2\nexec sleep 60\n")
    script.chmod(0o755)
    with subprocess.Popen(
        [*COMMAND, "guestfs", "--run", str(image), "--", str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env=process_environment(),
    ) as process:
        assert process.stdout is not None
        pid, _ = process.stdout.readline().split(maxsplit=1)
        assert locked_bytes(image) == set(QEMU_READER)
        process.send_signal(number)
        assert process.wait(TIMEOUT) == 128 + signal.SIGTERM
    assert not Path("/proc", pid).exists()
    assert locked_bytes(image) == set()


def test_a_missing_command_says_what_to_install(image: Path, tmp_path: Path) -> None:
    ended = qcow2_process("guestfs", "--run", image, environment={"PATH": str(tmp_path)})
    assert ended.status == 1
    assert "guestfish is not installed" in ended.stderr
    assert "apt install guestfish" in ended.stderr


# ---- qcow2 inspect, qcow2 cat


def answer(told: Any, payload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a stand-in for the child say this, whatever it is asked."""
    (tmp_path / "answer").write_bytes(json.dumps(told).encode() + b"\n" + payload.encode())
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncat > {tmp_path}/request\ncat {tmp_path}/answer\n")
    python.chmod(0o755)
    monkeypatch.setattr(appliance, "_PYTHONS", (str(python),))


def nasty_guest() -> dict[str, Any]:
    system: dict[str, Any] = dict.fromkeys(
        ("type", "distribution", "product_name", "host_name", "architecture", "package_format", "package_management"),
        NASTY,
    )
    application = dict.fromkeys(("name", "version", "release", "architecture"), NASTY)
    system |= {"device": NASTY, "disks": [0], "major": 1, "minor": 2, "mount_points": {NASTY: NASTY}}
    return {
        "disks": [
            {
                "device": "/dev/sda",
                "size": 2 * MIB,
                "partition_table": NASTY,
                "partitions": [{"device": NASTY, "number": 1, "start": 0, "length": 512, "type": NASTY * 500}],
            }
        ],
        "file_systems": [
            {"device": NASTY, "disks": [0], "type": NASTY, "label": NASTY, "uuid": NASTY, "size": None, "free": 1}
        ],
        "systems": [{**system, "applications": [application]}],
    }


def test_hostile_names_reach_no_terminal_and_programs_as_they_are(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(nasty_guest(), "", tmp_path, monkeypatch)
    ended = qcow2("inspect", "--applications", image)
    assert ended.status == 0, ended.stderr
    for line in ended.stdout.split("\n"):
        assert_harmless_text(line)
    assert max(len(line) for line in ended.stdout.splitlines()) < 1000
    told = json.loads(qcow2("inspect", "--output=json", image).stdout)
    assert told[0]["operating_systems"][0]["host_name"] == NASTY
    assert told[0]["file_systems"][0] == {
        **{"device": NASTY, "type": NASTY, "label": NASTY, "uuid": NASTY, "size": None, "free": 1}
    }
    assert json.loads((tmp_path / "request").read_bytes())["applications"] is False


def test_what_a_guest_says_at_length_is_cut_for_people(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = nasty_guest()
    told["systems"][0] |= {"host_name": "h" * 4096, "mount_points": {f"/{number}": "d" * 4096 for number in range(900)}}
    answer(told, "", tmp_path, monkeypatch)
    lines = qcow2("inspect", image).stdout.splitlines()
    assert max(len(line) for line in lines) < 6000
    assert any(line.endswith("... and 880 more") for line in lines)
    assert any(line.endswith("h...") for line in lines)


def test_an_answer_of_another_form_is_refused(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer({"disks": [{}]}, "", tmp_path, monkeypatch)
    ended = qcow2("inspect", image)
    assert (ended.status, ended.stdout) == (1, "")
    assert "an answer that is none" in ended.stderr


def test_a_file_goes_to_stdout(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer({}, "\x1b\nbytes", tmp_path, monkeypatch)
    ended = qcow2("cat", "--device=/dev/sda2", "--limit=1k", "--timeout=20", image, "/etc/motd")
    assert (ended.status, ended.stdout) == (0, "\x1b\nbytes")
    request = json.loads((tmp_path / "request").read_bytes())
    assert (request["path"], request["device"], request["payload_limit"]) == ("/etc/motd", "/dev/sda2", 1024)
    answer({"failure": f"{NASTY} is a directory"}, "", tmp_path, monkeypatch)
    ended = qcow2("cat", image, "/etc")
    assert (ended.status, ended.stdout) == (1, "")
    assert_harmless_text(ended.stderr.removesuffix("\n"))
    assert qcow2("cat", image, "etc/motd").status == 2


def test_a_signal_ends_an_inspection(image: Path, tmp_path: Path) -> None:
    """With a child that never answers; it ends with the command, and so does nbdkit."""
    program = (
        "import sys\n"
        "from qcow2_plugin.adapters.guestfs import appliance\n"
        "from qcow2_plugin.adapters.cli import main\n"
        f"appliance._PYTHONS = ({str(tmp_path / 'python')!r},)\n"
        f"sys.exit(main(['inspect', {str(image)!r}]))\n"
    )
    (tmp_path / "python").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    (tmp_path / "python").chmod(0o755)
    with subprocess.Popen([sys.executable, "-c", program], env=process_environment()) as process:
        deadline = time.monotonic() + TIMEOUT
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        assert process.wait(TIMEOUT) == 128 + signal.SIGTERM
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()
    assert locked_bytes(image) == set()


def test_clients_cannot_write_to_a_drive_that_is_read(image: Path) -> None:
    with guestfs_drive(image) as drive, nbd_connect(uri(drive)) as handle:
        handle.set_strict_mode(0)
        with pytest.raises(nbd.Error):
            handle.pwrite(b"new", 0)
