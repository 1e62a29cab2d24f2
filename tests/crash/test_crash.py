"""Crashes: whatever a power loss leaves of a writer's calls, the disk holds what was flushed and nothing foreign.

Every operation alone and in pairs, on every kind of image, and longer random work. By default some states of each
workload, different ones, taken from every class in turn; QCOW2_TEST_DEPTH=deep takes more workloads and more states.
The counts are printed at the end. A failure is one line that begins with the command which makes it again.
"""

from __future__ import annotations

import pytest

from tests.crash import long_bitmaps
from tests.crash.campaign import DEPTH, TALLIES, CrashError, Effort, Tally, crash_all
from tests.crash.kinds import KINDS
from tests.crash.workloads import singles_and_pairs

IS_DEEP = DEPTH > 1
PAIRS = Effort(states=40 if IS_DEEP else 14, recover_every=8, qemu_every=400, again_every=80)
RANDOM = Effort(states=300 if IS_DEEP else 120, recover_every=8, qemu_every=40, again_every=40)
ALL = Effort(states=100_000)
SEEDS = 2 if IS_DEEP else 1
RANDOM_WORKLOADS = 12 if IS_DEEP else 3
RANDOM_REQUESTS = 30
PAIRS_FLOOR = {"data_file": 580, "raw_data_file": 420, "data_file_bitmap": 450}  # there is less to lose
RANDOM_FLOOR = {"raw_data_file": 210, "data_file_bitmap": 270}
MANY_OF_PAIRS, MANY_OF_RANDOM = 700, 330

pytestmark = pytest.mark.timeout(3600 if IS_DEEP else 120)


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_and_every_pair(kind: str) -> None:
    names = [name for seed in range(SEEDS) for name in singles_and_pairs(kind, seed, both_forms=IS_DEEP)]
    unique = crash(TALLIES.setdefault(kind, Tally()), names, PAIRS)
    assert unique >= PAIRS_FLOOR.get(kind, MANY_OF_PAIRS), "fewer states than promised"


@pytest.mark.parametrize("kind", KINDS)
def test_random_work(kind: str) -> None:
    names = [f"{kind}/random+{RANDOM_REQUESTS}/any/{seed}" for seed in range(RANDOM_WORKLOADS)]
    unique = crash(TALLIES.setdefault(kind, Tally()), names, RANDOM)
    assert unique >= RANDOM_FLOOR.get(kind, MANY_OF_RANDOM), "fewer states than promised"


@pytest.mark.parametrize(
    "name",
    [
        "small/write_durable+write_cluster/each/0",  # the file ended inside a sector of the guest's
        "snapshot/random+30/any/2",
        "data_file/zero_keep+zero_keep/late/1",  # a sector was filled up by one call and written by another
        "data_file_bitmap/random+30/any/11",
    ],
)
def test_what_was_wrong_once(name: str) -> None:
    """Every state of workloads that found something."""
    assert crash(Tally(), [name], ALL) >= 5


def test_bitmaps_with_long_tables() -> None:
    assert long_bitmaps.crash(100_000) >= 150, "fewer states than promised"


def crash(tally: Tally, names: list[str], effort: Effort) -> int:
    """How many different states were judged; one that is wrong fails the test with one line."""
    try:
        return crash_all(tally, names, effort)
    except CrashError as error:
        line = str(error)
    pytest.fail(line, pytrace=False)
