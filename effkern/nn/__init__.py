"""Modules with the signature of what they replace."""

from effkern.nn.attention import Attention
from effkern.nn.butterfly_conv import ButterflyConv
from effkern.nn.dual_residual import DualResidualBlock, DualResidualSchedule
from effkern.nn.h3 import H3
from effkern.nn.hyena import HyenaFilter, HyenaOperator
from effkern.nn.long_conv import LongConv
from effkern.nn.monarch import MonarchLinear
from effkern.nn.reversible import ReversibleBlock, ReversibleTransition
from effkern.nn.reversible_sequence import ReversibleSequence
from effkern.nn.short_conv import ShortConv

__all__ = [
    "H3",
    "Attention",
    "ButterflyConv",
    "DualResidualBlock",
    "DualResidualSchedule",
    "HyenaFilter",
    "HyenaOperator",
    "LongConv",
    "MonarchLinear",
    "ReversibleBlock",
    "ReversibleSequence",
    "ReversibleTransition",
    "ShortConv",
]
