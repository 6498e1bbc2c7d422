"""The one MLP of a model's blocks, by what a probe saw in block 0."""

from vitreg.models.block_stack import PASS_AN_ANATOMY
from vitreg.models.down_projection import (
    Call,
    Shape,
    is_linear,
    leading_down,
    without_attention,
    without_bottlenecks,
)
from vitreg.models.probe import IMAGES, Probe, evaluating


def find_mlp(probe: Probe) -> str:
    """The path in block 0 of the module that leads from the MLP's neurons back to the width."""
    shapes: set[Shape] = {(IMAGES, probe.tokens, probe.width), (probe.tokens, IMAGES, probe.width)}
    if probe.calls.in_a_row:
        shapes = {probe.row}
    with evaluating(probe.model):
        found = leading_down(probe.called, shapes)
    row = (IMAGES * probe.tokens, probe.width)
    rows = [call for call in probe.called if call.output == row and is_linear(call.module)]
    if not found and rows and not probe.calls.in_a_row:
        raise probe.unsupported(
            f"their MLP works on the tokens of all images in one row ({rows[-1].name!r} gives"
            f" {rows[-1].output}), so that it cannot be told which image an activation belongs to"
        )
    if not found:
        raise probe.unsupported(
            f"block 0 has no MLP: no linear layer leads to its width {probe.width} from another",
            PASS_AN_ANATOMY,
        )
    if not _others_lead_down(probe, found[0]):
        raise probe.unsupported(
            f"attention and MLP share {found[0].name!r}, their only linear layer to the width, so that"
            " its input is not the neurons alone"
        )
    if len(found) > 1:
        found = without_bottlenecks(without_attention(found, probe.called, probe.mixed), probe.width)
    if len(found) != 1:
        names = ", ".join(call.name for call in found)
        raise probe.unsupported(f"block 0 has {len(found)} MLPs ({names}), not one")
    return found[0].name


def _others_lead_down(probe: Probe, call: Call) -> bool:
    """Whether a linear layer outside of a module leads to the width too: attention's output does."""
    return any(
        is_linear(module) and getattr(module, "out_features", None) == probe.width
        for name, module in probe.blocks[0].named_modules()
        if not f"{name}.".startswith(f"{call.name}.")
    )
