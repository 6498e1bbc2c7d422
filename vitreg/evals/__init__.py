"""The papers' evaluations, each a module with one `evaluate(vit, data, config) -> Result`.

from vitreg.evals import evaluate
result = evaluate("discovery", vit, "VOCdevkit/VOC2012")
with fix.applied_to(vit):
    after = evaluate("discovery", vit, "VOCdevkit/VOC2012")
print(compare(result, after))
"""

from vitreg.evals.result import Metric, Result, compare, differences
from vitreg.evals.tasks import TASKS, Task, evaluate, find_task
from vitreg.features.config import Config
from vitreg.features.extraction import Features, extract_features

__all__ = [
    "TASKS",
    "Config",
    "Features",
    "Metric",
    "Result",
    "Task",
    "compare",
    "differences",
    "evaluate",
    "extract_features",
    "find_task",
]
