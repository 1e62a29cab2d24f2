"""Headers that lie: what no sound image says in its first cluster is refused when the image is opened."""

from __future__ import annotations

import itertools
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin.errors import CorruptImageError, NotQcow2Error, TruncatedImageError, UnsupportedFeatureError
from tests.support.builder import ImageBuilder, patch
from tests.support.fields import BACKING_FORMAT, BITMAPS, DATA_FILE, ENCRYPTION, FEATURE_NAMES, HEADER_FIELDS
from tests.support.hostile import IMAGE, Hostile, assert_harmless_text, bytes_of, check, look
from tests.support.watching import no_descriptor_left

MIB = 1 << 20
CLUSTER = 1 << 16
UNKNOWN_EXTENSION = 0x12345678
ESCAPES = b"\x1b[2J\r\n\x07\x9b\xe2\x80\xae\x7f"


def header(virtual_size: int = MIB, **fields: int) -> Callable[[Path], object]:
    """A sound image with some header fields replaced."""
    return ImageBuilder(virtual_size, header=fields).data(0, b"first").data(15, b"last").build


def built(virtual_size: int = MIB, cluster_bits: int = 16, **options: Any) -> ImageBuilder:
    return ImageBuilder(virtual_size, cluster_bits, **options).data(0, b"first")


def patched(offset: int, data: bytes) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        built().build(path)
        patch(path, offset, data)

    return make


def with_extension(type: int, data: bytes = b"", **options: Any) -> Callable[[Path], object]:
    return built().extension(type, data, **options).build


def many_extensions(count: int) -> Callable[[Path], object]:
    image = ImageBuilder(MIB, 18)
    for number in range(count):
        image.extension(0x1000_0000 + number, b"")
    return image.data(0, b"first").build


