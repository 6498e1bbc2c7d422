"""The HTML that reports are made of. Everything from outside goes through `text`."""

import base64
import html
from collections.abc import Iterable, Sequence
from string import Template

from matplotlib.figure import Figure

from vitreg.style import png

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
<footer>$versions</footer>
</main>
</body>
</html>
""")

_STYLE = """
:root { --paper: #fff; --ink: #1f2328; --quiet: #59636e; --line: #d8dee4; --shade: #f6f8fa;
  --found: #b34700; --found-shade: #fff4ec; --none: #005a8c; --none-shade: #edf6fc; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181d; --ink: #e6edf3; --quiet: #a3adb8; --line: #333b44; --shade: #1c2229;
    --found: #ff9a52; --found-shade: #33200f; --none: #6cc0f5; --none-shade: #10283a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1140px; margin: 0 auto; padding: 24px 20px 48px; }
header { padding: 18px 22px; border-left: 6px solid var(--line); border-radius: 6px;
  background: var(--shade); }
header.found { border-color: var(--found); background: var(--found-shade); }
header.none { border-color: var(--none); background: var(--none-shade); }
header.found h1 { color: var(--found); }
header.none h1 { color: var(--none); }
header p { margin: 6px 0 0; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.2; }
h2 { margin: 40px 0 12px; padding-bottom: 6px; border-bottom: 1px solid var(--line); font-size: 1.2rem; }
.model { font-family: ui-monospace, monospace; font-size: 0.9rem; }
.phantom { padding: 6px 10px; border: 2px dashed currentColor; border-radius: 6px; font-weight: 600; }
.note, figcaption, footer { color: var(--quiet); font-size: 0.9rem; }
.note { max-width: 75ch; }
dl { display: grid; grid-template-columns: fit-content(40%) 1fr; gap: 0 24px; margin: 0; }
dt, dd { margin: 0; padding: 5px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
dt { color: var(--quiet); }
figure { margin: 0 0 24px; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; padding: 8px; background: #fff;
  border: 1px solid var(--line); border-radius: 8px; }
figcaption { margin-top: 8px; max-width: 640px; overflow-wrap: anywhere; }
.figures { columns: 2 420px; column-gap: 28px; }
.photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr));
  gap: 0 28px; }
.photos figcaption { margin-top: 4px; font-size: 0.8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { min-width: 9rem; padding-left: 4px; text-align: left; white-space: normal;
  overflow-wrap: anywhere; }
div + dl { margin-top: 28px; }
table.words { table-layout: fixed; }
table.words th, table.words td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
tr.marked { background: var(--shade); font-weight: 600; }
summary { margin-top: 40px; font-size: 1.2rem; font-weight: 600; cursor: pointer; }
footer { margin-top: 40px; padding-top: 10px; border-top: 1px solid var(--line); }
@media (max-width: 560px) {
  main { padding: 12px 12px 32px; }
  dl { grid-template-columns: 1fr; }
  dt { padding-bottom: 0; border: 0; }
  dd { padding-top: 0; } }
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --quiet: #444; --line: #bbb; --shade: #f4f4f4;
    --found: #8a3600; --found-shade: #fff; --none: #004a73; --none-shade: #fff; }
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  tr, header { break-inside: avoid; }
  .figures { columns: auto; }
  .photos { grid-template-columns: 1fr 1fr; }
  .scroll { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td, th:first-child, td:first-child { min-width: 0; padding: 2px 5px; white-space: normal; }
  h2 { break-after: avoid; } }
"""


def page(title: str, parts: Iterable[str], versions: dict[str, str]) -> str:
    """A whole page: a title (text), parts (HTML) and what made it."""
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    return _PAGE.substitute(
        title=text(title), style=_STYLE, body="\n".join(parts), versions=f"Made with {text(made)}."
    )


def text(raw: str) -> str:
    """Text from anywhere, as HTML. What does not print, such as marks that reverse a line, is spelled out."""
    visible = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in raw)
    return html.escape(visible)


def section(title: str, content: str) -> str:
    return f"<section>\n<h2>{text(title)}</h2>\n{content}\n</section>"


def note(words: str) -> str:
    return f'<p class="note">{text(words)}</p>'


def picture(figure: Figure, alt: str, caption: str, dpi: int = 150, colours: int | None = 256) -> str:
    """A figure with its PNG inside the page."""
    data = base64.b64encode(png(figure, dpi, colours)).decode()
    width = round(figure.get_figwidth() * 96) + 18  # CSS pixels, with the frame
    image = f'<img width="{width}" alt="{text(alt)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{text(caption)}</figcaption></figure>\n"


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
