"""The page that a user pastes into a bug report: true, plain text, and there whatever the model."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
from catalog import CATALOG, images
from checkpoints import tiny_timm
from command_line import fails
from headless_models import raising
from refused_models import REFUSED
from signatures import SIGNATURES, plain, sequence_first_clip
from timm.models._hub import save_for_hf
from torch import nn
from torch.nn.utils import parametrizations, prune

import vitreg
from vitreg.examination.examine import COLUMNS
from vitreg.examination.findings import wrappers
from vitreg.examination.trials import FIXES, trials

KINDS = [f"fix: {kind}" for kind in FIXES]
READ = ["forward pass", "residual stream", "attention rows", "neurons"]


def page(found: vitreg.Examination) -> str:
    text = found.full()
    assert all(len(line) <= COLUMNS for line in text.splitlines()), text
    assert "Traceback" not in text
    assert json.loads(json.dumps(found.to_json()))["model"] == found.model
    return text


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "fails"),
    [
        ("timm dinov3", {"fix: positions": "adds no table of positions"}),
        ("timm beit", {"fix: positions": "adds no table of positions"}),
        ("hf clip", {}),
        ("open_clip vit", {}),
    ],
)
def test_what_works_and_what_does_not(name: str, fails: dict[str, str]) -> None:
    vit = CATALOG[name].backbone()
    before, weights, training = vit(images(vit)), state(vit.model), vit.model.training
    found = vitreg.doctor(vit)
    tried = {trial.name: trial for trial in found.trials}
    assert list(tried) == [*READ, "another size", *KINDS, "copies", "gradients"]
    broken = {name: trial.detail for name, trial in tried.items() if not trial.works}
    broken.pop("another size", None)
    assert broken.keys() == fails.keys(), broken
    assert all(words in broken[kind] for kind, words in fails.items())
    said, anatomy = dict(found.found), vit.anatomy
    assert said["blocks"].startswith(f"{anatomy.depth} of class ")
    assert said["width"] == f"{anatomy.width}, {anatomy.heads} heads"
    assert said["tokens"].startswith(
        f"{anatomy.prefix} prefix (CLS and the like), {anatomy.registers} register"
    )
    assert ("with a mask" in said["attention"]) is anatomy.masked
    assert "WORKS" in page(found)
    assert vit.model.training is training
    assert all(torch.equal(x, weights[name]) for name, x in vit.model.state_dict().items())
    after = vit(images(vit))
    assert torch.equal(*(x if isinstance(x, torch.Tensor) else x[0] for x in (before, after)))


@pytest.mark.parametrize("name", ["list", "sequence first in a dict", "keywords only", "in place"])
def test_every_signature_is_said_and_works(name: str) -> None:
    found = vitreg.doctor(SIGNATURES[name].wrapped(plain().model))
    broken = {trial.name for trial in found.trials if not trial.works}
    # A block that overwrites what its norm has read cannot be differentiated, by PyTorch's own word.
    assert broken <= {"another size", *(["gradients"] if name == "in place" else [])}
    said = dict(found.found)["stream"]
    assert said.startswith("(n, b, d)" if name.startswith("sequence") else "(b, n, d)")
    assert {"list": "argument 'xs'[0]", "in place": "argument 'x',"}.get(name, "argument ") in said


def test_tokens_first_and_multihead_attention_are_said() -> None:
    said = dict(vitreg.doctor(sequence_first_clip()[0]).found)
    assert said["attention"] == "nn.MultiheadAttention, without a mask or bias"
    assert said["stream"].startswith("(n, b, d)")


@pytest.mark.parametrize("name", ["swin", "a whole CLIP", "no model at all", "video"])
def test_a_refused_model_makes_a_page_with_the_refusal(name: str) -> None:
    build, _ = REFUSED[name]
    module = build()
    found = vitreg.doctor(module)
    with pytest.raises(vitreg.UnsupportedModelError) as refused:
        vitreg.wrap(module)
    assert found.refusal == str(refused.value)
    assert found.trials == ()
    assert dict(found.found)["model"].startswith(type(module).__name__)
    text = page(found)
    assert "REFUSED" in text
    assert "WORK" not in text


def test_a_head_that_raises_is_said() -> None:
    found = vitreg.doctor(raising(TypeError("text?")))
    assert dict(found.found)["head"] == "raises for images alone: TypeError: text?"
    tried = {trial.name: trial for trial in found.trials}
    assert "no output of its own" in tried["forward pass"].detail
    assert all(tried[name].works for name in [*READ, *KINDS, "copies", "gradients"])


class Lora(nn.Linear):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.lora_a = nn.Parameter(torch.zeros(2, base.in_features))


def _own_forward(model: nn.Module) -> None:
    model.blocks[1].forward = model.blocks[1].forward


def _offloaded(model: nn.Module) -> None:
    model.blocks[0].mlp.fc1.to("meta")


def _low_rank(model: nn.Module) -> None:
    model.blocks[0].attn.proj = Lora(model.blocks[0].attn.proj)


WRAPPED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "parametrized": (
        lambda m: parametrizations.weight_norm(m.blocks[0].mlp.fc2),
        "parametrized (1x, first at 'blocks.0.mlp.fc2')",
    ),
    "pruned": (lambda m: prune.l1_unstructured(m.blocks[1].mlp.fc1, "weight", 0.5), "pruned (1x, first at"),
    "compiled": (lambda m: m.blocks[0].compile(), "compiled by torch.compile (1x, first at 'blocks.0')"),
    "own forward": (_own_forward, "a forward of its own (1x, first at 'blocks.1')"),
    "offloaded": (_offloaded, "weights that are elsewhere (offloaded, or never loaded) (2x"),
    "low rank": (_low_rank, "a low-rank path in Lora (1x, first at 'blocks.0.attn.proj')"),
    "hooks": (lambda m: m.norm.register_forward_hook(lambda *seen: None), "hooks (1x, first at 'norm')"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_wraps_layers_is_said_and_never_stops_the_page(name: str) -> None:
    wrap, said = WRAPPED[name]
    module = copy.deepcopy(plain().model)
    assert wrappers(module) == []
    wrap(module)
    assert any(said in line for line in wrappers(module))
    if name in ("compiled", "offloaded", "own forward"):  # one refused, one that cannot run, one that can
        page(vitreg.doctor(module))


def test_fixes_are_said_and_stay() -> None:
    vit = vitreg.wrap(copy.deepcopy(plain().model))
    with vitreg.TestTimeRegisters({0: [1]}).applied_to(vit):
        fixed = vit(images(vit))
        found = vitreg.doctor(vit)
        assert torch.equal(vit(images(vit)), fixed)
    assert dict(found.found)["fixes"] == "registers"
    assert "vitreg's own edits" in dict(found.found)["wrappers"]


def test_what_fails_is_a_line_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, or a wrong answer, is reported, and the rest is tried all the same."""
    vit = vitreg.wrap(copy.deepcopy(plain().model))

    def explode(*args: object) -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setitem(FIXES, "bias", explode)
    monkeypatch.setitem(
        FIXES, "projection", lambda vit, images: vitreg.TestTimeRegisters({0: [1]}, scale=0.0)
    )
    monkeypatch.setitem(FIXES, "registers", lambda vit, images: vitreg.TestTimeRegisters({}, registers=0))
    tried = {trial.name: trial for trial in trials(vit)}
    assert tried["fix: bias"].detail == "raises ZeroDivisionError: a b"
    assert tried["fix: registers"].detail == "it runs and changes nothing on noise, where it should"
    assert not tried["fix: bias"].works
    assert tried["gradients"].works


