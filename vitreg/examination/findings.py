"""What can be said of a model by looking at it: for `vitreg doctor`.

lines = findings(vit)              # of a model that vitreg reads: [("width", "384, 6 heads"), ...]
lines = findings_of_module(model)  # of any model: class, library, weights, and what wraps its layers
"""

import importlib.metadata
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from vitreg.fixes.base import applied
from vitreg.hooks.attention import AttentionCall
from vitreg.hooks.attention_mode import intercept
from vitreg.hooks.block_edit import edits_of
from vitreg.hooks.stream import Stream
from vitreg.hooks.torch_internals import has_hooks, is_compiled, pre_hooks
from vitreg.models.backbone import Backbone
from vitreg.models.packed import reads_rows
from vitreg.models.probe import evaluating
from vitreg.version import __version__

Line = tuple[str, str]

# Libraries that put layers of their own in the place of others.
_REPLACING = ("peft", "bitsandbytes", "torchao", "optimum", "quanto", "gptqmodel", "awq", "hqq", "deepspeed")
_LIBRARIES = (
    "timm",
    "transformers",
    "open_clip_torch",
    "torchvision",
    "peft",
    "accelerate",
    "torchao",
    "bitsandbytes",
)


def versions() -> dict[str, str]:
    """Of vitreg, Python, torch and what is installed of the libraries that models come from."""
    found = {"vitreg": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"platform": f"{platform.system()} {platform.machine()}"}


def findings_of_module(model: nn.Module) -> list[Line]:
    """Class, library, weights, and what wraps or replaces its layers. For every model, also a refused one."""
    return [
        _line("model", lambda: f"{type(model).__name__} of {_library(type(model))}, {_millions(model)}"),
        _line("dtype", lambda: _listed(str(p.dtype).removeprefix("torch.") for p in model.parameters())),
        _line("device", lambda: _listed(str(p.device) for p in model.parameters())),
        _line("wrappers", lambda: "; ".join(wrappers(model)) or "none seen"),
    ]


def findings(vit: Backbone, size_from: str = "") -> list[Line]:
    """All of `findings_of_module`, and where things are in a model that vitreg reads."""
    anatomy, (height, width) = vit.anatomy, vit.image_size
    blocks, downs = anatomy.block_modules(vit.model), anatomy.down_projections(vit.model)
    head = f"raises for images alone: {anatomy.head_error}" if anatomy.head_error else "runs on images"
    return [
        *findings_of_module(vit.model),
        ("blocks", f"{anatomy.depth} of class {_classes(blocks)}, at {anatomy.blocks!r}"),
        ("width", f"{anatomy.width}, {anatomy.heads} heads"),
        (
            "neurons",
            f"{anatomy.neurons} per block, which enter {anatomy.down_projection!r} ({_classes(downs)})",
        ),
        ("tokens", _tokens(vit)),
        ("patch layer", repr(anatomy.patch_embedding) if anatomy.patch_embedding else "not found"),
        ("image size", f"{height}x{width} px{size_from and f', {size_from}'}"),
        _line("preprocess", lambda: _preprocess(vit)),
        ("stream", _stream(anatomy.stream)),
        _line("attention", lambda: _attention(vit)),
        ("head", head),
        ("fixes", ", ".join(handle.fix.type for handle in applied(vit.model)) or "none applied"),
    ]


def _line(name: str, value: Callable[[], str]) -> Line:
    """What cannot be said of a model is a line of its own, with the reason."""
    try:
        return name, value()
    except Exception as error:
        return name, f"unknown: {type(error).__name__}: {error}"


def _millions(model: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.3g} million parameters"


def _classes(modules: Iterable[nn.Module]) -> str:
    return _listed(type(module).__name__ for module in modules)


def _tokens(vit: Backbone) -> str:
    layout, (height, width) = vit.layout, vit.anatomy.patch_size
    rows, columns = layout.grid
    return (
        f"{layout.prefix} prefix (CLS and the like), {layout.registers} register,"
        f" {rows}x{columns} patches of {height}x{width} px"
    )


