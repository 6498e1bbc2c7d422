"""The sink goes where one puts it: exactly the chosen patches become outliers."""

from dataclasses import replace

import matplotlib.image
import pytest
import torch
from catalog import CATALOG, images
from looking import footprint, same, tensors
from phantoms import crops

import vitreg
from vitreg.diagnosis.figures import png
from vitreg.errors import FixError
from vitreg.fixes import TokenSplitting
from vitreg.fixes.neurons import RegisterNeurons
from vitreg.fixes.shift_sink import ShiftSink
from vitreg.phantoms.phantom import plant
from vitreg.studies.grid_pictures import V, drawn
from vitreg.studies.shift_figures import shift_figure

NEURONS = RegisterNeurons.of({0: [1, 5], 1: [7]})
PLACES = [(0, 1), (2, 3)]


def norms(vit: vitreg.Backbone, batch: torch.Tensor, layer: int) -> torch.Tensor:
    """(b, gh, gw) after a block."""
    with torch.no_grad(), vitreg.trace(vit, layers=[layer]) as t:
        vit(batch)
    return t.layout.as_grid(t.norms[0][:, t.layout.patch_slice])


@pytest.mark.parametrize("name", CATALOG)
def test_neurons_fire_at_the_places_alone_with_each_images_own_peak(name):
    vit = CATALOG[name].backbone()
    batch, start = images(vit, 3), vit.layout.patch_slice.start
    before, left = tensors(vit(batch)), footprint(vit.model)
    entering = _entering_the_down_projection(vit, batch, 0)
    with ShiftSink(NEURONS, places=PLACES).applied_to(vit):
        seen = _entering_the_down_projection(vit, batch, 0, after_edit=True)
        together = tensors(vit(batch))
        assert list(vit.model.state_dict()) == [key for key, _ in left[1]]
    expected = entering.clone()
    for neuron in (1, 5):
        peak = entering[:, :, neuron].amax(1)
        expected[:, :, neuron] = 0
        for row, column in PLACES:
            expected[:, start + row * vit.layout.grid[1] + column, neuron] = peak
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)
    assert not same(together, before)
    assert same(vit(batch), before)
    assert footprint(vit.model) == left


def _entering_the_down_projection(vit, batch, layer, after_edit=False):
    """What F.linear of the down-projection gets: with the edit, which no hook can see."""
    import torch.nn.functional as F
    from torch.overrides import TorchFunctionMode

    weight, found = vit.anatomy.down_projections(vit.model)[layer].weight, []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.linear and len(args) > 1 and args[1] is weight:
                found.append(args[0])
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Mode():
        vit(batch)
    return found[0]


def test_batch_mates_do_not_matter():
    vit = CATALOG["timm vit"].backbone()
    batch = images(vit, 3)
    with torch.no_grad(), ShiftSink(NEURONS, places=PLACES).applied_to(vit):
        torch.testing.assert_close(vit(batch[1:2]), vit(batch)[1:2], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled():
    vit = CATALOG["timm dinov3"].backbone()
    batch = images(vit, 2)
    compiled = torch.compile(vit.model, fullgraph=True, backend="eager")
    with torch.no_grad():
        plain = compiled(batch)
        with ShiftSink(NEURONS, places=PLACES).applied_to(vit):
            torch.testing.assert_close(compiled(batch), vit.model(batch))
            assert not torch.allclose(compiled(batch), plain, atol=1e-3)
        torch.testing.assert_close(compiled(batch), plain)


def test_places_are_pairs_or_a_mask():
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, 1] = mask[2, 3] = True
    assert ShiftSink(NEURONS, places=mask) == ShiftSink(NEURONS, places=PLACES)
    assert ShiftSink(NEURONS, places=mask).places == ((0, 1), (2, 3))
    assert hash(ShiftSink(NEURONS, places=mask)) == hash(ShiftSink(NEURONS, places=PLACES))


def test_a_drawing_is_in_the_middle():
    assert drawn(["##", "#"], (4, 6)).nonzero().tolist() == [[1, 2], [1, 3], [2, 2]]
    assert drawn(V, (14, 14)).sum() == 13
    with pytest.raises(ValueError, match="does not fit"):
        drawn(V, (4, 14))


