"""A linear classifier on frozen features, by two protocols.

    print(evaluate(vit, "imagenette/"))                                    # few photos: logistic regression
    print(evaluate(vit, "imagenet/", LinearConfig(protocol="dinov2")))     # SGD, a sweep of learning rates

Choices (of a regularisation, of a learning rate) are made on photos held out of train/, not on val/.
"""

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import track
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from vitreg.data.datasets.classes import splits
from vitreg.errors import DataError
from vitreg.evals.result import Metric, Result, concluded, fixes_on
from vitreg.features.config import Config
from vitreg.features.pooling import OF_ONE_LAYER, PARTS, Pooled, pooled, poolings_of
from vitreg.models.backbone import Backbone

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
DINOV2 = ("cls", "4cls", "cls+mean", "4cls+mean")  # what DINOv2 sweeps over, beside the rates
STRENGTHS = tuple(10.0**power for power in range(-6, 2))  # scikit-learn's C: a larger one regularises less
Parts = tuple[Tensor, Tensor]  # positions of the training photos to fit to, and of those held out
_ITERATIONS = 2000
_FEW = 50_000  # training photos up to which "auto" is logistic regression
_AT_ONCE = 1024  # photos that all heads see together


@dataclass(frozen=True)
class LinearConfig(Config):
    """`protocol`: auto is logistic for up to 50,000 training photos and dinov2 beyond.

    `held_out`: the part of train/ on which choices are made. `poolings`: some of cls, mean, cls+mean, 4cls,
    4cls+mean, registers, test_registers; () for those that the model has (logistic: of one layer).
    dinov2 only: `steps` of SGD (10 x 1250), `train_batch` photos in each; DINOv2 has 128 on each of 8 GPUs,
    so that 1250 steps are an epoch of ImageNet: there, set 1024.
    """

    protocol: Literal["auto", "dinov2", "logistic"] = "auto"
    poolings: str | tuple[str, ...] = ()
    held_out: float = 0.1
    steps: int = 12500
    train_batch: int = 128


def evaluate(vit: Backbone, data: str | Path, config: LinearConfig | None = None) -> Result:
    """Top-1 accuracy on val/ for each pooling. `data` holds train/CLASS/... and val/CLASS/...

    logistic: L-BFGS on standardised features; the regularisation is chosen on the held-out photos, and the
    classifier is then fitted to all of train/.

    dinov2 (Oquab et al. 2023): SGD, momentum 0.9, a cosine schedule, no weight decay; a head for each of 13
    learning rates and each pooling, all trained at once. The rate is chosen on the held-out photos. "best
    head" is chosen so among CLS of 1 or 4 layers with and without the mean patch; "best head on val" is
    chosen on val/ itself, as DINOv2 reports it: too high by what the choice gains. Unlike there, features
    are computed once, so training photos are not cropped or flipped at random.

    Raises DataError if photos are too few to hold some out, UnsupportedModelError for a pooling that the
    model does not have.
    """
    config = config or LinearConfig()
    _check(config)
    photos = splits(data)
    available = len(photos[0].paths)
    few = min(available, config.limit or available) <= _FEW
    logistic = config.protocol == "logistic" or (config.protocol == "auto" and few)
    names = poolings_of(vit, config.poolings, OF_ONE_LAYER if logistic else PARTS)
    train, val = (pooled(vit, part, names, config) for part in photos)
    parts = hold_out(train.labels, config, photos[0].classes)
    run = _logistic if logistic else partial(_dinov2, device=vit.device)
    metrics, note = run(train, val, names, parts, config)
    held = f"chosen on {len(parts[1])} of {len(train.labels)} training photos"
    notes = (*train.notes, *val.notes, f"{fixes_on(vit) or 'as it is'}, {held}, {note}")
    return concluded("linear", vit, str(data), metrics, config, notes=notes, photos=photos[1].paths)


def _check(config: LinearConfig) -> None:
    if not 0 < config.held_out < 1:
        raise DataError(f"held_out={config.held_out:g}: expected a part of train/ between 0 and 1.")
    if min(config.steps, config.train_batch) < 1:
        raise DataError("steps and train_batch: expected whole numbers from 1 on.")


def hold_out(labels: Int[Tensor, " n"], config: LinearConfig, classes: tuple[str, ...]) -> Parts:
    """Positions of the training photos to fit to, and of those to choose on: equal parts of each class."""
    present, counts = labels.unique(return_counts=True)
    if len(present) < 2:
        raise DataError(f"all training photos are of one class ({classes[int(present[0])]}).")
    if counts.min() < 2:
        rare = classes[int(present[counts.argmin()])]
        raise DataError(f"class {rare} has 1 training photo; at least 2 are needed to hold one out.")
    n, least = len(labels), len(present)
    size = min(max(round(config.held_out * n), least), n - least)
    fit, held = train_test_split(np.arange(n), test_size=size, stratify=labels, random_state=config.seed)
    return torch.from_numpy(fit), torch.from_numpy(held)


# -- logistic regression -----------------------------------------------------------------------------

Answer = tuple[dict[str, Metric], str]


