"""What the person who runs the benchmark chose."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Settings(NamedTuple):
    """Sizes in bytes; `folder` is the run's own and goes with it."""

    folder: Path
    rounds: int
    seconds: int
    size: int
    only: str

    def wants(self, name: str) -> bool:
        """True if `--only` chooses the measurement of this name."""
        return self.only.casefold() in name.casefold()
