"""One definition of an outlier: the mask, the probability, and what is written of both."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitreg.diagnosis.outliers import OutlierRule

CURVE = ((10.0, 0.1), (20.0, 0.4), (40.0, 0.9))
NORMS = st.lists(st.floats(0.0, 1e6), min_size=1, max_size=20)


@given(NORMS, st.floats(0.01, 1e5))
def test_a_mask_marks_norms_from_the_threshold_on(norms, threshold):
    rule = OutlierRule(3, threshold)
    expected = [x >= threshold for x in norms]
    assert rule.mask(np.array(norms)).tolist() == expected
    assert rule.mask(torch.tensor(norms, dtype=torch.float64)).tolist() == expected


def test_shapes_are_kept():
    norms = torch.rand(2, 3, 4) * 50
    rule = OutlierRule(0, 20.0, CURVE)
    assert rule.mask(norms).shape == rule.probability(norms).shape == (2, 3, 4)


@given(NORMS)
def test_a_probability_rises_with_the_norm_and_ends_as_the_curve_does(norms):
    found = OutlierRule(0, 20.0, CURVE).probability(torch.tensor(sorted(norms)))
    assert (found.diff() >= 0).all()
    assert ((found >= CURVE[0][1] - 1e-6) & (found <= CURVE[-1][1] + 1e-6)).all()


def test_a_probability_is_interpolated_on_the_log_of_the_norm():
    rule = OutlierRule(0, 20.0, CURVE)
    found = rule.probability(torch.tensor([10.0, 20.0, 40.0, 20 * math.sqrt(2), 0.0, 1e9]))
    assert found.tolist() == pytest.approx([0.1, 0.4, 0.9, 0.65, 0.1, 0.9], abs=1e-6)


def test_without_a_curve_a_patch_is_one_or_is_not():
    assert OutlierRule(0, 20.0).probability(torch.tensor([19.9, 20.0])).tolist() == [0.0, 1.0]


def test_a_rule_that_marks_none():
    rule = OutlierRule(2)
    assert not rule.marks_any
    assert not rule.mask(torch.tensor([1.0, 1e30])).any()
    assert not rule.probability(torch.tensor([1.0, 1e30])).any()
    assert OutlierRule(2, 1.0).marks_any


@pytest.mark.parametrize("rule", [OutlierRule(2), OutlierRule(5, 20.0), OutlierRule(5, 20.0, CURVE)])
def test_json_holds_all_of_a_rule(rule):
    written = json.loads(json.dumps(rule.to_json(), allow_nan=False))
    threshold = math.inf if written["threshold"] is None else written["threshold"]
    assert OutlierRule(written["layer"], threshold, tuple(map(tuple, written["curve"]))) == rule
