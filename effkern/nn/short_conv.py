"""A short depthwise causal convolution as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effkern.ops.short_conv import short_conv


class ShortConv(nn.Module):
    """The causal depthwise nn.Conv1d idiom in one pass, with SiLU and a state for decoding.

    Replaces `act(nn.Conv1d(H, H, W, groups=H, padding=W - 1)(x)[..., :L])`; the state dict is that of the Conv1d.

    Args:
        channels: H.
        taps: W, 1 to 256.
        bias: whether there is a bias.
        activation: None or "silu".
        backend: as in `effkern.short_conv`.

    Parameters: `weight` (H, 1, W), `bias` (H) or None.
    """

    def __init__(
        self,
        channels: int,
        taps: int = 4,
        bias: bool = True,
        *,
        activation: str | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1 or not 1 <= taps <= 256:
            raise ValueError(
                f"ShortConv: channels must be at least 1 and taps between 1 and 256, got {channels} and {taps}"
            )
        if activation not in (None, "silu"):
            raise ValueError(f"ShortConv: activation must be None or 'silu', got {activation!r}")
        self.channels, self.taps, self.activation, self.backend = channels, taps, activation, backend
        self.weight = nn.Parameter(torch.empty(channels, 1, taps, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.taps**-0.5  # as nn.Conv1d
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, H, L) -> out (B, H, L), with `return_state` also the state (B, H, W-1) for what follows."""
        return short_conv(
            x,
            self.weight[:, 0],
            self.bias,
            activation=self.activation,
            state=state,
            return_state=return_state,
            backend=self.backend,
        )

    @classmethod
    def from_conv1d(
        cls, conv: nn.Conv1d, *, activation: str | None = None, backend: str | None = None
    ) -> ShortConv:
        """The module that shares the parameters of `conv`, whose first L outputs it computes."""
        taps = conv.kernel_size[0]
        causal = (
            conv.groups == conv.in_channels == conv.out_channels
            and conv.stride == conv.dilation == (1,)
            and conv.padding == (taps - 1,)
            and conv.padding_mode == "zeros"
        )
        if not causal:
            raise ValueError(
                "ShortConv: expected a Conv1d with groups=in_channels=out_channels, stride 1, dilation 1 and "
                f"padding={taps - 1} of zeros, got {conv}"
            )
        made = cls(
            conv.in_channels,
            taps,
            conv.bias is not None,
            activation=activation,
            backend=backend,
            device="meta",
        )
        made.weight, made.bias = conv.weight, conv.bias  # type: ignore[assignment]
        return made.train(conv.training)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, taps={self.taps}, bias={self.bias is not None}, activation={self.activation!r}"
        )
