"""What `vitreg papers` does: list the papers' tables, run their rows, keep what was measured here.

print(overview())
run_table("test-time-segmentation", Path("/data"), load)
print(table_text("test-time-segmentation"))
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