def test_an_undo_that_leaves_something_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = vitreg.wrap(copy.deepcopy(plain().model))
    undo = vitreg.Applied.undo

    def spoil(self: vitreg.Applied) -> None:
        undo(self)
        with torch.no_grad():
            vit.model.blocks[0].mlp.fc2.bias += 1

    monkeypatch.setattr(vitreg.Applied, "undo", spoil)
    tried = {trial.name: trial for trial in trials(vit)}
    assert not tried["fix: registers"].works
    assert tried["fix: registers"].detail.startswith("undone, the stream changes by up to ")


def test_the_command(run, tmp_path):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": sizes}
    save_for_hf(tiny_timm(), tmp_path / "tiny", model_config=config, safe_serialization=True)
    code, out, _ = run("doctor", tmp_path / "tiny", "--full", "--json", tmp_path / "page.json")
    assert code == 0
    assert out.startswith("vitreg doctor: ")
    assert all(len(line) <= COLUMNS for line in out.splitlines()[1:-1])
    told = json.loads((tmp_path / "page.json").read_text())
    assert told["refusal"] is None
    assert {trial["name"] for trial in told["trials"] if trial["works"]} >= {*READ, *KINDS}
    code, out, _ = run("doctor", "timm:swin_tiny_patch4_window7_224", "--random-weights")
    assert code == 0
    assert "Windowed and convolutional models" in " ".join(out.split())
    fails(run("doctor", "timm:no_such_model", "--random-weights"), "timm has no model")
