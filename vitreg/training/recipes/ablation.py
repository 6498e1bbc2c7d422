"""The paper's ablation in miniature: a ViT of 0.8 million parameters, with 0 to 16 registers, on ten classes.

    vitreg train ablation --data imagenette/ -o run/ --registers 0 1 2 4 8 16 --precision bf16-mixed

imagenette/ holds train/CLASS/ and val/CLASS/. Chance is 10%.
"""

from vitreg.training.supervised import Supervised

recipe = Supervised(
    about="ViT (width 128, depth 4, patch 8) on Imagenette at 64 px, supervised",
    expected="no outliers in any arm; top-1 35.6, 41.0, 36.8, 34.6, 37.6, 28.2% with 0, 1, 2, 4, 8, 16"
    " registers, CamVid mIoU 14.2, 13.6, 15.3, 15.0, 14.4, 13.8% (chance 10%; one seed each)",
    cost="14 minutes for the six of them on one CPU core (EPYC, bf16-mixed), evaluations included",
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
