"""Exports that are interrupted while several threads work: all of them end first, and soon."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcow2_plugin.engine import copy_out as copying
from qcow2_plugin.engine.image import Image
from qcow2_plugin.extent import Extent, ExtentKind
from qcow2_plugin.operations.export import export_raw
from tests.support.builder import ImageBuilder

_SIZE = 4 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    builder = ImageBuilder(_SIZE)
    for cluster in range(0, 64, 2):
        builder.data(cluster, bytes([cluster + 1]) * 65536)
    builder.build(tmp_path / "image.qcow2")
    return tmp_path / "image.qcow2"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "disk.raw"


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_all_who_work_are_waited_for(image: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the files would be closed under their hands."""
    is_at_work = threading.Event()
    ended: list[BaseException | None] = []
    move = copying._Worker._move

    def slow(worker: copying._Worker, piece: copying._Piece) -> None:
        if threading.current_thread() is threading.main_thread():
            is_at_work.wait(10)
            move(worker, piece)
            return
        is_at_work.set()
        time.sleep(0.5)
        try:
            move(worker, piece)
        except BaseException as error:
            ended.append(error)
            raise
        ended.append(None)

    monkeypatch.setattr(copying._Worker, "_move", slow)
    with pytest.raises(KeyboardInterrupt), interrupted_after(0.3):
        export_raw(image, target, share=False, threads=2)
    assert ended == [None]
    assert os.listdir(target.parent) == []


def test_it_is_heeded_while_another_looks_for_the_next_piece(
    image: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk of nothing but holes may go on for hours."""

    def endless(_: Image, *_range: int) -> Iterator[Extent]:
        end = time.monotonic() + 20
        for offset in itertools.count(0, 512):
            if time.monotonic() > end:
                pytest.fail("nobody stopped it")
            yield Extent(offset, 512, ExtentKind.UNALLOCATED, None)

    monkeypatch.setattr(Image, "extents", endless)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupted_after(0.3):
        export_raw(image, target, threads=3)
    assert time.monotonic() - start < 10
    assert os.listdir(target.parent) == []


@pytest.mark.parametrize("at", [0, 1])
def test_fewer_threads_than_asked_for_do_it_too(
    at: int, image: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = threading.Thread.start
    calls = itertools.count()

    def start(thread: threading.Thread) -> None:
        if next(calls) >= at:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    export_raw(image, target, threads=3, verify=True)
