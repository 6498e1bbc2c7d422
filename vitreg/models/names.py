"""How models are named."""

SCHEMES = (
    "timm:NAME, timm:hf-hub:ID, hf:ID, open_clip:ARCH/TAG, or a folder in timm's or transformers' format"
)
