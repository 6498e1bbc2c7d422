"""The page: components, and which of them changes what. What is shown comes from shown.py.

    page = build(explorer)                       # a gradio.Blocks
    page.launch(**LAUNCH)

Every tab has a function that draws it from the choices of all tabs (a View), and is drawn when it is opened,
when the photo changes, and when one of its own controls does. What a user has chosen is in the components of
their own page and in their address, never here.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from vitreg.app import parts, shown
from vitreg.app.explorer import Explorer
from vitreg.app.shown import Shown
from vitreg.app.view import MEAN, MOST_REGISTERS, OWN, REGISTERS, SHIFT, View, name_of
from vitreg.errors import ImageError, MissingExtraError, VitregError
from vitreg.fixes.neurons import RegisterNeuron
from vitreg.plots.maps import Patch
from vitreg.plots.style import number

try:
    import gradio as gr
except ImportError as error:
    raise MissingExtraError("gradio", "app") from error

# Fonts of the user's own machine, so that the page needs no network; no telemetry.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
FOLDER = Path(__file__).parent
LAUNCH: dict[str, Any] = {"theme": THEME, "css_paths": FOLDER / "page.css", "footer_links": []}
HEAD = "vitreg: attention artifacts"
_ADDRESS = "address => { if (address) history.replaceState(null, '', address) }"
_PASTE = (FOLDER / "paste.js").read_text(encoding="utf-8")
_PRIVATE: dict[str, Any] = {"api_visibility": "private"}
_QUIET: dict[str, Any] = {"show_progress": "hidden", **_PRIVATE}  # done before a sign of it could be read


@dataclass(frozen=True)
class Tab:
    """One tab: what draws it, its pictures in the order of `show`'s, its text, and its button for data."""

    name: str
    show: Callable[..., Shown]
    tab: Any
    pictures: dict[str, Any]
    text: Any
    button: Any
    file: Any


