"""Try vitreg on every image model of timm and transformers, with random weights, and write what happened.

    python benchmarks/census.py [--library timm|transformers] [--only PATTERN] [--again]
                                [--out docs/census.json] [--write docs/census.md]

Each model is built with two blocks and a small, non-square image where its constructor allows that, and
gets one of four verdicts:

    supported   vitreg.wrap() accepts it, and every check agrees: tokens, grid, depth and the position of a
                patch with what the model says of itself; norms, neurons and attention rows with hooks of
                this file on the model's own layers; the traced output with the untraced one, bit by bit
    refused     an UnsupportedModelError, whose reason is kept
    wrong       any other error, or a check that disagrees
    not built   the library itself cannot build or run it here: too large, too slow, or an error

No weights are downloaded. A killed run continues where it stopped: results are appended to OUT.part, and
become OUT (a JSON object, each reason listed once) and the page at the end. `--again` tries the chosen names
once more.
"""

import argparse
import fnmatch
import gc
import json
import re
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import vitreg
from vitreg.errors import UnsupportedModelError
from vitreg.probe import first_tensor

LARGEST = 4e9  # bytes of parameters that are built
GRID = (12, 6)  # patches of a small image: not square, so that rows and columns cannot be swapped unseen
VERDICTS = ("supported", "refused", "wrong", "not built")
VIT_MODULES = (
    "vision_transformer",
    "eva",
    "deit",
    "beit",
    "vision_transformer_relpos",
    "vision_transformer_hybrid",
)
LIBRARIES = ("timm", "transformers")


@dataclass
class Result:
    """What became of one model; `checked` names the checks that could be made and agreed."""

    library: str
    name: str
    module: str
    verdict: str
    reason: str = ""
    checked: list[str] = field(default_factory=list)


@dataclass
class Attempt:
    """One way to build a model; the size is None for the model's own."""

    build: Callable[[], nn.Module]
    size: tuple[int, int] | None = None


class NotBuiltError(Exception):
    """The library cannot build or run this model here; vitreg was not asked."""


class OutOfTime(BaseException):
    """The time limit of one model is over: no Exception, so that no library swallows it."""


# -- the verdict of one model ----------------------------------------------------------------------


def judge(library: str, name: str, module: str, seconds: int) -> Result:
    """The verdict on one model, from the smallest of its builds that decides it."""
    result = Result(library, name, module, "not built")
    try:
        with time_limit(seconds):
            result.checked = verdict_of(ATTEMPTS[library](name))
            result.verdict = "supported"
    except OutOfTime:
        result.reason = f"too slow: over {seconds} s"
    except NotBuiltError as error:
        result.reason = one_line(error)
    except UnsupportedModelError as error:
        result.verdict, result.reason = "refused", one_line(error)
    except Exception as error:
        result.verdict, result.reason = "wrong", f"{type(error).__name__}: {one_line(error)}"
    return result


def verdict_of(attempts: Iterator[Attempt]) -> list[str]:
    """The checks passed by the first build that works; else the error of the first that decides.

    A smaller image may fail for reasons of its own (a window that no longer fits), so a failure there
    counts only where the model itself runs and vitreg is wrong about it.
    """
    last: Exception = NotBuiltError("no way to build it")
    for attempt in attempts:
        try:
            model = attempt.build().eval()
        except Exception as error:
            last = error if isinstance(error, UnsupportedModelError) else not_built(error)
            continue
        try:
            return checks(vitreg.wrap(model, image_size=attempt.size))
        except Exception as error:
            last = error
            wrong = not isinstance(error, UnsupportedModelError)
            if attempt.size is None or (wrong and runs(model, attempt.size)):
                raise
    raise last


def not_built(error: Exception) -> NotBuiltError:
    if isinstance(error, NotBuiltError):
        return error
    return NotBuiltError(f"{type(error).__name__}: {one_line(error)}")


def runs(model: nn.Module, size: tuple[int, int]) -> bool:
    try:
        with torch.no_grad():
            model(torch.rand(1, 3, *size))
    except Exception:
        return False
    return True


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def over(*_: object) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or "no message"


