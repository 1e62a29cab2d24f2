"""Opening for writing: what an image names must be no way to change a file of somebody else.

Opening alone changes no byte, whatever comes of it, and what is refused leaves neither a descriptor nor a lock.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcow2_plugin.engine.chain import check_writable, open_image
from qcow2_plugin.engine.header import read_header
from qcow2_plugin.errors import (
    CorruptImageError,
    ImageLockedError,
    NotQcow2Error,
    Qcow2Error,
    ReadOnlyImageError,
    ReferenceDeniedError,
    TruncatedImageError,
)
from qcow2_plugin.storage.file import FileStorage
from qcow2_plugin.storage.opener import Policy, create_given, open_given, open_reference
from tests.support.builder import BuiltImage, ImageBuilder
from tests.support.lockbytes import QEMU_FORCE_SHARE, QEMU_READER, QEMU_WRITER, holding, locked_bytes
from tests.support.loop import loop_device
from tests.support.memory_storage import MemoryStorage
from tests.support.swapping import Swapping
from tests.support.watching import Opens, audited_opens, no_descriptor_left, open_descriptors

CLUSTER = 4096
SIZE = 8 * CLUSTER
SECRET = b"only for the host"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A directory with the file `base` in it; next to it lies `outside/secret`."""
    made = tmp_path / "images"
    (made / "sub").mkdir(parents=True)
    (made / "base").write_bytes(b"inside")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(SECRET)
    return made


@contextmanager
def harmless(*files: Path) -> Iterator[None]:
    """Fails if the block leaves a descriptor, or a lock or another byte or time of writing in any of `files`."""
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    with no_descriptor_left():
        yield
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before
    assert [locked_bytes(path) for path in files] == [set()] * len(files)


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


def named(images: Path, name: bytes, policy: Policy = Policy.CONFINED) -> FileStorage:
    """The data file of that name, opened for writing."""
    return open_reference(
        name, "data file", policy=policy, directory=str(images), referrer="image.qcow2", writable=True
    )


def given_way(images: Path) -> FileStorage:
    return open_given(images / "base", writable=True)


def named_way(images: Path) -> FileStorage:
    return named(images, b"base")


WAYS = [given_way, named_way]
Way = Callable[[Path], FileStorage]


# Opening.


@pytest.mark.parametrize("way", WAYS)
def test_it_is_opened_read_write_locked_blocking_and_not_inherited(images: Path, way: Way) -> None:
    with harmless(images / "base"):
        before = open_descriptors()
        storage = way(images)
        (fd,) = open_descriptors().keys() - before.keys()
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        assert os.get_blocking(fd)
        assert not os.get_inheritable(fd)
        assert locked_bytes(images / "base") == set(QEMU_WRITER)
        assert storage.pread(100, 0) == b"inside"
        storage.close()


@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_is_in_the_file(images: Path, way: Way) -> None:
    storage = way(images)
    storage.write_from(b"new", 3)
    storage.close()
    assert (images / "base").read_bytes() == b"insnew"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("other", [QEMU_READER, QEMU_WRITER])
def test_a_file_in_use_is_refused_untouched(images: Path, other: tuple[int, ...], way: Way) -> None:
    base = images / "base"
    with harmless(base), holding(base, other):
        with no_descriptor_left(), pytest.raises(ImageLockedError) as caught:
            way(images)
        assert locked_bytes(base) == set(other)
    assert caught.value.file == str(base)
    assert "force-share" not in str(caught.value)


@pytest.mark.parametrize("way", WAYS)
def test_a_force_share_reader_is_no_obstacle(images: Path, way: Way) -> None:
    with holding(images / "base", QEMU_FORCE_SHARE):
        way(images).close()


@pytest.mark.parametrize("way", WAYS)
def test_a_file_system_without_locks_is_refused(images: Path, monkeypatch: pytest.MonkeyPatch, way: Way) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with harmless(images / "base"), monkeypatch.context() as patched:
        patched.setattr(fcntl, "fcntl", refuse)
        with pytest.raises(ImageLockedError, match="has no locks"):
            way(images)


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_may_not_be_written_is_the_systems_error(
    images: Path, monkeypatch: pytest.MonkeyPatch, way: Way
) -> None:
    monkeypatch.chdir(images)
    images.chmod(0o755)
    (images / "base").chmod(0o444)
    with harmless(images / "base"), ordinary_user(), pytest.raises(PermissionError) as caught:
        way(Path())
    assert os.path.normpath(caught.value.filename) == "base"


# What an image names.


