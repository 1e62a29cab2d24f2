"""The header cluster: every limit at its edge, every extension rule, and the bytes given back as they came."""

from __future__ import annotations

import struct

import pytest

from qcow2_plugin.errors import (
    CorruptImageError,
    NotQcow2Error,
    OptionError,
    Qcow2Error,
    UnsupportedFeatureError,
)
from qcow2_plugin.format.header import (
    CompressionType,
    EncryptionMethod,
    EncryptionPointer,
    Header,
    HeaderExtension,
    header_cluster_size,
)
from tests.support.fields import (
    BACKING_FORMAT,
    BITMAPS,
    DATA_FILE,
    ENCRYPTION,
    FEATURE_NAMES,
    HEADER_FIELDS,
    Extension,
)
from tests.support.headers import header_bytes

TOO_MUCH = 2**63 - 1
L2_COVERAGE = 65536 * 8192  # of the default geometry


def parsed(**told: object) -> Header:
    return Header.parse(header_bytes(**told))  # type: ignore[arg-type] # passed on as they are


def refused(kind: type[Qcow2Error] = CorruptImageError, /, match: str = ".", **told: object) -> None:
    with pytest.raises(kind, match=match) as caught:
        parsed(**told)
    assert type(caught.value) is kind


def bitmaps_extension(count: int = 1, reserved: int = 0, size: int = 32, offset: int = 0x50000) -> Extension:
    return Extension(BITMAPS, struct.pack(">IIQQ", count, reserved, size, offset))


# ---- magic, version, cluster size


def test_every_field_arrives_where_it_belongs() -> None:
    header = parsed(
        size=5 << 20,
        l1_size=77,
        l1_table_offset=0x70000,
        refcount_table_offset=0x80000,
        refcount_table_clusters=2,
        nb_snapshots=3,
        snapshots_offset=0x90000,
        incompatible_features=0b1_0011,
        compatible_features=0x81,
        autoclear_features=0x103,
        refcount_order=6,
    )
    assert (header.version, header.cluster_bits, header.size, header.virtual_size) == (3, 16, 5 << 20, 5 << 20)
    assert (header.l1_size, header.l1_table_offset) == (77, 0x70000)
    assert (header.refcount_table_offset, header.refcount_table_clusters) == (0x80000, 2)
    assert (header.snapshot_count, header.snapshots_offset) == (3, 0x90000)
    assert (header.incompatible_features, header.compatible_features, header.autoclear_features) == (19, 0x81, 0x103)
    assert (header.refcount_order, header.refcount_bits, header.header_length) == (6, 64, 112)
    assert (header.encryption_method, header.compression_type) == (EncryptionMethod.NONE, CompressionType.DEFLATE)
    assert header.extended_l2
    assert not header.has_data_file
    assert header.data_file_raw
    assert (header.backing_file, header.backing_format, header.data_file) == (None, None, None)
    assert (header.bitmaps, header.encryption) == (None, None)
    assert header.geometry.cluster_size == 65536


def test_tables_are_told_by_name_place_and_length() -> None:
    header = parsed(l1_size=77, l1_table_offset=0x70000, nb_snapshots=3, snapshots_offset=0x90000)
    assert sorted(header.tables) == [
        ("L1 table", 0x70000, 77 * 8),
        ("refcount table", 0x10000, 65536),
        ("snapshot table", 0x90000, 3 * 40),
    ]
    assert [table.name for table in parsed(size=0, l1_size=0).tables] == ["refcount table"]


@pytest.mark.parametrize("bit", range(32))
def test_a_magic_wrong_by_one_bit_is_another_format(bit: int) -> None:
    refused(NotQcow2Error, "not a qcow2 image", magic=0x514649FB ^ 1 << bit)


@pytest.mark.parametrize("version", [0, 1, 4, 2**32 - 1])
def test_other_versions_are_unsupported(version: int) -> None:
    refused(UnsupportedFeatureError, f"version {version} ", version=version, length=512)


