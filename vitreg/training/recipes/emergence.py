"""A search for artifacts that emerge by themselves: a ViT-Ti from scratch, much longer than it needs to fit.

    vitreg train emergence --data imagenette/ -o run/

The log is the curve: `outliers`, `outlier_layer` and `norm_ratio` every 250 steps. See docs/training.md.
"""

from vitreg.training.supervised import Supervised

recipe = Supervised(
    about="ViT-Ti (width 192, depth 12, patch 16) on Imagenette at 112 px, supervised, hundreds of epochs",
    expected="no artifacts: in 7449 steps (248 epochs) no second population of norms, the largest 2.8 to 3.4x"
    " the median; top-1 49.4%",
    cost="53 minutes of one CPU core (EPYC, bf16-mixed) for those 7449 steps",
    model="vit_tiny_patch16_224",
    image_size=112,
    batch_size=50,
    steps=12_000,
    warmup=200,
    lr=5e-4,
    weight_decay=0.05,
    augment="",
    crop_scale=0.4,
    mixup=0.0,
    cutmix=0.0,
    log_every=50,
    checkpoint_every=250,
    diagnose_every=250,
    evaluate_every=1000,
)
