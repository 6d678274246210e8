"""Decoding: one new query a sequence against a key-value cache, contiguous or in pages, and packed lengths."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import effkern
from effkern.ops.attention_decode import decode_bytes, decode_flops
from effkern.reference.attention_decode import attention_decode as reference

from . import Baseline, Call, Case, Oracle


@dataclass(frozen=True)
class DecodeCase(Case):
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    keys: int = 4096
    head_dim: int = 128
    page: int = 0  # 0: contiguous

    family = "attention"
    op = "attention_decode"

    @property
    def shape(self) -> str:
        pages = f", pages of {self.page}" if self.page else ""
        return f"B{self.batch} H{self.heads}:{self.kv_heads} 1x{self.keys} D{self.head_dim}{pages}"

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        heads = self.heads, self.kv_heads, self.kv_heads
        lengths = 1, self.keys, self.keys
        return tuple(
            torch.randn(self.batch, h, n, self.head_dim, generator=generator).to(device, self.dtype)
            for h, n in zip(heads, lengths, strict=True)
        )

    def _lengths(self, device: torch.device) -> Tensor:
        return torch.full((self.batch,), self.keys, dtype=torch.int32, device=device)

    def ours(self, backend: str | None) -> Call:
        @functools.cache
        def table(device: torch.device) -> Tensor:
            pages = self.keys // self.page
            generator = torch.Generator().manual_seed(0)
            return (
                torch.randperm(self.batch * pages, generator=generator)
                .reshape(self.batch, pages)
                .to(device, torch.int32)
            )

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            lengths = self._lengths(q.device)
            if not self.page:
                return effkern.attention_decode(q, k, v, lengths, backend=backend)  # type: ignore[return-value]
            return effkern.attention_decode(q, k, v, lengths, page_table=table(q.device), backend=backend)  # type: ignore[return-value]

        if not self.page:
            return call
        return lambda q, k, v: call(q, *(self._pages(t, table(q.device)) for t in (k, v)))

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def _pages(cache: Tensor, table: Tensor) -> Tensor:
        """The cache scattered into the pages of a table; made once for a tensor."""
        batch, heads, keys, dim = cache.shape
        pages = table.shape[1]
        room = torch.empty(batch * pages, heads, keys // pages, dim, dtype=cache.dtype, device=cache.device)
        room[table.flatten().long()] = cache.unflatten(2, (pages, -1)).transpose(1, 2).flatten(0, 1)
        return room

    def baselines(self, device: torch.device, pass_: str, full: bool) -> dict[str, Baseline]:
        call = functools.partial(F.scaled_dot_product_attention, enable_gqa=self.heads != self.kv_heads)
        return {"sdpa": Baseline(call)}

    def oracle(self, inputs: Sequence[Tensor], grad_out: Tensor | None) -> Oracle:
        q, k, v = (t.detach() for t in inputs)
        exact = reference(q.double(), k.double(), v.double(), self._lengths(q.device))[0]
        group = self.heads // self.kv_heads
        wide_k, wide_v = (t.float().repeat_interleave(group, 1) for t in (k, v))
        scores = (q.float() @ wide_k.mT).to(self.dtype) * self.head_dim**-0.5
        plain = (scores.softmax(-1).float() @ wide_v).to(self.dtype)
        return Oracle(lambda tensors: [tensors[0].detach()], [exact], [plain], "all heads")

    def _sizes(self) -> list[Tensor]:
        shapes = (self.heads, 1), (self.kv_heads, self.keys), (self.kv_heads, self.keys)
        made = [
            torch.empty(self.batch, h, n, self.head_dim, dtype=self.dtype, device="meta") for h, n in shapes
        ]
        return [*made, torch.empty(self.batch, dtype=torch.int32, device="meta")]

    def flops(self, pass_: str) -> float:
        return decode_flops(*self._sizes())

    def bytes(self, pass_: str) -> float:
        return decode_bytes(*self._sizes())

    def tiny(self) -> DecodeCase:
        return DecodeCase(
            "tiny", self.dtype, self.passes, (), keys=16, head_dim=self.head_dim, page=16 if self.page else 0
        )


# Lengths drawn once from a log-normal distribution, as prompts have them: about 4k tokens.
PROMPTS = (37, 61, 88, 104, 131, 152, 187, 214, 246, 303, 371, 468, 655, 1079)


@dataclass(frozen=True)
class PackedCase(Case):
    heads: int = 12
    head_dim: int = 64
    lengths: tuple[int, ...] = PROMPTS

    family = "attention"
    op = "attention"

    @property
    def shape(self) -> str:
        return f"{len(self.lengths)} sequences, {sum(self.lengths)} tokens, H{self.heads} D{self.head_dim} causal"

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        shape = self.heads, sum(self.lengths), self.head_dim
        return tuple(torch.randn(shape, generator=generator).to(device, self.dtype) for _ in range(3))

    def _offsets(self, device: torch.device) -> Tensor:
        return torch.tensor([0, *self.lengths], device=device).cumsum(0).to(torch.int32)

    def ours(self, backend: str | None) -> Call:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            ends = self._offsets(q.device)
            return effkern.attention(
                q, k, v, causal=True, cu_seqlens_q=ends, cu_seqlens_k=ends, backend=backend
            )

        return call

    def baselines(self, device: torch.device, pass_: str, full: bool) -> dict[str, Baseline]:
        def one_by_one(*tensors: Tensor) -> Tensor:
            parts = zip(*(t[None].split(self.lengths, 2) for t in tensors), strict=True)
            outs = [F.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in parts]
            return torch.cat([out[0] for out in outs], 1)

        longest = max(self.lengths)
        keep = torch.arange(longest) < torch.tensor(self.lengths)[:, None]
        seen = (keep[:, None, None] & torch.ones(longest, longest, dtype=torch.bool).tril()).to(device)

        def padded(*tensors: Tensor) -> Tensor:
            wide = [
                torch.nn.utils.rnn.pad_sequence([s.transpose(0, 1) for s in t.split(self.lengths, 1)], True)
                for t in tensors
            ]
            q, k, v = (t.transpose(1, 2) for t in wide)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            return torch.cat([row[:, :n] for row, n in zip(out, self.lengths, strict=True)], 1)

        return {"sdpa-loop": Baseline(one_by_one), "sdpa-padded": Baseline(padded)}

    def oracle(self, inputs: Sequence[Tensor], grad_out: Tensor | None) -> Oracle:
        """Every sequence of two heads."""
        picked = [0, self.heads - 1]

        def run(dtype: torch.dtype) -> list[Tensor]:
            leaves = [t.detach()[picked].to(dtype).requires_grad_(grad_out is not None) for t in inputs]
            outs = []
            for q, k, v in zip(*(t.split(self.lengths, 1) for t in leaves), strict=True):
                s = (q.double() @ k.double().mT).to(dtype) * self.head_dim**-0.5
                hidden = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
                weights = s.masked_fill(hidden, -torch.inf).softmax(-1)
                outs.append((weights.double() @ v.double()).to(dtype))
            out = torch.cat(outs, 1)
            if grad_out is None:
                return [out.detach()]
            return list(torch.autograd.grad(out, leaves, grad_out[picked].to(dtype)))

        return Oracle(
            lambda tensors: [t.detach()[picked] for t in tensors],
            run(torch.float64),
            run(self.dtype),
            "2 heads",
        )

    def _pairs(self) -> int:
        return self.heads * sum(n * (n + 1) // 2 for n in self.lengths)

    def flops(self, pass_: str) -> float:
        return self._pairs() * self.head_dim * (10 if pass_ == "backward" else 4)

    def bytes(self, pass_: str) -> float:
        tensors = 8 if pass_ == "backward" else 4
        return tensors * self.heads * sum(self.lengths) * self.head_dim * self.dtype.itemsize

    def tiny(self) -> PackedCase:
        return PackedCase(
            "tiny", self.dtype, self.passes, (), heads=2, head_dim=self.head_dim, lengths=(5, 9)
        )


def cases() -> list[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    short = {bf16: "bf16", fp32: "fp32"}
    found: list[Case] = []
    decodes: dict[str, dict[str, int]] = {
        "decode/4k": dict(),
        "decode/llama-3-8b/4k": dict(heads=32, kv_heads=8),
        "decode/llama-3-8b/4k/paged": dict(heads=32, kv_heads=8, page=64),
        "decode/llama-3-8b/32k": dict(heads=32, kv_heads=8, keys=32768),
        "decode/llama-3-8b/batch-8": dict(heads=32, kv_heads=8, batch=8, keys=1024),
    }
    quick = {
        ("decode/4k", bf16),
        ("decode/llama-3-8b/4k", bf16),
        ("decode/llama-3-8b/4k/paged", bf16),
        ("decode/4k", fp32),
    }
    for name, sizes in decodes.items():
        for dtype in (bf16, fp32):
            timed = ("forward",) if (name, dtype) in quick else ()
            found.append(DecodeCase(f"{name}/{short[dtype]}", dtype, ("forward",), timed, **sizes))
    both = ("forward", "backward")
    found.append(PackedCase("prompts/packed/bf16", bf16, both, both))
    found.append(PackedCase("prompts/packed/fp32", fp32, both, ()))
    return found
