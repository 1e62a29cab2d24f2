"""Files that were cut short: never zeros where data was.

To whoever only follows pointers, an image that lost its tail looks healthy, with zeros in place of the disk. So every
cut comes out when the image is opened. Two cuts cannot: one behind the last byte that the guest needs, and one inside
the last cluster of the file, since the format lets a file end there, with zeros to the end of that cluster.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import CorruptImageError, NotQcow2Error, Qcow2Error, TruncatedImageError
from tests.support.hostile import assert_harmless_text, look
from tests.support.tools import ToolError, convert_to_raw, qemu_img, qemu_io
from tests.support.watching import no_descriptor_left

MIB = 1 << 20
SIZE = 2 * MIB
CUTS = 40
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
NAME = "disk.qcow2"
DATA_NAME = "disk.data"


@dataclass(frozen=True)
class Kind:
    """Images of one kind, as qemu-img makes them."""

    name: str
    options: str = ""
    convert: tuple[str, ...] = ()
    has_snapshot: bool = False
    cluster_size: int = 65536
    data_name: str | None = None

    def __str__(self) -> str:
        return self.name


PLAIN = Kind("plain")
KINDS = [
    PLAIN,
    Kind("version 2", "compat=0.10"),
    Kind("deflate", convert=("-c",)),
    Kind("zstd", "compression_type=zstd", convert=("-c",)),
    Kind("extended L2", "extended_l2=on"),
    Kind("4 KiB clusters", "cluster_size=4096", cluster_size=4096),
    Kind("512-byte clusters", "cluster_size=512", cluster_size=512),
    Kind("refcounts of 1 bit", "refcount_bits=1"),
    Kind("lazy refcounts", "lazy_refcounts=on"),
    Kind("snapshot", has_snapshot=True),
    Kind("data file", f"data_file={DATA_NAME}", data_name=DATA_NAME),
    Kind("raw data file", f"data_file={DATA_NAME},data_file_raw=on", data_name=DATA_NAME),
]


def disk_content() -> bytes:
    """Half of the disk is data in pieces of many sizes, all of it other than zeros; half are holes."""
    numbers = random.Random(7)
    content = bytearray(SIZE)
    offset = 0
    while offset < SIZE:
        length = min(numbers.choice((4096, 12288, 65536, 200 * 1024)), SIZE - offset)
        content[offset : offset + length] = bytes(numbers.choices(range(1, 200), k=length))
        offset += 2 * length
    content[-4096:] = b"e" * 4096
    return bytes(content)


@dataclass(frozen=True)
class Made:
    """A sound image, and everything to compare with."""

    kind: Kind
    directory: Path
    image: bytes
    data: bytes | None
    content: bytes
    snapshot: bytes | None


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Made]:
    kept: dict[str, Made] = {}

    def make_once(kind: Kind) -> Made:
        if kind.name not in kept:
            kept[kind.name] = make_image(kind, tmp_path_factory.mktemp("truncation"))
        return kept[kind.name]

    return make_once


def make_image(kind: Kind, directory: Path) -> Made:
    raw, path = directory / "raw", directory / NAME
    raw.write_bytes(disk_content())
    options = kind.options.replace(DATA_NAME, str(directory / DATA_NAME))
    arguments = ["-o", options] if options else []
    qemu_img("convert", "-q", "-f", "raw", "-O", "qcow2", *kind.convert, *arguments, raw, path)
    if kind.has_snapshot:
        qemu_img("snapshot", "-c", "before", path)
        qemu_io(path, *(f"write -P 0x77 {offset} 16k" for offset in range(0, SIZE, 300 * 1024)))
    given: dict[str, Any] = {"data_file": directory / kind.data_name} if kind.data_name else {}
    with open_image(path, **given) as image:
        content = image.pread(SIZE, 0)
        snapshot = image.at_snapshot("before").pread(SIZE, 0) if kind.has_snapshot else None
    assert content == qemu_reading(kind, path)
    data = (directory / kind.data_name).read_bytes() if kind.data_name else None
    return Made(kind, directory, path.read_bytes(), data, content, snapshot)


def qemu_reading(kind: Kind, path: Path) -> bytes:
    if kind.data_name is None:
        return convert_to_raw(path)
    data = path.parent / kind.data_name
    source = f"driver=qcow2,file.driver=file,file.filename={path},data-file.driver=file,data-file.filename={data}"
    return convert_to_raw(source, extra=("--image-opts",))


def cut_points(image: bytes) -> list[int]:
    """The edges of the header and of every table, the last byte, and places in between."""
    size = len(image)
    cluster_size = 1 << word(image, 20, "I")
    edges = {0, 4, 71, 72, 103, 104, 111, 112, cluster_size - 1, cluster_size, size - 1}
    l1_offset, l1_size, refcounts = word(image, 40, "Q"), word(image, 36, "I"), word(image, 48, "Q")
    l2_offsets = [word(image, l1_offset + 8 * index, "Q") & OFFSET_MASK for index in range(l1_size)]
    tables = [l1_offset, refcounts, word(image, refcounts, "Q"), word(image, 64, "Q"), *l2_offsets[:3], l2_offsets[-1]]
    for table in tables:
        edges |= {table, table + 1, table + 8, table + cluster_size - 1}
    edges |= {l1_offset + 8 * l1_size, l1_offset + 8 * l1_size - 1}
    found = {edge for edge in edges if 0 <= edge < size}
    numbers = random.Random(size)
    while len(found) < CUTS:
        found.add(numbers.randrange(size))
    return sorted(found)


def word(image: bytes, offset: int, code: str) -> int:
    return int(struct.unpack_from(">" + code, image, offset)[0])


@dataclass(frozen=True)
class Cut:
    """One cut, done; `is_in_last_cluster` says that the format allows the file to end there."""

    made: Made
    length: int
    path: Path
    is_in_last_cluster: bool

    def write(self) -> None:
        self.path.write_bytes(self.made.image[: self.length])

    def options(self) -> dict[str, Any]:
        data_name = self.made.kind.data_name
        return {"data_file": self.path.parent / data_name} if data_name else {}


def cuts(made: Made, directory: Path) -> Iterator[Cut]:
    path = directory / NAME
    if made.data is not None:
        (directory / DATA_NAME).write_bytes(made.data)
    for length in cut_points(made.image):
        last_cluster = (len(made.image) - 1) // made.kind.cluster_size * made.kind.cluster_size
        cut = Cut(made, length, path, length > last_cluster)
        cut.write()
        yield cut


def explain(sound: bytes, found: bytes, cut: Cut) -> str:
    """What is wrong with having read `found` where there was `sound`; "" if that is what the format says."""
    if found == sound:
        return ""
    differing = [index for index in range(0, SIZE, 512) if found[index : index + 512] != sound[index : index + 512]]
    what = f"cut at {cut.length}: silently lost {len(differing)} sectors, from {differing[0]:#x} on"
    if not cut.is_in_last_cluster:
        return what
    lost = len(cut.made.image) - cut.length
    first, last = differing[0], differing[-1] + 512
    is_tail = last - first <= lost + 512 and not any(found[first + 512 : last])
    return "" if is_tail else what


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_cut_comes_out_when_the_image_is_opened(kind: Kind, make: Callable[[Kind], Made], tmp_path: Path) -> None:
    made = make(kind)
    problems = []
    found_out = 0
    with no_descriptor_left():
        for cut in cuts(made, tmp_path):
            outcome = look(cut.path, **cut.options())
            if outcome.stage == "open":
                assert isinstance(outcome.error, NotQcow2Error | CorruptImageError), outcome.error
                assert_harmless_text(str(outcome.error))
                found_out += 1
            elif outcome.stage == "read":
                if not cut.is_in_last_cluster:
                    problems.append(f"cut at {cut.length}: opened, then {outcome.error}")
            else:
                problems += filter(None, [explain(made.content, outcome.content, cut)])
    assert not problems, "\n".join(problems)
    assert found_out >= CUTS // 2


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_allow_damaged_reads_what_qemu_reads(kind: Kind, make: Callable[[Kind], Made], tmp_path: Path) -> None:
    """Where the header is whole, and no L1 entry is halved: half an entry is none, but QEMU sees zeros behind it."""
    made = make(kind)
    problems = []
    l1_table = range(word(made.image, 40, "Q"), word(made.image, 40, "Q") + 8 * word(made.image, 36, "I"))
    for cut in [cut for cut in cuts(made, tmp_path) if cut.length >= 112][::3]:
        if cut.length in l1_table and cut.length % 8:
            continue
        cut.write()
        ours = look(cut.path, allow_damaged=True, **cut.options())
        try:
            theirs = qemu_reading(kind, cut.path)
        except ToolError:
            if ours.error is None:
                problems.append(f"cut at {cut.length}: QEMU refuses, we read")
        else:
            if ours.error is not None:
                problems.append(f"cut at {cut.length}: QEMU reads, we say {ours.error}")
            elif ours.content != theirs:
                problems.append(f"cut at {cut.length}: not what QEMU reads")
    assert not problems, "\n".join(problems)


def test_a_cut_that_spoils_a_snapshot_comes_out_when_it_is_read(make: Callable[[Kind], Made], tmp_path: Path) -> None:
    kind = next(kind for kind in KINDS if kind.has_snapshot)
    made = make(kind)
    assert made.snapshot not in (None, made.content)
    problems: list[str] = []
    for cut in cuts(made, tmp_path):
        try:
            with open_image(cut.path, snapshot="before") as image:
                content = image.pread(SIZE, 0)
        except Qcow2Error as error:
            assert_harmless_text(str(error))
        else:
            problems += filter(None, [explain(made.snapshot or b"", content, cut)])
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", ["data file", "raw data file"])
def test_a_short_data_file_ends_in_zeros(name: str, make: Callable[[Kind], Made], tmp_path: Path) -> None:
    made = make(next(kind for kind in KINDS if kind.name == name))
    assert made.data is not None
    path, data = tmp_path / NAME, tmp_path / DATA_NAME
    path.write_bytes(made.image)
    for length in range(0, len(made.data), len(made.data) // 12):
        data.write_bytes(made.data[:length])
        outcome = look(path, data_file=data)
        assert outcome.error is None
        assert outcome.content == made.content[:length].ljust(len(made.content), b"\0")


@pytest.mark.parametrize("length", [0, 4, 71])
def test_a_file_without_a_whole_header_is_refused_even_if_damage_is_allowed(
    length: int, make: Callable[[Kind], Made], tmp_path: Path
) -> None:
    """QEMU takes what is missing of a header for zeros; a file that short is no image to anybody else."""
    path = tmp_path / NAME
    path.write_bytes(make(PLAIN).image[:length])
    assert isinstance(look(path, allow_damaged=True).error, NotQcow2Error)


def test_refcounts_past_the_end_are_no_proof_of_a_cut(make: Callable[[Kind], Made], tmp_path: Path) -> None:
    """A crash leaves them too, and nobody needs those clusters."""
    made = make(PLAIN)
    path = tmp_path / NAME
    refcounts = word(made.image, word(made.image, 48, "Q"), "Q")
    image = bytearray(made.image)
    image[refcounts + 2 * 5000 : refcounts + 2 * 5000 + 2] = b"\0\1"
    path.write_bytes(image)
    assert look(path).content == made.content
    path.write_bytes(image[: 20 * 65536 - 1])
    assert isinstance(look(path).error, TruncatedImageError)
