"""Names that an image may hold, and what a policy makes of them.

Every refusal must leave the open descriptors as they were, and nothing outside the image's directory may ever be
opened: the kernel itself is asked about that (inotify), so that no way of opening can be overlooked.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from qcow2_plugin.errors import (
    ImageLockedError,
    MissingReferenceError,
    NotQcow2Error,
    ReferenceDeniedError,
)
from qcow2_plugin.storage import opener
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.opener import Policy, open_given, open_reference
from tests.support.lockbytes import QEMU_WRITER, holding, locked_bytes
from tests.support.loop import loop_device
from tests.support.swapping import Swapping
from tests.support.watching import Opens, audited_opens, no_descriptor_left, open_descriptors

ROLES = ["backing file", "data file"]
NO_SUCH_SYSCALL = 100_000

WITH_PREFIX = [
    b'json:{"driver":"file","filename":"base"}',
    b'json:{"file.filename":"/etc/passwd"}',
    b"nbd:localhost:10809",
    b"nbd:unix:socket",
    b"nbd+unix:///?socket=socket",
    b"nbd://localhost",
    b"http://localhost/base",
    b"https://localhost/base",
    b"ssh://localhost/base",
    b"fd:3",
    b"file:base",
    b"file:///etc/passwd",
    b"host_device:base",
    b"blkdebug::base",
    b"blkdebug:rules:base",
    b"C:base",
    b":base",
    b"base:",
    b":",
]
NO_NAME = [b"", b"\0", b"base\0", b"base\0.qcow2", b"\0base"]
ABSOLUTE = [b"/etc/passwd", b"/dev/fdset/1", b"/", b"//", b"//base", b"/proc/self/fd/0"]
NOT_PLAIN = [b"../x", b"..", b".", b"./base", b"sub/../base", b"a/../../x", b"sub/./base", b"sub/..", b"base/."]
NOT_PLAIN += [b"sub//base", b"sub/", b"base/", b"../outside/secret", b"sub/../../outside/secret"]
TOO_LONG = [b"n" * 1024, b"sub/" * 300 + b"base", b"n" * 100_000]


@dataclass(frozen=True)
class Site:
    """A directory with an image in it, and a secret next to that directory."""

    images: Path
    secret: Path

    def open(
        self,
        name: bytes,
        *,
        policy: Policy = Policy.CONFINED,
        role: str = "backing file",
        directory: str | None = None,
        below: bytes = b"",
    ) -> FileStorage:
        start = str(self.images) if directory is None else directory
        return open_reference(name, role, policy=policy, directory=start, below=below, referrer="overlay.qcow2")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(tmp_path / "images", tmp_path / "outside" / "secret")
    (made.images / "sub").mkdir(parents=True)
    made.secret.parent.mkdir()
    made.secret.write_bytes(b"secret")
    for name in ("base", "sub/base", "overlay.qcow2"):
        (made.images / name).write_bytes(b"inside")
    return made


@pytest.fixture(params=["openat2", "walk", "walk in a sandbox"])
def look_up(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a confined name is looked up: as this kernel can, and as where there is no openat2."""
    if request.param == "walk":
        monkeypatch.setattr(opener, "_SYS_OPENAT2", NO_SUCH_SYSCALL)
    if request.param == "walk in a sandbox":
        monkeypatch.setattr(opener, "_syscall", failing_syscall(errno.EPERM))
    return str(request.param)


def failing_syscall(number: int, *, times: int | None = None) -> Callable[..., int]:
    """syscall(2) that fails with `number`, always or so many times before it works."""
    real = opener._syscall
    calls = 0

    def syscall(*arguments: object) -> int:
        nonlocal calls
        calls += 1
        if times is not None and calls > times:
            return int(real(*arguments))
        ctypes.set_errno(number)
        return -1

    return syscall


@contextmanager
def untouched(secret: Path) -> Iterator[None]:
    """Fails if the block opens `secret`, leaves another set of descriptors, works for 100 ms or waits for anything."""
    with no_descriptor_left(), Opens(secret) as opens:
        start, work_start = time.monotonic(), time.thread_time()
        yield
        assert time.thread_time() - work_start < 0.1
        assert time.monotonic() - start < 5  # on a machine however busy
        assert not opens.seen()


def read_all(storage: FileStorage) -> bytes:
    content = storage.pread(100, 0)
    storage.close()
    return content


def test_the_witness_sees_an_open(site: Site) -> None:
    with Opens(site.secret) as opens:
        assert not opens.seen()
        site.secret.read_bytes()
        assert opens.seen()
        assert not opens.seen()


