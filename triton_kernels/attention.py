"""Launchers of the Triton attention kernels: forward, backward, and what they support.

Tensors are (B, H, S, D), or (H, T, D) packed with cu_seqlens; packed runs as a batch of one. Tile shapes come from a
table by architecture, padded head dimension and element size: nothing is tuned at run time.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from . import attention_kernels as kernels

MAX_DIM = 256


class Tiles(NamedTuple):
    """Queries and keys in a tile, warps of a program, stages of the load pipeline."""

    m: int
    n: int
    warps: int
    stages: int


# (pass, architecture) -> {(element bytes, padded head dimension): tiles}. Chosen so that the compiled kernels fit the
# architecture's shared memory and spill nothing (tests/test_triton_compile.py); the exceptions, a few registers each,
# are fp32 beyond D = 64, whose split operands fill the registers, and dK/dV at D = 256 on 9.0. Timings on hardware are
# still due. The entries of 8.0 stay below 99 KB, so that consumer parts (8.6, 8.9, 12.0) take them too.
_TABLE: dict[tuple[str, int], dict[tuple[int, int], Tiles]] = {
    ("forward", 80): {
        (2, 64): Tiles(128, 64, 4, 3), (2, 128): Tiles(128, 64, 8, 3), (2, 256): Tiles(64, 32, 8, 2),
        (4, 64): Tiles(32, 32, 4, 2), (4, 128): Tiles(32, 16, 4, 1), (4, 256): Tiles(16, 16, 4, 1),
    },
    ("forward", 90): {
        (2, 64): Tiles(128, 64, 4, 3), (2, 128): Tiles(128, 128, 8, 2), (2, 256): Tiles(128, 64, 8, 2),
        (4, 64): Tiles(64, 32, 4, 2), (4, 128): Tiles(16, 16, 4, 1), (4, 256): Tiles(16, 16, 4, 1),
    },
    ("forward", 100): {
        (2, 64): Tiles(128, 64, 4, 3), (2, 128): Tiles(128, 64, 8, 3), (2, 256): Tiles(128, 32, 8, 2),
        (4, 64): Tiles(64, 32, 4, 2), (4, 128): Tiles(16, 16, 4, 1), (4, 256): Tiles(16, 16, 4, 1),
    },
    ("backward_kv", 80): {
        (2, 64): Tiles(64, 128, 8, 2), (2, 128): Tiles(64, 64, 8, 2), (2, 256): Tiles(16, 64, 8, 1),
        (4, 64): Tiles(32, 16, 4, 1), (4, 128): Tiles(16, 16, 4, 1), (4, 256): Tiles(16, 16, 8, 1),
    },
    ("backward_kv", 90): {
        (2, 64): Tiles(64, 128, 8, 2), (2, 128): Tiles(64, 128, 8, 2), (2, 256): Tiles(32, 64, 8, 2),
        (4, 64): Tiles(16, 16, 4, 1), (4, 128): Tiles(16, 16, 8, 1), (4, 256): Tiles(16, 16, 8, 1),
    },
    ("backward_kv", 100): {
        (2, 64): Tiles(64, 128, 8, 2), (2, 128): Tiles(64, 128, 8, 2), (2, 256): Tiles(64, 64, 8, 1),
        (4, 64): Tiles(16, 16, 4, 1), (4, 128): Tiles(16, 16, 8, 1), (4, 256): Tiles(16, 16, 8, 1),
    },
    ("backward_q", 80): {
        (2, 64): Tiles(128, 64, 8, 2), (2, 128): Tiles(64, 64, 8, 2), (2, 256): Tiles(64, 32, 8, 1),
        (4, 64): Tiles(32, 16, 4, 1), (4, 128): Tiles(16, 16, 4, 1), (4, 256): Tiles(16, 16, 8, 1),
    },
    ("backward_q", 90): {
        (2, 64): Tiles(128, 64, 8, 2), (2, 128): Tiles(128, 64, 8, 2), (2, 256): Tiles(64, 64, 8, 2),
        (4, 64): Tiles(64, 16, 4, 1), (4, 128): Tiles(16, 16, 8, 1), (4, 256): Tiles(16, 16, 8, 1),
    },
    ("backward_q", 100): {
        (2, 64): Tiles(128, 64, 8, 2), (2, 128): Tiles(128, 64, 8, 2), (2, 256): Tiles(128, 32, 8, 1),
        (4, 64): Tiles(64, 16, 4, 1), (4, 128): Tiles(16, 16, 8, 1), (4, 256): Tiles(16, 16, 8, 1),
    },
}

# Where the masked loop needs more registers than a tile leaves.
_CAUSAL: dict[tuple[str, int, int, int], Tiles] = {("forward", 80, 2, 128): Tiles(128, 32, 8, 3)}


def interpreted() -> bool:
    """Whether the kernels were built for Triton's interpreter (TRITON_INTERPRET=1 at import)."""
    return not isinstance(kernels.attention_forward_kernel, triton.runtime.JITFunction)


