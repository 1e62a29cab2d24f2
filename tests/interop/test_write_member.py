"""Members of backups, written from every kind of image and from random changes, held against QEMU's tools."""

from __future__ import annotations

import os
import random
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin import add_bitmap, create_image, disable_bitmap, open_image
from qcow2_plugin.engine.image import Image
from qcow2_plugin.errors import OptionError
from qcow2_plugin.extent import ExtentKind
from qcow2_plugin.format.entries import compressed_location
from qcow2_plugin.operations.changes import Change, RangeKind, changes, estimate
from qcow2_plugin.operations.content_digest import content_digest, opened_raw, recorder
from qcow2_plugin.operations.resize import resize
from qcow2_plugin.operations.write_member import member_chunks, write_member
from tests.support.export_kinds import KINDS, Kind
from tests.support.qemu_bitmaps import add, create
from tests.support.sharing import xfs
from tests.support.tools import convert_to_raw, qemu_img, qemu_img_json, qemu_io

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZE = 8 * MIB + 1536
_BY_NAME = {make.__name__: make for make in KINDS}


@pytest.fixture(params=_BY_NAME, scope="module")
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return _BY_NAME[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def wanted(kind: Kind) -> Path:
    path = kind.path.with_suffix(".wanted")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", *kind.extra, kind.path, path)
    return path


def sound(path: Path) -> dict[str, Any]:
    """What qemu-img says of a member after it has found nothing wrong."""
    report = qemu_img_json("check", path)
    assert not {"leaks", "corruptions", "check-errors"} & {name for name, count in report.items() if count}
    found: dict[str, Any] = report
    return found


@pytest.mark.parametrize("how", [{}, {"compression": "zlib"}, {"compression": "zstd", "threads": 1}])
def test_a_full_member_is_the_disk_and_so_is_its_digest(
    how: dict[str, Any], kind: Kind, wanted: Path, tmp_path: Path
) -> None:
    member = tmp_path / "full.qcow2"
    with open_image(kind.path, **kind.options) as image:
        recording = recorder(image)
        size = image.virtual_size
        write_member(image, changes(image, None), member, virtual_size=size, on_block=recording.told, **how)
        recorded = recording.finish(2)
        digest = content_digest(image)
    sound(member)
    assert convert_to_raw(member) == wanted.read_bytes()
    with opened_raw(wanted) as raw:
        assert content_digest(raw).root == digest.root == recorded.root()
    assert recorded.pack() == digest.leaves.pack()
    assert os.listdir(tmp_path) == [member.name]


def scribble(image: Image, rng: random.Random) -> None:
    """A few of everything that a guest does, at places that are aligned to nothing."""
    size = image.virtual_size
    for _ in range(8):
        offset = rng.randrange(size)
        length = min(size - offset, rng.choice([1, 512, 5000, 65536, 200_000]))
        verb = rng.choice(["write", "write", "text", "zero", "discard", "nothing"])
        if verb == "write":
            image.pwrite(rng.randbytes(length), offset)
        elif verb == "text":
            image.pwrite(b"the same again, " * (length // 16 + 1), min(offset, size - length - 16 & ~15))
        elif verb == "zero":
            image.write_zeroes(offset, length, may_unmap=rng.random() < 0.5)
        elif verb == "discard":
            image.discard(offset, length)
        else:
            image.pwrite(bytes(length), offset)


@pytest.mark.parametrize("compression", [None, "zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [512, 4 * KIB, 64 * KIB, 2 * MIB])
@pytest.mark.parametrize("granularity", [4 * KIB, 64 * KIB])
def test_a_chain_of_increments_is_the_disk_at_every_point(
    cluster_size: int, granularity: int, compression: str | None, tmp_path: Path
) -> None:
    rng = random.Random(f"{cluster_size} {granularity} {compression}")
    disk = tmp_path / "disk.qcow2"
    create_image(disk, SIZE, cluster_size=rng.choice([4 * KIB, 64 * KIB]), extended_l2=False)
    leaves, parent, bitmaps = None, None, None
    for point in range(4):
        with open_image(disk, writable=True) as image:
            scribble(image, rng)
        if point == 2:
            resize(disk, SIZE + 3 * MIB)
        member = tmp_path / f"{point}.qcow2"
        with open_image(disk) as image:
            recording = recorder(image, leaves)
            written = write_member(
                image,
                changes(image, bitmaps, base_size=None if leaves is None else leaves.virtual_size),
                member,
                virtual_size=image.virtual_size,
                cluster_size=cluster_size,
                backing_file=parent,
                backing_format="qcow2" if parent else None,
                compression=compression,
                on_block=recording.told,
            )
            leaves = recording.finish(2)
            assert leaves.root() == content_digest(image).root
        assert written.file_size == member.stat().st_size
        sound(member)
        assert convert_to_raw(member) == convert_to_raw(disk)
        if bitmaps:
            disable_bitmap(disk, bitmaps[0])
        bitmaps, parent = [f"b{point}"], member.name
        add_bitmap(disk, bitmaps[0], granularity=granularity)
    for name in sorted(os.listdir(tmp_path)):
        assert ".partial" not in name


def test_what_is_zeros_now_hides_what_was_there(tmp_path: Path) -> None:
    disk, full, increment = (tmp_path / name for name in ("disk.qcow2", "full.qcow2", "increment.qcow2"))
    create(disk, 2 * MIB)
    qemu_io(disk, "write -P 1 0 2M")
    with open_image(disk) as image:
        write_member(image, changes(image, None), full, virtual_size=2 * MIB)
    add(disk, "since")
    qemu_io(
        disk, "write -z 0 128k", "write -z -u 256k 64k", "discard 512k 64k", "write -P 0 640k 64k", "write -z 704k 4k"
    )
    with open_image(disk) as image:
        counts = estimate(image, ["since"])
        written = write_member(
            image,
            changes(image, ["since"]),
            increment,
            virtual_size=2 * MIB,
            backing_file=full.name,
            backing_format="qcow2",
        )
    assert counts.dirty_data + counts.dirty_zero + counts.dirty_hole == 384 * KIB
    assert counts.clean == 2 * MIB - 384 * KIB
    assert written.zeros == counts.dirty_zero + counts.dirty_hole == 256 * KIB
    assert convert_to_raw(increment) == convert_to_raw(disk)
    kinds = {(each["start"], each["zero"]) for each in qemu_img_json("map", increment) if each["depth"] == 0}
    assert (0, True) in kinds


def test_zeros_take_no_space_in_a_member(tmp_path: Path) -> None:
    disk, member = tmp_path / "disk.qcow2", tmp_path / "member.qcow2"
    create(disk, 64 * MIB)
    qemu_io(disk, "write -P 0 0 32M", "write -P 7 40M 4k")
    with open_image(disk) as image:
        written = write_member(image, changes(image, None), member, virtual_size=64 * MIB)
        packed = write_member(
            image, changes(image, None), tmp_path / "packed", virtual_size=64 * MIB, compression="zlib"
        )
    assert written.data <= 64 * KIB
    assert member.stat().st_blocks * 512 < MIB
    assert packed.file_size < MIB


@pytest.fixture
def scribbled(tmp_path: Path) -> Path:
    disk = tmp_path / "scribbled.qcow2"
    create_image(disk, SIZE)
    with open_image(disk, writable=True) as image:
        for seed in range(4):
            scribble(image, random.Random(seed))
        image.pwrite(random.Random(9).randbytes(MIB), 5 * MIB)
    return disk


@pytest.mark.parametrize("how", [{}, {"compression": "zlib"}, {"compression": "zstd"}])
def test_the_same_disk_makes_the_same_bytes(how: dict[str, Any], scribbled: Path, tmp_path: Path) -> None:
    made = []
    with open_image(scribbled) as image:
        for threads in (1, 2, 5):
            member = tmp_path / f"{threads}.qcow2"
            write_member(image, changes(image, None), member, virtual_size=SIZE, threads=threads, **how)
            made.append(member.read_bytes())
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("cluster_size", [512, 64 * KIB, 2 * MIB])
def test_the_stream_is_the_file(cluster_size: int, scribbled: Path, tmp_path: Path) -> None:
    member = tmp_path / "member.qcow2"
    told: list[tuple[int, int]] = []
    with open_image(scribbled) as image:
        how: dict[str, Any] = {"virtual_size": SIZE, "cluster_size": cluster_size, "backing_file": "below"}
        write_member(image, changes(image, None), member, backing_format="qcow2", **how)
        recording = recorder(image)
        size, chunks = member_chunks(
            image,
            changes(image, None),
            backing_format="qcow2",
            on_block=recording.told,
            progress=lambda done, total: told.append((done, total)),
            **how,
        )
        assert b"".join(chunks) == member.read_bytes()
        assert recording.finish(1).root() == content_digest(image).root
    assert size == member.stat().st_size
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] == written_bytes(told)


def written_bytes(told: list[tuple[int, int]]) -> int:
    """The total that was told from the first."""
    (total,) = {total for _, total in told}
    return total


def test_progress_is_honest(scribbled: Path, tmp_path: Path) -> None:
    told: dict[str | None, list[tuple[int, int]]] = {}
    compressions: tuple[str | None, ...] = (None, "zlib")
    with open_image(scribbled) as image:
        for compression in compressions:
            calls = told.setdefault(compression, [])
            written = write_member(
                image,
                changes(image, None),
                tmp_path / f"{compression}",
                virtual_size=SIZE,
                compression=compression,
                progress=lambda done, total, calls=calls: calls.append((done, total)),  # type: ignore[misc]
            )
            assert calls[-1] == (written.read, written.read)
            assert calls == sorted(calls)
            assert {total for _, total in calls} == {written.read}


def test_an_increment_reads_what_is_dirty_and_no_more(tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    create_image(disk, 32 * MIB)
    rng = random.Random(1)
    with open_image(disk, writable=True) as image:
        image.pwrite(rng.randbytes(16 * MIB), 0)
    add_bitmap(disk, "since", granularity=64 * KIB)
    with open_image(disk, writable=True) as image:
        for cluster in rng.sample(range(256), 40):
            image.pwrite(rng.randbytes(100), cluster * 64 * KIB + 77)
    with open_image(disk) as image:
        counts = estimate(image, ["since"])
        read = count_reads(image)
        recording = recorder(image, content_digest(image).leaves)
        del read[:]
        written = write_member(
            image,
            changes(image, ["since"]),
            tmp_path / "member",
            virtual_size=32 * MIB,
            backing_file="below",
            backing_format="qcow2",
            on_block=recording.told,
        )
        recording.finish(1)
    assert counts.dirty_data == 40 * 64 * KIB == written.read == sum(read)


def test_small_clusters_make_few_blocks_that_are_read_twice(tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    create_image(disk, 8 * MIB, cluster_size=4 * KIB)
    with open_image(disk, writable=True) as image:
        image.pwrite(random.Random(1).randbytes(4 * MIB), 12 * KIB)
    with open_image(disk) as image:
        wanted = content_digest(image).root
        read = count_reads(image)
        recording = recorder(image)
        member = tmp_path / "member"
        told = recording.told
        write_member(image, changes(image, None), member, virtual_size=8 * MIB, cluster_size=4 * KIB, on_block=told)
        assert recording.finish(1).root() == wanted
    assert sum(read) == 4 * MIB + 2 * 64 * KIB


def test_blocks_are_shared_where_the_file_system_can(tmp_path: Path) -> None:
    with xfs(tmp_path) as directory:
        disk, member = directory / "disk.qcow2", directory / "member"
        create_image(disk, 64 * MIB)
        with open_image(disk, writable=True) as image:
            image.pwrite(random.Random(1).randbytes(16 * MIB), 20 * MIB)
        os.sync()
        before = os.statvfs(directory).f_bfree
        with open_image(disk) as image:
            written = write_member(image, changes(image, None), member, virtual_size=64 * MIB)
        os.sync()
        used = (before - os.statvfs(directory).f_bfree) * os.statvfs(directory).f_frsize
        assert written.data == 16 * MIB
        assert used < 2 * MIB
        sound(member)
        assert convert_to_raw(member) == convert_to_raw(disk)


def test_a_stream_can_be_left(scribbled: Path) -> None:
    with open_image(scribbled) as image:
        _, chunks = member_chunks(image, changes(image, None), virtual_size=SIZE)
        read = count_reads(image)
        for _, _ in zip(range(8), chunks, strict=False):
            pass
        chunks.close()
        done = len(read)
        time.sleep(0.05)
        assert len(read) == done


def count_reads(image: Image) -> list[int]:
    """The bytes of each read of the disk from now on."""
    lengths: list[int] = []
    read_into = image.read_into

    def counted(buffer: memoryview, offset: int) -> None:
        lengths.append(len(buffer))
        read_into(buffer, offset)

    image.read_into = counted  # type: ignore[method-assign]
    return lengths


def test_a_percent_of_a_large_disk_costs_what_a_percent_does(tmp_path: Path) -> None:
    """Twenty times the disk and as many changes: the same work, and a disk of 32 TiB is none."""
    took = []
    for size in (64 * GIB, 32 << 40):
        disk = tmp_path / f"{size}.qcow2"
        create_image(disk, size)
        add_bitmap(disk, "since", granularity=MIB)
        with open_image(disk, writable=True) as image:
            for number in range(200):
                image.pwrite(b"changed", number * (size // 200) & ~0xFFFF)
        with open_image(disk) as image:
            start = time.process_time()
            member = tmp_path / f"{size}.member"
            how: dict[str, Any] = {"virtual_size": size, "backing_file": "below", "backing_format": "qcow2"}
            written = write_member(image, changes(image, ["since"], with_clean=False), member, **how)
            took.append(time.process_time() - start)
        assert written.read == 200 * 64 * KIB
    assert took[1] < 10 * took[0] + 1


@pytest.mark.parametrize("cluster_size", [512, 64 * KIB, 2 * MIB])
def test_deflate_keeps_to_the_window_that_qemu_has(cluster_size: int, tmp_path: Path) -> None:
    disk, member = tmp_path / "disk.qcow2", tmp_path / "member.qcow2"
    create_image(disk, 4 * MIB)
    rng = random.Random(3)
    far = rng.randbytes(20_000)  # whose repetition is out of reach of a window of 4 KiB
    with open_image(disk, writable=True) as image:
        image.pwrite((far + b"a" * 3000) * 60, 0)
    for level in range(4):
        with open_image(disk) as image:
            how: dict[str, Any] = {"cluster_size": cluster_size, "compression": "zlib", "level": level}
            write_member(image, changes(image, None), member, virtual_size=4 * MIB, **how)
        sound(member)
        assert convert_to_raw(member) == convert_to_raw(disk)
        stored = member.read_bytes()
        with open_image(member) as image:
            bits = image.header.cluster_bits
            count = 0
            for cluster in range(4 * MIB // cluster_size):
                (extent,) = image.clusters(cluster * cluster_size, cluster_size)
                if extent.kind is ExtentKind.COMPRESSED and extent.host_offset is not None:
                    decoder = zlib.decompressobj(-12)
                    start = extent.host_offset
                    assert len(decoder.decompress(stored[start : start + extent.stored_length])) == cluster_size
                    count += 1
        assert count
        assert compressed_location(1 << 62 | 512, bits) == (512, 512)
        member.unlink()


def test_levels_that_are_none_are_refused(scribbled: Path, tmp_path: Path) -> None:
    with open_image(scribbled) as image:
        for how in ({"compression": "zlib", "level": 4}, {"compression": "zstd", "level": 0}, {"compression": "lz"}):
            with pytest.raises(OptionError):
                write_member(image, changes(image, None), tmp_path / "member", virtual_size=SIZE, **how)
    assert os.listdir(tmp_path) == [scribbled.name]


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_failure_leaves_nothing(
    compression: str | None, scribbled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_image(scribbled) as image:

        def failing(*_: object) -> None:
            raise OSError(5, "the disk fell out", "there")

        with pytest.raises(OSError, match="fell out"):
            write_member(
                image,
                changes(image, None),
                tmp_path / "member",
                virtual_size=SIZE,
                compression=compression,
                on_block=failing,
            )
        (tmp_path / "taken").write_bytes(b"somebody's")
        with pytest.raises(FileExistsError):
            write_member(image, changes(image, None), tmp_path / "taken", virtual_size=SIZE, compression=compression)
        with pytest.raises(OptionError, match="changes up to"):
            write_member(image, changes(image, None), tmp_path / "member", virtual_size=SIZE - 512)
    assert sorted(os.listdir(tmp_path)) == [scribbled.name, "taken"]
    assert (tmp_path / "taken").read_bytes() == b"somebody's"


def test_clusters_that_are_dirty_in_part_are_kept_whole(tmp_path: Path) -> None:
    """By changes that are told by hand: zeros beside what is clean, in one cluster."""
    disk = tmp_path / "disk.qcow2"
    create_image(disk, MIB, cluster_size=4 * KIB)
    with open_image(disk, writable=True) as image:
        image.pwrite(b"x" * MIB, 0)
    below = tmp_path / "below.qcow2"
    with open_image(disk) as image:
        write_member(image, changes(image, None), below, virtual_size=MIB)
    with open_image(disk, writable=True) as image:
        image.write_zeroes(60 * KIB, 136 * KIB)
        image.write_zeroes(520 * KIB, 8 * KIB)
    told = [
        Change(0, 60 * KIB, RangeKind.CLEAN),
        Change(60 * KIB, 36 * KIB, RangeKind.DIRTY_ZERO),
        Change(96 * KIB, 100 * KIB, RangeKind.DIRTY_HOLE),
        Change(520 * KIB, 8 * KIB, RangeKind.DIRTY_ZERO),
    ]
    member = tmp_path / "member.qcow2"
    with open_image(disk) as image:
        written = write_member(image, told, member, virtual_size=MIB, backing_file=below.name, backing_format="qcow2")
    assert written.read == 3 * 64 * KIB
    assert written.zeros == 128 * KIB
    assert convert_to_raw(member) == convert_to_raw(disk)
