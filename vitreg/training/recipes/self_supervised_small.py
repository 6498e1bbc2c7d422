"""draft"""

from vitreg.training.self_supervised import SelfSupervised

recipe = SelfSupervised(
    about="DINOv2's objective on a small ViT.",
    expected="",
    cost="",
    data="imagenette",
    model="vit_tiny_patch16_224",
    model_args={"patch_size": 16, "depth": 4},
    image_size=96,
    local_size=48,
    local_crops=2,
    global_scale=(0.25, 1.0),
    local_scale=(0.05, 0.25),
    jitter=0.3,
    output_dim=512,
    hidden_dim=256,
    bottleneck_dim=64,
    norm_last_layer=True,
    freeze_last_layer=20,
    teacher_temp=0.04,
    momentum=0.98,
    batch_size=32,
    steps=400,
    warmup=40,
    lr=2e-3,
    weight_decay=0.04,
    clip_grad=3.0,
    diagnose_every=0,
    evaluate_every=100,
    checkpoint_every=0,
)
