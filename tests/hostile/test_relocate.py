"""detach, relocate and attach with images that somebody has damaged: refused, or right; never a wrong disk, and never
another file than the one that was to change."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2_plugin.errors import Qcow2Error
from qcow2_plugin.operations.detach import detach
from qcow2_plugin.operations.relocate import attach, relocate
from tests.support.broken import on_data_file
from tests.support.depth import examples
from tests.support.file_calls import contents
from tests.support.reference import ReferenceReader
from tests.support.watching import no_descriptor_left

FLIPS = examples(150).max_examples
IMAGES = [(False, False), (True, False), (False, True), (True, True)]


@pytest.fixture(params=IMAGES, ids=["plain", "raw", "extended", "raw, extended"])
def files(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    raw, extended_l2 = request.param
    monkeypatch.chdir(tmp_path)
    builder = on_data_file(tmp_path, raw=raw, extended_l2=extended_l2)
    builder.build(tmp_path / "disk.qcow2")
    found = contents(tmp_path)
    found["data"] = builder.expected()
    (tmp_path / "data").write_bytes(found["data"])
    return found


def damaged(image: bytes, chance: random.Random) -> bytes:
    """With a few bits flipped, more often in the header and in what is not zeros."""
    changed = bytearray(image)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        place = chance.choice([chance.randrange(128), chance.randrange(512), chance.randrange(len(image))])
        changed[place] ^= 1 << chance.randrange(8)
    return bytes(changed)


def test_whatever_detach_lets_go_is_the_disk(files: dict[str, bytes]) -> None:
    chance, gone = random.Random(len(files["data"])), 0
    for number in range(FLIPS):
        image = damaged(files["disk.qcow2"], chance) if number else files["disk.qcow2"]
        Path("disk.qcow2").write_bytes(image)
        Path("data").write_bytes(files["data"])
        try:
            with no_descriptor_left():
                detach("disk.qcow2", lose_bitmaps=True)
        except (Qcow2Error, OSError):
            assert contents(Path()) == {"disk.qcow2": image, "data": files["data"]}
            continue
        gone += 1
        left = contents(Path())
        assert list(left) == ["data"]
        Path("disk.qcow2").write_bytes(image)
        reader = ReferenceReader(Path("disk.qcow2"), data_file=Path("data"))
        assert left["data"] == reader.read(0, reader.virtual_size)
    assert 0 < gone < FLIPS


@pytest.mark.parametrize(
    "verb",
    [lambda: relocate("disk.qcow2", data_file="moved"), lambda: attach("disk.qcow2", "moved")],
    ids=["relocate", "attach"],
)
def test_only_names_change(verb: Callable[[], object], files: dict[str, bytes]) -> None:
    chance, done = random.Random(len(files["data"])), 0
    Path("data").rename("moved")
    for number in range(FLIPS):
        image = damaged(files["disk.qcow2"], chance) if number else files["disk.qcow2"]
        Path("disk.qcow2").write_bytes(image)
        try:
            with no_descriptor_left():
                verb()
        except (Qcow2Error, OSError):
            assert contents(Path()) == {"disk.qcow2": image, "moved": files["data"]}
            continue
        done += 1
        left = contents(Path())
        cluster_size = 1 << image[23]
        assert left["moved"] == files["data"]
        assert left["disk.qcow2"][cluster_size:] == image[cluster_size:]
        assert left["disk.qcow2"][20:88] == image[20:88]  # behind the place of the backing file's name
    assert 0 < done < FLIPS
