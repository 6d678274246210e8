"""Modules with the signature of what they replace."""

from effkern.nn.attention import Attention
from effkern.nn.long_conv import LongConv
from effkern.nn.monarch import MonarchLinear
from effkern.nn.short_conv import ShortConv

__all__ = ["Attention", "LongConv", "MonarchLinear", "ShortConv"]