@pytest.mark.parametrize(
    "name",
    [
        *(b"../outside/secret", b"sub/../../outside/secret", b"/etc/passwd", b"", b".", b"..", b"./base", b"sub//base"),
        *(b"json:{}", b"nbd:localhost:1", b"file:base", b"fd:3", b"host_device:base", b"base\0", b"n" * 1024),
    ],
)
def test_writing_lifts_no_rule_about_names(images: Path, name: bytes) -> None:
    with harmless(images / "base"), audited_opens() as names, pytest.raises(ReferenceDeniedError):
        named(images, name)
    assert names == []


def test_inspect_opens_nothing_for_writing(images: Path) -> None:
    with harmless(images / "base"), audited_opens() as names, pytest.raises(ReferenceDeniedError):
        named(images, b"base", Policy.INSPECT)
    assert names == []


@pytest.mark.parametrize(
    ("link", "target", "name"),
    [
        ("link", "../outside/secret", b"link"),
        ("link", "../outside", b"link/secret"),
        ("sub/link", "../../outside/secret", b"sub/link"),
        ("link", "base", b"link"),
    ],
)
def test_no_symlink_is_followed(images: Path, link: str, target: str, name: bytes) -> None:
    secret = images.parent / "outside" / "secret"
    (images / link).symlink_to(target)
    with harmless(secret, images / "base"), Opens(secret) as opens:
        with pytest.raises(ReferenceDeniedError, match="symlink"):
            named(images, name)
        assert not opens.seen()


def test_swapping_a_file_for_a_symlink_never_opens_the_target(images: Path) -> None:
    secret = images.parent / "outside" / "secret"
    (images / "spare").symlink_to("../outside/secret")
    inside = (images / "base").stat()
    outcomes = {"opened": 0, "refused": 0}
    with harmless(secret), Opens(secret) as opens, Swapping(images / "base", images / "spare"):
        for _ in range(20_000):
            try:
                storage = named(images, b"base")
            except ReferenceDeniedError:
                outcomes["refused"] += 1
            else:
                outcomes["opened"] += 1
                assert storage.identity == (inside.st_dev, inside.st_ino)
                storage.write_from(b"written", 0)
                storage.close()
            if min(outcomes.values()) >= 100 and sum(outcomes.values()) >= 1000:
                break
        assert not opens.seen()
    assert min(outcomes.values()) >= 100, outcomes  # else nothing was raced


def test_a_file_that_must_not_be_is_not_opened(images: Path) -> None:
    def refuse(identity: tuple[int, int], path: str) -> None:
        asked.append((identity, path))
        raise ReferenceDeniedError("not this one")

    asked: list[tuple[tuple[int, int], str]] = []
    status = (images / "base").stat()
    with harmless(images / "base"), Opens(images / "base") as opens:
        with pytest.raises(ReferenceDeniedError, match="not this one"):
            open_given(images / "base", writable=True, vet=refuse)
        assert not opens.seen()
    assert asked == [((status.st_dev, status.st_ino), str(images / "base"))]


# Things that are not files.


def make_socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


@pytest.mark.parametrize(
    ("make", "kind"), [(os.mkfifo, "a FIFO"), (make_socket, "a socket"), (os.mkdir, "a directory")]
)
def test_something_odd_is_refused_unopened(images: Path, make: Callable[[Path], None], kind: str) -> None:
    make(images / "odd")
    (images / "link").symlink_to("odd")
    for name in ("odd", "link"):
        with no_descriptor_left(), Opens(images / "odd") as opens:
            with pytest.raises(NotQcow2Error, match=f"{kind}, neither"):
                open_given(images / name, writable=True)
            assert not opens.seen()


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero", "/dev/full"])
def test_a_character_device_is_refused(device: str) -> None:
    with no_descriptor_left():
        with pytest.raises(NotQcow2Error, match="a character device"):
            open_given(device, writable=True)
        with pytest.raises(ReferenceDeniedError, match="a character device"):
            named(Path("/dev"), os.fsencode(device)[5:], Policy.TRUSTED)


def test_a_block_device_is_written_where_the_caller_names_it(images: Path) -> None:
    (images / "content").write_bytes(b"inside" * 10_000 + bytes(5536))
    with loop_device(images / "content", read_only=False) as device:
        (images / "link").symlink_to(device)
        with pytest.raises(FileExistsError):
            create_given(device)
        with pytest.raises(ReferenceDeniedError, match="a block device"):
            named(Path("/dev"), os.fsencode(os.path.basename(device)))
        for path in (device, images / "link"):
            storage = open_given(path, writable=True)
            assert storage.size() == 65536
            assert storage.pread(6, 0) == b"inside"
            storage.write_from(b"new", 0)
            storage.write_zeroes(512, 1024, may_punch=True)
            storage.write_zeroes(5000, 1 << 30, may_punch=False)
            storage.punch(0, 65536 * 2)
            storage.barrier()
            assert storage.size() == 65536
            assert storage.pread(3, 0) in (b"new", bytes(3))
            assert storage.pread(1024, 512) == bytes(1024)
            assert storage.pread(65536, 5000) == bytes(60536)
            storage.write_from(b"inside", 0)
            storage.close()


