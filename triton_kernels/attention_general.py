"""Launchers of the general Triton attention kernels: masks as data, bias, softcap, sinks, ALiBi, dropout."""

from __future__ import annotations

import torch
import triton

from . import attention_general_kernels as kernels
from . import attention_lists as lists
from .attention_tables import Tiles, padded, precision

UNBOUNDED = 2**30

# (pass, element bytes, padded head dimension) -> tiles. Masks, terms and dropout need registers of their own, so tiles
# are smaller than in the plain kernels. Fitted to 8.0, whose shared memory later architectures exceed; dK/dV with a
# bias or dropout still spills a few registers (tests/test_triton_compile.py has the limit). Not timed yet.
_TABLE: dict[tuple[str, int, int], Tiles] = {
    ("forward", 2, 64): Tiles(64, 64, 8, 2), ("forward", 2, 128): Tiles(64, 32, 8, 2),
    ("forward", 2, 256): Tiles(32, 32, 4, 1), ("forward", 4, 64): Tiles(32, 32, 4, 1),
    ("forward", 4, 128): Tiles(16, 16, 4, 1), ("forward", 4, 256): Tiles(16, 16, 4, 1),
    ("backward_kv", 2, 64): Tiles(32, 64, 8, 1), ("backward_kv", 2, 128): Tiles(32, 64, 8, 1),
    ("backward_kv", 2, 256): Tiles(16, 32, 8, 1), ("backward_kv", 4, 64): Tiles(16, 16, 4, 1),
    ("backward_kv", 4, 128): Tiles(16, 16, 4, 1), ("backward_kv", 4, 256): Tiles(16, 16, 8, 1),
    ("backward_q", 2, 64): Tiles(64, 32, 4, 1), ("backward_q", 2, 128): Tiles(64, 32, 8, 1),
    ("backward_q", 2, 256): Tiles(32, 16, 8, 1), ("backward_q", 4, 64): Tiles(16, 16, 4, 1),
    ("backward_q", 4, 128): Tiles(16, 16, 4, 1), ("backward_q", 4, 256): Tiles(16, 16, 8, 1),
}


def tiles(name: str, arch: int, dtype: torch.dtype, head_dim: int, value_dim: int) -> Tiles:
    """Tile shapes of pass `name`; `arch` 0 is the interpreter."""
    if arch == 0:
        return Tiles(16, 16, 4, 1)
    return _TABLE[name, dtype.itemsize, max(64, padded(head_dim), padded(value_dim))]


def _strides(table: torch.Tensor | None, axes: int = 4) -> list[int]:
    """0 along broadcast axes, and everywhere for a table that is not there."""
    if table is None:
        return [0] * axes
    return [step if size > 1 else 0 for size, step in zip(table.shape, table.stride())]