def test_this_kernel_has_openat2(site: Site) -> None:
    """Otherwise the tests named openat2 here would be tests of the walk."""
    start = os.open(site.images, os.O_PATH)
    os.close(opener._openat2(start, b"sub/base"))
    os.close(start)


# Names that are refused without looking.


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", WITH_PREFIX + NO_NAME + ABSOLUTE + NOT_PLAIN + TOO_LONG)
def test_confined_refuses_by_the_name_alone(site: Site, name: bytes, role: str) -> None:
    make_literally(site, name)
    with untouched(site.secret), audited_opens() as names, pytest.raises(ReferenceDeniedError) as caught:
        site.open(name, role=role)
    assert names == []
    assert str(caught.value).startswith(f'{role} "')
    assert f"option {role.replace(' ', '-')}" in str(caught.value)
    assert caught.value.file == "overlay.qcow2"
    assert caught.value.errno == errno.EPERM


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", WITH_PREFIX + NO_NAME)
def test_trusted_knows_no_drivers_either(site: Site, name: bytes, role: str) -> None:
    make_literally(site, name)
    with untouched(site.secret), audited_opens() as names, pytest.raises(ReferenceDeniedError) as caught:
        site.open(name, role=role, policy=Policy.TRUSTED)
    assert names == []
    assert "trusted" not in str(caught.value)  # it would not help
    assert f"option {role.replace(' ', '-')}" in str(caught.value)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", [b"base", b"sub/base", b"missing", *WITH_PREFIX, *NO_NAME, *ABSOLUTE, *NOT_PLAIN])
def test_inspect_opens_nothing_at_all(site: Site, name: bytes, role: str) -> None:
    with untouched(site.secret), Opens(site.images / "base") as base, audited_opens() as names:
        with pytest.raises(ReferenceDeniedError, match="policy inspect"):
            site.open(name, role=role, policy=Policy.INSPECT)
        assert not base.seen()
    assert names == []


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        (b"", "empty"),
        (b"a\0", "NUL"),
        (b"nbd:x", "prefix"),
        (b"/x", "absolute"),
        (b"../x", 'an empty, "." or ".." component'),
        (b"n" * 1024, "1023 bytes"),
    ],
)
def test_a_refusal_says_which_rule(site: Site, name: bytes, rule: str) -> None:
    with pytest.raises(ReferenceDeniedError) as caught:
        site.open(name)
    assert rule in str(caught.value)


def test_a_refusal_names_trusted_where_it_helps(site: Site) -> None:
    with pytest.raises(ReferenceDeniedError, match="policy trusted"):
        site.open(b"/etc/passwd")
    with pytest.raises(ReferenceDeniedError) as caught:
        site.open(b"nbd:x")
    assert "trusted" not in str(caught.value)


@pytest.mark.parametrize(
    "name", [b"../\x1b[31mred", b"../\xff\xfe", "../\u202egnp".encode(), b"../a\nb", b"gone\x9b\r"]
)
def test_no_message_carries_control_characters_of_a_name(site: Site, name: bytes) -> None:
    with pytest.raises((ReferenceDeniedError, MissingReferenceError)) as caught:
        site.open(name)
    assert str(caught.value).isprintable()


def make_literally(site: Site, name: bytes) -> None:
    """A file of exactly this name where a file system can have it: refusing must not depend on its absence."""
    if b"/" not in name and 0 < len(name) <= 255 and b"\0" not in name and name not in (b".", b".."):
        Path(os.fsdecode(os.path.join(os.fsencode(site.images), name))).write_bytes(b"literal")


# Names that are fine.


@pytest.mark.usefixtures("look_up")
@pytest.mark.parametrize(
    "name", [b"base", b"sub/base", b"...", b"..base", b".hidden", b"a b", b"caf\xe9", b"sub/nbd:x", b"n" * 255, b"-x"]
)
@pytest.mark.parametrize("policy", [Policy.CONFINED, Policy.TRUSTED])
def test_plain_names_are_opened(site: Site, name: bytes, policy: Policy) -> None:
    path = Path(os.fsdecode(os.path.join(os.fsencode(site.images), name)))
    path.write_bytes(b"inside")
    with no_descriptor_left():
        storage = site.open(name, policy=policy)
        assert storage.identity == (path.stat().st_dev, path.stat().st_ino)
        assert storage.path == str(path)
        assert read_all(storage) == b"inside"


@pytest.mark.usefixtures("look_up")
def test_a_hard_link_is_a_file_like_any_other(site: Site) -> None:
    os.link(site.images / "base", site.images / "link")
    assert read_all(site.open(b"link")) == b"inside"


