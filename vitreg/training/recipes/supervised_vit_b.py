"""DeiT-III's ViT-B/16 with four registers on ImageNet-22k: the supervised model of the registers paper.

    torchrun --nnodes 4 --nproc-per-node 8 -m vitreg train supervised_vit_b --data imagenet22k/ -o run/

imagenet22k/ holds train/CLASS/ and val/CLASS/. ImageNet-22k has no val of its own: move some photos of each
class there.

The registers paper (arXiv 2309.16588) trains DeiT-III on ImageNet-22k, as it is but for the registers. What
that is: the command for ViT-B and ImageNet-21k in facebookresearch/deit, README_revenge.md: 240 epochs of
224 px, the first 5 of them warm-up from 1e-6; batch 2048 (4 nodes, 8 GPUs each, 64 photos); LAMB at 1e-3,
where the table of the paper (arXiv 2204.07118) has 3e-3; weight decay 0.02; stochastic depth 0.1;
cross-entropy with label smoothing 0.1; CutMix 1.0 and no Mixup; 3-Augment, colour jitter 0.3 and the simple
random crop. The paper also clips gradients at 1. Layer scale at 1e-6 and no position for CLS are timm's for
this model.

Ours: the simple crop is timm's "rkrr", which first stretches half of the photos by up to 1.1 in one
direction; stochastic depth grows linearly from block to block; the photos are counted as in all of
ImageNet-22k.

On ImageNet-1k the same README trains ViT-B for 800 epochs of 192 px (then tunes it at 224): --set
image_size=192 steps=500400 warmup=3127 lr=3e-3 weight_decay=0.05 drop_path=0.2 loss=bce smoothing=0 mixup=0.8
crop=rrc crop_scale=0.08. It repeats each photo three times in a batch, which is left out here.
"""

from vitreg.training.supervised import Supervised

_BATCH, _PHOTOS, _EPOCHS = 2048, 14_197_122, 240

recipe = Supervised(
    about="DeiT-III's ViT-B/16 with 4 registers on ImageNet-22k, supervised",
    expected="The registers paper: ImageNet linear 84.7%, ADE20k 39.1 mIoU, NYUd 0.512 rmse and no outliers;"
    " with registers=0 84.7%, 38.9, 0.511, and outliers. Not run by us.",
    cost="3.7e20 FLOPs (240 epochs, three times a forward pass of 36 GFLOPs each): 32 hours on 32 GPUs that"
    " do 100 TFLOP/s each. Not run by us.",
    model="deit3_base_patch16_224",
    registers=4,
    image_size=224,
    batch_size=_BATCH,
    steps=_EPOCHS * _PHOTOS // _BATCH,
    warmup=5 * _PHOTOS // _BATCH,
    optimizer="lamb",
    lr=1e-3,
    min_lr=1e-6,
    weight_decay=0.02,
    clip_grad=1.0,
    augment="3a",
    color_jitter=0.3,
    crop="rkrr",
    crop_scale=1.0,
    mixup=0.0,
    cutmix=1.0,
    smoothing=0.1,
    loss="ce",
    drop_path=0.1,
    log_every=100,
    checkpoint_every=1000,
    diagnose_every=6932,  # an epoch
    evaluate_every=6932,
)
