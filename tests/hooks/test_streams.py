"""Blocks of every signature: read, fixed and set free again, they answer as the plain model does."""

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from catalog import images
from phantoms import crops
from signatures import SIGNATURES, Signature, plain, sequence_first_clip
from torch import Tensor, nn

import vitreg
from vitreg import UnsupportedModelError
from vitreg.fixes import Fix
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons
from vitreg.models.probe import evaluating

NEURONS = {0: [3, 7], 1: [11, 5]}
MARKED = RegisterNeurons((RegisterNeuron(0, 3, threshold=0.5), RegisterNeuron(1, 11, threshold=0.5)))


def signed(name: str) -> vitreg.Backbone:
    return vitreg.wrap(SIGNATURES[name].wrapped(plain().model))


@cache
def fixes() -> dict[str, Fix]:
    vit = plain()
    with evaluating(vit.model), vitreg.trace(vit) as t:
        vit(images(vit))
    norms = t.norms[0][:, vit.layout.patch_slice]
    return {
        "registers": vitreg.TestTimeRegisters(NEURONS, registers=2, peak_over="patches"),
        "splitting": vitreg.TokenSplitting(MARKED, capacity=0.5),
        "bias": vitreg.AttentionBias.calibrate(vit, [images(vit)], vitreg.RegisterNeurons.of(NEURONS)),
        "in-painting": vitreg.Inpainting(layer=0, threshold=float(norms.quantile(0.8))),
        "projection": vitreg.Projection(vitreg.RegisterNeurons(()), torch.eye(1, 32), torch.zeros(32)),
        "shift average": vitreg.ShiftAverage(views=2),
        "positions": vitreg.PositionRepair.calibrate(vit, patches=[3]),
    }


