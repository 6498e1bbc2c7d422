"""Reports as HTML: the one module that knows the templates (templates/), and what of a page is raw.

    page("diagnosis.html", "tiny: no artifacts", versions, top=..., model=..., photos=...)

Templates escape whatever they are given, and refuse to print what they were not given. The page's own policy
forbids whatever is not in the file: nothing is loaded, and of styles and scripts only ours may act, which the
policy knows by their hashes.
"""

import base64
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import PIL.Image
from jaxtyping import Shaped
from markupsafe import Markup
from matplotlib.figure import Figure

from vitreg.plots.style import png

Facts = Sequence[tuple[str, str]]  # terms and what is to be said of them


@dataclass(frozen=True)
class Picture:
    """A picture as a source of an <img>, its width in CSS pixels, and in words what it shows.

    Without a source it could not be drawn, and `alt` says why.
    """

    source: str
    width: int
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """A table of texts; `marked` rows stand out."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()


def page(template: str, title: str, versions: dict[str, str], **data: Any) -> str:
    """A whole page: a template of ours, a title, what made it, and the data that the template asks for."""
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    return ENVIRONMENT.get_template(template).render(title=title, made=made, **data)


def picture(draw: Callable[[], Figure], alt: str, caption: str = "", colours: int | None = 256) -> Picture:
    """A figure as a PNG in the page itself; its width leaves room for a frame.

    One that cannot be drawn leaves the rest of the page as it is: a line in its place says why.
    """
    try:
        figure = draw()
    except Exception as error:  # whatever it is, the numbers are there and the page is wanted
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Picture("", 0, f"This picture could not be drawn ({why}). It would show: {alt}.", caption)
    data = base64.b64encode(png(figure, colours=colours)).decode()
    return Picture(f"data:image/png;base64,{data}", round(figure.get_figwidth() * 96) + 18, alt, caption)


def photo_source(photo: Shaped[np.ndarray, "h w 3"]) -> str:
    """A photo as a source of an <img>: a JPEG without subsampled colours, in the page itself."""
    data = io.BytesIO()
    PIL.Image.fromarray(photo).save(data, "JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


# -- what templates can do -------------------------------------------------------------------------


def _own(name: str) -> Markup:
    """A file of ours beside this one, raw.

    Only the style and the script are raw: they are ours, and inside <style> and <script> a browser reads no
    escapes. Pictures are base64, which holds nothing to escape. The data for the script is JSON of the filter
    `tojson`, which spells out "<", ">", "&" and "'", so that no parser can leave it early.
    """
    return Markup(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def _policy_hash(code: str) -> str:
    """What a page's policy calls a style or a script that may act."""
    return f"sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}"


def _sentence(words: str) -> str:
    """Words with a capital letter in front; the others stay as they are."""
    return words[:1].upper() + words[1:]


def _printable(value: Any) -> Any:
    """Text from anywhere with what does not print, such as marks that reverse a line, spelled out."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in value)


def _environment() -> jinja2.Environment:
    """Our templates, which escape and spell out each value that they print."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["own"] = _own
    made.filters |= {"policy_hash": _policy_hash, "sentence": _sentence}
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return made


ENVIRONMENT = _environment()
