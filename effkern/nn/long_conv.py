"""A convolution with learned kernels as long as the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effkern.ops.long_conv import long_conv


class LongConv(nn.Module):
    """One learned kernel a channel, up to as long as the input: u (B, channels, L) -> (B, channels, L), L any number.

        out[b, h, t] = sum_{j < length} kernel[h, j] u[b, h, t - j] + skip[h] u[b, h, t]

    Inputs shorter than the kernel use its first taps; in longer ones an output sees the last `length` inputs.

    Args:
        channels: H.
        length: taps of a kernel, as a rule the longest input.
        bidirectional: whether there are as many taps that look ahead (`effkern.long_conv`, causal=False).
        skip: whether the input is added, weighted by channel.
        backend: as in `effkern.long_conv`.

    Parameters: `kernel` (H, length) or (H, 2, length), `skip` (H) or None. Fresh kernels give outputs the variance of
    the inputs, half of it by each direction where there are two; fresh skips have variance 1.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        bidirectional: bool = False,
        skip: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1 or length < 1:
            raise ValueError(f"LongConv: channels and length must be at least 1, got {channels} and {length}")
        self.channels, self.length, self.bidirectional, self.backend = (
            channels,
            length,
            bidirectional,
            backend,
        )
        shape = (channels, 2, length) if bidirectional else (channels, length)
        self.kernel = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.skip = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if skip else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        taps = self.kernel[0].numel()
        nn.init.normal_(self.kernel, std=taps**-0.5)
        if self.skip is not None:
            nn.init.normal_(self.skip)

    def forward(
        self,
        u: Tensor,
        *,
        pre_gate: Tensor | None = None,
        post_gate: Tensor | None = None,
        state: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """u (B, channels, L) -> (B, channels, L); gates, state and its return as in `effkern.long_conv`. A state has
        length - 1 positions."""
        whole = state is None and not return_state
        kernel = self.kernel[..., : u.shape[-1]] if whole and u.dim() == 3 and u.shape[-1] else self.kernel
        return long_conv(
            u,
            kernel,
            skip=self.skip,
            pre_gate=pre_gate,
            post_gate=post_gate,
            causal=not self.bidirectional,
            state=state,
            return_state=return_state,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, length={self.length}, bidirectional={self.bidirectional}, "
            f"skip={self.skip is not None}"
        )
