"""Modules with the signature of what they replace."""

from effkern.nn.attention import Attention
from effkern.nn.monarch import MonarchLinear
from effkern.nn.short_conv import ShortConv

__all__ = ["Attention", "MonarchLinear", "ShortConv"]
