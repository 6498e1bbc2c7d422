"""The table of positions that a model adds to its patches, found by structure.

    table, reads = position_table(vit, images, [0, 27])
    table.reshape(-1, vit.anatomy.width)[reads.argmax(1)]    # the rows of patches 0 and 27

No name is asked for. The table is the parameter outside of the blocks that moves the patches that enter block
0 alike in every image, and of which patches far apart read other rows.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitreg.errors import UnsupportedModelError
from vitreg.models import Backbone
from vitreg.neurons import Enough, run_until
from vitreg.probe import evaluating
from vitreg.removal import entering

# Two patches that share this much of what they read (cosine) are not told apart by their position.
SHARED = 0.5


def position_table(
    vit: Backbone, images: Float[Tensor, "b 3 h w"], patches: list[int]
) -> tuple[nn.Parameter, Float[Tensor, "k r"]]:
    """The table (its last axis is the width), and how much of each of its r rows each of k patches reads.

    `images` are two or more of any content; `patches` are row-major numbers in the grid. A table that the
    model resamples to the grid is read in several rows. Raises UnsupportedModelError where there is none, or
    a norm lies between its addition and block 0.
    """
    ends = [0, vit.layout_for(images).patches - 1]
    tables = _possible(vit)
    frozen = [table for table in tables if not table.requires_grad]
    for table in frozen:
        table.requires_grad_(True)
    try:
        with evaluating(vit.model), torch.enable_grad():
            stream = _entering_patches(vit, images)
            for table in tables:
                reads = [_read(stream, patch, table) for patch in (*ends, *patches)]
                added = [read for read in reads if read is not None]
                if (
                    len(added) == len(reads)
                    and float(F.cosine_similarity(added[0], added[1], dim=0)) < SHARED
                ):
                    return table, torch.stack(added[2:])
    finally:
        for table in frozen:
            table.requires_grad_(False)
    raise UnsupportedModelError(
        f"{vit.name} has no table of positions that is added to its patches and enters block 0 as it is:"
        " positions are rotary, relative or computed, or a norm follows."
    )


def _possible(vit: Backbone) -> list[nn.Parameter]:
    stack = vit.model.get_submodule(vit.anatomy.blocks)
    inside = {id(parameter) for parameter in stack.parameters()}
    outside = [parameter for parameter in vit.model.parameters() if id(parameter) not in inside]
    return [
        parameter for parameter in outside if parameter.dim() > 1 and parameter.shape[-1] == vit.anatomy.width
    ]


def _entering_patches(vit: Backbone, images: Tensor) -> Float[Tensor, "b p d"]:
    seen: list[Tensor] = []

    def enter(stream: Tensor) -> None:
        seen.append(stream[:, vit.layout_for(images).patch_slice])
        raise Enough

    with entering(vit, enter):
        run_until(vit, images)
    return seen[0]


def _read(stream: Float[Tensor, "b p d"], patch: int, table: nn.Parameter) -> Float[Tensor, " r"] | None:
    """How much of each row of the table a patch reads; None if it is not simply added.

    For a probe v, the gradient of v @ patch with respect to a row that it reads f times is f v, in any image.
    """
    probe = torch.randn(table.shape[-1], generator=torch.Generator().manual_seed(0)).to(stream)
    gradients = [
        torch.autograd.grad(image[patch] @ probe, table, retain_graph=True, allow_unused=True)[0]
        for image in stream[:2]
    ]
    one, other = gradients
    if one is None or other is None or not one.any() or not torch.allclose(one, other, atol=1e-4):
        return None
    return one.reshape(-1, table.shape[-1]).float().norm(dim=1) / probe.float().norm()
