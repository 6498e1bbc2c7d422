"""How models are named."""

LIBRARIES = ("timm", "hf", "open_clip")  # what stands before the first colon

SCHEMES = (
    "timm:NAME, timm:hf-hub:ID, hf:ID, open_clip:ARCH/TAG, or a folder in timm's or transformers' format"
)