@pytest.mark.parametrize("cluster_bits", range(9, 22))
def test_every_cluster_size_is_accepted(cluster_bits: int) -> None:
    cluster = header_bytes(cluster_bits=cluster_bits, size=0, l1_size=0)
    assert header_cluster_size(cluster[:72]) == 1 << cluster_bits
    assert Header.parse(cluster).geometry.cluster_bits == cluster_bits


@pytest.mark.parametrize("cluster_bits", [0, 8, 22, 63, 64, 2**32 - 1])
def test_other_cluster_sizes_are_refused(cluster_bits: int) -> None:
    whole = bytearray(header_bytes())
    struct.pack_into(">I", whole, 20, cluster_bits)
    with pytest.raises(CorruptImageError, match=f"cluster_bits is {cluster_bits}, not 9 to 21"):
        Header.parse(bytes(whole))


@pytest.mark.parametrize(("cluster_bits", "sound"), [(13, False), (14, True), (21, True)])
def test_extended_l2_needs_clusters_of_16_kib(cluster_bits: int, sound: bool) -> None:
    told = {"cluster_bits": cluster_bits, "incompatible_features": 1 << 4, "size": 0, "l1_size": 0}
    if sound:
        assert parsed(**told).extended_l2
    else:
        refused(match="extended L2", **told)


@pytest.mark.parametrize("length", [0, 1, 4, 71])
def test_a_file_shorter_than_a_header_is_not_qcow2(length: int) -> None:
    refused(NotQcow2Error, length=length)


@pytest.mark.parametrize("length", [72, 103, 104, 111])
def test_a_file_that_ends_inside_the_header_is_corrupt(length: int) -> None:
    refused(match="ends inside the header", length=length)


def test_a_file_may_end_right_behind_the_header() -> None:
    header = parsed(length=112)
    assert (header.extensions, header.has_end_marker) == ((), False)
    assert parsed(version=2, length=72).extensions == ()


# ---- limits, each below, at and above


@pytest.mark.parametrize(
    ("size", "virtual_size"), [(0, 0), (511, 0), (512, 512), (1023, 512), (1 << 20, 1 << 20), ((1 << 20) - 1, 1048064)]
)
def test_an_odd_size_is_rounded_down(size: int, virtual_size: int) -> None:
    header = parsed(size=size)
    assert (header.size, header.virtual_size) == (size, virtual_size)


@pytest.mark.parametrize("size", [2**63 - 1, 2**63, 2**64 - 1])
def test_an_absurd_size_is_refused(size: int) -> None:
    refused(size=size, l1_size=4 << 20)


@pytest.mark.parametrize(("l1_size", "sound"), [((4 << 20) - 1, True), (4 << 20, True), ((4 << 20) + 1, False)])
def test_the_l1_table_has_a_limit(l1_size: int, sound: bool) -> None:
    if sound:
        assert parsed(l1_size=l1_size).l1_size == l1_size
    else:
        refused(match="too large", l1_size=l1_size)


@pytest.mark.parametrize(
    ("size", "needed"),
    [(1, 0), (512, 1), (L2_COVERAGE - 512, 1), (L2_COVERAGE, 1), (L2_COVERAGE + 512, 2), (9 * L2_COVERAGE, 9)],
)
def test_the_l1_table_must_reach_the_end_of_the_disk_and_may_go_on(size: int, needed: int) -> None:
    assert parsed(size=size, l1_size=needed).l1_size == needed
    assert parsed(size=size, l1_size=needed + 1).l1_size == needed + 1
    if needed:
        refused(match="too small", size=size, l1_size=needed - 1)


@pytest.mark.parametrize("offset", [1, 8, 511, 512, 65535, 65537])
@pytest.mark.parametrize("field", ["l1_table_offset", "refcount_table_offset", "snapshots_offset"])
def test_tables_start_at_a_cluster(field: str, offset: int) -> None:
    refused(match="not aligned", **{field: offset})


@pytest.mark.parametrize(
    ("field", "length"),
    [("l1_table_offset", 4096 * 8), ("refcount_table_offset", 65536), ("snapshots_offset", 64 << 20)],
)
def test_tables_end_below_2_to_63(field: str, length: int) -> None:
    last = (2**63 - 1 - length) >> 16 << 16
    assert getattr(parsed(**{field: last}), field) == last
    refused(match="host offset", **{field: last + 65536})
    refused(match="host offset", **{field: 2**64 - 65536})


