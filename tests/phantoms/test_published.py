"""Shapes of the published models get the published answer."""

import pytest
import torch
from phantoms import crops
from published import BORDER, RECIPES, published
from timm.models.vision_transformer import VisionTransformer

import vitreg

pytestmark = pytest.mark.slow

SEEDS = range(2)
WITH_OUTLIERS = [name for name, recipe in RECIPES.items() if recipe.onset is not None]


def f1(truth: torch.Tensor, found: torch.Tensor) -> float:
    return 2 * int((truth & found).sum()) / max(int(truth.sum()) + int(found.sum()), 1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RECIPES)
def test_the_published_answer(name, seed):
    shape = published(name, seed)
    report = vitreg.diagnose(shape.vit, [shape.photos])
    assert report.verdict == shape.recipe.verdict
    assert report.onset_layer == shape.recipe.onset
    others = crops(shape.vit, 8, seed + 100)
    if shape.recipe.onset is None:
        assert not report.outliers(shape.vit, others).any()
    else:
        assert f1(shape.marked(shape.photos), report.outliers(shape.vit, shape.photos)) >= 0.98
        if not any(norms.soft for norms in shape.recipe.norms):
            # Where outliers reach down to the others, the flat half of one photo, whose patches are all alike
            # and so get one and the same norm, would decide.
            assert f1(shape.marked(others), report.outliers(shape.vit, others)) >= 0.98


# -- the shapes are what they are said to be ---------------------------------------------------------


def norms(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch norms (l, b, gh, gw), and the true outliers (b, gh, gw)."""
    shape = published(name)
    with vitreg.trace(shape.vit) as t, torch.no_grad():
        shape.vit(shape.photos)
    return t.layout.as_grid(t.norms[:, :, t.layout.patch_slice]), shape.marked(shape.photos)


def ratios(name: str) -> list[float]:
    """Per layer, the median norm of the true outliers over that of the others."""
    found, marked = norms(name)
    return [float(layer[marked].median() / layer[~marked].median()) for layer in found]


@pytest.mark.parametrize(
    ("name", "share", "ratio", "blocks"),
    [
        ("OpenCLIP B/16", 0.04, 5.0, range(6, 12)),
        ("DINOv2-L", 0.02, 10.0, range(5, 11)),
        ("DINOv2-g", 0.017, 9.0, range(5, 12)),
    ],
)
def test_outliers_by_content_have_their_share_and_norm_in_their_blocks_alone(name, share, ratio, blocks):
    found, marked = norms(name)
    assert float(marked.float().mean()) == pytest.approx(share, rel=0.02)
    assert float(marked.float().mean(0).max()) < 0.5  # at no fixed place
    for layer, measured in enumerate(ratios(name)):
        assert measured == pytest.approx(ratio, rel=0.05) if layer in blocks else measured < 1.5
    assert found[8][marked].log().std() == pytest.approx(published(name).recipe.norms[8].soft, rel=0.1)


def test_deit3_keeps_four_border_patches_while_the_others_catch_up():
    found, marked = norms("DeiT-III B")
    assert all(sorted(map(tuple, mask.nonzero().tolist())) == sorted(BORDER) for mask in marked)
    assert found[3:, marked].std() < 1e-3 * found[3:, marked].mean()
    measured = ratios("DeiT-III B")
    assert max(measured[:3]) < 1.5
    assert measured[3] == pytest.approx(25, rel=0.02)
    assert 1 / measured[11] == pytest.approx(0.7, rel=0.02)


def test_mae_has_heavy_tails_and_dino_a_drift_with_position():
    heavy, none = norms("MAE")
    assert not none.any()
    assert heavy.flatten(1).log().std(1) == pytest.approx(torch.full((12,), 0.4), rel=0.01)
    assert (heavy.flatten(1).amax(1) / heavy.flatten(1).median(1).values).min() > 3
    drifting = norms("DINO")[0].log().mean((0, 1))
    assert float(drifting[0, 0] - drifting[6, 6]) == pytest.approx(0.6, abs=0.1)


@pytest.mark.parametrize("name", WITH_OUTLIERS)
def test_the_weights_are_those_of_any_vit(name):
    model = published(name).vit.model
    plain = VisionTransformer(img_size=112, patch_size=8, embed_dim=48, depth=12, num_heads=3, num_classes=5)
    plain.load_state_dict(model.state_dict())
    assert vitreg.wrap(model, image_size=112).anatomy == published(name).vit.anatomy
    bare = vitreg.wrap(plain.eval(), image_size=112)
    assert vitreg.diagnose(bare, [published(name).photos]).verdict == "no artifacts"