class Pairs:
    """What a call does to pairs of a query and a key, as the arguments and flags that every kernel takes."""

    def __init__(self, problem, bands, groups, layout, block, ids, visible, bias, softcap, sink_logits, alibi_slopes,
                 dropout_p, dropout_seed):
        device = problem.q.device
        self.problem = problem
        self.bands = [*bands, *([UNBOUNDED, 0, 0] if problem.causal else [])]
        self.groups, self.layout, self.block, self.ids, self.visible = list(groups), layout, block, ids, visible
        self.bias, self.sinks = bias, None if sink_logits is None else sink_logits.contiguous()

        def numbers(values):
            return torch.tensor(values, dtype=torch.int32, device=device) if values else None

        def bytes_of(table):
            return None if table is None else table.view(torch.uint8)

        # Without a column stride: the columns of a layout are adjacent in memory.
        layout = None if layout is None else bytes_of(layout.contiguous())
        keep = 1.0 / (1.0 - dropout_p) if dropout_p else 1.0
        self.arguments = [
            numbers(self.bands), numbers(self.groups), layout, *_strides(layout)[:3], block or 1,
            None if ids is None else ids.contiguous(), 0 if ids is None or ids.size(0) == 1 else ids.size(1),
            bytes_of(visible), *_strides(visible), bias, *_strides(bias),
            None if alibi_slopes is None else alibi_slopes.contiguous(), float(softcap), dropout_seed, keep,
            int(dropout_p * 2**32), problem.heads // 2]
        self.flags = dict(
            NB=len(self.bands) // 3, NG=len(self.groups), LAYOUT=layout is not None, IDS=ids is not None,
            VISIBLE=visible is not None, BIAS=bias is not None, CAP=softcap != 0.0, ALIBI=alibi_slopes is not None,
            DROP=dropout_p != 0.0)

    def tile_lists(self, t: Tiles, by_key: bool):
        """Stored lists and their strides, None and zeros for a packed call, which visits every tile of a sequence."""
        p = self.problem
        if p.packed:
            return None, None, None, 0, 0, 0
        found = lists.build(p.sq, p.sk, p.heads, p.top_left, self.bands, self.groups, self.layout, self.block, self.ids,
                            self.visible, t.m, t.n, p.q.device, by_key)
        batch, heads, _, most = found.entries.shape
        # Strides count lists: (batch, head) -> line of `tiles` lists.
        return found.entries, found.full, found.total, heads if batch > 1 else 0, 1 if heads > 1 else 0, most


def _launch(pairs: Pairs, kernel, name: str, arguments, by_key: bool, reads, extra=None) -> None:
    p = pairs.problem
    t = tiles(name, p.arch, p.q.dtype, p.dim, p.value_dim)
    rows, block, heads, lengths = (
        (p.sk, t.n, p.kv_heads, p.lengths_k) if by_key else (p.sq, t.m, p.heads, p.lengths_q))
    table = p.tile_table(lengths, block, rows) if p.packed else None
    count = table.size(1) if table is not None else triton.cdiv(rows, block)
    total = p.batch * heads
    strides = [step for x in reads for step in x.stride()[:3]]
    kernel[(count * total,)](
        *arguments, table, p.lengths_q, p.lengths_k, *strides, p.sq, p.sk, count, total, total if not p.packed else 1,
        heads, p.group, p.scale, *pairs.tile_lists(t, by_key), *pairs.arguments, **pairs.flags, D=p.dim, DV=p.value_dim,
        BLOCK_D=padded(p.dim), BLOCK_DV=padded(p.value_dim), BLOCK_M=t.m, BLOCK_N=t.n, TOP_LEFT=p.top_left,
        PACKED=p.packed, LISTED=not p.packed, PRECISION=precision(p.arch, p.q.dtype), **(extra or {}),
        num_warps=t.warps, num_stages=t.stages)


def forward(pairs: Pairs, out: torch.Tensor, lse: torch.Tensor) -> None:
    p = pairs.problem
    _launch(pairs, kernels.attention_general_forward_kernel, "forward", (p.q, p.k, p.v, out, lse, pairs.sinks), False,
            (p.q, p.k, p.v), {"SINKS": pairs.sinks is not None})


def backward(pairs: Pairs, g: torch.Tensor, stats: torch.Tensor, grad_q: torch.Tensor, grad_k: torch.Tensor,
             grad_v: torch.Tensor, grad_bias: torch.Tensor | None) -> None:
    """From the row statistics on; `grad_bias` is float32 with the shape of the bias."""
    p = pairs.problem
    reads = (p.q, p.k, p.v, g)
    _launch(pairs, kernels.attention_general_backward_kv_kernel, "backward_kv", (*reads, stats, grad_k, grad_v), True,
            reads)
    _launch(pairs, kernels.attention_general_backward_q_kernel, "backward_q", (*reads, stats, grad_q), False, reads)
    if grad_bias is None:
        return
    t = tiles("backward_q", p.arch, p.q.dtype, p.dim, p.value_dim)
    entries, heads, rows, columns = grad_bias.shape
    in_all = p.lengths_q.numel() - 1 if p.packed else p.batch
    one_row = rows == 1
    tiles_m, tiles_n = (1 if one_row else triton.cdiv(rows, t.m)), triton.cdiv(columns, t.n)
    kernels.attention_general_bias_kernel[(entries * heads * tiles_m * tiles_n,)](
        *reads, stats, grad_bias, p.lengths_q, p.lengths_k, *(step for x in reads for step in x.stride()[:3]),
        p.sq, p.sk, p.heads, p.group, p.scale, tiles_m, tiles_n, heads, rows, columns,
        in_all if entries == 1 else 1, p.heads if heads == 1 else 1, *pairs.arguments, **pairs.flags,
        D=p.dim, DV=p.value_dim, BLOCK_D=padded(p.dim), BLOCK_DV=padded(p.value_dim), BLOCK_M=t.m, BLOCK_N=t.n,
        TOP_LEFT=p.top_left, PACKED=p.packed, ONE_ROW=one_row, PRECISION=precision(p.arch, p.q.dtype),
        num_warps=t.warps, num_stages=t.stages)
