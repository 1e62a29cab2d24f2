"""What a check finds: one finding at a time, counted in classes, and the result of it all.

`Findings` collects them while a check goes on. Every finding is counted; of each kind a bounded number is kept to be
shown. It also says when to stop looking.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

DEFAULT_MAX_FINDINGS = 1000
"""Findings of one kind that are kept."""
TOO_MANY_REFERENCES = "references-too-many"
"""The kind of finding when a refcount cannot say how often a cluster is referred to."""

Progress = Callable[[int, int], object]
"""Told now and then how much is done, and of how much; the unit is the same for both."""


class FindingClass(enum.Enum):
    """How bad it is; the words are those of `qemu-img check`."""

    LEAK = "leak"
    """Space that nobody uses is counted as used: harmless but for the space."""
    CORRUPTION = "corruption"
    """Something contradicts the format: data may be lost, or may get lost when the image is written to."""
    CHECK_ERROR = "check error"
    """Something could not be looked at."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, `count` times alike. Offsets in bytes."""

    kind: str
    """A word for programs that never changes, as "refcount-too-low"."""
    finding_class: FindingClass
    structure: str
    """As in messages: "L2 table"."""
    host_offset: int | None
    """Of the structure in the image file; of the cluster where that is the matter."""
    guest_offset: int | None
    index: int | None
    """Of the entry in the structure."""
    detail: str
    """For people; what the image chose in it is printable."""
    repair: str | None
    """What a repair would do, some of it only on request (`repair_ours`); None if it would do nothing."""
    count: int = 1
    """How often that counts: clusters in a row, or how many tables refer to the place."""
    is_ours: bool = False
    """QEMU does not look for it, and does not count it."""
    data: tuple[int, ...] = ()
    """What a repair needs to know, by kind."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a check found and, after a repair, what of it was put right; counts are those of `qemu-img check`."""

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    extra_corruptions: int = 0
    """Those that QEMU does not look for; none of them is in `corruptions`."""
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    extra_corruptions_fixed: int = 0
    image_end_offset: int = 0
    """Bytes up to the end of the last cluster in use."""
    total_clusters: int = 0
    """That the disk has."""
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    findings: tuple[Finding, ...] = ()
    """In the order in which they were made; those of a kind that come too many are only counted."""
    needs_rebuild: bool = False
    """Refcounts are missing or their structures damaged, so that single refcounts cannot be put right."""
    aborted: str | None = None
    """Why the check ended early, and counts mean little: what it needs to go on cannot be read."""
    stopped: bool = False
    """The check ended early because it had found as much as it was asked for."""
    kinds: Mapping[str, int] = field(default_factory=dict)
    """How often each kind of finding counts, in all, also those that are not in `findings`."""
    is_complete: bool = True
    """Every table that something names could be read to its end; if not, what looks like a leak may be in use."""
    end_of_references: int = 0
    """One past the highest byte of the image file that anything refers to, also where the file ends before it."""
    references: npt.NDArray[Any] | None = field(default=None, repr=False, compare=False)
    """How often each cluster of the file is referred to, at most as often as a refcount can say; for repairs."""
    tables_not_alone: npt.NDArray[Any] | None = field(default=None, repr=False, compare=False)
    """The clusters of L2 tables to which more refers than L1 entries do, so that they may be data; for repairs."""

    @property
    def is_sound(self) -> bool:
        """Nothing is wrong."""
        return not (self.aborted or self.check_errors or self.corruptions or self.extra_corruptions or self.leaks)

    @property
    def has_overflow(self) -> bool:
        """Something is referred to more often than a refcount can say."""
        return self.kinds.get(TOO_MANY_REFERENCES, 0) > 0

    @property
    def exit_code(self) -> int:
        """That of the check command: 0 sound, 1 not completed, 2 corruptions, 3 only leaks."""
        if self.aborted is not None or self.check_errors:
            return 1
        if self.corruptions or self.extra_corruptions:
            return 2
        return 3 if self.leaks else 0


_ALL = 1 << 62


class StoppedError(Exception):
    """As much was found as was asked for."""


class Findings:
    """Collects findings. `max_findings` of a kind are kept (None: all); after `stop_after` in all no more is looked
    for."""

    def __init__(self, max_findings: int | None = DEFAULT_MAX_FINDINGS, stop_after: int | None = None) -> None:
        self.kept: list[Finding] = []
        self.counts: Counter[FindingClass] = Counter()
        self.kinds: Counter[str] = Counter()
        self.extra_corruptions = 0
        self.needs_rebuild = False
        self.is_complete = True
        self._max_findings = max_findings
        self._remaining = stop_after
        self._kept_of: Counter[str] = Counter()

    def add(self, finding: Finding) -> None:
        """Raises StoppedError with the last one that was asked for."""
        if self.room(finding.kind):
            self.kept.append(finding)
            self._kept_of[finding.kind] += 1
        self.count(finding.finding_class, finding.kind, finding.count, is_ours=finding.is_ours)

    def count(self, finding_class: FindingClass, kind: str, number: int, *, is_ours: bool = False) -> None:
        """Count what is not kept. Raises StoppedError."""
        self.kinds[kind] += number
        if is_ours:
            self.extra_corruptions += number
        else:
            self.counts[finding_class] += number
        if self._remaining is not None:
            self._remaining -= 1
            if self._remaining <= 0:
                raise StoppedError

    def room(self, kind: str) -> int:
        """How many more findings of a kind are kept."""
        return _ALL if self._max_findings is None else max(self._max_findings - self._kept_of[kind], 0)