def build(explorer: Explorer) -> Any:
    """The page of an explorer, as gradio.Blocks to launch, to mount, or to share as a Space."""
    with gr.Blocks(title=HEAD, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {HEAD}\n\n{shown.headline(explorer)}", elem_id="headline")
        chosen: dict[str, Any] = {"tab": gr.State("norms"), "photo": gr.State(None)}
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                gallery, upload, message = _photos(explorer)
            with gr.Column(scale=3, min_width=320), gr.Tabs() as tabs:
                drawn = [_norms(explorer, chosen), _attention(explorer, chosen)]
                drawn += [
                    _features(explorer, chosen),
                    _neurons(explorer, chosen),
                    _objects(),
                    _compare(explorer),
                ]
        address = gr.Textbox(
            label="Address of this view, to share", interactive=False, buttons=["copy"], elem_id="address"
        )
        ready = gr.State("")
        inputs = [chosen[f.name] for f in fields(View)]
        for tab in drawn:
            triggers = [ready, *(chosen[name] for name in ("tab", "photo", *OWN[tab.name]))]
            _draw_when(explorer, tab, inputs, triggers, address)
            tab.tab.select(partial(str, tab.name), None, chosen["tab"], **_QUIET)
        _choose_photos(explorer, gallery, upload, message, chosen["photo"])
        _restore(explorer, page, tabs, chosen, inputs, ready)
        address.change(None, address, None, js=_ADDRESS, **_PRIVATE)
        page.load(None, js=_PASTE, **_PRIVATE)
    page.queue(default_concurrency_limit=4, max_size=64)
    return page


# -- parts of the page -----------------------------------------------------------------------------


def _photos(explorer: Explorer) -> tuple[Any, Any, Any]:
    gallery = gr.Gallery(
        [(photo.image, photo.name) for photo in explorer.gallery],
        label="Photos",
        columns=2,
        height="auto",
        show_label=False,
        allow_preview=False,
        buttons=[],
        elem_id="gallery",
        format="png",
    )
    upload = gr.File(
        label="Your own photo: drop, click or paste", type="filepath", height=140, elem_id="upload"
    )
    message = gr.Markdown("", elem_id="message")
    return gallery, upload, message


def _norms(explorer: Explorer, chosen: dict[str, Any]) -> Tab:
    low, high = map(math.log10, explorer.norm_axis)
    with gr.Tab("Norms", id="norms") as tab:
        text = gr.Markdown(elem_id="norms-text")
        with gr.Row():
            photo = parts.image("Photo: patches over the threshold", "norms-photo")
            shown_map = parts.image("Map of norms", "norms-map")
        chosen["layer"] = parts.layer(explorer, "Layer", "layer")
        with gr.Row():
            slider = gr.Slider(
                round(low, 2), round(high, 2), step=0.005, precision=3, buttons=[], scale=3,
                label="Threshold: drag (log10 of the norm)", elem_id="drag",
            )  # fmt: skip
            chosen["threshold"] = gr.Number(label="or type the norm", elem_id="threshold", min_width=110)
            automatic = gr.Button("Set automatically", size="sm", elem_id="automatic", min_width=130)
        histogram = parts.image("Histogram of norms", "norms-histogram")
        button, file = parts.data_button("norms")
    threshold = chosen["threshold"]
    slider.input(lambda place: round(10**place, 4), slider, threshold, **_QUIET)
    automatic.click(lambda: None, None, threshold, **_PRIVATE)
    # The slider follows what is typed, and where the diagnosis puts it.
    gr.on(
        [threshold.change, chosen["layer"].change],
        lambda norm, layer: _place(explorer, norm, layer),
        [threshold, chosen["layer"]],
        slider,
        **_QUIET,
    )
    pictures = {"photo": photo, "map": shown_map, "histogram": histogram}
    return Tab("norms", shown.norms, tab, pictures, text, button, file)


def _attention(explorer: Explorer, chosen: dict[str, Any]) -> Tab:
    rows, columns = explorer.report.grid
    with gr.Tab("Attention", id="attention") as tab:
        text = gr.Markdown(elem_id="attention-text")
        with gr.Row():
            photo = parts.image("Photo: click a patch to look from it", "attention-photo", scale=2)
            maps = parts.image("Attention", "attention-maps", scale=3)
        with gr.Row():
            chosen["source"] = gr.Radio([*explorer.queries, "patch"], label="From", elem_id="source", scale=2)
            chosen["row"] = parts.index("Row of the patch", rows, "row")
            chosen["column"] = parts.index("Column", columns, "column")
        with gr.Row():
            chosen["block"] = parts.layer(explorer, "Block", "block")
            heads = [MEAN, *map(str, range(explorer.vit.anatomy.heads))]
            chosen["head"] = gr.Dropdown(heads, label="Head", elem_id="head")
        button, file = parts.data_button("attention")
    _click(photo, explorer, lambda patch: (*patch, "patch"), [chosen[x] for x in ("row", "column", "source")])
    return Tab("attention", shown.attention, tab, {"photo": photo, "maps": maps}, text, button, file)


def _features(explorer: Explorer, chosen: dict[str, Any]) -> Tab:
    rows, columns = explorer.report.grid
    with gr.Tab("Features", id="features") as tab:
        text = gr.Markdown(elem_id="features-text")
        with gr.Row():
            with gr.Column(scale=2):
                photo = parts.image("Photo: click a patch to compare with it", "features-photo")
                with gr.Row():
                    chosen["like_row"] = parts.index("Row of the patch", rows, "like-row")
                    chosen["like_column"] = parts.index("Column", columns, "like-column")
            with gr.Column(scale=3):
                colours = parts.image("Features as colours", "features-colours")
                alike = parts.image("Likeness to the patch", "features-alike")
        button, file = parts.data_button("features")
    _click(photo, explorer, tuple, [chosen["like_row"], chosen["like_column"]])
    pictures = {"photo": photo, "colours": colours, "alike": alike}
    return Tab("features", shown.features, tab, pictures, text, button, file)


def _neurons(explorer: Explorer, chosen: dict[str, Any]) -> Tab:
    rows, columns = explorer.report.grid
    with gr.Tab("Neuron switch", id="neurons") as tab:
        text = gr.Markdown(elem_id="neurons-text")
        with gr.Row():
            norms = parts.image("Norms", "neurons-norms")
            attention = parts.image("Attention", "neurons-attention")
        chosen["neurons"] = gr.CheckboxGroup([], label="Register neurons", elem_id="neurons")
        with gr.Row():
            chosen["does"] = gr.Radio([REGISTERS, SHIFT], label="Those switched on", elem_id="does")
            chosen["registers"] = gr.Slider(
                0, MOST_REGISTERS, step=1, buttons=[], elem_id="registers",
                label="Registers (with 0, the activation is gone)",
            )  # fmt: skip
        with gr.Row():
            with gr.Column():
                photo = parts.image("Photo: click a patch, and they fire there", "neurons-photo")
                with gr.Row():
                    chosen["to_row"] = parts.index("Row", rows, "to-row")
                    chosen["to_column"] = parts.index("Column", columns, "to-column")
            with gr.Column():
                activation = parts.image("Activation", "neurons-activation")
                chosen["watched"] = gr.Dropdown([], label="Activation of", elem_id="watched")
        button, file = parts.data_button("neurons")
    where = [chosen[x] for x in ("to_row", "to_column", "does")]
    _click(photo, explorer, lambda patch: (*patch, SHIFT), where)
    pictures = {"photo": photo, "norms": norms, "attention": attention, "activation": activation}
    return Tab("neurons", shown.neurons, tab, pictures, text, button, file)


def _objects() -> Tab:
    with gr.Tab("Objects", id="objects") as tab:
        text = gr.Markdown(elem_id="objects-text")
        boxes = parts.image("Boxes of LOST and TokenCut", "objects-boxes")
        button, file = parts.data_button("objects")
    return Tab("objects", shown.objects, tab, {"boxes": boxes}, text, button, file)


def _compare(explorer: Explorer) -> Tab:
    with gr.Tab("Compare", id="compare") as tab:
        text = gr.Markdown(elem_id="compare-text")
        measure = gr.Button("Measure the fix against its controls", variant="primary", elem_id="measure")
        figure = parts.image("The versions of the model", "compare-figure")
        table = gr.Dataframe(label="Measures", interactive=False, wrap=True, elem_id="compare-table")
        button, file = parts.data_button("compare")

    def run(progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008 - how gradio asks for one
        found = shown.comparison(explorer, lambda stage: progress(None, desc=stage))
        return [found.text, found.pictures["versions"], found.data.get("table")]

    measure.click(run, None, [text, figure, table], **_PRIVATE)
    return Tab("compare", shown.compared, tab, {"versions": figure}, text, button, file)


# -- what changes what -----------------------------------------------------------------------------


def _draw_when(
    explorer: Explorer, tab: Tab, inputs: Sequence[Any], triggers: Sequence[Any], address: Any
) -> None:
    """Draw a tab when one of the triggers changes, if it is the one that is open."""
    outputs = [*tab.pictures.values(), tab.text, address]

    def draw(*values: Any) -> list[Any]:
        view = view_of(explorer, values)
        if view.tab != tab.name or None in values[:2]:  # no photo yet: the page is being opened
            return [gr.skip()] * len(outputs)
        found = _shown(explorer, tab, view)
        return [*(found.pictures[name] for name in tab.pictures), found.text, view.address()]

    options: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "minimal", **_PRIVATE}
    gr.on([trigger.change for trigger in triggers], draw, inputs, outputs, **options)
    _download(
        tab.button, tab.file, tab.name, lambda *v: _shown(explorer, tab, view_of(explorer, v)), list(inputs)
    )


def _shown(explorer: Explorer, tab: Tab, view: View) -> Shown:
    photo = explorer.photo(view.photo) or explorer.gallery[0]
    try:
        return tab.show(explorer, photo, view)
    except VitregError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error


def _download(button: Any, file: Any, name: str, make: Callable[..., Shown], inputs: list[Any]) -> None:
    """Write the data of a view when its button is pressed, and hand them to the browser."""

    def write(*values: Any) -> str:
        # In gradio's own folder, which it cleans: every file that is served lies there.
        path = Path(tempfile.mkdtemp(dir=file.GRADIO_CACHE)) / f"vitreg-{name}.json"
        path.write_text(make(*values).json(), encoding="utf-8")
        return str(path)

    click = f"() => document.querySelector('#{name}-file').click()"
    button.click(write, inputs, file, **_PRIVATE).then(None, js=click, **_PRIVATE)


def view_of(explorer: Explorer, values: Sequence[Any]) -> View:
    """The view that the components' values say. They come over the network: nothing is taken on trust."""
    said = {}
    for f, value in zip(fields(View), values, strict=True):
        if isinstance(value, list | tuple):
            said[f.name] = ",".join(map(str, value))
        elif value is not None:
            said[f.name] = f"{value:g}" if isinstance(value, float) else str(value)
    return View.of(said, explorer)


def _choose_photos(explorer: Explorer, gallery: Any, upload: Any, message: Any, photo: Any) -> None:
    def pick(event: gr.SelectData) -> tuple[str, str]:
        return str(event.index), ""

    def add(path: str | None) -> tuple[Any, str, Any]:
        if path is None:
            return gr.skip(), "", None
        try:
            added = explorer.add(path)
        except ImageError as error:
            gr.Warning(str(error), duration=8)
            return gr.skip(), f"**{shown.plain(str(error))}**", None
        finally:
            Path(path).unlink(missing_ok=True)  # of gradio's own folder
        return (
            added.key,
            f"{shown.plain(added.name)} is shown. It is not in the address: nobody else has it.",
            None,
        )

    gallery.select(pick, None, [photo, message], **_QUIET)
    upload.upload(add, upload, [photo, message, upload], **_PRIVATE)


def _click(
    photo: Any, explorer: Explorer, then: Callable[[Patch], tuple[Any, ...]], outputs: list[Any]
) -> None:
    """A click on a photo chooses the patch there."""

    def choose(image: Any, event: gr.SelectData) -> tuple[Any, ...]:
        (rows, columns), (x, y) = explorer.report.grid, event.index
        row, column = int(y * rows / image.height), int(x * columns / image.width)
        return then((min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)))

    photo.select(choose, photo, outputs, **_QUIET)


