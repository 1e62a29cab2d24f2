"""Layers of chains that qemu-img has made, merged: it compares the disks, and checks the images."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from qcow2_plugin.engine.chain import open_image
from qcow2_plugin.errors import OptionError
from qcow2_plugin.extent import ExtentKind
from qcow2_plugin.operations.merge_layers import merge_layers
from tests.support.tools import qemu_img, qemu_img_json, qemu_io

MIB = 1 << 20


def overlays(directory: Path, seed: int) -> list[Path]:
    """A chain of random layers, lowest first, which grow; small clusters or usual ones, and compressed in any way."""
    rnd = random.Random(seed)
    cluster_size, usual = rnd.choice([4096, 65536]), rnd.choice(["zlib", "zstd"])
    size = rnd.choice([8 * MIB, 20 * MIB + 512 * rnd.randrange(100)])
    layers: list[Path] = []
    for number in range(rnd.randrange(2, 5)):
        path = directory / f"{number}.qcow2"
        options = f"cluster_size={cluster_size},compression_type={rnd.choice([usual, usual, 'zlib'])}"
        below = ["-b", layers[-1].name, "-F", "qcow2"] if layers else []
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, *below, path, str(size))
        words = [word for _ in range(rnd.randrange(1, 25)) for word in _writes(rnd, size, cluster_size)]
        # a compressed write to a cluster that this layer has already fails, and nothing happened
        subprocess.run(["qemu-io", *words, str(path)], capture_output=True, check=False, timeout=60)
        layers.append(path)
        size += 512 * rnd.randrange(5000) if rnd.random() < 0.3 else 0
    return layers


def _writes(rnd: random.Random, size: int, cluster_size: int) -> list[str]:
    kind = rnd.choice("wccz")
    if kind == "c":
        first = rnd.randrange(size // cluster_size)
        starts = [number * cluster_size for number in range(first, first + rnd.randrange(1, 6))]
        whole = [start for start in starts if start + cluster_size <= size]
        return [word for at in whole for word in ("-c", f"write -c -P {rnd.randrange(1, 255)} {at} {cluster_size}")]
    offset = rnd.randrange(size // 512) * 512
    length = min(512 * rnd.randrange(1, 2000), size - offset)
    return ["-c", f"write {'-z' if kind == 'z' else f'-P {rnd.randrange(1, 255)}'} {offset} {length}"]


@pytest.mark.parametrize("seed", range(12))
def test_random_chains(tmp_path: Path, seed: int) -> None:
    layers = overlays(tmp_path, seed)
    for count in range(1, len(layers) + 1):
        merged = tmp_path / f"merged-{count}.qcow2"
        merge_layers(layers[-1], merged, count=count)
        qemu_img("compare", "-f", "qcow2", "-F", "qcow2", layers[-1], merged)
        qemu_img("check", "-q", merged)
        below = layers[-1 - count].name if count < len(layers) else None
        assert qemu_img_json("info", merged).get("backing-filename") == below


def test_hidden_data_is_left_behind_and_zeros_hide(tmp_path: Path) -> None:
    base, middle, top = (tmp_path / name for name in ("base", "middle", "top"))
    qemu_img("create", "-q", "-f", "qcow2", base, "8M")
    qemu_io(base, "write -P 1 0 4M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", middle)
    qemu_io(middle, "write -P 2 0 2M", "write -z 2M 1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "middle", "-F", "qcow2", top)
    qemu_io(top, "write -P 3 0 1M")
    part, whole = tmp_path / "part", tmp_path / "whole"
    assert merge_layers(top, part, count=2).written + merge_layers(top, whole).written == 2 * MIB + 3 * MIB
    with open_image(part) as image:
        kinds = [(each.length, each.kind) for each in image.extents(whole_chain=False)]
        assert kinds == [(2 * MIB, ExtentKind.DATA), (MIB, ExtentKind.ZERO), (5 * MIB, ExtentKind.UNALLOCATED)]
    with open_image(whole) as image:
        kinds = [(each.length, each.kind) for each in image.extents()]
        assert [kind for _, kind in kinds] == [ExtentKind.DATA, ExtentKind.UNALLOCATED] * 2


def test_compressed_clusters_are_not_opened(tmp_path: Path) -> None:
    """No sector more is taken, however often they are merged; what is no stream any more goes over as well."""
    raw, base, top = (tmp_path / name for name in ("raw", "base", "top"))
    raw.write_bytes(b"".join(os.urandom(20_000) + bytes(45_536) for _ in range(64)))
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, base)
    stored = base.read_bytes()
    with open_image(base) as image:
        first = image.clusters(0, 65536)[0]
    assert first.host_offset is not None
    base.write_bytes(stored[: first.host_offset] + b"\xff" * 64 + stored[first.host_offset + 64 :])
    for number in range(4):
        qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
        merged = tmp_path / f"merged-{number}"
        result = merge_layers(top, merged)
        assert result.written == 0
        assert merged.stat().st_size <= len(stored) + 4 * 65536
        base = merged
    base.write_bytes(base.read_bytes().replace(b"\xff" * 64, stored[first.host_offset : first.host_offset + 64]))
    qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, base)


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    base, top, merged = (tmp_path / name for name in ("base", "top", "merged"))
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", base, "8M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", top)
    with pytest.raises(OptionError, match="kinds of clusters"):
        merge_layers(top, merged)
    qemu_img("create", "-q", "-f", "qcow2", base, "8M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", top, "4M")
    with pytest.raises(OptionError, match="longer"):
        merge_layers(top, merged)
    merged.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        merge_layers(base, merged)
    assert sorted(os.listdir(tmp_path)) == ["base", "merged", "top"]
    assert merged.read_bytes() == b"mine"