def _logistic(
    train: Pooled, val: Pooled, names: tuple[str, ...], parts: Parts, config: LinearConfig
) -> Answer:
    metrics, chosen = {}, {}
    for name in names:
        classifier = GridSearchCV(
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=_ITERATIONS)),
            {"logisticregression__C": STRENGTHS},
            cv=[tuple(part.numpy() for part in parts)],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # said below, of the fit that counts
            classifier.fit(train.vectors(name).double().numpy(), train.labels.numpy())
        guess = torch.from_numpy(classifier.predict(val.vectors(name).double().numpy()))
        metrics[name] = Metric.mean(guess == val.labels, ".2%")
        ended = classifier.best_estimator_[-1].n_iter_.max() < _ITERATIONS
        chosen[name] = f"{name} {classifier.best_params_['logisticregression__C']:g}"
        chosen[name] += "" if ended else f" (not converged in {_ITERATIONS} iterations)"
    return metrics, f"C: {', '.join(chosen.values())}"


# -- DINOv2's sweep ----------------------------------------------------------------------------------


def _dinov2(
    train: Pooled, val: Pooled, names: tuple[str, ...], parts: Parts, config: LinearConfig,
    device: torch.device,
) -> Answer:  # fmt: skip
    fit, held = parts
    heads = trained(train, names, fit, config, device)
    chosen, hits, scores = {}, {}, {}
    for name in names:
        hits[name], _ = _answers(heads[name], val, name, torch.arange(len(val.labels)))
        right, loss = _answers(heads[name], train, name, held)
        scores[name] = list(zip(right.mean(0).tolist(), (-loss.mean(0)).tolist(), strict=True))
        chosen[name] = max(range(len(RATES)), key=scores[name].__getitem__)
    metrics = {name: Metric.mean(hits[name][:, rate], ".2%") for name, rate in chosen.items()}
    note = f"learning rates: {', '.join(f'{name} {RATES[rate]:g}' for name, rate in chosen.items())}"
    if swept := [name for name in names if name in DINOV2]:
        best = max(swept, key=lambda name: scores[name][chosen[name]])
        everything = torch.cat([hits[name] for name in swept], 1)
        metrics["best head"] = metrics[best]
        metrics["best head on val"] = Metric.mean(everything[:, everything.mean(0).argmax()], ".2%")
        note += f"; best head {best}"
    return metrics, note


def trained(
    train: Pooled, names: tuple[str, ...], fit: Tensor, config: LinearConfig, device: torch.device
) -> dict[str, nn.Linear]:
    """For each pooling a head (d -> rates * classes) for all learning rates, trained on the photos `fit`.

    No head has a say in another's gradient, so a head's learning rate is its loss's weight, and one matrix
    product serves all.
    """
    random = torch.Generator().manual_seed(config.seed)
    heads = {name: _head(train, name, random).to(device) for name in names}
    rates = torch.tensor(RATES, device=device) * config.train_batch / 256
    optimiser = torch.optim.SGD([p for head in heads.values() for p in head.parameters()], 1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps)
    seen = config.steps * config.train_batch
    epochs = [fit[torch.randperm(len(fit), generator=random)] for _ in range(-(-seen // len(fit)))]
    batches = torch.cat(epochs)[:seen].split(config.train_batch)
    for batch in track(batches, "training", console=Console(stderr=True), disable=not config.progress):
        optimiser.zero_grad()
        for name, head in heads.items():
            losses = _losses(_logits(head, train.vectors(name, batch)), train.labels[batch])
            (losses.mean(0) * rates).sum().backward()
        optimiser.step()
        schedule.step()
    return heads


def _head(train: Pooled, name: str, random: torch.Generator) -> nn.Linear:
    width, classes = train.vectors(name, slice(1)).shape[1], int(train.labels.max()) + 1
    head = nn.Linear(width, len(RATES) * classes)
    nn.init.normal_(head.weight, 0, 0.01, generator=random)
    nn.init.zeros_(head.bias)
    return head


def _logits(head: nn.Linear, vectors: Float[Tensor, "b d"]) -> Float[Tensor, "b h c"]:
    return head(vectors.to(head.weight.device)).unflatten(1, (len(RATES), -1))


def _losses(logits: Float[Tensor, "b h c"], labels: Int[Tensor, " b"]) -> Float[Tensor, "b h"]:
    wanted = labels.to(logits.device).repeat_interleave(len(RATES))
    return F.cross_entropy(logits.flatten(0, 1), wanted, reduction="none").view(-1, len(RATES))


@torch.no_grad()
def _answers(
    head: nn.Linear, photos: Pooled, name: str, rows: Tensor
) -> tuple[Float[Tensor, "m h"], Float[Tensor, "m h"]]:
    """Whether the head is right on each photo, and its loss there, for each learning rate."""
    right, losses = [], []
    for part in rows.split(_AT_ONCE):
        logits, labels = _logits(head, photos.vectors(name, part)).cpu(), photos.labels[part]
        right.append((logits.argmax(2) == labels[:, None]).float())
        losses.append(_losses(logits, labels))
    return torch.cat(right), torch.cat(losses)
