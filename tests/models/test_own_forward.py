"""Models that are run by a function of their own: copies run by the same one, or a refusal that says how."""

import copy

import pytest
import torch
from authors_models import Authors
from catalog import randomise
from torch import Tensor, nn

import vitreg


class Named(Authors):
    """Its `forward` wants more than images."""

    def forward(self, images: Tensor, wanted: str) -> Tensor:
        return super().forward(images)

    def features(self, images: Tensor) -> Tensor:
        return super().forward(images)


class Larger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = Named()

    def encode(self, images: Tensor) -> Tensor:
        return self.vision.features(images)


def model() -> Named:
    torch.manual_seed(0)
    return randomise(Named()).eval()


WAYS = {
    "a method": lambda vit: vit.features,
    "a function of both": lambda vit: lambda module, images: module(images, "features"),
}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_runs_itself(way: str) -> None:
    vit = model()
    backbone = vitreg.wrap(vit, forward=WAYS[way](vit), image_size=(32, 40))
    batch = torch.randn(2, 3, 32, 40)
    assert torch.equal(backbone(batch), vit.features(batch))
    other = copy.deepcopy(vit)
    other.head.weight.zero_()
    other.head.bias.fill_(7)
    assert (backbone.with_model(other, "other")(batch) == 7).all()
    assert torch.equal(backbone(batch), vit.features(batch))


def test_a_method_of_a_part_goes_along() -> None:
    larger = Larger().eval()
    backbone = vitreg.wrap(larger, forward=larger.vision.features, image_size=(32, 40))
    other = copy.deepcopy(larger)
    batch = torch.randn(2, 3, 32, 40)
    twin = backbone.with_model(other, "other")
    assert torch.equal(twin(batch), backbone(batch))
    randomise(other)
    assert not torch.equal(twin(batch), backbone(batch))


def test_a_function_of_images_alone_runs_no_copy() -> None:
    vit = model()
    backbone = vitreg.wrap(vit, forward=lambda images: vit(images, "x"), image_size=(32, 40))
    with pytest.raises(vitreg.UnsupportedModelError, match=r"forward=lambda model, images"):
        backbone.with_model(copy.deepcopy(vit), "other")


def test_a_model_with_its_own_forward_can_be_planted() -> None:
    vit = model()
    backbone = vitreg.wrap(vit, forward=vit.features, image_size=(32, 40))
    photos = torch.rand(16, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    phantom = vitreg.plant(backbone, photos, 1)
    assert vitreg.diagnose(phantom.vit, [photos], examples=0).onset_layer == 1
