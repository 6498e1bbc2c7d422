"""What a vision-language model's text attends to in the image, with and without a fix on its vision tower.

    vlm = load("hf:xtuner/llava-llama-3-8b-transformers")
    before = evaluate(vlm, "photos/")
    with fix.applied_to(vlm): after = evaluate(vlm, "photos/")

As in Jiang et al. (section 5.4): outliers of the vision tower are image tokens that the text model attends to
though they show nothing of what is there. Models are of LLaVA's structure: one image token for each patch.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor, nn

from vitreg.data.batches import indices_of
from vitreg.data.evenly_spaced import evenly_spaced
from vitreg.data.images import read_images
from vitreg.data.listing import photos_in
from vitreg.diagnosis.result import Diagnosis
from vitreg.errors import UnsupportedModelError
from vitreg.evals.outlier_masks import outlier_masks, outlier_notes, unfixed_diagnosis
from vitreg.evals.result import Metric, Result, concluded
from vitreg.features.config import Config
from vitreg.hooks.attention import AttentionCall
from vitreg.hooks.attention_mode import intercept
from vitreg.hooks.hooked import hooked
from vitreg.models.backbone import Backbone
from vitreg.models.loading import load_vlm
from vitreg.models.probe import NO_ATTENTION_SEEN, evaluating

MADE_UP = 8  # text tokens of a prompt where there is no tokenizer


@dataclass(frozen=True)
class VlmConfig(Config):
    """`prompt`: what the model is asked about each photo."""

    prompt: str = "Describe this image."


@dataclass(frozen=True, kw_only=True)
class Vlm(Backbone):
    """The vision tower of a vision-language model as a Backbone, which fixes apply to, and the `whole`.

    `processor` is transformers' own, or None for random weights without a tokenizer.
    """

    whole: nn.Module
    processor: Any = None

    @property
    def image_token(self) -> int:
        """The id that stands for an image's token in the text."""
        config: Any = self.whole.config
        found = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        if not isinstance(found, int):
            raise UnsupportedModelError(
                f"{self.name} has no image token in its text: it is not built like LLaVA."
            )
        return found

    @property
    def image_tokens(self) -> int:
        """Tokens that the text model gets of one image: the patches, and the prefix where it is kept."""
        strategy = getattr(self.whole.config, "vision_feature_select_strategy", "default")
        return self.layout.patches + (self.layout.prefix if strategy == "full" else 0)

    def prompt(self, text: str) -> Int[Tensor, " n"]:
        """Token ids of a chat that shows an image and asks `text`; made-up ids without a tokenizer."""
        image = torch.full((self.image_tokens,), self.image_token)
        if self.processor is None:
            others = [i for i in range(MADE_UP + 1) if i != self.image_token][:MADE_UP]
            return torch.cat([image, torch.tensor(others)])
        ids = self._tokenized(text)
        places = (ids == self.image_token).nonzero().flatten().tolist()
        if not places:
            raise UnsupportedModelError(f"the processor of {self.name} put no image into the prompt.")
        return torch.cat([ids[: places[0]], image, ids[places[-1] + 1 :]])

    def _tokenized(self, text: str) -> Int[Tensor, " n"]:
        words = f"{self.processor.image_token}\n{text}"
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            chat = [{"role": "user", "content": content}]
            words = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        blank = Image.new("RGB", (self.image_size[1], self.image_size[0]))
        ids: Tensor = self.processor(text=words, images=blank, return_tensors="pt")["input_ids"]
        return ids[0]

    def answer(self, pixels: Float[Tensor, "b 3 h w"], ids: Int[Tensor, " n"]) -> Any:
        """The whole model's output on images, each with the same prompt."""
        tokens = ids.to(self.device).expand(len(pixels), -1)
        try:
            return self.whole(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                pixel_values=pixels.to(self.device, self.dtype),
                use_cache=False,
            )
        except (TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"{self.name} does not take one image of {tuple(pixels.shape[2:])} pixels as"
                f" {self.image_tokens} tokens, as LLaVA does: {error}"
            ) from error


