"""Modules with the signature of what they replace."""

from effkern.nn.attention import Attention

__all__ = ["Attention"]