def test_the_snapshot_table_must_be_aligned_even_without_snapshots() -> None:
    refused(match="snapshot table", nb_snapshots=0, snapshots_offset=3)


def test_the_l1_table_of_an_empty_disk_may_be_nowhere() -> None:
    assert parsed(size=0, l1_size=0, l1_table_offset=0).virtual_size == 0


@pytest.mark.parametrize(("clusters", "sound"), [(0, False), (1, True), (127, True), (128, True), (129, False)])
def test_the_refcount_table_has_one_cluster_to_8_mib(clusters: int, sound: bool) -> None:
    if sound:
        assert parsed(refcount_table_clusters=clusters).refcount_table_clusters == clusters
    else:
        refused(match="refcount table", refcount_table_clusters=clusters)
    refused(match="refcount table", refcount_table_clusters=2**32 - 1)


@pytest.mark.parametrize(("count", "sound"), [(65535, True), (65536, True), (65537, False), (2**32 - 1, False)])
def test_snapshots_have_a_limit(count: int, sound: bool) -> None:
    if sound:
        assert parsed(nb_snapshots=count).snapshot_count == count
    else:
        refused(match="too many", nb_snapshots=count)


@pytest.mark.parametrize("order", range(7))
def test_every_refcount_width_is_accepted(order: int) -> None:
    assert parsed(refcount_order=order).refcount_bits == 2**order


@pytest.mark.parametrize("order", [7, 8, 64, 2**32 - 1])
def test_other_refcount_widths_are_refused(order: int) -> None:
    refused(match="refcount_order", refcount_order=order)


@pytest.mark.parametrize("length", [104, 112, 120, 65528])
def test_header_lengths_that_are_multiples_of_8(length: int) -> None:
    assert parsed(header_length=length, end_marker=False).header_length == length


@pytest.mark.parametrize("length", [0, 71, 72, 96, 103, 105, 108, 111, 113, 65535, 65537, 65544, 2**32 - 1])
def test_other_header_lengths_are_refused(length: int) -> None:
    refused(match="header_length", header_length_field=length)


def test_the_header_may_fill_its_cluster() -> None:
    header = parsed(cluster_bits=9, size=0, l1_size=0, header_length=512, end_marker=False)
    assert (header.header_length, header.extensions) == (512, ())


def test_a_header_of_104_bytes_has_no_compression_type() -> None:
    header = parsed(header_length=104, extensions=[Extension(0x1_0000_01, b"x" * 8)])
    assert header.compression_type is CompressionType.DEFLATE
    assert header.additional_fields == b""
    assert header.extensions == (HeaderExtension(0x1_0000_01, b"x" * 8, b""),)


# ---- features


@pytest.mark.parametrize("bit", range(5, 64))
def test_unknown_incompatible_features_are_named_by_number(bit: int) -> None:
    header = parsed(incompatible_features=1 << bit)
    with pytest.raises(UnsupportedFeatureError, match=rf"\({1 << bit:#x}\): bit {bit}$"):
        header.require_known_features()


def test_known_features_are_no_trouble() -> None:
    parsed(incompatible_features=0b1_0111).require_known_features()
    parsed(incompatible_features=0b1000, compression_type=1).require_known_features()


def test_unknown_features_have_the_names_of_the_table() -> None:
    names = [(0, 5, b"shiny"), (0, 6, b"x" * 46), (1, 7, b"of another kind"), (0, 63, b"last\0ignored")]
    table = b"".join(struct.pack("BB46s", *name) for name in names)
    header = parsed(incompatible_features=1 << 63 | 0b1110_0000, extensions=[Extension(FEATURE_NAMES, table)])
    with pytest.raises(UnsupportedFeatureError, match=rf": shiny, {'x' * 46}, bit 7, last$"):
        header.require_known_features()


