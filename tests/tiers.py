"""Which tests run when: `--fast` what is quick, `--nightly` all, and without either all but nightly ones."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pytest


def add_options(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="also what takes minutes and is rarely broken")
    parser.addoption("--fast", action="store_true", help="only what is quick, on a few models each")


def choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip nightly tests, or leave out what is not quick: thousands of skipped ones would bury the rest."""
    if config.getoption("--fast"):
        quick = set(_quick(items))
        config.hook.pytest_deselected(items=[item for item in items if item not in quick])
        items[:] = [item for item in items if item in quick]
    elif not config.getoption("--nightly"):
        for item in items:
            if item.get_closest_marker("nightly"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: scripts/check --nightly"))


def few_by_day(names: Iterable[str]) -> list[Any]:
    """Parameters: models of FEW, and the others for the night only."""
    from catalog import FEW

    return [name if name in FEW else pytest.param(name, marks=pytest.mark.nightly) for name in names]


def _quick(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Of a test of many models, those of FEW, if it has any of them; of many seeds, the first."""
    from catalog import FEW

    quick = [item for item in items if not _is_slow(item)]
    members: dict[Any, list[_Member]] = defaultdict(list)
    for item in quick:
        members[_test(item)].append(_member(item))
    for item in quick:
        model, seed = _member(item)
        others = members[_test(item)]
        of_few = model is None or model in FEW or not any(other in FEW for other, _ in others)
        if of_few and seed == min(seed for _, seed in others):
            yield item


def _is_slow(item: pytest.Item) -> bool:
    """Marked so, or on a real model."""
    marked = any(item.get_closest_marker(name) for name in ("slow", "nightly"))
    return marked or "shared" in getattr(item, "fixturenames", ())


def _test(item: pytest.Item) -> tuple[Any, str]:
    return item.path, getattr(item, "originalname", item.name)


class _Member(NamedTuple):
    """One of the product of models and seeds that a test is run on."""

    model: str | None
    seed: int


def _member(item: pytest.Item) -> _Member:
    """By the parameters that name a model of the catalog or a seed, or have them as attributes."""
    from catalog import CATALOG

    params = item.callspec.params if hasattr(item, "callspec") else {}
    names = [getattr(value, "name", value) for value in params.values()]
    seeds = [params.get("seed"), *(getattr(value, "seed", None) for value in params.values())]
    return _Member(
        next((name for name in names if isinstance(name, str) and name in CATALOG), None),
        next((seed for seed in seeds if isinstance(seed, int)), 0),
    )


def seeds(count: int) -> list[Any]:
    """Seeds from 0 on: the first by day, the others for the night only."""
    return [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, count))]
