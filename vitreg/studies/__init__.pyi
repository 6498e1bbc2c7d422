from .noop import NoopTest, noop_test
from .register_maps import RegisterStudy, what_registers_learn
from .shift_figures import shift_figure

__all__ = [
    "NoopTest",
    "RegisterStudy",
    "noop_test",
    "shift_figure",
    "what_registers_learn",
]