@pytest.mark.parametrize("name", [b"\x1b[2J\x07", b"\x9b31m", "\u202eevil".encode(), b"\r\n"])
def test_feature_names_cannot_act_on_a_terminal(name: bytes) -> None:
    table = struct.pack("BB46s", 0, 9, name)
    header = parsed(incompatible_features=1 << 9, extensions=[Extension(FEATURE_NAMES, table)])
    with pytest.raises(UnsupportedFeatureError) as caught:
        header.require_known_features()
    assert str(caught.value).isprintable()
    assert "\\" in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 47, 49, 95])
def test_a_feature_table_of_odd_length_is_used_as_far_as_it_goes(length: int) -> None:
    table = struct.pack("BB46sBB46s", 0, 9, b"nine", 0, 10, b"ten")[:length]
    header = parsed(incompatible_features=1 << 9, extensions=[Extension(FEATURE_NAMES, table)])
    with pytest.raises(UnsupportedFeatureError, match="nine" if length > 47 else "bit 9"):
        header.require_known_features()


def test_unknown_compatible_and_autoclear_features_are_kept() -> None:
    header = parsed(compatible_features=2**64 - 1, autoclear_features=2**64 - 4)
    header.require_known_features()
    assert (header.compatible_features, header.autoclear_features) == (2**64 - 1, 2**64 - 4)


def test_the_raw_bit_is_told_beside_the_data_file_bit() -> None:
    header = parsed(incompatible_features=0b10, autoclear_features=0b10)
    assert header.data_file_raw
    assert not header.has_data_file
    assert parsed(incompatible_features=0b100, autoclear_features=0b10).has_data_file


@pytest.mark.parametrize(
    ("feature", "compression_type", "sound"), [(0, 0, True), (8, 1, True), (8, 0, False), (0, 1, False)]
)
def test_the_compression_type_must_agree_with_its_feature_bit(feature: int, compression_type: int, sound: bool) -> None:
    told = {"incompatible_features": feature, "compression_type": compression_type}
    if sound:
        assert parsed(**told).compression_type == compression_type
    else:
        refused(match="disagrees", **told)


@pytest.mark.parametrize("compression_type", [2, 255])
def test_an_unknown_compression_type_is_unsupported(compression_type: int) -> None:
    refused(UnsupportedFeatureError, "compression type", incompatible_features=8, compression_type=compression_type)


def test_a_header_of_104_bytes_cannot_have_the_compression_bit() -> None:
    refused(match="disagrees", header_length=104, incompatible_features=8)


@pytest.mark.parametrize("method", [3, 4, 2**32 - 1])
def test_an_unknown_encryption_method_is_unsupported(method: int) -> None:
    refused(UnsupportedFeatureError, f"encryption method {method}", crypt_method=method)


def test_luks_and_its_extension_come_together() -> None:
    pointer = Extension(ENCRYPTION, struct.pack(">QQ", 0x50000, 4096))
    header = parsed(crypt_method=2, extensions=[pointer])
    assert header.encryption_method is EncryptionMethod.LUKS
    assert header.encryption == EncryptionPointer(0x50000, 4096)
    assert parsed(crypt_method=1).encryption_method is EncryptionMethod.AES
    refused(match="do not agree", crypt_method=2)
    refused(match="do not agree", crypt_method=1, extensions=[pointer])
    refused(match="do not agree", crypt_method=0, extensions=[pointer])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(15),
        struct.pack(">QQQ", 0x50000, 4096, 0),
        struct.pack(">QQ", 0, 4096),
        struct.pack(">QQ", 0x50001, 4096),
        struct.pack(">QQ", 2**63 - 65536, 65536),
        struct.pack(">QQ", 0x50000, 2**64 - 1),
    ],
)
def test_the_luks_pointer_must_be_a_place(data: bytes) -> None:
    refused(match="encryption header extension", crypt_method=2, extensions=[Extension(ENCRYPTION, data)])


# ---- version 2


