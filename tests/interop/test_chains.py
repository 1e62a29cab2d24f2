"""Backing chains made by qemu-img: what shows through, where it ends, and which names are followed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from qcow2_plugin import Policy, open_image
from qcow2_plugin.errors import MissingReferenceError, ReferenceDeniedError, UnsupportedFeatureError
from qcow2_plugin.extent import ExtentKind
from tests.support.agreement import assert_extents_agree, assert_reads_as, assert_tiles, converted
from tests.support.builder import ImageBuilder
from tests.support.mixture import fill, pattern_files
from tests.support.tools import qemu_img, qemu_img_json, qemu_io
from tests.support.watching import no_descriptor_left

MIB = 1 << 20


@dataclass(frozen=True)
class Layer:
    """One image of a chain; without `format` qcow2. `options` are those of qemu-img create."""

    size: int
    options: str = ""
    format: str = "qcow2"
    compressed: bool = False

    @property
    def cluster_size(self) -> int:
        given = dict(option.split("=") for option in self.options.split(",") if option)
        return int(given.get("cluster_size", 65536))


CHAINS: dict[str, list[Layer]] = {
    "qcow2 over raw": [Layer(3 * MIB, format="raw"), Layer(3 * MIB)],
    "qcow2 over qcow2 over raw": [Layer(3 * MIB, format="raw"), Layer(3 * MIB), Layer(3 * MIB)],
    "a shorter backing file": [Layer(MIB), Layer(3 * MIB)],
    "a longer backing file": [Layer(3 * MIB), Layer(MIB + 512)],
    "a backing file that ends inside a cluster": [Layer(MIB + 1536), Layer(2 * MIB)],
    "a raw backing file that ends inside a sector": [Layer(MIB + 4097, format="raw"), Layer(2 * MIB)],
    "shorter, longer, shorter": [Layer(MIB + 512), Layer(3 * MIB + 512), Layer(MIB - 512), Layer(4 * MIB)],
    "an empty backing file": [Layer(0), Layer(MIB)],
    "an empty overlay": [Layer(MIB), Layer(0)],
    "version 2 over version 2": [Layer(2 * MIB, "compat=0.10"), Layer(3 * MIB, "compat=0.10")],
    "version 2 over version 3": [Layer(2 * MIB + 512), Layer(3 * MIB, "compat=0.10")],
    "subclusters over qcow2": [Layer(2 * MIB + 1536), Layer(3 * MIB, "extended_l2=on")],
    "small subclusters over raw": [
        Layer(2 * MIB, format="raw"),
        Layer(3 * MIB + 512, "extended_l2=on,cluster_size=16384"),
    ],
    "preallocated subclusters over qcow2": [
        Layer(2 * MIB + 1536),
        Layer(3 * MIB, "extended_l2=on,preallocation=metadata"),
    ],
    "subclusters over subclusters": [Layer(2 * MIB, "extended_l2=on"), Layer(2 * MIB + 512, "extended_l2=on")],
    "over compressed clusters": [Layer(2 * MIB + 1536, compressed=True), Layer(3 * MIB)],
    "compressed over compressed": [
        Layer(2 * MIB, "compression_type=zstd", compressed=True),
        Layer(3 * MIB, compressed=True),
    ],
    "subclusters over compressed clusters": [
        Layer(2 * MIB, compressed=True),
        Layer(2 * MIB, "extended_l2=on", compressed=True),
    ],
    "a data file over qcow2": [Layer(2 * MIB + 1536), Layer(3 * MIB, "data_file=DATA")],
    "qcow2 over a data file": [Layer(2 * MIB, "data_file=DATA"), Layer(3 * MIB)],
    "over a raw data file": [Layer(2 * MIB + 512, "data_file=DATA,data_file_raw=on"), Layer(3 * MIB, "data_file=DATA")],
    "subclusters in a data file over raw": [
        Layer(2 * MIB, format="raw"),
        Layer(3 * MIB, "data_file=DATA,extended_l2=on"),
    ],
    "large clusters over small ones": [
        Layer(3 * MIB + 512, "cluster_size=512"),
        Layer(5 * MIB, "cluster_size=2097152"),
    ],
    "small clusters over large ones": [
        Layer(3 * MIB + 512, "cluster_size=2097152"),
        Layer(5 * MIB, "cluster_size=512"),
    ],
    "eight levels": [Layer((1 + 5 * level % 3) * MIB + 512, f"cluster_size={512 << level}") for level in range(8)],
}


def make_chain(directory: Path, layers: Sequence[Layer]) -> Path:
    """The chain's images, layer0 at the bottom, each filled with a mixture; the path of the top one."""
    below: list[str] = []
    path = directory
    for number, layer in enumerate(layers):
        name = f"layer{number}.{layer.format}"
        path = directory / name
        if layer.format == "raw":
            pattern = pattern_files(directory)[-1].read_bytes()
            path.write_bytes((pattern * (layer.size // len(pattern) + 1))[: layer.size])
        else:
            given = layer.options.replace("DATA", str(directory / f"layer{number}.data"))
            options = ["-o", given] if given else []
            qemu_img("create", "-q", "-f", "qcow2", *below, *options, path, str(layer.size))
            fill(path, layer.size, layer.cluster_size, seed=number, compressed=layer.compressed, count=12)
        below = ["-b", name, "-F", layer.format]
    return path


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_reads_as_qemu_reads_it(name: str, tmp_path: Path) -> None:
    layers = CHAINS[name]
    path = make_chain(tmp_path, layers)
    near = [layer.size for layer in layers]
    with converted(path) as expected, open_image(path, policy=Policy.TRUSTED) as image:
        assert_reads_as(image, expected, near=near)
        assert_extents_agree(image.extents(), qemu_img_json("map", path), expected)
        own = list(image.extents(whole_chain=False))
        assert_tiles(own, image.virtual_size)
        assert all(extent.depth == 0 for extent in own)


def test_subclusters_let_the_backing_file_through_between_them(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "256k")
    qemu_io(base, "write -P 1 0 256k")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", "-o", "extended_l2=on", overlay)
    qemu_io(overlay, "write -P 2 2k 2k", "write -z 6k 2k", "write -P 3 65537 1", "discard 128k 64k")
    with open_image(overlay) as image:
        shown = [image.pread(1, offset)[0] for offset in range(0, 10 << 10, 1 << 10)]
        assert shown == [1, 1, 2, 2, 1, 1, 0, 0, 1, 1]
        assert image.pread(3, 65536) == b"\1\3\1"
        kinds = [(extent.guest_offset >> 10, extent.kind, extent.depth) for extent in image.extents(0, 10 << 10)]
        assert kinds == [
            (0, ExtentKind.DATA, 1),
            (2, ExtentKind.DATA, 0),
            (4, ExtentKind.DATA, 1),
            (6, ExtentKind.ZERO, 0),
            (8, ExtentKind.DATA, 1),
        ]


def test_what_lies_behind_the_backing_file_is_provided_by_nobody(tmp_path: Path) -> None:
    path = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", "100k")
    qemu_io(tmp_path / "base.qcow2", "write -P 1 0 100k")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", path, "200k")
    with open_image(path) as image:
        assert image.pread(200 << 10, 0) == b"\1" * (100 << 10) + bytes(100 << 10)
        first, second = image.extents()
        assert (first.kind, first.depth, first.length) == (ExtentKind.DATA, 1, 100 << 10)
        assert (second.kind, second.depth) == (ExtentKind.UNALLOCATED, 0)
        (own,) = image.extents(whole_chain=False)
        assert own.kind is ExtentKind.UNALLOCATED


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """top.qcow2 over base.raw, whose format is recorded; base.raw is full of ones."""
    (tmp_path / "base.raw").write_bytes(b"\1" * MIB)
    path = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", path, "1M")
    return path


def first_byte(path: Path, **options: object) -> int:
    with open_image(path, **options) as image:  # type: ignore[arg-type] # the options of one test
        return image.pread(1, 0)[0]


def test_a_given_backing_file_replaces_the_one_in_the_image(chain: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "base.raw").write_bytes(b"\2" * MIB)
    assert first_byte(chain) == 1
    assert first_byte(chain, backing_file=elsewhere / "base.raw") == 2
    (tmp_path / "base.raw").unlink()
    assert first_byte(chain, backing_file=elsewhere / "base.raw", policy=Policy.INSPECT) == 2
    with pytest.raises(FileNotFoundError):
        first_byte(chain, backing_file=tmp_path / "base.raw")


def test_a_given_backing_file_has_its_own_directory_for_names(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "base.raw").write_bytes(b"\2" * MIB)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", elsewhere / "middle.qcow2")
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "none.qcow2", "-F", "qcow2", top, "1M")
    assert first_byte(top, backing_file=elsewhere / "middle.qcow2") == 2


def test_a_recorded_format_cannot_be_overruled_for_a_raw_disk_that_looks_like_qcow2(chain: Path) -> None:
    inner = chain.with_name("inner.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", inner, "1M")
    os.replace(inner, chain.with_name("base.raw"))
    with open_image(chain, backing_format="qcow2") as image:
        assert image.pread(4, 0) == b"QFI\xfb"


@pytest.mark.parametrize("version", [2, 3])
def test_a_missing_format_is_refused_and_can_be_given(version: int, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"\1" * MIB)
    path = tmp_path / "top.qcow2"
    ImageBuilder(MIB, version=version).backing(b"base", None).build(path)
    with no_descriptor_left(), pytest.raises(ReferenceDeniedError, match="not recorded and is not guessed"):
        open_image(path)
    assert first_byte(path, backing_format="raw") == 1
    qemu_img("rebase", "-u", "-b", "base", "-F", "raw", path)
    assert first_byte(path) == 1


def test_a_format_that_is_neither_qcow2_nor_raw_is_refused(chain: Path) -> None:
    qemu_img("create", "-q", "-f", "qed", chain.with_name("base.qed"), "1M")
    qemu_img("rebase", "-u", "-b", "base.qed", "-F", "qed", chain)
    with no_descriptor_left(), pytest.raises(UnsupportedFeatureError, match='format "qed"'):
        open_image(chain)


def test_names_start_in_the_directory_of_the_image_that_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = tmp_path / "below"
    below.mkdir()
    (below / "base.raw").write_bytes(b"\1" * MIB)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", below / "middle.qcow2")
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "below/middle.qcow2", "-F", "qcow2", top)
    monkeypatch.chdir("/")
    with converted(top) as expected, open_image(top) as image:
        assert_reads_as(image, expected)
    assert first_byte(top) == 1
    monkeypatch.chdir(tmp_path)
    assert first_byte(Path("top.qcow2")) == 1


def test_a_base_directory_moves_the_start_of_relative_names(chain: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.replace(tmp_path / "base.raw", elsewhere / "base.raw")
    with pytest.raises(MissingReferenceError, match="option base-directory"):
        open_image(chain)
    assert first_byte(chain, base_directory=elsewhere) == 1


def test_policies_decide_which_names_are_followed(chain: Path, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    os.symlink("base.raw", tmp_path / "link.raw")
    names = {
        "base.raw": chain,
        "../base.raw": inside / "top.qcow2",
        str(tmp_path / "base.raw"): chain,
        "link.raw": chain,
    }
    for number, (name, referrer) in enumerate(names.items()):
        path = referrer.with_name(f"top{number}.qcow2")
        qemu_img("create", "-q", "-f", "qcow2", "-b", name, "-F", "raw", path)
        assert first_byte(path, policy=Policy.TRUSTED) == 1
        with no_descriptor_left(), pytest.raises(ReferenceDeniedError, match="policy inspect"):
            open_image(path, policy=Policy.INSPECT)
        if name == "base.raw":
            assert first_byte(path) == 1
        else:
            with no_descriptor_left(), pytest.raises(ReferenceDeniedError, match="policy trusted"):
                open_image(path)


def test_a_missing_backing_file_is_named(chain: Path) -> None:
    chain.with_name("base.raw").unlink()
    with no_descriptor_left(), pytest.raises(MissingReferenceError, match=r"base\.raw"):
        open_image(chain)


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]], ids=["itself", "two", "three"])
def test_a_loop_is_refused(names: list[str], tmp_path: Path) -> None:
    for name, below in zip(names, [*names[1:], names[0]], strict=True):
        qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", below, "-F", "qcow2", tmp_path / name, "1M")
    with no_descriptor_left(), pytest.raises(ReferenceDeniedError, match="the same file"):
        open_image(tmp_path / names[0])


def test_a_snapshot_shows_the_backing_file_too(chain: Path) -> None:
    qemu_io(chain, "write -P 5 64k 64k")
    qemu_img("snapshot", "-c", "before", chain)
    qemu_io(chain, "write -P 6 0 1M")
    with converted(chain, "-l", "before") as expected, open_image(chain, snapshot="before") as image:
        assert_reads_as(image, expected)
        assert image.pread(1, 0) == b"\1"
        assert image.pread(1, 65536) == b"\5"
