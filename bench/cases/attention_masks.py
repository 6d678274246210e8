"""Attention with masks as data, a bias and packed lengths, against SDPA with the same mask written out densely and
against our own attention without the mask: what a mask saves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import effkern
from effkern.masks import BlockSparse, Lambda, Mask, ShiftedGroups, SlidingWindow
from effkern.ops.attention import attention_bytes, attention_flops

from . import Baseline, Call, Case, Oracle

# Larger dense masks are not written out: nobody would.
DENSE_MASK_BYTES = 1 << 28
FLEX_LENGTH = 8192  # FlexAttention looks at every pair once to find its blocks
CHUNK = 512  # query rows of the oracle at a time


@functools.cache
def _block_layout(heads: int, blocks: int, density: float) -> Tensor:
    """A random layout with its diagonal, so that every row sees something."""
    layout = torch.rand(1, heads, blocks, blocks, generator=torch.Generator().manual_seed(0)) < density
    return layout | torch.eye(blocks, dtype=torch.bool)


@dataclass(frozen=True)
class MaskCase(Case):
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    length: int = 1024
    head_dim: int = 64
    causal: bool = False
    kind: str = "window"  # window | lambda | groups | blocks | bias
    size: int = 0  # keys of the window, of a group, of a block
    sink: int = 0
    density: float = 0.1
    unmasked: str = "causal"  # what ours is compared with: the same without the mask, causal or full

    family = "attention"
    op = "attention"

    @property
    def shape(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}:{self.kv_heads}"
        detail = {
            "window": f"window {self.size}",
            "lambda": f"window {self.size}, sinks {self.sink}",
            "groups": f"shifted groups of {self.size}",
            "blocks": f"{self.density:.0%} of blocks of {self.size}",
            "bias": "bias (1, H, S, S)",
        }[self.kind]
        return f"B{self.batch} H{heads} S{self.length} D{self.head_dim} {detail}"

    def mask(self) -> Mask | None:
        if self.kind == "window":
            return SlidingWindow(self.size - 1, 0)
        if self.kind == "lambda":
            return Lambda(self.sink, self.size)
        if self.kind == "groups":
            return ShiftedGroups(self.size)
        if self.kind == "blocks":
            return BlockSparse(
                _block_layout(self.heads, -(-self.length // self.size), self.density), self.size
            )
        return None

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)

        def make(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, self.dtype)

        heads = self.heads, self.kv_heads, self.kv_heads
        made = tuple(make(self.batch, h, self.length, self.head_dim) for h in heads)
        return (*made, make(1, self.heads, self.length, self.length)) if self.kind == "bias" else made

    def ours(self, backend: str | None) -> Call:
        mask = self.mask()

        def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            here = None if mask is None else mask.to(q.device)
            return effkern.attention(q, k, v, causal=self.causal, mask=here, bias=bias, backend=backend)

        return call

    def baselines(self, device: torch.device, pass_: str, full: bool) -> dict[str, Baseline]:
        grouped = self.heads != self.kv_heads
        if self.kind == "bias":

            def with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=grouped)

            return {"sdpa": Baseline(with_bias)}
        dense_causal = self.unmasked == "causal"

        def without_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return effkern.attention(q, k, v, causal=dense_causal)

        found = {f"effkern-{'causal' if dense_causal else 'dense'}": Baseline(without_mask)}
        if self.length**2 * (self.heads if self.kind in ("blocks", "groups") else 1) <= DENSE_MASK_BYTES:
            mask = self.mask()
            assert mask is not None
            shown = mask.to_dense(self.length, self.length, heads=self.heads)
            if self.causal:
                shown = shown & torch.ones(self.length, self.length, dtype=torch.bool).tril()
            shown = shown.to(device)

            def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=shown, enable_gqa=grouped)

            backend = SDPBackend.FLASH_ATTENTION if device.type == "cpu" else SDPBackend.EFFICIENT_ATTENTION
            found["sdpa-dense-mask"] = Baseline(dense, functools.partial(sdpa_kernel, backend))
        if full and self.length <= FLEX_LENGTH and (device.type == "cuda" or pass_ == "forward"):
            found["flex"] = Baseline(self._flex(device))
        return found

    def _flex(self, device: torch.device) -> Call:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        size, sink, half = self.size, self.sink, self.heads // 2
        layout = _block_layout(self.heads, -(-self.length // max(size, 1)), self.density)[0].to(device)

        def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & ((i - j < size) | (j < sink))

        def groups(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            shift = torch.where(h < half, 0, size // 2)
            return (i >= j) & ((i + shift) // size == (j + shift) // size)

        def blocks(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return layout[h, i // size, j // size]

        shown = {"groups": groups, "blocks": blocks}.get(self.kind, window)
        heads = None if shown is window else self.heads
        mask = create_block_mask(shown, None, heads, self.length, self.length, device=device.type)
        torch._dynamo.reset()  # each case has its own mask; dynamo would stop at its recompile limit
        torch._functorch.config.donated_buffer = False  # the timed backward runs many times over one graph
        compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
        return functools.partial(compiled, block_mask=mask, enable_gqa=self.heads != self.kv_heads)

    def oracle(self, inputs: Sequence[Tensor], grad_out: Tensor | None) -> Oracle:
        """The first and the last kv head; a bias that all entries share is checked without its gradient."""
        group = self.heads // self.kv_heads
        picked = sorted({0, self.batch * self.kv_heads - 1})

        def select(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [t.detach().unflatten(1, (self.kv_heads, -1)).flatten(0, 1)[picked] for t in tensors[:3]]

        part, grad = select(inputs), None if grad_out is None else select([grad_out])[0]
        heads = [[(n % self.kv_heads) * group + g for g in range(group)] for n in picked]
        bias = inputs[3].detach() if self.kind == "bias" else None
        results = []
        for dtype in (torch.float64, self.dtype):
            rows = [
                self._exact(
                    [t[n : n + 1] for t in part],
                    None if grad is None else grad[n : n + 1],
                    heads[n],
                    bias,
                    dtype,
                )
                for n in range(len(picked))
            ]
            results.append([torch.cat(parts) for parts in zip(*rows, strict=True)])
        return Oracle(
            select, results[0], results[1], f"{len(picked)} of {self.batch * self.kv_heads} kv heads"
        )

    def _exact(
        self,
        tensors: list[Tensor],
        grad: Tensor | None,
        heads: list[int],
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> list[Tensor]:
        """Output or gradients of one kv head, a chunk of query rows at a time, over the keys that the chunk sees; the
        half dtypes round every intermediate, their products run in fp32."""
        half = dtype not in (torch.float64, torch.float32)
        compute = torch.float32 if half else dtype

        def rounded(t: Tensor) -> Tensor:
            return t.to(dtype).to(compute)

        q, k, v = (t[0].to(compute) for t in tensors)  # (G, S, D), (1, S, D), (1, S, D)
        scale, mask = self.head_dim**-0.5, self.mask()
        out = torch.empty_like(q)
        grads = [torch.zeros_like(t) for t in (q, k, v)]
        keys = torch.arange(self.length, device=q.device)
        for begin in range(0, self.length, CHUNK):
            i = torch.arange(begin, min(begin + CHUNK, self.length), device=q.device)[:, None]
            seen = torch.ones(1, len(i), self.length, dtype=torch.bool, device=q.device)
            if isinstance(mask, BlockSparse):
                blocks = mask.layout[0].to(q.device)[heads][:, i[:, 0] // self.size]
                seen = blocks.repeat_interleave(self.size, 2)[:, :, : self.length]
            elif mask is not None:
                found = mask._sees(i, i, keys, self.heads)
                seen = found[heads] if found.dim() == 3 else found[None]
            if self.causal:
                seen = seen & (keys <= i)
            used = seen.flatten(0, 1).any(0).nonzero()[:, 0]
            seen, rows = seen[:, :, used], slice(begin, begin + len(i))
            s = rounded(rounded(q[:, rows] @ k[:, used].mT) * scale)
            if bias is not None:
                s = rounded(s + bias[0, heads][:, rows][:, :, used].to(compute))
            p = rounded(s.masked_fill(~seen, -torch.inf).softmax(-1))
            out[:, rows] = rounded(p @ v[:, used])
            if grad is None:
                continue
            g = grad[0, :, rows].to(compute)
            dp = rounded(g @ v[:, used].mT)
            ds = rounded(p * (dp - rounded((g * out[:, rows]).sum(-1, keepdim=True))))
            grads[0][:, rows] = rounded(ds @ k[:, used]) * scale
            grads[1][0, used] += rounded((ds.flatten(0, 1).mT @ q[:, rows].flatten(0, 1)) * scale)
            grads[2][0, used] += rounded(p.flatten(0, 1).mT @ g.flatten(0, 1))
        chosen = [out] if grad is None else grads
        return [t[None].to(dtype) for t in chosen]

    def _sizes(self) -> list[Tensor]:
        heads = self.heads, self.kv_heads, self.kv_heads
        return [
            torch.empty(self.batch, h, self.length, self.head_dim, dtype=self.dtype, device="meta")
            for h in heads
        ]

    def flops(self, pass_: str) -> float:
        return _passes(
            pass_,
            lambda backward: attention_flops(
                *self._sizes(), causal=self.causal, mask=self.mask(), backward=backward
            ),
        )

    def bytes(self, pass_: str) -> float:
        return _passes(pass_, lambda backward: attention_bytes(*self._sizes(), backward=backward))

    def tiny(self) -> MaskCase:
        sizes = dict(batch=1, heads=2, kv_heads=1, length=16, head_dim=self.head_dim, causal=self.causal)
        return MaskCase("tiny", self.dtype, self.passes, (), kind=self.kind, size=16, sink=2, **sizes)  # type: ignore[arg-type]


def _passes(pass_: str, count: Callable[[bool], int]) -> float:
    return sum(
        count(backward)
        for backward in (False, True)
        if pass_ in ("both", "backward" if backward else "forward")
    )


def cases() -> list[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32

    def case(name: str, dtype: torch.dtype, passes: str, quick: str, **options: Any) -> MaskCase:
        words = {"f": "forward", "b": "backward", "2": "both"}
        short = {bf16: "bf16", fp32: "fp32"}[dtype]
        taken, timed = (tuple(words[c] for c in word) for word in (passes, quick))
        return MaskCase(f"{name}/{short}", dtype, taken, timed, **options)

    found: list[Case] = [
        case(
            "lambda/32k",
            fp32,
            "fb2",
            "2",
            heads=1,
            kv_heads=1,
            length=32768,
            kind="lambda",
            size=4096,
            sink=16,
        ),
        case(
            "s2/8k", fp32, "fb2", "2", heads=2, kv_heads=2, length=8192, causal=True, kind="groups", size=2048
        ),
        case("mistral/8k", bf16, "fb", "f", heads=4, kv_heads=1, length=8192, head_dim=128, size=4096),
        case("mistral/8k", fp32, "fb", "", heads=4, kv_heads=1, length=8192, head_dim=128, size=4096),
        case("t5-base/512", fp32, "fb", "fb", batch=2, heads=12, kv_heads=12, length=512, kind="bias"),
        case("t5-base/512", bf16, "fb", "", batch=2, heads=12, kv_heads=12, length=512, kind="bias"),
    ]
    for block in (16, 32, 64, 128):
        for dtype in (fp32, bf16):
            quick = "fb" if (block, dtype) == (64, fp32) else "f" if block == 64 else ""
            options: dict[str, Any] = dict(length=4096, kind="blocks", size=block, unmasked="dense")
            found.append(case(f"block-sparse/4k/{block}", dtype, "fb", quick, **options))
    return found