def test_version_2_has_extensions_at_72_and_no_features() -> None:
    told = [Extension(BACKING_FORMAT, b"qcow2"), Extension(0xCAFE, b"12345678")]
    cluster = header_bytes(version=2, extensions=told, backing=b"base.qcow2")
    assert cluster[72:76].hex() == "e2792aca"
    header = Header.parse(cluster)
    assert (header.backing_file, header.backing_format) == (b"base.qcow2", b"qcow2")
    assert (header.incompatible_features, header.compatible_features, header.autoclear_features) == (0, 0, 0)
    assert (header.refcount_order, header.header_length, header.compression_type) == (4, 72, 0)
    assert [extension.type for extension in header.extensions] == [BACKING_FORMAT, 0xCAFE]
    header.require_known_features()


def test_version_2_needs_no_more_than_72_bytes() -> None:
    assert parsed(version=2, length=72, size=512).virtual_size == 512


# ---- header extensions


@pytest.mark.parametrize(
    ("name", "padding", "kept"),
    [(b"12345678", 0xEE, b""), (b"123456", 0xEE, b"\xee\xee"), (b"123456", 0, b"\0\0"), (b"", 0xEE, b"")],
)
@pytest.mark.parametrize("extension_type", [DATA_FILE, BACKING_FORMAT])
def test_a_string_has_the_length_it_says(extension_type: int, name: bytes, padding: int, kept: bytes) -> None:
    header = parsed(extensions=[Extension(extension_type, name, padding=padding), Extension(0xCAFE, b"next")])
    found = header.data_file if extension_type == DATA_FILE else header.backing_format
    assert found == name
    assert header.extensions == (
        HeaderExtension(extension_type, name, kept),
        HeaderExtension(0xCAFE, b"next", bytes(4)),
    )


@pytest.mark.parametrize("name", [b'json:{"driver":"nbd"}', b"nbd://host/disk", b"\xff\xfe.raw", b"a\0b"])
def test_a_data_file_name_is_taken_literally(name: bytes) -> None:
    assert parsed(incompatible_features=4, extensions=[Extension(DATA_FILE, name)]).data_file == name


def test_a_data_file_needs_no_name() -> None:
    header = parsed(incompatible_features=4)
    assert header.has_data_file
    assert header.data_file is None


def test_the_first_of_two_equal_extensions_counts() -> None:
    header = parsed(extensions=[Extension(DATA_FILE, b"first"), Extension(DATA_FILE, b"second")])
    assert header.data_file == b"first"
    assert len(header.extensions) == 2


@pytest.mark.parametrize(("length", "sound"), [(14, True), (15, True), (16, False), (1000, False)])
def test_a_backing_format_has_at_most_15_bytes(length: int, sound: bool) -> None:
    told = [Extension(BACKING_FORMAT, b"f" * length)]
    if sound:
        assert parsed(extensions=told).backing_format == b"f" * length
    else:
        refused(match="backing format", extensions=told)


def test_type_0_ends_the_extensions() -> None:
    behind = Extension(DATA_FILE, b"hidden")
    header = parsed(extensions=[Extension(0xCAFE, b"seen"), Extension(0, b""), behind])
    assert [extension.type for extension in header.extensions] == [0xCAFE]
    assert header.has_end_marker
    assert header.data_file is None


def test_the_backing_name_ends_them_too() -> None:
    header = parsed(extensions=[Extension(0xCAFE, b"12345")], end_marker=False, backing=b"base")
    assert [extension.type for extension in header.extensions] == [0xCAFE]
    assert not header.has_end_marker
    assert header.backing_file == b"base"


def test_the_end_of_the_cluster_ends_them_too() -> None:
    filling = Extension(0xCAFE, b"x" * (512 - 112 - 8))
    header = parsed(cluster_bits=9, size=0, l1_size=0, extensions=[filling], end_marker=False)
    assert header.extensions[0].data == filling.data
    assert not header.has_end_marker


def test_a_backing_name_may_start_in_the_padding_of_the_last_extension() -> None:
    cluster = bytearray(header_bytes(extensions=[Extension(0xCAFE, b"12345")], end_marker=False))
    cluster[125:129] = b"base"
    struct.pack_into(">QI", cluster, 8, 125, 4)
    header = Header.parse(bytes(cluster))
    assert header.extensions == (HeaderExtension(0xCAFE, b"12345", b""),)
    assert header.backing_file == b"base"
    assert header.pack() == bytes(cluster[:129])


