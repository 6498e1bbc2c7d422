"""A ViT of 2.7 million parameters on 1500 photos of ten classes, supervised as in DeiT-III.

    vitreg train supervised_small --data imagenette/ -o run/ --set registers=4

imagenette/ holds train/CLASS/ and val/CLASS/. Chance is 10%.
"""

from vitreg.training.supervised import Supervised

recipe = Supervised(
    about="ViT (width 192, depth 6, patch 16) on Imagenette at 112 px, supervised",
    expected="top-1 on val 49.4% and 47.4% without registers (two seeds), 49.0% and 46.2% with 4"
    " (chance 10%); no outliers, norms up to 4.0x the median",
    cost="9 minutes of one CPU core (EPYC, bf16-mixed)",
    model="vit_tiny_patch16_224",
    model_args={"depth": 6},
    image_size=112,
    batch_size=50,
    steps=1200,
    warmup=60,
    lr=5e-4,
    augment="",  # on so few photos 3-Augment hides the colours that a small ViT learns from first
    crop_scale=0.4,
    mixup=0.0,
    cutmix=0.0,
    diagnose_every=200,
    evaluate_every=200,
)
