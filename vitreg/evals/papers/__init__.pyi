from .printed import overview, table_text
from .running import run_table
from .tables import DATA, TABLES, DataSet, FixRecipe, Row, Table

__all__ = [
    "DATA",
    "TABLES",
    "DataSet",
    "FixRecipe",
    "Row",
    "Table",
    "overview",
    "run_table",
    "table_text",
]