@pytest.mark.parametrize("length", [65536 - 112 - 8 + 1, 65536, 2**31, 2**32 - 8, 2**32 - 1])
def test_an_extension_must_not_run_past_the_header_cluster(length: int) -> None:
    refused(match="too large", extensions=[Extension(0xCAFE, b"x", length=length)])


def test_bytes_behind_the_header_cluster_are_not_part_of_it() -> None:
    cluster = header_bytes(cluster_bits=9, size=0, l1_size=0, extensions=[Extension(0xCAFE, b"x" * 393, length=394)])
    with pytest.raises(CorruptImageError, match="too large"):
        Header.parse(cluster + bytes(512))


def test_an_extension_must_not_run_into_the_backing_name() -> None:
    refused(match="too large", extensions=[Extension(0xCAFE, b"x" * 8, length=9)], end_marker=False, backing=b"base")


def test_thousands_of_tiny_extensions_are_kept() -> None:
    header = parsed(extensions=[Extension(0xCAFE, b"")] * 8000)
    assert len(header.extensions) == 8000


# ---- the backing file's name


@pytest.mark.parametrize(("length", "sound"), [(1, True), (1022, True), (1023, True), (1024, False)])
def test_a_backing_name_has_at_most_1023_bytes(length: int, sound: bool) -> None:
    if sound:
        assert parsed(backing=b"n" * length).backing_file == b"n" * length
    else:
        refused(match="too long", backing=b"n" * length)


@pytest.mark.parametrize(("offset", "length", "sound"), [(65526, 10, True), (65527, 10, False), (65536, 1, False)])
def test_a_backing_name_lies_inside_the_header_cluster(offset: int, length: int, sound: bool) -> None:
    told = {"backing_file_offset": offset, "backing_file_size": length}
    if sound:
        assert parsed(**told).backing_file == bytes(length)
    else:
        refused(match="backing file name", **told)


@pytest.mark.parametrize("offset", [2**62, 2**63, 2**64 - 1, 65537])
def test_a_backing_name_far_away_is_refused(offset: int) -> None:
    refused(match="backing file name", backing_file_offset=offset, backing_file_size=0)
    refused(match="backing file name", backing_file_offset=offset, backing_file_size=4)


@pytest.mark.parametrize("offset", [1, 71, 104, 111])
def test_a_backing_name_inside_the_fixed_header_is_refused(offset: int) -> None:
    refused(match="inside the header", backing_file_offset=offset, backing_file_size=4)


def test_a_backing_name_behind_the_end_of_a_short_file_is_refused() -> None:
    refused(match="past the end", backing_file_offset=400, backing_file_size=4, length=300)


def test_an_empty_backing_name_behind_the_end_of_a_short_file_is_refused() -> None:
    refused(match="past the end", backing_file_offset=400, backing_file_size=0, length=112, end_marker=False)


def test_without_an_offset_the_length_of_the_name_means_nothing() -> None:
    assert parsed(backing_file_offset=0, backing_file_size=2**32 - 1).backing_file is None


# ---- bitmaps extension


def test_the_bitmaps_extension() -> None:
    header = parsed(autoclear_features=1, extensions=[bitmaps_extension(3, 0, 96, 0x60000)])
    assert header.bitmaps == (3, 96, 0x60000)


def test_bitmaps_need_both_the_bit_and_the_extension() -> None:
    assert parsed(autoclear_features=1).bitmaps is None
    assert parsed(extensions=[bitmaps_extension()]).bitmaps is None
    assert parsed(extensions=[bitmaps_extension(0, 1, 2**64 - 1, 1)]).bitmaps is None


