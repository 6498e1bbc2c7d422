"""What a second population of norms must have in common before it is called an artifact."""

import math

import numpy as np
import pytest
import torch
from catalog import CATALOG, images
from torch import Tensor

import vitreg
from vitreg.diagnosis.judging import Evidence, Judgement
from vitreg.diagnosis.result import LayerDiagnosis, sureness

PHOTOS, PATCHES, WIDTH, LAYER = 96, 20, 32, 2
SEEDS = range(3)


def ordinary(seed: int, photos: int = PHOTOS) -> Tensor:
    """Patches (b, p, d) that all are alike."""
    return torch.randn(photos, PATCHES, WIDTH, generator=torch.Generator().manual_seed(seed))


def some(seed: int, share: float = 0.03, photos: int = PHOTOS) -> Tensor:
    """Which patches (b, p) are made outliers."""
    return torch.rand(photos, PATCHES, generator=torch.Generator().manual_seed(seed + 100)) < share


def vector(size: float, dimensions: int = 3) -> Tensor:
    """Of so many median norms, in few residual dimensions."""
    found = torch.zeros(WIDTH)
    found[5 : 5 + dimensions] = size * math.sqrt(WIDTH / dimensions)
    return found


def diagnosed(patches: Tensor) -> vitreg.Diagnosis:
    """Of a random model whose last block leaves these patches."""
    vit = CATALOG["timm vit"].backbone()

    def leave(module: object, args: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, vit.layout.patch_slice] = patches
        return output

    vit.model.blocks[LAYER].register_forward_hook(leave)
    return vitreg.diagnose(vit, [images(vit, len(patches))], examples=0)


def last(report: vitreg.Diagnosis) -> LayerDiagnosis:
    return report.layers[LAYER]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [2.5, 3.0, 6.0, 20.0])
def test_one_vector_on_some_patches_is_an_artifact(size, seed):
    chosen = some(seed)
    patches = ordinary(seed) + chosen[..., None] * vector(size)
    report = diagnosed(patches)
    assert (report.verdict, report.onset_layer) == ("artifacts", LAYER)
    assert torch.equal(report.rule.mask(patches.norm(dim=-1)), chosen)
    evidence = last(report).evidence
    assert evidence.one_vector == (min(evidence.direction, evidence.few_dimensions) >= 0.8)
    assert any("share one direction" in words for words in evidence.named)
    assert any("three residual dimensions" in words for words in evidence.named)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_scale_of_the_residual_stream_does_not_matter(seed):
    patches = ordinary(seed) + some(seed)[..., None] * vector(4.0)
    one, other = diagnosed(patches), diagnosed(8 * patches)
    assert other.threshold == pytest.approx(8 * one.threshold)
    assert last(other).margin == pytest.approx(last(one).margin, rel=1e-4)


