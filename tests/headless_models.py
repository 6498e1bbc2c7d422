"""A model whose head raises for images alone."""

import copy

from catalog import CATALOG
from torch import Tensor, nn

import vitreg


class Raises(nn.Module):
    """A head of a timm model that does its norm, and then wants what nobody gave."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


def raising(error: Exception) -> vitreg.Backbone:
    vit = CATALOG["timm vit"].backbone()
    model = copy.deepcopy(vit.model)
    model.head = Raises(error)
    return vitreg.wrap(model, vit.preprocess, image_size=vit.image_size)