@pytest.mark.parametrize(
    ("extension", "sound"),
    [
        (bitmaps_extension(count=0), False),
        (bitmaps_extension(count=1), True),
        (bitmaps_extension(count=65535), True),
        (bitmaps_extension(count=65536), False),
        (bitmaps_extension(reserved=1), False),
        (bitmaps_extension(size=0), False),
        (bitmaps_extension(size=67107840), True),
        (bitmaps_extension(size=67107841), False),
        (bitmaps_extension(size=2**40), False),
        (bitmaps_extension(offset=0x50008), False),
        (bitmaps_extension(offset=2**63 - 65536, size=65535), True),
        (bitmaps_extension(offset=2**63 - 65536, size=65536), False),
        (bitmaps_extension(offset=2**63), False),
        (Extension(BITMAPS, bytes(23)), False),
        (Extension(BITMAPS, bytes(25)), False),
        (Extension(BITMAPS, b""), False),
    ],
)
def test_the_limits_of_the_bitmaps_extension(extension: Extension, sound: bool) -> None:
    header = parsed(autoclear_features=1, extensions=[extension])
    if sound:
        assert header.bitmaps is not None
    else:
        with pytest.raises(CorruptImageError, match="bitmaps header extension"):
            _ = header.bitmaps


# ---- and back


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"version": 2},
        {"version": 2, "backing": b"base.img", "extensions": [Extension(BACKING_FORMAT, b"raw", padding=0x20)]},
        {"header_length": 104},
        {"header_length": 136, "tail": b"unknown fields of later"},
        {
            "extensions": [Extension(0xCAFE, b"12345", padding=0xAA), Extension(DATA_FILE, b"name")],
            "backing": b"b" * 99,
        },
        {"end_marker": False, "backing": b"b"},
        {"compatible_features": 2**64 - 1, "autoclear_features": 2**64 - 1, "incompatible_features": 2**64 - 9},
        {"incompatible_features": 8, "compression_type": 1},
    ],
)
def test_packing_gives_the_bytes_back(told: dict[str, object]) -> None:
    cluster = header_bytes(**told)  # type: ignore[arg-type] # passed on as they are
    packed = Header.parse(cluster).pack()
    assert cluster.startswith(packed)
    assert not any(cluster[len(packed) :])


def test_the_padding_behind_the_compression_type_is_kept() -> None:
    cluster = bytearray(header_bytes())
    cluster[105:112] = b"later.."
    assert Header.parse(bytes(cluster)).additional_fields == b"later.."
    assert bytes(cluster).startswith(Header.parse(bytes(cluster)).pack())


def test_errors_say_which_byte_of_the_header_is_wrong() -> None:
    wrong = {
        "size": 2**63,
        "l1_size": (4 << 20) + 1,
        "l1_table_offset": 1,
        "refcount_table_offset": 1,
        "refcount_table_clusters": 0,
        "nb_snapshots": 65537,
        "snapshots_offset": 1,
        "refcount_order": 7,
        "cluster_bits": 8,
    }
    for field, value in wrong.items():
        cluster = bytearray(header_bytes())
        offset, code = HEADER_FIELDS[field]
        struct.pack_into(">" + code, cluster, offset, value)
        with pytest.raises(CorruptImageError) as caught:
            Header.parse(bytes(cluster))
        assert caught.value.host_offset == offset, field


# ---- names for a new image


def named(
    header: Header,
    *,
    backing_file: bytes | None = None,
    backing_format: bytes | None = None,
    data_file: bytes | None = None,
) -> Header:
    return header.with_names(backing_file=backing_file, backing_format=backing_format, data_file=data_file)


def test_names_come_in_the_order_of_qemu_and_can_be_parsed_again() -> None:
    header = named(parsed(), backing_file=b"base", backing_format=b"qcow2", data_file=b"8 bytes.")
    assert [extension.type for extension in header.extensions] == [BACKING_FORMAT, DATA_FILE, FEATURE_NAMES]
    assert header.backing_file_offset == 112 + (8 + 8) + (8 + 8) + (8 + 8 * 48) + 8
    assert header.has_end_marker
    assert Header.parse(header.pack()) == header
    assert (header.backing_file, header.backing_format, header.data_file) == (b"base", b"qcow2", b"8 bytes.")
    assert header.pack()[112:136] == bytes.fromhex("e2792aca 00000005") + b"qcow2\0\0\0" + b"DATA\0\0\0\x08"


