"""OpenCLIP's ViT-B/16 with four registers, on LAION-400M: the full size.

    vitreg train text_vit_b --data 'laion400m/{00000..41455}.tar' --set val=imagenet/val -o run/

Darcet et al. train OpenCLIP's ViT-B/16 with and without registers on a licensed corpus that cannot be had,
and give no batch, rate or length that we know of. Here they are those of open_clip's own run on LAION-400M
(`laion400m_e32`): batch 33,792 (open_clip's docs/PRETRAINED.md), learning rate 5e-4, 10,000 steps of warm-up,
32 epochs of 407,332,084 pairs (LAION's scaling-laws-openclip, trained_models_info.csv). Weight decay 0.2,
betas 0.9 and 0.98, no clipping of gradients, crops of 0.9 to 1 are open_clip's defaults.

Ours: AdamW's eps is 1e-8, open_clip's 1e-6; positions and CLS are drawn as timm does; the loss is computed in
float32, the towers in the machine's precision. The architecture is timm's twin of open_clip's tower (a norm
before the blocks). For the arm without registers set registers=0.

One process indexes about 10,000 pairs a second, once. So index shards ahead in parallel, by making
`ImageTextShards(SOME)` of parts of them: the indices stay beside the shards. Where a process's part of the
batch does not fit into memory, chunk=192 keeps the activations of 192 pairs at a time, for a third more time.
"""

import open_clip

from vitreg.training.text import TextSupervised

_BATCH, _PAIRS, _EPOCHS = 33_792, 407_332_084, 32

recipe = TextSupervised(
    about="OpenCLIP's ViT-B/16 with 4 registers, text-supervised on LAION-400M",
    expected="zero-shot ImageNet top-1 of 67.1% without registers (open_clip); Darcet et al. on their data:"
    " 59.9% without, 60.1% with. Not run by us.",
    cost="176 A100 (40 GB) for 61 hours without registers (open_clip), 2% more with 4 (Darcet et al.)",
    model="vit_base_patch16_clip_224",
    registers=4,
    image_size=224,
    batch_size=_BATCH,
    steps=_EPOCHS * _PAIRS // _BATCH,
    warmup=10_000,
    lr=5e-4,
    min_lr=0.0,
    weight_decay=0.2,
    betas=(0.9, 0.98),
    clip_grad=None,
    prompts=tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES),
    log_every=100,
    checkpoint_every=1000,
    diagnose_every=5000,
    evaluate_every=12_054,  # an epoch
)