# Creating.


def test_a_new_file_is_empty_locked_and_new(images: Path) -> None:
    path = images / "new"
    before = os.umask(0o027)
    try:
        storage = create_given(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert (storage.path, storage.size()) == (str(path), 0)
    assert locked_bytes(path) == set(QEMU_WRITER)
    storage.write_from(b"image", 0)
    assert storage.pread(5, 0) == b"image"
    with pytest.raises(ImageLockedError):
        open_given(path, writable=True)
    assert path.read_bytes() == b"image"
    storage.close()
    assert locked_bytes(path) == set()


def test_nothing_that_exists_is_even_opened(images: Path) -> None:
    base = images / "base"
    (images / "link").symlink_to("base")
    for name in ("base", "link", "sub"):
        with harmless(base), Opens(base) as opens:
            with pytest.raises(FileExistsError) as caught:
                create_given(images / name)
            assert not opens.seen()
        assert caught.value.filename == str(images / name)


def test_nothing_is_created_through_a_symlink(images: Path) -> None:
    (images / "link").symlink_to("../outside/new")
    with no_descriptor_left(), pytest.raises(FileExistsError) as caught:
        create_given(images / "link")
    assert caught.value.filename == str(images / "link")
    assert not (images.parent / "outside" / "new").exists()


def test_a_missing_directory_is_the_systems_error(images: Path) -> None:
    with no_descriptor_left(), pytest.raises(FileNotFoundError) as caught:
        create_given(images / "missing" / "new")
    assert caught.value.filename == str(images / "missing" / "new")


# Whole images.


def image() -> ImageBuilder:
    return ImageBuilder(SIZE, cluster_bits=12).data(0, b"data")


def with_bitmap(images: Path, **fields: int) -> BuiltImage:
    """An image with a snapshot and a bitmap, whose directory is as `fields` of the extension say."""
    told = image().snapshot(b"1", b"one").bitmap(b"b", [(0, 1)], granularity_bits=12)
    return told.bitmaps_extension(**fields).build(images / "image.qcow2")


@pytest.mark.parametrize("option", [{"snapshot": "1"}, {"allow_damaged": True}, {"force_share": True}])
def test_options_for_reading_are_refused_before_anything_is_opened(images: Path, option: dict[str, object]) -> None:
    path = image().snapshot(b"1", b"one").build(images / "image.qcow2").path
    open_image(path, **option).close()  # type: ignore[arg-type] # passed on
    with harmless(path), audited_opens() as names, pytest.raises(ReadOnlyImageError) as caught:
        open_image(path, writable=True, **option)  # type: ignore[arg-type] # passed on
    assert names == []
    assert str(caught.value).startswith(f"{next(iter(option))} is for reading only: ")
    assert "open it for reading" in str(caught.value)
    assert caught.value.file == str(path)


def refused(images: Path, error: type[Qcow2Error], match: str) -> None:
    """Fails unless `image.qcow2` is refused for writing, and only for that."""
    path = images / "image.qcow2"
    open_image(path).close()
    with harmless(path), pytest.raises(error, match=match) as caught:
        open_image(path, writable=True)
    assert type(caught.value) is error
    assert caught.value.file == str(path)
    storage = MemoryStorage(path.read_bytes(), "memory")
    with pytest.raises(error, match=rf"{match}.*\(memory\)"):
        check_writable(read_header(storage), storage)


def test_a_corrupt_image_is_refused_before_its_data_file_is_opened(images: Path) -> None:
    told = ImageBuilder(SIZE, cluster_bits=12, incompatible=2).data(0, b"data")
    told.data_file(images / "data", b"data").build(images / "image.qcow2")
    with harmless(images / "data"), Opens(images / "data") as opens:
        with pytest.raises(ReadOnlyImageError, match="marked as corrupt"):
            open_image(images / "image.qcow2", writable=True)
        assert not opens.seen()
    refused(images, ReadOnlyImageError, "marked as corrupt.*check -r all")


def test_a_raw_data_file_and_a_backing_file_exclude_each_other(images: Path) -> None:
    (images / "base.raw").write_bytes(bytes(SIZE))
    told = image().data_file(images / "data", b"data", raw=True).backing(b"base.raw")
    told.build(images / "image.qcow2")
    refused(images, ReadOnlyImageError, "raw data file bit.*qemu-img convert")


@pytest.mark.parametrize("table", ["l1", "refcounts", "snapshots", "header"])
def test_a_bitmap_directory_in_the_place_of_another_table_is_refused(images: Path, table: str) -> None:
    built = with_bitmap(images)
    open_image(built.path).close()
    offsets = {"l1": built.l1_offset, "refcounts": built.refcount_table_offset, "snapshots": built.snapshots_offset}
    with_bitmap(images, directory_offset=offsets.get(table, 0))
    match = "bitmap directory" if table != "header" else "bitmap directory at host offset 0x0: lies inside the header"
    refused(images, CorruptImageError, match)


def test_a_bitmap_directory_past_the_end_is_refused(images: Path) -> None:
    with_bitmap(images, directory_offset=1 << 40)
    refused(images, TruncatedImageError, "bitmap directory at host offset 0x10000000000: lies past the end")


@pytest.mark.parametrize("fields", [{"nb_bitmaps": 0}, {"directory_size": 1 << 40}, {"reserved": 1}])
def test_a_bitmaps_extension_that_says_nonsense_is_refused(images: Path, fields: dict[str, int]) -> None:
    with_bitmap(images, **fields)
    refused(images, CorruptImageError, "bitmaps header extension")


def test_bitmaps_that_are_not_valid_do_not_count(images: Path) -> None:
    """With the autoclear bit unset the extension is left over from a program that does not know it."""
    built = with_bitmap(images, directory_offset=0)
    storage = MemoryStorage(built.path.read_bytes())
    storage.write_from(bytes(8), 88)  # autoclear features
    check_writable(read_header(storage), storage)


def test_a_sound_image_may_be_written(images: Path) -> None:
    for told in (image(), image().snapshot(b"1", b"one").bitmap(b"b", [(0, 1)], granularity_bits=12)):
        storage = MemoryStorage(told.build(images / "image.qcow2").path.read_bytes())
        check_writable(read_header(storage), storage)


def test_a_data_file_that_is_the_image_is_refused_as_such(images: Path) -> None:
    """Not as one that another program has locked: that would be we."""
    image().data_file(images / "data", b"image.qcow2").build(images / "image.qcow2")
    with harmless(images / "image.qcow2"), pytest.raises(ReferenceDeniedError, match="the data file is the same file"):
        open_image(images / "image.qcow2", writable=True)


def test_a_backing_file_that_is_the_image_is_refused_as_such(images: Path) -> None:
    image().backing(b"image.qcow2", b"qcow2").build(images / "image.qcow2")
    with harmless(images / "image.qcow2"), pytest.raises(ReferenceDeniedError, match="the backing file is the same"):
        open_image(images / "image.qcow2", writable=True)


@pytest.mark.parametrize("name", [b"../outside/secret", b"link", b"/etc/passwd"])
def test_a_data_file_outside_is_neither_opened_nor_changed(images: Path, name: bytes) -> None:
    secret = images.parent / "outside" / "secret"
    (images / "link").symlink_to("../outside/secret")
    image().data_file(images / "data", name).build(images / "image.qcow2")
    with harmless(secret, images / "image.qcow2"), Opens(secret) as opens:
        with pytest.raises(ReferenceDeniedError, match="data file"):
            open_image(images / "image.qcow2", writable=True)
        assert not opens.seen()


def test_only_the_image_and_its_data_file_are_opened_for_writing(images: Path) -> None:
    names = ["image.qcow2", "data", "middle.qcow2", "middle data", "base.raw"]
    (images / "base.raw").write_bytes(bytes(SIZE))
    middle = image().data_file(images / "middle data", b"middle data").backing(b"base.raw")
    middle.build(images / "middle.qcow2")
    image().data_file(images / "data", b"data").backing(b"middle.qcow2", b"qcow2").build(images / "image.qcow2")
    with harmless(*(images / name for name in names)):
        opened = open_image(images / "image.qcow2", writable=True)
        assert opened.writable
        held = [locked_bytes(images / name) for name in names]
        opened.close()
    assert held == [set(QEMU_WRITER)] * 2 + [set(QEMU_READER)] * 3


def test_a_data_file_that_the_caller_names_is_opened_for_writing(images: Path) -> None:
    image().data_file(images / "data", None).build(images / "image.qcow2")
    opened = open_image(images / "image.qcow2", writable=True, data_file=images / "data")
    assert locked_bytes(images / "data") == set(QEMU_WRITER)
    opened.close()
