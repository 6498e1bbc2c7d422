from .style import house_style, png

__all__ = [
    "house_style",
    "png",
]
