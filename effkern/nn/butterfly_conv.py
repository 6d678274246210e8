"""A long convolution with a learned kernel and a learned transform."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effkern.ops.butterfly_conv import Factors, butterfly_conv, butterfly_factors, butterfly_radices


class ButterflyConv(nn.Module):
    """A long convolution whose Fourier transform is learned: u (B, channels, L) -> (B, channels, L), L <= length.

    `effkern.butterfly_conv` with a kernel, a skip and the blocks of the transform as parameters. It starts as a causal
    convolution; as its blocks move away from those of the Fourier transform, outputs depend on later inputs too.

    Args:
        channels: H.
        length: taps of a kernel, and the longest input. Every input goes through the transform of this length.
        shared: whether all channels have the same blocks.
        separate: whether kernels go through blocks of their own.
        noise: standard deviation of the noise on fresh blocks (`effkern.butterfly_factors`).
        skip: whether the input is added, weighted by channel.

    Parameters: `kernel` (H, length); `skip` (H) or None; `factors`, for each size n that the transform has, "n"
    (1 or H, n, n, 2): real and imaginary parts; `kernel_factors`, the same, or None. Fresh kernels give outputs the
    variance of the inputs; fresh skips have variance 1. Parameters may be in 16 bits: blocks are widened.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        shared: bool = False,
        separate: bool = False,
        noise: float = 0.0,
        skip: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1 or length < 1:
            raise ValueError(
                f"ButterflyConv: channels and length must be at least 1, got {channels} and {length}"
            )
        self.channels, self.length, self.shared, self.noise = channels, length, shared, noise

        def blocks() -> nn.ParameterDict:
            rows = 1 if shared else channels
            return nn.ParameterDict(
                {
                    str(n): nn.Parameter(torch.empty(rows, n, n, 2, device=device, dtype=dtype))
                    for n in sorted(set(butterfly_radices(length)))
                }
            )

        self.kernel = nn.Parameter(torch.empty(channels, length, device=device, dtype=dtype))
        self.skip = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if skip else None
        self.factors = blocks()
        self.kernel_factors = blocks() if separate else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.kernel, std=self.length**-0.5)
        if self.skip is not None:
            nn.init.normal_(self.skip)
        for parts in (self.factors, self.kernel_factors):
            made = butterfly_factors(
                1 if self.shared else self.channels,
                length=self.length,
                noise=self.noise,
                dtype=torch.complex128 if self.kernel.dtype == torch.float64 else torch.complex64,
                device=self.kernel.device,
            )
            with torch.no_grad():
                for n, part in (parts or {}).items():
                    part.copy_(torch.view_as_real(made[int(n)]))

    def _blocks(self, parts: nn.ParameterDict) -> Factors:
        wide = torch.float64 if self.kernel.dtype == torch.float64 else torch.float32
        return {int(n): torch.view_as_complex(part.to(wide)) for n, part in parts.items()}

    def forward(
        self, u: Tensor, *, pre_gate: Tensor | None = None, post_gate: Tensor | None = None
    ) -> Tensor:
        """u (B, channels, L) -> (B, channels, L); gates as in `effkern.butterfly_conv`."""
        factors = self._blocks(self.factors)
        return butterfly_conv(
            u,
            self.kernel,
            factors if self.kernel_factors is None else (factors, self._blocks(self.kernel_factors)),
            skip=self.skip,
            pre_gate=pre_gate,
            post_gate=post_gate,
            length=self.length,
        )

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, length={self.length}, shared={self.shared}, "
            f"separate={self.kernel_factors is not None}, skip={self.skip is not None}"
        )
