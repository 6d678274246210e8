"""The Hyena operator: long convolutions with implicit kernels between gates."""

from __future__ import annotations

import itertools
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.nn.short_conv import ShortConv
from effkern.ops._dispatch import without_autocast
from effkern.ops.long_conv import long_conv


class HyenaFilter(nn.Module):
    """Convolution kernels given by a small network of the position: length -> (channels, length).

        z[t] = (t / (l_max - 1), Re e^(-i f_1 w), ..., Im e^(-i f_K w)),   w = 2 pi t / l_max
        kernel[h, t] = MLP(z[t])[h] (exp(-delta_h t / (l_max - 1)) + shift)

    The MLP has sines with learned frequencies between its layers; f is spread evenly over 1e-4 to K - 1. delta is
    spread evenly over the channels, from -log(target) / slow_decay_pct to -log(target) / fast_decay_pct: the kernels
    have decayed to `target` after these parts of l_max.

    Args:
        channels: how many kernels.
        l_max: the longest; shorter ones are their beginnings.
        order: width of the network.
        emb_dim: 1 + 2 K, odd, at least 3.
        num_inner_mlps: layers between the first and the last.
        w: the frequencies of the sines to start from; larger ones give less smooth kernels.
        fast_decay_pct, slow_decay_pct, target, shift: as above.

    Parameters: `layers`, Linear modules, the last without a bias; `freq` (order,), for all sines. Computed in float32
    (float64 for float64) also where the parameters have 16 bits and under autocast: positions need it.

    Source: Poli et al. 2023 (Hyena Hierarchy), section 3.3.
    """

    def __init__(
        self,
        channels: int,
        l_max: int,
        order: int = 64,
        *,
        emb_dim: int = 3,
        num_inner_mlps: int = 2,
        w: float = 1.0,
        fast_decay_pct: float = 0.3,
        slow_decay_pct: float = 1.5,
        target: float = 1e-2,
        shift: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1 or l_max < 1 or order < 1 or num_inner_mlps < 0:
            raise ValueError(
                f"HyenaFilter: channels, l_max and order must be at least 1 and num_inner_mlps at least 0, got "
                f"{channels}, {l_max}, {order} and {num_inner_mlps}"
            )
        if emb_dim < 3 or emb_dim % 2 == 0:
            raise ValueError(f"HyenaFilter: emb_dim must be odd and at least 3, got {emb_dim}")
        if not (fast_decay_pct > 0 and slow_decay_pct > 0 and 0 < target < 1):
            raise ValueError(
                f"HyenaFilter: fast_decay_pct and slow_decay_pct must be positive and target between 0 and 1, got "
                f"{fast_decay_pct}, {slow_decay_pct} and {target}"
            )
        self.channels, self.l_max, self.w, self.shift = channels, l_max, w, shift
        self.bands = emb_dim // 2
        self.decay = (-math.log(target) / slow_decay_pct, -math.log(target) / fast_decay_pct)
        widths = [emb_dim, *[order] * (num_inner_mlps + 1), channels]
        last = len(widths) - 2
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=i < last, device=device, dtype=dtype)
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.freq = nn.Parameter(torch.full((order,), float(w), device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        for layer in self.layers:
            cast(nn.Linear, layer).reset_parameters()
        nn.init.constant_(self.freq, self.w)

    def _positions(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """t / (l_max - 1), (length,), and the features, (length, emb_dim)."""
        device = self.freq.device
        steps = torch.arange(length, device=device).to(dtype)
        frequencies = torch.linspace(1e-4, self.bands - 1, self.bands, device=device, dtype=dtype)
        angle = frequencies * (steps * (2 * math.pi / self.l_max))[:, None]
        t = steps / max(self.l_max - 1, 1)
        return t, torch.cat([t[:, None], angle.cos(), -angle.sin()], 1)

    def forward(self, length: int) -> Tensor:
        """The first `length` numbers of each kernel, (channels, length)."""
        if not 0 <= length <= self.l_max:
            raise RuntimeError(f"HyenaFilter: length must be between 0 and {self.l_max}, got {length}")
        wide = torch.float64 if self.freq.dtype == torch.float64 else torch.float32
        t, x = self._positions(length, wide)
        *inner, last = (cast(nn.Linear, layer) for layer in self.layers)
        with without_autocast(self.freq):
            for layer in inner:
                x = torch.sin(self.freq.to(wide) * F.linear(x, layer.weight.to(wide), layer.bias.to(wide)))
            kernel = last.weight.to(wide) @ x.mT
            delta = torch.linspace(*self.decay, self.channels, device=t.device, dtype=wide)
            return kernel * (torch.exp(-delta[:, None] * t) + self.shift)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, l_max={self.l_max}"


class HyenaOperator(nn.Module):
    """Hyena in place of attention: u (B, L, d_model) -> (B, L, d_model), causal, any L up to l_max.

        x_0, ..., x_(order - 1), v = short convolution (in_proj u)
        v = x_0 (h_(order - 1) * (x_1 ... (h_1 * (x_(order - 1) v))))        out = out_proj v

    where h_i * x is the long convolution of each channel with a kernel of `HyenaFilter` and a skip of its own. Gates
    are applied within the long convolutions.

    Args:
        d_model: width of the input and of the output.
        l_max: the longest input.
        order: gates, and one more than long convolutions; at least 2.
        filter_order: width of the network that makes the kernels.
        short_filter_order: taps of the short convolution, 1 to 256.
        dropout: probability that an input of a long convolution is dropped in training.
        backend: of the convolutions, as in `effkern.long_conv`.
        filter_args: more for `HyenaFilter`: emb_dim, num_inner_mlps, w, fast_decay_pct, slow_decay_pct, target, shift.

    Parameters: `in_proj` and `out_proj`, Linear; `short_filter`, a `ShortConv` over (order + 1) d_model channels, those
    of x_0 first and those of v last; `filter`, a `HyenaFilter` of (order - 1) d_model kernels; `skip`
    (order - 1, d_model).

    Source: Poli et al. 2023 (Hyena Hierarchy), definition 3.1 and section 3.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        order: int = 2,
        filter_order: int = 64,
        *,
        short_filter_order: int = 3,
        dropout: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **filter_args: Any,
    ) -> None:
        super().__init__()
        if d_model < 1 or order < 2:
            raise ValueError(
                f"HyenaOperator: d_model must be at least 1 and order at least 2, got {d_model} and {order}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"HyenaOperator: dropout must be in [0, 1), got {dropout}")
        self.d_model, self.l_max, self.order = d_model, l_max, order
        self.dropout, self.backend = dropout, backend
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        width = (order + 1) * d_model
        self.in_proj = nn.Linear(d_model, width, **place)
        self.out_proj = nn.Linear(d_model, d_model, **place)
        self.short_filter = ShortConv(width, short_filter_order, backend=backend, **place)
        self.filter = HyenaFilter((order - 1) * d_model, l_max, filter_order, **filter_args, **place)
        self.skip = nn.Parameter(torch.empty(order - 1, d_model, **place))
        nn.init.normal_(self.skip)

    def reset_parameters(self) -> None:
        for part in (self.in_proj, self.out_proj, self.short_filter, self.filter):
            part.reset_parameters()
        nn.init.normal_(self.skip)

    def forward(self, u: Tensor) -> Tensor:
        """u (B, L, d_model) -> (B, L, d_model)."""
        if u.dim() != 3 or u.shape[2] != self.d_model or u.shape[1] > self.l_max:
            raise RuntimeError(
                f"HyenaOperator: u must have shape (B, L, {self.d_model}) with L at most {self.l_max}, got "
                f"{tuple(u.shape)}"
            )
        *gates, v = self.short_filter(self.in_proj(u).mT).split(self.d_model, 1)
        # An input of no positions still goes through a kernel, of one number.
        kernels = self.filter(max(u.shape[1], 1)).unflatten(0, (self.order - 1, self.d_model))
        for i in range(self.order - 1):
            v = long_conv(
                F.dropout(v, self.dropout, self.training),
                kernels[i],
                skip=self.skip[i],
                pre_gate=gates[self.order - 1 - i],
                post_gate=gates[0] if i == self.order - 2 else None,
                backend=self.backend,
            )
        return self.out_proj(v.mT)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, l_max={self.l_max}, order={self.order}, dropout={self.dropout}"
