"""What vitreg makes of models as their authors publish them: small builds from checkouts.

    python benchmarks/checkouts.py FOLDER [--only PATTERN] [--json F] [--write PAGE] [--deps DIR]

FOLDER holds checkouts named OWNER+NAME. Each model is built from the checkout's own code in a process of its
own, three blocks deep, with random weights; nothing of that code is kept here but how it is called. `--deps`
is a folder of packages that some import: pip install --no-deps --target DIR einops torchscale.

A model is accepted, refused (vitreg says why), not built (the code does not run here), or vitreg crashes. Of
accepted ones is asked, by hooks of this file's own:

    norms      token norms are those of what each block gives back
    rows       attention rows are those of the model's own softmax (recomputed from q and k where it is fused)
    registers  test-time registers run, change the output and keep its shape; so does one without neurons
    splitting  all tokens that are not forked stay what they were
    bias       the attention bias runs and changes the output
    planted    artifacts that are planted in block 1 are found there, and the neurons that make them
    undo       after all of that the output is what it was, bit by bit
    compiled   the model with registers, compiled (backend "eager"), gives the eager answer
"""

import argparse
import fnmatch
import json
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from checkouts_builds import RECIPES, Recipe, get
from checkouts_page import Row, page, summary
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import vitreg
from vitreg.errors import VitregError
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons

NEURONS = RegisterNeurons.of({1: [3, 5]})


# -- what is asked of them -------------------------------------------------------------------------


