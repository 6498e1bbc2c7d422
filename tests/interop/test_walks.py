"""A few random walks; `python benchmarks/random_walks.py` makes hundreds."""

import pytest
from walks import walk

pytestmark = pytest.mark.slow

pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("torchao")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(5))
def test_a_random_walk(seed):
    assert walk(seed).startswith("the same throughout")