def seen(vit: vitreg.Backbone) -> list[Tensor]:
    """The model's answer, and all that a trace records of the pass."""
    inside = vitreg.trace(vit, neurons=True, attention="full", qkv=True, layers=[1])
    with evaluating(vit.model), inside, vitreg.trace(vit, residuals=True, embedding=True) as t:
        output = vit(images(vit))
    names = ("neurons", "attention", "q", "k", "v")
    return [output, t.residuals, t.embedding, *(getattr(inside, name) for name in names)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(
        x.shape == y.shape and torch.allclose(x, y, atol=1e-4, rtol=1e-4)
        for x, y in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_signature_is_read_fixed_and_set_free(name: str) -> None:
    vit, reference = signed(name), plain()
    before = seen(vit)
    assert equal(before, seen(reference))
    for kind, fix in fixes().items():
        with fix.applied_to(reference):
            expected = seen(reference)
        assert not equal(expected, before), kind  # the fix does something
        with fix.applied_to(vit):
            assert equal(seen(vit), expected), kind
            assert len(vit.model.state_dict()) == len(reference.model.state_dict())
        assert all(torch.equal(x, y) for x, y in zip(seen(vit), before, strict=True)), kind


# -- every way to nest, in and out -----------------------------------------------------------------

Nest = tuple[Any, ...]  # the path to the stream in what is built
NESTS: list[Nest] = [(), (0,), ("x",), (1, 0), ("state", 2), (0, "x", 1)]


def nested(x: Tensor, path: Nest, kind: type) -> Any:
    """Lists (or tuples) and dicts, with other things before the stream, which is at the path."""
    if not path:
        return x
    inner = nested(x, path[1:], kind)
    if isinstance(path[0], str):
        return {"other": None, path[0]: inner}
    return kind([*["other"] * path[0], inner])


def at(value: Any, path: Nest) -> Tensor:
    for key in path:
        value = value[key]
    return value


@pytest.mark.parametrize("taken", NESTS, ids=str)
def test_every_nesting_is_read_and_fixed(taken: Nest) -> None:
    reference, fix = plain(), vitreg.TestTimeRegisters(NEURONS, registers=2)
    before = seen(reference)
    with fix.applied_to(reference):
        expected = seen(reference)
    for given in NESTS:
        number = NESTS.index(given) + NESTS.index(taken)
        kind, keyword = (list, tuple)[number % 2], number % 3 == 0
        signature = Signature(
            partial(_call, taken, kind, keyword),
            lambda given: at(given, taken),
            lambda y, x, given=given, kind=kind: nested(y, given, kind),
            partial(at, path=given),
        )
        vit = vitreg.wrap(signature.wrapped(reference.model))
        stream = vit.anatomy.stream
        assert (stream.argument.name, stream.argument.path, stream.returned) == ("given", taken, given)
        with fix.applied_to(vit):
            assert equal(seen(vit), expected)
        assert equal(seen(vit), before)


def _call(path: Nest, kind: type, keyword: bool, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = nested(x, path, kind)
    return ((), {"given": given}) if keyword else ((given,), {})


# -- blocks that keep tokens before images themselves ----------------------------------------------


def cures(vit: vitreg.Backbone) -> dict[str, Fix]:
    return {
        "registers": vitreg.TestTimeRegisters(NEURONS, registers=2, initial="prenorm"),
        "splitting": vitreg.TokenSplitting(MARKED, capacity=0.5),
        "bias": vitreg.AttentionBias.calibrate(vit, [images(vit)], vitreg.RegisterNeurons.of(NEURONS)),
    }


def test_tokens_first_inside_and_out() -> None:
    vit, today = sequence_first_clip()
    stream = vit.anatomy.stream
    assert stream.tokens_first
    assert stream.neurons_tokens_first
    assert vit.layout == today.layout
    before = seen(vit)
    assert equal(before, seen(today))
    for kind, fix in cures(today).items():
        with fix.applied_to(today):
            expected = seen(today)
        assert not equal(expected, before), kind
        with fix.applied_to(vit):
            assert equal(seen(vit), expected), kind
        assert all(torch.equal(x, y) for x, y in zip(seen(vit), before, strict=True)), kind
    assert cures(vit)["bias"].tensors["keys"].allclose(cures(today)["bias"].tensors["keys"], atol=1e-5)


def test_what_is_planted_is_found_whatever_the_signature() -> None:
    """Planting and finding read and write the stream, neurons and projections by hooks of their own."""
    vit, today = sequence_first_clip()
    photos = [crops(today, 12, 0)]
    found = []
    for each in (vit, today):
        phantom = vitreg.plant(each, photos, 1)
        report = vitreg.diagnose(phantom.vit, photos)
        assert report.has_artifacts
        neurons = vitreg.find_register_neurons(phantom.vit, photos, report=report)
        origin = vitreg.find_origin(phantom.vit, photos, report)
        found.append((report.onset_layer, neurons.by_layer, str(origin)))
    assert found[0] == found[1]


# -- copies, gradients, graphs ---------------------------------------------------------------------

FEW = ["keywords only", "list", "nested", "sequence first", "output class"]


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_copies_carry_the_fix(name: str) -> None:
    vit, fix = signed(name), vitreg.TestTimeRegisters(NEURONS)
    twin = vit.with_model(fix.bake(vit.model), "twin")
    before = vit(images(vit))
    with fix.applied_to(vit):
        assert torch.equal(twin(images(vit)), vit(images(vit)))
    vitreg.applied(twin.model)[0].undo()
    assert torch.equal(twin(images(vit)), before)


@pytest.mark.parametrize("name", FEW)
def test_gradients_with_and_without_checkpointing(name: str) -> None:
    vit = signed(name)
    with vitreg.TestTimeRegisters(NEURONS, registers=2).applied_to(vit):
        found = []
        for again in (False, True):
            vit.model.zero_grad()
            hooked(vit.model) if again else None
            vit(images(vit)).square().sum().backward()
            found.append([p.grad.clone() for p in vit.model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def hooked(model: nn.Module) -> None:
    """Every block is computed again in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    class Again(type(model.blocks)):
        def forward(self, x: Tensor) -> Tensor:
            for block in self:
                args, kwargs = self.signature.call(x)
                x = self.signature.keep(checkpoint(block, *args, use_reentrant=False, **kwargs))
            return x

    model.blocks.__class__ = Again


@pytest.mark.slow
@pytest.mark.parametrize("name", ["list", "sequence first"])
@torch.no_grad()
def test_compiled_as_one_graph(name: str) -> None:
    vit = signed(name)
    with vitreg.TestTimeRegisters(NEURONS, registers=2).applied_to(vit):
        expected = vit(images(vit))
        torch._dynamo.reset()
        compiled = torch.compile(vit.model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images(vit)), expected)


# -- what is refused -------------------------------------------------------------------------------


def plain_of_lists() -> nn.Module:
    """As Meta's DINOv3: blocks are handed the crops of one pass in a list, of one image as well."""
    model = copy.deepcopy(plain().model)
    block, whole = type(model.blocks[0]), type(model)

    class Listed(block):
        def forward(self, xs: Tensor | list[Tensor]) -> Any:
            if isinstance(xs, Tensor):
                return super().forward(xs)
            return [super(Listed, self).forward(x) for x in xs]

    class OfCrops(whole):
        def forward(self, crops: Tensor | list[Tensor]) -> Any:
            if isinstance(crops, Tensor):
                return self.forward([crops])[0]
            xs = [self.norm_pre(self._pos_embed(self.patch_embed(crop))) for crop in crops]
            for block in self.blocks:
                xs = block(xs)
            return [self.forward_head(self.norm(x)) for x in xs]

    for each in model.blocks:
        each.__class__ = Listed
    model.__class__ = OfCrops
    return model


def test_several_crops_in_one_pass_are_refused() -> None:
    vit = vitreg.wrap(plain_of_lists(), image_size=32)
    two = [images(plain()), images(plain(), 4, seed=1)]
    assert len(vit.model(two)) == 2
    with (
        vitreg.trace(vit),
        pytest.raises(UnsupportedModelError, match=r"gives back 2 tensors of tokens.*one size"),
    ):
        vit.model(two)
    with vitreg.TestTimeRegisters(NEURONS).applied_to(vit):
        with pytest.raises(UnsupportedModelError, match="is given 2 tensors of tokens, and it was 1"):
            vit.model(two)
        vit(images(plain()))  # the model is as it was
    assert len(vit.model(two)) == 2


def test_a_block_of_lists_may_be_called_with_a_tensor() -> None:
    vit, fix = vitreg.wrap(plain_of_lists(), image_size=32), vitreg.TestTimeRegisters(NEURONS)
    x = torch.randn(2, 17, 32)
    with fix.applied_to(vit), torch.no_grad():
        (listed,) = vit.model.blocks[0]([x])
        assert torch.equal(vit.model.blocks[0](x), listed)


class Streams(nn.Module):
    """Blocks that hand on a second tensor of tokens, in front of the stream: what `beside` makes of it."""

    def __init__(self, start: Callable[[Tensor], Tensor], beside: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.start = copy.deepcopy(plain().model), start

        class Two(type(self.inner.blocks[0])):
            def forward(self, residual: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
                return beside(residual, hidden), super().forward(hidden)

        for block in self.inner.blocks:
            block.__class__ = Two

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.inner._pos_embed(self.inner.patch_embed(images))
        residual = self.start(hidden)
        for block in self.inner.blocks:
            residual, hidden = block(residual, hidden)
        return self.inner.forward_head(self.inner.norm(hidden))


BESIDE = {
    "the first tokens, as they were": (lambda x: x.clone(), lambda first, x: first),
    "a clock, the same for all images": (torch.zeros_like, lambda clock, x: clock + 1),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_handed_on_beside_the_stream_is_not_taken_for_it(name: str) -> None:
    vit = vitreg.wrap(Streams(*BESIDE[name]), image_size=32)
    assert (vit.anatomy.stream.argument.name, vit.anatomy.stream.returned) == ("hidden", (1,))
    assert equal(seen(vit), seen(plain()))


def test_of_two_streams_none_is_chosen() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"they hand on 2 tensors.*residual and hidden.*cannot be told"
    ):
        vitreg.wrap(Streams(torch.clone, lambda sums, x: sums + x), image_size=32)


def test_an_mlp_over_the_tokens_of_all_images_is_refused() -> None:
    model = copy.deepcopy(plain().model)
    mlp = type(model.blocks[0].mlp)

    class Flat(mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(0, 1)).view_as(x)

    for block in model.blocks:
        block.mlp.__class__ = Flat
    with pytest.raises(
        UnsupportedModelError, match=r"tokens of all images in one row \('mlp.fc2' gives \(51, 32\)\)"
    ):
        vitreg.wrap(model)


def test_a_call_without_the_stream_says_so() -> None:
    vit = signed("keywords only")
    with vitreg.TestTimeRegisters(NEURONS).applied_to(vit):
        with pytest.raises(UnsupportedModelError, match="without the argument 'hidden'"):
            vit.model.blocks[0](mask=None)
        with pytest.raises(UnsupportedModelError, match="is given a str where the residual stream was"):
            vit.model.blocks[0](mask=None, hidden="x")
