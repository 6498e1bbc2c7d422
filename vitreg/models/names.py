"""How models are named, and what to say of a name that stands for none."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from vitreg.printing import did_you_mean

LIBRARIES = ("timm", "hf", "open_clip")  # what stands before the first colon

SCHEMES = (
    "timm:NAME, timm:hf-hub:ID, hf:ID, open_clip:ARCH/TAG, or a folder in timm's or transformers' format"
)


def with_library(name: str) -> str:
    """A name with its library in front: one of timm's that was given alone gets "timm:".

    Folders and files keep their name, and so does what timm does not know.
    """
    if ":" in name or not name or Path(name).exists():
        return name
    import timm

    return f"timm:{name}" if timm.is_model(name.partition(".")[0]) else name


def suggestion(name: str) -> str:
    """What an error adds about a name that stands for no model: " Did you mean NAME?", or nothing."""
    library, colon, rest = name.partition(":")
    if not colon:
        return _of_a_hub(name) if "/" in name else _of_timm(name)
    if library == "timm":
        return _of_timm(rest)
    return did_you_mean(library, LIBRARIES).replace("?", f":{rest}?")


def _of_timm(name: str) -> str:
    """Its names without tags first: whoever mistypes one has rarely seen the tags."""
    import timm

    architecture, _, tag = name.partition(".")
    if tag and timm.is_model(architecture):
        return did_you_mean(name, timm.list_pretrained(f"{architecture}.*"), 3, "timm:")
    return did_you_mean(name, [*timm.list_models(), *timm.list_pretrained()], 3, "timm:")


def _of_a_hub(name: str) -> str:
    """A hub's ID, or an architecture of open_clip with its tag, that was given without its library."""
    owner, _, rest = name.partition("/")
    if not owner or not rest or "/" in rest or name.startswith((".", "~")):
        return ""
    scheme = "open_clip" if owner in _open_clip_models()() else "hf"
    return f" Did you mean {scheme}:{name}?"


def _open_clip_models() -> Callable[[], list[str]]:
    if importlib.util.find_spec("open_clip") is None:
        return list
    from open_clip import list_models

    known: Callable[[], list[str]] = list_models
    return known
