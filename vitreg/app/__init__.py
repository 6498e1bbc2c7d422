"""The explorer: a local page with a model's norms, attention, neurons and objects, before and after a fix.

    vitreg app [MODEL] [--images IMAGES] [--fix FIX]

From Python, and as the whole `app.py` of a Hugging Face Space:

    from vitreg.app import launch

    launch("timm:deit3_large_patch16_224.fb_in22k_ft_in1k")     # without arguments: the bundled example

explorer.py holds the model and what was seen of it, view.py what a user has chosen, shown.py what that looks
like, page.py the components.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
