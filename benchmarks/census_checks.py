"""The census: checks of an accepted model that do not use vitreg's own findings."""

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import vitreg
from vitreg.models.probe import first_tensor


class DisagreementError(Exception):
    """A check that does not agree with vitreg."""


def agree(what: str, vitreg_says: Any, model_says: Any) -> None:
    if vitreg_says != model_says:
        raise DisagreementError(f"{what}: vitreg says {vitreg_says}, the model {model_says}")


def close(what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    agree(f"{what} shape", tuple(ours.shape), tuple(theirs.shape))
    difference = float((ours.float() - theirs.float()).abs().max())
    if not difference <= tolerance:
        raise DisagreementError(f"{what} differ by up to {difference:.2g}")


def checks(vit: vitreg.Backbone) -> list[str]:
    """Make every check that this model allows; the names of those made. An error for the first that fails."""
    with torch.no_grad():
        done = check_declared(vit)
        images = torch.rand(2, 3, *vit.image_size) * 2 - 1
        done += check_trace(vit, images)
        done += check_position(vit, images)
    return done


def check_declared(vit: vitreg.Backbone) -> list[str]:
    """Against what the model's own attributes say, where it has them."""
    model, layout, anatomy = vit.model, vit.layout, vit.anatomy
    config = getattr(model, "config", None)
    patch_embed = getattr(model, "patch_embed", None)
    claims = {
        "prefix": (layout.prefix + layout.registers, getattr(model, "num_prefix_tokens", None)),
        "registers": (layout.registers, getattr(model, "num_reg_tokens", None)),
        "config registers": (layout.registers, getattr(config, "num_register_tokens", None)),
        "grid": (layout.grid, pair(getattr(patch_embed, "grid_size", None))),
        "patch": (anatomy.patch_size, stride_of(patch_embed)),
        "config patch": (anatomy.patch_size, pair(getattr(config, "patch_size", None))),
        "final stride": (anatomy.patch_size[0], final_stride(model)),
        "depth": (anatomy.depth, len(model.blocks) if hasattr(model, "blocks") else None),
        "config depth": (anatomy.depth, getattr(config, "num_hidden_layers", None)),
        "width": (anatomy.width, getattr(model, "embed_dim", None)),
    }
    made = {what: claim for what, claim in claims.items() if claim[1] is not None}
    for what, claim in made.items():
        agree(what, *claim)
    return sorted(made)


def stride_of(patch_embed: Any) -> tuple[int, int] | None:
    """Pixels per patch; behind a convolutional stem that is more than the patch size."""
    if hasattr(patch_embed, "feat_ratio"):
        return pair(patch_embed.feat_ratio(as_scalar=False))
    return pair(getattr(patch_embed, "patch_size", None))


def final_stride(model: nn.Module) -> int | None:
    """Pixels per cell of the model's last feature map: more than a patch where later stages pool further."""
    info = getattr(model, "feature_info", None)
    return info[-1].get("reduction") if isinstance(info, list) and info else None


def pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return (value, value)
    return tuple(value) if isinstance(value, tuple | list) and len(value) == 2 else None


def check_trace(vit: vitreg.Backbone, images: Tensor) -> list[str]:
    """A trace against hooks on the same pass, the untraced output and the library's unfused attention."""
    small = vit.layout.tokens <= 600
    rows: Any = "full" if small else ("cls" if vit.layout.prefix else [0, vit.layout.patches - 1])
    plain = tree_leaves(vit(images))
    embedding = vit.anatomy.patch_embedding is not None
    with Witness(vit) as witness, vitreg.trace(vit, attention=rows, neurons=True, embedding=embedding) as t:
        traced = tree_leaves(vit(images))
    tensors = [(a, b) for a, b in zip(plain, traced, strict=True) if isinstance(a, Tensor)]
    if not all(torch.equal(a, b) for a, b in tensors):
        raise DisagreementError("the traced output is not the untraced one, bit by bit")
    in_a_row = vit.anatomy.stream.row_axes > 0
    close("norms", *compared(t.norms, witness.norms(), in_a_row), 0.0)
    done = ["output", "norms"]
    if embedding:
        agree("embedding shape", tuple(t.embedding.shape[:2]), (2, vit.layout.patches))
        done.append("embedding")
    if (neurons := witness.neurons()) is not None:
        close("neurons", *compared(t.neurons, neurons, in_a_row), 0.0)
        done.append("neurons")
    close("sums of attention rows", t.attention.sum(-1), torch.ones(t.attention.shape[:-1]), 1e-4)
    if in_a_row:
        if small and (reference := attention_in_a_row(vit, images)) is not None:
            close("attention rows", every_weight(t.attention), every_weight(reference), 1e-4)
            done.append("attention")
    elif (reference := own_attention(vit, images)) is not None:
        wanted = (
            reference if small else reference[..., [0] if rows == "cls" else [-vit.layout.patches, -1], :]
        )
        close("attention rows", t.attention, wanted, 1e-4)
        done.append("attention")
    return done


def compared(ours: Tensor, theirs: Tensor, in_a_row: bool) -> tuple[Tensor, Tensor]:
    """Both, as they can be compared: of images that lie in one row, each image's tokens in order of size, for
    the model has an order of its own. (Which patch is which is checked by pixels, in `check_position`.)"""
    if not in_a_row:
        return ours, theirs
    return ours.sort(2).values, theirs.reshape(ours.shape).sort(2).values


def attention_in_a_row(vit: vitreg.Backbone, images: Tensor) -> list[Tensor] | None:
    """What each softmax of the eager implementation gives, over images or windows; None where it has none."""
    if not hasattr(vit.model, "set_attn_implementation"):
        return None
    inside: list[bool] = []
    with Softmaxes(inside) as softmaxes, ExitStack() as stack:
        for block in vit.anatomy.block_modules(vit.model):
            stack.callback(block.register_forward_pre_hook(lambda *_: inside.append(True)).remove)
            stack.callback(block.register_forward_hook(lambda *_: inside.clear()).remove)
        stack.callback(vit.model.set_attn_implementation, vit.model.config._attn_implementation)
        vit.model.set_attn_implementation("eager")
        vit(images)
    return softmaxes.weights


class Softmaxes(TorchFunctionMode):
    """What softmaxes give while something runs."""

    def __init__(self, running: list[bool]) -> None:
        super().__init__()
        self._running = running
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._running and getattr(func, "__name__", "") == "softmax":
            self.weights.append(result)
        return result


def every_weight(rows: Tensor | list[Tensor]) -> Tensor:
    """Every weight above 0 of all rows, in order of size."""
    flat = torch.cat([x.flatten().float() for x in rows])
    return flat[flat > 1e-12].sort().values


def check_position(vit: vitreg.Backbone, images: Tensor) -> list[str]:
    """Change the pixels of one patch: its token must be the one that changes most, wherever tokens are seen.

    Behind a convolutional stem pixels reach other patches too, so there a neighbour may change more.
    """
    (rows, columns), (height, width) = vit.layout.grid, vit.anatomy.patch_size
    row, column = rows // 3, columns // 2
    changed = images.clone()
    changed[..., row * height : (row + 1) * height, column * width : (column + 1) * width] *= -1
    for before, after in zip(patch_tokens(vit, images), patch_tokens(vit, changed), strict=True):
        change = (before - after).norm(dim=-1)[0]
        reach = 0 if int((change > 0).sum()) == 1 else 1
        most = divmod(int(change.argmax()), columns)
        if max(abs(most[0] - row), abs(most[1] - column)) > reach:
            raise DisagreementError(f"patch ({row}, {column}) of {rows}x{columns} changed, and token {most}")
    return ["position"]


def patch_tokens(vit: vitreg.Backbone, images: Tensor) -> list[Tensor]:
    """The patches as they enter the first block and, where it is found, as the patch embedding gives them."""
    seen: list[Tensor] = []
    first = vit.anatomy.block_modules(vit.model)[0]
    hook = first.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(vit.anatomy.stream.of_call(args, kwargs)), with_kwargs=True
    )
    embedding = vit.anatomy.patch_embedding is not None
    with vitreg.trace(vit, embedding=embedding) as t:
        vit(images)
    hook.remove()
    entering = seen[0][:, vit.layout.patch_slice]
    return [entering, t.embedding] if embedding else [entering]


