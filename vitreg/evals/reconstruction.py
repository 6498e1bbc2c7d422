"""The pixels of a patch, read from its token by a linear probe.

    print(evaluate(vit, "photos/"))

[R] finds pixels lost in outliers (L2 error 18.38 for normal patches, 25.23 for outliers). But the error says
first of all how hard a patch is: a flat grey one is known without looking, a flat white one lies far from all
others. So outliers are also compared with the normal patches that look most like them, and each error with
the patch's distance from the mean patch. The fairest comparison is that with a fix: the same patches.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors

from vitreg.data.images import read_images
from vitreg.evals.probes import PatchConfig, Patches, by_photo, drawn_patches, fitted, read_by_own_probe
from vitreg.evals.result import Metric, Result, concluded
from vitreg.models.backbone import Backbone

ALIKE = 5  # normal patches for each outlier
_PROBES = [Ridge(strength) for strength in (1e4, 1e3, 1e2, 1e1, 1.0)]


@dataclass(frozen=True)
class ReconstructionConfig(PatchConfig):
    """See PatchConfig."""


def evaluate(vit: Backbone, data: str | Path, config: ReconstructionConfig | None = None) -> Result:
    """L2 error of a patch's pixels, as the model sees them, read from its token by ridge regression.

    One probe is trained on the patches of three quarters of the photos, normal and outlier, and tested on
    those of the others, apart. "L2 error" is the mean norm of a patch's residual, "relative error" its ratio
    to the mean distance of these patches from the mean patch. Rows: normal patches; outliers; for each
    outlier the 5 normal patches nearest in mean colour and contrast; outliers, read by a probe trained on
    outliers alone. Raises DataError for too few photos.
    """
    config = config or ReconstructionConfig()
    train, test, notes = drawn_patches(vit, data, config)
    metrics, more = measured(vit, train, test, config)
    return concluded(
        "reconstruction",
        vit,
        str(data),
        metrics,
        config,
        n=len(test.paths),
        notes=notes + more,
        photos=test.paths,
    )


def measured(
    vit: Backbone, train: Patches, test: Patches, config: PatchConfig
) -> tuple[dict[str, Metric], tuple[str, ...]]:
    """The metrics, and what a reader must know of them."""
    known, pixels = (pixels_of(vit, patches, config) for patches in (train, test))
    deviation = np.linalg.norm(pixels - known.mean(0), axis=1)
    probe = fitted(_PROBES, train.tokens, known, by_photo(train.photo))
    error = np.linalg.norm(probe.predict(test.tokens) - pixels, axis=1)
    rows = {"normal patches": (error, ~test.outlier)}
    if test.outlier.any():
        rows["outliers"] = (error, test.outlier)
        rows["normal, alike in pixels"] = (error, like_outliers(pixels, test))
        own = read_by_own_probe(_PROBES, train, test, known)
        if own is not None:
            rows["outliers, own probe"] = (np.linalg.norm(own - pixels, axis=1), test.outlier)
    absolute = {f"L2 error: {row}": test.mean(e, w, ".2f", False) for row, (e, w) in rows.items()}
    relative = {
        f"relative error: {row}": test.mean(e, w, ".3f", False, per=deviation) for row, (e, w) in rows.items()
    }
    far = "; ".join(
        f"{row}: {np.average(deviation, weights=rows[row][1]):.2f}" for row in list(rows)[:3]
    )  # the last is of outliers again
    return absolute | relative, (f"Mean distance from the mean patch: {far}.",)


def pixels_of(vit: Backbone, patches: Patches, config: PatchConfig) -> Float[np.ndarray, "t v"]:
    """The v = 3 * height * width pixel values of each patch, as the model sees them."""
    photos = read_images(patches.paths, vit, batch_size=config.batch_size, workers=config.workers)
    starts = np.searchsorted(patches.photo, np.arange(1, len(patches.paths)))
    places = np.split(patches.place, starts)
    cells = (_cells(image, patches.grid) for batch in photos for image in batch.pixels.numpy())
    return np.concatenate([cell[chosen] for cell, chosen in zip(cells, places, strict=True)])


def _cells(image: Float[np.ndarray, "3 h w"], grid: tuple[int, int]) -> Float[np.ndarray, "p v"]:
    """The pixels of the grid's cells, one cell a row."""
    rows, columns = grid
    cut = image.reshape(3, rows, image.shape[1] // rows, columns, image.shape[2] // columns)
    return cut.transpose(1, 3, 0, 2, 4).reshape(rows * columns, -1)


def like_outliers(pixels: Float[np.ndarray, "t v"], test: Patches) -> Float[np.ndarray, " t"]:
    """How often each normal patch is among the ALIKE nearest to an outlier, in mean colour and contrast.

    Both in the units of the error: the norm over the patch of its mean colour, by channel, and of what is
    left without it.
    """
    channels = pixels.reshape(len(pixels), 3, -1)
    colour = channels.mean(2)
    contrast = np.linalg.norm(channels - colour[:, :, None], axis=(1, 2))
    look = np.column_stack([colour * channels.shape[2] ** 0.5, contrast])
    near = NearestNeighbors(n_neighbors=ALIKE).fit(look[~test.outlier])
    found = near.kneighbors(look[test.outlier], return_distance=False)
    weights = np.zeros(len(pixels))
    weights[~test.outlier] = np.bincount(found.ravel(), minlength=(~test.outlier).sum()) / ALIKE
    return weights
