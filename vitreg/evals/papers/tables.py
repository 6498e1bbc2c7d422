"""Every table of the two papers as rows: model, data set, settings, and the figure that the paper gives.

TABLES["test-time-features"].rows

Sources: Darcet et al., Vision Transformers Need Registers, arXiv 2309.16588 ("registers-..."); Jiang et al.,
Vision Transformers Don't Need Trained Registers, arXiv 2506.08010 ("test-time-..."). Some of the figures come
from secondary transcriptions, and none has been reproduced here. Metrics are named as the tasks name them and
in their units: shares, not percent.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

DARCET = "Darcet et al., Vision Transformers Need Registers, arXiv 2309.16588"
JIANG = "Jiang et al., Vision Transformers Don't Need Trained Registers, arXiv 2506.08010"
SIMEONI = "Simeoni et al., Localizing Objects with Self-Supervised Transformers, arXiv 2109.14279"
ROOT = "VITREG_DATA"  # the environment variable with the folder of all data sets


@dataclass(frozen=True)
class DataSet:
    """Where a data set lies below the root, what is there, and which folder in it has plain photos."""

    path: str
    layout: str
    photos: str = "."


DATA = {
    "imagenet": DataSet("imagenet", "train/WNID/*.JPEG and val/WNID/*.JPEG", "val"),
    "imagenet-val": DataSet("imagenet/val", "WNID/*.JPEG"),
    "ade20k": DataSet("ADEChallengeData2016", "images/ and annotations/", "images/validation"),
    "nyu": DataSet("nyu_depth_v2", "nyu_train.txt, nyu_test.txt and what they name"),
    "voc07": DataSet("VOCdevkit/VOC2007", "JPEGImages/, Annotations/, ImageSets/", "JPEGImages"),
    "voc12": DataSet("VOCdevkit/VOC2012", "JPEGImages/, Annotations/, ImageSets/", "JPEGImages"),
    "coco20k": DataSet("coco", "annotations/, train2014/, coco20k.txt with 19,817 file names", "train2014"),
    "imagenet-segmentation": DataSet("gtsegs_ijcv.mat", "one HDF5 file"),
} | {
    name: DataSet(name, "train/CLASS/* and val/CLASS/*", "val")
    for name in (
        "aircraft", "cifar10", "cifar100", "cub", "caltech101", "cars", "dtd", "flowers", "food", "places205",
        "pets", "sun397", "voc-classes",
    )
}  # fmt: skip


@dataclass(frozen=True)
class FixRecipe:
    """A fix to be found on photos of the row's own data: the best neurons of Algorithm 1 of Jiang et al.

    `top_k` of them (None: as few as suffice), in blocks up to `top_layer` (0-based; None: where outliers
    emerge). With `registers` of 0 the neurons are left at zero; `bias` stands a constant key and value in for
    the register (appendix A.2).
    """

    top_k: int | None = None
    top_layer: int | None = None
    registers: int = 1
    bias: bool = False


@dataclass(frozen=True)
class Row:
    """One evaluation, and the paper's figures for it by metric. `data` is a name in DATA.

    `size` is the model's image size in pixels (None: its own). `{data}` in a setting stands for the data's
    folder. `remark` says what else the paper has, or what is not known; `needs`, why the row cannot be run.
    """

    name: str
    model: str = ""
    task: str = ""
    data: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    recipe: FixRecipe | None = None
    size: int | None = None
    remark: str = ""
    needs: str = ""


@dataclass(frozen=True)
class Table:
    """A table of a paper: whose, what it shows, and its rows."""

    paper: str
    title: str
    rows: tuple[Row, ...]


DINOV2_G = "timm:vit_giant_patch14_dinov2.lvd142m"
DINOV2_L = "timm:vit_large_patch14_dinov2.lvd142m"
DINOV2_L_REG = "timm:vit_large_patch14_reg4_dinov2.lvd142m"
OPENCLIP_B = "open_clip:ViT-B-16/laion2b_s34b_b88k"
OPENCLIP_L = "open_clip:ViT-L-14/laion2b_s32b_b82k"
LLAVA = "hf:xtuner/llava-llama-3-8b-transformers"

_DINOV2_L_FIX = FixRecipe(top_k=45, top_layer=17)
_OPENCLIP_B_FIX = FixRecipe(top_k=10, top_layer=5)
_UNPUBLISHED = "weights that were never published"
_TRAINING = (
    "training: `vitreg train self_supervised_vit_l --registers 0 1 2 4 8 16`, or in miniature `vitreg train"
    " ablation` with the same numbers"
)
_ASSUMED = "the paper does not say which checkpoint; this one is assumed"

# -- Darcet et al. -----------------------------------------------------------------------------------


def _token_rows() -> tuple[Row, ...]:
    """Data set: accuracy of a logistic regression on one random normal patch, outlier, and CLS."""
    accuracy = {
        "aircraft": (17.1, 79.1, 87.3), "cifar10": (97.1, 99.3, 99.4), "cifar100": (81.3, 93.7, 94.5),
        "cub": (18.6, 84.9, 91.3), "caltech101": (73.2, 97.6, 96.9), "cars": (10.8, 85.2, 91.5),
        "dtd": (63.1, 84.9, 85.2), "flowers": (59.5, 99.6, 99.7), "food": (74.2, 93.5, 94.7),
        "imagenet": (65.8, 69.0, 86.0), "places205": (53.1, 55.1, 66.4), "pets": (47.8, 94.1, 96.9),
        "sun397": (37.7, 78.5, 78.6), "voc-classes": (70.8, 89.7, 89.1),
    }  # fmt: skip
    remark = {"voc-classes": "VOC2007 has several labels per photo; here, the photos with one"}
    return tuple(
        Row(data, DINOV2_G, "tokens", data,
            dict(zip(("normal patch", "outlier", "CLS"), (x / 100 for x in values), strict=True)),
            size=224, remark=remark.get(data, ""))
        for data, values in accuracy.items()
    )  # fmt: skip


def _regime_rows() -> tuple[Row, ...]:
    """Model: ImageNet, ADE20k and NYUd without and with trained registers."""
    figures = {
        "DeiT-III B, supervised, IN-22k": ((84.7, 84.7), (38.9, 39.1), (0.511, 0.512)),
        "OpenCLIP B/16": ((78.2, 78.1), (26.6, 26.7), (0.702, 0.661)),
        "DINOv2 L, IN-22k": ((84.3, 84.8), (46.6, 47.9), (0.378, 0.366)),
    }
    rows = []
    for model, values in figures.items():
        for i, version in enumerate(("as it is", "4 registers")):
            one, two, three = (pair[i] for pair in values)
            for task, data, found in (
                ("linear", "imagenet", {"best head on val": one / 100}),
                ("segmentation", "ade20k", {"mIoU": two / 100}),
                ("depth", "nyu", {"RMSE, m": three}),
            ):
                rows.append(Row(f"{model}, {version}: {data}", "", task, data, found, needs=_UNPUBLISHED))
    return tuple(rows)


def _lost_rows() -> tuple[Row, ...]:
    """Model: CorLoc on VOC07, VOC12 and COCO20k, without and with trained registers."""
    figures = {
        "DeiT-III": ("values", (11.7, 13.1, 10.7), (27.1, 32.7, 25.1)),
        "OpenCLIP": ("values", (38.8, 44.3, 31.0), (37.1, 42.0, 27.9)),
        "DINOv2": ("keys", (35.3, 40.2, 26.9), (55.4, 60.0, 42.0)),
    }
    rows = [
        Row(f"{model}, {version}: {data}", "", "discovery", data, {"LOST CorLoc": value / 100},
            _lost(data, features), needs=_UNPUBLISHED)
        for model, (features, *versions) in figures.items()
        for version, values in zip(("as it is", "4 registers"), versions, strict=True)
        for data, value in zip(("voc07", "voc12", "coco20k"), values, strict=True)
    ]  # fmt: skip
    rows += [
        Row(f"DINOv2 L with registers, as published: {data}", DINOV2_L_REG, "discovery", data,
            {"LOST CorLoc": value / 100}, _lost(data, "keys"),
            remark="distilled from g; figure of facebookresearch/dinov2#381, official LOST code")
        for data, value in (("voc12", 35.9), ("coco20k", 23.4))
    ]  # fmt: skip
    return tuple(rows)


def _lost(data: str, features: str, **more: str) -> dict[str, str]:
    files = {"files": "{data}/coco20k.txt"} if data == "coco20k" else {}
    return {"method": "lost", "features": features, **more, **files}


# -- Jiang et al. ------------------------------------------------------------------------------------


def _feature_rows() -> tuple[Row, ...]:
    """Model: ImageNet, ADE20k, NYUd, and LOST on VOC07, VOC12 and COCO20k."""
    figures = {
        "DINOv2-L": (DINOV2_L, None, (86.36, 48.27, 0.3876, 32.2, 36.8, 25.4)),
        "DINOv2-L, trained registers": (DINOV2_L_REG, None, (86.69, 49.07, 0.3823, 56.2, 60.2, 42.3)),
        "DINOv2-L, test-time register": (DINOV2_L, _DINOV2_L_FIX, (86.38, 49.13, 0.3774, 53.8, 57.9, 41.9)),
        "OpenCLIP B/16": (OPENCLIP_B, None, (77.42, 40.14, 0.6025, 30.8, 35.9, 23.4)),
        "OpenCLIP B/16, test-time register": (
            OPENCLIP_B, _OPENCLIP_B_FIX, (77.53, 40.29, 0.5956, 30.9, 35.9, 23.6),
        ),
    }  # fmt: skip
    rows = []
    for name, (model, recipe, values) in figures.items():
        features = "keys" if "DINOv2" in name else "values"
        for (task, data, metric), value in zip(_FEATURE_COLUMNS, values, strict=True):
            settings, size = dict(_SETTINGS.get(task, {})), 224 if task == "linear" else None
            if task == "discovery":
                settings = _lost(data, features, normalise="true", bias="sweep")
            figure = {metric: value if metric == "RMSE, m" else value / 100}
            rows.append(Row(f"{name}: {data}", model, task, data, figure, settings, recipe, size))
    return tuple(rows)


_FEATURE_COLUMNS = (
    ("linear", "imagenet", "best head on val"),
    ("segmentation", "ade20k", "mIoU"),
    ("depth", "nyu", "RMSE, m"),
    ("discovery", "voc07", "LOST CorLoc"),
    ("discovery", "voc12", "LOST CorLoc"),
    ("discovery", "coco20k", "LOST CorLoc"),
)
_SETTINGS = {"linear": {"protocol": "dinov2", "train_batch": "1024"}}


def _count_rows() -> tuple[Row, ...]:
    """NYUd by the number of test-time registers, which all hold the same; 0 is the model as it is."""
    return tuple(
        Row(f"{n} registers", DINOV2_L, "depth", "nyu", {"RMSE, m": value},
            recipe=FixRecipe(top_k=45, top_layer=17, registers=n) if n else None)
        for n, value in enumerate((0.3876, 0.3774, 0.3771, 0.3785, 0.3791, 0.3795))
    )  # fmt: skip


def _probe_rows() -> tuple[Row, ...]:
    """DINOv2-L: accuracy on ImageNet, CIFAR-10 and CIFAR-100 from single tokens of three versions."""
    versions = {
        "as it is": (DINOV2_L, None, {
            "CLS": (85.6, 99.4, 93.4), "central patch": (73.3, 98.0, 88.1), "outlier": (84.5, 99.2, 92.8),
        }),
        "trained registers": (DINOV2_L_REG, None, {"trained register": (83.1, 99.2, 93.0)}),
        "test-time register": (DINOV2_L, _DINOV2_L_FIX, {"test-time register": (84.5, 99.1, 93.0)}),
    }  # fmt: skip
    return tuple(
        Row(f"{version}: {data}", model, "tokens", data,
            {token: values[i] / 100 for token, values in figures.items()}, recipe=recipe, size=224)
        for version, (model, recipe, figures) in versions.items()
        for i, data in enumerate(("imagenet", "cifar10", "cifar100"))
    )  # fmt: skip


def _zero_shot(
    name: str, model: str, top1: float | None, recipe: FixRecipe | None = None, remark: str = ""
) -> Row:
    figures = {} if top1 is None else {"top-1": top1 / 100}
    return Row(name, model, "zero-shot", "imagenet-val", figures, recipe=recipe, remark=remark)


def _heatmap(name: str, model: str, recipe: FixRecipe | None, *values: float) -> Row:
    figures = dict(zip(("mIoU", "pixel accuracy", "mAP"), (x / 100 for x in values), strict=True))
    data = "imagenet-segmentation"
    return Row(name, model, "zero-shot-segmentation", data, figures, {"side": "224"}, recipe, 224)


def _vlm(name: str, recipe: FixRecipe | None) -> Row:
    remark = f"the paper shows maps, no figure; {_ASSUMED}"
    return Row(name, LLAVA, "vlm", "imagenet-val", settings={"limit": "500"}, recipe=recipe, remark=remark)


def _neurons(name: str, text: str, table: str) -> Row:
    return Row(name, remark=text, needs=f"no evaluation: the rows of {table} find these neurons")


# -- all of them -------------------------------------------------------------------------------------

TABLES = {
    "registers-local": Table(DARCET, "where a patch is and what it shows, from normal patches and outliers", (
        Row("position", DINOV2_G, "position", "imagenet-val",
            {"top-1: normal patches": 0.417, "top-1: outliers": 0.228,
             "distance: normal patches": 0.79, "distance: outliers": 5.09}, {"limit": "2000"}, size=224),
        Row("reconstruction", DINOV2_G, "reconstruction", "imagenet-val",
            {"L2 error: normal patches": 18.38, "L2 error: outliers": 25.23}, {"limit": "2000"}, size=224),
    )),
    "registers-tokens": Table(DARCET, "what one token of DINOv2-g knows of the class", _token_rows()),
    "registers-regimes": Table(DARCET, "trained registers in three ways of training", (
        *_regime_rows(),
        Row("OpenCLIP B/16, as it is: zero-shot", "", "zero-shot", "imagenet-val", {"top-1": 0.599},
            needs=_UNPUBLISHED),
        Row("OpenCLIP B/16, 4 registers: zero-shot", "", "zero-shot", "imagenet-val", {"top-1": 0.601},
            needs=_UNPUBLISHED),
    )),
    "registers-discovery": Table(DARCET, "LOST with trained registers", _lost_rows()),
    "registers-ablation": Table(DARCET, "how many trained registers", tuple(
        Row(f"{n} registers", needs=_TRAINING,
            remark="in words: 1 removes the artifacts, dense tasks peak around 4, ImageNet keeps improving")
        for n in (0, 1, 2, 4, 8, 16)
    )),
    "lost": Table(SIMEONI, "LOST on DINO: whether discovery here is theirs", tuple(
        Row(data, "timm:vit_small_patch16_224.dino", "discovery", data, {"LOST CorLoc": value / 100},
            _lost(data, "keys"))
        for data, value in (("voc07", 61.9), ("voc12", 64.0), ("coco20k", 50.7))
    )),
    "test-time-neurons": Table(JIANG, "how many register neurons", (
        _neurons("OpenCLIP B/16", "10 neurons up to block 5; outliers: norm over 75 in the last block",
                 "test-time-features"),
        _neurons("DINOv2-L", "45 neurons (blocks 17: 17, 16: 9, 15: 9, 14: 8, 13: 1, 12: 1); outliers: norm"
                 " over 150 in the second to last block", "test-time-features"),
        _neurons("CLIP L/14 in LLaVA-Llama-3-8B", "100 neurons of about 100 thousand", "test-time-vlm"),
        Row("InternViT-6B", remark="300 neurons of 576 thousand, up to block 29 of 45",
            needs="a model whose code is not in transformers"),
    )),
    "test-time-features": Table(JIANG, "linear heads and LOST", _feature_rows()),
    "test-time-count": Table(JIANG, "how many test-time registers", _count_rows()),
    "test-time-tokens": Table(JIANG, "what one token of DINOv2-L knows of the class", _probe_rows()),
    "test-time-zero-shot": Table(JIANG, "zero-shot classification with a fix and with its controls", (
        _zero_shot("CLIP L/14", OPENCLIP_L, 76.4, remark=_ASSUMED),
        _zero_shot("CLIP L/14, test-time register", OPENCLIP_L, 76.4, FixRecipe(), remark=_ASSUMED),
        _zero_shot("CLIP B/16", OPENCLIP_B, 71.3),
        _zero_shot("CLIP B/16, test-time register", OPENCLIP_B, 71.3, _OPENCLIP_B_FIX),
        _zero_shot("CLIP B/16, attention bias", OPENCLIP_B, 71.3,
                   FixRecipe(top_k=10, top_layer=5, bias=True)),
        _zero_shot("CLIP B/16, neurons zeroed", OPENCLIP_B, None,
                   FixRecipe(top_k=10, top_layer=5, registers=0),
                   remark="in words: without a register, zero-shot loses 15 points"),
    )),
    "test-time-segmentation": Table(JIANG, "zero-shot segmentation by CLS attention", (
        _heatmap("DINOv2-L", DINOV2_L, None, 38.3, 87.6, 80.6),
        _heatmap("DINOv2-L, test-time register", DINOV2_L, _DINOV2_L_FIX, 38.9, 87.6, 81.1),
        _heatmap("OpenCLIP B/16", OPENCLIP_B, None, 34.7, 76.0, 79.2),
        _heatmap("OpenCLIP B/16, test-time register", OPENCLIP_B, _OPENCLIP_B_FIX, 40.0, 74.2, 82.1),
    )),
    "test-time-attack": Table(JIANG, "typographic attacks on OpenAI's CLIP (RTA-100)", (
        Row("success", remark="50.5% -> 7.5%", needs="a task that this version does not have"),
    )),
    "test-time-vlm": Table(JIANG, "what LLaVA-Llama-3-8B's text attends to", (
        _vlm("as it is", None), _vlm("test-time register", FixRecipe(top_k=100)),
    )),
}  # fmt: skip
