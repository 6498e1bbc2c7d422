"""The network of self-supervision, of which there are two, student and teacher: a timm ViT with two heads."""

import warnings
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitreg.errors import MissingExtraError

try:
    from lightly.models.modules.heads import DINOProjectionHead
except ImportError as error:
    raise MissingExtraError("lightly", "train") from error


class Network(nn.Module):
    """A ViT, the token that stands for a masked patch, and the heads for CLS and for patches."""

    def __init__(self, vit: Any, **sizes: Any) -> None:
        """`vit`: timm's, for images of any size (dynamic_img_size). `sizes`: those of lightly's heads."""
        super().__init__()
        self.vit = vit
        self.mask_token = nn.Parameter(torch.zeros(vit.embed_dim))
        self.cls_head, self.patch_head = _head(vit.embed_dim, sizes), _head(vit.embed_dim, sizes)

    def forward(
        self, photos: Float[Tensor, "b 3 h w"], mask: Bool[Tensor, "b i j"] | None = None
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]:
        """CLS and patch tokens after the final norm; masked patches enter as the mask token."""

        def masked(module: nn.Module, args: Any, patches: Float[Tensor, "b i j d"]) -> Tensor:
            assert mask is not None
            return torch.where(mask[..., None], self.mask_token.to(patches), patches)

        hook = self.vit.patch_embed.register_forward_hook(masked) if mask is not None else None
        try:
            tokens = self.vit.forward_features(photos)
        finally:
            if hook is not None:
                hook.remove()
        return tokens[:, 0], tokens[:, self.vit.num_prefix_tokens :]


def _head(width: int, sizes: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's about the weight norm that lightly uses
        return DINOProjectionHead(width, **sizes)
