"""Where commands are tried."""

from pathlib import Path

import pytest

import vitreg


@pytest.fixture
def here(tmp_path, photos, monkeypatch) -> Path:
    """A current folder with photos and a saved fix."""
    monkeypatch.chdir(tmp_path)
    vitreg.TestTimeRegisters({1: [3]}).save("saved")
    return tmp_path
