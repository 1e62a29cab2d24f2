"""Opening an image with everything below it: which files, in which order, and when not."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.engine.files import MAX_DEPTH
from qcow2_plugin.errors import (
    CorruptImageError,
    MissingReferenceError,
    NotQcow2Error,
    Qcow2Error,
    ReferenceDeniedError,
    TruncatedImageError,
    UnsupportedFeatureError,
)
from qcow2_plugin.extent import ExtentKind
from qcow2_plugin.storage.opener import Policy
from tests.support.builder import ImageBuilder, set_field

CLUSTER = 4096
SIZE = 8 * CLUSTER


def noise(seed: int, length: int = CLUSTER) -> bytes:
    return random.Random(seed).randbytes(length)


def image() -> ImageBuilder:
    return ImageBuilder(SIZE, cluster_bits=12)


@pytest.fixture(autouse=True)
def _no_file_left_open() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """An overlay of three layers: top.qcow2, middle.qcow2, base.raw."""
    (tmp_path / "base.raw").write_bytes(noise(9, SIZE))
    image().data(1, noise(1)).backing(b"base.raw", b"raw").build(tmp_path / "middle.qcow2")
    path = tmp_path / "top.qcow2"
    image().data(0, noise(0)).backing(b"middle.qcow2", b"qcow2").build(path)
    return path


EXPECTED = noise(0) + noise(1) + noise(9, SIZE)[2 * CLUSTER :]


def read(path: Path | str, **options: object) -> bytes:
    with open_image(path, **options) as disk:  # type: ignore[arg-type] # passed on
        return disk.pread(disk.virtual_size, 0)


def refused(kind: type[Qcow2Error], match: str, path: Path | str, **options: object) -> None:
    with pytest.raises(kind, match=match) as caught:
        read(path, **options)
    assert type(caught.value) is kind


def test_a_single_image(tmp_path: Path) -> None:
    image().data(3, noise(3)).build(tmp_path / "x")
    assert read(tmp_path / "x") == image().data(3, noise(3)).expected()
    assert read(str(tmp_path / "x")) == image().data(3, noise(3)).expected()


def test_a_chain(top: Path) -> None:
    assert read(top) == EXPECTED
    assert read(top, cache_size=0) == EXPECTED


def test_version_2_needs_a_recorded_format_too(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(noise(9, SIZE))
    ImageBuilder(SIZE, cluster_bits=12, version=2).backing(b"base.raw", b"raw").build(tmp_path / "x")
    assert read(tmp_path / "x") == noise(9, SIZE)


def test_names_start_at_the_directory_of_the_image(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(top.parent)
    assert read("top.qcow2") == EXPECTED
    monkeypatch.chdir("/")
    assert read(top) == EXPECTED


def test_a_base_directory_moves_that(top: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(top, moved / "top.qcow2")
    refused(MissingReferenceError, "does not exist", moved / "top.qcow2")
    assert read(moved / "top.qcow2", base_directory=tmp_path) == EXPECTED


def test_a_confined_chain_stays_below_the_top(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "base.raw").write_bytes(noise(9, SIZE))
    image().backing(b"../base.raw").build(tmp_path / "inner" / "middle.qcow2")
    image().backing(b"inner/middle.qcow2", b"qcow2").build(tmp_path / "top.qcow2")
    refused(ReferenceDeniedError, r"component; .*middle\.qcow2\)$", tmp_path / "top.qcow2")
    assert read(tmp_path / "top.qcow2", policy=Policy.TRUSTED) == noise(9, SIZE)


def test_inspect_follows_nothing(top: Path) -> None:
    refused(ReferenceDeniedError, "policy inspect", top, policy=Policy.INSPECT)


def test_a_given_backing_file_takes_the_place_of_the_named_one(top: Path, tmp_path: Path) -> None:
    shutil.move(tmp_path / "middle.qcow2", tmp_path / "renamed")
    refused(MissingReferenceError, "option backing-file", top)
    assert read(top, backing_file=tmp_path / "renamed") == EXPECTED
    assert read(top, backing_file=tmp_path / "renamed", policy=Policy.CONFINED) == EXPECTED


def test_a_backing_file_that_nobody_asked_for_is_refused(top: Path, tmp_path: Path) -> None:
    image().build(tmp_path / "single")
    refused(ReferenceDeniedError, "has no backing file", tmp_path / "single", backing_file=top)


def test_a_format_that_is_not_recorded_is_not_guessed(tmp_path: Path) -> None:
    image().data(0, noise(0)).build(tmp_path / "base")
    image().backing(b"base", None).build(tmp_path / "top")
    refused(ReferenceDeniedError, "not recorded and is not guessed", tmp_path / "top")
    refused(ReferenceDeniedError, "not recorded", tmp_path / "top", policy=Policy.TRUSTED)
    assert read(tmp_path / "top", backing_format="qcow2") == image().data(0, noise(0)).expected()
    as_raw = (tmp_path / "base").read_bytes()[:SIZE].ljust(SIZE, b"\0")
    assert read(tmp_path / "top", backing_format="raw") == as_raw
    refused(UnsupportedFeatureError, '"vmdk" is not supported', tmp_path / "top", backing_format="vmdk")


def test_a_recorded_format_wins(tmp_path: Path) -> None:
    """A guest that writes a qcow2 header into its raw disk gets no other file opened by that."""
    image().backing(b"secret", b"raw").build(tmp_path / "base")
    (tmp_path / "secret").write_bytes(b"secret" * 1000)
    image().backing(b"base", b"raw").build(tmp_path / "top")
    assert read(tmp_path / "top") == (tmp_path / "base").read_bytes()[:SIZE].ljust(SIZE, b"\0")
    assert read(tmp_path / "top", backing_format="qcow2") == read(tmp_path / "top")


@pytest.mark.parametrize("name", [b"vmdk", b"", b"QCOW2", b"\x1b[31m", b"host_device"])
def test_other_formats_are_not_supported(tmp_path: Path, name: bytes) -> None:
    (tmp_path / "base").write_bytes(bytes(SIZE))
    image().backing(b"base", name).build(tmp_path / "top")
    refused(UnsupportedFeatureError, "backing file format", tmp_path / "top")


@pytest.mark.parametrize("name", [b"top", b"link"])
def test_an_image_must_not_be_its_own_backing_file(tmp_path: Path, name: bytes) -> None:
    image().backing(name, b"qcow2").build(tmp_path / "top")
    os.link(tmp_path / "top", tmp_path / "link")
    refused(ReferenceDeniedError, "same file as the image above it", tmp_path / "top")


def test_a_loop_is_refused(tmp_path: Path) -> None:
    image().backing(b"b", b"qcow2").build(tmp_path / "a")
    image().backing(b"c", b"qcow2").build(tmp_path / "b")
    image().backing(b"b", b"raw").build(tmp_path / "c")
    refused(ReferenceDeniedError, "same file as the backing file above it", tmp_path / "a")


def test_a_loop_through_a_data_file_is_refused(tmp_path: Path) -> None:
    image().data_file(tmp_path / "data", b"top").build(tmp_path / "top")
    refused(ReferenceDeniedError, "the data file is the same file as the image", tmp_path / "top")


def chain_of(count: int, tmp_path: Path) -> Path:
    """So many layers, the last of them raw."""
    (tmp_path / "layer0").write_bytes(noise(9, SIZE))
    for index in range(1, count):
        below = b"raw" if index == 1 else b"qcow2"
        image().backing(b"layer%d" % (index - 1), below).build(tmp_path / f"layer{index}")
    return tmp_path / f"layer{count - 1}"


@pytest.mark.parametrize(("count", "sound"), [(MAX_DEPTH, True), (MAX_DEPTH + 1, False)])
def test_a_chain_has_at_most_64_files(tmp_path: Path, count: int, sound: bool) -> None:
    path = chain_of(count, tmp_path)
    if not sound:
        refused(ReferenceDeniedError, "deeper than 64", path)
        return
    with open_image(path) as disk:
        assert disk.pread(SIZE, 0) == noise(9, SIZE)
        assert [(extent.kind, extent.depth) for extent in disk.extents()] == [(ExtentKind.DATA, count - 1)]


# ---- data files


def test_traps_6_and_9_a_data_file_is_found_by_its_name_or_given(tmp_path: Path) -> None:
    told = image().data_file(tmp_path / "data", b"data").data(0, noise(0)).data(5, noise(5))
    told.build(tmp_path / "top")
    assert read(tmp_path / "top") == told.expected()
    shutil.move(tmp_path / "data", tmp_path / "other")
    refused(MissingReferenceError, "option data-file", tmp_path / "top")
    assert read(tmp_path / "top", data_file=tmp_path / "other") == told.expected()
    image().data_file(tmp_path / "data", None).data(0, noise(0)).build(tmp_path / "nameless")
    refused(MissingReferenceError, "does not name it", tmp_path / "nameless")
    assert read(tmp_path / "nameless", data_file=tmp_path / "data") == image().data(0, noise(0)).expected()


def test_a_data_file_that_nobody_asked_for_is_refused(tmp_path: Path) -> None:
    image().build(tmp_path / "top")
    refused(ReferenceDeniedError, "no external data file", tmp_path / "top", data_file=tmp_path / "top")


def test_a_data_file_name_is_never_more_than_a_file_name(tmp_path: Path) -> None:
    name = b'json:{"driver":"raw"}'
    image().data_file(tmp_path / os.fsdecode(name), name).build(tmp_path / "top")
    refused(ReferenceDeniedError, "prefix", tmp_path / "top")


@pytest.mark.parametrize("policy", [Policy.CONFINED, Policy.TRUSTED])
def test_the_raw_bit_needs_a_data_file(tmp_path: Path, policy: Policy) -> None:
    ImageBuilder(SIZE, cluster_bits=12, autoclear=2).build(tmp_path / "top")
    refused(CorruptImageError, "raw data file bit", tmp_path / "top", policy=policy)
    raw = image().data_file(tmp_path / "data", b"data", raw=True).data(1, noise(1))
    raw.build(tmp_path / "raw")
    assert read(tmp_path / "raw") == raw.expected()


def test_layers_below_have_data_files_too(tmp_path: Path) -> None:
    below = image().data_file(tmp_path / "data", b"data").data(0, noise(0))
    below.build(tmp_path / "base")
    image().backing(b"base", b"qcow2").build(tmp_path / "top")
    assert read(tmp_path / "top") == below.expected()


# ---- what is refused, and what not


@pytest.mark.parametrize("content", [b"", b"QFI\xfb", b"raw disk" * 100, bytes(1 << 16)])
def test_other_files_are_not_qcow2(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    refused(NotQcow2Error, r"not a qcow2 image: .*/x\)$", tmp_path / "x")


@pytest.mark.parametrize(("method", "name"), [(1, "AES"), (2, "LUKS")])
def test_encrypted_images_are_not_supported(tmp_path: Path, method: int, name: str) -> None:
    told = image() if method == 1 else image().luks(bytes(CLUSTER))
    told.build(tmp_path / "x")
    set_field(tmp_path / "x", "crypt_method", method)
    refused(UnsupportedFeatureError, name, tmp_path / "x")


def test_unknown_features_are_refused_in_every_layer(tmp_path: Path) -> None:
    ImageBuilder(SIZE, cluster_bits=12, incompatible=1 << 40).build(tmp_path / "base")
    refused(UnsupportedFeatureError, r"bit 40 \(.*base\)", tmp_path / "base")
    image().backing(b"base", b"qcow2").build(tmp_path / "top")
    refused(UnsupportedFeatureError, r"bit 40 \(.*base\)", tmp_path / "top")


@pytest.mark.parametrize("bits", [{"compatible": 2**64 - 1}, {"autoclear": 2**64 - 4}, {"incompatible": 3}])
def test_other_unknown_features_and_a_dirty_image_are_read(tmp_path: Path, bits: dict[str, int]) -> None:
    told = ImageBuilder(SIZE, cluster_bits=12, **bits).data(1, noise(1))  # type: ignore[arg-type] # passed on
    told.build(tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    assert read(tmp_path / "x") == told.expected()
    assert (tmp_path / "x").read_bytes() == before


def test_a_truncated_image_is_refused_or_read_as_it_is(tmp_path: Path) -> None:
    told = image().data(0, noise(0)).data(1, noise(1), host_offset=30 * CLUSTER)
    told.build(tmp_path / "x")
    os.truncate(tmp_path / "x", 30 * CLUSTER)
    refused(TruncatedImageError, "truncated", tmp_path / "x")
    assert read(tmp_path / "x", allow_damaged=True) == noise(0).ljust(SIZE, b"\0")


def test_misplaced_tables_are_refused_or_read_as_they_are(tmp_path: Path) -> None:
    told = image().data(0, noise(0))
    told.build(tmp_path / "x")
    set_field(tmp_path / "x", "refcount_table_offset", 1 << 40)
    refused(TruncatedImageError, "refcount table", tmp_path / "x")
    assert read(tmp_path / "x", allow_damaged=True) == told.expected()


def test_a_truncated_layer_below_is_refused_too(tmp_path: Path) -> None:
    image().data(1, noise(1), host_offset=30 * CLUSTER).build(tmp_path / "base")
    os.truncate(tmp_path / "base", 30 * CLUSTER)
    image().backing(b"base", b"qcow2").build(tmp_path / "top")
    refused(TruncatedImageError, r"/base\)", tmp_path / "top")
    assert read(tmp_path / "top", allow_damaged=True) == bytes(SIZE)


# ---- snapshots


def test_an_image_can_be_opened_at_a_snapshot(tmp_path: Path) -> None:
    told = image().data(0, noise(0))
    then = told.map(virtual_size=4 * CLUSTER).data(1, noise(1))
    told.snapshot(b"1", b"then", then).build(tmp_path / "x")
    assert read(tmp_path / "x") == told.expected()
    for wanted in ("1", "then", b"then"):
        assert read(tmp_path / "x", snapshot=wanted) == then.expected()
    refused(MissingReferenceError, "no internal snapshot", tmp_path / "x", snapshot="2")


@pytest.mark.parametrize("offset", [0, 5, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - CLUSTER])
@pytest.mark.parametrize("allow_damaged", [False, True])
def test_a_snapshot_with_a_misplaced_l1_table_hurts_only_itself(
    tmp_path: Path, offset: int, allow_damaged: bool
) -> None:
    told = image().data(0, noise(0)).snapshot(b"1", b"then", l1_table_offset=offset)
    told.build(tmp_path / "x")
    assert read(tmp_path / "x", allow_damaged=allow_damaged) == told.expected()
    try:
        content = read(tmp_path / "x", snapshot="1", allow_damaged=allow_damaged)
    except CorruptImageError as error:
        assert "L1 table of snapshot" in str(error)
    else:
        assert allow_damaged
        assert content == bytes(SIZE)
