"""Launchers of the Triton attention kernels: forward, backward, and what they support.

Tensors are (B, H, S, D), or (H, T, D) packed with cu_seqlens; packed runs as a batch of one. Tile shapes come from a
table by architecture, padded head dimension and element size: nothing is tuned at run time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping

import torch
import triton
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from . import attention_general as general
from . import attention_kernels as kernels
from .attention_tables import MAX_DIM, padded, precision, tiles


def interpreted() -> bool:
    """Whether the kernels were built for Triton's interpreter (TRITON_INTERPRET=1 at import)."""
    return not isinstance(kernels.attention_forward_kernel, triton.runtime.JITFunction)


@functools.cache
def architecture(device: torch.device) -> int:
    """10 x compute capability, 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def supports(device: torch.device, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    """None when the launchers take such a request, else the reason they do not; sizes: head and value dimension, where
    there are any."""
    if device.type == "cpu" and not knobs.runtime.interpret:
        return "triton runs on CPU tensors only under its interpreter (TRITON_INTERPRET=1)"
    if device.type not in ("cpu", "cuda"):
        return f"triton kernels need a CUDA device, not {device.type}"
    if device.type == "cuda" and architecture(device) < 80:
        return f"triton kernels need compute capability 8.0 or later, not {architecture(device) / 10}"
    allowed = (torch.float32,) if device.type == "cpu" else (torch.float32, torch.bfloat16, torch.float16)
    if dtype not in allowed:
        return f"triton kernels take {', '.join(str(d)[6:] for d in allowed)} on {device.type}, not {str(dtype)[6:]}"
    head_dim, value_dim = sizes.get("head_dim", 1), sizes.get("value_dim", 1)
    if not (1 <= head_dim <= MAX_DIM and 1 <= value_dim <= MAX_DIM):
        return f"triton kernels take head dimensions 1 to {MAX_DIM}, not {head_dim} and {value_dim}"
    return None


def _readable(x: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D) view whose last dimension is dense and whose rows of one tile stay within 32-bit offsets."""
    x = x if x.dim() == 4 else x.unsqueeze(0)
    if (x.stride(3) == 1 or x.size(3) == 1) and x.stride(2) < 2**22:
        return x
    return x.contiguous()


def _describable(x: torch.Tensor) -> bool:
    """Whether a TMA descriptor can address x: 16-byte aligned base and strides, no broadcast dimension."""
    unit = 16 // x.element_size()
    steps = [step for size, step in zip(x.shape[:3], x.stride()) if size > 1]
    return (x.data_ptr() % 16 == 0 and x.stride(3) == 1 and x.numel() > 0
            and all(step > 0 and step % unit == 0 for step in steps))


def _describe(x: torch.Tensor, rows: int, use_descriptor: bool):
    if not use_descriptor:
        return x
    # The stride of a dimension of size 1 is never used, but still has to be a valid one.
    strides = [step if size > 1 else 16 * x.size(3) for size, step in zip(x.shape[:3], x.stride())]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, padded(x.size(3))])


