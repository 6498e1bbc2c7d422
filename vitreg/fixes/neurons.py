"""Register neurons: the MLP neurons that make the outliers, as a search finds them and as fixes move them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vitreg.diagnosis.outliers import OutlierRule
from vitreg.models.fingerprint import Fingerprint


@dataclass(frozen=True, eq=False)
class RegisterNeuron:
    """One neuron and the evidence.

    Activations are means over tokens, signed; `silent` is a share of tokens. `excess` is the share of the
    outliers' excess (their mean less that of ordinary patches, in the residual stream) that it writes.
    `threshold`, where it was measured, is the activation beyond which (below which, if outliers are negative)
    it marks a token.
    """

    layer: int
    index: int
    score: float = float("nan")
    at_outliers: float = float("nan")
    elsewhere: float = float("nan")
    silent: float = float("nan")
    threshold: float = float("nan")
    excess: float = float("nan")

    def __eq__(self, other: object) -> bool:
        # By their text: evidence that is missing is NaN, which is not equal to itself.
        return isinstance(other, RegisterNeuron) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash((self.layer, self.index))


@dataclass(frozen=True)
class NeuronTensors:
    """The neurons of one layer as tensors (k,): indices, the mean activation of normal tokens, how far from
    it a token's own activation may be before it is an outlier's, and the activation that marks a token."""

    index: Tensor
    normal: Tensor
    reach: Tensor
    threshold: Tensor


@dataclass(frozen=True, repr=False)
class RegisterNeurons:
    """What `find_register_neurons` found: the chosen neurons, the best first, and the evidence.

    `ranking` holds the best candidates, chosen or not; `search` the (count, share of outliers that is left)
    pairs that were tried to find the count; `threshold` is the norm that makes an outlier at `detect_layer`;
    `fingerprint` tells the model.
    """

    chosen: tuple[RegisterNeuron, ...]
    ranking: tuple[RegisterNeuron, ...] = field(default=(), repr=False, compare=False)
    method: str = "given"
    top_layer: int | None = None
    detect_layer: int | None = None
    threshold: float | None = None
    images: int = 0
    search: tuple[tuple[int, float], ...] = ()
    reached: bool = True
    fingerprint: Fingerprint | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def of(neurons: Mapping[int, Sequence[int]]) -> "RegisterNeurons":
        """Neurons known from elsewhere, {layer: indices}; without evidence."""
        return RegisterNeurons(
            tuple(RegisterNeuron(int(layer), int(i)) for layer in sorted(neurons) for i in neurons[layer])
        )

    @cached_property
    def by_layer(self) -> dict[int, list[int]]:
        """{layer: indices}, as a fix edits them."""
        ordered = sorted(self.chosen, key=lambda neuron: neuron.layer)
        return {
            layer: [neuron.index for neuron in group]
            for layer, group in groupby(ordered, key=lambda neuron: neuron.layer)
        }

    @property
    def rule(self) -> OutlierRule:
        """What makes a patch an outlier; one that marks none, for neurons without a search's evidence."""
        if self.detect_layer is None or self.threshold is None:
            return OutlierRule(0)
        return OutlierRule(self.detect_layer, self.threshold)

    @property
    def top_k(self) -> int:
        return len(self.chosen)

    @property
    def in_words(self) -> str:
        """How many there are, and where: "It edits 5 neurons of blocks 4 to 7."; nothing for none."""
        if not self.chosen:
            return ""
        first, last = min(self.by_layer), max(self.by_layer)
        blocks = f"block {first}" if first == last else f"blocks {first} to {last}"
        return f"It edits {self.top_k} neuron{'' if self.top_k == 1 else 's'} of {blocks}."

    def with_more(self, neurons: Sequence[RegisterNeuron]) -> "RegisterNeurons":
        """These and others, from another search."""
        return replace(self, chosen=(*self.chosen, *neurons))

    def best(self, count: int) -> "RegisterNeurons":
        """The same search with another number of neurons chosen."""
        return replace(self, chosen=self.ranking[:count])

    def tensors(self, layer: int) -> NeuronTensors | None:
        """The neurons of one layer, ready to edit with; None if there are none."""
        here = [neuron for neuron in self.chosen if neuron.layer == layer]
        if not here:
            return None
        normal = torch.tensor([neuron.elsewhere for neuron in here])
        reach = torch.tensor([abs(neuron.at_outliers - neuron.elsewhere) / 2 for neuron in here])
        threshold = torch.tensor([neuron.threshold for neuron in here])
        return NeuronTensors(torch.tensor([neuron.index for neuron in here]), normal, reach, threshold)

    def to_json(self) -> dict[str, Any]:
        return {
            "neurons": {str(layer): indices for layer, indices in self.by_layer.items()},
            "scores": [asdict(neuron) for neuron in self.ranking or self.chosen],
            "method": self.method,
            "top_k": self.top_k,
            "onset_layer": self.top_layer,
            "detect_layer": self.detect_layer,
            "threshold": self.threshold,
            "images": self.images,
            "search": [list(pair) for pair in self.search],
            "reached": self.reached,
        }

    def __repr__(self) -> str:
        return f"RegisterNeurons({self.by_layer})"

    def __str__(self) -> str:
        if not self.chosen:
            return "no register neurons"
        layers = [f"block {layer}: {', '.join(map(str, found))}" for layer, found in self.by_layer.items()]
        return "\n".join(layers)
