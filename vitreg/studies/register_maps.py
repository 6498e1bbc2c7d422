"""What registers learn: where each of them looks, and how alike they are (Darcet et al., figure 9).

    study = what_registers_learn(vit, photos)
    print(study)
    study.figure().savefig("registers.png")

Registers are the model's own, those that were added to it, and those that a fix carries, in this order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from vitreg.data.batches import Batch
from vitreg.data.images import Images
from vitreg.diagnosis.diagnosing import photos_of
from vitreg.errors import ImageError, UnsupportedModelError
from vitreg.fixes.registers import RegisterEdit
from vitreg.hooks.attention import AttentionCall
from vitreg.hooks.block_edit import edits_of
from vitreg.models.backbone import Backbone
from vitreg.models.probe import evaluating
from vitreg.printing import Presented, Step, Summary, called, short_name
from vitreg.tracing.streams import watch

Similarity = list[list[float]]


@dataclass(frozen=True)
class RegisterExample:
    """A photo, and the attention (mean of heads) of each query to its patches: shares of all attention."""

    name: str
    photo: Shaped[np.ndarray, "h w 3"]
    maps: Float[np.ndarray, "q gh gw"]


@dataclass(frozen=True, repr=False)
class RegisterStudy(Presented):
    """Registers of a model in one block (0-based), over `images` photos.

    queries             whose attention was read: CLS, where there is one, and the registers
    attention           mean share of each query's attention on patches; the rest is on CLS and registers
    tokens              what `output_similarity` is of: the queries and the mean patch
    output_similarity   mean cosine similarity of tokens in the residual stream after the block
    map_similarity      mean cosine similarity of the queries' attention maps
    """

    model: str
    images: int
    layer: int
    queries: list[str]
    attention: list[float]
    tokens: list[str]
    output_similarity: Similarity
    map_similarity: Similarity
    examples: list[RegisterExample] = field(repr=False, compare=False)
    planted: bool = False  # whether the model's artifacts were planted

    def to_json(self) -> dict[str, Any]:
        """Everything but the examples."""
        return {name: value for name, value in vars(self).items() if name != "examples"}

    def figure(self) -> Any:
        """Photos with the maps of each query, and both similarities, as a matplotlib Figure."""
        from vitreg.studies.register_figures import registers as draw

        return draw(self)

    def summary(self) -> Summary:
        """How alike the registers' maps are, and how much each looks at patches."""
        registers = [i for i, name in enumerate(self.queries) if name != "CLS"]
        alike = [self.map_similarity[i][j] for i in registers for j in registers if i < j]
        mean = f"maps {sum(alike) / len(alike):.2f} alike (mean cosine)" if alike else "its map was read"
        rows = [(name, f"{share:.1%}") for name, share in zip(self.queries, self.attention, strict=True)]
        return Summary(
            f"{len(registers)} register{'' if len(registers) == 1 else 's'}, {mean}",
            f"{called(short_name(self.model), self.planted)}, block {self.layer}, {self.images:,} photos",
            rows,
            heads=("whose attention", "goes to patches"),
            steps=[Step("see where each of them looks.", python=("study.figure()",))],
        )

    def full(self) -> str:
        """Attention on patches, and the similarity of all tokens and of all maps."""
        on_patches = ", ".join(
            f"{name} {share:.1%}" for name, share in zip(self.queries, self.attention, strict=True)
        )
        return "\n".join(
            [
                f"{called(self.model, self.planted)}, block {self.layer}, {self.images} photos",
                f"attention on patches: {on_patches}",
                "cosine similarity of outputs:",
                *_rows(self.tokens, self.output_similarity),
                "cosine similarity of attention maps:",
                *_rows(self.queries, self.map_similarity),
            ]
        )


def _rows(names: Sequence[str], values: Similarity) -> list[str]:
    width = max(map(len, names))
    rows = [
        [f"{name:<{width}}", *(f"{x:6.2f}" for x in row)] for name, row in zip(names, values, strict=True)
    ]
    return ["  " + " ".join(row) for row in rows]