# -- checks that do not use vitreg's own findings --------------------------------------------------


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
    close("norms", t.norms, witness.norms(), 0.0)
    done = ["output", "norms"]
    if embedding:
        agree("embedding shape", tuple(t.embedding.shape[:2]), (2, vit.layout.patches))
        done.append("embedding")
    if (neurons := witness.neurons()) is not None:
        close("neurons", t.neurons, neurons, 0.0)
        done.append("neurons")
    close("sums of attention rows", t.attention.sum(-1), torch.ones(t.attention.shape[:-1]), 1e-4)
    if (reference := own_attention(vit, images)) is not None:
        wanted = (
            reference if small else reference[..., [0] if rows == "cls" else [-vit.layout.patches, -1], :]
        )
        close("attention rows", t.attention, wanted, 1e-4)
        done.append("attention")
    return done


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
        lambda module, args, kwargs: seen.append(first_tensor((args, kwargs))), with_kwargs=True
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
    """transformers: the attentions that the eager implementation hands out."""
    forward = vit.forward or vit.model
    try:
        vit.model.set_attn_implementation("eager")
        attentions = getattr(forward(images, output_attentions=True), "attentions", None)
    except Exception:  # not every model has an eager form or hands its attentions out
        return None
    finally:
        vit.model.set_attn_implementation("sdpa")
    if not attentions or len(attentions) != vit.anatomy.depth or any(a is None for a in attentions):
        return None
    return torch.stack(tuple(attentions))


# -- timm ------------------------------------------------------------------------------------------


def timm_names() -> dict[str, str]:
    """Every model name and the module that defines it."""
    import timm

    found = {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}
    return {name: found[name] for name in timm.list_models()}


def timm_attempts(name: str) -> Iterator[Attempt]:
    import timm

    def maker(**shrunk: Any) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            make = lambda: timm.create_model(name, pretrained=False, **shrunk)  # noqa: E731
            refuse_too_large(make)
            return make()

        return build

    size = small_size(lambda: timm.create_model(name, pretrained=False))
    # Some name the key-value heads of each block, in a list that two blocks would not fit.
    for shrunk in ({"depth": 2}, {"depth": 2, "num_kv_heads": 4}):
        if size:
            yield Attempt(maker(**shrunk, img_size=size), size)
        yield Attempt(maker(**shrunk))
    if size:
        yield Attempt(maker(img_size=size), size)
    yield Attempt(maker())


def small_size(make: Callable[[], nn.Module]) -> tuple[int, int] | None:
    """GRID patches of the model's own patch size, read from a build without memory."""
    try:
        with torch.device("meta"):
            model = make()
    except Exception:
        return None
    strides = (stride_of(getattr(module, "patch_embed", None)) for module in model.modules())
    patch = next((stride for stride in strides if stride), None)
    return (GRID[0] * patch[0], GRID[1] * patch[1]) if patch else None


def refuse_too_large(make: Callable[[], nn.Module]) -> None:
    try:
        with torch.device("meta"):
            model = make()
    except NotImplementedError:
        return  # it computes with its weights while being built; none of these is large
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if size > LARGEST:
        raise NotBuiltError(f"too large: {size / 1e9:.1f} GB of parameters")


# -- transformers ----------------------------------------------------------------------------------


def transformers_names() -> dict[str, str]:
    """Every class of the backbone, image classification and image model mappings, and its model type."""
    import transformers
    from transformers.models.auto import configuration_auto, modeling_auto

    transformers.logging.set_verbosity_error()
    found: dict[str, str] = {}
    for mapping in ("BACKBONE", "IMAGE_CLASSIFICATION", "IMAGE"):
        names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
        for model_type, classes in names.items():
            if model_type in configuration_auto.CONFIG_MAPPING_NAMES:
                for cls in (classes,) if isinstance(classes, str) else classes:
                    found.setdefault(cls, model_type)
    return dict(sorted(found.items()))


def transformers_attempts(name: str) -> Iterator[Attempt]:
    import transformers

    config_class = getattr(transformers, name).config_class
    native = config_class()
    vision = getattr(native, "vision_config", native)
    patch = pair(getattr(vision, "patch_size", None))
    size = (GRID[0] * patch[0], GRID[1] * patch[1]) if patch else None

    def maker(**shrunk: Any) -> Callable[[], nn.Module]:
        return lambda: build_transformers(name, shrunken(config_class, native, shrunk))

    # Masked autoencoders without their mask, as one would run them on whole images.
    small: dict[str, Any] = {"num_hidden_layers": 2, "mask_ratio": 0.0}
    if size:
        yield Attempt(maker(**small, image_size=size), size)
        yield Attempt(maker(**small), size)
    yield Attempt(maker(**small))
    yield Attempt(maker())


