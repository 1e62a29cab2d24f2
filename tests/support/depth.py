"""How many examples a property test gets: so many in the quick profile, in proportion in others."""

from __future__ import annotations

from hypothesis import settings


def examples(count: int) -> settings:
    """A decorator: `count` examples where the profile has 100."""
    return settings(max_examples=max(count * settings().max_examples // 100, 1))
