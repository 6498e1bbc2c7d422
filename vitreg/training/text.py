"""The text-supervised regime, as in OpenCLIP: a ViT and a text tower that tell which caption is whose.

    recipe = TextSupervised(about=..., expected=..., cost=..., data="pairs/", val="imagenette/val")

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021, trained as
open_clip does (Cherti et al., Reproducible Scaling Laws for Contrastive Language-Image Learning, 2023).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import Compose, RandomHorizontalFlip

from vitreg.data.datasets.classes import Labelled, by_folder
from vitreg.data.images import read_images
from vitreg.data.listing import printable, warn_of
from vitreg.errors import DataError, MissingExtraError
from vitreg.fixes.added_registers import add_registers
from vitreg.models.loading import load
from vitreg.models.probe import evaluating
from vitreg.training.data import watched
from vitreg.training.objective import Objective
from vitreg.training.pairs import ImageTextShards, class_name
from vitreg.training.recipe import Recipe

try:
    import open_clip
    from open_clip.loss import ClipLoss
    from open_clip.transformer import TextTransformer
except ImportError as error:
    raise MissingExtraError("open_clip", "train") from error

_LARGEST_SCALE = math.log(100)
_FIRST_SCALE = math.log(1 / 0.07)


@dataclass(frozen=True)
class TextSupervised(Recipe):
    """Contrastive training on the image-text shards of `data` (see pairs.py).

    val              labelled photos to measure on, a folder for each class; "": none
    prompts          the texts around a class's name when measuring; their embeddings are averaged
    embed            width of the space in which photos and texts are compared
    text_*           the text tower; context is its longest text, in tokens
    crop_scale       the smallest share of the photo that a random resized crop keeps
    flip             the share of photos that are mirrored
    chunk            pairs whose activations are kept at a time, the rest being computed twice, as open_clip's
                     accum-freq does: the loss compares all pairs of a batch, so that it cannot be cut into
                     micro-batches. None: all
    """

    needs: ClassVar[str] = "webdataset shards of photos with captions"
    val: str = ""
    prompts: tuple[str, ...] = ("a photo of a {}.",)
    embed: int = 512
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    text_context: int = 77
    crop_scale: float = 0.9
    flip: float = 0.0
    chunk: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch is not None:
            raise DataError(
                f"micro_batch={self.micro_batch}: the loss of text supervision compares all pairs of a batch,"
                f" so it cannot be cut. Leave micro_batch out; chunk={self.micro_batch} saves the memory."
            )
        if self.chunk is not None and self.chunk < 1:
            raise DataError(f"chunk={self.chunk}: expected 1 or more.")
        if self.text_width % self.text_heads:
            raise DataError(
                f"text_width={self.text_width} is not a multiple of text_heads={self.text_heads}."
            )

    def objective(self) -> "TextObjective":
        return TextObjective(self)


class TextObjective(Objective):
    """Two towers, a projection of each into one space, and the scale of their cosines, which is learnt."""

    def __init__(self, recipe: TextSupervised) -> None:
        super().__init__()
        self.recipe = recipe
        self.vit = self._model()
        self.project = nn.Linear(int(self.vit.num_features), recipe.embed, bias=False)  # type: ignore[arg-type]
        nn.init.normal_(self.project.weight, std=self.project.in_features**-0.5)
        self.text = TextTransformer(
            context_length=recipe.text_context,
            width=recipe.text_width,
            heads=recipe.text_heads,
            layers=recipe.text_layers,
            output_dim=recipe.embed,
        )
        self.logit_scale = nn.Parameter(torch.tensor(_FIRST_SCALE))
        self.tokenize = open_clip.SimpleTokenizer(context_length=recipe.text_context)  # comes with open_clip
        train, self.preprocess = self._transforms()
        self.dataset = ImageTextShards(recipe.data, train, self._tokens)
        self.labelled = _labelled(recipe.val) if recipe.val else None
        self.photos = watched(self.labelled.paths, self.preprocess) if self.labelled else []

    def _model(self) -> nn.Module:
        recipe = self.recipe
        if recipe.pretrained is None:
            return recipe.build()
        model: Any = load(recipe.pretrained, size=recipe.image_size).model
        model.reset_classifier(0)
        if recipe.registers:
            add_registers(model, recipe.registers)
        return model

    def _transforms(self) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
        """open_clip's for training, with a flip before it, and for evaluation."""
        recipe, config = self.recipe, resolve_model_data_config(self.vit)
        normal = {"mean": config["mean"], "std": config["std"]}
        augment = open_clip.AugmentationCfg(scale=(recipe.crop_scale, 1.0))
        train = open_clip.image_transform(recipe.image_size, is_train=True, aug_cfg=augment, **normal)
        still = open_clip.image_transform(recipe.image_size, is_train=False, **normal)
        return Compose([RandomHorizontalFlip(recipe.flip), train]), still

    def _tokens(self, caption: str) -> Int[Tensor, " n"]:
        tokens: Tensor = self.tokenize(caption)[0]
        return tokens

    # The names and arguments are those that open_clip's zero-shot classifier calls.

    def encode_image(self, image: Float[Tensor, "b 3 h w"], normalize: bool = False) -> Float[Tensor, "b c"]:
        """(b, embed)"""
        features = self.project(self.vit(image))
        return F.normalize(features.float(), dim=-1) if normalize else features

    def encode_text(self, text: Int[Tensor, "b n"], normalize: bool = False) -> Float[Tensor, "b c"]:
        """(b, embed)"""
        features = self.text(text)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """The symmetric cross-entropy of Radford et al. over the pairs of all processes.

        The loss is the mean over this process's pairs; that of all processes' losses is the one of the whole
        batch, and so are gradients. Also logged: the scale, and the share of replaced pairs in per cent.
        """
        pixels, tokens, replaced = batch
        image = self._in_chunks(self.encode_image, pixels)
        text = self._in_chunks(self.encode_text, tokens)
        scale = self.logit_scale.exp()
        with torch.autocast(image.device.type, enabled=False):  # half precision would blur cosines times 100
            loss = _clip_loss()(image, text, scale)
        return {"loss": loss, "scale": scale, "replaced": 100 * replaced.float().mean()}

    def _in_chunks(self, encode: Callable[..., Tensor], inputs: Tensor) -> Tensor:
        """Unit vectors (b, embed), float32 in any precision."""
        if self.recipe.chunk is None:
            return encode(inputs, normalize=True)
        parts = inputs.split(self.recipe.chunk)
        return torch.cat([checkpoint(encode, part, True, use_reentrant=False) for part in parts])

    def after_step(self, step: int, steps: int) -> None:
        """Keep the scale between 1 and 100, as CLIP does."""
        with torch.no_grad():
            self.logit_scale.clamp_(0, _LARGEST_SCALE)

    def evaluate(self) -> dict[str, float]:
        """Zero-shot top-1 on `val` in per cent: the class whose prompts are nearest, among val's classes."""
        if self.labelled is None:
            return {}
        names = [class_name(name) for name in self.labelled.classes]
        device = self.logit_scale.device
        label = dict(zip(map(printable, map(str, self.labelled.paths)), self.labelled.labels, strict=True))
        right = total = 0
        with evaluating(self):
            texts = open_clip.build_zero_shot_classifier(
                self, self.tokenize, names, self.recipe.prompts, device=device
            )
            for batch in read_images(self.labelled.paths, self.preprocess, batch_size=64):
                best = (self.encode_image(batch.pixels.to(device)) @ texts).argmax(1).tolist()
                right += sum(found == label[name] for found, name in zip(best, batch.names, strict=True))
                total += len(best)
        return {"top1": 100 * right / total}


def _clip_loss() -> nn.Module:
    """open_clip's loss: each process compares its own pairs with those of all, and gradients cross over."""
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    rank, processes = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    loss: nn.Module = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=processes)
    return loss


def _labelled(folder: str) -> Labelled:
    """The photos of a folder with a folder for each class. Raises DataError where there are none."""
    labelled = by_folder(folder)
    warn_of(labelled.notes)
    return labelled
