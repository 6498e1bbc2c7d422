"""Photos with boxes as Pascal VOC has them."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

OBJECT = "<object><name>cat</name><bndbox>{}</bndbox></object>"


def voc_object(left: Any, top: Any, right: Any, bottom: Any) -> str:
    return OBJECT.format(f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>")


def voc_xml(*objects: str, size: tuple[int, int] = (30, 40)) -> str:
    height, width = size
    shape = f"<size><width>{width}</width><height>{height}</height></size>"
    return f"<annotation>{shape}{''.join(objects)}</annotation>"


def save_voc(root: Path) -> Path:
    """Six photos of three sizes, half of them with an object that fills most of the photo."""
    random = np.random.default_rng(0)
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for i, (height, width) in enumerate([(30, 50), (64, 40), (45, 45)] * 2):
        pixels = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(root / f"JPEGImages/{i}.jpg")
        right = width if i % 2 else width // 3
        text = voc_xml(voc_object(1, 1, right, height), size=(height, width))
        (root / f"Annotations/{i}.xml").write_text(text)
    (root / "ImageSets/Main/trainval.txt").write_text("".join(f"{i}\n" for i in range(6)))
    return root
