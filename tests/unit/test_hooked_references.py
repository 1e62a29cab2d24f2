"""Names in images, located and allowed by plugins when an image is opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qcow2_plugin import Policy, create_image, open_image
from qcow2_plugin.adapters.backup.hook_values import Decision, Location
from qcow2_plugin.adapters.backup.hookspecs import hookimpl
from qcow2_plugin.adapters.backup.manager import Hooks
from qcow2_plugin.engine.chain import open_alone
from qcow2_plugin.engine.files import Reference
from qcow2_plugin.errors import ImageLockedError, PluginError, ReferenceDeniedError
from tests.support.memory_storage import MemoryStorage

MIB = 1 << 20


class Volumes:
    """A plugin that knows where names are, opens them if they are its own, and remembers what it was asked."""

    QCOW2_PLUGIN_API = 1

    def __init__(self, places: dict[bytes, str], *, allows: bool = True) -> None:
        self.places = places
        self.allows = allows
        self.asked: list[tuple[Reference, Location]] = []
        self.opened: dict[str, MemoryStorage] = {}

    @hookimpl
    def qcow2_locate_reference(self, reference: Reference) -> str | None:
        return self.places.get(reference.name)

    @hookimpl
    def qcow2_authorize_reference(self, reference: Reference, location: Location) -> Decision | None:
        self.asked.append((reference, location))
        return Decision(self.allows, "not this one") if location.plugin == "volumes" else None

    @hookimpl
    def qcow2_open_storage(self, location: str, writable: bool) -> MemoryStorage | None:
        if not location.startswith("memory:"):
            return None
        self.opened[location] = MemoryStorage(bytes(MIB), path=location)
        return self.opened[location]


def hooks(volumes: object) -> Hooks:
    return Hooks.load(use_installed=False, own={"volumes": volumes})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "volumes").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_a_plugin_locates_is_opened_there(folder: Path) -> None:
    create_image("images/disk.qcow2", MIB, data_file="images/disk.raw")
    with open_image("images/disk.qcow2", writable=True) as image:
        image.pwrite(b"moved", 0)
        image.flush()
    os.rename("images/disk.raw", "volumes/one")
    volumes = Volumes({b"disk.raw": "volumes/one"})
    with open_image("images/disk.qcow2", references=hooks(volumes).references()) as image:
        assert image.pread(5, 0) == b"moved"
    ((reference, location),) = volumes.asked
    assert reference == Reference("data file", b"disk.raw", "images/disk.qcow2", 1, False, Policy.CONFINED)
    assert location == Location(uri="volumes/one", plugin="volumes")
    with open_alone("images/disk.qcow2", writable=True, references=hooks(volumes).references()) as image:
        image.pwrite(b"there", 0)
    assert Path("volumes/one").read_bytes()[:5] == b"there"
    assert volumes.asked[-1][0].writable


def test_names_in_a_located_backing_file_start_beside_it(folder: Path) -> None:
    Path("volumes/bottom").write_bytes(b"bottom".ljust(MIB, b"\0"))
    create_image("volumes/middle", MIB, backing_file="bottom", backing_format="raw")
    create_image("images/middle", MIB)
    create_image("images/top", MIB, backing_file="middle", backing_format="qcow2")
    os.unlink("images/middle")
    volumes = Volumes({b"middle": "volumes/middle"})
    with open_image("images/top", references=hooks(volumes).references()) as image:
        assert image.pread(6, 0) == b"bottom"
    assert [(reference.name, reference.depth, location.plugin) for reference, location in volumes.asked] == [
        (b"middle", 2, "volumes"),
        (b"bottom", 3, None),
    ]
    assert volumes.asked[1][1].uri == str(folder / "volumes" / "bottom")


def test_storage_by_uri_is_read_and_written(folder: Path) -> None:
    create_image("images/disk.qcow2", MIB, data_file="images/disk.raw")
    os.unlink("images/disk.raw")
    volumes = Volumes({b"disk.raw": "memory:one"})
    with open_image("images/disk.qcow2", writable=True, references=hooks(volumes).references()) as image:
        image.pwrite(b"in memory", 65536)
        image.flush()
        storage = volumes.opened["memory:one"]
        assert storage.pread(9, 65536) == b"in memory"


@pytest.mark.parametrize("places", [{}, {b"disk.raw": "volumes/one"}])
def test_one_that_refuses_is_obeyed_before_the_file_is_opened(folder: Path, places: dict[bytes, str]) -> None:
    create_image("images/disk.qcow2", MIB, data_file="images/disk.raw")
    os.link("images/disk.raw", "volumes/one")

    class Refusing(Volumes):
        @hookimpl
        def qcow2_authorize_reference(self, reference: Reference, location: Location) -> Decision | None:
            return Decision(False, "not this one")

    with pytest.raises(ReferenceDeniedError, match=r"not this one \(plugin volumes\)"):
        open_image("images/disk.qcow2", references=hooks(Refusing(places)).references())
    with open_image("images/disk.qcow2", writable=True):  # no lock is left
        pass


def test_what_a_plugin_locates_is_not_allowed_by_that(folder: Path) -> None:
    create_image("images/disk.qcow2", MIB, data_file="images/disk.raw")
    os.link("images/disk.raw", "volumes/one")

    class Locating:
        QCOW2_PLUGIN_API = 1

        @hookimpl
        def qcow2_locate_reference(self) -> str:
            return "volumes/one"

    with pytest.raises(ReferenceDeniedError, match="no plugin allows to open volumes/one"):
        open_image("images/disk.qcow2", policy=Policy.TRUSTED, references=hooks(Locating()).references())


def test_a_located_file_is_locked_and_not_taken_twice(folder: Path) -> None:
    create_image("images/disk.qcow2", MIB, data_file="images/disk.raw")
    found = hooks(Volumes({b"disk.raw": "images/disk.raw"})).references()
    with open_image("images/disk.qcow2", writable=True), pytest.raises(ImageLockedError):
        open_image("images/disk.qcow2", references=found)
    loop = hooks(Volumes({b"disk.raw": "images/disk.qcow2"})).references()
    with pytest.raises(ReferenceDeniedError, match="the data file is the same file as the image above it"):
        open_image("images/disk.qcow2", references=loop)
    with open_image("images/disk.qcow2", writable=True):
        pass


def test_without_plugins_the_policy_decides_and_without_that_nobody_allows(folder: Path) -> None:
    create_image("images/disk.qcow2", MIB, data_file="images/disk.raw")
    assert Hooks.load(use_installed=False).references() is None
    nobody = Hooks.load(use_installed=False, blocked={"builtin-references"})
    with pytest.raises(ReferenceDeniedError, match=r"no plugin allows to open /.*/images/disk\.raw"):
        open_image("images/disk.qcow2", references=nobody.references())


def test_plugins_are_told_where_links_lead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_image("images/disk.qcow2", MIB, data_file="images/disk.raw")
    os.rename("images/disk.raw", "volumes/one")
    os.symlink("../volumes/one", "images/disk.raw")
    volumes = Volumes({})
    with open_image("images/disk.qcow2", policy=Policy.TRUSTED, references=hooks(volumes).references()):
        pass
    assert volumes.asked[0][1] == Location(uri=str(folder / "volumes" / "one"), plugin=None)
    Path("volumes/two").touch()
    monkeypatch.setattr(os.path, "realpath", lambda path: "volumes/two")  # as if the link was changed meanwhile
    with pytest.raises(ReferenceDeniedError, match="leads to another file than a moment before"):
        open_image("images/disk.qcow2", policy=Policy.TRUSTED, references=hooks(volumes).references())


def test_failures_of_plugins_are_failures_to_open(folder: Path) -> None:
    create_image("images/disk.qcow2", MIB, data_file="images/disk.raw")

    class Failing:
        QCOW2_PLUGIN_API = 1

        @hookimpl
        def qcow2_locate_reference(self, reference: Any) -> str:
            raise LookupError("no map")

    with pytest.raises(PluginError, match='plugin "volumes" failed in qcow2_locate_reference: LookupError: no map'):
        open_image("images/disk.qcow2", references=hooks(Failing()).references())
