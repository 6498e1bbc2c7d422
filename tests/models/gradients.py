"""A photo whose pixels tell where they were."""

import PIL.Image


def gradient_photo() -> PIL.Image.Image:
    return PIL.Image.linear_gradient("L").convert("RGB").resize((90, 60))