def shrunken(config_class: Any, native: Any, shrunk: dict[str, Any]) -> Any:
    """A configuration with smaller numbers where it has them, and the same in its parts."""
    parts = [part for part in ("vision_config", "text_config") if hasattr(native, part)]
    if parts:
        return config_class(**{part: known(getattr(native, part), shrunk) for part in parts})
    return config_class(**known(native, shrunk))


def known(config: Any, shrunk: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in shrunk.items() if hasattr(config, key)}


def build_transformers(name: str, config: Any) -> nn.Module:
    """The model of this class, or of its vision part alone where the whole is too large."""
    import transformers

    from vitreg.models import _hf_vision_tower

    cls = getattr(transformers, name)
    try:
        refuse_too_large(lambda: cls(config))
        whole = cls(config)
    except NotBuiltError:
        if not hasattr(config, "vision_config"):
            raise
        whole = transformers.AutoModel.from_config(config.vision_config)
    return _hf_vision_tower(whole)


NAMES = {"timm": timm_names, "transformers": transformers_names}
ATTEMPTS = {"timm": timm_attempts, "transformers": transformers_attempts}


# -- keeping results -------------------------------------------------------------------------------

Results = dict[tuple[str, str], Result]


def versions() -> dict[str, str]:
    return {package: version(package) for package in ("vitreg", "timm", "transformers", "torch")}


def load_results(out: Path) -> Results:
    """What is known for the installed versions; later lines of the journal win."""
    records: list[dict[str, Any]] = []
    if out.exists() and (kept := json.loads(out.read_text()))["versions"] == versions():
        records += [record | {"reason": kept["reasons"][record["reason"]]} for record in kept["results"]]
    if journal(out).exists():
        records += [json.loads(line) for line in journal(out).read_text().splitlines()]
    found = [Result(**record) for record in records]
    return {(result.library, result.name): result for result in found}


def journal(out: Path) -> Path:
    return out.with_name(out.name + ".part")


def save_results(out: Path, results: Results) -> None:
    """One line per reason and per result, so that two versions of the file can be compared."""
    reasons = sorted({result.reason for result in results.values()})
    numbers = {reason: number for number, reason in enumerate(reasons)}
    records = [slim(results[key]) | {"reason": numbers[results[key].reason]} for key in sorted(results)]
    out.write_text(
        f'{{"versions": {json.dumps(versions())},\n'
        f'"reasons": [\n{one_per_line(reasons)}\n],\n"results": [\n{one_per_line(records)}\n]}}\n'
    )
    journal(out).unlink(missing_ok=True)


def one_per_line(items: list[Any]) -> str:
    return ",\n".join(json.dumps(item) for item in items)


def slim(result: Result) -> dict[str, Any]:
    return {key: value for key, value in asdict(result).items() if value}


# -- the page --------------------------------------------------------------------------------------

PAGE = """\
# Census: which models vitreg reads

Every image model of timm and transformers, built with random weights (nothing is downloaded), with two
blocks and a small image where its constructor allows that. `python benchmarks/census.py` made this page;
its docstring says what is checked. Versions: {versions}.

- **supported**: accepted, and every independent check agrees: tokens, grid, depth and patch positions with
  what the model says of itself, norms, neurons and attention rows with hooks on the model's own layers, and
  the traced output with the untraced one, bit by bit.
- **refused**: an `UnsupportedModelError` that says why.
- **wrong**: any other error, or a check that disagrees.
- **not built**: the library itself cannot build or run it within 4 GB of parameters and {seconds} s.
"""


def page(results: Results, seconds: int) -> str:
    parts = [PAGE.format(versions=", ".join(f"{k} {v}" for k, v in versions().items()), seconds=seconds)]
    for library in LIBRARIES:
        chosen = [result for key, result in sorted(results.items()) if key[0] == library]
        if chosen:
            parts += section(library, chosen)
    return "\n".join(parts)


def section(library: str, results: list[Result]) -> list[str]:
    totals = Counter(result.verdict for result in results)
    compared = sum("attention" in result.checked for result in results)
    parts = [
        f"## {library}: {len(results)} models\n",
        ", ".join(f"{totals[verdict]} {verdict}" for verdict in VERDICTS) + ".",
        f"{compared} of the {totals['supported']} supported have attention of their own to compare with.\n",
    ]
    if library == "timm":
        plain = [result for result in results if result.module in VIT_MODULES]
        good = sum(result.verdict == "supported" for result in plain)
        parts.append(f"Plain ViTs ({', '.join(VIT_MODULES)}): {good} of {len(plain)} supported.\n")
    parts += [module_table(results, "Module" if library == "timm" else "Model type")]
    for verdict in VERDICTS[1:]:
        parts += reasons(verdict, [result for result in results if result.verdict == verdict])
    return parts


