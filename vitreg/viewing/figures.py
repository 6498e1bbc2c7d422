"""The pictures of a Look: all in one, layer by layer, what patches are like, where tokens look.

Norms are given as multiples of the median in their photo, attention as multiples of what each patch would get
if all got the same: so models of other widths and grids can be compared.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from matplotlib.colors import LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure

from vitreg.diagnosis.wording import kind_of_query
from vitreg.plots.style import NORM_COLOURS, SHARE_COLOURS, house_style, mark_phantom
from vitreg.viewing.colours import feature_colours, layer_colours
from vitreg.viewing.grid import Legend, Panel, Row, Scale, grid_figure
from vitreg.viewing.patches import PatchName, cosines_to, patch_of, same_place, title_of
from vitreg.viewing.wording import sentence, what_judged

if TYPE_CHECKING:
    from vitreg.viewing.result import Look, LookVersion

# The most layers in one picture; of more, so many are spread evenly.
LAYERS = 12


@house_style
def overview(look: "Look", *, together: bool = False, foreground: bool = False) -> Figure:
    """A row for each photo and version: the photo with its artifacts outlined, the norms of the patches where
    artifacts show best, their features as colours, and where CLS looks in the last block."""
    photos, versions = range(len(look.names)), look.versions
    colours = feature_colours(look, together=together, foreground=foreground)
    norms = _norm_scale([relative_norms(v, p, _shown_block(look, v)) for v in versions for p in photos])
    attention = _attention_scale([relative_attention(v, p, -1) for v in versions for p in photos])
    rows = []
    for photo in photos:
        for version, pictures in zip(versions, colours, strict=True):
            block, last = _shown_block(look, version), len(version.diagnosis.layers) - 1
            panels = [
                Panel(version.photos[photo].photo),
                Panel(relative_norms(version, photo, block), norms, f"after block {block}"),
                Panel(pictures[photo]),
                Panel(relative_attention(version, photo, last), attention, f"block {last}"),
            ]
            rows.append(_row(look, version, photo, panels))
    of = "all photos" if together and len(photos) > 1 else "the photo"
    titles = ["photo, artifacts outlined", "norms of the patches", f"features: PCA of {of}", _source(look)]
    words = Legend(2, 2, None, "like colours, like features")
    figure = grid_figure(_text(look), titles, rows, [Legend(1, 1, norms), words, Legend(3, 3, attention)])
    return _marked(figure, look)


@house_style
def layers_figure(look: "Look", photo: int) -> Figure:
    """One photo through the blocks: for each version a row of norms, of features where those of all layers
    were asked for, and of attention."""
    shown = {version.name: _spread(len(version.diagnosis.layers)) for version in look.versions}
    maps = [(version, photo, block) for version in look.versions for block in shown[version.name]]
    norms = _norm_scale([relative_norms(*one) for one in maps])
    attention = _attention_scale([relative_attention(*one) for one in maps])
    rows = []
    for version in look.versions:
        blocks = shown[version.name]
        parts = {
            "norms": [Panel(relative_norms(version, photo, i), norms, str(i)) for i in blocks],
            "features": [Panel(x, None, str(i)) for i, x in layer_colours(version, photo, blocks).items()],
            "attention": [Panel(relative_attention(version, photo, i), attention, str(i)) for i in blocks],
        }
        rows += [_row(look, version, photo, panels, name) for name, panels in parts.items() if panels]
    columns = max(map(len, shown.values()))
    half = columns // 2
    bars = [
        Legend(0, max(half - 1, 0), norms),
        Legend(min(half + columns % 2, columns - 1), columns - 1, attention),
    ]
    order = f"From above: {', then '.join(version.label for version in look.versions)}. Numbers are blocks."
    return _marked(grid_figure([*_text(look, photo), order], [""] * columns, rows, bars), look)


@house_style
def similarity_figure(look: "Look", patches: Sequence[PatchName], photo: int) -> Figure:
    """For each version the photo, and for each patch (framed) how alike all others are to it: the cosine of
    their features, after the final norm."""
    first, rows = look.versions[0], []
    scale = Scale(Normalize(-0.2, 1), "cividis", "cosine of features")
    for version in look.versions:
        panels = [Panel(version.photos[photo].photo)]
        for name in patches:
            here = patch_of(name, photo, first)
            patch = same_place(here, first.diagnosis.grid, version.diagnosis.grid)
            panels.append(Panel(cosines_to(version.last[photo], patch), scale, "", patch))
        rows.append(_row(look, version, photo, panels))
    titles = ["photo, artifacts outlined", *(f"like {title_of(name)}" for name in patches)]
    return _marked(grid_figure(_text(look, photo), titles, rows, [Legend(1, len(patches), scale)]), look)


@house_style
def attention_figure(look: "Look", photo: int) -> Figure:
    """For each version the photo, and where each token that was asked for looks in the last block."""
    names = list(look.versions[0].attended)
    if not names:
        raise ValueError("no token was asked for: look(vit, photos, queries=['CLS', (3, 4)]).")
    maps = {v.name: [v.attended[n][photo] * v.attended[n][photo].size for n in names] for v in look.versions}
    scale = _attention_scale([one for of_version in maps.values() for one in of_version])
    rows = []
    for version in look.versions:
        panels = [
            Panel(values, scale, "", version.asked[name][photo])
            for name, values in zip(names, maps[version.name], strict=True)
        ]
        rows.append(_row(look, version, photo, [Panel(version.photos[photo].photo), *panels]))
    titles = ["photo, artifacts outlined", *(f"attention of {name}" for name in names)]
    return _marked(grid_figure(_text(look, photo), titles, rows, [Legend(1, len(names), scale)]), look)


def relative_norms(version: "LookVersion", photo: int, layer: int) -> Float[np.ndarray, "gh gw"]:
    """Patch norms after a block over their median in the photo."""
    norms = version.photos[photo].norms[layer]
    relative: np.ndarray = norms / max(float(np.median(norms)), 1e-12)
    return relative


def relative_attention(version: "LookVersion", photo: int, layer: int) -> Float[np.ndarray, "gh gw"]:
    """The attention to each patch in a block, 1 where it gets as much as the mean patch."""
    shares = version.photos[photo].attention[layer]
    relative: np.ndarray = shares * shares.size
    return relative


def _norm_scale(maps: Sequence[Float[np.ndarray, "..."]]) -> Scale:
    """One logarithmic scale for all, from half the median or less to twice or more."""
    low, high = min(float(x.min()) for x in maps), max(float(x.max()) for x in maps)
    return Scale(
        LogNorm(max(min(low, 0.5), 1e-3), max(high, 2.0)), NORM_COLOURS, "x the photo's median (log)"
    )


def _attention_scale(maps: Sequence[Float[np.ndarray, "..."]]) -> Scale:
    """One scale of square roots for all."""
    most = max(float(x.max()) for x in maps)
    return Scale(PowerNorm(0.5, 0, max(most, 1.0)), SHARE_COLOURS, "x the mean patch's (square root)")


def _shown_block(look: "Look", version: "LookVersion") -> int:
    """The block after which norms are shown: one for a model as it is and with its fix."""
    return look.unfixed(version).diagnosis.detect_layer


def _row(look: "Look", version: "LookVersion", photo: int, panels: Sequence[Panel], name: str = "") -> Row:
    high, wide = version.photos[photo].photo.shape[:2]
    artifacts, former = version.outliers(photo), look.unfixed(version).outliers(photo)
    alarming = version.diagnosis.has_artifacts
    return Row(name or version.label, panels, (high, wide), artifacts, former, alarming)


def _spread(depth: int) -> list[int]:
    """All layers, or some from the first to the last."""
    return sorted({round(x) for x in np.linspace(0, depth - 1, min(depth, LAYERS))})


def _text(look: "Look", photo: int | None = None) -> list[str]:
    """What is seen in one photo, or in the only one; of several photos, the verdicts."""
    photo = 0 if len(look.names) == 1 else photo
    if photo is None:
        lines = [f"{version.label}: {version.diagnosis.verdict}" for version in look.versions]
    else:
        lines = [sentence(look, version, photo, named=False) for version in look.versions]
    return [*lines, what_judged(look)]


def _source(look: "Look") -> str:
    return f"{kind_of_query(look.versions[0].diagnosis.attention_queries)} attention"


def _marked(figure: Figure, look: "Look") -> Figure:
    mark_phantom(figure, look.planted)
    return figure
