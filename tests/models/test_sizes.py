"""The size of images and the grid of patches: from the preprocess and the pass, whatever a config says."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import transformers
from checkpoints import SMALL_HF
from gradients import gradient_photo
from torch import Tensor, nn

import vitreg
from vitreg.archive.run import features_of
from vitreg.errors import ModelWarning, UnsupportedModelError
from vitreg.features.observer import Observer
from vitreg.models.sizes import parse_size, shows_photos, size_of_photos

PATCHES = ((8, 8), (8, 4))
SIZES = ((32, 32), (24, 48), (36, 45), (30, 61))  # square, oblong, and two that patches do not divide


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class AnySize(nn.Module):
    """A ViT for images of any size, which cuts patches as `kind` says, partial ones padded or left out."""

    def __init__(self, kind: str, patch: tuple[int, int], pads: bool, order: str = "rows") -> None:
        super().__init__()
        self.kind, self.patch, self.pads, self.order = kind, patch, pads, order
        high, wide = patch
        if kind == "convolution":
            self.embed: Any = nn.Conv2d(3, 32, patch, patch)
        elif kind == "linear":
            self.embed = nn.Linear(3 * high * wide, 32)
        else:
            self.weight = nn.Parameter(torch.randn(3 * high * wide, 32) / 10)
        self.cls = nn.Parameter(torch.randn(1, 1, 32))
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x

    def patches(self, images: Tensor) -> Tensor:
        (high, wide), (height, width) = self.patch, images.shape[2:]
        if self.pads:
            images = F.pad(images, (0, -width % wide, 0, -height % high))
        if self.kind == "convolution":
            return self.embed(images).flatten(2).transpose(1, 2)
        cells = images.unfold(2, high, high).unfold(3, wide, wide)  # (b, 3, rows, columns, high, wide)
        order = (0, 2, 3, 1, 4, 5) if self.order == "rows" else (0, 3, 2, 1, 4, 5)
        pixels = cells.permute(order).flatten(1, 2).flatten(2)
        return self.embed(pixels) if self.kind == "linear" else pixels @ self.weight


def grid_of(size: tuple[int, int], patch: tuple[int, int], pads: bool) -> tuple[int, int]:
    rows, columns = (-(-a // b) if pads else a // b for a, b in zip(size, patch, strict=True))
    return rows, columns


MODELS = list(itertools.product(("convolution", "linear", "product"), PATCHES, (False, True)))


@pytest.mark.parametrize(("kind", "patch", "pads"), MODELS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_grid_is_that_of_the_pass(kind: str, patch: tuple[int, int], pads: bool, size: tuple[int, int]):
    """Whatever shows it, and on images of every other size, too."""
    vit = vitreg.wrap(AnySize(kind, patch, pads).eval(), image_size=size)
    assert vit.layout.grid == grid_of(size, patch, pads)
    assert vit.anatomy.patch_size == patch
    for other in SIZES:
        images = torch.rand(2, 3, *other)
        true = grid_of(other, patch, pads)
        if vit.layout_for(images).grid != true:  # whole patches do not show that partial ones would be padded
            assert pads
            assert not all(side % p for side, p in zip(size, patch, strict=True))
            with (
                vitreg.trace(vit),
                pytest.raises(UnsupportedModelError, match=r"images have|tokens after block"),
            ):
                vit(images)
            continue
        with vitreg.trace(vit) as t:
            vit(images)
        assert t.layout == vit.layout_for(images)
        assert t.norms.shape[-1] == 1 + true[0] * true[1]


def test_patches_in_columns_are_refused_instead_of_read_as_rows():
    with pytest.raises(
        UnsupportedModelError, match="first row of pixels changes 6 of them and the first column 3,"
    ):
        vitreg.wrap(AnySize("product", (8, 8), False, "columns").eval(), image_size=(24, 48))


class Stem(AnySize):
    """Three convolutions of stride 2: the grid is seen, how partial patches are treated is not."""

    def __init__(self) -> None:
        super().__init__("convolution", (8, 8), False)
        layers = [nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 8), (8, 16), (16, 32))]
        self.embed = nn.Sequential(*layers)


def test_a_stem_is_read_at_whole_sizes_and_refused_at_others():
    vit = vitreg.wrap(Stem().eval(), image_size=(32, 48))
    with vitreg.trace(vit) as t:
        vit(torch.rand(1, 3, 16, 40))
    assert t.layout.grid == (2, 5)
    with (
        vitreg.trace(vit),
        pytest.raises(UnsupportedModelError, match=r"images have 5x6 patches, .* makes 4x5"),
    ):
        vit(torch.rand(1, 3, 36, 44))
    with pytest.raises(UnsupportedModelError, match=r"Use a size that the grid divides, such as 35x42"):
        vitreg.wrap(vit.model, image_size=(36, 44))


def test_one_block_is_a_stack():
    model = AnySize("convolution", (8, 8), False)
    model.blocks = nn.ModuleList([Block()])
    assert vitreg.wrap(model.eval(), image_size=32).anatomy.depth == 1


def test_siglip_at_its_own_size_of_partial_patches():
    import timm

    small = {"embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    vit = vitreg.wrap(timm.create_model("vit_so400m_patch14_siglip_384", **small).eval())
    assert (vit.image_size, vit.layout.grid, vit.anatomy.patch_size) == ((384, 384), (27, 27), (14, 14))


@pytest.mark.parametrize("pads", [False, True])
def test_shifted_views_are_those_of_what_the_patches_cover(pads: bool):
    """As if the rest had been cut off, or the zeros been there, before."""
    # In a module of its own, as in timm, where the images enter it as they are.
    vit = vitreg.wrap(nn.Sequential(AnySize("convolution", (8, 8), pads)).eval(), image_size=(36, 45))
    images = torch.rand(2, 3, 36, 45)
    whole = F.pad(images, (0, 3, 0, 4)) if pads else images[:, :, :32, :40]
    plain = vit(images)
    with vitreg.ShiftAverage(views=4).applied_to(vit):
        torch.testing.assert_close(vit(images), vit(whole))
        assert not torch.allclose(vit(images), plain)


def test_a_diagnosis_states_the_size_of_the_images():
    vit = vitreg.wrap(AnySize("convolution", (8, 8), False).eval(), image_size=(36, 45))
    found = vitreg.diagnose(vit, [torch.rand(2, 3, 36, 45)])
    assert (found.image_size, found.grid) == ((36, 45), (4, 5))


# -- config, processor and what is asked for ------------------------------------------------------------

SMALL: dict[str, Any] = SMALL_HF | {"image_size": 32, "patch_size": 8}
FAMILIES = {
    "dinov2": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(**{k: v for k, v in SMALL.items() if k != "intermediate_size"}, mlp_ratio=2)
    ),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL)),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL)),
    "dinov3": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**SMALL, num_register_tokens=2)
    ),
}
GIVEN = (
    (32, 32),
    (24, 24),
    (16, 40),
    (28, 43),
)  # by the processor: the config's, less, oblong, partial patches


def processor(size: tuple[int, int]) -> Any:
    exact = {"height": size[0], "width": size[1]}
    if size[0] != size[1]:
        return transformers.ViTImageProcessor(size=exact)
    return transformers.BitImageProcessor(size={"shortest_edge": size[0] + 4}, crop_size=exact)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_the_preprocess_wins_over_the_config(tmp_path: Path, family: str, given: tuple[int, int]):
    FAMILIES[family]().save_pretrained(tmp_path)
    processor(given).save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ModelWarning)
        vit = vitreg.load(str(tmp_path))
    said = [str(w.message) for w in seen if w.category is ModelWarning]
    words = f"says 32x32 pixels, and its preprocessing gives {given[0]}x{given[1]}, which is used"
    assert [words in line for line in said] == ([] if given == (32, 32) else [True])
    grid = (given[0] // 8, given[1] // 8)
    assert (vit.image_size, vit.layout.grid) == (given, grid)
    photos = vitreg.read_images([gradient_photo()], vit)
    assert vitreg.diagnose(vit, photos).grid == grid
    rows = Observer(vit, ["patches"])(next(iter(photos)).pixels)
    assert rows["patches"].shape[1] == grid[0] * grid[1]
    assert features_of(vit, ["patches"])["patches"] == (*grid, 32)


@pytest.mark.parametrize("asked", [24, (16, 40)], ids=str)
@pytest.mark.parametrize("family", ["dinov2", "clip"])
def test_what_is_asked_for_wins_over_both(tmp_path: Path, family: str, asked: Any):
    FAMILIES[family]().save_pretrained(tmp_path)
    processor((32, 32)).save_pretrained(tmp_path)
    vit = vitreg.load(str(tmp_path), size=asked)
    expected = (asked, asked) if isinstance(asked, int) else asked
    assert vit.image_size == expected
    for photo in (PIL.Image.new("RGB", (90, 60), "white"), PIL.Image.new("RGB", (60, 90), "white")):
        pixels = vit.preprocess(photo)
        assert pixels.shape == (3, *expected)
        assert pixels.flatten(1).std(1).max() < 1e-4  # no border of zeros around a narrow photo


def to_tensor(image: PIL.Image.Image) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255


PREPROCESSES = {
    "fixed": (lambda image: to_tensor(image.resize((40, 24))), (24, 40)),
    "mirrored": (lambda image: to_tensor(image.resize((40, 24))).flip(2), (24, 40)),
    "random": (lambda image: to_tensor(image.resize((40, 24))) * torch.rand(1), (24, 40)),
    "keeps the ratio": (lambda image: to_tensor(image.resize((image.width // 4, image.height // 4))), None),
    "several": (lambda image: to_tensor(image.resize((32, 32))).expand(2, -1, -1, -1), None),
    "raises": (lambda image: to_tensor(image)[5], None),
    "grey": (lambda image: to_tensor(image)[:1], None),
}  # fmt: skip


@pytest.mark.parametrize(("preprocess", "size"), PREPROCESSES.values(), ids=PREPROCESSES)
def test_what_a_preprocess_gives(preprocess: Any, size: Any):
    before = torch.get_rng_state()
    assert size_of_photos(preprocess) == size
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mirrored", [False, True])
def test_pictures_and_patches_in_a_row(mirrored: bool):
    def in_a_row(image: PIL.Image.Image) -> Tensor:
        cells = to_tensor(image.resize((64, 64))).unfold(1, 8, 8).unfold(2, 8, 8)  # (3, 8, 8, high, wide)
        return cells.permute(0, 3, 1, 2, 4).flatten(2)

    def picture(image: PIL.Image.Image) -> Tensor:
        pixels = to_tensor(image.resize((40, 24)))
        return pixels.flip(2) if mirrored else pixels

    assert shows_photos(picture)
    assert size_of_photos(in_a_row) == (8, 512)
    assert not shows_photos(in_a_row)


def test_a_preprocess_of_another_size_than_asked_for_wins_and_is_named():
    model = AnySize("convolution", (8, 8), False).eval()
    fixed = PREPROCESSES["fixed"][0]
    assert vitreg.wrap(model, fixed).image_size == (24, 40)
    with pytest.warns(ModelWarning, match=r"asked for is 32x32 pixels, and its preprocessing gives 24x40"):
        assert vitreg.wrap(model, fixed, image_size=32).image_size == (24, 40)


@pytest.mark.parametrize(("text", "size"), [("224", (224, 224)), ("16x48", (16, 48)), (" 7x9 ", (7, 9))])
def test_sizes_in_words(text: str, size: tuple[int, int]):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "16x0", "x16", "16x", "1.5", "-4", "16x16x16", "big"])
def test_words_that_are_no_size(text: str):
    with pytest.raises(ValueError, match="expected pixels, as 224 or 224x336"):
        parse_size(text)
