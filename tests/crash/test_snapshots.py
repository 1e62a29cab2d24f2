"""Internal snapshots made, applied and deleted while the power goes or storage calls fail.

Whatever is left: nothing is corrupt, each snapshot is there exactly or not at all, applying one has happened as a whole
or not at all, and the next writer can go on. COPIED may lack where a cluster is not shared any more, and never stands
where one is. QCOW2_TEST_DEPTH=deep takes more of everything. What a word means is told in `snapshot_work`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcow2_plugin.engine.allocator import Allocator, RefcountWrites
from qcow2_plugin.engine.image_file import ImageFile, MetadataMap
from qcow2_plugin.engine.internal_snapshots import snapshotting
from qcow2_plugin.engine.internal_snapshots.recounting import Recount
from qcow2_plugin.errors import Qcow2Error
from tests.crash.campaign import DEPTH
from tests.crash.kinds import kind
from tests.crash.mutants import BarrierSite, barrier_sites, skip_barrier
from tests.crash.scenario import WrongError
from tests.crash.snapshot_faults import run_all
from tests.crash.snapshot_work import crash
from tests.support.faulty import FAULTS

IS_DEEP = DEPTH > 1
KINDS = (
    "small", "4k", "version2", "snapshot", "extended", "backing", "extended_backing", "growth", "bitmap", "plain",
)  # fmt: skip
WORDS = ("c", "wcw", "wcwaw", "wcwdw", "ccddw", "wcwcwaDwd", "zcAzfd", "wcoAwod")
RESIZING_WORDS = ("cgwAg", "wcwgawd")
STATES = 200 if IS_DEEP else 24
RANDOM_WORDS = 30 if IS_DEEP else 1
RANDOM_STATES = 400 if IS_DEEP else 60
LETTERS = "wwwzfccaAdDo"
FAULT_WORDS = ("wcwaw", "wcwdwd", "wcwcDA") if IS_DEEP else ("wcwcDA",)
FAULT_KINDS = ("small", "snapshot", "growth", "extended", "bitmap") if IS_DEEP else ("growth", "extended")
STRIDE = 1 if IS_DEEP else 3
CATCHING = (("small", "cd"), ("snapshot", "cd"), ("small", "cwa"), ("snapshot", "wawdw"), ("small", "wcwaw"))
CATCHING_STATES = 150

Patch = pytest.MonkeyPatch

pytestmark = pytest.mark.timeout(3600 if IS_DEEP else 120)


@pytest.mark.parametrize("kind_name", KINDS)
def test_crashes_around_snapshots(kind_name: str) -> None:
    words = WORDS + RESIZING_WORDS * (kind_name != "version2")
    states = sum(judged(kind_name, word, STATES, qemu_every=STATES * (word == "wcoAwod")) for word in words)
    assert states >= STATES * len(words) // 2, "fewer states than promised"


@pytest.mark.parametrize("kind_name", KINDS)
def test_crashes_in_random_work(kind_name: str) -> None:
    for seed in range(RANDOM_WORDS):
        chance = random.Random(f"{kind_name}/{seed}")
        letters = LETTERS + "g" * (kind_name != "version2")
        judged(kind_name, "c" + "".join(chance.choices(letters, k=chance.randint(4, 9))), RANDOM_STATES)


def judged(kind_name: str, word: str, states: int, *, qemu_every: int = 0) -> int:
    try:
        return crash(kind(kind_name), word, states, recover_every=6, qemu_every=qemu_every)
    except WrongError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.mark.parametrize("fault", FAULTS, ids=[each.name for each in FAULTS])
@pytest.mark.parametrize("kind_name", FAULT_KINDS)
def test_every_call_fails(kind_name: str, fault: Any) -> None:
    for word in FAULT_WORDS:
        try:
            assert run_all(kind(kind_name), word, fault, stride=STRIDE)
        except WrongError as error:
            pytest.fail(str(error), pytrace=False)


# ---- the suite notices broken engines


def caught(kinds_and_words: tuple[tuple[str, str], ...] = CATCHING) -> str | None:
    for kind_name, word in kinds_and_words:
        try:
            crash(kind(kind_name), word, CATCHING_STATES, recover_every=2)
        except (WrongError, Qcow2Error, OSError) as error:
            return str(error)
    return None


@pytest.mark.parametrize(
    "site", [site for site in barrier_sites() if site.module in ("snapshotting", "recounting")], ids=str
)
def test_no_barrier_can_be_left_out(site: BarrierSite, monkeypatch: Patch) -> None:
    skip_barrier(monkeypatch, site)
    assert caught(), "nobody noticed"


def copied_left(patch: Patch) -> None:
    """COPIED stays where clusters are shared from now on."""
    patch.setattr(snapshotting._Attempt, "clear_copied", lambda *arguments: None)


def copied_believed_in_a_snapshot(patch: Patch) -> None:
    """The L2 tables of a snapshot become the active disk's with what they say of old."""
    patch.setattr(Recount, "clear_copied", lambda self, structure, tables: False)


