"""DINOv2's ViT-L/14 with four registers on ImageNet-22k: the self-supervised model of the registers paper.

    torchrun --nnodes 12 --nproc-per-node 8 -m vitreg train self_supervised_vit_l --data imagenet22k/ -o run/

`data` is any folder of photos: labels are not used. With train/CLASS/ and val/CLASS/ in it, k-NN is logged.

Four registers, and all else as in DINOv2: the registers paper (arXiv 2309.16588). What that is: DINOv2's
published configuration for this model (facebookresearch/dinov2, configs/train/vitl14.yaml over
ssl_default_config.yaml, on 96 GPUs with 32 photos each): 625,000 steps of 3072 photos, 100,000 of them
warm-up; AdamW at 2e-4 x sqrt(3072 / 1024), the same for all blocks; gradients up to 3; two crops of 224
pixels with 0.32-1 of the photo and eight of 98 with 0.05-0.32; stochastic depth 0.4; layer scale 1e-5; two
heads with 131,072 prototypes each and a bottleneck of 384; prototypes still for 1250 steps; teacher
temperature 0.04 to 0.07 in 37,500 steps; momentum 0.994 to 1; Sinkhorn-Knopp; half the crops masked, by
10-50%; KoLeo 0.1.

Ours: Sinkhorn sees one micro-batch (there, all GPUs' photos); weight decay 0.04 throughout, where it ends at
0.2; the same learning rate for the patch embedding, where it has 0.2 of it; timm's MLP, as in the published
ViT-L (which was distilled), where it has SwiGLU; stochastic depth that grows linearly from block to block;
384 also for the bottleneck of the patches' head, where it has 256.
"""

from vitreg.training.self_supervised import SelfSupervised

recipe = SelfSupervised(
    about="DINOv2 (DINO, iBOT, KoLeo) for ViT-L/14 with 4 registers on ImageNet-22k.",
    expected="The registers paper: ImageNet linear 84.8%, ADE20k 47.9 mIoU, NYUd 0.366 rmse and no outliers;"
    " with registers=0 84.3%, 46.6, 0.378, and outliers. Not run by us.",
    cost="1.9 billion photos: 3.3 days on 96 A100-80GB, as DINOv2's authors state it for their code.",
    model="vit_large_patch14_dinov2",
    model_args={"drop_path_rate": 0.4},
    registers=4,
    image_size=224,
    local_size=98,
    local_crops=8,
    output_dim=131072,
    bottleneck_dim=384,
    freeze_last_layer=1250,
    warmup_teacher_temp_steps=37_500,
    momentum=0.994,
    centring="sinkhorn",
    batch_size=3072,
    micro_batch=32,
    steps=625_000,
    warmup=100_000,
    lr=3.46e-4,
    weight_decay=0.04,
    clip_grad=3.0,
    log_every=50,
    checkpoint_every=2_500,
    diagnose_every=12_500,
    evaluate_every=12_500,
)