def kinds(seed: int) -> dict[str, Tensor]:
    """Patches with large norms that nothing but their norm has made different."""
    rng, shape = np.random.default_rng(seed), (PHOTOS, PATCHES, 1)
    rows = np.repeat(np.arange(4), 5)[None, :, None]
    return {
        "no tail": np.ones(shape),
        "half of the photos at 4x": np.where(rng.random((PHOTOS, 1, 1)) < 0.5, 4.0, 1.0),
        "one photo in ten at 3x": np.where(rng.random((PHOTOS, 1, 1)) < 0.1, 3.0, 1.0),
        "every photo its own norm": np.exp(rng.normal(0, 0.8, (PHOTOS, 1, 1))),
        "lognormal": np.exp(rng.normal(0, 0.8, shape)),
        "Pareto": 1 + rng.pareto(1.5, shape),
        "heavier than log-concave": np.exp(0.1 * rng.standard_t(2, shape)),
        "drift by row": np.exp(rows / 4.0),
        "3% of the patches at 2x": np.where(rng.random(shape) < 0.03, 2.0, 1.0),
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", kinds(0))
def test_large_norms_alone_are_no_artifact(kind, seed):
    report = diagnosed((ordinary(seed) * torch.from_numpy(kinds(seed)[kind])).float())
    assert report.verdict == "no artifacts", last(report)
    assert (report.threshold, report.outlier_fraction) == (None, 0.0)


def test_what_is_no_artifact_for_want_of_evidence_is_said():
    factors = torch.from_numpy(kinds(0)["3% of the patches at 2x"]).float()
    report = diagnosed(ordinary(0) * factors)
    assert last(report).margin > 1
    assert "no direction, dimension or attention in common" in report.reason


@pytest.mark.parametrize("seed", SEEDS)
def test_norms_far_out_and_well_apart_need_nothing_in_common(seed):
    chosen = some(seed)
    patches = ordinary(seed) * torch.where(chosen, 8.0, 1.0)[..., None]
    report = diagnosed(patches)
    assert report.verdict == "artifacts"
    assert not last(report).evidence.named
    assert torch.equal(report.rule.mask(patches.norm(dim=-1)), chosen)


@pytest.mark.parametrize("seed", SEEDS)
def test_few_dimensions_with_either_sign_are_no_direction(seed):
    signs = torch.where(some(seed, 0.5), 1.0, -1.0)
    report = diagnosed(ordinary(seed) + (some(seed + 1) * signs)[..., None] * vector(2.2))
    evidence = last(report).evidence
    assert evidence.few_dimensions > 0.5
    assert evidence.direction < 0.25
    assert evidence.named == ()
    assert report.verdict == "no artifacts"


@pytest.mark.parametrize("seed", SEEDS)
def test_what_one_photo_holds_is_no_artifact_unless_it_is_far_out(seed):
    chosen = torch.zeros(PHOTOS, PATCHES, dtype=torch.bool)
    chosen[seed, :10] = True
    near = diagnosed(ordinary(seed) + chosen[..., None] * vector(2.6))
    assert last(near).evidence.one_group > 0.9
    assert last(near).margin > 1
    assert near.verdict == "no artifacts"
    assert "in a few photos" in near.reason
    far = diagnosed(ordinary(seed) + chosen[..., None] * vector(8.0))
    assert far.verdict == "artifacts"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_photo_of_its_own_kind_is_none_however_far_out(seed):
    """Its large patches have nothing in common."""
    chosen = torch.zeros(PHOTOS, PATCHES, dtype=torch.bool)
    chosen[seed, :10] = True
    report = diagnosed(ordinary(seed) * torch.where(chosen, 8.0, 1.0)[..., None])
    assert last(report).ratio > 5
    assert last(report).margin > 1
    assert report.verdict == "no artifacts"


@pytest.mark.parametrize("seed", SEEDS)
def test_at_fixed_positions_photos_do_not_add_up(seed):
    chosen = torch.zeros(PHOTOS, PATCHES, dtype=torch.bool)
    chosen[:, 7] = True
    near = diagnosed(ordinary(seed) + chosen[..., None] * vector(2.0))
    assert last(near).evidence.bound > 0.9
    assert near.verdict == "no artifacts"
    far = diagnosed(ordinary(seed) + chosen[..., None] * vector(6.0))
    assert (far.verdict, last(far).evidence.bound) == ("artifacts", 1.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_photos_full_of_outliers_do_not_hide_them(seed):
    chosen = some(seed, 0.9)
    chosen[12:] = False
    patches = ordinary(seed) + chosen[..., None] * vector(8.0)
    report = diagnosed(patches)
    assert report.verdict == "artifacts"
    assert torch.equal(report.rule.mask(patches.norm(dim=-1)), chosen)


EVIDENCE = {"direction": 0.0, "few_dimensions": 0.0, "attention": None, "bound": 0.0, "one_group": 0.1}
NAMED = [
    ({}, 0),
    ({"direction": 0.59}, 0),
    ({"direction": 0.9}, 0),
    ({"direction": 0.6, "few_dimensions": 0.25}, 1),
    ({"few_dimensions": 0.9}, 0),
    ({"few_dimensions": 0.9, "direction": 0.3}, 1),
    ({"few_dimensions": 0.44, "direction": 0.3}, 0),
    ({"attention": 2.9}, 0),
    ({"attention": 3.0}, 1),
    ({"few_dimensions": 0.9, "direction": 0.9, "attention": 9.0}, 3),
]


@pytest.mark.parametrize(("changes", "count"), NAMED)
def test_what_speaks_for_artifacts_is_named(changes, count):
    assert len(Evidence(**(EVIDENCE | changes)).named) == count


@pytest.mark.parametrize("stands", [True, False])
def test_sureness_is_even_where_evidence_just_suffices_and_grows_from_there(stands):
    margins = [1.0, 1.2, 2.0, 5.0] if stands else [1.0, 0.8, 0.4, 0.0]
    sure = [sureness(Judgement(None, None, margin, stands)) for margin in margins]
    assert sure[0] == 0.5
    assert sure == sorted(sure)
    assert 0.9 < sure[-1] <= 1
    against = Judgement(None, None, 2.0, not stands) if stands else Judgement(None, None, 0.5, True)
    assert sureness(against) == 0.5  # the verdict is another than the shape's