def test_names_take_the_place_of_what_was_there() -> None:
    before = parsed(extensions=[Extension(DATA_FILE, b"data"), Extension(0x1234, b"x")], backing=b"base")
    header = named(before)
    assert (header.backing_file, header.backing_file_offset, header.data_file) == (None, 0, None)
    assert [extension.type for extension in header.extensions] == [FEATURE_NAMES]


def test_features_are_named() -> None:
    names = named(parsed()).extension_data(FEATURE_NAMES) or b""
    entries = [(kind, bit, name.rstrip(b"\0")) for kind, bit, name in struct.iter_unpack("BB46s", names)]
    assert [entry[:2] for entry in entries] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (2, 0), (2, 1)]
    assert all(name.isascii() and len(name) > 6 for _, _, name in entries)


@pytest.mark.parametrize(("version", "cluster_bits", "count"), [(3, 13, 1), (3, 12, 0), (3, 9, 0), (2, 16, 0)])
def test_features_are_not_named_where_there_is_no_room_or_no_feature(
    version: int, cluster_bits: int, count: int
) -> None:
    assert len(named(parsed(version=version, cluster_bits=cluster_bits, size=0, l1_size=0)).extensions) == count


@pytest.mark.parametrize(("length", "fits"), [(375, True), (376, True), (377, False), (1023, False)])
def test_names_that_do_not_fit_the_header_cluster_are_refused(length: int, fits: bool) -> None:
    header = parsed(cluster_bits=9, size=0, l1_size=0)
    name = b"x" * length
    if fits:
        assert Header.parse(named(header, backing_file=name, backing_format=b"raw").pack()).backing_file == name
        return
    with pytest.raises(OptionError, match=r"512 bytes has no room .* larger clusters, or shorter names"):
        named(header, backing_file=name, backing_format=b"raw")
    with pytest.raises(OptionError, match="no room"):
        named(header, data_file=name + b"x" * 20)


# ---- other extensions


def types(header: Header) -> list[int]:
    return [extension.type for extension in header.extensions]


def test_an_extension_is_added_where_it_belongs_replaced_where_it_is_and_dropped() -> None:
    names = Extension(FEATURE_NAMES, b"n" * 48)
    header = parsed(extensions=[Extension(BACKING_FORMAT, b"raw"), names, Extension(0x1234, b"x" * 9)], backing=b"base")
    more = header.with_extension(BITMAPS, bytes(24)).with_extension(DATA_FILE, b"data").with_extension(0x99, b"")
    assert types(more) == [BITMAPS, DATA_FILE, BACKING_FORMAT, FEATURE_NAMES, 0x99, 0x1234]
    other = more.with_extension(DATA_FILE, b"another name").with_extension(BITMAPS, None)
    assert types(other) == [DATA_FILE, BACKING_FORMAT, FEATURE_NAMES, 0x99, 0x1234]
    assert (other.data_file, other.backing_file, other.backing_format) == (b"another name", b"base", b"raw")
    assert Header.parse(other.pack().ljust(65536, b"\0")) == other
    assert other.with_extension(DATA_FILE, None).with_extension(0x99, None) == header.laid_out()


def test_of_doubles_one_is_left() -> None:
    header = parsed(extensions=[Extension(0x77, b"a"), Extension(0x88, b"b"), Extension(0x77, b"c")])
    assert types(header.with_extension(0x77, b"d")) == [0x77, 0x88]
    assert types(header.with_extension(0x77, None)) == [0x88]


def test_what_stood_apart_is_laid_out_in_a_row_and_stays_as_it_was() -> None:
    junk = Extension(0x77, b"a", padding=0xFF)
    header = parsed(extensions=[junk], backing_file_offset=3000, backing_file_size=4)
    laid_out = header.laid_out()
    assert laid_out.backing_file_offset == 112 + 16 + 8
    assert laid_out.pack()[112:136] == junk.packed() + bytes(8)
    assert parsed().laid_out() == parsed()
