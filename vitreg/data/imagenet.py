"""The classes of ImageNet's photos, whose folders and files carry WordNet ids.

    class_of("val/n01440764/n01440764_10040.JPEG", wordnet_classes(1000))    # 0, a tench

timm knows which class each id is in the heads of ImageNet-1k, -12k, -21k and -22k.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache

from vitreg.errors import DataError

WORDNET_ID = re.compile(r"(?<![a-zA-Z0-9])n\d{8}(?!\d)")


def wordnet_id(name: str) -> str | None:
    """The WordNet id in a path: that of the file name, else of the nearest folder; None if two compete."""
    for part in reversed(re.split(r"[/\\]", name)):
        if found := set(WORDNET_ID.findall(part)):
            return found.pop() if len(found) == 1 else None
    return None


@cache
def wordnet_classes(classes: int) -> Mapping[str, int]:
    """{WordNet id: class index} of an ImageNet head with so many classes; empty for any other number."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": classes})
    try:
        names = ImageNetInfo(subset).label_names() if subset else []
    except AssertionError:  # a subset that this timm names, but does not have
        names = []
    return {name: index for index, name in enumerate(names)}


@cache
def wordnet_names(classes: int) -> tuple[tuple[str, ...], ...]:
    """All of WordNet's names for each class of an ImageNet head; empty for another number of classes."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    described = (info.label_name_to_description(name) for name in wordnet_classes(classes))
    return tuple(tuple(name.strip() for name in text.split(",")) for text in described)


@cache
def clip_names(classes: int) -> tuple[tuple[str, ...], ...]:
    """CLIP's name for each class of ImageNet-1k's head, if open_clip is installed; else empty."""
    try:
        from open_clip import IMAGENET_CLASSNAMES
    except ImportError:
        return ()
    return tuple((name,) for name in IMAGENET_CLASSNAMES) if classes == len(IMAGENET_CLASSNAMES) else ()


def numbers_of_names(names: Sequence[str], of_classes: Sequence[Sequence[str]]) -> dict[str, int] | None:
    """Which class each name is of, if all are names of classes; None if one is of none.

    `of_classes` are the names of each class. Upper case, "_" and "-" make no difference. Raises DataError for
    a name of two classes (crane), and for two names of one class.
    """
    owners: dict[str, list[int]] = {}
    for number, called in enumerate(of_classes):
        for name in {plain(name) for name in called}:
            owners.setdefault(name, []).append(number)
    if not all(plain(name) in owners for name in names):
        return None
    found: dict[int, str] = {}
    for name in names:
        if len(own := owners[plain(name)]) > 1:
            raise DataError(
                f"{name!r} is the name of the classes {own[0]} and {own[1]}. Call its folder by the class's"
                " WordNet id (n01440764), or all folders by their classes' numbers."
            )
        if (twin := found.setdefault(own[0], name)) != name:
            raise DataError(
                f"{twin!r} and {name!r} are names of the class {own[0]}. Put its photos together."
            )
    return {name: number for number, name in found.items()}


def plain(name: str) -> str:
    """In lower case, with a single space for "_" and "-"."""
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


def class_of(name: str, classes: Mapping[str, int]) -> int | None:
    """The class of a photo by its path; None where its name does not say, or the head does not know it."""
    found = wordnet_id(name)
    return None if found is None else classes.get(found)