MAGIC_AND_VERSION = [
    *(Hostile(f"version {n}", header(version=n), UnsupportedFeatureError, "version") for n in (0, 1, 4, 2**32 - 1)),
    Hostile("empty file", lambda path: path.write_bytes(b""), NotQcow2Error),
    Hostile("magic alone", lambda path: path.write_bytes(b"QFI\xfb"), NotQcow2Error),
    Hostile("zeros", lambda path: path.write_bytes(bytes(CLUSTER)), NotQcow2Error),
]
CLUSTER_BITS = [
    Hostile(f"cluster_bits {n}", header(cluster_bits=n), CorruptImageError, "cluster_bits")
    for n in (0, 8, 22, 63, 2**32 - 1)
]
HEADER_LENGTH = [
    *(
        Hostile(f"header_length {n}", header(header_length=n), CorruptImageError, "header_length")
        for n in (0, 71, 72, 103, CLUSTER + 8, 2**32 - 8, 2**32 - 1)
    ),
    *(
        Hostile(
            f"header_length {n}",
            header(header_length=n),
            CorruptImageError,
            "header_length",
            differs="QEMU 7.2 does not see that the length is no multiple of 8",
        )
        for n in (105, 111)
    ),
    *(Hostile(f"sound header of {n} bytes", built(header_length=n).build) for n in (104, 112, 120, 4096)),
]
SIZES = [
    Hostile("size 2^63-1", header(size=2**63 - 1), CorruptImageError, "too small"),
    Hostile("size 2^63", header(size=2**63), CorruptImageError, "too large"),
    Hostile("size 2^64-1", header(size=2**64 - 1), CorruptImageError, "too large"),
    Hostile("size beyond the L1 table", header(size=(512 << 20) + 512), CorruptImageError, "too small"),
    Hostile("size that is no multiple of 512", header(size=MIB - 1)),
    Hostile("size of 511 bytes", header(size=511)),
    Hostile("size 0", header(size=0)),
    Hostile("l1_size 0", header(l1_size=0), CorruptImageError, "too small"),
    Hostile("l1_size too small", header(1 << 30, l1_size=1), CorruptImageError, "too small", qemu="info"),
    Hostile("l1_size 4 Mi", built(l1_size=4 << 20).build),
    Hostile("l1_size 4 Mi + 1", header(l1_size=(4 << 20) + 1), CorruptImageError, "too large"),
    Hostile("l1_size 2^32-1", header(l1_size=2**32 - 1), CorruptImageError, "too large"),
    Hostile("refcount_order 7", header(refcount_order=7), CorruptImageError, "refcount_order"),
    Hostile("refcount_order 2^32-1", header(refcount_order=2**32 - 1), CorruptImageError, "refcount_order"),
    Hostile("refcounts of 16 bits called 64", header(refcount_order=6)),
    Hostile("refcounts of 16 bits called 1", header(refcount_order=0)),
    Hostile("65537 snapshots", header(nb_snapshots=65537, snapshots_offset=2 * CLUSTER), CorruptImageError, "too many"),
    Hostile("snapshot table unaligned", header(snapshots_offset=1), CorruptImageError, "not aligned"),
    Hostile("snapshot table at 2^63", header(snapshots_offset=2**63), CorruptImageError, "snapshot table"),
]
FEATURES = [
    Hostile("incompatible bit 5", built(incompatible=1 << 5).build, UnsupportedFeatureError, "bit 5"),
    Hostile("incompatible bit 63", built(incompatible=1 << 63).build, UnsupportedFeatureError, "bit 63"),
    Hostile("all compatible bits", built(compatible=2**64 - 1).build),
    Hostile("unknown autoclear bits", built(autoclear=2**64 - 4).build),
    Hostile(
        "raw data file bit without a data file",
        built(autoclear=2).build,
        CorruptImageError,
        "raw data file",
        qemu="read",
    ),
    Hostile("corrupt bit", built(incompatible=2).build),
    Hostile("dirty bit", built(incompatible=1).build),
    Hostile("compression type 2", header(compression_type=2), UnsupportedFeatureError, "compression type"),
    Hostile("compression type 255", built(incompatible=8, header={"compression_type": 255}).build,
            UnsupportedFeatureError, "compression type"),
    Hostile("compression bit with deflate", built(incompatible=8).build, CorruptImageError, "compression type"),
    Hostile("zstd without its bit", header(compression_type=1), CorruptImageError, "compression type"),
    Hostile("extended L2 with 4 KiB clusters", built(cluster_bits=12, incompatible=16).build, CorruptImageError,
            "extended L2"),
    Hostile("extended L2 with 512-byte clusters", built(cluster_bits=9, incompatible=16).build, CorruptImageError,
            "extended L2"),
]  # fmt: skip
EXTENSIONS = [
    Hostile("length 2^32-1", with_extension(UNKNOWN_EXTENSION, b"x", length=2**32 - 1), CorruptImageError, "too large"),
    Hostile("length past the cluster", with_extension(UNKNOWN_EXTENSION, b"x", length=CLUSTER), CorruptImageError,
            "too large"),
    Hostile("length into the backing name", built().extension(UNKNOWN_EXTENSION, b"12345678", length=32)
            .backing(b"none", b"raw").build, CorruptImageError, "too large"),
    Hostile("no end marker", built(end_marker=False).build),
    Hostile("known type twice", built().extension(BACKING_FORMAT, b"raw").extension(BACKING_FORMAT, b"qcow2").build),
    Hostile("10000 of them", many_extensions(10_000)),
    Hostile("backing format of 16 bytes", with_extension(BACKING_FORMAT, b"x" * 16), CorruptImageError, "15 bytes"),
    Hostile("unknown one", with_extension(UNKNOWN_EXTENSION, ESCAPES)),
    Hostile("feature names cut off", with_extension(FEATURE_NAMES, b"x" * 47)),
    Hostile("data file name without a data file", with_extension(DATA_FILE, b"/etc/passwd")),
    Hostile("bitmaps without their bit", with_extension(BITMAPS, bytes(24))),
    Hostile("bitmaps extension of 23 bytes without its bit", with_extension(BITMAPS, bytes(23)),
            differs="QEMU refuses the disk because of an extension that is void"),
]  # fmt: skip
FULL = b"f" * 1023
BACKING_NAMES = [
    Hostile("in cluster 1", header(backing_file_offset=CLUSTER, backing_file_size=8), CorruptImageError, "backing"),
    Hostile("crossing the end of cluster 0", header(backing_file_offset=CLUSTER - 4, backing_file_size=8),
            CorruptImageError, "header cluster"),
    Hostile("of 1024 bytes", header(backing_file_offset=1024, backing_file_size=1024), CorruptImageError, "too long"),
    Hostile("of 2^32-1 bytes", header(backing_file_offset=1024, backing_file_size=2**32 - 1), CorruptImageError,
            "too long"),
    Hostile("at 2^62", header(backing_file_offset=1 << 62, backing_file_size=8), CorruptImageError, "header cluster"),
    Hostile("at 2^64-1", header(backing_file_offset=2**64 - 1, backing_file_size=8), CorruptImageError,
            "header cluster"),
    Hostile("inside the header", header(backing_file_offset=64, backing_file_size=8), CorruptImageError,
            "inside the header",
            differs="QEMU takes the zeros there for a name, and an empty name for none"),
    Hostile("inside an extension", built().extension(UNKNOWN_EXTENSION, b"x" * 64).backing(b"none", None, offset=150)
            .build, CorruptImageError, "too large"),
    Hostile("size without an offset", header(backing_file_size=1023)),
]  # fmt: skip
ENCRYPTION_METHODS = [
    Hostile("AES", header(crypt_method=1), UnsupportedFeatureError, "encrypted (AES)"),
    Hostile("LUKS without its extension", header(crypt_method=2), CorruptImageError, "do not agree", qemu=""),
    Hostile("method 3", header(crypt_method=3), UnsupportedFeatureError, "method 3"),
    Hostile("method 2^32-1", header(crypt_method=2**32 - 1), UnsupportedFeatureError, "encryption method"),
    Hostile("LUKS extension without the method", with_extension(ENCRYPTION, struct.pack(">QQ", CLUSTER, 592)),
            CorruptImageError, "do not agree"),
    Hostile("LUKS area at 0", built().luks(bytes(4096), offset=0).build, CorruptImageError, "points to"),
    Hostile("LUKS area unaligned", built().luks(bytes(4096), offset=CLUSTER + 512).build, CorruptImageError,
            "points to"),
    Hostile("LUKS area at 2^63", built().luks(bytes(4096), offset=1 << 63).build, CorruptImageError, "points to"),
    Hostile("LUKS area of 2^64-1 bytes", built().luks(bytes(4096), length=2**64 - 1).build, CorruptImageError,
            "points to"),
    Hostile("LUKS area past the end of the file", built().luks(bytes(4096), offset=1 << 40).build,
            UnsupportedFeatureError, "encrypted (LUKS)"),
    Hostile("LUKS area in the L1 table", built().luks(bytes(4096), offset=CLUSTER).build, UnsupportedFeatureError,
            "encrypted (LUKS)"),
    Hostile("LUKS extension of 15 bytes", built(header={"crypt_method": 2}).extension(ENCRYPTION, bytes(15)).build,
            CorruptImageError, "15 bytes"),
]  # fmt: skip
IMAGES = [
    *MAGIC_AND_VERSION, *CLUSTER_BITS, *HEADER_LENGTH, *SIZES, *FEATURES, *EXTENSIONS, *BACKING_NAMES,
    *ENCRYPTION_METHODS,
]  # fmt: skip


