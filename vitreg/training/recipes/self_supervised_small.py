"""DINOv2's objective on a small ViT, with and without registers, on one CPU core.

    vitreg train self_supervised_small --data imagenette/ -o run/
    vitreg train self_supervised_small --data imagenette/ -o run4/ --set registers=4

`data` holds train/CLASS/ and val/CLASS/; training sees no label, k-NN on val/ does. Measure it against
`knn_random` in the log, the same ViT with random weights, and not against chance: colours alone tell some
classes apart.

Sinkhorn, because with a moving centre the teacher of such a short run ended near one answer to everything, or
near no answer: see entropy and entropy_mean in the log.
"""

from vitreg.training.self_supervised import SelfSupervised

recipe = SelfSupervised(
    about="DINOv2's objective (DINO, iBOT, KoLeo) on a ViT of 2 million parameters and photos of 96 pixels.",
    expected="k-NN top-1 on 500 photos of Imagenette 38.0% and 34.2% without registers (two seeds), 35.8% and"
    " 32.2% with 4; random weights 29.0, 30.2, 30.2 and 29.4%; chance 10%",
    cost="14 minutes of one CPU core (EPYC, bf16-mixed) and some of another for the photos",
    model="vit_tiny_patch16_224",
    model_args={"depth": 4},
    image_size=96,
    local_size=48,
    local_crops=2,
    global_scale=(0.4, 1.0),
    local_scale=(0.15, 0.4),
    jitter=0.8,
    output_dim=64,
    hidden_dim=256,
    bottleneck_dim=64,
    norm_last_layer=True,
    teacher_temp=0.02,
    warmup_teacher_temp=0.02,
    momentum=0.98,
    centring="sinkhorn",
    ibot_weight=0.2,
    koleo_weight=0.01,
    batch_size=64,
    micro_batch=64,
    steps=1000,
    warmup=100,
    lr=2e-3,
    weight_decay=0.04,
    clip_grad=3.0,
    log_every=20,
    checkpoint_every=500,
    diagnose_every=500,
    evaluate_every=250,
)
