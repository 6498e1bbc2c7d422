"""Every error that vitreg raises on purpose.

    VitregError
    ├── ModelLoadError          no such model, a folder without one, a checkpoint that does not fit
    ├── UnsupportedModelError   a model whose parts cannot be found, or that cannot be watched
    ├── NonFiniteError          NaN or infinity in weights or activations
    ├── ImageError              no readable image, or (with strict) one that is not
    ├── DataError               a data set that does not hold together, or a setting that a task does not have
    ├── FixError                a fix that does not fit the model, is damaged, or is applied out of order
    ├── ArchiveError            an extraction into another one's folder, or whose workers die again and again
    ├── OutputError             a result that cannot be written
    ├── RankError               one of several processes that work together is lost
    └── MissingExtraError       an optional library that is not installed

    UserWarning
    ├── FixWarning              a fix that was made for other weights, or saved with more than is known here
    └── ModelWarning            a model that is read otherwise than its files say

Each message says what was found, what was expected, and what to do.
The command line turns a VitregError into one line and exit code 1; anything else is a bug.
"""


class VitregError(Exception):
    """The root of the tree: catch this to catch all that vitreg raises on purpose."""


class ModelLoadError(VitregError):
    """The model could not be built or its weights do not fit."""


class UnsupportedModelError(VitregError):
    """The model's parts could not be found, or its forward pass cannot be watched."""


class NonFiniteError(VitregError):
    """Weights or activations hold NaN or infinity."""


class RankError(VitregError):
    """One of several processes that work together has died or was stopped."""


class ImageError(VitregError):
    """No image could be read, or one could not and `strict` was asked for."""


class DataError(VitregError):
    """A data set does not hold together (a mask of another size, a split that names a missing file), or a
    task has no such setting."""


class FixError(VitregError):
    """A fix does not fit the model, its saved folder is damaged, or it is applied or undone out of order."""


class ArchiveError(VitregError):
    """The output folder belongs to another extraction, or the workers of this one cannot go on."""


class OutputError(VitregError):
    """A result could not be written."""


class MissingExtraError(VitregError):
    """An optional library is missing."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed. Install it with: pip install 'vitreg[{extra}]'")


class FixWarning(UserWarning):
    """A fix was made for other weights, or its saved folder holds what this version does not know."""


class ModelWarning(UserWarning):
    """A model is read otherwise than its files say: at another size, by one view of each photo, or without
    keys that do not matter."""
