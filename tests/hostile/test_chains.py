"""Chains that go astray: loops, depths without end, strange files below, hostile names in lower layers.

Whatever the layers say, nothing outside the image's directory is opened, and what is refused is refused at once.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import (
    MissingReferenceError,
    NotQcow2Error,
    Qcow2Error,
    ReferenceDeniedError,
    UnsupportedFeatureError,
)
from qcow2_plugin.operations.info import info, info_chain
from qcow2_plugin.storage.opener import Policy
from tests.support.builder import ImageBuilder
from tests.support.fields import DATA_FILE, MAGIC
from tests.support.hostile import IMAGE, assert_harmless_text, bounded, unharmed
from tests.support.lockbytes import locked_bytes
from tests.support.tools import convert_to_raw
from tests.support.watching import Opens, audited_opens, no_descriptor_left

MIB = 1 << 20
CLUSTER = 1 << 16
MAX_DEPTH = 64
SECRET = b"only for the host"
HOSTILE_NAMES = [
    b"../secret",
    b"sub/../../secret",
    b"/etc/passwd",
    b"/dev/fdset/1",
    b"",
    b".",
    b"..",
    b"./base",
    b"json:{}",
    b"nbd:localhost:1",
    b"nbd+unix:///?socket=s",
    b"file:../secret",
    b"fd:3",
    b"host_device:/dev/null",
    b"blkdebug::base",
    b"link",
    b"links/secret",
    b"no\0name",
    b"esc\x1b[31m\r\n\x9b\xe2\x80\xae:",
]


@contextmanager
def kept_in(directory: Path) -> Iterator[list[str]]:
    """A directory of images beside a secret that nobody may open. Gives the names of the files that are opened."""
    secret = directory.parent / "secret"
    secret.write_bytes(SECRET)
    (directory / "link").symlink_to("../secret")
    (directory / "links").symlink_to("..")
    with unharmed(directory), Opens(secret) as opens, audited_opens() as names:
        yield names
        assert not opens.seen()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    made = tmp_path / "images"
    made.mkdir()
    return made


def overlay(path: Path, name: bytes, format: bytes | None = b"qcow2") -> None:
    ImageBuilder(MIB).data(1, b"overlay").backing(name, format).build(path)


def refuse(path: Path, error: type[Qcow2Error], match: str | None = None, **options: object) -> Qcow2Error:
    with pytest.raises(error, match=match) as caught:
        open_image(path, **options)  # type: ignore[arg-type] # of many kinds
    assert_harmless_text(str(caught.value))
    return caught.value


# Loops.


def itself(directory: Path) -> None:
    overlay(directory / IMAGE, IMAGE.encode())


def hard_link(directory: Path) -> None:
    overlay(directory / IMAGE, b"other name")
    os.link(directory / IMAGE, directory / "other name")


def two_images(directory: Path) -> None:
    overlay(directory / IMAGE, b"b")
    overlay(directory / "b", IMAGE.encode())


def hard_link_to_the_middle(directory: Path) -> None:
    overlay(directory / IMAGE, b"b")
    overlay(directory / "b", b"c")
    overlay(directory / "c", b"d")
    os.link(directory / "b", directory / "d")


def as_raw(directory: Path) -> None:
    overlay(directory / IMAGE, IMAGE.encode(), b"raw")


def data_file_is_the_image(directory: Path) -> None:
    path = directory / IMAGE
    ImageBuilder(MIB, incompatible=4).extension(DATA_FILE, IMAGE.encode()).build(path)


def data_file_is_the_backing_file(directory: Path) -> None:
    ImageBuilder(MIB).data_file(directory / "data", b"data").data(1, b"x").backing(b"data", b"raw").build(
        directory / IMAGE
    )


def backing_files_data_file_is_the_image(directory: Path) -> None:
    overlay(directory / IMAGE, b"b")
    ImageBuilder(MIB, incompatible=4).extension(DATA_FILE, IMAGE.encode()).build(directory / "b")


LOOPS: list[Callable[[Path], None]] = [
    itself, hard_link, two_images, hard_link_to_the_middle, as_raw, data_file_is_the_image,
    data_file_is_the_backing_file, backing_files_data_file_is_the_image,
]  # fmt: skip


@pytest.mark.parametrize("make", LOOPS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("policy", [Policy.CONFINED, Policy.TRUSTED])
def test_a_file_that_is_there_already(make: Callable[[Path], None], policy: Policy, images: Path) -> None:
    make(images)
    with kept_in(images):
        refuse(images / IMAGE, ReferenceDeniedError, "is the same file as", policy=policy)


@pytest.mark.parametrize("make", LOOPS[:4], ids=lambda make: make.__name__)
def test_info_of_a_chain_comes_to_an_end(make: Callable[[Path], None], images: Path) -> None:
    make(images)
    with kept_in(images), pytest.raises(ReferenceDeniedError):
        info_chain(images / IMAGE)


def test_the_image_by_a_dotted_name(images: Path) -> None:
    overlay(images / IMAGE, b"./" + IMAGE.encode())
    with kept_in(images):
        refuse(images / IMAGE, ReferenceDeniedError, '"." or ".." component')
        refuse(images / IMAGE, ReferenceDeniedError, "is the same file as", policy=Policy.TRUSTED)


def test_a_loop_through_symlinks_of_the_operator(images: Path) -> None:
    itself(images)
    (images / "alias").symlink_to(IMAGE)
    with kept_in(images):
        refuse(images / "alias", ReferenceDeniedError, "is the same file as")


# Depth.


def chain(directory: Path, depth: int) -> Path:
    """`depth` files, the lowest of which holds a word."""
    for level in range(depth - 1):
        ImageBuilder(MIB, 9).backing(b"%d" % (level + 1), b"qcow2").build(directory / str(level))
    ImageBuilder(MIB, 9).data(0, b"bottom").build(directory / str(depth - 1))
    return directory / "0"


def test_a_chain_as_deep_as_allowed_is_read(images: Path) -> None:
    path = chain(images, MAX_DEPTH)
    with unharmed(images, seconds=1), open_image(path) as image:
        assert image.pread(6, 0) == b"bottom"
        assert next(image.extents()).depth == MAX_DEPTH - 1
    assert len(info_chain(path)) == MAX_DEPTH


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 1000])
def test_a_deeper_chain_is_refused_before_it_is_followed_to_its_end(depth: int, images: Path) -> None:
    path = chain(images, depth)
    with kept_in_time(images) as names:
        refuse(path, ReferenceDeniedError, "deeper than 64")
    assert len(opened_files(names)) < 70
    with kept_in_time(images) as names, pytest.raises(ReferenceDeniedError):
        info_chain(path)
    assert len(opened_files(names)) < 70


def test_a_raw_file_below_counts_as_a_layer(images: Path) -> None:
    path = chain(images, MAX_DEPTH)
    (images / "raw").write_bytes(b"raw")
    ImageBuilder(MIB, 9).backing(b"raw", b"raw").build(images / str(MAX_DEPTH - 1))
    refuse(path, ReferenceDeniedError, "deeper than 64")


@contextmanager
def kept_in_time(directory: Path) -> Iterator[list[str]]:
    """As `unharmed`, without a look at each of a thousand files."""
    with no_descriptor_left(), bounded(seconds=1), audited_opens() as names:
        yield names
    assert locked_bytes(directory / "0") == locked_bytes(directory / "1") == set()


def opened_files(names: list[str]) -> list[str]:
    """The opens among what was looked up: a pinned file is opened by its descriptor."""
    return [name for name in names if name.startswith("/proc/self/fd/")]


# Names in lower layers.


def names_backing_file(path: Path, name: bytes) -> None:
    overlay(path, name, b"raw")


def names_data_file(path: Path, name: bytes) -> None:
    ImageBuilder(MIB, incompatible=4).extension(DATA_FILE, name).build(path)


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=repr)
@pytest.mark.parametrize("make", [names_backing_file, names_data_file], ids=lambda make: make.__name__)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_hostile_name_is_refused_at_every_level(
    level: int, make: Callable[[Path, bytes], None], name: bytes, images: Path
) -> None:
    (images / "base").write_bytes(bytes(MIB))
    for above in range(level):
        overlay(images / (IMAGE if above == 0 else f"level{above}"), b"level%d" % (above + 1))
    make(images / (IMAGE if level == 0 else f"level{level}"), name)
    with kept_in(images) as names:
        error = refuse(images / IMAGE, ReferenceDeniedError, "is not opened")
    assert error.file == str(images / (IMAGE if level == 0 else f"level{level}"))
    assert len(opened_files(names)) == level + 1
    with kept_in(images_of(images, "again")) as names:
        found = info(images / IMAGE).qcow2
    assert found is not None
    assert len(opened_files(names)) == 1


def images_of(directory: Path, name: str) -> Path:
    made = directory / name
    made.mkdir(exist_ok=True)
    return made


@pytest.mark.parametrize("make", [names_backing_file, names_data_file], ids=lambda make: make.__name__)
def test_inspect_opens_nothing_that_is_named(make: Callable[[Path, bytes], None], images: Path) -> None:
    (images / "base").write_bytes(bytes(MIB))
    make(images / IMAGE, b"base")
    with kept_in(images) as names:
        refuse(images / IMAGE, ReferenceDeniedError, "policy inspect", policy=Policy.INSPECT)
    assert len(opened_files(names)) == 1


# Things below that are no images, or not what they are called.


@pytest.mark.parametrize("format", [b"qcow2", b"raw"])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a FIFO"),
        (lambda path: os.mknod(path, stat.S_IFSOCK | 0o600), "a socket"),
        (os.mkdir, "a directory"),
    ],
    ids=["FIFO", "socket", "directory"],
)
def test_something_odd_below(make: Callable[[Path], None], kind: str, format: bytes, images: Path) -> None:
    overlay(images / IMAGE, b"middle")
    overlay(images / "middle", b"odd", format)
    make(images / "odd")
    for policy in (Policy.CONFINED, Policy.TRUSTED):
        with unharmed(images), Opens(images / "odd") as opens:
            refuse(images / IMAGE, ReferenceDeniedError, kind, policy=policy)
            assert not opens.seen()


@pytest.mark.parametrize("device", [b"/dev/zero", b"/dev/null", b"/dev/tty"])
def test_a_device_below(device: bytes, images: Path) -> None:
    overlay(images / IMAGE, device, b"raw")
    with kept_in(images):
        refuse(images / IMAGE, ReferenceDeniedError, "absolute")
        refuse(images / IMAGE, ReferenceDeniedError, "a character device", policy=Policy.TRUSTED)


@pytest.mark.parametrize("format", [b"vmdk", b"", b"QCOW2", b"raw\0", b"esc\x1b[2J\xe2\x80\xae"])
def test_a_format_that_is_not_served(format: bytes, images: Path) -> None:
    overlay(images / IMAGE, b"base", format)
    (images / "base").write_bytes(bytes(MIB))
    with kept_in(images), Opens(images / "base") as opens:
        refuse(images / IMAGE, UnsupportedFeatureError, "is not supported")
        assert not opens.seen()


def guest_made_qcow2(backing: bytes) -> bytes:
    """What a guest writes to its raw disk so that whoever guesses formats opens another file."""
    image = bytearray(ImageBuilder(MIB).expected())
    fields = (MAGIC, 2, 512, len(backing), 16, MIB, 0, 1, CLUSTER, 2 * CLUSTER, 1, 0, 0)
    header = struct.pack(">IIQIIQIIQQIIQ", *fields)
    image[: len(header)] = header
    image[512 : 512 + len(backing)] = backing
    return bytes(image)


def test_a_format_that_is_not_recorded_is_not_guessed(images: Path) -> None:
    overlay(images / IMAGE, b"base", None)
    (images / "base").write_bytes(guest_made_qcow2(b"/etc/passwd"))
    with kept_in(images), Opens(images / "base") as opens:
        refuse(images / IMAGE, ReferenceDeniedError, "format of the backing file is not recorded")
        assert not opens.seen()


def test_a_raw_file_that_looks_like_an_image_is_raw(images: Path) -> None:
    content = guest_made_qcow2(b"../secret")
    overlay(images / IMAGE, b"base", b"raw")
    (images / "base").write_bytes(content)
    with kept_in(images), open_image(images / IMAGE) as image:
        assert image.pread(CLUSTER, 0) == content[:CLUSTER]
        assert image.pread(CLUSTER, 2 * CLUSTER) == content[2 * CLUSTER : 3 * CLUSTER]
    assert convert_to_raw(images / IMAGE)[:CLUSTER] == content[:CLUSTER]


def test_a_raw_file_that_looks_like_an_image_is_raw_by_word_of_the_caller(images: Path) -> None:
    content = guest_made_qcow2(b"../secret")
    overlay(images / IMAGE, b"base", None)
    (images / "base").write_bytes(content)
    with kept_in(images), open_image(images / IMAGE, backing_format="raw") as image:
        assert image.pread(CLUSTER, 0) == content[:CLUSTER]


def test_a_data_file_that_looks_like_an_image_is_data(images: Path) -> None:
    content = guest_made_qcow2(b"../secret")
    image = ImageBuilder(MIB).data_file(images / "data", b"data")
    for cluster in range(16):
        image.data(cluster, content[cluster * CLUSTER : (cluster + 1) * CLUSTER])
    image.build(images / IMAGE)
    with kept_in(images), open_image(images / IMAGE) as opened:
        assert opened.pread(MIB, 0) == content


def test_a_guest_made_header_opens_nothing_even_if_it_is_served_by_mistake(images: Path) -> None:
    for backing in (b"/etc/passwd", b"../secret", b"link"):
        (images / IMAGE).write_bytes(guest_made_qcow2(backing))
        with kept_in(images_of(images, f"case{len(backing)}")) as names:
            refuse(images / IMAGE, Qcow2Error, allow_damaged=True)
        assert len(opened_files(names)) == 1


def test_an_image_in_an_image_is_just_data(images: Path) -> None:
    inner = images / "inner"
    overlay(inner, b"../secret", b"raw")
    content = inner.read_bytes()
    image = ImageBuilder(MIB)
    for start in range(0, len(content), CLUSTER):
        image.data(start // CLUSTER, content[start : start + CLUSTER])
    image.build(images / IMAGE)
    with kept_in(images) as names, open_image(images / IMAGE) as opened:
        assert opened.pread(len(content), 0) == content
    assert len(opened_files(names)) == 1


def test_what_is_called_an_image_and_is_none(images: Path) -> None:
    overlay(images / IMAGE, b"base", b"qcow2")
    (images / "base").write_bytes(SECRET)
    with kept_in(images):
        refuse(images / IMAGE, NotQcow2Error, "not a qcow2 image")


def test_a_missing_layer_leaves_nothing_open(images: Path) -> None:
    overlay(images / IMAGE, b"middle")
    overlay(images / "middle", b"esc\x1b[2J\xe2\x80\xae")
    with kept_in(images):
        refuse(images / IMAGE, MissingReferenceError, "does not exist")
