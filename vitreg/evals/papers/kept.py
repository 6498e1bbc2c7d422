"""What was measured on this machine: a JSON file for each row, in papers/ of the user's cache.

keep("test-time-segmentation", row, result)
measured("test-time-segmentation", row)["metrics"]      # None if it was not run, or the row has changed since
"""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vitreg.evals.papers.tables import Row
from vitreg.evals.result import Result
from vitreg.features.config import default_cache
from vitreg.files import write_atomically


def keep(table: str, row: Row, result: Result) -> None:
    """Write a row's result, whole or not at all."""
    path = _place(table, row)
    path.parent.mkdir(parents=True, exist_ok=True)
    formats = {name: metric.format for name, metric in result.metrics.items()}
    kept = {"row": _asked(row), "result": result.to_json(), "formats": formats}
    write_atomically(path, json.dumps(kept, indent=1))


def measured(table: str, row: Row) -> dict[str, Any] | None:
    """The result that was kept, as of `Result.to_json`, and its metrics' "formats"."""
    try:
        kept = json.loads(_place(table, row).read_text(encoding="utf-8"))
        result: dict[str, Any] = kept["result"] | {"formats": kept["formats"]}
    except (OSError, ValueError, KeyError):
        return None
    return result if kept.get("row") == _asked(row) else None


def _place(table: str, row: Row) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", row.name.lower()).strip("-")
    return default_cache() / "papers" / table / f"{slug}.json"


def _asked(row: Row) -> dict[str, Any]:
    """What the result depends on: all but the paper's own figures and words."""
    parts = {k: v for k, v in asdict(row).items() if k not in ("name", "figures", "remark", "needs")}
    plain: dict[str, Any] = json.loads(json.dumps(parts))
    return plain