def _tile_table(lengths: torch.Tensor, block: int, rows: int) -> torch.Tensor:
    """(2, N) int32 on the device: sequence and tile inside it of every program, sequence -1 past the end.

    N bounds the number of tiles without knowing the lengths on the host, so that a launch never waits for the device.
    """
    count = lengths.numel() - 1
    blocks = (lengths.diff().clamp(min=0) + block - 1) // block
    ends = blocks.cumsum(0)
    index = torch.arange(rows // block + count, device=lengths.device)
    sequence = torch.searchsorted(ends, index, right=True)
    tile = index - (ends - blocks)[sequence.clamp(max=count - 1)]
    return torch.stack([torch.where(sequence < count, sequence, -1), tile]).to(torch.int32)


class _Problem:
    """What forward and backward launches share: shapes, flags, tables and the grid."""

    def __init__(self, q, k, v, lengths_q, lengths_k, scale, causal, top_left, use_descriptors=None):
        self.packed = lengths_q is not None
        self.q, self.k, self.v = _readable(q), _readable(k), _readable(v)
        self.lengths_q, self.lengths_k = lengths_q, lengths_k
        self.batch, self.heads, self.sq, self.dim = self.q.shape
        self.kv_heads, self.sk, self.value_dim = self.k.size(1), self.k.size(2), self.v.size(3)
        self.group = self.heads // max(self.kv_heads, 1)
        self.scale = self.dim**-0.5 if scale is None else float(scale)
        self.causal, self.top_left = causal, top_left
        self.arch = architecture(q.device)
        self.tma = 90 <= self.arch < 120 if use_descriptors is None else use_descriptors

    def device(self):
        return torch.cuda.device(self.q.device) if self.q.is_cuda else contextlib.nullcontext()

    @staticmethod
    def tile_table(lengths: torch.Tensor, block: int, rows: int) -> torch.Tensor:
        return _tile_table(lengths, block, rows)

    def empty(self) -> bool:
        """No program could be launched: no query, or no key at all."""
        return self.q.numel() == 0 or self.k.numel() == 0

    def section(self, head_bytes: int, unit: int) -> int:
        """Heads that run side by side: as many as keep what they share in half of the L2 cache, in whole groups."""
        if self.packed:
            return unit
        return unit * max(1, _cache_bytes(self.q.device) // 2 // head_bytes)

    def launch(self, kernel, name, arguments, by_key, tensors):
        """Run one stationary-tile kernel; `arguments` makes its leading arguments from the tensors as it reads them."""
        t = tiles(name, self.arch, self.q.dtype, self.dim, self.value_dim, self.causal)
        rows, block, heads, lengths = (
            (self.sk, t.n, self.kv_heads, self.lengths_k) if by_key else (self.sq, t.m, self.heads, self.lengths_q))
        table = _tile_table(lengths, block, rows) if self.packed else None
        count = table.size(1) if table is not None else triton.cdiv(rows, block)
        use_descriptors = self.tma and all(_describable(x) for x in tensors.values())
        reads = {key: _describe(x, t.n if key in ("k", "v") else t.m, use_descriptors) for key, x in tensors.items()}
        row_bytes = (self.dim + self.value_dim) * self.q.element_size()
        section = self.section(row_bytes * (self.sq * self.group if by_key else self.sk), 1 if by_key else self.group)
        total = self.batch * heads
        strides = [step for x in tensors.values() for step in x.stride()[:3]]
        flags = {} if by_key else {"PARTIAL": self.causal or self.packed or self.sk % t.n != 0}
        kernel[(count * total,)](
            *arguments(reads), table, self.lengths_q, self.lengths_k, *strides, self.sq, self.sk, count, total,
            min(section, total), heads, self.group, self.scale,
            D=self.dim, DV=self.value_dim, BLOCK_D=padded(self.dim), BLOCK_DV=padded(self.value_dim),
            BLOCK_M=t.m, BLOCK_N=t.n, CAUSAL=self.causal, TOP_LEFT=self.top_left, PACKED=self.packed,
            TMA=use_descriptors,
            PRECISION=precision(self.arch, self.q.dtype), **flags, num_warps=t.warps, num_stages=t.stages)


def _extended(bands, groups, layout, ids, visible, bias, softcap, sink_logits, alibi_slopes, dropout_p) -> bool:
    """Whether there is more than the plain kernels know."""
    tensors = (layout, ids, visible, bias, sink_logits, alibi_slopes)
    return bool(bands or groups or softcap or dropout_p) or any(t is not None for t in tensors)


def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, top_left, bands=(), groups=(), layout=None, block=0,
            ids=None, visible=None, bias=None, softcap=0.0, sink_logits=None, alibi_slopes=None, dropout_p=0.0,
            dropout_seed=None, *, use_descriptors=None):
    """(out, lse), lse in natural log and fp32; arguments as in the schema. `use_descriptors` forces or forbids TMA."""
    out = torch.empty((*q.shape[:-1], v.size(-1)), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    extended = _extended(bands, groups, layout, ids, visible, bias, softcap, sink_logits, alibi_slopes, dropout_p)
    if not extended and scale is not None and scale < 0:
        # The running maximum is taken before scaling, which needs scale >= 0.
        q, scale = -q, -scale
    problem = _Problem(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, top_left, use_descriptors)
    if problem.empty():
        sinks = float("-inf") if sink_logits is None else sink_logits.float()[:, None]
        return out.zero_(), lse.copy_(torch.as_tensor(sinks).expand_as(lse))
    with problem.device():
        if extended:
            pairs = general.Pairs(problem, bands, groups, layout, block, ids, visible, bias, softcap, sink_logits,
                                  alibi_slopes, dropout_p, dropout_seed)
            general.forward(pairs, out, lse)
        else:
            problem.launch(kernels.attention_forward_kernel, "forward",
                           lambda r: (r["q"], r["k"], r["v"], out, lse), False,
                           {"q": problem.q, "k": problem.k, "v": problem.v})
    return out, lse


def backward(grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, causal, top_left, bands=(),
             groups=(), layout=None, block=0, ids=None, visible=None, bias=None, softcap=0.0, sink_logits=None,
             alibi_slopes=None, dropout_p=0.0, dropout_seed=None, bias_grad=False, *, use_descriptors=None):
    """(grad_q, grad_k, grad_v, grad_bias, delta): row sums, a key-stationary pass for dK and dV, a query-stationary one
    for dQ, and where it is wanted one for the bias."""
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    grad_bias = torch.zeros(bias.shape if bias_grad else (0,), dtype=torch.float32, device=q.device)
    problem = _Problem(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, top_left, use_descriptors)
    if problem.empty():
        delta = torch.zeros(q.shape[:-1], dtype=torch.float32, device=q.device)
        if q.numel():  # a row without keys may still have a sink
            delta = -torch.zeros_like(delta) if grad_lse is None else -grad_lse.float()
            delta = torch.where(lse == float("-inf"), 0.0, delta)
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_(), grad_bias, delta
    g, o = _readable(grad_out.to(q.dtype)), _readable(out)
    lines = problem.batch * problem.heads
    stats = torch.empty((lines, 2, problem.sq), dtype=torch.float32, device=q.device)
    reads = {"q": problem.q, "k": problem.k, "v": problem.v, "g": g}
    rows = 16 if problem.arch == 0 else 64
    with problem.device():
        kernels.attention_delta_kernel[(triton.cdiv(problem.sq, rows) * lines,)](
            g, None if grad_lse is None else grad_lse.contiguous(), o, lse.contiguous(), stats,
            *g.stride()[:3], *o.stride()[:3], problem.sq, problem.heads,
            DV=problem.value_dim, BLOCK_DV=padded(problem.value_dim), BLOCK_M=rows,
            HAS_GRAD_LSE=grad_lse is not None, num_warps=4)
        if _extended(bands, groups, layout, ids, visible, bias, softcap, sink_logits, alibi_slopes, dropout_p):
            pairs = general.Pairs(problem, bands, groups, layout, block, ids, visible, bias, softcap, sink_logits,
                                  alibi_slopes, dropout_p, dropout_seed)
            general.backward(pairs, g, stats, grad_q, grad_k, grad_v, grad_bias if bias_grad else None)
        else:
            problem.launch(kernels.attention_backward_kv_kernel, "backward_kv",
                           lambda r: (r["q"], r["k"], r["v"], r["g"], stats, grad_k, grad_v), True, reads)
            problem.launch(kernels.attention_backward_q_kernel, "backward_q",
                           lambda r: (r["q"], r["k"], r["v"], r["g"], stats, grad_q), False, reads)
    return grad_q, grad_k, grad_v, grad_bias, stats[:, 1].reshape(q.shape[:-1]).contiguous()