class Witness:
    """Hooks of our own on the blocks: what left each, and what entered its MLP's last linear layer."""

    def __init__(self, vit: vitreg.Backbone) -> None:
        model = vit.model
        named = getattr(model, "blocks", None)
        self.blocks = list(named) if isinstance(named, nn.Module) else vit.anatomy.block_modules(model)
        self.width = vit.anatomy.width
        self.outputs: list[Tensor] = []
        self.entered: list[Tensor | None] = [None] * len(self.blocks)
        self._hooks = ExitStack()

    def __enter__(self) -> "Witness":
        for index, block in enumerate(self.blocks):
            hooks = [block.register_forward_hook(lambda m, a, out: self.outputs.append(first_tensor(out)))]
            hooks += [down.register_forward_pre_hook(self._enter(index)) for down in self._downs(block)]
            for hook in hooks:
                self._hooks.callback(hook.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def _downs(self, block: nn.Module) -> list[nn.Module]:
        # By name, where vitreg goes by structure: every linear layer to the width outside attention.
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        return [m for n, m in linears.items() if m.out_features == self.width and "att" not in n]

    def _enter(self, index: int) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.entered[index] = args[0]  # the last one called stays

        return hook

    def norms(self) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for x in self.outputs])

    def neurons(self) -> Tensor | None:
        found = [x for x in self.entered if x is not None]
        return torch.stack(found) if len(found) == len(self.blocks) else None


