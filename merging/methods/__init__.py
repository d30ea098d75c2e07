"""One merge method per file: a frozen dataclass whose fields are the knobs and whose call maps Experts to Merged."""

from merging.methods.average import Average
from merging.methods.base import Base
from merging.methods.dare import Dare
from merging.methods.duet import Duet
from merging.methods.emr import Emr
from merging.methods.expert import Expert
from merging.methods.ffn_oracle import FfnOracle
from merging.methods.iso_c import IsoC
from merging.methods.iso_cts import IsoCts
from merging.methods.method import Method
from merging.methods.neuron_mask import NeuronMask
from merging.methods.rank_one_moe import RankOneMoe
from merging.methods.single import Single
from merging.methods.smile import Smile
from merging.methods.tall_mask import TallMask
from merging.methods.task_arithmetic import TaskArithmetic
from merging.methods.ties import Ties
from merging.methods.tsv_m import TsvM
from merging.methods.twin import Twin
from merging.methods.wemoe import Wemoe

__all__ = [
    "Average",
    "Base",
    "Dare",
    "Duet",
    "Emr",
    "Expert",
    "FfnOracle",
    "IsoC",
    "IsoCts",
    "Method",
    "NeuronMask",
    "RankOneMoe",
    "Single",
    "Smile",
    "TallMask",
    "TaskArithmetic",
    "Ties",
    "TsvM",
    "Twin",
    "Wemoe",
]
