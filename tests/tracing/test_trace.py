"""Traces as a user asks for them: what can be read, what is refused, other sizes, broken models."""

import copy
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from catalog import CATALOG, images, timm_model
from torch import Tensor

import vitreg
from vitreg import UnsupportedModelError
from vitreg.hooks.attention import AttentionCall
from vitreg.tracing.streams import token_norms


@pytest.fixture
def vit() -> vitreg.Backbone:
    return CATALOG["timm dinov2 registers"].backbone()


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As users run vitreg: without the checks of annotated types that conftest.py installs."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# -- asking ----------------------------------------------------------------------------------------


def test_shapes_are_as_documented(vit: vitreg.Backbone) -> None:
    with vitreg.trace(
        vit, residuals=True, neurons=True, attention=[3], qkv=True, embedding=True, layers=[1, 2]
    ) as t:
        vit(images(vit))
    assert t.norms.shape == (2, 2, 25)
    assert t.residuals.shape == (2, 2, 25, 32)
    assert t.neurons.shape == (2, 2, 25, 128)
    assert t.attention.shape == (2, 2, 4, 1, 25)
    assert t.q.shape == t.k.shape == t.v.shape == (2, 2, 4, 25, 8)
    assert t.embedding.shape == (2, 20, 32)


@pytest.mark.parametrize("name", ["residuals", "neurons", "attention", "q", "k", "v", "embedding"])
def test_what_was_not_asked_for_is_not_there(vit: vitreg.Backbone, name: str) -> None:
    with vitreg.trace(vit) as t:
        vit(images(vit))
    with pytest.raises(AttributeError, match=rf"no '{name}': it holds \['norms'\]. Ask for it in trace"):
        getattr(t, name)


def test_norms_can_be_left_out(vit: vitreg.Backbone) -> None:
    with vitreg.trace(vit, norms=False, neurons=True) as t:
        vit(images(vit))
    with pytest.raises(AttributeError, match=r"no 'norms': it holds \['neurons'\]"):
        _ = t.norms


def test_reading_before_a_pass_says_so(vit: vitreg.Backbone) -> None:
    with (
        vitreg.trace(vit) as t,
        pytest.raises(AttributeError, match=r"holds nothing yet.*run the model inside the with block"),
    ):
        _ = t.norms


def test_a_pass_outside_the_block_is_not_recorded(vit: vitreg.Backbone) -> None:
    with vitreg.trace(vit) as t:
        vit(images(vit))
    vit(images(vit, 3))
    assert t.norms.shape == (3, 2, 25)


