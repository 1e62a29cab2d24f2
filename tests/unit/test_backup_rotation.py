"""What becomes of the bitmaps of a repository: by their names alone, whatever an interrupted job has left of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcow2_plugin import bitmap_health, create_image, open_image
from qcow2_plugin.adapters.backup import rotation
from qcow2_plugin.adapters.backup.model import Level, Manifest, Member
from qcow2_plugin.adapters.backup.rotation import OwnBitmap, bitmap_name, own_bitmaps
from qcow2_plugin.engine.dirty_bitmaps.bitmap_plan import BitmapChange
from qcow2_plugin.operations.bitmap_health import BitmapHealth, BitmapState
from qcow2_plugin.operations.bitmaps import change_bitmaps

REPOSITORY = "0badcafe"


def point_id(number: int) -> str:
    return f"20261125t131500z-{number:04}"


def bitmap(number: int, *, enabled: bool, state: BitmapState = BitmapState.USABLE) -> OwnBitmap:
    name = bitmap_name(REPOSITORY, point_id(number))
    return OwnBitmap(point_id(number), BitmapHealth(name, state, None, None, enabled, 65536, 0))


def point(number: int, level: Level, disk: str = "disk") -> Manifest:
    member = Member(
        disk=disk, level=level, reason=None, virtual_size=1, file="", file_size=1, file_digest=None, parent_point=None,
        parent_file=None, bitmap=None, content_digest=None, leaves_file=None, options={}, source="", fingerprint=None,
    )  # fmt: skip
    return Manifest(repository_id=REPOSITORY, point=point_id(number), sequence=number, created=0, members=(member,))


def told(changes: list[BitmapChange]) -> list[str]:
    """Each change in words, with the numbers of the points."""
    words = []
    for each in changes:
        sources = [each.source] if isinstance(each.source, bytes) else []
        words.append(" ".join([each.verb.value, *(str(int(name[-4:])) for name in (each.name, *sources))]))
    return words


FULL, SECOND, THIRD = point(1, Level.FULL), point(2, Level.INCREMENTAL), point(3, Level.INCREMENTAL)


@pytest.mark.parametrize(
    ("bitmaps", "points", "expected"),
    [
        pytest.param([], [], [], id="nothing"),
        pytest.param([bitmap(1, enabled=True)], [FULL], [], id="after the first point"),
        pytest.param([bitmap(1, enabled=False), bitmap(2, enabled=True)], [FULL, SECOND], [], id="after the second"),
        pytest.param(
            [bitmap(1, enabled=False), bitmap(2, enabled=False), bitmap(3, enabled=True)],
            [FULL, SECOND, THIRD], ["merge 1 2", "remove 2"], id="published, not finished",
        ),
        pytest.param(
            [bitmap(1, enabled=False), bitmap(2, enabled=False), bitmap(3, enabled=True)],
            [FULL, SECOND], ["merge 2 3", "enable 2", "remove 3"], id="never published",
        ),
        pytest.param([bitmap(1, enabled=True)], [], ["remove 1"], id="a first one that never was"),
        pytest.param(
            [bitmap(1, enabled=False), bitmap(2, enabled=False), bitmap(3, enabled=True)],
            [FULL, SECOND, point(3, Level.FULL)], ["remove 1", "remove 2"], id="a full one, not finished",
        ),
        pytest.param(
            [bitmap(1, enabled=False), bitmap(2, enabled=False, state=BitmapState.INCONSISTENT),
             bitmap(3, enabled=True)],
            [FULL, SECOND, THIRD], ["remove 1", "remove 2"], id="what is merged is damaged",
        ),
        pytest.param(
            [bitmap(2, enabled=False), bitmap(3, enabled=True, state=BitmapState.INCONSISTENT)],
            [FULL, SECOND], ["remove 3"], id="never published, and a writer crashed since",
        ),
        pytest.param(
            [bitmap(2, enabled=True)], [FULL, point(2, Level.FULL, "other")], [], id="of a point without this disk"
        ),
        pytest.param(
            [bitmap(1, enabled=False), bitmap(4, enabled=True)], [point(3, Level.FULL), point(4, Level.INCREMENTAL)],
            [], id="what is kept is older than the last full one, which was merged",
        ),
    ],
)  # fmt: skip
def test_what_an_interrupted_job_has_left_is_seen_by_names(
    bitmaps: list[OwnBitmap], points: list[Manifest], expected: list[str]
) -> None:
    assert told(rotation.unsettled(bitmaps, points, "disk")) == expected


def test_only_bitmaps_of_the_repository_are_its_own() -> None:
    names = [
        bitmap_name(REPOSITORY, point_id(2)),
        bitmap_name("deadbeef", point_id(3)),
        "qcow2-backup.0badcafe.latest",
        "theirs",
        None,
        bitmap_name(REPOSITORY, point_id(1)),
    ]
    health = [BitmapHealth(name, BitmapState.USABLE, None, None, True) for name in names]
    assert [each.point for each in own_bitmaps(health, REPOSITORY)] == [point_id(1), point_id(2)]


def test_what_is_kept_marks_all_since_the_full_one() -> None:
    kept, last = bitmap(1, enabled=False), bitmap(3, enabled=True)
    assert rotation.since_full([kept, last], point_id(1), point_id(3)) == (kept.name,)
    assert rotation.since_full([kept, last], point_id(2), point_id(3)) == (kept.name,)  # since before that
    assert rotation.since_full([last], point_id(1), point_id(3)) is None
    assert rotation.since_full([last], point_id(3), point_id(3)) == ()


@pytest.mark.parametrize("number", [3, 4])
def test_settling_twice_does_no_harm(tmp_path: Path, number: int) -> None:
    """In a real image, for a point that was published and one that was not."""
    path = tmp_path / "disk.qcow2"
    create_image(path, 1 << 20)
    points = [FULL, SECOND, THIRD]
    for each in (1, 2, number):
        own = own_bitmaps(bitmap_health(path), REPOSITORY)
        frozen = own[-1].name if own else None
        new = bitmap_name(REPOSITORY, point_id(each))
        if frozen is None:
            change_bitmaps(path, rotation.at_point(own, new, frozen=None, adopted=None))
        else:
            change_bitmaps(path, rotation.at_point(own, new, frozen=frozen, adopted=None))
        with open_image(path, writable=True) as image:
            image.pwrite(b"x", 65536 * each)
    seen = points if number == 3 else points[:2]
    states = []
    for _ in range(2):
        own = own_bitmaps(bitmap_health(path), REPOSITORY)
        change_bitmaps(path, rotation.unsettled(own, seen, "disk"))
        states.append([(each.name, each.enabled, each.dirty_size) for each in bitmap_health(path)])
    assert states[0] == states[1]
    sizes = {each.point: each.health.dirty_size for each in own_bitmaps(bitmap_health(path), REPOSITORY)}
    expected = {point_id(1): 131072, point_id(3): 65536} if number == 3 else {point_id(1): 65536, point_id(2): 131072}
    assert sizes == expected
