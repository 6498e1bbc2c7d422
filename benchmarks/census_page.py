"""The census: results on disk, and the page made of them."""

import json
import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

VERDICTS = ("supported", "refused", "wrong", "not built")
VIT_MODULES = (
    "vision_transformer",
    "eva",
    "deit",
    "beit",
    "vision_transformer_relpos",
    "vision_transformer_hybrid",
)
LIBRARIES = ("timm", "transformers", "towers")


@dataclass
class Result:
    """What became of one model; `checked` names the checks that could be made and agreed."""

    library: str
    name: str
    module: str
    verdict: str
    reason: str = ""
    checked: list[str] = field(default_factory=list)


Results = dict[tuple[str, str], Result]


def versions() -> dict[str, str]:
    return {package: version(package) for package in ("vitreg", "timm", "transformers", "torch")}


def load_results(out: Path) -> Results:
    """What is known for the installed versions; later lines of the journal win."""
    records: list[dict[str, Any]] = []
    if out.exists() and (kept := json.loads(out.read_text(encoding="utf-8")))["versions"] == versions():
        records += [record | {"reason": kept["reasons"][record["reason"]]} for record in kept["results"]]
    if journal(out).exists():
        records += [json.loads(line) for line in journal(out).read_text(encoding="utf-8").splitlines()]
    found = [Result(**record) for record in records]
    return {(result.library, result.name): result for result in found}


def journal(out: Path) -> Path:
    return out.with_name(out.name + ".part")


def save_results(out: Path, results: Results) -> None:
    """One line per reason and per result, so that two versions of the file can be compared."""
    reasons = sorted({result.reason for result in results.values()})
    numbers = {reason: number for number, reason in enumerate(reasons)}
    records = [slim(results[key]) | {"reason": numbers[results[key].reason]} for key in sorted(results)]
    out.write_text(
        f'{{"versions": {json.dumps(versions())},\n'
        f'"reasons": [\n{one_per_line(reasons)}\n],\n"results": [\n{one_per_line(records)}\n]}}\n',
        encoding="utf-8",
    )
    journal(out).unlink(missing_ok=True)


def one_per_line(items: list[Any]) -> str:
    return ",\n".join(json.dumps(item) for item in items)


def slim(result: Result) -> dict[str, Any]:
    return {key: value for key, value in asdict(result).items() if value}


# -- the page --------------------------------------------------------------------------------------

PAGE = """\
# Census: which models vitreg reads

Every image model of timm and transformers, and the vision towers inside its multimodal models, built with
random weights (nothing is downloaded), with two blocks and a small image where its constructor allows that.
`python benchmarks/census.py` made this page; its docstring says what is checked. Versions: {versions}.

- **supported**: accepted, and every independent check agrees: tokens, grid, depth and patch positions with
  what the model says of itself, norms, neurons and attention rows with hooks on the model's own layers, and
  the traced output with the untraced one, bit by bit.
- **refused**: an `UnsupportedModelError` that says why.
- **wrong**: any other error, or a check that disagrees.
- **not built**: the library itself cannot build or run it within 4 GB of parameters and {seconds} s.
"""


def page(results: Results, seconds: int) -> str:
    parts = [PAGE.format(versions=", ".join(f"{k} {v}" for k, v in versions().items()), seconds=seconds)]
    for library in LIBRARIES:
        chosen = [result for key, result in sorted(results.items()) if key[0] == library]
        if chosen:
            parts += section(library, chosen)
    return "\n".join(parts)


def section(library: str, results: list[Result]) -> list[str]:
    totals = Counter(result.verdict for result in results)
    compared = sum("attention" in result.checked for result in results)
    parts = [
        f"## {library}: {len(results)} models\n",
        ", ".join(f"{totals[verdict]} {verdict}" for verdict in VERDICTS) + ".",
        f"{compared} of the {totals['supported']} supported have attention of their own to compare with.\n",
    ]
    if library == "timm":
        plain = [result for result in results if result.module in VIT_MODULES]
        good = sum(result.verdict == "supported" for result in plain)
        parts.append(f"Plain ViTs ({', '.join(VIT_MODULES)}): {good} of {len(plain)} supported.\n")
    parts += [module_table(results, "Module" if library == "timm" else "Model type")]
    for verdict in VERDICTS[1:]:
        parts += reasons(verdict, [result for result in results if result.verdict == verdict])
    return parts


def module_table(results: list[Result], title: str) -> str:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        counts[result.module][result.verdict] += 1
    # What is supported first, then by name.
    order = sorted(counts, key=lambda module: (-counts[module]["supported"], module))
    lines = [f"| {title} | {' | '.join(VERDICTS)} |", "|---|" + "---:|" * len(VERDICTS)]
    lines += [
        f"| {module} | {' | '.join(str(counts[module][verdict] or '') for verdict in VERDICTS)} |"
        for module in order
    ]
    return "\n".join(lines) + "\n"


def reasons(verdict: str, results: list[Result]) -> list[str]:
    if not results:
        return []
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[general(result.reason)].append(result)
    lines = [f"### {verdict.capitalize()}: why\n", "| Models | Reason | Examples |", "|---:|---|---|"]
    for reason, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {len(group)} | {reason} | {', '.join(examples(group))} |")
    return ["\n".join(lines) + "\n"]


def examples(group: list[Result], count: int = 4) -> list[str]:
    """A few names, of different modules first."""
    first = {result.module: result.name for result in reversed(group)}
    names = [*first.values(), *(result.name for result in group)]
    return [f"`{name}`" for name in list(dict.fromkeys(names))[:count]]


def general(reason: str) -> str:
    """A reason without the names, shapes and counts of one model."""
    reason = re.sub(r"^.*?found \d+ (blocks|stages of several blocks), but ", "", reason)
    reason = re.sub(
        r" (?:Pass an Anatomy|Give vitreg the vision encoder itself|You can install).*$", "", reason
    )
    reason = re.sub(r"in [A-Z]\w+: no ModuleList", "in the model: no ModuleList", reason)
    reason = re.sub(r"^((?:\w+Error: )?)[A-Z]\w+ (could not|has no|requires)", r"\1the model \2", reason)
    reason = re.sub(r"\((?!\d+D)[\w., ]*\d[\w., ]*\)|\[[\d, ]+\]?", "(...)", reason)
    reason = re.sub(r"'[\w.]*[.\d][\w.]*'", "(...)", reason)
    reason = re.sub(
        r"\d+\.\d+|\b\d+x\d+\b|\b\d+(?= times| MLPs| do not|,|$)|(?<=only )\d+|(?<=, not )\d+", "N", reason
    )
    return reason.replace("|", " ").strip(" .")
