"""What the settings of all evaluations share. Each is a frozen dataclass, set by name: config/settings.py."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitreg.distributed import ALONE, Ranks


@dataclass(frozen=True)
class Config:
    """What all tasks share. `cache` is the folder that keeps features (None: none are kept).

    `limit`: so many images of each split, evenly spread. `progress`: a bar on stderr. `ranks`: the
    processes that compute features together (vitreg.distributed); what is made of them, each of them makes.
    """

    seed: int = 0
    limit: int | None = None
    batch_size: int = 32
    workers: int | None = None
    cache: Path | None = None
    progress: bool = False
    ranks: Ranks = ALONE

    def settings(self) -> dict[str, Any]:
        """What results depend on: all but where and how fast they are computed."""
        return {k: v for k, v in vars(self).items() if k not in _MACHINE}


def default_cache() -> Path:
    """$VITREG_CACHE, or vitreg/ in the user's cache folder. It may be deleted at any time."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VITREG_CACHE") or Path(home) / "vitreg")


_MACHINE = ("batch_size", "workers", "cache", "progress", "ranks", "seed")
