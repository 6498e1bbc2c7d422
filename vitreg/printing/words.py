"""How names and numbers are written."""

import re


def short_name(model: str) -> str:
    """The name of a model or a file without the folders that lead to it."""
    has_scheme = re.search(r"\w{2,}:", model)
    return model if has_scheme else re.split(r"[/\\]", model.rstrip("/\\"))[-1]


def number(value: float) -> str:
    """Three significant digits, without an exponent where a person would write none."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share in percent, with three significant digits."""
    return f"{100 * share:#.3g}%" if 0 < share < 0.9995 else f"{share:.0%}"


def in_brief(text: str) -> str:
    """The first clause of a longer text, without brackets: "it helps (5%); and so" becomes "it helps."."""
    bare = re.sub(r"\s*\([^()]*\)", "", text)
    return re.split(r"[;:] |\. ", bare, maxsplit=1)[0].rstrip(".") + "."