def copied_set_too_early(patch: Patch) -> None:
    """COPIED is written before the refcounts have fallen."""
    original = Recount.restore_copied

    def restore_copied(self: Any) -> None:
        self._allocator.take_writes = RefcountWrites
        try:
            original(self)
        finally:
            del self._allocator.take_writes

    patch.setattr(Recount, "restore_copied", restore_copied)


def not_counted(patch: Patch) -> None:
    """What a snapshot shares is not counted."""
    patch.setattr(Recount, "double", lambda self, tables: None)


def counted_once(patch: Patch) -> None:
    """Two references to a cluster count as one."""
    original = Allocator.count_up
    patch.setattr(Allocator, "count_up", lambda self, distinct, counts: original(self, distinct, np.minimum(counts, 1)))


def counted_down_before_the_header(patch: Patch) -> None:
    """What a snapshot kept is given up, and then the header changes."""
    original = ImageFile.update_header

    def update_header(self: Any, **fields: Any) -> None:
        if "snapshot_count" in fields and fields["snapshot_count"] < self.header.snapshot_count:
            self.waiting = fields
        else:
            original(self, **fields)

    def restore_copied(self: Any) -> None:
        restore(self)
        original(self._file, **self._file.waiting)

    restore = Recount.restore_copied
    patch.setattr(ImageFile, "update_header", update_header)
    patch.setattr(Recount, "restore_copied", restore_copied)


def header_in_two_writes(patch: Patch) -> None:
    """Every field is a write of its own."""
    original = ImageFile.update_header

    def update_header(self: Any, **fields: Any) -> None:
        for name in sorted(fields):
            original(self, **{name: fields[name]})

    patch.setattr(ImageFile, "update_header", update_header)


def readers_find_the_old_tables(patch: Patch) -> None:
    """What is kept in memory of the tables outlives an apply."""
    patch.setattr(snapshotting, "_show_new_disk", lambda image, old_tables, new_tables: None)


def old_table_forgotten(patch: Patch) -> None:
    """The old snapshot table keeps its clusters."""
    patch.setattr(snapshotting, "_retire_run", lambda *arguments: None)


def tables_stay_the_snapshots(patch: Patch) -> None:
    """L2 tables of snapshots stay theirs when the active disk gets them."""
    patch.setattr(MetadataMap, "claim_all", lambda self, structure, clusters: None)


MUTANTS: tuple[Callable[[Patch], None], ...] = (
    copied_left, copied_believed_in_a_snapshot, copied_set_too_early, not_counted, counted_once,
    counted_down_before_the_header, header_in_two_writes, readers_find_the_old_tables, old_table_forgotten,
    tables_stay_the_snapshots,
)  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: str(mutant.__name__))
def test_mutants_are_caught(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    assert caught(), "nobody noticed"


def test_the_engine_itself_is_not_caught() -> None:
    assert caught(CATCHING[:3]) is None
