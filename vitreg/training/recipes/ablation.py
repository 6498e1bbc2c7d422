"""The paper's ablation in miniature: a ViT of 0.8 million parameters, with 0 to 16 registers, on ten classes.

    vitreg train ablation --data imagenette/ -o run/ --registers 0 1 2 4 8 16 --precision bf16-mixed

imagenette/ holds train/CLASS/ and val/CLASS/. Chance is 10%.
"""

from vitreg.training.supervised import Supervised

recipe = Supervised(
    about="ViT (width 128, depth 4, patch 8) on Imagenette at 64 px, supervised",
    expected="with 4 registers top-1 37.8% (chance is 10%), no outliers, CamVid mIoU 14.4%; others not run",
    cost="19,200 photos a run, at about 110 photos/s on one CPU core in bf16",
    model="vit_tiny_patch16_224",
    model_args={"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4},
    image_size=64,
    batch_size=32,
    steps=600,
    warmup=60,
    lr=2e-3,
    augment="",
    color_jitter=0.0,
    crop_scale=0.35,
    mixup=0.0,
    cutmix=0.0,
    log_every=20,
    diagnose_every=100,
    evaluate_every=100,
)
