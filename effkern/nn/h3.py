"""The H3 layer: a shift and a diagonal state space between gates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from effkern.nn.short_conv import ShortConv
from effkern.ops.long_conv import long_conv
from effkern.ops.long_conv_kernels import vandermonde_kernel


class H3(nn.Module):
    """H3 in place of attention: u (B, L, d_model) -> (B, L, d_model), causal, any L.

        q, k, v = in_proj u
        y = q SSM_diag(SSM_shift(k) v)        out = out_proj y

    A shift state space of d_state numbers is a convolution with d_state taps, its C; a diagonal one is a long
    convolution with `effkern.vandermonde_kernel` and a skip D, whose gates are v and q. With heads of head_dim > 1,
    k v is the outer product of the heads' vectors, all of whose head_dim^2 entries go through the diagonal state space
    of the head, and q contracts the side of k.

    Args:
        d_model: width of the input and of the output.
        d_state: states of either kind; even (the diagonal ones are conjugate pairs), 2 to 256.
        head_dim: divides d_model. Work and memory of the long convolution grow with it.
        dt_min, dt_max: range of the fresh steps of the diagonal state spaces, spread evenly in their logarithm.
        backend: of the convolutions, as in `effkern.long_conv`.

    Parameters: `in_proj`, a Linear whose output holds q, then k, then v; `out_proj`, Linear; `shift`, a `ShortConv` of
    d_state taps, the C of the shift state space with the current position last; `log_dt` (heads,); `log_a_real` and
    `a_imag` (heads, d_state / 2), A = -exp(log_a_real) + i a_imag, fresh A_n = -1/2 + i pi n; `c`
    (heads, d_state / 2, 2), real and imaginary parts; `skip` (heads,). Kernels are computed in float32 (float64 for
    float64) whatever the dtype of the parameters, but poles kept in 16 bits are rounded ones: for training prefer
    autocast.

    Source: Fu et al. 2023 (Hungry Hungry Hippos: Towards Language Modeling with State Space Models), section 3.1 and
    algorithm 1; fresh diagonal state spaces as S4D-Lin, Gu et al. 2022.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        head_dim: int = 1,
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1 or head_dim < 1 or d_model % head_dim:
            raise ValueError(f"H3: head_dim {head_dim} does not divide d_model {d_model}")
        if not 2 <= d_state <= 256 or d_state % 2:
            raise ValueError(f"H3: d_state must be even and between 2 and 256, got {d_state}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"H3: expected 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        self.d_model, self.d_state, self.head_dim = d_model, d_state, head_dim
        self.dt_min, self.dt_max, self.backend = dt_min, dt_max, backend
        heads = d_model // head_dim
        place: dict[str, Any] = {"device": device, "dtype": dtype}

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **place))

        self.in_proj = nn.Linear(d_model, 3 * d_model, **place)
        self.out_proj = nn.Linear(d_model, d_model, **place)
        self.shift = ShortConv(d_model, d_state, bias=False, backend=backend, **place)
        self.log_dt, self.skip = parameter(heads), parameter(heads)
        self.log_a_real, self.a_imag = parameter(heads, d_state // 2), parameter(heads, d_state // 2)
        self.c = parameter(heads, d_state // 2, 2)
        self._reset_states()

    def _reset_states(self) -> None:
        nn.init.normal_(self.shift.weight, std=self.d_state**-0.5)  # outputs with the variance of the inputs
        nn.init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))
        nn.init.constant_(self.log_a_real, math.log(0.5))
        with torch.no_grad():
            self.a_imag.copy_(torch.arange(self.d_state // 2, device=self.a_imag.device) * math.pi)
        nn.init.normal_(self.c, std=0.5**0.5)
        nn.init.normal_(self.skip)

    def reset_parameters(self) -> None:
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        self._reset_states()

    def kernel(self, length: int) -> Tensor:
        """The kernels of the diagonal state spaces, (heads, length)."""
        wide = torch.float64 if self.c.dtype == torch.float64 else torch.float32
        poles = torch.complex(-self.log_a_real.to(wide).exp(), self.a_imag.to(wide))
        return vandermonde_kernel(
            torch.view_as_complex(self.c.to(wide)), poles, self.log_dt.to(wide).exp(), length
        )

    def forward(self, u: Tensor) -> Tensor:
        """u (B, L, d_model) -> (B, L, d_model)."""
        if u.dim() != 3 or u.shape[2] != self.d_model:
            raise RuntimeError(f"H3: u must have shape (B, L, {self.d_model}), got {tuple(u.shape)}")
        q, k, v = self.in_proj(u).mT.contiguous().split(self.d_model, 1)
        k = self.shift(k)
        kernel = self.kernel(max(u.shape[1], 1))  # an input of no positions still has one, of one number
        if self.head_dim > 1:
            return self.out_proj(self._heads(q, k, v, kernel).mT)
        y: Any = long_conv(k, kernel, skip=self.skip, pre_gate=v, post_gate=q, backend=self.backend)
        return self.out_proj(y.mT)

    def _heads(self, q: Tensor, k: Tensor, v: Tensor, kernel: Tensor) -> Tensor:
        q, k, v = (t.unflatten(1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))  # (B, d, heads, L)
        pairs = k[:, :, None] * v[:, None]  # (B, d of k, d of v, heads, L)
        states: Any = long_conv(pairs.flatten(0, 2), kernel, skip=self.skip, backend=self.backend)
        y = (q[:, :, None] * states.view(pairs.shape)).sum(1)  # (B, d of v, heads, L)
        return y.transpose(1, 2).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}, head_dim={self.head_dim}"