def test_a_trace_can_be_entered_again(vit: vitreg.Backbone) -> None:
    t = vitreg.trace(vit)
    for count in (2, 3):
        with t:
            vit(images(vit, count))
        assert t.norms.shape == (3, count, 25)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([3], r"layers \[3\]: expected one or more of 0 to 2"),
        ([0, -1], r"layers \[-1\]: expected one or more of 0 to 2"),
        ([], r"layers \[\]: expected one or more of 0 to 2"),
    ],
    ids=str,
)
def test_layers_out_of_range_are_named(vit: vitreg.Backbone, layers: list[int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        vitreg.trace(vit, layers=layers)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ("patches", "attention='patches': expected 'cls', 'registers', 'full' or patch numbers"),
        ([-1], r"patches \[-1\]: expected some of 0 to 19"),
        ([], r"patches \[\]: expected some of 0 to 19"),
    ],
    ids=str,
)
def test_wrong_rows_are_named(vit: vitreg.Backbone, rows: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        vitreg.trace(vit, attention=rows)


def test_a_model_without_cls_has_no_cls_attention() -> None:
    with pytest.raises(UnsupportedModelError, match="no CLS token; ask for the attention of patches instead"):
        vitreg.trace(CATALOG["timm siglip"].backbone(), attention="cls")


def test_a_model_without_registers_has_no_register_attention() -> None:
    with pytest.raises(UnsupportedModelError, match="no register tokens"):
        vitreg.trace(CATALOG["timm vit"].backbone(), attention="registers")


def test_a_distilled_models_cls_is_one_token() -> None:
    vit = CATALOG["timm deit distilled"].backbone()
    with vitreg.trace(vit, attention="cls") as t:
        vit(images(vit))
    assert t.attention.shape == (3, 2, 4, 1, 22)


# -- recording -------------------------------------------------------------------------------------


def test_norms_are_accumulated_in_float32() -> None:
    """In half precision the norm of an outlier overflows."""
    residual = torch.full((1, 2, 64), 30000.0, dtype=torch.float16)
    torch.testing.assert_close(token_norms(residual), torch.full((1, 2), 240000.0))


@pytest.mark.parametrize("name", ["timm dinov3", "hf dinov2", "hf ijepa", "hf clip"])
@pytest.mark.parametrize("size", [(40, 32), (48, 16)], ids=str)
def test_the_layout_follows_the_images(name: str, size: tuple[int, int]) -> None:
    built = timm_model("vit_small_patch16_dinov3", dynamic_img_size=True)
    vit = (
        CATALOG[name].backbone()
        if name != "timm dinov3"
        else vitreg.wrap(built().eval(), image_size=(32, 40))
    )
    batch = torch.rand(2, 3, *size)
    with vitreg.trace(vit, attention=[size[1] // 8 - 1, 5]) as t:
        vit(batch)
    assert t.layout == vit.layout_for(batch)
    assert t.layout.grid == (size[0] // 8, size[1] // 8)
    assert t.norms.shape[-1] == t.layout.tokens
    with vitreg.trace(vit, attention="full") as full:
        vit(batch)
    rows = [t.layout.patch(0, t.layout.grid[1] - 1), t.layout.patch_slice.start + 5]
    torch.testing.assert_close(t.attention, full.attention[..., rows, :])


@pytest.mark.usefixtures("unchecked")
def test_how_many_patches_there_are_is_known_in_the_pass(vit: vitreg.Backbone) -> None:
    with (
        vitreg.trace(vit, attention=[0, 20]),
        pytest.raises(ValueError, match=r"patches \[20\]: expected some of 0 to 19"),
    ):
        vit(images(vit))


@pytest.mark.parametrize("size", [(48, 48), (24, 48), (48, 24), (16, 72)], ids=str)
def test_the_layout_follows_the_images_where_no_map_shows_the_grid(size: tuple[int, int]) -> None:
    """SigLIP 2 is given patches, and a table with the grid of each image; three sizes have 18 patches."""
    vit = CATALOG["hf siglip2"].backbone()
    with vitreg.trace(vit) as t:
        vit(torch.rand(1, 3, *size))
    assert t.layout.grid == (size[0] // 8, size[1] // 8)


def test_images_of_several_grids_in_one_batch_are_refused() -> None:
    vit = CATALOG["hf siglip2"].backbone()
    grids = torch.tensor([[3, 6], [6, 3]])
    mask = torch.ones(2, 18, dtype=torch.long)
    with (
        vitreg.trace(vit),
        pytest.raises(UnsupportedModelError, match="images of 2 patch grids in one batch"),
    ):
        vit.model(pixel_values=torch.rand(2, 18, 192), pixel_attention_mask=mask, spatial_shapes=grids)


def test_packed_patches_are_refused() -> None:
    """A NaFlex model also takes images as dictionaries of patches, padded to one length."""
    vit = CATALOG["timm naflexvit"].backbone()
    grid = torch.stack(torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"), -1).reshape(1, 25, 2)
    packed = {
        "patches": torch.rand(1, 25, 8 * 8 * 3),
        "patch_coord": grid,
        "patch_valid": torch.ones(1, 25, dtype=torch.bool),
    }
    reason = r"found 29 tokens after block 0, but TokenLayout.* makes 24. .*packing are not supported"
    with vitreg.trace(vit), pytest.raises(UnsupportedModelError, match=reason):
        vit.model(packed)


def test_dropped_patches_are_refused() -> None:
    model = timm_model("vit_small_patch16_224", patch_drop_rate=0.5)().eval()
    vit = vitreg.wrap(model, image_size=(32, 40))
    model.train()
    reason = r"found 11 tokens after block 0, but .* makes 21. .*switch them off \(model.eval\(\)\)"
    with vitreg.trace(vit), pytest.raises(UnsupportedModelError, match=reason):
        vit(images(vit))


def test_a_pass_that_stops_early_does_not_mix_with_the_one_before(vit: vitreg.Backbone) -> None:
    with vitreg.trace(vit) as t, vitreg.trace(vit, layers=[0, 1]) as first:
        vit(images(vit, 3))
        vit.model.forward_intermediates(images(vit), indices=[1], stop_early=True)
    assert first.norms.shape == (2, 2, 25)
    with pytest.raises(
        AttributeError, match=r"no 'norms' of layers \[2\]: the latest forward pass did not reach"
    ):
        _ = t.norms


# -- models changed after they were wrapped --------------------------------------------------------


@pytest.mark.parametrize("name", ["timm dinov2", "hf dinov2"])
def test_attention_that_became_step_by_step_is_read_all_the_same(name: str) -> None:
    vit = CATALOG[name].backbone()
    with torch.no_grad(), vitreg.trace(vit, attention="full") as fused:
        vit(images(vit))
    if name.startswith("hf"):
        vit.model.set_attn_implementation("eager")
    else:
        vit.model.blocks[1].attn.fused_attn = False
    with torch.no_grad(), vitreg.trace(vit, attention="full") as t:
        vit(images(vit))
    torch.testing.assert_close(t.attention, fused.attention, atol=1e-5, rtol=0)


def test_attention_that_became_another_kind_is_refused() -> None:
    vit = CATALOG["timm vit"].backbone()
    vit.model.blocks[1].attn.forward = lambda x, **kwargs: x.mean(1, keepdim=True).expand_as(x)
    with vitreg.trace(vit) as t:
        vit(images(vit))
    assert t.norms.shape == (3, 2, 21)  # these need no attention
    reason = r"block 1 made no attention that vitreg sees.*set_attn"
    with vitreg.trace(vit, attention="cls"), pytest.raises(UnsupportedModelError, match=reason):
        vit(images(vit))


def test_a_model_compiled_later_is_refused(vit: vitreg.Backbone) -> None:
    vit.model.compile()
    with pytest.raises(UnsupportedModelError, match=r"compiled with torch.compile"):
        vitreg.trace(vit).__enter__()


def test_a_model_in_another_thread_is_not_seen(vit: vitreg.Backbone) -> None:
    seen: list[int] = []
    with vitreg.watch(vit, on_block=lambda layer, residual: seen.append(layer)):
        thread = threading.Thread(target=lambda: vit(images(vit)))
        thread.start()
        thread.join()
    assert seen == []


def test_attention_outside_the_blocks_is_not_recorded() -> None:
    """SigLIP pools by attention after its blocks."""
    vit = CATALOG["timm siglip"].backbone()
    seen: list[int] = []
    with vitreg.watch(vit, on_attention=lambda layer, call: seen.append(layer)):
        vit(images(vit))
    assert seen == [0, 1, 2]


def test_watch_hands_out_one_block_after_another(vit: vitreg.Backbone) -> None:
    seen: list[str] = []

    def on_attention(layer: int, call: AttentionCall) -> None:
        assert not torch.is_grad_enabled()
        seen.append(f"attention {layer}")

    with torch.enable_grad(), vitreg.watch(
        vit,
        on_start=lambda: seen.append("start"),
        on_embedding=lambda patches: seen.append("embedding"),
        on_block=lambda layer, residual: seen.append(f"block {layer}"),
        on_neurons=lambda layer, a: seen.append(f"neurons {layer}"),
        on_attention=on_attention,
    ):  # fmt: skip
        vit(images(vit))
    each = [f"{what} {layer}" for layer in range(3) for what in ("attention", "neurons", "block")]
    assert seen == ["embedding", "start", *each]


def test_recorded_tensors_hold_no_graph(vit: vitreg.Backbone) -> None:
    with torch.enable_grad():
        with vitreg.trace(vit, residuals=True, neurons=True, attention="full", qkv=True, embedding=True) as t:
            assert vit(images(vit)).requires_grad
        recorded: list[Tensor] = [t.norms, t.residuals, t.neurons, t.attention, t.q, t.k, t.v, t.embedding]
    assert not any(x.requires_grad for x in recorded)


def test_a_watched_model_can_be_pickled_and_copied(vit: vitreg.Backbone) -> None:
    expected = vit(images(vit))
    with vitreg.trace(vit, neurons=True, attention="full", embedding=True) as t:
        twins = [pickle.loads(pickle.dumps(vit.model)), copy.deepcopy(vit.model)]
        for twin in twins:
            assert torch.equal(twin(images(vit)), expected)
        with pytest.raises(AttributeError, match="nothing yet"):
            _ = t.norms