def test_wrong_places():
    vit = CATALOG["timm vit"].backbone()
    with pytest.raises(ValueError, match="no places"):
        ShiftSink(NEURONS)
    with pytest.raises(FixError, match="outside of the model's grid of 4x5"):
        ShiftSink(NEURONS, places=[(0, 5)]).apply(vit)
    flexible = CATALOG["hf dinov2"].backbone()
    with (
        ShiftSink(NEURONS, places=[(0, 0)]).applied_to(flexible),
        pytest.raises(FixError, match="grid of 20 patches, and an image has 24"),
    ):
        flexible(torch.rand(1, 3, 32, 48))


@pytest.mark.parametrize("name", ["timm vit", "timm dinov3", "hf clip", "open_clip vit"])
def test_a_phantoms_sink_goes_where_it_is_put(name):
    vit = CATALOG[name].backbone()
    photos = crops(vit, 96, 0)
    phantom = plant(vit, photos, 1)
    marked = phantom.marked(photos).flatten(1).any(1)
    some = photos[marked][:8]  # images that have a sink to move
    threshold = vitreg.diagnose(phantom.vit, [photos]).layers[1].threshold
    chosen = torch.zeros(phantom.vit.layout.grid, dtype=torch.bool)
    chosen[1, 2] = chosen[3, 3] = True
    neurons = RegisterNeurons.of({1: list(phantom.neurons)})
    with ShiftSink(neurons, places=chosen).applied_to(phantom.vit):
        found = norms(phantom.vit, some, 1) >= threshold
    assert torch.equal(found, chosen.expand_as(found))


# -- the real model, and the figure ----------------------------------------------------------------


@pytest.fixture(scope="module")
def vit_ti(shared) -> vitreg.Backbone:
    return vitreg.load(str(shared / "models/vit_tiny_patch16_224.augreg_in21k_ft_in1k"))


@pytest.mark.parametrize("places", [[(6, 6)], [(0, 5), (13, 2)], drawn(V, (14, 14))], ids=["one", "two", "V"])
def test_vit_ti_has_its_outliers_where_they_are_put(shared, vit_ti, places):
    photos = next(iter(vitreg.read_images(shared / "data/imagenet-sample-1000", vit_ti, limit=4))).pixels
    fix = ShiftSink(RegisterNeurons.of({7: [417]}), places=places)
    chosen = torch.zeros(14, 14, dtype=torch.bool)
    chosen[tuple(zip(*fix.places, strict=True))] = True
    with fix.applied_to(vit_ti):
        found = norms(vit_ti, photos, 11) > 60
    assert torch.equal(found, chosen.expand_as(found))


def test_the_figure_shows_the_sink_in_its_new_place():
    vit = CATALOG["timm vit"].backbone()
    photos = crops(vit, 96, 0)
    phantom = plant(vit, photos, 1)
    neurons = RegisterNeurons.of({1: list(phantom.neurons)})
    image = photos[phantom.marked(photos).flatten(1).any(1)][0]
    figure = shift_figure(phantom.vit, image, neurons, {"to the left": [(2, 0)], "to a corner": [(3, 4)]})
    photo, before, left, corner, *_ = figure.axes
    assert photo.get_title(loc="left") == "photo"
    assert left.get_title(loc="left") == "moved to the left"
    shown = [ax.images[0] for ax in (before, left, corner)]
    assert len({(picture.norm.vmin, picture.norm.vmax) for picture in shown}) == 1
    assert divmod(int(shown[1].get_array().argmax()), 5) == (2, 0)
    assert divmod(int(shown[2].get_array().argmax()), 5) == (3, 4)
    assert "phantom" in figure._supxlabel.get_text()


def test_the_figure_can_be_saved(tmp_path):
    vit = CATALOG["timm vit"].backbone()
    figure = shift_figure(vit, images(vit, 1)[0], NEURONS, {})
    (tmp_path / "shift.png").write_bytes(png(figure))
    assert matplotlib.image.imread(tmp_path / "shift.png").std() > 0.05


def test_a_sink_among_split_tokens_is_refused():
    """Inside of splitting a block has more tokens than the grid; outside of it, it works."""
    vit = CATALOG["timm vit"].backbone()
    marked = tuple(replace(neuron, threshold=0.1) for neuron in RegisterNeurons.of({0: [1]}).chosen)
    splitting = TokenSplitting(RegisterNeurons(marked), capacity=0.5)
    sink = ShiftSink(RegisterNeurons.of({1: [2]}), places=((0, 0),))
    with splitting.applied_to(vit), pytest.raises(vitreg.FixError, match="token splitting last"):
        sink.apply(vit)
    with sink.applied_to(vit), splitting.applied_to(vit), torch.no_grad():
        vit(images(vit, 1))
