"""What a fix must be compared with before it may be said to help.

Two placebos, which should do nothing: an inert extra token, and the same number of other neurons (of a fix
without neurons: one of its own kind that does as much where nothing is wrong). Two
ablations, which remove the artifacts without a place for what they hold: the neurons at zero, and at the
mean of ordinary patches (fairer: arXiv 2604.14433).
"""

import math
from dataclasses import dataclass, replace

import torch

from vitreg.fixes.base import Fix
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.fixes.registers import TestTimeRegisters
from vitreg.models.anatomy import Anatomy
from vitreg.models.backbone import Backbone

PLACEBOS = ("inert token", "random neurons", "placebo")
ABLATIONS = ("zeroed", "mean-ablated")


@dataclass(frozen=True)
class Controls:
    """The controls of a fix by name, and why some are left out."""

    fixes: dict[str, Fix]
    left_out: tuple[str, ...]


def controls_of(fix: Fix, vit: Backbone, seed: int = 0) -> Controls:
    """The controls for any fix: variations of it if its type is registers, else of the plainest of these."""
    own = isinstance(fix, TestTimeRegisters)
    room = not vit.anatomy.no_registers
    plain = fix if isinstance(fix, TestTimeRegisters) else TestTimeRegisters(fix.neurons, int(room))
    inert: dict[str, Fix] = {}
    if room:
        registers = max(getattr(fix, "registers", 1), 1)
        inert["inert token"] = replace(plain, neurons=RegisterNeurons(()), registers=registers)
    no_room = () if room else ("inert token: the model's blocks have no room for one",)
    if not fix.neurons.chosen:
        placebo = fix.placebo(vit, seed)
        own_kind: dict[str, Fix] = {} if placebo is None else {"placebo": placebo}
        return Controls(inert | own_kind, (*no_room, "neuron controls: the fix edits no neurons"))
    others = random_neurons(fix.neurons, vit.anatomy, seed)
    left_out = [*no_room]
    # What "mean" and "own" leave behind is known of the neurons that were searched for, not of others.
    drawn = replace(plain, neurons=others, left="zero")
    if own and plain.left != "zero":
        left_out.append(
            f"random neurons leave zero behind: what {plain.left!r} would be is known of the fix's own"
        )
    fixes: dict[str, Fix] = inert | {"random neurons": drawn}
    fixes["zeroed"] = TestTimeRegisters(fix.neurons, registers=0)
    if all(math.isfinite(neuron.elsewhere) for neuron in fix.neurons.chosen):
        fixes["mean-ablated"] = TestTimeRegisters(fix.neurons, registers=0, left="mean")
    else:
        left_out.append("mean-ablated: the neurons were given without evidence, so their means are unknown")
    return Controls(fixes, tuple(left_out))


def random_neurons(neurons: RegisterNeurons, anatomy: Anatomy, seed: int = 0) -> RegisterNeurons:
    """As many neurons per layer, none of them the same (fewer where a layer has not so many others)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for layer, own in neurons.by_layer.items():
        order = torch.randperm(anatomy.neurons, generator=generator).tolist()
        drawn[layer] = [index for index in order if index not in set(own)][: len(own)]
    return RegisterNeurons.of(drawn)
