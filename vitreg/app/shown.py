"""What each tab shows of a view: pictures, a sentence or two, and the numbers behind them.

Each function takes the explorer, a photo and the view, and returns a `Shown`. The pictures are the library's
own figures; nothing is computed here but shares of what the library has computed.
"""

import html
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image

from vitreg.app.explorer import AS_IT_IS, DISCOVERY, Explorer, Photo, ShownVersion
from vitreg.app.view import SHIFT, View, place_of
from vitreg.diagnosis.outliers import OutlierRule
from vitreg.plots.box_grid import BoxedPhoto, box_grid
from vitreg.plots.maps import norm_histogram, photo_with_patches, pictures_side_by_side, side_by_side
from vitreg.plots.principal import PrincipalColours
from vitreg.plots.style import number, percent, png, short_name
from vitreg.verification.figure import versions_figure
from vitreg.verification.verdict import measure_table
from vitreg.viewing.patches import cosines_to

DPI = 130


@dataclass(frozen=True, eq=False)
class Shown:
    """Pictures by name, a text (Markdown), and `data`, which is offered as JSON."""

    pictures: Mapping[str, Image.Image | None]
    text: str
    data: dict[str, Any] = field(default_factory=dict)

    def json(self) -> str:
        return json.dumps({"text": self.text} | self.data, default=_plain)


def norms(explorer: Explorer, photo: Photo, view: View) -> Shown:
    """The photo with the tokens over the threshold lit, their map, and the histogram."""
    found = explorer.look(photo).norms[view.layer]
    automatic = explorer.report.layers[view.layer].threshold
    threshold = automatic if view.threshold is None else view.threshold
    mask = OutlierRule(view.layer, math.inf if threshold is None else threshold).mask(found)
    pictures = {
        "photo": picture(photo_with_patches(photo.image, mask)),
        "map": picture(
            side_by_side(
                {f"Norms after block {view.layer}": found}, "norms", mask, shape=photo.image.shape[:2]
            )
        ),
        "histogram": picture(norm_histogram(found, threshold, explorer.norm_axis)),
    }
    counted = f"**{mask.sum()} of {mask.size} patches ({percent(float(mask.mean()))})**"
    own = (
        "In this layer no second population of norms is an artifact: the diagnosis sets no threshold."
        if automatic is None
        else f"The diagnosis of {explorer.report.images} images puts it at {number(automatic)} here."
    )
    over = "" if threshold is None else f" have norms of {number(threshold)} or more after block {view.layer}"
    text = f"{counted}{over or ' are over a threshold'}. {own}"
    return Shown(pictures, text, _data(photo, view, norms=found, threshold=threshold, over=mask))


def attention(explorer: Explorer, photo: Photo, view: View) -> Shown:
    """Where one token looks, before and after the fix, with one colour scale."""
    outliers, chosen = explorer.outliers(photo), view.clicked
    maps, shares, words = {}, {}, []
    for name, version in versions(explorer).items():
        if view.source.startswith("register") and version is AS_IT_IS and not _has(explorer, view.source):
            continue  # a register that only the fix brings
        seen = explorer.attention(photo, view.query, version)
        maps[name] = seen.of(view.block, view.one_head)
        shares[name] = float(maps[name][outliers].sum())
        words.append(f"{name} **{percent(shares[name])}**")
    pictures = {
        "photo": picture(photo_with_patches(photo.image, outliers, chosen)),
        "maps": picture(side_by_side(maps, "attention", outliers, chosen, photo.image.shape[:2])),
    }
    text = f"Attention on the photo's {outliers.sum()} outliers, in block {view.block}: {', '.join(words)}."
    if not explorer.report.has_artifacts:
        text = "The model has no outliers that could draw attention."
    elif not outliers.any():
        text = f"Attention in block {view.block}: this photo has no outliers that could draw it."
    text = "  \n".join([text, *filter(None, [explorer.why_no_fix])])
    return Shown(pictures, text, _data(photo, view, attention=maps, on_outliers=shares, outliers=outliers))