@pytest.mark.usefixtures("look_up")
def test_the_directory_may_be_reached_through_a_symlink(site: Site) -> None:
    link = site.images.parent / "link"
    link.symlink_to(site.images)
    assert read_all(site.open(b"sub/base", directory=str(link))) == b"inside"


@pytest.mark.usefixtures("look_up")
def test_an_empty_directory_is_the_working_directory(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site.images)
    storage = site.open(b"sub/base", directory="")
    assert storage.path == "sub/base"
    assert read_all(storage) == b"inside"


@pytest.mark.usefixtures("look_up")
def test_it_is_opened_read_only_blocking_and_not_inherited(site: Site) -> None:
    before = open_descriptors()
    storage = site.open(b"base")
    (fd,) = open_descriptors().keys() - before.keys()
    assert os.get_blocking(fd)
    assert not os.get_inheritable(fd)
    with pytest.raises(OSError):
        os.write(fd, b"x")
    storage.close()


# Names in an image that lies deeper than the directory that confines its chain.


@pytest.mark.usefixtures("look_up")
@pytest.mark.parametrize("policy", [Policy.CONFINED, Policy.TRUSTED])
def test_a_name_starts_below(site: Site, policy: Policy) -> None:
    (site.images / "sub" / "deep").mkdir()
    (site.images / "sub" / "deep" / "file").write_bytes(b"deep")
    (site.images / "sub" / "file").write_bytes(b"sub")
    storage = site.open(b"file", below=b"sub/deep", policy=policy)
    assert storage.path == str(site.images / "sub" / "deep" / "file")
    assert read_all(storage) == b"deep"
    assert read_all(site.open(b"deep/file", below=b"sub", policy=policy)) == b"deep"
    assert read_all(site.open(b"file", below=b"sub", policy=policy)) == b"sub"
    with pytest.raises(MissingReferenceError):
        site.open(b"base", below=b"sub/deep", policy=policy)


@pytest.mark.usefixtures("look_up")
@pytest.mark.parametrize("name", [b"../base", b"../../outside/secret", b"/etc/passwd", b"", b"nbd:x", b".", b"a/../b"])
def test_below_lifts_no_rule(site: Site, name: bytes) -> None:
    with untouched(site.secret), audited_opens() as names, pytest.raises(ReferenceDeniedError):
        site.open(name, below=b"sub")
    assert names == []


@pytest.mark.usefixtures("look_up")
def test_no_symlink_is_followed_to_what_is_below(site: Site) -> None:
    (site.images / "link").symlink_to("../outside")
    with untouched(site.secret), pytest.raises(ReferenceDeniedError, match="symlink"):
        site.open(b"secret", below=b"link")


# Symlinks.


@pytest.mark.usefixtures("look_up")
@pytest.mark.parametrize(
    ("link", "target", "name"),
    [
        ("link", "../outside/secret", b"link"),
        ("link", "/etc/passwd", b"link"),
        ("link", "base", b"link"),
        ("link", "link", b"link"),
        ("link", "nowhere", b"link"),
        ("link", "../outside", b"link/secret"),
        ("link", "sub", b"link/base"),
        ("sub/link", "../../outside/secret", b"sub/link"),
        ("link", ".", b"link/base"),
        ("link", "/proc/self/root", b"link/etc/passwd"),
    ],
)
def test_confined_follows_no_symlink(site: Site, link: str, target: str, name: bytes) -> None:
    (site.images / link).symlink_to(target)
    with untouched(site.secret), pytest.raises(ReferenceDeniedError, match=r"symlink.*policy trusted"):
        site.open(name)


@pytest.mark.usefixtures("look_up")
def test_confined_follows_no_magic_link(site: Site) -> None:
    with site.secret.open("rb") as opened, untouched(site.secret), pytest.raises(ReferenceDeniedError, match="symlink"):
        site.open(str(opened.fileno()).encode(), directory="/proc/self/fd")


def test_trusted_goes_wherever_the_name_leads(site: Site) -> None:
    (site.images / "link").symlink_to("../outside/secret")
    (site.images / "links").symlink_to("../outside")
    names = [b"../outside/secret", b"sub/../../outside/secret", b"link", b"links/secret", os.fsencode(site.secret)]
    for name in names:
        assert read_all(site.open(name, policy=Policy.TRUSTED)) == b"secret"


def test_a_symlink_loop_is_the_systems_error_in_trusted(site: Site) -> None:
    (site.images / "loop").symlink_to("loop")
    with untouched(site.secret), pytest.raises(OSError) as caught:
        site.open(b"loop", policy=Policy.TRUSTED)
    assert (caught.value.errno, caught.value.filename) == (errno.ELOOP, str(site.images / "loop"))


