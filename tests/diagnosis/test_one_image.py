"""Looks at one image agree with what trace records, for every kind of token and under fixes."""

import numpy as np
import pytest
import torch
from catalog import CATALOG, images

import vitreg
from vitreg import NonFiniteError
from vitreg.diagnosis.one_image import inspect_image, queries
from vitreg.models.head import class_names
from vitreg.models.probe import evaluating

MODELS = ["timm vit", "timm dinov2 registers", "timm siglip", "hf dinov2 registers", "open_clip vit"]


@pytest.mark.parametrize("name", MODELS)
def test_norms_and_attention_are_those_of_a_trace(name: str) -> None:
    vit = CATALOG[name].backbone()
    pixels = images(vit, 1)
    layout = vit.layout
    rows = list(range(layout.patches))
    with evaluating(vit.model), vitreg.trace(vit, attention=rows) as t:
        vit(pixels)
    expected = t.norms[:, 0, layout.patch_slice]
    assert np.allclose(inspect_image(vit, pixels).norms.reshape(expected.shape), expected, rtol=1e-5)
    row, column = layout.grid[0] - 1, 2
    seen = inspect_image(vit, pixels, query=(row, column)).attention
    expected = t.attention[:, 0, :, row * layout.grid[1] + column, layout.patch_slice]
    assert np.allclose(seen.to_patches, expected.sum(-1), atol=1e-6)
    maps = (expected / expected.sum(-1, keepdim=True)).unflatten(-1, layout.grid)
    assert np.allclose(seen.maps, maps, atol=1e-6)
    assert np.allclose(seen.of(1), maps[1].mean(0), atol=1e-6)
    assert np.allclose(seen.of(1, 2), maps[1, 2], atol=1e-6)


def test_special_tokens_look_too() -> None:
    vit = CATALOG["timm dinov2 registers"].backbone()
    pixels, count = images(vit, 1), vit.layout.registers
    assert queries(vit) == ["CLS", *(f"register {i}" for i in range(count))]
    for query, rows, index in (("CLS", "cls", 0), ("register 1", "registers", 1)):
        with evaluating(vit.model), vitreg.trace(vit, attention=rows) as t:
            vit(pixels)
        expected = t.attention[:, 0, :, index, vit.layout.patch_slice]
        assert np.allclose(
            inspect_image(vit, pixels, query=query).attention.to_patches, expected.sum(-1), atol=1e-6
        )


def test_without_cls_evenly_spread_patches_look() -> None:
    vit = CATALOG["timm siglip"].backbone()
    assert queries(vit) == ["patches"]
    pixels = images(vit, 1)
    shares = inspect_image(vit, pixels, query="patches").attention.of(2)
    report = vitreg.diagnose(vit, [pixels], examples=1)
    assert np.allclose(shares, report.examples[0].attention[2], atol=1e-5)
    with pytest.raises(ValueError, match="no token 'CLS'"):
        inspect_image(vit, pixels, query="CLS")


def test_a_fixs_register_looks_from_the_block_where_it_enters() -> None:
    vit = CATALOG["timm vit"].backbone()
    pixels = images(vit, 1)
    fix = vitreg.TestTimeRegisters({2: [5]}, registers=2, entry=1)
    assert queries(vit, 2) == ["CLS", "register 0", "register 1"]
    with fix.applied_to(vit):
        seen = inspect_image(vit, pixels, query="register 1").attention
    assert np.array_equal(seen.to_patches[0], np.zeros_like(seen.to_patches[0]))
    assert (seen.to_patches[1:] > 0).all()
    assert np.allclose(seen.maps[1:].sum((2, 3)), 1, atol=1e-5)
    with pytest.raises(ValueError, match="no token 'register 1'"):
        inspect_image(vit, pixels, query="register 1")


@pytest.mark.parametrize("query", ["cls", "register", "register -1", "register x", ""])
def test_a_token_that_makes_no_sense_is_refused(query: str) -> None:
    vit = CATALOG["timm vit"].backbone()
    with pytest.raises(ValueError, match="expected 'CLS', 'patches', 'register K'"):
        inspect_image(vit, images(vit, 1), query=query)


@pytest.mark.parametrize("place", [(-1, 0), (0, 5), (4, 0)])
def test_a_patch_outside_of_the_grid_is_refused(place: tuple[int, int]) -> None:
    vit = CATALOG["timm vit"].backbone()
    assert vit.layout.grid == (4, 5)
    with pytest.raises(ValueError, match="no token"):
        inspect_image(vit, images(vit, 1), query=place)


def test_a_neuron_is_that_of_a_trace() -> None:
    vit = CATALOG["timm vit"].backbone()
    pixels = images(vit, 1)
    with evaluating(vit.model), vitreg.trace(vit, neurons=True, layers=[1]) as t:
        vit(pixels)
    seen = inspect_image(vit, pixels, neurons=[(1, 7), (0, 3), (1, 9)]).activations
    assert list(seen) == [(0, 3), (1, 7), (1, 9)]
    for index in (7, 9):
        expected = t.neurons[0, 0, vit.layout.patch_slice, index].unflatten(0, vit.layout.grid)
        assert np.array_equal(seen[1, index], expected)
    with pytest.raises(ValueError, match=r"block 1, neuron 128: .* neurons 0 to 127"):
        inspect_image(vit, pixels, neurons=[(1, 128)])


def test_the_likeliest_classes_have_the_heads_names() -> None:
    vit, scenes = vitreg.example(4)
    names = class_names(vit)
    assert names[:3] == ["crescent", "cross", "disc"]
    batch = next(iter(vitreg.read_images([scene.photo for scene in scenes], vit)))
    found = [inspect_image(vit, pixels[None]).likeliest(names, 2) for pixels in batch.pixels]
    with torch.no_grad():
        chances, classes = vit(batch.pixels).softmax(-1).topk(2)
    assert [[names.index(name) for name, _ in best] for best in found] == classes.tolist()
    assert [chance for _, chance in found[0]] == pytest.approx(chances[0].tolist(), rel=1e-4)
    assert names[classes[0, 0]] == "cross"  # and so it is


def test_a_model_without_a_head_predicts_nothing() -> None:
    vit = CATALOG["hf dinov2 registers"].backbone()
    assert class_names(vit) == []
    assert inspect_image(vit, images(vit, 1)).likeliest([]) == []


def test_nan_is_an_error_that_says_so() -> None:
    vit = CATALOG["timm vit"].backbone()
    with torch.no_grad():
        vit.anatomy.down_projections(vit.model)[1].weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        inspect_image(vit, images(vit, 1))
