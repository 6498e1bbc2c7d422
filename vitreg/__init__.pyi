# The public names, and where each is. They are loaded when they are first used.
from .archive import Extraction, extract_archive
from .data.batches import Batch
from .data.images import Images, read_images
from .diagnosis.diagnosing import diagnose
from .diagnosis.emergence import Emergence
from .diagnosis.outliers import OutlierRule
from .diagnosis.result import Diagnosis
from .errors import (
    ArchiveError,
    DataError,
    FixError,
    FixWarning,
    ImageError,
    MissingExtraError,
    ModelLoadError,
    ModelWarning,
    NonFiniteError,
    OutputError,
    RankError,
    UnsupportedModelError,
    VitregError,
)
from .examination.examine import Examination, doctor
from .fixes import (
    Applied,
    AttentionBias,
    Fix,
    Fork,
    Inpainting,
    PositionRepair,
    Projection,
    ShiftAverage,
    ShiftSink,
    TestTimeRegisters,
    TokenSplitting,
    TrainedRegisters,
    applied,
    load_fix,
    save_fix,
)
from .fixes.added_registers import add_registers, remove_registers
from .fixes.neurons import RegisterNeuron, RegisterNeurons
from .models.anatomy import Anatomy
from .models.backbone import Backbone, wrap
from .models.layout import TokenLayout
from .models.loading import load
from .phantoms.bundled import example
from .phantoms.phantom import Phantom, plant
from .search.fix_search import FixSearch, find_fix
from .search.origin import Origin, find_origin
from .search.register_neurons import find_register_neurons
from .studies.noop import NoopTest, noop_test
from .studies.register_maps import RegisterStudy, what_registers_learn
from .tracing.records import trace
from .tracing.streams import watch
from .training.exporting import export
from .verification.measuring import verify
from .verification.verdict import Verdict
from .version import __version__ as __version__
from .viewing import Look, look

__all__ = [
    "Anatomy",
    "Applied",
    "ArchiveError",
    "AttentionBias",
    "Backbone",
    "Batch",
    "DataError",
    "Diagnosis",
    "Emergence",
    "Examination",
    "Extraction",
    "Fix",
    "FixError",
    "FixSearch",
    "FixWarning",
    "Fork",
    "ImageError",
    "Images",
    "Inpainting",
    "Look",
    "MissingExtraError",
    "ModelLoadError",
    "ModelWarning",
    "NonFiniteError",
    "NoopTest",
    "Origin",
    "OutlierRule",
    "OutputError",
    "Phantom",
    "PositionRepair",
    "Projection",
    "RankError",
    "RegisterNeuron",
    "RegisterNeurons",
    "RegisterStudy",
    "ShiftAverage",
    "ShiftSink",
    "TestTimeRegisters",
    "TokenLayout",
    "TokenSplitting",
    "TrainedRegisters",
    "UnsupportedModelError",
    "Verdict",
    "VitregError",
    "add_registers",
    "applied",
    "diagnose",
    "doctor",
    "example",
    "export",
    "extract_archive",
    "find_fix",
    "find_origin",
    "find_register_neurons",
    "load",
    "load_fix",
    "look",
    "noop_test",
    "plant",
    "read_images",
    "remove_registers",
    "save_fix",
    "trace",
    "verify",
    "watch",
    "what_registers_learn",
    "wrap",
]
