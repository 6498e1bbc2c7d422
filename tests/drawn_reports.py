"""Small diagnoses to draw: a tiny random ViT, with or without artifacts planted at chosen patches."""

from dataclasses import replace
from functools import cache

import timm
import torch
from torch import nn

import vitreg
from vitreg.diagnosis.result import Diagnosis
from vitreg.intervals import Estimate
from vitreg.verification.verdict import Control, Measure, Verdict

DEPTH, ONSET = 4, 2
PLANTED = (0, 7)  # grid cells, row-major


class _Massive(nn.Module):
    """Adds a huge vector to some patch tokens, as a register neuron would."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        for cell in PLANTED:
            x[:, self.prefix + cell, 3] += 500
        return x


@cache
def make_report(
    artifacts: bool = True, *, name: str = "tiny", examples: int = 3, wide: bool = False, depth: int = DEPTH
) -> Diagnosis:
    size = (32, 64) if wide else (32, 32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.models.VisionTransformer(
            img_size=size, patch_size=8, embed_dim=32, depth=depth, num_heads=2, num_classes=0, reg_tokens=1
        ).eval()
        if artifacts:
            model.blocks[ONSET].drop_path2 = _Massive(model.num_prefix_tokens)
        vit = vitreg.wrap(model, image_size=size, name=name)
        return vitreg.diagnose(vit, [torch.randn(5, 3, *size)], examples=examples)


def make_verdict(name: str = "tiny", examples: int = 3, planted: bool = False) -> Verdict:
    """Of the model with planted artifacts and the same one without, with a control; all numbers made up."""
    less, equal = Estimate(-0.12, -0.13, -0.11), Estimate(0.98, 0.96, 1.0)
    outliers = Measure("outliers", Estimate(0.125, 0.12, 0.13), Estimate(0.005, 0.0, 0.01), less)
    same = Measure("cls", None, equal, None)
    measures = {"outliers": Estimate(0.125, 0.12, 0.13), "cls": equal}
    before, after = (make_report(artifacts, examples=examples) for artifacts in (True, False))
    return Verdict(
        "helps",
        "it removes the artifacts.",
        name,
        vitreg.TestTimeRegisters({ONSET: [3]}),
        replace(before, model=name, planted=planted),
        replace(after, model=name, planted=planted),
        (outliers, same),
        tuple(Control(version, measures, less) for version in ("unfixed", "fix", "inert token")),
        images=5,
        control_images=5,
    )
