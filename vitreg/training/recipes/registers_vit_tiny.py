"""Four registers for the public ViT-Ti, whose corner patches are artifacts, by self-distillation.

    vitreg train registers_vit_tiny --data photos/ -o run/ --set val=imagenette/val

photos/ is any folder of photos; labels are not used.
"""

from vitreg.training.distillation import Distillation

recipe = Distillation(
    about="4 registers for ViT-Ti/16 (AugReg, ImageNet-21k to 1k) at 224 px, by self-distillation",
    expected="outliers 2.01% -> 0.002% of patches, top-1 on Imagenette val 72.2% before and after;"
    " with token splitting as teacher 0 and 72.8% in 10 minutes (docs/training.md)",
    cost="17 minutes of one CPU core (EPYC, bf16-mixed)",
    pretrained="timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    registers=4,
    image_size=224,
    batch_size=32,
    steps=200,
    warmup=20,
    lr=1e-4,
    weight_decay=0.0,
    views=4,
    checkpoint_every=100,
    diagnose_every=50,
    evaluate_every=50,
)
