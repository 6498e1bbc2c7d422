"""How many processors this process may use: a container or a scheduler may allow it fewer than there are."""

import os
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


def usable_cpus(root: Path = _ROOT) -> int:
    """Processors that this process may use, at least 1: by its affinity, and by the quotas of its cgroups.

    `root` is where Linux has /proc and /sys; elsewhere there are no quotas.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on Windows and macOS
    allowed = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([allowed, *map(int, _quotas(root))]))


def _quotas(root: Path) -> list[float]:
    """Processors that each of the process's control groups allows, and each that these are in."""
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = PurePosixPath(path.lstrip("/"))
        for hierarchy in {"cpu", controllers} if controllers else {""}:
            for folder in (group, *group.parents):  # a container sees its own group as the root
                found += _quota(root / "sys/fs/cgroup" / hierarchy / folder, bool(controllers))
    return found


def _quota(folder: Path, first_version: bool) -> list[float]:
    if first_version:
        words = [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    else:
        words = _text(folder / "cpu.max").split()
    if len(words) != 2 or not all(word.isdecimal() for word in words) or int(words[1]) == 0:
        return []  # "max", -1, or no such file: no quota
    return [int(words[0]) / int(words[1])]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
