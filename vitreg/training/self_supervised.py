"""Self-supervision as in DINOv2: a student learns from crops what its own moving average sees in others.

DINO on the CLS token of all crops, iBOT on masked patches of the large ones, KoLeo to spread the photos
out (arXiv 2104.14294, 2111.07832, 2304.07193). Losses, heads, crops, masks and schedules are lightly's, the
ViTs timm's.
"""

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from vitreg.data.datasets.classes import splits
from vitreg.data.listing import photos_in
from vitreg.errors import DataError, MissingExtraError
from vitreg.evals import knn
from vitreg.models.backbone import wrap
from vitreg.training.centring import DinoLoss, IbotLoss, balanced, health
from vitreg.training.data import TrainingPhotos, watched
from vitreg.training.objective import Objective
from vitreg.training.recipe import Recipe
from vitreg.training.student import Network

try:
    from lightly.loss import KoLeoLoss
    from lightly.models.utils import random_block_mask, update_momentum
    from lightly.transforms.dino_transform import DINOTransform
    from lightly.utils.scheduler import cosine_schedule, linear_warmup_schedule
except ImportError as error:
    raise MissingExtraError("lightly", "train") from error


@dataclass(frozen=True)
class SelfSupervised(Recipe):
    """`data`: photos in folders, or a folder with train/CLASS/ and val/CLASS/. Labels are for k-NN alone.

    image_size, local_size      sides of the 2 large crops and of the `local_crops` small ones, in pixels
    global_scale, local_scale   the share of a photo's area that they show
    jitter                      the share of crops whose colours are changed
    output_dim, hidden_dim, bottleneck_dim   of the two heads, one for CLS and one for patches
    norm_last_layer             keep the prototypes' lengths at 1
    freeze_last_layer           steps in which the prototypes stay as they are
    student_temp, teacher_temp, warmup_teacher_temp, warmup_teacher_temp_steps   of the softmaxes
    momentum                    of the teacher, on a half cosine to 1
    centring                    what keeps the teacher from one answer to everything. "mean": subtract a
                                moving mean of its scores, as in DINO. "sinkhorn": choose all prototypes
                                equally often within a micro-batch (in DINOv2, over all GPUs)
    center_momentum             of the moving mean
    mask_probability            share of large crops with masked patches
    mask_ratio                  least and largest share of masked patches in them
    ibot_weight, koleo_weight   beside the DINO loss, whose weight is 1
    neighbours                  how many vote in k-NN
    """

    local_size: int = 96
    local_crops: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    jitter: float = 0.8
    output_dim: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    norm_last_layer: bool = False
    freeze_last_layer: int = 0
    student_temp: float = 0.1
    teacher_temp: float = 0.07
    warmup_teacher_temp: float = 0.04
    warmup_teacher_temp_steps: int = 0
    momentum: float = 0.992
    centring: str = "mean"
    center_momentum: float = 0.9
    mask_probability: float = 0.5
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    neighbours: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained is not None:
            raise DataError(
                f"pretrained={self.pretrained}: self-supervision starts from random weights here."
            )
        if self.centring not in ("mean", "sinkhorn"):
            raise DataError(f"centring={self.centring!r}: expected 'mean' or 'sinkhorn'.")
        if self.koleo_weight and (self.micro_batch or self.batch_size) < 2:
            raise DataError(
                "micro_batch=1: KoLeo compares the photos of a micro-batch. Use 2 or more, or koleo_weight=0."
            )

    def objective(self) -> "DinoIbot":
        return DinoIbot(self)


