from .presented import Presented
from .progress import Stages, Told, progress_bar, say_to
from .spelling import did_you_mean, one_of
from .summary import Step, Summary, shell_lines, terminal_width
from .tables import PHANTOM, called, printable, text_table, wrapped
from .words import in_brief, number, percent, short_name

__all__ = [
    "PHANTOM",
    "Presented",
    "Stages",
    "Step",
    "Summary",
    "Told",
    "called",
    "did_you_mean",
    "in_brief",
    "number",
    "one_of",
    "percent",
    "printable",
    "progress_bar",
    "say_to",
    "shell_lines",
    "short_name",
    "terminal_width",
    "text_table",
    "wrapped",
]
