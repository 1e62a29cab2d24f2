"""`amend` beside `qemu-img amend`: each reads what the other makes, and finds nothing wrong with it."""

from __future__ import annotations

import errno
import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin import Policy, amend, create_image, info, open_image
from qcow2_plugin.engine import zero_expansion
from qcow2_plugin.errors import AmendError, OptionError, Qcow2Error, ReadOnlyImageError, ResizeError
from tests.support.pairwise import Row, pairwise
from tests.support.tools import ToolError, convert_to_raw, qemu_img, qemu_img_json, qemu_io

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB
Snapshots = dict[str, bytes]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(folder: Path, *options: str, overlay: bool = False, snapshots: bool = True, size: int = SIZE) -> None:
    """An image by QEMU with data, zeros of both kinds, and two snapshots that share some of it."""
    (folder / "base.raw").write_bytes(b"B" * SIZE)
    below = ("-b", "base.raw", "-F", "raw") if overlay else ()
    qemu_img("create", "-q", "-f", "qcow2", *(word for option in options for word in ("-o", option)), *below,
             "disk.qcow2", str(size))  # fmt: skip
    qemu_io("disk.qcow2", "write -P 1 0 300k", "write -P 3 1M 600k")
    zeros = "" if "compat=0.10" in options else "write -z {} 200k"
    if zeros:
        qemu_io("disk.qcow2", zeros.format("100k"))
    if not snapshots:
        return
    qemu_img("snapshot", "-c", "one", "disk.qcow2")
    qemu_io("disk.qcow2", "write -P 4 200k 100k", *([zeros.format("1M"), "write -z -u 3M 64k"] if zeros else []))
    qemu_img("snapshot", "-c", "two", "disk.qcow2")
    if zeros:
        qemu_io("disk.qcow2", zeros.format("2M"))


def views(folder: Path, snapshots: bool = True) -> list[bytes]:
    """The disk and its snapshots, as QEMU reads them."""
    found = [convert_to_raw("disk.qcow2")]
    for name in ("one", "two") if snapshots else ():
        qemu_img("convert", "-l", f"snapshot.name={name}", "-O", "raw", "disk.qcow2", "snapshot.raw")
        found.append((folder / "snapshot.raw").read_bytes()[:SIZE])
    return found


def features() -> dict[str, Any]:
    """What QEMU says of the image."""
    told = qemu_img_json("info", "disk.qcow2")
    return {**told["format-specific"]["data"], "size": told["virtual-size"]}


def check() -> None:
    qemu_img("check", "disk.qcow2")


# ---- every option, and pairs of them

FACTORS = {
    "cluster_size": ("65536", "4096", "512"),
    "from": ("1.1", "0.10", "1.1,refcount_bits=64", "1.1,refcount_bits=8,lazy_refcounts=on"),
    "overlay": ("", "overlay"),
    "compat": ("", "1.1", "0.10"),
    "refcount_bits": ("", "16", "8", "64"),
    "lazy_refcounts": ("", "on", "off"),
    "size": ("", "4194304", "5242880"),
}


def conflicts(row: Row) -> bool:
    """What is refused, by QEMU as well."""
    before = row.get("from", "1.1")
    version = row.get("compat") or before[:4].rstrip(",")
    bits = row.get("refcount_bits") or (before.partition("refcount_bits=")[2][:2].strip(",") or "16")
    if version == "0.10" and ("compat" in row or "from" in row):
        if bits != "16" and {"refcount_bits", "from"} & row.keys():
            return True
        if row.get("lazy_refcounts") == "on":
            return True
        if row.get("size") == "5242880":  # the snapshots are smaller
            return True
    return False


ROWS = [row for row in pairwise(FACTORS, conflicts) if not conflicts(row)]


