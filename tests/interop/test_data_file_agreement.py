"""QEMU and we write to one data-file image in turn, and after each turn all of us see the same disk: qemu-img, our
reader, and for a raw data file whoever reads that file and knows nothing of the image.

Turns are random and the same in every run; a failure says its seed. QCOW2_TEST_DEPTH=deep takes more of them.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbd
import pytest

from qcow2_plugin import Policy, check, open_image
from qcow2_plugin.extent import ExtentKind
from qcow2_plugin.operations.adopt import adopt
from qcow2_plugin.operations.detach import detach
from qcow2_plugin.operations.relocate import relocate
from tests.crash.campaign import DEPTH
from tests.support.model import Model, Places, Request, Verb, assert_reads_as
from tests.support.tools import convert_to_raw, qemu_img, qemu_io

KIB = 1 << 10
SIZE = 500 * KIB + 512
TURNS = 14
SEEDS = range(max(int(DEPTH * 2), 2))
FORMS = {  # cluster size, subclusters, create options
    "512": (512, 1, "cluster_size=512"),
    "64k": (65536, 1, "cluster_size=64k"),
    "lazy": (4096, 1, "cluster_size=4k,lazy_refcounts=on"),
    "extended": (16384, 32, "cluster_size=16k,extended_l2=on"),
}

pytestmark = pytest.mark.timeout(3600 if DEPTH > 1 else 120)


class Turns:
    """An image, its data file and what both must show. `maker` says who made them."""

    def __init__(self, folder: Path, form: str, *, raw: bool, maker: str, seed: int) -> None:
        self.folder, self.raw = folder, raw
        self.path, self.data_path = folder / "disk.qcow2", folder / "disk.data"
        self.chance = random.Random(f"{form} {raw} {maker} {seed}")
        cluster_size, subclusters, options = FORMS[form]
        self.model = Model(SIZE, cluster_size)
        if maker == "adopted":
            content = self.chance.randbytes(SIZE // 2).ljust(SIZE, b"\0")
            self.data_path.write_bytes(content)
            self.model.write(0, content)
            adopt(self.data_path, self.path, cluster_size=cluster_size, extended_l2=subclusters > 1, bitmap="all")
            relocate(self.path, data_file=self.data_path, form="absolute")
        else:
            options += f",data_file={self.data_path},data_file_raw={'on' if raw else 'off'}"
            qemu_img("create", "-q", "-f", "qcow2", "-o", options, self.path, str(SIZE))
        coverage = cluster_size * cluster_size // (8 if subclusters == 1 else 16)
        self.places = Places(cluster_size, cluster_size // subclusters, (coverage,))

    def requests(self) -> Iterator[Request]:
        for _ in range(self.chance.randint(1, 6)):
            request = self.places.request(self.chance, self.model.virtual_size)
            self.model.apply(request)
            yield request

    # -- who has the turn

    def we_write(self) -> None:
        with open_image(self.path, writable=True, policy=Policy.TRUSTED) as image:
            for request in self.requests():
                request.apply(image)
                if self.raw:
                    self.compare_data_file()
                if self.chance.random() < 0.3:
                    image.flush()
            assert_reads_as(image, self.model)

    def qemu_io_writes(self) -> None:
        commands = [request.command(self.folder) for request in self.requests()]
        qemu_io(self.path, *commands, options=("-f", "qcow2", "-t", "unsafe", "-d", "unmap"))

    def qemu_nbd_serves(self) -> None:
        with self._qemu_nbd() as handle:
            for request in self.requests():
                if request.verb is Verb.WRITE:
                    handle.pwrite(request.payload, request.offset)
                elif request.verb is Verb.DISCARD:
                    handle.trim(request.length, request.offset)
                else:
                    flags = 0 if request.verb is Verb.UNMAP else nbd.CMD_FLAG_NO_HOLE
                    handle.zero(request.length, request.offset, flags)
            handle.flush()

    def we_resize(self) -> None:
        size = self._other_size()
        with open_image(self.path, writable=True, policy=Policy.TRUSTED) as image:
            image.resize(size, allow_shrink=True)

    def qemu_resizes(self) -> None:
        qemu_img("resize", "-q", "-f", "qcow2", "--shrink", self.path, str(self._other_size()))

    def _other_size(self) -> int:
        size = self.chance.randint(SIZE // 3, SIZE + 200 * KIB) // 512 * 512
        self.model.resize(size)
        return size

    @contextmanager
    def _qemu_nbd(self) -> Iterator[nbd.NBD]:
        socket = self.folder / "socket"
        command = ["qemu-nbd", "-f", "qcow2", "--discard=unmap", "-k", str(socket), str(self.path)]
        with subprocess.Popen(command) as server:
            handle = nbd.NBD()
            for _ in range(200):
                if socket.exists():
                    break
                time.sleep(0.02)
            handle.connect_unix(str(socket))
            yield handle
            handle.shutdown()
            assert server.wait(20) == 0

    # -- what all must see

    def compare(self) -> None:
        size = self.model.virtual_size
        view = self.model.read(0, size)
        with open_image(self.path, policy=Policy.TRUSTED) as image:
            assert image.virtual_size == size
            assert image.pread(size, 0) == view, "what we read"
            data = [extent for extent in image.extents() if extent.kind is ExtentKind.DATA]
        assert convert_to_raw(self.path) == view, "what qemu-img reads"
        stored = self.data_path.read_bytes()[:size].ljust(size, b"\0")
        for extent in data:
            start, end = extent.guest_offset, extent.guest_offset + extent.length
            assert extent.host_offset == start
            assert stored[start:end] == view[start:end]
        found = check(self.path, policy=Policy.TRUSTED, deep=True)
        assert (found.corruptions, found.extra_corruptions) == (0, 0), found.findings
        if self.raw:
            self.compare_data_file()

    def compare_data_file(self) -> None:
        size = self.model.virtual_size
        stored = self.data_path.read_bytes()
        assert len(stored) >= size
        assert stored[:size] == self.model.read(0, size), "what the raw data file holds"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("raw", "maker"), [(True, "QEMU"), (True, "adopted"), (False, "QEMU")])
def test_the_data_file_and_the_disk_stay_equal(raw: bool, maker: str, form: str, seed: int, tmp_path: Path) -> None:
    turns = Turns(tmp_path, form, raw=raw, maker=maker, seed=seed)
    writers: list[tuple[Callable[[], None], int]] = [
        (turns.we_write, 5),
        (turns.qemu_io_writes, 4),
        (turns.qemu_nbd_serves, 2),
        (turns.we_resize, 1),
        (turns.qemu_resizes, 1),
    ]
    if maker == "adopted":
        del writers[-1]  # QEMU 7.2 does not resize an image with a bitmap
    chosen = turns.chance.choices([each for each, _ in writers], [weight for _, weight in writers], k=TURNS)
    done: list[str] = []
    for turn in chosen:
        done.append(turn.__name__)
        try:
            turn()
            turns.compare()
        except Exception as error:
            raise AssertionError(f"seed {seed}, after {', '.join(done)}: {error}") from error
    if not raw:
        return
    view = turns.model.read(0, turns.model.virtual_size)
    detach(turns.path, policy=Policy.TRUSTED, lose_bitmaps=True)
    assert turns.data_path.read_bytes() == view