def own_attention(vit: vitreg.Backbone, images: Tensor) -> Tensor | None:
    """(l, b, h, n, n) as the library itself computes it step by step; None where it cannot be had."""
    if hasattr(vit.model, "set_attn_implementation"):
        return eager_attention(vit, images)
    return unfused_attention(vit, images)


def unfused_attention(vit: vitreg.Backbone, images: Tensor) -> Tensor | None:
    """timm: what enters `attn_drop` when no attention is fused."""
    fused = [m for m in vit.model.modules() if getattr(m, "fused_attn", False)]
    found: dict[int, list[Tensor]] = defaultdict(list)
    with ExitStack() as stack:
        for module in fused:
            module.fused_attn = False
            stack.callback(setattr, module, "fused_attn", True)
        for index, block in enumerate(vit.anatomy.block_modules(vit.model)):
            for name, module in block.named_modules():
                if name.rpartition(".")[2] == "attn_drop":
                    keep = module.register_forward_pre_hook(lambda m, args, i=index: found[i].append(args[0]))
                    stack.callback(keep.remove)
        vit(images)
    if len(found) < vit.anatomy.depth:
        return None
    return torch.stack([torch.cat(found[index], dim=1) for index in range(vit.anatomy.depth)])


def eager_attention(vit: vitreg.Backbone, images: Tensor) -> Tensor | None:
    """transformers: the attentions that the eager implementation hands out, where it computes the same."""
    forward = vit.forward or vit.model
    own = vit.model.config._attn_implementation
    plain = first_tensor(forward(images))
    try:
        vit.model.set_attn_implementation("eager")
        output = forward(images, output_attentions=True)
    except Exception:  # not every model has an eager form or hands its attentions out
        return None
    finally:
        vit.model.set_attn_implementation(own)
    attentions = getattr(output, "attentions", None)
    if not torch.allclose(first_tensor(output), plain, rtol=1e-2, atol=1e-2 * float(plain.abs().max())):
        return None
    if not attentions or len(attentions) != vit.anatomy.depth or any(a is None for a in attentions):
        return None
    return torch.stack(tuple(attentions))
