"""One process of several that hold a model's weights together; it writes down what the tests ask.

python sharding.py RANK SIZE STORE RESULTS
"""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from wrapped import FIXES, images, model, wrap

import vitreg
from vitreg.hooks.weights import is_sharded
from vitreg.models.fingerprint import weights_hash


def sharded(vit: nn.Module) -> nn.Module:
    for block in vit.blocks:
        fully_shard(block)
    fully_shard(vit)
    return vit


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def of_a_fix(make: Callable[[], vitreg.Fix]) -> dict[str, float | str]:
    """Distances to the local model, with the fix and after it, in both orders, or why it is refused."""
    answers: dict[str, float | str] = {}
    with torch.no_grad():
        local, fix = model(), make()
        plain = local(images())
        with fix.applied_to(wrap(local)):
            expected = local(images())
        answers["moved"] = distance(plain, expected)
        before, after = model(), sharded(model())
        handle = fix.apply(wrap(before))
        before = sharded(before)
        answers["fix first"] = or_why(lambda: distance(before(images()), expected))
        handle.undo()
        answers["fix first, undone"] = distance(before(images()), plain)
        for order, vit in (("fix last", after), ("again", before)):
            answers[order] = or_why(lambda vit=vit: fixed(vit, fix, expected))
            answers[f"{order}, undone"] = distance(vit(images()), plain)
    return answers


def fixed(vit: nn.Module, fix: vitreg.Fix, expected: Tensor) -> float:
    with fix.applied_to(wrap(vit)):
        return distance(vit(images()), expected)


def or_why(answer: Callable[[], float]) -> float | str:
    try:
        return answer()
    except vitreg.UnsupportedModelError as refusal:
        return str(refusal)


def of_training() -> float:
    """Gradients through a fix, of this process's shard, beside those of the local model."""
    fix = FIXES["registers"]()
    gradients = []
    for vit in (model(), sharded(model())):
        with fix.applied_to(wrap(vit)):
            vit(images()).square().mean().backward()
        gradient: Any = vit.blocks[0].mlp.fc1.weight.grad
        gradients.append(gradient.full_tensor() if is_sharded(gradient) else gradient)
    return distance(gradients[1], gradients[0])


def of_what_is_read() -> dict[str, bool]:
    """Whether the sharded model says the same as the local one."""
    photos = images(32)
    phantom = vitreg.plant(wrap(model()), photos, layer=1, rate=0.05)
    local, shards = phantom.vit, wrap(sharded(copy.deepcopy(phantom.vit.model)))
    one, other = (vitreg.diagnose(vit, [photos]) for vit in (local, shards))
    neurons = [vitreg.find_register_neurons(vit, [photos], one) for vit in (local, shards)]
    fix = vitreg.TestTimeRegisters(neurons[0])
    return {
        "hash": weights_hash(shards) == weights_hash(local),
        "artifacts": one.verdict == other.verdict == "artifacts",
        "norms": all(
            abs(a.max_norm - b.max_norm) < 1e-4 * a.max_norm
            for a, b in zip(one.layers, other.layers, strict=True)
        ),
        "neurons": neurons[0] == neurons[1] and set(neurons[0].by_layer[1]) == set(phantom.neurons),
        "verified": vitreg.verify(local, fix, [photos]).verdict
        == vitreg.verify(shards, fix, [photos]).verdict,
        "doctor": "sharded by FSDP" in vitreg.doctor(shards).full(),
    }


def main(rank: int, size: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    answers: dict[str, Any] = {name: of_a_fix(make) for name, make in FIXES.items()}
    answers["training"] = of_training()
    answers["read"] = of_what_is_read()
    Path(results).write_text(json.dumps(answers))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
