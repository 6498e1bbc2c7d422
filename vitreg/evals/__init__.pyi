from .result import Metric, Result, compare, differences
from .tasks import TASKS, Task, evaluate, find_task

__all__ = [
    "TASKS",
    "Metric",
    "Result",
    "Task",
    "compare",
    "differences",
    "evaluate",
    "find_task",
]
