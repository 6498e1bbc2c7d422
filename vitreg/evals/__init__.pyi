from .result import Comparison, Metric, Result, compare, differences
from .tasks import TASKS, Task, evaluate, find_task

__all__ = [
    "TASKS",
    "Comparison",
    "Metric",
    "Result",
    "Task",
    "compare",
    "differences",
    "evaluate",
    "find_task",
]
