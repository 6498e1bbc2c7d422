"""Shared fixtures. Shapes in vitreg's signatures are checked at run time while the tests run."""

import os
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a hub
_hook = install_import_hook("vitreg", "beartype.beartype")
torch.set_num_threads(1)  # tests run in parallel processes instead

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and photos that lies beside a checkout; absent elsewhere."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real models and photos in {SHARED}")
    return SHARED
