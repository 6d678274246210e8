"""The depthwise causal convolution in plain PyTorch, differentiable to any order: F.conv1d over the padded input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def past_inputs(x: Tensor, taps: int, state: Tensor | None) -> Tensor:
    """x with the taps - 1 inputs before it, (B, H, taps - 1 + L): in the wider dtype of both."""
    return F.pad(x, (taps - 1, 0)) if state is None else torch.cat((state, x), -1)


def next_state(x: Tensor, taps: int, state: Tensor | None) -> Tensor:
    """The last taps - 1 inputs, (B, H, taps - 1): what `state` has to be for the inputs that follow x. In the dtype of
    the state that was given, else x's."""
    length, reach = x.shape[-1], taps - 1
    # narrow and not an index: that one sets the device itself, which fake CUDA tensors do not have.
    if length >= reach:
        last = x.narrow(-1, length - reach, reach).clone(memory_format=torch.contiguous_format)
        return last if state is None else last.to(state.dtype)
    if state is None:
        return F.pad(x, (reach - length, 0))
    return torch.cat((state.narrow(-1, length, reach - length), x.to(state.dtype)), -1)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Shapes as `effkern.short_conv`; 16-bit dtypes are widened once and rounded once."""
    taps = weight.shape[1]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    line, taps_of_channels = past_inputs(x, taps, state).to(compute), weight.to(compute)
    wide_bias = None if bias is None else bias.to(compute)
    if x.numel():
        out = F.conv1d(line, taps_of_channels[:, None], wide_bias, groups=weight.shape[0])
    else:  # which conv1d refuses; the sum keeps every argument in the graph
        out = x.to(compute) * line.sum(-1, keepdim=True) * taps_of_channels.sum(-1, keepdim=True)
        out = out if wide_bias is None else out + wide_bias[:, None]
    out = (F.silu(out) if activation == "silu" else out).to(x.dtype)
    return (out, next_state(x, taps, state)) if return_state else out
