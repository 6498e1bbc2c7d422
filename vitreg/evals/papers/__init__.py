"""What `vitreg papers` does: list the papers' tables, run their rows, keep what was measured here.

print(overview())
run_table("test-time-segmentation", Path("/data"), load)
print(table_text("test-time-segmentation"))
"""

from vitreg.evals.papers.overview import overview, table_text
from vitreg.evals.papers.running import run_table
from vitreg.evals.papers.tables import DATA, TABLES, DataSet, Recipe, Row, Table

__all__ = ["DATA", "TABLES", "DataSet", "Recipe", "Row", "Table", "overview", "run_table", "table_text"]