@functools.cache
def _architecture(device: torch.device) -> int:
    """10 x compute capability, 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def padded(dim: int) -> int:
    """Head dimension as a tile sees it: the next power of two, 16 at least (the depth of a tensor-core product)."""
    return max(16, triton.next_power_of_2(dim))


def tiles(name: str, arch: int, dtype: torch.dtype, head_dim: int, value_dim: int, causal: bool) -> Tiles:
    """Tile shapes of pass `name`; `arch` is 10 x compute capability, 0 for the interpreter."""
    if arch == 0:
        return Tiles(16, 16, 4, 1)
    known = 100 if 100 <= arch < 120 else 90 if arch == 90 else 80
    width = max(64, padded(head_dim), padded(value_dim))
    found = _TABLE[name, known][dtype.itemsize, width]
    return _CAUSAL.get((name, known, dtype.itemsize, width), found) if causal else found


def precision(arch: int, dtype: torch.dtype) -> str:
    """fp32 products run on tensor cores as six bf16 ones of operands split in three: what is dropped is below 2^-23,
    fp32's own rounding. Three TF32 products drop 2^-21 at the same cost and hold a third more registers; exact FMA
    (`ieee`) spills from D = 64 on."""
    if arch == 0:
        return "ieee"
    return "bf16x6" if dtype == torch.float32 else "tf32"


def supports(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    """None when the launchers take such a request, else the reason they do not."""
    if device.type == "cpu" and not knobs.runtime.interpret:
        return "triton runs on CPU tensors only under its interpreter (TRITON_INTERPRET=1)"
    if device.type not in ("cpu", "cuda"):
        return f"triton kernels need a CUDA device, not {device.type}"
    if device.type == "cuda" and _architecture(device) < 80:
        return f"triton kernels need compute capability 8.0 or later, not {_architecture(device) / 10}"
    allowed = (torch.float32,) if device.type == "cpu" else (torch.float32, torch.bfloat16, torch.float16)
    if dtype not in allowed:
        return f"triton kernels take {', '.join(str(d)[6:] for d in allowed)} on {device.type}, not {str(dtype)[6:]}"
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
        self.arch = _architecture(q.device)
        self.tma = 90 <= self.arch < 120 if use_descriptors is None else use_descriptors

    def device(self):
        return torch.cuda.device(self.q.device) if self.q.is_cuda else contextlib.nullcontext()

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


def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, top_left, *, use_descriptors=None):
    """(out, lse) of softmax(scale q k^T) v; lse in natural log, fp32. `use_descriptors` forces or forbids TMA."""
    out = torch.empty((*q.shape[:-1], v.size(-1)), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if scale is not None and scale < 0:
        # The running maximum is taken before scaling, which needs scale >= 0.
        q, scale = -q, -scale
    problem = _Problem(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, top_left, use_descriptors)
    if problem.empty():
        return out.zero_(), lse.fill_(float("-inf"))
    with problem.device():
        problem.launch(kernels.attention_forward_kernel, "forward",
                       lambda r: (r["q"], r["k"], r["v"], out, lse), False,
                       {"q": problem.q, "k": problem.k, "v": problem.v})
    return out, lse


def backward(grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, causal, top_left, *,
             use_descriptors=None):
    """(grad_q, grad_k, grad_v): row sums, a key-stationary pass for dK and dV, a query-stationary one for dQ."""
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    problem = _Problem(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, top_left, use_descriptors)
    if problem.empty():
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
    g, o = _readable(grad_out.to(q.dtype)), _readable(out)
    lines = problem.batch * problem.heads
    stats = torch.empty((lines, 2, problem.sq), dtype=torch.float32, device=q.device)
    reads = {"q": problem.q, "k": problem.k, "v": problem.v, "g": g}
    block = 16 if problem.arch == 0 else 64
    with problem.device():
        kernels.attention_delta_kernel[(triton.cdiv(problem.sq, block) * lines,)](
            g, None if grad_lse is None else grad_lse.contiguous(), o, lse.contiguous(), stats,
            *g.stride()[:3], *o.stride()[:3], problem.sq, problem.heads,
            DV=problem.value_dim, BLOCK_DV=padded(problem.value_dim), BLOCK_M=block,
            HAS_GRAD_LSE=grad_lse is not None, num_warps=4)
        problem.launch(kernels.attention_backward_kv_kernel, "backward_kv",
                       lambda r: (r["q"], r["k"], r["v"], r["g"], stats, grad_k, grad_v), True, reads)
        problem.launch(kernels.attention_backward_q_kernel, "backward_q",
                       lambda r: (r["q"], r["k"], r["v"], r["g"], stats, grad_q), False, reads)
    return grad_q, grad_k, grad_v