def load(name: str, **options: Any) -> Vlm:
    """`hf:ID` or a folder in transformers' format, with the options of `vitreg.load`. Raises as it does."""
    tower, whole, processor = load_vlm(name, **options)
    return Vlm(**vars(tower), whole=whole, processor=processor)


def evaluate(vlm: Backbone, data: str | Path, config: VlmConfig | None = None) -> Result:
    """The last prompt token's attention to image tokens, mean over the text model's layers and heads.

    Over a folder of photos: its sum, its entropy over image tokens, and its share on patches that are
    outliers of the tower without a fix (left out where it has none, and said). Raises UnsupportedModelError
    for a model without text, ImageError if no photo can be read.
    """
    config = config or VlmConfig()
    if not isinstance(vlm, Vlm):
        raise UnsupportedModelError(f"{vlm.name} has no text model. Load one with vitreg.evals.vlm.load.")
    paths = photos_in(Path(data))
    paths = [paths[i] for i in evenly_spaced(len(paths), config.limit)]
    report = unfixed_diagnosis(vlm, paths, config)
    outliers = torch.from_numpy(outlier_masks(vlm, report, paths, config))
    ids = vlm.prompt(config.prompt)
    photos = read_images(
        paths,
        vlm,
        batch_size=config.batch_size,
        workers=config.workers,
        progress=config.progress,
        ranks=config.ranks,
    )
    mine = [(indices_of(batch, 0).start, image_attention(vlm, batch.pixels, ids).cpu()) for batch in photos]
    everyones = sorted(itertools.chain(*config.ranks.gather(mine)), key=itemgetter(0))
    seen = torch.cat([rows for _, rows in everyones])
    notes = [f"{len(photos.failed)} photos could not be read."] if photos.failed else []
    notes += _notes(vlm, report, float(outliers.float().mean()))
    return concluded(
        "vlm", vlm, str(data), _metrics(seen, outliers), config, notes=tuple(notes), photos=paths
    )


def image_attention(
    vlm: Vlm, pixels: Float[Tensor, "b 3 h w"], ids: Int[Tensor, " n"]
) -> Float[Tensor, "b p"]:
    """Attention of the last token of `ids` to each patch's image token, mean over text layers and heads."""
    at_image = ids.to(vlm.device) == vlm.image_token
    rows: list[Tensor] = []

    def see(call: AttentionCall) -> None:
        if call.tokens == len(ids):
            rows.append(call.rows(slice(-1, None))[:, :, 0, at_image].mean(1))

    with evaluating(vlm.whole), _in_text(vlm, see):
        vlm.answer(pixels, ids)
    if not rows:
        raise UnsupportedModelError(f"the text model of {vlm.name} {NO_ATTENTION_SEEN}.")
    return torch.stack(rows).mean(0)[:, -vlm.layout.patches :]


@contextmanager
def _in_text(vlm: Vlm, see: Callable[[AttentionCall], None]) -> Iterator[None]:
    """While entered, `see` gets the attention calls that are made outside of the vision tower."""
    inside = False

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal inside
        inside = True

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal inside
        inside = False

    hooks = (vlm.model.register_forward_pre_hook(enter), vlm.model.register_forward_hook(leave))
    with hooked(hooks), intercept(lambda call: None if inside else see(call)):
        yield


def _metrics(seen: Float[Tensor, "b p"], outliers: Bool[Tensor, "b p"]) -> dict[str, Metric]:
    shares = seen / seen.sum(1, keepdim=True)
    metrics = {
        "attention to image tokens": Metric.mean(seen.sum(1), ".2%"),
        "entropy over image tokens, nats": Metric.mean(torch.special.entr(shares).sum(1), ".3f"),
    }
    if outliers.any():
        on = (shares * outliers).sum(1)
        metrics["of it on former outliers"] = Metric.mean(on, ".2%", higher_is_better=False)
    return metrics


def _notes(vlm: Vlm, report: Diagnosis, outliers: float) -> Iterator[str]:
    yield from outlier_notes(report)
    if outliers:
        yield f"They are {outliers:.2%} of the image tokens: even attention would give them as much."
    if vlm.processor is None:
        yield "Random weights without a tokenizer: the prompt's ids are made up."
