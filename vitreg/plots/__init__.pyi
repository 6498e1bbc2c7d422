from .style import house_style, image, png

__all__ = [
    "house_style",
    "image",
    "png",
]