class Case:
    """A model that vitreg accepted, and what it gave before anything was done to it."""

    def __init__(self, recipe: Recipe, vit: vitreg.Backbone, images: Tensor) -> None:
        self.recipe, self.vit, self.images = recipe, vit, images
        self.plain = self.outputs()

    @torch.no_grad()
    def outputs(self, model: Any = None) -> list[Tensor]:
        """All tensors that the model gives, or its blocks where its head gives none."""
        with self.streams() as streams:
            given = tree_leaves((self.vit if model is None else model)(self.images))
        return [value for value in given if isinstance(value, Tensor)] or streams

    @contextmanager
    def streams(self) -> Iterator[list[Tensor]]:
        """What each block gives back, (b, n, d), by hooks."""
        found: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            stream = next(x for x in tree_leaves(output) if isinstance(x, Tensor) and x.dim() == 3)
            found.append(stream.transpose(0, 1) if self.recipe.tokens_first else stream)

        blocks = self.vit.model.get_submodule(self.recipe.blocks).children()
        hooks = [block.register_forward_hook(keep) for block in blocks]
        yield found
        for hook in hooks:
            hook.remove()

    def changed_by(self, fix: vitreg.Fix) -> str:
        with fix.applied_to(self.vit):
            fixed = self.outputs()
        shapes = [x.shape for x in fixed] == [x.shape for x in self.plain]
        changed = shapes and apart(fixed, self.plain) > 1e-6 and all(bool(x.isfinite().all()) for x in fixed)
        return yes(changed, "the output has another shape, is as it was, or is not finite")


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """How far tensors are apart, each in terms of its largest value."""
    pairs = [(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def yes(right: bool, otherwise: str) -> str:
    return "yes" if right else f"NO: {otherwise}"


@torch.no_grad()
def norms(case: Case) -> str:
    with case.streams() as streams, vitreg.trace(case.vit) as t:
        case.vit(case.images)
    off = apart([t.norms], [torch.stack(streams).norm(dim=-1)])
    return yes(off < 1e-5, f"off by {off:.2g}")


class Softmaxes(TorchFunctionMode):
    """The attention weights of a pass: what a softmax gives, or would give inside a fused function."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.rows = tokens, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = rows = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            call = dict(zip(("q", "k", "v", "attn_mask"), args, strict=False)) | kwargs
            scores = call["q"] @ call["k"].mT * (call.get("scale") or call["q"].shape[-1] ** -0.5)
            mask = call.get("attn_mask")
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            rows = scores.softmax(-1)
        elif func is F.multi_head_attention_forward:
            rows = func(*args, **(kwargs | {"need_weights": True, "average_attn_weights": False}))[1]
        elif getattr(func, "__name__", "") != "softmax":
            return given
        if tuple(rows.shape[-2:]) == (self.tokens, self.tokens):
            self.rows.append(rows.float())
        return given


@torch.no_grad()
def rows(case: Case) -> str:
    with vitreg.trace(case.vit, attention="full") as t:
        case.vit(case.images)
    with Softmaxes(t.inner.tokens) as seen:
        case.vit(case.images)
    if len(seen.rows) != len(t.attention):
        return f"NO: {len(seen.rows)} softmaxes were seen in {len(t.attention)} blocks"
    off = apart(list(t.attention), [x.reshape(t.attention[0].shape) for x in seen.rows])
    return yes(off < 1e-5, f"off by {off:.2g}")


def registers(case: Case) -> str:
    with vitreg.TestTimeRegisters(RegisterNeurons.of({}), 1).applied_to(case.vit):
        if [x.shape for x in case.outputs()] != [x.shape for x in case.plain]:
            return "NO: without neurons the output has another shape"
    return case.changed_by(vitreg.TestTimeRegisters(NEURONS, 2))


@torch.no_grad()
def splitting(case: Case) -> str:
    """Neurons mark where they are highest among the patches of these images."""
    with vitreg.trace(case.vit, neurons=True, residuals=True) as before:
        case.vit(case.images)
    chosen = []
    for layer in (0, 1):
        level = before.neurons[layer][:, before.layout.patch_slice].flatten(0, 1).sort(0).values[-3]
        index = int(level.argmax())
        chosen.append(RegisterNeuron(layer, index, threshold=0.999 * float(level[index])))
    fix = vitreg.TokenSplitting(RegisterNeurons(tuple(chosen)), capacity=0.6)
    with fix.applied_to(case.vit) as handle, vitreg.trace(case.vit, residuals=True) as after:
        case.vit(case.images)
    fork = handle.carried
    forked = torch.zeros(after.residuals.shape[1:3], dtype=torch.bool).scatter(1, fork.position, fork.valid)
    off = (after.residuals - before.residuals).abs().amax(-1) / before.residuals.abs().max()
    if not bool((off[-1][forked] > 1e-6).any()):
        return "NO: nothing was forked"
    return yes(float(off[:, ~forked].max()) < 1e-5, f"other tokens are off by {off[:, ~forked].max():.2g}")


def bias(case: Case) -> str:
    return case.changed_by(vitreg.AttentionBias.calibrate(case.vit, [case.images], NEURONS))


def planted(case: Case) -> str:
    photos = get("phantoms:crops")(case.vit, 96, 0)
    phantom = vitreg.plant(case.vit, photos, 1)
    report = vitreg.diagnose(phantom.vit, [photos], examples=0)
    if (report.verdict, report.onset_layer) != ("artifacts", 1):
        return f"NO: {report.verdict}, from block {report.onset_layer}"
    found = vitreg.find_register_neurons(phantom.vit, [photos], report, top_k=4).by_layer
    right = {layer: sorted(ids) for layer, ids in found.items()} == {1: sorted(phantom.neurons)}
    return yes(right, f"found {found}, planted {phantom.neurons}")


def undo(case: Case) -> str:
    return yes(apart(case.outputs(), case.plain) == 0, "the output is another")


def compiled(case: Case) -> str:
    with vitreg.TestTimeRegisters(NEURONS, 2).applied_to(case.vit):
        run: Any = case.vit.forward or case.vit.model

        def called(images: Tensor) -> Any:
            return run(images)

        fast: Any = torch.compile(called, backend="eager")
        off = apart(case.outputs(fast), case.outputs())
    return yes(off < 1e-5, f"the compiled answer is off by {off:.2g}")


CHECKS = {
    check.__name__: check for check in (norms, rows, registers, splitting, bias, planted, undo, compiled)
}


# -- one model, in a process of its own ------------------------------------------------------------


def judged(recipe: Recipe, folder: Path) -> Row:
    row = {"repository": recipe.repository, "model": recipe.name}
    try:
        model = recipe.build(folder)
        own = recipe.forward
        images = torch.rand(2, 3, recipe.size, recipe.size) * 2 - 1
        with torch.no_grad():
            own(model, images) if own else model(images)
    except Exception as error:
        return row | {"verdict": f"not built: {said(error)}"}
    wrapped: list[vitreg.Backbone] = []
    row["verdict"] = tried(lambda: wrapped.append(vitreg.wrap(model, image_size=recipe.size, forward=own)))
    if wrapped:
        case = Case(recipe, wrapped[0], images)
        row |= {name: tried(check, case) for name, check in CHECKS.items()}
    return row


def tried(run: Callable[..., str | None], *args: Any) -> str:
    try:
        return run(*args) or "accepted"
    except VitregError as error:
        return f"refused: {' '.join(str(error).split())}"
    except Exception as error:
        return f"CRASH: {said(error)}"


def said(error: Exception) -> str:
    """Type and message of an error, the line that raised it, and the last one of vitreg's."""
    frames = list(traceback.extract_tb(error.__traceback__))
    frames = [frames[-1], *[frame for frame in frames if "/vitreg/" in frame.filename][-1:]]
    places = " from ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({places})"


def in_child(name: str, arguments: list[str]) -> Row:
    done = subprocess.run([sys.executable, *arguments, "--child", name], capture_output=True, text=True)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = [*done.stderr.splitlines(), "no message"][-1]
        return {"repository": name, "model": "", "verdict": f"CRASH: {last} (exit code {done.returncode})"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the folder of checkouts, named OWNER+NAME")
    parser.add_argument("--only", default="*", help="a pattern of 'OWNER+NAME model'")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--write", type=Path, help="also write a page (Markdown) here")
    parser.add_argument("--deps", type=Path, help="a folder of packages that checkouts import")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        sys.path += [str(Path(__file__).parents[1] / "tests"), str(args.deps or "")]
        warnings.simplefilter("ignore")
        print(json.dumps(judged(RECIPES[args.child], args.folder)))
        return
    table = [in_child(name, sys.argv) for name in RECIPES if fnmatch.fnmatch(name, args.only)]
    print(summary(table, list(CHECKS)))
    if args.write:
        args.write.write_text(page(table, list(CHECKS)), encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(table, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
