from .batches import Batch
from .imagenet import wordnet_classes
from .images import Images, demo_photos, read_images

__all__ = [
    "Batch",
    "Images",
    "demo_photos",
    "read_images",
    "wordnet_classes",
]