@pytest.mark.usefixtures("look_up")
@pytest.mark.parametrize(
    ("one", "other", "target", "name"),
    [("base", "spare", "../outside/secret", b"base"), ("sub", "spare", "../outside", b"sub/secret")],
)
def test_swapping_a_file_for_a_symlink_never_opens_the_target(
    site: Site, one: str, other: str, target: str, name: bytes
) -> None:
    (site.images / other).symlink_to(target)
    (site.images / "sub" / "secret").write_bytes(b"inside")
    inside = (site.images / os.fsdecode(name)).stat()
    outcomes = {"opened": 0, "refused": 0}
    with (
        no_descriptor_left(),
        Opens(site.secret) as opens,
        Swapping(site.images / one, site.images / other) as swapping,
    ):
        for _ in range(20_000):
            try:
                storage = site.open(name)
            except ReferenceDeniedError:
                outcomes["refused"] += 1
            else:
                outcomes["opened"] += 1
                assert storage.identity == (inside.st_dev, inside.st_ino)
                storage.close()
            if min(outcomes.values()) >= 300 and sum(outcomes.values()) >= 2000:
                break
        assert not opens.seen()
    assert min(outcomes.values()) >= 300, outcomes  # else nothing was raced
    assert swapping.count >= 300


# Things that are not files.


def make_fifo(site: Site) -> bytes:
    os.mkfifo(site.images / "odd")
    return b"odd"


def make_socket(site: Site) -> bytes:
    os.mknod(site.images / "odd", stat.S_IFSOCK | 0o600)
    return b"odd"


def make_directory(site: Site) -> bytes:
    (site.images / "odd").mkdir()
    return b"odd"


ODD = [(make_fifo, "a FIFO"), (make_socket, "a socket"), (make_directory, "a directory")]
REFERRING = [Policy.CONFINED, Policy.TRUSTED]


@pytest.mark.usefixtures("look_up")
@pytest.mark.parametrize("policy", REFERRING)
@pytest.mark.parametrize(("make", "kind"), ODD)
def test_a_reference_to_something_odd_is_refused_at_once(
    site: Site, make: Callable[[Site], bytes], kind: str, policy: Policy
) -> None:
    name = make(site)
    with untouched(site.secret), Opens(site.images / "odd") as opens, pytest.raises(ReferenceDeniedError, match=kind):
        try:
            site.open(name, policy=policy)
        finally:
            assert not opens.seen()


@pytest.mark.usefixtures("look_up")
@pytest.mark.parametrize("policy", REFERRING)
@pytest.mark.parametrize("device", [b"zero", b"null", b"tty"])
def test_a_reference_to_a_character_device_is_refused_unopened(site: Site, device: bytes, policy: Policy) -> None:
    with untouched(site.secret), pytest.raises(ReferenceDeniedError, match="a character device"):
        site.open(device, policy=policy, directory="/dev")


@pytest.mark.parametrize(("make", "kind"), ODD)
def test_something_odd_that_the_caller_gives_is_refused_at_once(
    site: Site, make: Callable[[Site], bytes], kind: str
) -> None:
    path = site.images / os.fsdecode(make(site))
    with untouched(site.secret), pytest.raises(NotQcow2Error, match=f"{kind}, neither") as caught:
        open_given(path)
    assert caught.value.file == str(path)


def test_a_character_device_that_the_caller_gives_is_refused(site: Site) -> None:
    with untouched(site.secret), pytest.raises(NotQcow2Error, match="a character device"):
        open_given("/dev/zero")


@pytest.mark.usefixtures("look_up")
def test_a_confined_reference_to_a_block_device_is_refused_unopened(site: Site) -> None:
    device = next((entry for entry in Path("/dev").iterdir() if entry.is_block_device()), None)
    if device is None:
        pytest.skip("this machine shows no block device")
    with untouched(site.secret), Opens(device) as opens:
        with pytest.raises(ReferenceDeniedError, match=r"a block device.*policy trusted"):
            site.open(os.fsencode(device.name), directory="/dev")
        assert not opens.seen()


def test_block_devices_are_for_the_caller_and_for_trusted_images(site: Site) -> None:
    size = 1 << 20
    content = site.images / "content"
    content.write_bytes(b"inside" + bytes(size - 6))
    with loop_device(content) as device:
        name = os.fsencode(os.path.basename(device))
        for storage in (open_given(device), site.open(name, policy=Policy.TRUSTED, directory="/dev")):
            assert storage.size() == size
            assert list(storage.data_ranges(0, size + 512)) == [(0, size, True), (size, 512, False)]
            assert read_all(storage)[:6] == b"inside"


