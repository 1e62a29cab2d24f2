"""What is done about each disk of a job: its level, what it builds on, and what that will cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qcow2_plugin.adapters.backup import levels
from qcow2_plugin.adapters.backup.levels import Base, Judgement
from qcow2_plugin.adapters.backup.model import DiskPlan, Estimate, Job, Level
from qcow2_plugin.adapters.backup.rotation import bitmap_name
from qcow2_plugin.adapters.backup.sampling import first_difference, kept_leaves
from qcow2_plugin.adapters.backup.sources import fingerprints
from qcow2_plugin.errors import DigestError, printable
from qcow2_plugin.operations.changes import estimate
from qcow2_plugin.storage.opener import Policy

if TYPE_CHECKING:
    from qcow2_plugin.adapters.backup.manager import Hooks
    from qcow2_plugin.adapters.backup.repository import Repository
    from qcow2_plugin.adapters.backup.sources import Source
    from qcow2_plugin.engine.digest_tree import Leaves
    from qcow2_plugin.engine.image import Image

MAX_CHAIN = 63
"""Members of a chain by default; a longer one takes longer to restore, and to open."""
SAMPLE = 16
"""Blocks that were not marked as changed, and are looked at nevertheless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a backup is made.

    `level` None: the least that is possible. `compression` "zlib" or "zstd" stores compressed clusters, as far as
    that makes them smaller. `digest` keeps a digest of each disk, if there is one of what it builds on; the next time
    `sample` blocks that should not have changed are compared with it. Without, nobody notices a disk that was made
    smaller and larger again. `verify` reads each member again before the point is published. `max_chain` members build
    on each other at most. `bitmaps` are other programs' bitmaps by the disks' names, each of which marks all that has
    changed since the last point. `policy` is that of `open_image`.
    """

    level: Level | None = None
    compression: Literal["zlib", "zstd"] | None = None
    digest: bool = True
    sample: int = SAMPLE
    verify: bool = False
    max_chain: int = MAX_CHAIN
    labels: Mapping[str, str] | None = None
    bitmaps: Mapping[str, str] | None = None
    policy: Policy = Policy.CONFINED


@dataclass(frozen=True, slots=True)
class JudgedDisk:
    """One disk of the job, judged.

    `base` None: its member is full. `leaves` are those of the base, None if it has none.
    `new` is the bitmap that begins at the point, None where there can be none. `fingerprint` is of the files besides
    the image, when it was judged.
    """

    source: Source
    judgement: Judgement
    base: Base | None
    leaves: Leaves | None
    reason: str | None
    new: str | None
    identity: tuple[int, int]
    virtual_size: int
    fingerprint: dict[str, int] | None

    def is_that_of(self, image: Image) -> bool:
        """The image is still that which was judged."""
        return image.layer.storage.identity == self.identity and image.virtual_size == self.virtual_size

    @property
    def level(self) -> Level:
        """Of the member to be made."""
        return Level.FULL if self.base is None else self.base.level

    @property
    def base_size(self) -> int | None:
        """Bytes of the disk when these bitmaps began."""
        return None if self.base is None else self.base.member.virtual_size


@dataclass(frozen=True, slots=True)
class Context:
    """What a job has to do with all along."""

    repository: Repository
    job: Job
    hooks: Hooks
    settings: Settings


def judged(source: Source, image: Image, context: Context) -> JudgedDisk:
    """What is to be done about a disk that is open for reading. Raises PluginError; what the image and the target do;
    OSError."""
    settings, repository = context.settings, context.repository
    files = fingerprints(image)  # before anything is believed
    adopted = (settings.bitmaps or {}).get(source.disk)
    judgement = levels.judge(
        image, source.disk, repository, level=settings.level, max_chain=settings.max_chain, adopted=adopted
    )
    base, reason = _chosen(judgement, source.disk, context)
    leaves: Leaves | None = None
    if base is not None:
        try:
            leaves = kept_leaves(repository, base.member)
            _require_equal(image, base.marking, leaves, settings.sample)
        except (DigestError, FileNotFoundError) as error:
            reason = f"The last point cannot be compared with the disk: {error}."
            judgement, base, leaves = Judgement((), reason), None, None
    new = bitmap_name(repository.id, context.job.point) if _can_have_bitmaps(image) else None
    identity = image.layer.storage.identity
    return JudgedDisk(source, judgement, base, leaves, reason, new, identity, image.virtual_size, files)


def _can_have_bitmaps(image: Image) -> bool:
    return image.header.version >= 3 and image.virtual_size > 0


def _require_equal(image: Image, bitmaps: Sequence[str], leaves: Leaves | None, count: int) -> None:
    """Raises DigestError if a sample of what the bitmaps do not mark differs from the leaves."""
    found = None if leaves is None else first_difference(image, bitmaps, leaves, count)
    if found is not None:
        raise DigestError(f"they differ at guest offset {found:#x}, where no change was recorded")


def _chosen(judgement: Judgement, disk: str, context: Context) -> tuple[Base | None, str | None]:
    if not judgement.bases:
        return None, judgement.reason
    choice = context.hooks.select_base(context.job, disk, tuple(each.point for each in judgement.bases))
    base = next((each for each in judgement.bases if each.point == choice.point), None)
    if base is None:
        return None, printable(choice.reason)
    return base, judgement.reason


def planned(disk: JudgedDisk, image: Image, bitmaps: tuple[str, ...] | None) -> DiskPlan:
    """The same, for plugins and people, with what it costs. `bitmaps` are those of the base, before or after the point
    in time; None: there is no base. Raises as `estimate` does."""
    counts = estimate(image, bitmaps, base_size=disk.base_size)
    return DiskPlan(
        disk=disk.source.disk,
        path=disk.source.path,
        level=disk.level,
        reason=disk.reason,
        base=None if disk.base is None else disk.base.point,
        bitmaps=bitmaps or (),
        virtual_size=disk.virtual_size,
        estimate=Estimate(**counts._asdict()),
    )
