"""The HTML that reports are made of. Everything from outside goes through `text` or `data_block`.

The page's own policy forbids whatever is not in the file: nothing is loaded, and of styles and scripts only
ours may act, which the policy knows by their hashes.
"""

import base64
import hashlib
import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Shaped
from matplotlib.figure import Figure

from vitreg.plots.style import png

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src $style_hash; script-src $script_hash;\
 base-uri 'none'; form-action 'none'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
<footer>$versions</footer>
</main>
$script
</body>
</html>
""")


def page(title: str, parts: Iterable[str], versions: dict[str, str], script: str = "") -> str:
    """A whole page: a title (text), parts (HTML), what made it, and a script of ours, if it needs one."""
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    style = source("report.css")
    return _PAGE.substitute(
        title=text(title),
        style=style,
        style_hash=_hash(style),
        script=f"<script>{script}</script>" if script else "",
        script_hash=_hash(script) if script else "'none'",
        body="\n".join(parts),
        versions=f"Made with {text(made)}.",
    )


def source(name: str) -> str:
    """A file of ours beside this one: the pages' style, or a script."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(code: str) -> str:
    """What a page's policy calls a style or a script that may act."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"


def text(raw: str) -> str:
    """Text from anywhere, as HTML. What does not print, such as marks that reverse a line, is spelled out."""
    visible = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in raw)
    return html.escape(visible)


def data_block(name: str, data: Any) -> str:
    """Data for a script, as JSON that no HTML parser can leave early: it holds no "<"."""
    plain = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{text(name)}">{plain}</script>'


def section(title: str, content: str, kind: str = "") -> str:
    opening = f'<section class="{text(kind)}">' if kind else "<section>"
    return f"{opening}\n<h2>{text(title)}</h2>\n{content}\n</section>"


def note(words: str) -> str:
    return f'<p class="note">{text(words)}</p>'


def picture(figure: Figure, alt: str, caption: str, dpi: int = 150, colours: int | None = 256) -> str:
    """A figure with its PNG inside the page."""
    data = base64.b64encode(png(figure, dpi, colours)).decode()
    width = round(figure.get_figwidth() * 96) + 18  # CSS pixels, with the frame
    image = f'<img width="{width}" alt="{text(alt)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{text(caption)}</figcaption></figure>\n"


def photo_source(photo: Shaped[np.ndarray, "h w 3"]) -> str:
    """A photo as a source of an <img>: a JPEG without subsampled colours, in the page itself."""
    data = io.BytesIO()
    PIL.Image.fromarray(photo).save(data, "JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Terms and what is to be said of them."""
    return "<dl>" + "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in rows) + "</dl>"


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], marked: Iterable[int] = (), words: bool = False
) -> str:
    """A table of texts; `marked` rows stand out, `words` wraps and aligns left."""
    top = "".join(f'<th scope="col">{text(head)}</th>' for head in heads)
    body = ""
    for i, row in enumerate(rows):
        cells = "".join(f"<td>{text(cell)}</td>" for cell in row)
        body += f"<tr{' class=marked' if i in set(marked) else ''}>{cells}</tr>\n"
    kind = ' class="words"' if words else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>'
    )