def _place(explorer: Explorer, norm: float | None, layer: float) -> float:
    """Where the slider stands for a norm, or where the diagnosis puts it."""
    threshold = norm or explorer.report.layers[int(layer)].threshold
    low, high = explorer.norm_axis
    return math.log10(min(max(threshold or high, low), high))


def _restore(
    explorer: Explorer, page: Any, tabs: Any, chosen: dict[str, Any], inputs: list[Any], ready: Any
) -> None:
    """The view of the address, when the page is opened; the neurons, as soon as they are found."""
    asked, timer = gr.State({}), gr.Timer(1.0, active=False)
    late = [chosen[name] for name in ("neurons", "watched", "source")]
    filled = [component for component in inputs if component is not chosen["photo"]]

    def components(said: dict[str, str]) -> dict[str, Any]:
        view = View.of(said, explorer)
        found = [
            (_described(neuron), name_of((neuron.layer, neuron.index))) for neuron in explorer.candidates
        ]
        known = {f.name: getattr(view, f.name) for f in fields(View)}
        return known | {
            "neurons": gr.CheckboxGroup(found, value=list(view.neurons)),
            "watched": gr.Dropdown(found, value=view.watched or None),
            "source": gr.Radio([*explorer.queries, "patch"], value=view.source),
        }

    def open_page(request: gr.Request) -> list[Any]:
        said = dict(request.query_params)
        opened = components(said)
        opened.pop("photo")
        return [said, gr.Tabs(selected=opened["tab"]), gr.Timer(active=True), *opened.values()]

    def look_again(said: dict[str, str]) -> list[Any]:
        if not explorer.ready:
            return [gr.skip()] * (1 + len(late))
        found = components(said)
        return [gr.Timer(active=False), found["neurons"], found["watched"], found["source"]]

    def state() -> str:
        return "with neurons" if explorer.ready else "without neurons"

    def begin(said: dict[str, str]) -> tuple[str, str]:
        return state(), View.of(said, explorer).photo

    opened = page.load(open_page, None, [asked, tabs, timer, *filled], **_QUIET)
    looked = timer.tick(look_again, asked, [timer, *late], **_QUIET)
    # What is drawn waits until the components have what they were given.
    opened.then(begin, asked, [ready, chosen["photo"]], **_QUIET)
    looked.then(state, None, ready, **_QUIET)


def _described(neuron: RegisterNeuron) -> str:
    return f"block {neuron.layer}, neuron {neuron.index}: score {number(neuron.score)}"
