"""Files of QEMU grow with us and ours with QEMU: whoever wrote last, `qemu-img check` finds nothing, not even a leak,
and the disk reads as it was told, on images of every pair of create options."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcow2_plugin import Policy, open_image
from tests.support.model import Model, Places, Request, Verb, assert_reads_as
from tests.support.pairwise import Row, pairwise
from tests.support.tools import qemu_img, qemu_img_json, qemu_io

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
OPERATIONS = 240  # of ours, twice for each image; fewer where every one moves a lot
THEIRS = 30  # of QEMU's, twice as well

FACTORS = {
    "compat": ("1.1", "0.10"),
    "cluster_size": ("65536", "512", "4096", "16384", "262144", "2097152"),
    "refcount_bits": ("16", "1", "2", "4", "8", "32", "64"),
    "lazy_refcounts": ("off", "on"),
    "extended_l2": ("off", "on"),
    "compression_type": ("zlib", "zstd"),
    "preallocation": ("off", "metadata", "falloc", "full"),
    "data_file": ("none", "plain", "raw"),
    "backing": ("none", "raw shorter", "raw longer", "qcow2 shorter", "qcow2 longer"),
    "size": ("odd", "sector", "inside a cluster", "two L2 tables"),
    "content": ("written", "empty", "written compressed", "snapshot"),
}
ONLY_VERSION_3 = {
    "refcount_bits": "16", "lazy_refcounts": "off", "extended_l2": "off", "compression_type": "zlib",
    "data_file": "none",
}  # fmt: skip


def conflicts(row: Row) -> bool:
    """What qemu-img refuses, and what would be larger than a test can hold."""
    if row.get("compat") == "0.10" and any(row.get(name, value) != value for name, value in ONLY_VERSION_3.items()):
        return True
    if row.get("extended_l2") == "on" and row.get("cluster_size") in ("512", "4096"):
        return True
    if row.get("content") in ("written compressed", "snapshot") and row.get("data_file", "none") != "none":
        return True
    if row.get("content") == "snapshot" and row.get("refcount_bits") == "1":
        return True
    is_preallocated = row.get("preallocation", "off") != "off"
    if row.get("content") == "written compressed" and is_preallocated:
        return True
    if row.get("backing", "none") != "none":
        needs_subclusters = is_preallocated and row.get("extended_l2", "on") == "off"
        if row.get("data_file") == "raw" or needs_subclusters:
            return True
        if is_preallocated and (row.get("compat") == "0.10" or row.get("cluster_size") in ("512", "4096")):
            return True
    if row.get("size") == "two L2 tables":
        if row.get("cluster_size") in ("262144", "2097152"):
            return True
        return row.get("cluster_size") == "65536" and (is_preallocated or row.get("data_file") == "raw")
    return False


ROWS = pairwise(FACTORS, conflicts)


def name_of(row: Row) -> str:
    return "-".join(row.values()).replace(" ", "_")


def test_every_possible_pair_of_options_is_among_the_images() -> None:
    pairs = {pair for row in ROWS for pair in itertools.combinations(row.items(), 2)}
    for (first, first_values), (second, second_values) in itertools.combinations(FACTORS.items(), 2):
        for first_value, second_value in itertools.product(first_values, second_values):
            pair = ((first, first_value), (second, second_value))
            assert (pair in pairs) != conflicts(dict(pair)), pair


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_an_image_of_qemu_is_written_by_us_and_by_qemu_in_turn(row: Row, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    chance = random.Random(zlib.crc32(name_of(row).encode()))
    model = make(path, row, chance)
    places = places_of(row)
    then = tmp_path / "then.raw"
    if row["content"] != "empty":
        write_by_qemu(path, model, [places.request(chance, model.virtual_size) for _ in range(THEIRS)])
    if row["content"] == "snapshot":
        qemu_img("snapshot", "-c", "then", path)
        model.save(then)
    for turn in range(2):
        write_by_us(path, model, places, chance)
        assert_clean(path, model)
        if row["data_file"] == "raw":
            assert_raw_file_is_the_disk(path.with_suffix(".data"), model)
        if turn == 0:
            write_by_qemu(path, model, [places.request(chance, model.virtual_size) for _ in range(THEIRS)])
            with open_image(path, policy=Policy.TRUSTED) as image:
                assert_reads_as(image, model)
    if row["content"] == "snapshot":
        options = f"driver=qcow2,file.filename={path}"
        qemu_img("convert", "-l", "snapshot.name=then", "--image-opts", "-O", "raw", options, tmp_path / "found.raw")
        qemu_img("compare", "-f", "raw", "-F", "raw", then, tmp_path / "found.raw")


@pytest.mark.parametrize("verb", [Verb.ZERO, Verb.UNMAP, Verb.DISCARD])
@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=2M", "cluster_size=16k,extended_l2=on"])
def test_ranges_of_more_than_4_gib(options: str, verb: Verb, tmp_path: Path) -> None:
    """On data, zeros, compressed clusters and what a snapshot shares, with odd ends; QEMU reads back what is left."""
    path, size = tmp_path / "disk.qcow2", 9 * GIB + 512
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(size))
    cluster_size = qemu_img_json("info", path)["cluster-size"]
    model = Model(size, cluster_size)
    spots = [0, 2 * GIB - 65536, 4 * GIB - 65536, 6 * GIB, 8 * GIB + MIB, size - 70000]
    write_by_qemu(path, model, [Request(Verb.WRITE, offset, 70000, offset % 999) for offset in spots])
    qemu_img("snapshot", "-c", "then", path)
    write_by_qemu(path, model, [Request(Verb.WRITE, offset + 30000, 3000, offset % 888) for offset in spots[1::2]])
    packed = 5 * GIB
    qemu_io(path, f"write -c -P 7 {packed} {2 * cluster_size}", f"write -z {packed + 4 * cluster_size} 8M")
    model.write(packed, b"\7" * (2 * cluster_size))
    request = Request(verb, 40000, 8 * GIB + 2 * MIB)
    with open_image(path, writable=True) as image:
        request.apply(image)
        model.apply(request)
        assert_reads_as(image, model)
    assert_clean(path, model)
    assert path.stat().st_blocks * 512 < 40 * MIB
    qemu_img("snapshot", "-a", "then", path)
    qemu_img("check", path)


def write_by_us(path: Path, model: Model, places: Places, chance: random.Random) -> None:
    """So many requests, with a look at the disk and a flush now and then."""
    with open_image(path, policy=Policy.TRUSTED, writable=True, cache_size=chance.choice([0, 20000, 1 << 25])) as image:
        for _ in range(OPERATIONS if model.cluster_size < MIB else OPERATIONS // 3):
            request = places.request(chance, model.virtual_size)
            request.apply(image)
            model.apply(request)
            pick = chance.random()
            if pick < 0.05:
                image.flush()
            elif pick < 0.3:
                first = max(request.offset - chance.choice([0, 0, 700]), 0)
                length = min(request.length + chance.choice([0, 1, 70000]), 1 << 20, model.virtual_size - first)
                assert image.pread(length, first) == model.read(first, length), f"after {request}"
        assert_reads_as(image, model)


def write_by_qemu(path: Path, model: Model, requests: list[Request]) -> None:
    commands = [request.command(path.parent) for request in requests]
    qemu_io(path, *commands, options=("-f", "qcow2", "-t", "unsafe", "-d", "unmap"))
    for request in requests:
        model.apply(request)


def assert_clean(path: Path, model: Model) -> None:
    """QEMU finds nothing to complain about, and reads the same."""
    qemu_img("check", "-f", "qcow2", path)
    raw = path.with_name("model.raw")
    model.save(raw)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", path, raw)


def assert_raw_file_is_the_disk(path: Path, model: Model) -> None:
    raw = path.with_name("model.raw")
    with open(path, "rb") as data, open(raw, "rb") as wanted:
        for offset in range(0, model.virtual_size, MIB):
            length = min(MIB, model.virtual_size - offset)
            assert data.read(length) == wanted.read(length), f"between {offset:#x} and {offset + length:#x}"


# ---- the images


def make(path: Path, row: Row, chance: random.Random) -> Model:
    """The image of a row, with compressed clusters if it is to have such, and what it reads as."""
    cluster_size, virtual_size = int(row["cluster_size"]), virtual_size_of(row)
    below = backing_content(row, virtual_size)
    words: list[str | Path] = []
    for option in create_options(row, path.with_suffix(".data")):
        words += ["-o", option]
    if row["backing"] != "none":
        form = row["backing"].split()[0]
        words += ["-b", make_backing_file(path, form, below), "-F", form]
    qemu_img("create", "-q", "-f", "qcow2", *words, path, str(virtual_size))
    hides_nothing = row["compat"] == "0.10" and row["backing"] != "none"
    model = Model(virtual_size, cluster_size, content=below, discards=not hides_nothing)
    if row["content"] == "written compressed":
        write_compressed(path, model, chance)
    return model


def write_compressed(path: Path, model: Model, chance: random.Random) -> None:
    """Here and there a cluster; the streams of neighbours share host clusters."""
    commands = []
    for cluster in range(min(12, model.virtual_size // model.cluster_size)):
        if chance.random() < 0.7:
            letters = random.Random(cluster).choices(b"qcow2 data\xff\x01", k=1021)
            data = (bytes(letters) * (model.cluster_size // 1021 + 1))[: model.cluster_size]
            payload = path.with_name(f"compressed-{cluster}")
            payload.write_bytes(data)
            commands.append(f"write -c -s {payload} {cluster * model.cluster_size} {model.cluster_size}")
            model.write(cluster * model.cluster_size, data)
    if commands:
        qemu_io(path, *commands, options=("-f", "qcow2", "-t", "unsafe"))


def make_backing_file(path: Path, form: str, content: bytes) -> Path:
    raw = path.with_name("below.raw")
    raw.write_bytes(content)
    if form == "raw":
        return raw
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096", raw, path.with_name("below.qcow2"))
    return path.with_name("below.qcow2")


def backing_content(row: Row, virtual_size: int) -> bytes:
    """Bytes and holes, ending before the disk or behind it, inside a cluster of any size."""
    if row["backing"] == "none":
        return b""
    length = min(virtual_size, 2 * MIB + 5 * KIB)
    length = length // 2 // 512 * 512 + 512 if row["backing"].endswith("shorter") else length + 70 * KIB + 512
    content = bytearray(random.Random(length).randbytes(length))
    for start in range(0, length, 96 * KIB):
        content[start : start + 20 * KIB] = bytes(len(content[start : start + 20 * KIB]))
    return bytes(content)


def l2_coverage_of(row: Row) -> int:
    cluster_size = int(row["cluster_size"])
    return cluster_size * cluster_size // (16 if row["extended_l2"] == "on" else 8)


def virtual_size_of(row: Row) -> int:
    cluster_size = int(row["cluster_size"])
    return {
        "odd": max(3 * MIB, 3 * cluster_size) + 1536,
        "sector": 512,
        "inside a cluster": 5 * cluster_size + cluster_size // 1024 * 512 + 512,
        "two L2 tables": l2_coverage_of(row) + 3 * cluster_size + 512,
    }[row["size"]]


def places_of(row: Row) -> Places:
    cluster_size = int(row["cluster_size"])
    block_coverage = cluster_size * 8 // int(row["refcount_bits"]) * cluster_size
    return Places(
        cluster_size,
        cluster_size // 32 if row["extended_l2"] == "on" else cluster_size,
        (l2_coverage_of(row), block_coverage, min(4096, cluster_size) // 8 * cluster_size),
    )


def create_options(row: Row, data_path: Path) -> Iterator[str]:
    for name, value in row.items():
        if name in ("data_file", "backing", "size", "content"):
            continue
        if row["compat"] == "0.10" and name in ONLY_VERSION_3:
            continue
        yield f"{name}={value}"
    if row["data_file"] != "none":
        yield f"data_file={data_path}"
        yield f"data_file_raw={'on' if row['data_file'] == 'raw' else 'off'}"


def test_requests_are_what_they_say(tmp_path: Path) -> None:
    """The model and QEMU agree on what requests mean, on an image that we never touch."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, str(3 * MIB + 1536))
    model = Model(3 * MIB + 1536, 4096)
    places, chance = Places(4096, 4096, (2 * MIB,)), random.Random(1)
    requests = [places.request(chance, model.virtual_size) for _ in range(150)]
    assert {request.verb for request in requests} == set(Verb)
    write_by_qemu(path, model, requests)
    assert_clean(path, model)