def features(explorer: Explorer, photo: Photo, view: View) -> Shown:
    """The patches' features as colours, and how like the chosen patch each is, before and after the fix."""
    outliers, size = explorer.outliers(photo), photo.image.shape[:2]
    seen = {name: explorer.features(photo, version) for name, version in versions(explorer).items()}
    colours = PrincipalColours.of_most(seen["before"], ~torch.from_numpy(outliers))
    drawn = {name: colours(one).numpy() for name, one in seen.items()}
    alike = {name: cosines_to(one, view.like) for name, one in seen.items()}
    pictures = {
        "photo": picture(photo_with_patches(photo.image, outliers, view.like)),
        "colours": picture(pictures_side_by_side(drawn, outliers, view.like, size)),
        "alike": picture(side_by_side(alike, "similarity", outliers, view.like, size)),
    }
    row, column = view.like
    text = (
        "Above, the patches' features in the last layer as colours (their first three principal components):"
        f" like colours, like features. Below, how alike each patch is to that in row {row}, column {column}:"
        " the cosine of their features. Click the photo to compare with another patch."
    )
    text = "  \n".join([text, *filter(None, [explorer.why_no_fix])])
    return Shown(pictures, text, _data(photo, view, colours=drawn, cosines=alike, outliers=outliers))


def neurons(explorer: Explorer, photo: Photo, view: View) -> Shown:
    """Norms, attention and prediction without and with the neurons that are switched on."""
    version = switched(explorer, view)
    place = view.patch if view.does == SHIFT else None
    detect, last = explorer.report.detect_layer, explorer.vit.anatomy.depth - 1
    source, outliers = explorer.queries[0], explorer.outliers(photo)
    both = {"as it is": AS_IT_IS, "switched": version}
    looks = {name: explorer.look(photo, one) for name, one in both.items()}
    maps = {name: explorer.attention(photo, source, one).of(last) for name, one in both.items()}
    size = photo.image.shape[:2]
    pictures: dict[str, Image.Image | None] = {
        "photo": picture(photo_with_patches(photo.image, outliers, place)),
        "norms": picture(
            side_by_side({k: x.norms[detect] for k, x in looks.items()}, "norms", outliers, place, size)
        ),
        "attention": picture(side_by_side(maps, "attention", outliers, place, size)),
        "activation": None,
    }
    said = {name: look.likeliest(explorer.names) for name, look in looks.items()}
    data = _data(photo, view, norms={k: x.norms[detect] for k, x in looks.items()}, attention=maps, says=said)
    if view.watched:
        activation = explorer.activation(photo, place_of(view.watched))
        title = "Block {}, neuron {}".format(*place_of(view.watched))
        pictures["activation"] = picture(
            side_by_side({title: activation}, "activation", outliers, place, size)
        )
        data["activation"] = activation
    largest = {name: number(float(look.norms[detect].max())) for name, look in looks.items()}
    drawn = {name: percent(float(values[outliers].sum())) for name, values in maps.items()}
    text = (
        f"Largest patch norm after block {detect}: {largest['as it is']}, switched **{largest['switched']}**."
        f" Attention ({source}, block {last}) on the photo's outliers: {drawn['as it is']}, switched"
        f" **{drawn['switched']}**.\n\n{_predictions(said)}"
    )
    return Shown(pictures, text, data)


def objects(explorer: Explorer, photo: Photo, view: View) -> Shown:
    """The boxes of LOST and TokenCut, before and after the fix."""
    found = {name: explorer.boxes(photo, version) for name, version in versions(explorer).items()}
    none = np.zeros((0, 4))
    shown = [BoxedPhoto(name, photo.image, none, boxes) for name, boxes in found.items()]
    pictures = {"boxes": picture(box_grid(shown, columns=2, planted=explorer.vit.planted))}
    text = (
        "One box around the object, found without labels from the last block's keys"
        f" (as cosines, LOST with a bias of {DISCOVERY.bias})."
    )
    whole = sorted({name for boxes in found.values() for name, box in boxes.items() if _whole(box, photo)})
    if whole:
        text += f" A box around the whole photo ({', '.join(whole)}) says that no patch stood out."
    text = "  \n".join([text, *filter(None, [explorer.why_no_fix])])
    return Shown(pictures, text, _data(photo, view, boxes_xyxy=found))


