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
    expected="On 1500 + 500 photos of Imagenette, where random weights give 29.0% k-NN top-1 (30.2% with 4"
    " registers; chance: 10%): 31.0% after 250 steps, 29.6% after 500; 28.0% after 250 with 4 registers. Not"
    " above random weights, then (500 photos tell apart no less than 4 points). All 2000: not measured.",
    cost="About 10 minutes of one core (EPYC, bf16-mixed), and 4 of another for the photos.",
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