def arguments(row: Row) -> dict[str, Any]:
    told: dict[str, Any] = {name: row[name] for name in ("compat",) if row[name]}
    told |= {name: int(row[name]) for name in ("refcount_bits", "size") if row[name]}
    if row["lazy_refcounts"]:
        told["lazy_refcounts"] = row["lazy_refcounts"] == "on"
    return told


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "/".join(filter(None, row.values())))
def test_what_comes_out_is_what_qemu_makes(row: Row, folder: Path) -> None:
    compat, *more = row["from"].split(",")
    options = [f"cluster_size={row['cluster_size']}", f"compat={compat}", *more]
    make(folder, *options, overlay=bool(row["overlay"]))
    (folder / "theirs.qcow2").write_bytes((folder / "disk.qcow2").read_bytes())
    before = views(folder)
    told = arguments(row)
    amend("disk.qcow2", **told)
    check()
    after = views(folder)
    assert [view[:SIZE] for view in after] == before
    assert not any(after[0][SIZE:])
    ours = features()
    words = [f"{name}={row[name]}" for name in ("compat", "refcount_bits", "lazy_refcounts", "size") if row[name]]
    if words:
        qemu_img("amend", "-f", "qcow2", "-o", ",".join(words), "theirs.qcow2")
    (folder / "theirs.qcow2").replace(folder / "disk.qcow2")
    assert features() == ours
    with open_image("disk.qcow2") as image:  # we read theirs
        assert image.pread(SIZE, 0) == before[0]
        for name, view in zip(("one", "two"), before[1:], strict=True):
            if row["compat"] != "0.10":  # there QEMU 7.2 writes zeros over what snapshots share with zero clusters
                assert image.at_snapshot(name).pread(SIZE, 0) == view


def test_there_and_back_and_written_in_between(folder: Path) -> None:
    """QEMU and we in turn."""
    make(folder, "cluster_size=4096")
    view = bytearray(views(folder)[0])
    chance = random.Random(3)
    steps: list[dict[str, Any]] = [
        *({"compat": "1.1", "refcount_bits": bits} for bits in (64, 2, 32, 16)),
        {"compat": "0.10"},
        {"compat": "1.1", "lazy_refcounts": True},
        {"compat": "0.10", "refcount_bits": 16},
    ]
    for number, step in enumerate(steps):
        if number % 2:
            told = {name: "on" if value is True else value for name, value in step.items()}
            qemu_img("amend", "-o", ",".join(f"{name}={value}" for name, value in told.items()), "disk.qcow2")
        else:
            amend("disk.qcow2", **step)
        check()
        offset = chance.randrange(0, SIZE - 5000)
        view[offset : offset + 5000] = bytes([number]) * 5000
        with open_image("disk.qcow2", writable=True) as image:
            image.pwrite(view[offset : offset + 5000], offset)
        assert convert_to_raw("disk.qcow2") == view