def what_registers_learn(
    vit: Backbone,
    images: Images | Iterable[Batch] | Iterable[Tensor],
    *,
    layer: int | None = None,
    examples: int = 4,
) -> RegisterStudy:
    """Read registers after block `layer` (0-based; default: the last), and their attention in it.

    The first `examples` images are kept for the figure. Raises UnsupportedModelError for a model that has no
    registers there, ValueError for a layer that it does not have, ImageError without images.
    """
    chosen = _checked(vit, layer)
    read = _Reading(vit, chosen)
    sums: list[Tensor] = []
    kept: list[RegisterExample] = []
    count = 0
    for batch in images:
        pixels, names = (batch.pixels, batch.names) if isinstance(batch, Batch) else (batch, ())
        outputs, maps = read(pixels)
        means = [maps.sum((0, 2, 3)), _cosines(outputs), _cosines(maps.flatten(2))]
        sums = [a + b for a, b in zip(sums, means, strict=True)] if sums else means
        some = slice(0, max(0, examples - len(kept)))
        named = [*names, *(f"image-{count + i}" for i in range(len(names), len(pixels)))]
        photos, shown = photos_of(vit, pixels[some]), maps[some].numpy()
        kept += [RegisterExample(*item) for item in zip(named[some], photos, shown, strict=True)]
        count += len(pixels)
    if not count:
        raise ImageError("there are no images to look at registers on; expected at least one batch.")
    queries = read.queries
    attention, outputs_alike, maps_alike = (total.div(count).tolist() for total in sums)
    return RegisterStudy(
        vit.name,
        count,
        chosen,
        queries,
        attention,
        [*queries, "patches"],
        outputs_alike,
        maps_alike,
        kept,
        planted=vit.planted,
    )


def _checked(vit: Backbone, layer: int | None) -> int:
    depth = vit.anatomy.depth
    if layer is not None and not 0 <= layer < depth:
        raise ValueError(f"found layer {layer}, but the model has layers 0 to {depth - 1}.")
    return depth - 1 if layer is None else layer


def _cosines(x: Float[Tensor, "b k c"]) -> Float[Tensor, "k k"]:
    """Cosine similarity of all pairs, summed over images."""
    unit = torch.nn.functional.normalize(x, dim=-1)
    return (unit @ unit.mT).sum(0)


class _Reading:
    """Reads one block in a forward pass. `queries` are known after one."""

    def __init__(self, vit: Backbone, layer: int) -> None:
        self._vit, self._layer = vit, layer
        self._block = vit.anatomy.block_modules(vit.model)[layer]
        self.queries: list[str] = []

    def __call__(
        self, pixels: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b k d"], Float[Tensor, "b q gh gw"]]:
        """CLS, registers and the mean patch after the block; attention of CLS and registers to patches."""
        found: dict[str, Tensor] = {}

        def attend(layer: int, call: AttentionCall) -> None:
            if layer == self._layer:
                inner = seen.inner
                first = inner.register_slice
                index = torch.tensor([0] * bool(inner.prefix) + [*range(first.start, first.stop)]).long()
                rows = call.rows(index.to(call.q.device)).mean(1)
                found["maps"] = inner.as_grid(rows[:, :, inner.patch_slice])

        def leave(layer: int, residual: Tensor) -> None:
            if layer == self._layer:
                found["outputs"] = self._outputs(residual, seen)

        watching = watch(self._vit, on_block=leave, on_attention=attend)
        with evaluating(self._vit.model), watching as seen:
            self._vit(pixels)
        return found["outputs"].float().cpu(), found["maps"].float().cpu()

    def _outputs(self, residual: Tensor, seen: watch) -> Float[Tensor, "b k d"]:
        layout = seen.layout
        cls = residual[:, :1] if layout.prefix else residual[:, :0]
        registers = [residual[:, layout.register_slice], *self._carried()]
        count = sum(part.shape[1] for part in registers)
        self._check(count, seen.inside(self._layer).registers)
        self.queries = ["CLS"] * bool(layout.prefix) + [f"register {i}" for i in range(count)]
        return torch.cat([cls, *registers, residual[:, layout.patch_slice].mean(1, keepdim=True)], 1)

    def _carried(self) -> list[Tensor]:
        """What this block has just handed on beside the residual stream."""
        edits = [edit for edit in edits_of(self._block) if isinstance(edit, RegisterEdit) and edit.inserted]
        return [latest for edit in edits if (latest := edit.carry.latest) is not None]

    def _check(self, found: int, inside: int) -> None:
        if found != inside:
            raise UnsupportedModelError(
                f"block {self._layer} of {self._vit.name} has {inside} extra tokens, but {found} registers:"
                " a fix carries other tokens there (token splitting). Undo it first."
            )
        if not found:
            raise UnsupportedModelError(
                f"{self._vit.name} has no registers in block {self._layer}. Expected a model with register"
                " tokens of its own, add_registers(model, n), or a fix with registers that is applied to it."
            )