def module_table(results: list[Result], title: str) -> str:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        counts[result.module][result.verdict] += 1
    # What is supported first, then by name.
    order = sorted(counts, key=lambda module: (-counts[module]["supported"], module))
    lines = [f"| {title} | {' | '.join(VERDICTS)} |", "|---|" + "---:|" * len(VERDICTS)]
    lines += [
        f"| {module} | {' | '.join(str(counts[module][verdict] or '') for verdict in VERDICTS)} |"
        for module in order
    ]
    return "\n".join(lines) + "\n"


def reasons(verdict: str, results: list[Result]) -> list[str]:
    if not results:
        return []
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[general(result.reason)].append(result)
    lines = [f"### {verdict.capitalize()}: why\n", "| Models | Reason | Examples |", "|---:|---|---|"]
    for reason, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {len(group)} | {reason} | {', '.join(examples(group))} |")
    return ["\n".join(lines) + "\n"]


def examples(group: list[Result], count: int = 4) -> list[str]:
    """A few names, of different modules first."""
    first = {result.module: result.name for result in reversed(group)}
    names = [*first.values(), *(result.name for result in group)]
    return [f"`{name}`" for name in list(dict.fromkeys(names))[:count]]


def general(reason: str) -> str:
    """A reason without the names, shapes and counts of one model."""
    reason = re.sub(r"^.*?found \d+ blocks, but ", "", reason)
    reason = re.sub(
        r" (?:Pass an Anatomy|Give vitreg the vision encoder itself|You can install).*$", "", reason
    )
    reason = re.sub(r"in [A-Z]\w+: no ModuleList", "in the model: no ModuleList", reason)
    reason = re.sub(r"^((?:\w+Error: )?)[A-Z]\w+ (could not|has no|requires)", r"\1the model \2", reason)
    reason = re.sub(r"\((?!\d+D)[\w., ]*\d[\w., ]*\)|\[[\d, ]+\]?", "(...)", reason)
    reason = re.sub(r"'[\w.]*[.\d][\w.]*'", "(...)", reason)
    reason = re.sub(r"\d+\.\d+|\b\d+x\d+\b|\b\d+(?= times| MLPs|,|$)|(?<=only )\d+", "N", reason)
    return reason.replace("|", " ").strip(" .")


# -- the command -----------------------------------------------------------------------------------


def chosen_names(library: str | None, only: str) -> list[tuple[str, str, str]]:
    """(library, name, module) of what to try; `only` is a pattern of names or of modules."""
    rows = [
        (kind, name, module)
        for kind in LIBRARIES
        if library in (None, kind)
        for name, module in NAMES[kind]().items()
    ]
    return [row for row in rows if fnmatch.fnmatch(row[1], only) or fnmatch.fnmatch(row[2], only)]


def take(rows: list[tuple[str, str, str]], results: Results, args: argparse.Namespace) -> None:
    """Judge the models that have no verdict yet, writing each down at once."""
    for number, (library, name, module) in enumerate(rows, 1):
        if (library, name) in results and not args.again:
            continue
        torch.manual_seed(0)
        started = time.perf_counter()
        result = judge(library, name, module, args.seconds)
        results[library, name] = result
        with journal(args.out).open("a") as file:
            file.write(json.dumps(slim(result)) + "\n")
        took = time.perf_counter() - started
        reason = "" if result.verdict == "supported" else result.reason[:150]
        print(
            f"{number}/{len(rows)} {took:5.1f}s {name}: {result.verdict} {reason}",
            file=sys.stderr,
            flush=True,
        )
        gc.collect()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", choices=LIBRARIES)
    parser.add_argument("--only", default="*", help="a pattern of model names or of module names")
    parser.add_argument("--again", action="store_true", help="also try what already has a verdict")
    parser.add_argument("--seconds", type=int, default=120, help="time limit for one model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/census.json"))
    parser.add_argument("--write", type=Path, default=Path("docs/census.md"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    results = load_results(args.out)
    take(chosen_names(args.library, args.only), results, args)
    save_results(args.out, results)
    args.write.write_text(page(results, args.seconds))


if __name__ == "__main__":
    main()