def test_an_image_that_is_open_is_amended_and_goes_on(folder: Path) -> None:
    make(folder, "compat=0.10", "cluster_size=4096", overlay=True)
    view = bytearray(views(folder)[0])
    with open_image("disk.qcow2", writable=True) as image:
        for number, step in enumerate(
            [
                {"compat": "1.1", "refcount_bits": 64},
                {"refcount_bits": 8},
                {"lazy_refcounts": True, "refcount_bits": 16},
                {"compat": "0.10"},
                {"compat": "v3"},
            ]
        ):
            start = number * 100 * KIB + 123
            image.pwrite(b"x" * 70000, start)
            view[start : start + 70000] = b"x" * 70000
            amend(image, **step)  # type: ignore[arg-type] # of its own kinds
            image.write_zeroes(start + 5000, 30000)
            view[start + 5000 : start + 35000] = bytes(30000)
            image.discard(start + 40960, 8192)
            first, end = -(-(start + 40960) // 4096) * 4096, (start + 49152) // 4096 * 4096
            if image.header.version > 2:
                view[first:end] = bytes(end - first)
            assert image.pread(SIZE, 0) == view
    check()
    assert convert_to_raw("disk.qcow2") == view


@pytest.mark.parametrize("options", [["backing"], []])
def test_zeros_written_over_what_a_snapshot_keeps_are_found_out(
    options: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero_expansion, "_is_own", lambda _, __, offsets: offsets != 0)
    make(folder, overlay=bool(options))
    before = views(folder)
    amend("disk.qcow2", compat="0.10")
    assert views(folder) != before


# ---- what is refused


@pytest.mark.parametrize(
    ("created", "told", "message"),
    [
        ([], {"refcount_bits": 3}, "refcounts have 1, 2, 4, 8, 16, 32 or 64 bits, not 3"),
        ([], {"refcount_bits": 128}, "not 128"),
        ([], {"refcount_bits": 0}, "not 0"),
        (
            [],
            {"refcount_bits": 1},
            r"[23] references to the cluster at host offset 0x\w+ do not fit into refcounts of 1",
        ),
        ([], {"compat": "0.10", "refcount_bits": 8}, "compat=0.10 has refcounts of 16 bits only"),
        (["refcount_bits=64"], {"compat": "0.10"}, "compat=0.10 has refcounts of 16 bits only"),
        (["compat=0.10"], {"refcount_bits": 8}, "compat=0.10 has refcounts of 16 bits only"),
        (["compat=0.10"], {"lazy_refcounts": True}, r"lazy_refcounts needs compat=1\.1"),
        ([], {"compat": "0.10", "lazy_refcounts": True}, r"lazy_refcounts needs compat=1\.1"),
        (["extended_l2=on"], {"compat": "0.10"}, "compat=0.10 cannot be: it has no extended L2 entries"),
        ([], {"compat": "0.10", "size": 2 * SIZE}, "it has no internal snapshots of a disk of another size"),
        ([], {"data_file": "x"}, "data_file is for images that have an external data file"),
        ([], {"data_file_raw": True}, "data_file_raw is for images that have an external data file"),
    ],
)
def test_what_cannot_be_is_refused_as_by_qemu(
    created: list[str], told: dict[str, Any], message: str, folder: Path
) -> None:
    make(folder, *created)
    before = (folder / "disk.qcow2").read_bytes()
    with pytest.raises(AmendError, match=message) as caught:
        amend("disk.qcow2", **told)
    assert caught.value.errno == errno.EINVAL
    assert (folder / "disk.qcow2").read_bytes() == before
    words = {name: {True: "on"}.get(value, value) for name, value in told.items()}
    with pytest.raises(ToolError):
        qemu_img("amend", "-o", ",".join(f"{name}={value}" for name, value in words.items()), "disk.qcow2")


def test_sizes_are_refused_before_anything_changes(folder: Path) -> None:
    make(folder, "compat=0.10")
    before = (folder / "disk.qcow2").read_bytes()
    with pytest.raises(ResizeError, match="may shrink"):
        amend("disk.qcow2", compat="1.1", size=SIZE // 2)
    with pytest.raises(ResizeError, match="version 2 with internal snapshots"):
        amend("disk.qcow2", size=2 * SIZE)
    with pytest.raises(AmendError, match="nothing would be left of the disk"):
        amend("disk.qcow2", size=0, allow_shrink=True)
    with pytest.raises(ResizeError, match="too large"):
        amend("disk.qcow2", compat="1.1", size=1 << 60)
    with pytest.raises(OptionError, match='"2" is no compat'):
        amend("disk.qcow2", compat="2")
    assert (folder / "disk.qcow2").read_bytes() == before
    amend("disk.qcow2", compat="1.1", size=SIZE // 2, allow_shrink=True)
    check()
    assert info("disk.qcow2").virtual_size == SIZE // 2


def test_an_image_that_is_open_for_reading_is_refused(folder: Path) -> None:
    make(folder)
    with open_image("disk.qcow2") as image, pytest.raises(ReadOnlyImageError):
        amend(image, lazy_refcounts=True)


def test_bitmaps_are_not_lost_by_a_downgrade(folder: Path) -> None:
    """QEMU leaks their clusters and says nothing."""
    make(folder, snapshots=False)
    qemu_img("bitmap", "--add", "disk.qcow2", "b")
    before = (folder / "disk.qcow2").read_bytes()
    with pytest.raises(AmendError, match=r"it has no dirty bitmaps \(remove them first\)"):
        amend("disk.qcow2", compat="0.10")
    assert (folder / "disk.qcow2").read_bytes() == before
    amend("disk.qcow2", refcount_bits=64, lazy_refcounts=True)
    check()
    assert [bitmap["name"] for bitmap in features()["bitmaps"]] == ["b"]
    assert features()["bitmaps"][0]["flags"] == ["auto"]
    qemu_img("bitmap", "--remove", "disk.qcow2", "b")
    amend("disk.qcow2", compat="0.10", refcount_bits=16)
    check()


def test_zstd_is_given_up_where_nothing_is_compressed(folder: Path) -> None:
    make(folder, "compression_type=zstd")
    before = views(folder)
    amend("disk.qcow2", compat="0.10")
    check()
    assert (features()["compat"], features()["compression-type"], views(folder)) == ("0.10", "zlib", before)
    qemu_img("convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", "disk.qcow2", "packed.qcow2")
    with pytest.raises(AmendError, match="it has no clusters compressed with zstd"):
        amend("packed.qcow2", compat="0.10")
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", "kept.qcow2", "1M")
    qemu_io("kept.qcow2", "write -c -P 7 0 64k")
    qemu_img("snapshot", "-c", "s", "kept.qcow2")
    qemu_io("kept.qcow2", "write 0 64k")
    with pytest.raises(AmendError, match="it has no clusters compressed with zstd"):  # QEMU looks at the disk only
        amend("kept.qcow2", compat="0.10")


# ---- data files


def with_data_file(*options: str) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", ",".join(["data_file=disk.raw", *options]), "disk.qcow2", "1M")
    qemu_io("disk.qcow2", "write -P 5 0 200k", "write -P 6 500k 100k")


@pytest.mark.parametrize("name", ["other.raw", "o" * 255, "", "./a/rather/long/name/" + "d/" * 300 + "x"])
def test_another_name_for_the_data_file(name: str, folder: Path) -> None:
    with_data_file()
    before = convert_to_raw("disk.qcow2")
    amend("disk.qcow2", data_file=name)
    assert features().get("data-file") == (name or None)
    assert (folder / "disk.raw").exists()
    with open_image("disk.qcow2", data_file="disk.raw") as image:
        assert image.pread(MIB, 0) == before
    amend("disk.qcow2", data_file="disk.raw", current_data_file="disk.raw")
    check()
    assert convert_to_raw("disk.qcow2") == before
    qemu_img("amend", "-o", "data_file=./disk.raw", "disk.qcow2")
    assert info("disk.qcow2").qcow2.data_file == "./disk.raw"  # type: ignore[union-attr] # it is one


@pytest.mark.parametrize("name", ["x" * 1024, "a\0b"])
def test_no_name_for_a_data_file(name: str, folder: Path) -> None:
    with_data_file()
    with pytest.raises(AmendError, match="is no name for a data_file"):
        amend("disk.qcow2", data_file=name)


def test_a_data_file_image_has_no_version_2(folder: Path) -> None:
    with_data_file()
    with pytest.raises(AmendError, match="it has no external data file"):
        amend("disk.qcow2", compat="0.10")


@pytest.mark.parametrize("extended", ["extended_l2=off", "extended_l2=on"])
def test_a_raw_data_file_is_proven(extended: str, folder: Path) -> None:
    with_data_file(extended)
    qemu_io("disk.qcow2", "write -z 700k 64k")
    before = convert_to_raw("disk.qcow2")
    amend("disk.qcow2", data_file_raw=True)
    check()
    assert features()["data-file-raw"] is True
    assert (folder / "disk.raw").read_bytes()[:MIB] == before == convert_to_raw("disk.qcow2")
    assert all(each["data"] for each in qemu_img_json("map", "disk.qcow2"))
    qemu_img("amend", "-o", "data_file_raw=off", "disk.qcow2")
    amend("disk.qcow2", data_file_raw=True)
    amend("disk.qcow2", data_file_raw=True)
    with open_image("disk.qcow2", writable=True) as image:
        image.write_zeroes(0, 100 * KIB)
        image.discard(512 * KIB, 64 * KIB)
    after = convert_to_raw("disk.qcow2")
    assert (folder / "disk.raw").read_bytes()[:MIB] == after
    amend("disk.qcow2", data_file_raw=False)
    assert features()["data-file-raw"] is False
    assert convert_to_raw("disk.qcow2") == after


def test_a_data_file_that_shows_something_else_is_refused(folder: Path) -> None:
    with_data_file()
    with (folder / "disk.raw").open("r+b") as file:
        file.seek(MIB - 1000)
        file.write(b"!")
    with pytest.raises(AmendError, match=f"at guest offset {MIB - 1000:#x} the disk reads as zeros") as caught:
        amend("disk.qcow2", data_file_raw=True)
    assert "disk.raw" in str(caught.value)
    assert features()["data-file-raw"] is False
    (folder / "base.raw").write_bytes(bytes(MIB))
    qemu_img("rebase", "-u", "-b", "base.raw", "-F", "raw", "disk.qcow2")
    with pytest.raises(AmendError, match="a backing file exclude each other"):
        amend("disk.qcow2", data_file_raw=True)


# ---- what nobody here knows


def test_what_is_unknown_stays(folder: Path) -> None:
    """Features, extensions, and fields behind those that are known."""
    create_image("disk.qcow2", MIB)
    content = bytearray((folder / "disk.qcow2").read_bytes())
    extensions = bytes(content[112:1000])
    content[80:88] = (1 << 50).to_bytes(8, "big")
    content[96:104] = (4).to_bytes(4, "big") + (128).to_bytes(4, "big")
    content[112:128] = b"fields to come!!"
    unknown = b"\x12\x34\x56\x78\x00\x00\x00\x05hello\xff\xff\xff"
    content[128 : 128 + len(unknown) + len(extensions)] = unknown + extensions
    (folder / "disk.qcow2").write_bytes(content)
    amend("disk.qcow2", refcount_bits=64, lazy_refcounts=True)
    check()
    after = (folder / "disk.qcow2").read_bytes()
    assert after[112 : 128 + len(unknown)] == content[112 : 128 + len(unknown)]
    assert int.from_bytes(after[80:88], "big") == 1 << 50 | 1
    with pytest.raises(AmendError, match="header fields that are not known here"):
        amend("disk.qcow2", compat="0.10", refcount_bits=16)


# ---- the header, as QEMU writes it


@pytest.mark.parametrize(
    ("names", "bitmap"), list(itertools.product(["", "base.raw", "./" * 400 + "base.raw"], [0, 1]))
)
def test_qemu_takes_over_headers_of_ours(names: str, bitmap: int, folder: Path) -> None:
    (folder / "base.raw").write_bytes(b"B" * MIB)
    below = ("-b", names, "-F", "raw") if names else ()
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", *below, "disk.qcow2", "1M")
    for number in range(3):
        amend("disk.qcow2", compat="1.1", policy=Policy.TRUSTED)
        if bitmap:
            qemu_img("bitmap", "--add", "disk.qcow2", f"b{number}")
        amend("disk.qcow2", lazy_refcounts=not number % 2, policy=Policy.TRUSTED)
        check()
        told = qemu_img_json("info", "disk.qcow2")
        assert told.get("backing-filename") == (names or None)
        assert len(told["format-specific"]["data"].get("bitmaps", [])) == (1 if bitmap else 0)
        if bitmap:
            qemu_img("bitmap", "--remove", "disk.qcow2", f"b{number}")
        amend("disk.qcow2", compat="0.10", policy=Policy.TRUSTED)
        check()
        assert convert_to_raw("disk.qcow2") == (b"B" if names else b"\0") * MIB


def test_progress_is_told(folder: Path) -> None:
    make(folder, "cluster_size=512")
    told: list[tuple[int, int]] = []
    amend("disk.qcow2", compat="0.10", progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 16
    assert told == sorted(told)


def test_errors_are_all_of_one_kind() -> None:
    assert issubclass(AmendError, Qcow2Error)