def before_comparing(explorer: Explorer) -> str:
    """What will be measured."""
    missing = explorer.why_no_fix
    return missing or (
        f"The model without and with the fix, on all {explorer.report.images} images, beside four controls"
        f" (an inert token, random neurons, the neurons zeroed, the neurons at their mean). The fix:"
        f" {plain(explorer.choice)}"
    )


def compared(explorer: Explorer, photo: Photo, view: View) -> Shown:
    """The verdict where it is measured, else what would be."""
    if explorer.measured:
        return comparison(explorer)
    return Shown({"versions": None}, before_comparing(explorer), {"view": vars(view)})


def comparison(explorer: Explorer, progress: Callable[[str], None] | None = None) -> Shown:
    """The verdict on the fix, measured now if it was not before."""
    verdict = explorer.verdict(progress)
    if verdict is None or not verdict.measures:
        return Shown(
            {"versions": None}, before_comparing(explorer) if verdict is None else plain(verdict.reason)
        )
    heads, rows = measure_table(verdict)
    reason = plain(verdict.reason[:1].upper() + verdict.reason[1:])
    text = f"The fix: **{verdict.verdict}**. {reason}\n\n" + "\n\n".join(verdict.footnotes())
    data = {"table": {"headers": heads, "data": rows}, "verdict": verdict.to_json()}
    return Shown({"versions": picture(versions_figure(verdict))}, text, data)


def versions(explorer: Explorer) -> dict[str, ShownVersion]:
    """The model before, and after the fix if there is one."""
    return {"before": AS_IT_IS} | ({"after": explorer.fixed} if explorer.fixed else {})


def switched(explorer: Explorer, view: View) -> ShownVersion:
    """The model with the neurons that the view has switched on."""
    if view.does == SHIFT:
        return explorer.shifted(view.places, view.patch)
    return explorer.switched(view.places, view.registers)


def headline(explorer: Explorer) -> str:
    """Model and verdict, as Markdown."""
    report = explorer.report
    reason = plain(report.reason[:1].upper() + report.reason[1:])
    found = f"**{plain(short_name(report.model))}: {report.verdict}.** {reason}"
    others = [f"**{plain(x.title)}.** {plain(str(x))}" for x in report.other_artifacts]
    found = "\n\n".join([found, *others])
    if not report.planted:
        return found
    return f"**A phantom: its artifacts were planted.** It is no evidence about a real model.\n\n{found}"


def picture(figure: Figure) -> Image.Image:
    """A figure as the page shows it."""
    return Image.open(io.BytesIO(png(figure, dpi=DPI)))


def _whole(box: Float[np.ndarray, "4"], photo: Photo) -> bool:
    high, wide = photo.image.shape[:2]
    return bool(box.tolist() == [0, 0, wide, high])


def _has(explorer: Explorer, register: str) -> bool:
    return int(register.split()[1]) < explorer.vit.layout.registers


def _predictions(said: Mapping[str, Sequence[tuple[str, float]]]) -> str:
    """What the head says, side by side, as a Markdown table."""
    if not any(said.values()):
        return "The model has no head that would predict a class."
    rows = zip(*said.values(), strict=True)
    lines = [" | ".join(f"{plain(name)} {percent(chance)}" for name, chance in row) for row in rows]
    return "\n".join(["| " + " | ".join(said) + " |", "|" + "---|" * len(said), *(f"| {x} |" for x in lines)])


def plain(words: str) -> str:
    """Text from outside, harmless in Markdown and in a table of it."""
    return html.escape(words).translate({ord(c): f"&#{ord(c)};" for c in "|*_`[]\\"})


def _data(photo: Photo, view: View, **arrays: Any) -> dict[str, Any]:
    return {"photo": photo.name, "view": vars(view), **arrays}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON.")
