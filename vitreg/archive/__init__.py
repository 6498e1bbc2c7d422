"""Features of whole archives: photos, tar shards or Parquet in, Parquet and safetensors out, on Ray Data.

    vitreg features MODEL DATA -o OUT [--fix FIX] [--tokens cls,registers,patches] [--workers N]

    with fix.applied_to(vit):
        found = vitreg.extract_archive(vit, "s3://bucket/photos", "s3://bucket/features")

sources.py finds and reads photos, plan.py cuts them into shards and writes that down, worker.py makes one
shard's files (parts.py) and its entry, engine.py runs workers on Ray, run.py drives it all, manifest.py
gathers the entries. place.py is a folder anywhere.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