class DinoIbot(Objective):
    """Student and teacher. `vit` is the teacher's, a moving average: the one that papers evaluate."""

    def __init__(self, recipe: SelfSupervised) -> None:
        super().__init__()
        self.recipe = recipe
        self.student, self.teacher = _network(recipe), _network(recipe)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.vit = self.teacher.vit
        self.grid = _grid(self.vit, recipe)
        stated = resolve_model_data_config(self.vit)
        side = {"input_size": (3, recipe.image_size, recipe.image_size)}
        self.preprocess: Any = create_transform(**(stated | side), is_training=False)
        self.labelled = _labelled(recipe)
        paths = photos_in(_folder(recipe.data))
        self.dataset = TrainingPhotos(paths, _crops(recipe, stated))
        self.photos = watched(paths, self.preprocess)
        self.dino = DinoLoss(recipe.output_dim, recipe.center_momentum)
        self.ibot = IbotLoss(recipe.output_dim, recipe.center_momentum)
        self.dino.student_temp = self.ibot.student_temp = recipe.student_temp
        self.koleo = KoLeoLoss()
        self.done: Tensor  # optimizer steps
        self.register_buffer("done", torch.zeros((), dtype=torch.long))
        for head in (self.student.cls_head, self.student.patch_head):
            # A gradient of zero, where lightly's None would make DistributedDataParallel wait for it.
            head.last_layer.weight_v.register_hook(
                lambda grad: grad * (self.done >= recipe.freeze_last_layer)
            )

    def train(self, mode: bool = True) -> "DinoIbot":
        """As in torch, but the teacher never drops a path."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: list[Tensor]) -> dict[str, Tensor]:
        """The losses of a list of crops, each (b, 3, side, side): 2 large, then small ones.

        KoLeo looks for neighbours within the micro-batch, as DINOv2 does within one GPU.
        """
        large, small = torch.cat(batch[:2]), batch[2:]
        mask = self._mask(len(large)).to(large.device)
        hidden = mask.flatten(1)
        with torch.no_grad():
            seen, patches = self.teacher(large)
            target, patch_target = self.teacher.cls_head(seen), self.teacher.patch_head(patches[hidden])
        tokens, patches = self.student(large, mask)
        guess, patch_guess = self.student.cls_head(tokens), self.student.patch_head(patches[hidden])
        guesses = [*guess.chunk(2)]
        if small:
            guesses += self.student.cls_head(self.student(torch.cat(small))[0]).chunk(len(small))
        with torch.autocast(large.device.type, enabled=False):  # logarithms, and differences of large numbers
            temperature = self._temperature()
            target, patch_target = target.float(), patch_target.float()
            if self.recipe.centring == "sinkhorn":
                target, patch_target = balanced(target, temperature), balanced(patch_target, temperature)
            dino = self.dino([*target.chunk(2)], [guess.float() for guess in guesses], temperature)
            ibot = self.ibot(patch_target, patch_guess.float(), mask, temperature)
            first, second = tokens.float().chunk(2)
            koleo = self.koleo(first) + self.koleo(second)
            signs = health(seen.float(), target - self.dino.center[0], temperature)
        loss = dino + self.recipe.ibot_weight * ibot + self.recipe.koleo_weight * koleo
        parts = {"dino": dino.detach(), "ibot": ibot.detach(), "koleo": koleo.detach()}
        return {"loss": loss, **parts, **signs}

    def after_step(self, step: int, steps: int) -> None:
        """Move the centres, and the teacher towards the student."""
        if self.recipe.centring == "mean":
            self.dino.move_center()
            self.ibot.move_center()
        momentum = cosine_schedule(step - 1, steps, self.recipe.momentum, 1.0)
        update_momentum(self.student, self.teacher, momentum)
        self.done.fill_(step)

    def evaluate(self) -> dict[str, float]:
        """k-NN top-1 (%) of the teacher's CLS, and of a ViT with random weights: what learning adds to.

        Nothing where `data` has no train/CLASS and val/CLASS.
        """
        if not self.labelled:
            return {}
        return {"knn": self._knn(self.vit), "knn_random": self._knn_random}

    @cached_property
    def _knn_random(self) -> float:
        with torch.random.fork_rng():
            torch.manual_seed(self.recipe.seed)
            return self._knn(self.recipe.build(dynamic_img_size=True).eval().to(self.done.device))

    def _knn(self, vit: nn.Module) -> float:
        k = self.recipe.neighbours
        result = knn.evaluate(
            wrap(vit, self.preprocess, image_size=self.recipe.image_size),
            self.recipe.data,
            knn.KnnConfig(k=k, poolings="cls", workers=0),
        )
        return 100 * result.metrics[f"cls k={k}"].value

    def _temperature(self) -> float:
        r = self.recipe
        return linear_warmup_schedule(
            int(self.done), r.warmup_teacher_temp_steps, r.warmup_teacher_temp, r.teacher_temp
        )

    def _mask(self, crops: int) -> Bool[Tensor, "b i j"]:
        """Blocks from torch's generator: `random`, lightly's source, is drawn on by type checkers as well."""
        random.seed(int(torch.randint(2**31, ())))
        low, high = self.recipe.mask_ratio
        return random_block_mask(
            (crops, *self.grid),
            batch_mask_ratio=self.recipe.mask_probability,
            min_image_mask_ratio=low,
            max_image_mask_ratio=high,
            min_num_masks_per_block=_smallest_block(self.grid, low),
        )


def _network(recipe: SelfSupervised) -> Network:
    return Network(
        recipe.build(dynamic_img_size=True),
        hidden_dim=recipe.hidden_dim,
        bottleneck_dim=recipe.bottleneck_dim,
        output_dim=recipe.output_dim,
        norm_last_layer=recipe.norm_last_layer,
    )


def _folder(data: str) -> Path:
    """Where the training photos are: in train/ if there is one."""
    if not data:
        raise DataError("data is not set. Expected a folder of photos: --data DIR.")
    root = Path(data)
    return root / "train" if (root / "train").is_dir() else root


def _labelled(recipe: SelfSupervised) -> bool:
    """Whether k-NN is possible. Raises DataError now for what it would stumble over after hours."""
    if not recipe.data or not (Path(recipe.data) / "val").is_dir():
        return False
    photos = len(splits(recipe.data)[0].labels)
    if not 1 <= recipe.neighbours <= photos:
        raise DataError(f"neighbours={recipe.neighbours}: expected 1 to {photos}, the photos in train/.")
    return True


def _grid(vit: Any, recipe: SelfSupervised) -> tuple[int, int]:
    """The patches of a large crop (rows, columns). Raises DataError for sizes that do not fit."""
    patch = vit.patch_embed.patch_size[0]
    for name in ("image_size", "local_size"):
        side = getattr(recipe, name)
        if side < patch or side % patch:
            raise DataError(f"{name}={side}: expected a multiple of the patch size, {patch}.")
    rows: int = recipe.image_size // patch
    if not _smallest_block((rows, rows), recipe.mask_ratio[0]):
        raise DataError(
            f"mask_ratio={recipe.mask_ratio} of {rows} x {rows} patches may be less than one patch. Expected"
            " a larger image_size or a larger least share."
        )
    return rows, rows


def _smallest_block(grid: tuple[int, int], ratio: float) -> int:
    return min(4, int(grid[0] * grid[1] * ratio))


def _crops(recipe: SelfSupervised, stated: dict[str, Any]) -> DINOTransform:
    """DINO's augmentations, with the normalisation that timm states for the model and saves with it."""
    return DINOTransform(
        global_crop_size=recipe.image_size,
        global_crop_scale=recipe.global_scale,
        local_crop_size=recipe.local_size,
        local_crop_scale=recipe.local_scale,
        n_local_views=recipe.local_crops,
        cj_prob=recipe.jitter,
        normalize={"mean": list(stated["mean"]), "std": list(stated["std"])},
    )