def _library(kind: type) -> str:
    """Of the innermost class that is a library's own: wrappers are said elsewhere."""
    name = kind.__module__.partition(".")[0]
    if name == "__main__":
        return "a script of one's own"
    try:
        return f"{name} {importlib.metadata.version('open_clip_torch' if name == 'open_clip' else name)}"
    except importlib.metadata.PackageNotFoundError:
        found = getattr(sys.modules.get(name), "__version__", None)
        return f"{name} {found}" if isinstance(found, str) else f"the module {name}"


def _listed(names: Iterable[str]) -> str:
    """Each name once, the most frequent first; with numbers, if there are several."""
    counts = Counter(names)
    if len(counts) < 2:
        return next(iter(counts), "none")
    return ", ".join(f"{name} ({count}x)" for name, count in counts.most_common())


def _preprocess(vit: Backbone) -> str:
    if vit.preprocess is None:
        return "none: give wrap() one, or tensors to the model"
    made = vit.preprocess(PIL.Image.new("RGB", (640, 480), (120, 130, 140)))
    shape = tuple(made.shape)
    fits = "" if shape == (3, *vit.image_size) else f", not {(3, *vit.image_size)}"
    return f"{type(vit.preprocess).__name__}, which makes {shape} of a photo of 640x480 px{fits}"


def _stream(stream: Stream) -> str:
    argument = stream.argument
    order = "(n, b, d)" if stream.tokens_first else ("(b, n, d)", "(b*n, d)", "(1, b*n, d)")[stream.row_axes]
    where = f"argument {argument.name or argument.position!r}"
    inside = "".join(f"[{key!r}]" for key in argument.path)
    back = "".join(f"[{key!r}]" for key in stream.returned)
    given_back = f"output{back}" if back else "the output"
    return f"{order}: a block is given it as {where}{inside}, and gives it back as {given_back}"


def _attention(vit: Backbone) -> str:
    calls: list[AttentionCall] = []
    with evaluating(vit.model), intercept(calls.append):
        vit(torch.zeros(1, 3, *vit.image_size))
    kinds = " and ".join(sorted({call.kind for call in calls}))
    return f"{kinds}, {'with a mask or positional bias' if vit.anatomy.masked else 'without a mask or bias'}"


def wrappers(model: nn.Module) -> list[str]:
    """What stands around or in the place of a model's layers, each with the first place where it was seen."""
    seen: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        for kind in _kinds_of_module(module):
            seen.setdefault(kind, []).append(name or "the model itself")
    for name, parameter in model.named_parameters():
        for kind in _kinds_of_parameter(parameter):
            seen.setdefault(kind, []).append(name)
    return [f"{kind} ({len(places)}x, first at {places[0]!r})" for kind, places in seen.items()]


def _kinds_of_module(module: nn.Module) -> Iterator[str]:
    kind, own = type(module), module.__dict__
    library = kind.__module__.partition(".")[0]
    if library in _REPLACING:
        yield f"{library}'s {kind.__name__}"
    elif any("lora" in name.lower() for name, _ in module.named_parameters(recurse=False)):
        yield f"a low-rank path in {kind.__name__}"
    if is_compiled(module):
        yield "compiled by torch.compile"
    if "forward" in own:
        yield "a forward of its own"
    if "_hf_hook" in own:
        yield f"accelerate's {type(own['_hf_hook']).__name__}"
    if parametrize.is_parametrized(module):
        yield "parametrized"
    if any(isinstance(hook, prune.BasePruningMethod) for hook in pre_hooks(module)):
        yield "pruned"
    elif reads_rows(module):
        yield "vitreg's own hook, which reads how images lie in a row"
    elif has_hooks(module):
        yield "hooks"
    if any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in kind.__mro__):
        yield "sharded by FSDP"
    if isinstance(module, nn.DataParallel) or kind.__name__ == "DistributedDataParallel":
        yield f"replicated by {kind.__name__}"
    if edits_of(module):
        yield "vitreg's own edits"


def _kinds_of_parameter(parameter: Tensor) -> Iterator[str]:
    if type(parameter) not in (Tensor, nn.Parameter):
        yield f"weights of class {type(parameter).__name__}"
    elif type(parameter.data) is not Tensor:
        yield f"weights of class {type(parameter.data).__name__}"
    if parameter.device.type == "meta":
        yield "weights that are elsewhere (offloaded, or never loaded)"
    if not parameter.is_floating_point():
        yield f"weights in {str(parameter.dtype).removeprefix('torch.')}"
