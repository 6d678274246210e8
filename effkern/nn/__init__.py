"""Modules with the signature of what they replace."""

from effkern.nn.attention import Attention
from effkern.nn.butterfly_conv import ButterflyConv
from effkern.nn.clustered import ClusteredEmbedding, ClusteredLinear
from effkern.nn.dual_residual import DualResidualBlock, DualResidualSchedule
from effkern.nn.h3 import H3
from effkern.nn.hyena import HyenaFilter, HyenaOperator
from effkern.nn.long_conv import LongConv
from effkern.nn.monarch import MonarchLinear
from effkern.nn.palettized import PalettizedEmbedding, PalettizedLinear
from effkern.nn.reversible import ReversibleBlock, ReversibleTransition
from effkern.nn.reversible_sequence import ReversibleSequence
from effkern.nn.reversible_transformer import ReversibleTransformer
from effkern.nn.short_conv import ShortConv
from effkern.nn.temperature_schedule import TemperatureSchedule

__all__ = [
    "H3",
    "Attention",
    "ButterflyConv",
    "ClusteredEmbedding",
    "ClusteredLinear",
    "DualResidualBlock",
    "DualResidualSchedule",
    "HyenaFilter",
    "HyenaOperator",
    "LongConv",
    "MonarchLinear",
    "PalettizedEmbedding",
    "PalettizedLinear",
    "ReversibleBlock",
    "ReversibleSequence",
    "ReversibleTransformer",
    "ReversibleTransition",
    "ShortConv",
    "TemperatureSchedule",
]