@pytest.mark.parametrize("hostile", MAGIC_AND_VERSION + CLUSTER_BITS + HEADER_LENGTH, ids=str)
def test_first_fields(hostile: Hostile, tmp_path: Path) -> None:
    check(hostile, tmp_path)


@pytest.mark.parametrize("hostile", SIZES, ids=str)
def test_sizes(hostile: Hostile, tmp_path: Path) -> None:
    check(hostile, tmp_path)


@pytest.mark.parametrize("hostile", FEATURES, ids=str)
def test_features(hostile: Hostile, tmp_path: Path) -> None:
    check(hostile, tmp_path)


@pytest.mark.parametrize("hostile", EXTENSIONS, ids=str)
def test_extensions(hostile: Hostile, tmp_path: Path) -> None:
    check(hostile, tmp_path)


@pytest.mark.parametrize("hostile", BACKING_NAMES, ids=str)
def test_place_of_the_backing_name(hostile: Hostile, tmp_path: Path) -> None:
    check(hostile, tmp_path)


@pytest.mark.parametrize("hostile", ENCRYPTION_METHODS, ids=str)
def test_encryption(hostile: Hostile, tmp_path: Path) -> None:
    check(hostile, tmp_path)


def test_every_single_bit_of_the_magic_counts(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    built().build(path)
    for bit in range(32):
        patch(path, 0, struct.pack(">I", 0x514649FB ^ 1 << bit))
        assert isinstance(look(path).error, NotQcow2Error)


def test_every_unknown_incompatible_bit_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    names = [(0, bit, b"feature %d" % bit + ESCAPES) for bit in range(5, 64)]
    built().feature_names(names).build(path)
    for bit in range(5, 64):
        patch(path, HEADER_FIELDS["incompatible_features"][0], struct.pack(">Q", 1 << bit))
        error = look(path).error
        assert isinstance(error, UnsupportedFeatureError)
        assert f"feature {bit}\\x1b[2J" in str(error)
        assert_harmless_text(str(error))


def test_any_field_may_have_any_extreme_alone_or_with_another(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    built().snapshot(b"1", b"one").bitmap(b"bitmap", [(0, 1)]).backing(b"none", b"raw").build(path)
    sound = bytes_of(path, 0, 112)
    variants = {name: [place_value(name, extreme) for extreme in (0, 1, -2, -1)] for name in HEADER_FIELDS}
    singles = [(each,) for values in variants.values() for each in values]
    pairs = [
        pair
        for first, second in itertools.combinations(variants, 2)
        for pair in itertools.product(variants[first][::3], variants[second][::3])
    ]
    longest = 0.0
    with no_descriptor_left():
        for changes in [*singles, *pairs]:
            changed = bytearray(sound)
            for offset, packed in changes:
                changed[offset : offset + len(packed)] = packed
            patch(path, 0, bytes(changed))
            start = time.thread_time()
            error = look(path).error  # anything but an error of ours is a failure
            longest = max(longest, time.thread_time() - start)
            assert_harmless_text(str(error))
    assert len(singles) + len(pairs) == 76 + 684
    assert longest < 0.2


def place_value(name: str, extreme: int) -> tuple[int, bytes]:
    """Where a header field is, and `extreme` (if negative, counted from 2^width) as its bytes."""
    offset, code = HEADER_FIELDS[name]
    width = struct.calcsize(code) * 8
    return offset, struct.pack(">" + code, extreme % (1 << width))


def test_a_header_may_claim_the_longest_name_there_is(tmp_path: Path) -> None:
    path = tmp_path / IMAGE
    built().backing(FULL, b"raw").build(path)
    error = look(path).error
    assert error is not None
    assert "does not exist" in str(error)
    assert not isinstance(error, TruncatedImageError)
