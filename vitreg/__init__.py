"""vitreg: find, explain and remove attention artifacts in Vision Transformers."""

from vitreg.anatomy import Anatomy, TokenLayout
from vitreg.archive import Extraction, extract_archive
from vitreg.cure import Cure, find_cure
from vitreg.diagnosis import Diagnosis, diagnose
from vitreg.doctor import Examination, doctor
from vitreg.emergence import Emergence
from vitreg.errors import (
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
from vitreg.example import example
from vitreg.fixes import (
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
from vitreg.images import Batch, Images, read_images
from vitreg.models import Backbone, load, wrap
from vitreg.neurons import RegisterNeuron, RegisterNeurons, find_register_neurons
from vitreg.noop import NoopTest, noop_test
from vitreg.origin import Origin, find_origin
from vitreg.outliers import OutlierRule
from vitreg.phantom import Phantom, plant
from vitreg.register_maps import RegisterStudy, what_registers_learn
from vitreg.trace import trace, watch
from vitreg.training.export import export
from vitreg.training.registers import add_registers, remove_registers
from vitreg.verdict import Verdict
from vitreg.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Anatomy",
    "Applied",
    "ArchiveError",
    "AttentionBias",
    "Backbone",
    "Batch",
    "Cure",
    "DataError",
    "Diagnosis",
    "Emergence",
    "Examination",
    "Extraction",
    "Fix",
    "FixError",
    "FixWarning",
    "Fork",
    "ImageError",
    "Images",
    "Inpainting",
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
    "find_cure",
    "find_origin",
    "find_register_neurons",
    "load",
    "load_fix",
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
