"""Shared fixtures. Shapes in vitreg's signatures are checked at run time while the tests run."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# No test reaches a hub: what is loaded by a hub's name comes from a cache that the test fills.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_CACHE"] = tempfile.mkdtemp(prefix="vitreg-hub-")

import pytest
import torch
from jaxtyping import install_import_hook

# Not inside patched forwards (torch.compile would have to trace through the checks), nor in inner loops.
PATCHED = ("vitreg.hooks", "vitreg.fixes", "vitreg.diagnosis.log_concave")
PACKAGE = Path(__file__).resolve().parents[1] / "vitreg"
MODULES = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")]
_hook = install_import_hook(
    [name for name in MODULES if not name.startswith(PATCHED)],
    # The numeric tower: an int is a fine float.
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)
atexit.register(shutil.rmtree, os.environ["HF_HUB_CACHE"], ignore_errors=True)
torch.set_num_threads(1)  # tests run in parallel processes instead

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="also what takes minutes and is rarely broken")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--nightly"):
        for item in items:
            if item.get_closest_marker("nightly"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: scripts/check --nightly"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random weights are the same in every run: a test passes or fails, it is not drawn."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and photos that lies beside a checkout; absent elsewhere."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real models and photos in {SHARED.name}/ beside the checkout")
    return SHARED
