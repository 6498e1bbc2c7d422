"""Token layouts, models that are refused and why, and anatomies that a caller states."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from authors_models import Attention, Authors
from catalog import CATALOG, SMALL, images, randomise, timm_model
from hypothesis import given
from hypothesis import strategies as st
from refused_models import REFUSED
from torch import Tensor, nn

import vitreg
from vitreg import Anatomy, NonFiniteError, TokenLayout, UnsupportedModelError
from vitreg.models.probe import evaluating, first_tensor

# -- token layouts ---------------------------------------------------------------------------------

layouts = st.builds(
    TokenLayout,
    st.integers(0, 3),
    st.integers(0, 8),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
)


@given(layouts)
def test_the_three_slices_are_all_tokens_in_order(layout: TokenLayout) -> None:
    tokens = range(layout.tokens)
    prefix, registers, patches = (
        list(tokens[part]) for part in (layout.prefix_slice, layout.register_slice, layout.patch_slice)
    )
    assert prefix + registers + patches == list(tokens)
    assert (len(prefix), len(registers), len(patches)) == (layout.prefix, layout.registers, layout.patches)


@given(layouts)
def test_a_patch_and_its_place_in_the_grid_agree(layout: TokenLayout) -> None:
    rows, columns = layout.grid
    grid = layout.as_grid(torch.arange(layout.tokens)[layout.patch_slice])
    assert grid.tolist() == [[layout.patch(r, c) for c in range(columns)] for r in range(rows)]


def test_as_grid_keeps_leading_dimensions() -> None:
    assert TokenLayout(1, 0, (2, 3)).as_grid(torch.zeros(4, 5, 6)).shape == (4, 5, 2, 3)


def test_a_layout_follows_the_image() -> None:
    anatomy = CATALOG["timm dinov2 registers"].backbone().anatomy
    assert anatomy.layout((16, 48)) == TokenLayout(1, 4, (2, 6))


# -- models that are refused -----------------------------------------------------------------------


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_other_models_are_refused_with_the_reason(build: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        vitreg.wrap(build().eval(), image_size=64)


def module(name: str = "timm vit") -> nn.Module:
    return CATALOG[name].module()


def refused(model: nn.Module, reason: str, **settings: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        vitreg.wrap(model, image_size=(32, 40), **settings)


def test_a_compiled_model_is_refused() -> None:
    refused(torch.compile(module()), r"the model is compiled with torch.compile.*compiled._orig_mod")


def test_a_model_compiled_in_place_is_refused() -> None:
    model = module()
    model.compile()
    refused(model, "the model is compiled with torch.compile")


def test_a_model_with_compiled_blocks_is_refused() -> None:
    model = module()
    model.get_submodule("blocks.1").compile()
    refused(model, "blocks.1 is compiled with torch.compile")


def test_one_block_without_attention_is_refused() -> None:
    model = module()
    model.get_submodule("blocks.2.attn").forward = lambda x, **kwargs: x
    refused(model, r"block 2 made no attention that vitreg sees.*model.set_attn_implementation\('sdpa'\)")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_damaged_weights_are_named(value: float) -> None:
    model = module()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.fc1.weight")[3, 2] = value
    with pytest.raises(NonFiniteError, match=r"weight blocks.1.mlp.fc1.weight holds NaN or infinity"):
        vitreg.wrap(model, image_size=(32, 40))


def test_large_finite_weights_are_not_damaged() -> None:
    """Though their sum overflows."""
    model = module()
    with torch.no_grad():
        model.get_parameter("head.bias").fill_(3e38)
    vitreg.wrap(model, image_size=(32, 40))


def test_the_wrong_image_size_is_named() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"could not run on images of shape \(3, 3, 64, 64\).*matching"
    ):
        vitreg.wrap(module(), image_size=64)


# -- stated anatomies ------------------------------------------------------------------------------

STATED = Anatomy("blocks", "mlp.fc2", 1, 4, (8, 8), "patch_embed.proj")


def test_a_stated_anatomy_is_used_and_measured() -> None:
    stated = Anatomy(
        "blocks", "mlp.fc2", prefix=3, registers=2, patch_size=(8, 8), patch_embedding="patch_embed"
    )
    vit = vitreg.wrap(module("timm dinov2 registers"), image_size=(32, 40), anatomy=stated)
    measured = {"stream": vit.anatomy.stream, "depth": 3, "width": 32, "neurons": 128, "heads": 4}
    assert vit.anatomy == replace(stated, **measured)
    with torch.no_grad(), vitreg.trace(vit, attention="registers", embedding=True) as t:
        vit(images(vit))
    assert t.attention.shape == (3, 2, 4, 2, 25)
    assert t.embedding.shape == (2, 20, 32)


def test_what_was_found_can_be_stated() -> None:
    vit = CATALOG["hf siglip"].backbone()
    assert vitreg.wrap(vit.model, image_size=vit.image_size, anatomy=vit.anatomy).anatomy == vit.anatomy


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"blocks": "layers"}, r"expected a module at 'layers' in VisionTransformer, found none"),
        ({"blocks": "norm"}, r"expected blocks in 'norm', found none"),
        ({"blocks": "patch_embed"}, r"found 2 blocks, but block 0 takes a 4-dimensional input"),
        ({"down_projection": "mlp.down"}, r"expected a module at 'mlp.down' in Block, found none"),
        (
            {"down_projection": "mlp.fc1"},
            r"linear layer to width 32 at 'mlp.fc1' in each of 3 blocks, found Lin",
        ),
        (
            {"down_projection": "norm1"},
            r"linear layer to width 32 at 'norm1' in each of 3 blocks, found LayerN",
        ),
        ({"prefix": 2}, r"expected 26 tokens .* for 32x40 pixels, found 25 in the blocks"),
        ({"registers": 0}, r"expected 21 tokens .* found 25 in the blocks"),
        ({"patch_size": (16, 8)}, r"expected 15 tokens .* found 25 in the blocks"),
        ({"patch_size": (6, 10)}, r"expected 'patch_embed.proj' to embed 5x4 patches .* found \(4, 5\)"),
        ({"patch_embedding": "patch"}, r"expected a module at 'patch' in VisionTransformer, found none"),
        ({"patch_embedding": "norm"}, r"expected 'norm' to embed 4x5 patches before block 0, found no call"),
        ({"depth": 4}, r"expected depth 4, found 3. Correct the Anatomy, or leave depth out"),
        ({"width": 64}, r"expected width 64, found 32"),
        ({"neurons": 64}, r"expected neurons 64, found 128"),
        ({"heads": 2}, r"expected heads 2, found 4"),
    ],
    ids=str,
)
def test_a_wrong_statement_is_refused(wrong: dict[str, Any], reason: str) -> None:
    refused(module("timm dinov2 registers"), reason, anatomy=replace(STATED, **wrong))


# -- probing ---------------------------------------------------------------------------------------


def test_probing_leaves_the_model_as_it_was() -> None:
    model = module().train()
    model.get_submodule("blocks.1").eval()
    before = {name: part.training for name, part in model.named_modules()}
    torch.manual_seed(3)
    vitreg.wrap(model, image_size=(32, 40))
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert {name: part.training for name, part in model.named_modules()} == before
    assert all(p.grad is None for p in model.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_modules_get_their_mode_back_after_an_error() -> None:
    model = module().train()

    def fail() -> None:
        assert not model.training
        assert not torch.is_grad_enabled()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), evaluating(model):
        fail()
    assert model.training
    assert torch.is_grad_enabled()


def test_an_encoder_inside_a_larger_model_is_run_by_forward() -> None:
    """The patches and blocks are the encoder's, and the larger model's head does not matter."""

    class Captioner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = timm_model("vit_small_patch14_reg4_dinov2", **SMALL)()
            self.words = nn.Embedding(7, 32)

        def forward(self, images: Tensor, words: Tensor) -> Tensor:
            return self.vision.forward_features(images)[:, :1] + self.words(words)

    captioner = Captioner().eval()
    vit = vitreg.wrap(
        captioner.vision,
        image_size=(32, 40),
        forward=lambda x: captioner(x, torch.zeros(len(x), 1, dtype=torch.long)),
    )
    assert vit.layout == TokenLayout(1, 4, (4, 5))
    assert vit(images(vit)).shape == (2, 1, 32)


def test_a_head_that_needs_more_than_images_does_not_matter() -> None:
    model = module()

    def forward(x: Tensor) -> Tensor:
        raise TypeError(f"missing caption after {tuple(model.forward_features(x).shape)}")

    assert vitreg.wrap(model, image_size=(32, 40), forward=forward).anatomy.depth == 3


def test_a_whole_open_clip_model_is_read_by_its_image_tower() -> None:
    from open_clip.model import CLIP

    vision = {"layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "image_size": (32, 40)}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 2}
    vit = vitreg.wrap(CLIP(16, vision, text).eval(), image_size=(32, 40))
    assert vit.anatomy.blocks == "visual.transformer.resblocks"
    assert vit.layout == TokenLayout(1, 0, (4, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_probed_in_their_own(dtype: torch.dtype) -> None:
    vit = vitreg.wrap(module("timm dinov2 registers").to(dtype), image_size=(32, 40))
    assert vit.layout == TokenLayout(1, 4, (4, 5))
    assert vit.dtype == dtype


def test_the_residual_stream_is_the_first_tensor_of_whatever_a_block_takes() -> None:
    x = torch.zeros(1)
    assert first_tensor((None, "mask", [(x, torch.ones(1))])) is x
    assert first_tensor({"hidden": x}) is x
    assert first_tensor(("no", None)) is None


def test_a_model_for_any_size_is_probed_at_the_square_of_its_positions() -> None:
    model = CATALOG["hf siglip2"].module()
    del model.config.image_size  # as in a published checkpoint; small models of the catalog have one
    vit = vitreg.wrap(model)
    assert vit.image_size == (32, 32)
    assert vit.layout == TokenLayout(0, 0, (4, 4))


# -- what authors write ----------------------------------------------------------------------------


class WideAttention(Attention):
    """More channels in all heads than the stream has, in layers whose names say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(32, 3 * 96), nn.Sequential(nn.Linear(96, 32), nn.Dropout(0.1))
        del self.qkv, self.proj

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.one(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.other(self.mix(q, k, v).transpose(1, 2).flatten(2))


def test_attention_of_its_own_width_is_no_mlp_whatever_its_layers_are_called() -> None:
    vit = vitreg.wrap(randomise(Authors(WideAttention)).eval())
    assert (vit.anatomy.down_projection, vit.anatomy.neurons, vit.anatomy.heads) == ("mlp.2", 128, 4)


class PatchLayer(nn.Module):
    """Patches cut by hand, a linear layer that gives (b, rows, columns, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 32)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unflatten(2, (-1, 8)).unflatten(4, (-1, 8)).permute(0, 2, 4, 3, 5, 1).flatten(3)
        return self.linear(patches).permute(0, 3, 1, 2)


def test_a_patch_layer_that_is_linear_shows_the_grid() -> None:
    model = Authors()
    model.patch_embed = PatchLayer()
    vit = vitreg.wrap(randomise(model).eval())
    assert (vit.anatomy.patch_embedding, vit.layout.grid) == ("patch_embed.linear", (4, 5))
    with torch.no_grad(), vitreg.trace(vit, embedding=True) as t:
        vit(torch.randn(2, 3, 32, 40))
    assert t.embedding.shape == (2, 20, 32)


class Shuffled(Authors):
    """Patches in columns, one after the other."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.middle = nn.Linear(32, 32)

    def forward(self, images: Tensor) -> Tensor:
        if self.how == "half the size":
            patches = self.patch_embed(images[:, :, ::2]).repeat(1, 1, 2, 1)
        else:
            patches = self.patch_embed(images).transpose(2, 3).reshape(len(images), 32, *self.grid)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches.flatten(2).mT], 1)
        for block in self.blocks:
            x = block(x)
        return x

    @property
    def grid(self) -> tuple[int, int]:
        return 4, 5


