"""One merge method per file: a frozen dataclass whose fields are the knobs and whose call maps Experts to Merged."""

from merging.methods.average import Average
from merging.methods.base import Base
from merging.methods.dare import Dare
from merging.methods.expert import Expert
from merging.methods.iso_c import IsoC
from merging.methods.iso_cts import IsoCts
from merging.methods.method import Method
from merging.methods.task_arithmetic import TaskArithmetic
from merging.methods.ties import Ties
from merging.methods.tsv_m import TsvM

__all__ = ["Average", "Base", "Dare", "Expert", "IsoC", "IsoCts", "Method", "TaskArithmetic", "Ties", "TsvM"]
