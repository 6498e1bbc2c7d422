"""A result in a notebook: its picture and the table that `print` gives, as HTML that needs nothing else.

    diagnosis                         # the last line of a cell
    IPython.display.HTML(shown(diagnosis))

It holds no script and no style of its own but for what stands in its elements, takes the notebook's colours,
light or dark, and shows pictures on white, as they were drawn.
"""

from vitreg.printing import Presented
from vitreg.reports.html import ENVIRONMENT, Picture, picture


def shown(result: Presented) -> str:
    """The HTML of any result."""
    return ENVIRONMENT.get_template("notebook.html").render(
        summary=result.summary(), picture=_picture(result)
    )


def _picture(result: Presented) -> Picture | None:
    """What the result draws, if it draws something."""
    draw = getattr(result, "figure", None)
    return picture(draw, f"the figure of {result!r}") if draw and result.draws else None
