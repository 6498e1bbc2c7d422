"""Shared fixtures. Shapes in vitreg's signatures are checked at run time while the tests run."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# No test reaches a hub: what is loaded by a hub's name comes from a cache that the test fills.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_CACHE"] = tempfile.mkdtemp(prefix="vitreg-hub-")
# Tests run in parallel processes, with one thread each: on a busy machine the threads of BLAS wait for one
# another, and scipy's eigh of 700 rows takes 13 s instead of 0.2. Processes that tests start inherit it.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import pytest
import shape_checks
import threadpoolctl
import tiers
import torch

# Not inside patched forwards (torch.compile would have to trace through the checks), nor in inner loops.
PATCHED = ("vitreg.hooks", "vitreg.fixes", "vitreg.diagnosis.log_concave")
PACKAGE = Path(__file__).resolve().parents[1] / "vitreg"
MODULES = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")]
shape_checks.install([name for name in MODULES if not name.startswith(PATCHED)])
atexit.register(shutil.rmtree, os.environ["HF_HUB_CACHE"], ignore_errors=True)
torch.set_num_threads(1)
threadpoolctl.threadpool_limits(1)  # of numpy, which pytest's plugins have loaded before

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    tiers.add_options(parser)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tiers.choose(config, items)


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


# -- the command line, and what it is given: imported when used, after the hook above --------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `vitreg ARGS...` in this process: (exit code, stdout, stderr)."""
    from vitreg.cli.main import main

    def run(*args: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vitreg", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model."""
    from checkpoints import tiny_timm
    from timm.models._hub import save_for_hf

    folder = tmp_path_factory.mktemp("models") / "tiny"
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": sizes}
    save_for_hf(tiny_timm(), folder, model_config=config, safe_serialization=True)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three of the bundled photos."""
    from PIL import Image

    from vitreg.data.images import demo_photos

    folder = tmp_path / "photos"
    folder.mkdir()
    for path in demo_photos()[:3]:
        Image.open(path).save(folder / path.name)
    return folder


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Photos of three classes, as the tiny model, which is three-way, knows them."""
    from vitreg.data.images import demo_photos

    for i, path in enumerate(demo_photos()[:3]):
        folder = tmp_path / f"data/class-{i}"
        folder.mkdir(parents=True)
        (folder / path.name).write_bytes(path.read_bytes())
    return tmp_path / "data"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Photos with boxes."""
    from voc_files import save_voc

    return save_voc(tmp_path / "VOC2012")
