"""The papers' evaluations, each a module with one `evaluate(vit, data, config) -> Result`.

from vitreg.evals import evaluate
result = evaluate("discovery", vit, "VOCdevkit/VOC2012")
with fix.applied_to(vit):
    after = evaluate("discovery", vit, "VOCdevkit/VOC2012")
print(compare(result, after))
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
