"""QEMU judges the image builder and the reference reader before they judge anything else.

For each image: `qemu-img check` finds nothing wrong, not even a leak, and what `qemu-img convert` reads, what
`ReferenceReader` reads and what the builder was told are the same bytes.
"""

from __future__ import annotations

import json
import os
import random
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.support.builder import ALL_PARTS, ImageBuilder, bits, deflate, huge_empty, patch, set_field, shared_l2_bomb
from tests.support.fields import COMPRESSED, COPIED
from tests.support.reference import CorruptError, ReferenceReader
from tests.support.tools import ToolError, convert_to_raw, create_luks, qemu_img, qemu_img_json, qemu_io, run

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB


def noise(seed: int, length: int = CLUSTER) -> bytes:
    return random.Random(seed).randbytes(length)


def text(seed: int, length: int = CLUSTER) -> bytes:
    """Bytes that compress to about a quarter, so that a few streams cross from one host cluster to the next."""
    return bytes(random.Random(seed).choices(b"abcd", k=length))


def mixed(image: ImageBuilder) -> ImageBuilder:
    """A bit of everything that each version and width can hold."""
    size = image.cluster_size
    image.data(0, noise(0, size)).data(3, noise(1, size // 2)).data(2, b"short")
    return image if image.version == 2 else image.zero(5).zero(6, preallocated=True, payload=noise(2, size))


def widths(cluster_bits: int, refcount_bits: int, version: int = 3) -> ImageBuilder:
    return mixed(ImageBuilder(8 << cluster_bits, cluster_bits, refcount_bits=refcount_bits, version=version))


def many_refcount_blocks() -> ImageBuilder:
    image = ImageBuilder(MIB, 9, refcount_bits=64)
    for cluster in range(0, 2048, 3):
        image.data(cluster, noise(cluster, 512))
    return image


def streams(image: ImageBuilder, count: int = 7) -> ImageBuilder:
    for cluster in range(count):
        image.compressed(cluster, text(cluster, image.cluster_size))
    return image.data(count, noise(count, image.cluster_size))


def subclusters(image: ImageBuilder) -> ImageBuilder:
    size = image.cluster_size
    image.subclusters(0, noise(0, size), allocated=0x0F0F00FF, zero=0xF000FF00)
    image.subclusters(1, noise(1, size), allocated=0, zero=0x80000001, stored=False)
    image.subclusters(2, noise(2, size), allocated=0, zero=0)
    image.data(3, noise(3, size)).zero(4).zero(5, preallocated=True, payload=noise(5, size))
    return image.subclusters(7, noise(7, size), allocated=1 << 31, zero=1)


def frames() -> ImageBuilder:
    content = text(1)
    stream = zstd.compress(content[:1000]) + zstd.compress(content[1000:]) + b"not a frame"
    return ImageBuilder(MIB, compression="zstd").compressed(1, content, stream=stream)


def checksummed_frame() -> ImageBuilder:
    return ImageBuilder(MIB, compression="zstd").compressed(1, text(1), stream=checksummed(text(1)))


def deflate_with_rest() -> ImageBuilder:
    content = text(1)
    image = ImageBuilder(MIB).compressed(0, content, stream=deflate(content) + noise(9, 3000))
    return image.compressed(2, content, stream=deflate(content + text(2)))


def one_sector_short(image: ImageBuilder, stream: bytes, missing: int) -> ImageBuilder:
    """A stream whose last `missing` bytes lie in a sector that the entry does not claim."""
    host_offset = 30 * CLUSTER + (missing - len(stream)) % 512
    sectors = (host_offset + len(stream) - 1) // 512 - host_offset // 512
    return image.compressed(0, b"", stream=stream, host_offset=host_offset, sectors=sectors - 1)


def checksummed(content: bytes) -> bytes:
    return zstd.compress(content, options={zstd.CompressionParameter.checksum_flag: 1})


def vm_state() -> ImageBuilder:
    image = ImageBuilder(MIB, 12).data(1, noise(1, 4096))
    first_beyond = image.l2_entries
    guest = image.map().data(2, noise(2, 4096)).data(first_beyond, noise(3, 4096))
    return image.snapshot(b"1", b"with state", guest, extra=struct.pack(">QQQ", 4096, MIB, 5), vm_state_size=4096)


def shared_cluster() -> ImageBuilder:
    image = ImageBuilder(MIB).data(0, noise(0), host_offset=40 * CLUSTER).data(1, noise(1))
    guest = image.map().data(0, noise(0), host_offset=40 * CLUSTER).data(1, noise(2)).zero(2)
    return image.snapshot(b"7", b"half shared", guest)


def bitmapped() -> ImageBuilder:
    image = ImageBuilder(64 * MIB, 9).data(0, b"x")
    image.bitmap(b"zero").bitmap(b"some", [(MIB, MIB), (63 * MIB, 1)], granularity_bits=12, flags=2)
    image.bitmap(b"full", [(0, 64 * MIB)], granularity_bits=13).bitmap(b"in use", [(5, 1)], flags=1, granularity_bits=9)
    return image.bitmap(b"stored ones", [(0, 64 * MIB)], granularity_bits=14, literal=True)


def unknown_extensions() -> ImageBuilder:
    image = ImageBuilder(MIB).data(0, noise(0)).extension(0x12345678, b"odd length", padding=0xFF, first=True)
    image.feature_names([(0, 0, b"dirty bit"), (2, 63, b"n" * 46)])
    return image.extension(0x12345678, b"").extension(0xFFFFFFFF, b"12345678", padding=0xFF)


PLAIN: dict[str, Callable[[], ImageBuilder]] = {
    "empty": lambda: ImageBuilder(MIB),
    "empty version 2": lambda: ImageBuilder(MIB, version=2),
    "no disk at all": lambda: ImageBuilder(0),
    "size in the middle of a cluster": lambda: mixed(ImageBuilder(6 * CLUSTER + 512)),
    "empty L2 table": lambda: ImageBuilder(8 * MIB, 12).l2_table(2).data(0, b"x"),
    "several L2 tables": lambda: ImageBuilder(MIB, 9).data(0, b"a").data(64, b"b").data(2047, b"c"),
    "L1 table of several clusters": lambda: ImageBuilder(6 * MIB, 9).data(12287, b"last").data(100, b"first"),
    "larger L1 table than needed": lambda: ImageBuilder(MIB, l1_size=9000).data(1, b"x"),
    "header of 104 bytes": lambda: mixed(ImageBuilder(MIB, header_length=104)),
    "header of 160 bytes": lambda: mixed(ImageBuilder(MIB, header_length=160, header_tail=noise(1, 48))),
    "version 2 with an extension": lambda: mixed(ImageBuilder(MIB, version=2).extension(0x1234, b"any")),
    "unknown extensions": unknown_extensions,
    "unknown compatible and autoclear bits": lambda: mixed(ImageBuilder(MIB, compatible=1 << 60, autoclear=1 << 50)),
    "host clusters by choice": lambda: ImageBuilder(MIB).data(0, noise(0), host_offset=1 << 30).data(1, b"near"),
    "host clusters in the way": lambda: ImageBuilder(MIB).data(0, noise(0), host_offset=CLUSTER).data(1, b"x"),
    "file cut inside the last cluster": lambda: ImageBuilder(MIB).data(0, b"x", host_offset=9 * CLUSTER).data(1, b"y"),
    "many refcount blocks": many_refcount_blocks,
    "deflate": lambda: streams(ImageBuilder(MIB)),
    "deflate, nothing shared": lambda: streams(ImageBuilder(MIB, refcount_bits=1, pack=False)),
    "deflate with rests": deflate_with_rest,
    "deflate version 2": lambda: streams(ImageBuilder(MIB, 12, version=2)),
    "deflate in the smallest clusters": lambda: streams(ImageBuilder(MIB, 9)),
    "deflate in the largest clusters": lambda: ImageBuilder(8 * MIB, 21).compressed(2, b"2").compressed(0, b"0"),
    "deflate at an odd offset": lambda: ImageBuilder(MIB).compressed(1, text(1), host_offset=30 * CLUSTER - 77),
    "zstd": lambda: streams(ImageBuilder(MIB, compression="zstd")),
    "zstd frames": frames,
    "zstd frame with checksum": checksummed_frame,
    "subclusters": lambda: subclusters(ImageBuilder(MIB, extended_l2=True)),
    "smallest subclusters": lambda: subclusters(ImageBuilder(MIB, 14, extended_l2=True)),
    "compressed beside subclusters": lambda: streams(ImageBuilder(MIB, 15, extended_l2=True)),
    "snapshot with a map of its own": shared_cluster,
    "snapshot of everything": lambda: streams(ImageBuilder(MIB)).zero(9).snapshot(b"1", b"all").snapshot(b"2", b""),
    "snapshot of a smaller disk": lambda: shared_cluster().snapshot(b"8", b"s", ImageBuilder(CLUSTER).data(0, b"old")),
    "snapshot of version 2": lambda: ImageBuilder(MIB, version=2).data(0, b"x").snapshot(b"1", b"old", extra=b""),
    "snapshot with unknown extra data": lambda: ImageBuilder(MIB).snapshot(
        b"1", b"n", extra=struct.pack(">3Q", 0, MIB, 0) + b"?"),
    "snapshot with VM state": vm_state,
    "bitmaps": bitmapped,
}  # fmt: skip
PLAIN |= {f"version 2, cluster bits {n}": partial(widths, n, 16, 2) for n in (9, 16, 17)}
PLAIN |= {f"cluster bits {n}": partial(widths, n, 16) for n in (9, 12, 14, 18, 21)}
PLAIN |= {f"refcount bits {n}": partial(widths, 16, n) for n in (1, 2, 4, 8, 32, 64)}


def judge(path: Path, image: ImageBuilder, *, backing: bytes = b"", reader: ReferenceReader | None = None) -> None:
    report = qemu_img_json("check", "-f", "qcow2", path)
    assert report["check-errors"] == 0
    assert not report.keys() & {"corruptions", "leaks"}, report
    told = image.expected(backing)
    reader = reader or ReferenceReader(path, backing=backing)
    assert reader.virtual_size == image.virtual_size
    assert reader.read(0, reader.virtual_size) == told
    assert convert_to_raw(path) == told


@pytest.mark.parametrize("name", PLAIN)
def test_qemu_agrees(tmp_path: Path, name: str) -> None:
    path = tmp_path / "disk.qcow2"
    image = PLAIN[name]()
    image.build(path)
    judge(path, image)


@pytest.mark.parametrize("extended_l2", [False, True])
@pytest.mark.parametrize("length", [3 * CLUSTER + 700, 20 * CLUSTER])
def test_qemu_agrees_over_a_raw_backing_file(tmp_path: Path, length: int, extended_l2: bool) -> None:
    backing = noise(99, length)
    (tmp_path / "base.raw").write_bytes(backing)
    image = ImageBuilder(10 * CLUSTER + 512, extended_l2=extended_l2).backing(b"base.raw")
    image = subclusters(image) if extended_l2 else mixed(image).compressed(1, text(1))
    image.build(tmp_path / "disk.qcow2")
    judge(tmp_path / "disk.qcow2", image, backing=backing)


def test_qemu_agrees_over_a_chain(tmp_path: Path) -> None:
    base = mixed(ImageBuilder(3 * CLUSTER + 512))
    base.build(tmp_path / "base.qcow2")
    image = ImageBuilder(MIB, 12, end_marker=False).backing(b"base.qcow2", b"qcow2").zero(1).data(4, noise(4, 4096))
    image.build(tmp_path / "disk.qcow2")
    reader = ReferenceReader(tmp_path / "disk.qcow2", backing=ReferenceReader(tmp_path / "base.qcow2"))
    judge(tmp_path / "disk.qcow2", image, backing=base.expected(), reader=reader)


@pytest.mark.parametrize("name", [b"elsewhere", None])
@pytest.mark.parametrize("extended_l2", [False, True])
@pytest.mark.parametrize("raw", [False, True])
def test_qemu_agrees_with_a_data_file(tmp_path: Path, raw: bool, extended_l2: bool, name: bytes | None) -> None:
    path, data_path = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    image = ImageBuilder(8 * CLUSTER, extended_l2=extended_l2)
    image.data_file(data_path, name and os.fsencode(data_path), raw=raw)
    image = subclusters(image) if extended_l2 else mixed(image)
    image.build(path)
    told = image.expected()
    assert ReferenceReader(path, data_file=data_path).read(0, 8 * CLUSTER) == told
    options = f"driver=qcow2,file.filename={path},data-file.driver=file,data-file.filename={data_path}"
    assert convert_to_raw(options if name is None else path, extra=["--image-opts"] if name is None else []) == told
    if name is not None:
        assert qemu_img_json("check", path)["check-errors"] == 0
        assert qemu_img_json("info", path)["format-specific"]["data"]["data-file-raw"] is raw


@pytest.mark.parametrize("name", [name for name in PLAIN if name.startswith("snapshot")])
def test_qemu_agrees_on_snapshots(tmp_path: Path, name: str) -> None:
    path = tmp_path / "disk.qcow2"
    image = PLAIN[name]()
    image.build(path)
    assert image.snapshots
    for snapshot in image.snapshots:
        told = (snapshot.guest or image).expected()
        reader = ReferenceReader(path, snapshot=snapshot.id.decode())
        assert reader.read(0, reader.virtual_size) == told
        assert convert_to_raw(path, extra=["-l", f"snapshot.id={snapshot.id.decode()}"])[: len(told)] == told


def test_qemu_reads_the_snapshot_fields(tmp_path: Path) -> None:
    vm_state().build(tmp_path / "disk.qcow2")
    (shown,) = qemu_img_json("info", tmp_path / "disk.qcow2")["snapshots"]
    assert shown == {
        "id": "1", "name": "with state", "vm-state-size": 4096, "date-sec": 1_700_000_000, "date-nsec": 0,
        "vm-clock-sec": 0, "vm-clock-nsec": 0, "icount": 5,
    }  # fmt: skip


def test_qemu_reads_the_bitmaps(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    bitmapped().build(path)
    shown = {
        b["name"]: (b["granularity"], b["flags"])
        for b in qemu_img_json("info", path)["format-specific"]["data"]["bitmaps"]
    }
    assert shown == {
        "zero": (65536, []), "some": (4096, ["auto"]), "full": (8192, []), "in use": (512, ["in-use"]),
        "stored ones": (16384, []),
    }  # fmt: skip
    assert bits([(0, 1), (4096 * 8, 4097)], 12) == b"\x01\x03"


@pytest.mark.parametrize(
    ("name", "dirty"), [("zero", []), ("some", [MIB, 4 * KIB]), ("full", [64 * MIB]), ("stored ones", [64 * MIB])]
)
def test_qemu_reads_the_bits(tmp_path: Path, name: str, dirty: list[int]) -> None:
    bitmapped().build(tmp_path / "disk.qcow2")
    server = ["--", "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", name, str(tmp_path / "disk.qcow2"), "]"]
    answer = run("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", *server)
    assert [extent["length"] for extent in json.loads(answer) if extent["type"]] == dirty


def test_a_refcount_table_that_outgrows_its_place_is_moved(tmp_path: Path) -> None:
    """As many clusters as make the first attempt at the table need one more refcount block, and so a larger table."""
    image = ImageBuilder(4 * MIB, 9, refcount_bits=64)
    for cluster in range(3967):
        image.data(cluster, b"x")
    built = image.build(tmp_path / "disk.qcow2")
    assert (built.refcount_table_clusters, built.refcount_table_offset // 512) == (2, 4098)
    judge(tmp_path / "disk.qcow2", image)


def test_streams_are_packed(tmp_path: Path) -> None:
    image = streams(ImageBuilder(MIB))
    offsets = image.build(tmp_path / "disk.qcow2").data_offsets
    lengths = [len(deflate(text(cluster))) for cluster in range(7)]
    assert all(offsets[cluster + 1] == offsets[cluster] + lengths[cluster] for cluster in range(6))
    assert any(offsets[cluster] // CLUSTER != offsets[cluster + 1] // CLUSTER for cluster in range(6))
    image.pack = False
    assert not any(offset % CLUSTER for offset in image.build(tmp_path / "disk.qcow2").data_offsets.values())


def test_qemu_opens_the_luks_area(tmp_path: Path) -> None:
    """The area and the ciphertext come from an image that QEMU made; the ciphertext depends on its host offset."""
    made, path, plain = tmp_path / "made.qcow2", tmp_path / "disk.qcow2", noise(3)
    secret = ["--object", "secret,id=s,data=sesame"]
    create_luks(made, MIB, "sesame")
    (tmp_path / "plain").write_bytes(plain)
    opened = f"driver=qcow2,encrypt.key-secret=s,file.filename={made}"
    qemu_io(opened, f"write -s {tmp_path / 'plain'} 0 64k", options=[*secret, "--image-opts"])
    header = made.read_bytes()
    (area_offset, area_length) = struct.unpack_from(">QQ", header, header.index(struct.pack(">I", 0x0537BE77)) + 8)
    host_offset = ReferenceReader(made).l2_entry(0)[0] & (1 << 56) - 512
    area, ciphertext = header[area_offset:][:area_length], header[host_offset:][:CLUSTER]
    assert ciphertext != plain
    built = ImageBuilder(MIB).luks(area).data(0, ciphertext, host_offset=host_offset).build(path)
    assert path.read_bytes()[built.luks_offset :][:4] == b"LUKS"
    options = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
    assert convert_to_raw(options, extra=[*secret, "--image-opts"]) == plain.ljust(MIB, b"\0")
    assert qemu_img("check", "-q", *secret, "--image-opts", options) == ""


def test_a_cut_file_reads_as_zeros(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image = ImageBuilder(MIB, cut=9 * CLUSTER + 100).data(0, noise(0), host_offset=9 * CLUSTER)
    assert image.build(path).file_size == path.stat().st_size == 9 * CLUSTER + 100
    told = noise(0)[:100].ljust(MIB, b"\0")
    assert ReferenceReader(path).read(0, MIB) == told == convert_to_raw(path)


def test_building_twice_gives_the_same_file(tmp_path: Path) -> None:
    image = bitmapped().snapshot(b"1", b"")
    first, second = image.build(tmp_path / "a"), image.build(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert first.bitmap_data_offsets == second.bitmap_data_offsets


def test_a_short_read_is_part_of_the_long_one(tmp_path: Path) -> None:
    image = mixed(ImageBuilder(MIB, 12))
    image.build(tmp_path / "disk")
    told, reader = image.expected(), ReferenceReader(tmp_path / "disk")
    for offset, length in [(0, 0), (0, 1), (4095, 2), (4097, 9000), (MIB - 1, 1), (MIB, 0)]:
        assert reader.read(offset, length) == told[offset : offset + length]
    with pytest.raises(ValueError, match="not inside"):
        reader.read(MIB, 1)


MADE = [
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=2M",
    "extended_l2=on",
    "compression_type=zstd",
    "lazy_refcounts=on",
]


@pytest.mark.parametrize("compress", [[], ["-c"]])
@pytest.mark.parametrize("option", MADE)
def test_the_reader_agrees_on_what_qemu_makes(tmp_path: Path, option: str, compress: list[str]) -> None:
    content = noise(1, 100_000) + text(2, 200_000) + bytes(400_000) + text(3, 348_576)
    (tmp_path / "raw").write_bytes(content)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *compress, "-o", option, tmp_path / "raw", tmp_path / "disk")
    assert ReferenceReader(tmp_path / "disk").read(0, MIB) == content


# ---- the judges can say no


def test_a_wrong_refcount_is_found(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    built = ImageBuilder(MIB).data(0, b"x").build(path)
    ImageBuilder(MIB).data(0, b"x").refcount(built.data_offsets[0] // CLUSTER, 0).build(path)
    with pytest.raises(ToolError) as caught:
        qemu_img("check", path)
    assert caught.value.returncode == 2
    ImageBuilder(MIB).data(0, b"x", host_offset=20 * CLUSTER).refcount(10, 1).build(path)
    with pytest.raises(ToolError) as caught:
        qemu_img("check", path)
    assert caught.value.returncode == 3


@pytest.mark.parametrize("copied", [False, True])
def test_a_wrong_copied_bit_is_found(tmp_path: Path, copied: bool) -> None:
    path = tmp_path / "disk.qcow2"
    image = ImageBuilder(MIB).data(0, b"x", copied=copied)
    (image.snapshot(b"1", b"s") if copied else image).build(path)
    with pytest.raises(ToolError, match="OFLAG_COPIED"):
        qemu_img("check", path)


REFUSED: dict[str, Callable[[], ImageBuilder]] = {
    "zero flag in version 2": lambda: ImageBuilder(MIB, version=2).entry(0, 1),
    "host offset inside a cluster": lambda: ImageBuilder(MIB).entry(0, COPIED | CLUSTER + 512),
    "L2 table inside a cluster": lambda: ImageBuilder(MIB).l1_entry(0, COPIED | CLUSTER + 512),
    "subcluster allocated and zero": lambda: ImageBuilder(MIB, extended_l2=True).subclusters(
        0, b"", allocated=2, zero=2),
    "subcluster allocated nowhere": lambda: ImageBuilder(MIB, extended_l2=True).entry(0, 0, 1 << 20),
    "deflate stream too short": lambda: ImageBuilder(MIB).compressed(0, b"", stream=deflate(text(1)[:-1])),
    "deflate stream cut": lambda: ImageBuilder(MIB).compressed(0, b"", stream=deflate(text(1)), sectors=5),
    "deflate stream longer than claimed": lambda: one_sector_short(ImageBuilder(MIB), deflate(text(1)), 40),
    "deflate stream of nonsense": lambda: ImageBuilder(MIB).compressed(0, b"", stream=b"\xff" * 600),
    "deflate stream past the end": lambda: ImageBuilder(MIB).entry(0, COMPRESSED | 100 * CLUSTER),
    "zstd frame too long": lambda: ImageBuilder(MIB, compression="zstd").compressed(
        0, b"", stream=zstd.compress(text(1) + b"x")),
    "zstd frame too short": lambda: ImageBuilder(MIB, compression="zstd").compressed(
        0, b"", stream=zstd.compress(text(1)[:-1])),
    "zstd frame without its end": lambda: one_sector_short(
        ImageBuilder(MIB, compression="zstd"), checksummed(text(1)), 4),
    "zstd frame of nonsense": lambda: ImageBuilder(MIB, compression="zstd").compressed(0, b"", stream=noise(1, 600)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_reader_refuses_what_qemu_refuses(tmp_path: Path, name: str) -> None:
    path = tmp_path / "disk.qcow2"
    REFUSED[name]().build(path)
    with pytest.raises(CorruptError):
        ReferenceReader(path).read(0, 512)
    if not name.startswith("L2 table"):
        assert ReferenceReader(path).read(MIB - 512, 512) == bytes(512)
    with pytest.raises(ToolError):
        qemu_io(path, "read 0 512", options=["-r", "-f", "qcow2"])


def test_a_data_file_at_the_wrong_offset_is_refused(tmp_path: Path) -> None:
    path, data_path = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    image = ImageBuilder(MIB).data_file(data_path, os.fsencode(data_path))
    image.data(1, b"x", host_offset=2 * CLUSTER).build(path)
    with pytest.raises(CorruptError, match="in the data file"):
        ReferenceReader(path, data_file=data_path).read(CLUSTER, 1)
    with pytest.raises(ToolError):
        qemu_io(path, "read 64k 512", options=["-r", "-f", "qcow2"])


def test_fields_can_be_any_nonsense(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    built = ImageBuilder(MIB, header={"l1_size": 2**32 - 1, "size": 2**64 - 1}).data(0, b"x").build(path)
    assert path.read_bytes()[36:40] == b"\xff" * 4
    assert path.read_bytes()[24:32] == b"\xff" * 8
    with pytest.raises(ToolError, match="too large"):
        qemu_img("info", path)
    set_field(path, "l1_size", built.l1_size)
    set_field(path, "size", MIB)
    assert qemu_img_json("check", path)["check-errors"] == 0
    patch(path, built.l2_entry_offset(0), bytes(8))
    assert convert_to_raw(path) == bytes(MIB)
    with pytest.raises(AssertionError, match="no such header field"):
        ImageBuilder(MIB, header={"l1_sise": 1}).build(path)


def test_extensions_and_structures_can_lie(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    built = ImageBuilder(MIB).extension(0x1234, b"abc", length=2**32 - 1).build(path)
    ((kind, offset), _) = built.extension_offsets
    assert (kind, path.read_bytes()[offset : offset + 11]) == (0x1234, struct.pack(">II", 0x1234, 2**32 - 1) + b"abc")
    with pytest.raises(ToolError, match="extension too large"):
        qemu_img("info", path)
    ImageBuilder(MIB).backing(b"base", offset=CLUSTER - 2).build(path)
    with pytest.raises(ToolError, match="Backing file name too long"):
        qemu_img("info", path)
    ImageBuilder(MIB).snapshot(b"1", b"n", l1_size=2**32 - 1).build(path)
    with pytest.raises(ToolError):
        qemu_img("snapshot", "-a", "1", path)
    ImageBuilder(MIB).bitmap(b"n", granularity_bits=63).build(path)
    with pytest.raises(ToolError):
        qemu_img("info", path)
    ImageBuilder(MIB).bitmap(b"n").bitmaps_extension(nb_bitmaps=0).build(path)
    with pytest.raises(ToolError, match="zero bitmaps"):
        qemu_img("info", path)


def test_the_bomb_is_an_image(tmp_path: Path) -> None:
    path = tmp_path / "bomb.qcow2"
    built = shared_l2_bomb(path)
    assert path.stat().st_size == built.file_size == 12 * MIB
    assert qemu_img_json("info", path)["virtual-size"] == 64 << 40
    last = (64 << 40) - 512
    assert ReferenceReader(path).read(last, 512) == bytes(512)
    qemu_io(path, f"read -P 0 {last} 512", "read -P 0 37T 4096", options=["-r", "-f", "qcow2"])
    assert ReferenceReader(path).l2_entry(37 << 40) == ReferenceReader(path).l2_entry(0)


def test_the_huge_image_is_an_image(tmp_path: Path) -> None:
    path = tmp_path / "huge.qcow2"
    built = huge_empty(path)
    assert (built.l1_size, path.stat().st_size) == (4 * MIB, 38 * MIB)
    assert path.stat().st_blocks * 512 < MIB
    assert qemu_img_json("info", path)["virtual-size"] == 2 << 60
    assert ReferenceReader(path).read((2 << 60) - 512, 512) == bytes(512)
    qemu_io(path, "read -P 0 1E 4096", options=["-r", "-f", "qcow2"])


def test_all_parts_is_a_whole_cluster(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image = ImageBuilder(MIB, extended_l2=True).subclusters(0, noise(0), allocated=ALL_PARTS)
    image.build(path)
    judge(path, image)
    with pytest.raises(ValueError, match="extended_l2"):
        ImageBuilder(MIB).subclusters(0, b"", allocated=1)