# Files that are not there, cannot be read, or are in use.


@pytest.mark.usefixtures("look_up")
@pytest.mark.parametrize("policy", REFERRING)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", [b"missing", b"missing/base", b"sub/missing", b"base/below", b"n" * 256, b"n" * 1023])
def test_a_missing_reference_says_where_it_was_looked_for(site: Site, name: bytes, role: str, policy: Policy) -> None:
    with untouched(site.secret), pytest.raises(MissingReferenceError) as caught:
        site.open(name, role=role, policy=policy)
    message = str(caught.value)
    assert message.startswith(f'{role} "{name.decode()}" does not exist as {site.images / os.fsdecode(name)};')
    assert f"option {role.replace(' ', '-')}" in message
    assert "option base-directory" in message
    assert caught.value.file == "overlay.qcow2"


def test_a_dangling_symlink_is_missing_in_trusted(site: Site) -> None:
    (site.images / "link").symlink_to("nowhere")
    with pytest.raises(MissingReferenceError):
        site.open(b"link", policy=Policy.TRUSTED)


@pytest.mark.usefixtures("look_up")
def test_a_missing_directory_is_the_systems_error(site: Site) -> None:
    directory = str(site.images / "nowhere")
    with untouched(site.secret), pytest.raises(FileNotFoundError) as caught:
        site.open(b"base", directory=directory)
    assert caught.value.filename == directory


def test_a_given_file_that_is_missing_is_the_systems_error(site: Site) -> None:
    path = str(site.images / "missing")
    with untouched(site.secret), pytest.raises(FileNotFoundError) as caught:
        open_given(path)
    assert caught.value.filename == path


def test_a_given_symlink_is_followed(site: Site) -> None:
    (site.images / "link").symlink_to("../outside/secret")
    storage = open_given(site.images / "link")
    assert storage.path == str(site.images / "link")
    assert read_all(storage) == b"secret"


@contextmanager
def ordinary_user() -> Iterator[None]:
    """File access as somebody without privileges, for this thread."""
    libc = ctypes.CDLL(None)
    before = libc.setfsuid(65534) if os.geteuid() == 0 else None
    try:
        yield
    finally:
        if before is not None:
            libc.setfsuid(before)


@pytest.mark.usefixtures("look_up")
@pytest.mark.parametrize("way", ["given", "reference"])
def test_a_file_that_may_not_be_read_is_the_systems_error(
    site: Site, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.chdir(site.images)
    site.images.chmod(0o755)
    (site.images / "base").chmod(0)
    with untouched(site.secret), ordinary_user(), pytest.raises(PermissionError) as caught:
        open_given("base") if way == "given" else site.open(b"base", directory="")
    assert caught.value.filename == "base"


@pytest.mark.usefixtures("look_up")
@pytest.mark.parametrize("way", ["given", "reference"])
def test_a_file_that_somebody_writes_is_refused_and_let_go(site: Site, way: str) -> None:
    path = site.images / "base"
    with holding(path, QEMU_WRITER), untouched(site.secret), pytest.raises(ImageLockedError) as caught:
        open_given(path) if way == "given" else site.open(b"base")
    assert caught.value.file == str(path)
    assert locked_bytes(path) == set()


def test_errors_of_locking_carry_the_path(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_lock(fd: int, path: str, *, force_share: bool) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(opener, "lock_for_reading", broken_lock)
    with untouched(site.secret), pytest.raises(OSError) as caught:
        site.open(b"base")
    assert caught.value.filename == str(site.images / "base")


def test_a_look_up_that_is_disturbed_is_repeated(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opener, "_syscall", failing_syscall(errno.EAGAIN, times=5))
    assert read_all(site.open(b"base")) == b"inside"


def test_a_look_up_that_is_disturbed_for_ever_ends(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opener, "_syscall", failing_syscall(errno.EAGAIN))
    with untouched(site.secret), pytest.raises(OSError) as caught:
        site.open(b"base")
    assert (caught.value.errno, caught.value.filename) == (errno.EAGAIN, str(site.images / "base"))


def test_the_look_up_is_audited_whatever_way_it_takes(site: Site, look_up: str) -> None:
    with audited_opens() as names:
        site.open(b"sub/base").close()
    looked_up = ["sub/base"] if look_up == "openat2" else ["sub", "base"]
    assert names[0] == str(site.images)
    assert names[-1].startswith("/proc/self/fd/")
    assert names[-1 - len(looked_up) : -1] == looked_up


def test_every_policy_has_its_word() -> None:
    assert {policy.value for policy in Policy} == {"inspect", "confined", "trusted"}
