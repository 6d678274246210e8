"""How attention is judged: cases, the composition a user would write, and the comparison of both with the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import effkern
from effkern.masks import Mask
from effkern.reference import attention as reference
from effkern.testing import assert_close_to_oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["plain", "heads last", "strided", "cut out", "broadcast", "dims first"]


@dataclass(frozen=True)
class Case:
    b: int = 1
    hq: int = 2
    hkv: int = 1
    sq: int = 16
    sk: int = 16
    d: int = 16
    dv: int = 16
    causal: bool = False
    align: str = "bottom_right"
    scale: float | None = None
    lengths: tuple[tuple[int, int], ...] | None = None  # packed: (queries, keys) of each sequence
    layout: tuple[str, str, str, str] = ("plain",) * 4  # of q, k, v and the gradient of out
    mask: Mask | None = None
    bias: tuple[bool, bool, bool, bool] | None = None  # axes of (B, Hq, Sq, Sk) that are not broadcast
    bias_float: bool = False  # bias in float32, whatever the dtype of q
    hidden_bias: float = 0.0  # share of the bias that is minus infinity
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    dropout_p: float = 0.0

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        b = () if self.lengths is not None else (self.b,)
        sq, sk = self.sq, self.sk
        if self.lengths is not None:
            sq, sk = (sum(pair[side] for pair in self.lengths) for side in (0, 1))
        return (*b, self.hq, sq, self.d), (*b, self.hkv, sk, self.d), (*b, self.hkv, sk, self.dv)

    @property
    def table_sizes(self) -> tuple[int, int, int, int]:
        """(B, Hq, Sq, Sk) as the tables of a mask and a bias count: sequences and their longest lengths if packed."""
        if self.lengths is None:
            return self.b, self.hq, self.sq, self.sk
        return len(self.lengths), self.hq, *(max(pair[side] for pair in self.lengths) for side in (0, 1))

    def options(self, device: str) -> dict[str, Any]:
        options: dict[str, Any] = {"causal": self.causal, "align": self.align, "scale": self.scale}
        if self.lengths is not None:
            for side, name in enumerate(("cu_seqlens_q", "cu_seqlens_k")):
                ends = torch.tensor([0, *(pair[side] for pair in self.lengths)]).cumsum(0)
                options[name] = ends.to(device, torch.int32)
        if self.mask is not None:
            options["mask"] = self.mask.to(device)
        if self.softcap:
            options["softcap"] = self.softcap
        if self.alibi:
            options["alibi_slopes"] = effkern.masks.alibi_slopes(self.hq).to(device)
        return options


def lay_out(shape: tuple[int, ...], layout: str) -> Tensor:
    """Random numbers in float64 with strides that users have."""
    if layout == "heads last":  # (..., S, H, D) in memory
        return torch.randn(*shape[:-3], shape[-2], shape[-3], shape[-1], dtype=torch.float64).transpose(
            -3, -2
        )
    if layout == "strided":  # every second number of the last dimension
        return torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64)[..., ::2]
    if layout == "cut out":  # unaligned rows inside a larger tensor
        return torch.randn(*shape[:-2], shape[-2] + 3, shape[-1] + 5, dtype=torch.float64)[..., 2:-1, 3:-2]
    if layout == "broadcast":  # one head for all
        return torch.randn(*shape[:-3], 1, *shape[-2:], dtype=torch.float64).expand(shape)
    if layout == "dims first":  # (..., D, S) in memory
        return torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=torch.float64).transpose(-1, -2)
    return torch.randn(shape, dtype=torch.float64)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case; `leaves` gives those with a gradient, by the name of their argument."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    grad_lse: Tensor
    bias: Tensor | None = None
    sink_logits: Tensor | None = None

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in ("q", "k", "v", "bias", "sink_logits")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def double(self) -> Inputs:
        return replace(self, **{name: tensor.double() for name, tensor in self.leaves.items()})


def make(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    shapes = case.shapes
    q, k, v = (
        lay_out(s, layout).to(dtype).to(device) for s, layout in zip(shapes, case.layout, strict=False)
    )
    grad_out = lay_out((*shapes[0][:-1], case.dv), case.layout[3]).to(dtype).to(device)
    grad_lse = torch.randn(shapes[0][:-1]).to(device)
    bias = sinks = None
    if case.bias is not None:
        bias = torch.randn([n if full else 1 for n, full in zip(case.table_sizes, case.bias, strict=True)])
        bias = bias.masked_fill(torch.rand(bias.shape) < case.hidden_bias, -torch.inf)
        bias = bias.to(device, torch.float32 if case.bias_float else dtype)
    if case.sinks:
        sinks = (2 * torch.randn(case.hq)).to(device, dtype)
    return Inputs(q, k, v, grad_out, grad_lse, bias, sinks)


def composition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    align: str = "bottom_right",
    scale: float | None = None,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a user writes without effkern, in the dtype of the inputs; only the value of lse is that of float32."""
    (b, hq, sq, d), (_, hkv, sk, dv) = q.shape, v.shape
    scale = d**-0.5 if scale is None else scale
    j = torch.arange(sk, device=q.device)
    position = torch.arange(sq, device=q.device)[:, None] + (sk - sq if align == "bottom_right" else 0)
    hidden = torch.zeros(1, 1, sq, sk, dtype=torch.bool, device=q.device)
    if causal:
        hidden = hidden | (j > position)
    if mask is not None:
        hidden = hidden | ~mask.to_dense(sq, sk, heads=hq, align=align)
    if bias is not None:
        hidden = hidden | (bias == -torch.inf)
        bias = bias.masked_fill(bias == -torch.inf, 0.0)

    def logits(q: Tensor, k: Tensor) -> Tensor:
        rows = q.reshape(b, hkv, hq // hkv * sq, d)
        s = (rows @ k.transpose(-1, -2) * scale).reshape(b, hq, sq, sk)
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        if bias is not None:
            s = s + bias.to(s.dtype)
        if alibi_slopes is not None:
            s = s - (alibi_slopes[:, None, None] * (position - j).abs()).to(s.dtype)
        s = s.masked_fill(hidden, -torch.inf)
        if sink_logits is None:
            return s
        return torch.cat([s, sink_logits.to(s.dtype)[:, None, None].expand(b, hq, sq, 1)], -1)

    # A row that sees nothing is filled with finite scores and cut off afterwards, to keep NaN out of the gradients.
    empty = hidden.all(-1, keepdim=True) & (sink_logits is None)
    s = logits(q, k).masked_fill(empty, 0.0)
    weights = torch.softmax(s, -1).masked_fill(empty, 0.0)[..., :sk]
    out = (weights.reshape(b, hkv, hq // hkv * sq, sk) @ v).reshape(b, hq, sq, dv)
    lse = torch.logsumexp(s, -1).float()
    exact = torch.logsumexp(logits(q.float(), k.float()).masked_fill(empty, 0.0), -1)
    lse = lse + (exact - lse).detach()
    return out, lse.masked_fill(empty.squeeze(-1), -torch.inf)


def packed_composition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """One composition a sequence; the tables are cut to what each of them has."""
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    spans = zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True)
    outs, lses = [], []
    for n, (a, b, c, d) in enumerate(spans):
        part_of_bias = None
        if bias is not None:
            part_of_bias = bias[n : n + 1] if bias.shape[0] > 1 else bias
            rows = b - a if part_of_bias.shape[2] > 1 else 1
            columns = d - c if part_of_bias.shape[3] > 1 else 1
            part_of_bias = part_of_bias[:, :, :rows, :columns]
        part = None if mask is None else sequence_mask(mask, n, b - a, c, d)
        out, lse = composition(
            q[None, :, a:b], k[None, :, c:d], v[None, :, c:d], mask=part, bias=part_of_bias, **options
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2)[0], torch.cat(lses, 2)[0]


def sequence_mask(mask: Mask, sequence: int, queries: int, key_begin: int, key_end: int) -> Mask:
    """What a mask of a packed call means for one of its sequences."""
    from effkern.masks import BlockSparse, Dense, Document

    if isinstance(mask, Document):
        return Document(mask.ids[key_begin:key_end])
    if isinstance(mask, Dense):
        table = mask.mask[sequence : sequence + 1] if mask.mask.shape[0] > 1 else mask.mask
        rows = queries if table.shape[2] > 1 else 1
        return Dense(table[:, :, :rows, : key_end - key_begin if table.shape[3] > 1 else 1])
    if isinstance(mask, BlockSparse):
        table = mask.layout[sequence : sequence + 1] if mask.layout.shape[0] > 1 else mask.layout
        blocks = (-(-n // mask.block) for n in (queries, key_end - key_begin))
        return BlockSparse(table[:, :, : next(blocks), : next(blocks)], mask.block)
    parts = getattr(mask, "parts", ())
    if not parts:
        return mask
    first, *others = (sequence_mask(part, sequence, queries, key_begin, key_end) for part in parts)
    for other in others:
        first = first & other
    return first


Results = dict[str, Tensor]


def differentiate(attention: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs, **options: Any) -> Results:
    """out, lse and the gradients of <weights, (out, lse)>; rows with lse -inf carry no weight."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.leaves.items()}
    out, lse = attention(**leaves, **options)
    finite = lse.isfinite()
    grads = torch.autograd.grad(
        (out, torch.where(finite, lse, 0.0)),
        tuple(leaves.values()),
        (inputs.grad_out.to(out.dtype), inputs.grad_lse.to(lse.dtype)),
        materialize_grads=True,
    )
    return {
        "out": out,
        "lse": lse,
        **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)},
    }


def with_lse(**arguments: Any) -> tuple[Tensor, Tensor]:
    return effkern.attention(**arguments, return_lse=True)


def summed_sizes(case: Case, inputs: Inputs, options: dict[str, Any], dtype: torch.dtype) -> dict[str, float]:
    """Size of the float32 numbers behind each result, whose rounding stays when they cancel.

    dQ = scale P (dO V^T - delta) K, where a row of P sums to 1, and a column to what dV is for dO = 1.
    """
    names = ("out", "lse", *(f"grad_{name}" for name in inputs.leaves))
    if min(t.numel() for t in (inputs.q, inputs.k, inputs.v)) == 0:
        return dict.fromkeys(names, 1.0)
    exact = inputs.double()
    scale = case.d**-0.5 if case.scale is None else abs(case.scale)
    # A weight carries the rounding of its score. Eight: the roundings of a sum partly cancel.
    score = max(1.0, scale * (exact.q.norm(dim=-1).max() * exact.k.norm(dim=-1).max()).item() / 8)
    if case.bias is not None or case.alibi or case.sinks:
        score = max(score, 4.0)
    # The half dtypes take a shorter polynomial for the exponential.
    products = (inputs.grad_out.double().norm(dim=-1).max() * exact.v.norm(dim=-1).max()).item()
    difference = products / 8
    ones = replace(
        exact, grad_out=torch.ones_like(inputs.grad_out), grad_lse=torch.zeros_like(inputs.grad_lse)
    )
    results = differentiate(reference.attention, ones, **options)
    column = results["grad_v"].max().item()
    unit = {
        "out": score,
        "lse": score * (1 if dtype == torch.float32 else 4),
        "grad_q": score * difference * scale * exact.k.abs().max().item(),
        "grad_k": score * difference * scale * exact.q.abs().max().item() * column,
        "grad_v": score * max(1.0, column),
        "grad_bias": score * difference,
        "grad_sink_logits": score * difference,
    }
    if case.bias is not None and not all(case.bias):
        unit["grad_bias"] *= max(1.0, column)
    if case.sinks:
        # The sum over all queries of weight times delta, which is made of `out` as it was rounded: half a step of each
        # number, at random. A single result, where the composition may come closer by chance.
        weights = (exact.leaves["sink_logits"][:, None] - results["lse"]).exp()
        parts = weights[..., None] * inputs.grad_out.double() * results["out"]
        rounding = parts.movedim(-3, 0).flatten(1).norm(dim=1).max().item() / 2
        unit["grad_sink_logits"] += rounding * torch.finfo(dtype).eps / (4 * torch.finfo(torch.float32).eps)
    return {name: unit[name] for name in names}


def check(case: Case, dtype: torch.dtype, route: Any) -> None:
    """The op on `route` within the rule of effkern.testing: outputs, lse and every gradient.

    The rule compares worst errors. Where few queries or few keys give few numbers to be the worst of, several draws are
    one result: in a single one the composition may be closer to the truth than rounding promises.
    """
    draws = [check_draw(case, dtype, route) for _ in range(8 if min(case.sq, case.sk) < 16 else 1)]
    for name in draws[0][0]:
        ours, baseline, oracle = (torch.stack([draw[i][name] for draw in draws]) for i in range(3))
        unit = max(draw[3][name] for draw in draws)
        assert_close_to_oracle(ours, baseline, oracle, f"{name} of {case} in {dtype}", unit=unit)


def check_draw(
    case: Case, dtype: torch.dtype, route: Any
) -> tuple[Results, Results, Results, dict[str, float]]:
    """Ours, the composition's, the exact results and the units, of one draw; dtypes and the way taken are checked."""
    inputs = make(case, dtype, route.device)
    options = case.options(route.device)
    ours = differentiate(with_lse, inputs, **options)
    if min(t.numel() for t in (inputs.q, inputs.k, inputs.v)) > 0:
        route.check("attention_backward" if route.unit != "cuda" else "attention", dtype)
    composed = composition if case.lengths is None else packed_composition
    baseline = differentiate(composed, inputs, **options)
    oracle = differentiate(reference.attention, inputs.double(), **options)
    for name, result in ours.items():
        expected = torch.float32 if name == "lse" else dtype
        if name == "grad_bias" and case.bias_float:
            expected = torch.float32
        assert result.dtype == expected
        assert result.is_contiguous() or name.startswith("grad")
    return ours, baseline, oracle, summed_sizes(case, inputs, options, dtype)