@pytest.mark.parametrize("how", ["columns", "half the size"])
def test_a_grid_in_another_order_is_refused(how: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"are not a grid of 4x5 in row-major|shows the grid"):
        vitreg.wrap(randomise(Shuffled(how)).eval())


class Between(Authors):
    """A model that does something to its tokens between two blocks, or attends there."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.second = what, nn.ModuleList([Attention()])

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).mT
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 1:
                x = x * 1.5 if self.what == "scaled" else x + self.second[0](x)
        return x


@pytest.mark.parametrize(
    ("what", "reason"),
    [("scaled", "is not what the next one is given"), ("attends", "attention of its own")],
)
def test_half_a_model_is_refused(what: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        vitreg.wrap(randomise(Between(what)).eval())


def test_a_block_that_fails_says_so() -> None:
    model = Authors().eval()
    model.blocks[1].mlp[0] = nn.Linear(7, 128)
    with pytest.raises(UnsupportedModelError, match=r"block 1 fails on images of shape .*RuntimeError"):
        vitreg.wrap(model)


def test_a_buffer_that_was_never_set_is_no_change_of_tokens() -> None:
    model = Authors().eval()
    model.blocks[1].mlp.register_buffer("never", torch.full((1,), torch.nan))
    model.blocks[1].mlp.register_forward_hook(lambda module, args, output: output + module.never)
    with pytest.raises(NonFiniteError, match="block 1 gives NaN or infinity for a noise image"):
        vitreg.wrap(model)
