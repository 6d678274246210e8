"""Attention against PyTorch's: shapes of real models, and the grid the project is judged by."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import effkern
from effkern.ops.attention import attention_bytes, attention_flops
from effkern.reference.attention import attention as reference

from . import Baseline, Call, Case, Oracle

# The oracle computes at most this many float64 scores; of larger cases it checks some of the heads.
ORACLE_ELEMENTS = 1 << 25

SDPA_BACKENDS = {
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
    "cuda": {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    },
}
# The math backend holds the whole score matrix; nobody would pick it at more elements than this.
MATH_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class AttentionCase(Case):
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    queries: int = 1024
    keys: int = 1024
    head_dim: int = 64
    causal: bool = False

    family = "attention"
    op = "attention"

    @property
    def shape(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}:{self.kv_heads}"
        length = f"{self.queries}" if self.queries == self.keys else f"{self.queries}x{self.keys}"
        return f"B{self.batch} H{heads} S{length} D{self.head_dim} {'causal' if self.causal else 'full'}"

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)

        def make(heads: int, length: int) -> Tensor:
            values = torch.randn(self.batch, heads, length, self.head_dim, generator=generator)
            return values.to(device, self.dtype)

        return make(self.heads, self.queries), make(self.kv_heads, self.keys), make(self.kv_heads, self.keys)

    def ours(self, backend: str | None) -> Call:
        return functools.partial(effkern.attention, causal=self.causal, backend=backend)

    def baselines(self, device: torch.device, pass_: str, full: bool) -> dict[str, Baseline]:
        # SDPA aligns a causal mask to the top left; the cases that use it have as many queries as keys.
        call = functools.partial(
            F.scaled_dot_product_attention, is_causal=self.causal, enable_gqa=self.heads != self.kv_heads
        )
        found = {
            f"sdpa-{name}": Baseline(call, functools.partial(sdpa_kernel, backend))
            for name, backend in SDPA_BACKENDS[device.type].items()
            if name != "math" or (full and self._score_elements() <= MATH_ELEMENTS)
        }
        if full and (device.type == "cuda" or pass_ == "forward"):
            found["flex"] = Baseline(
                _flex(self.causal, self.heads != self.kv_heads, self.queries, self.keys, device)
            )
        return found

    def oracle(self, inputs: Sequence[Tensor], grad_out: Tensor | None) -> Oracle:
        """The heads of a kv group need nothing of the others, so a slice of the groups is exact by itself."""
        per_group = self.heads // self.kv_heads * self.queries * self.keys
        groups = self.batch * self.kv_heads
        picked = _spread(groups, max(2, ORACLE_ELEMENTS // per_group))

        def select(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [t.detach().unflatten(1, (self.kv_heads, -1)).flatten(0, 1)[picked] for t in tensors]

        part = select(inputs)
        grad = None if grad_out is None else select([grad_out])[0]
        exact = _run(functools.partial(_exact, causal=self.causal), [t.double() for t in part], grad)
        composition = _run(functools.partial(_composition, causal=self.causal), part, grad)
        every = "all" if len(picked) == groups else f"{len(picked)} of {groups}"
        return Oracle(select, exact, composition, f"{every} kv heads")

    def flops(self, pass_: str) -> float:
        return attention_flops(*self._meta(), causal=self.causal, backward=pass_ == "backward")

    def bytes(self, pass_: str) -> float:
        return attention_bytes(*self._meta(), backward=pass_ == "backward")

    def tiny(self) -> AttentionCase:
        head_dim, causal = self.head_dim, self.causal
        sizes: dict[str, Any] = {
            "batch": 1,
            "heads": 1,
            "kv_heads": 1,
            "queries": 8,
            "keys": 8,
            "head_dim": head_dim,
        }
        return AttentionCase("tiny", self.dtype, self.passes, (), causal=causal, **sizes)

    def _meta(self) -> tuple[Tensor, Tensor, Tensor]:
        def make(heads: int, length: int) -> Tensor:
            return torch.empty(self.batch, heads, length, self.head_dim, dtype=self.dtype, device="meta")

        return make(self.heads, self.queries), make(self.kv_heads, self.keys), make(self.kv_heads, self.keys)

    def _score_elements(self) -> int:
        return self.batch * self.heads * self.queries * self.keys


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of range(count), the first and the last among them."""
    if most >= count:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _exact(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return reference(q, k, v, causal=causal)[0]


def _composition(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """q (N, G, Sq, D), k and v (N, 1, Sk, D): matmul, softmax, matmul, each result rounded to the dtype.

    The products run in fp32, as matrix units do; that gives the same numbers on CPUs that have none.
    """
    dtype = q.dtype
    scores = (q.float() @ k.float().transpose(-1, -2)).to(dtype) * q.shape[-1] ** -0.5
    if causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1).float() @ v.float()).to(dtype)


def _run(call: Call, inputs: Sequence[Tensor], grad_out: Tensor | None) -> list[Tensor]:
    """Output, or gradients of the inputs, one group at a time, which keeps one group's scores in memory."""
    results = []
    for i in range(len(inputs[0])):
        leaves = [t[i : i + 1].detach().requires_grad_(grad_out is not None) for t in inputs]
        out = call(*leaves)
        if grad_out is None:
            results.append([out])
        else:
            results.append(list(torch.autograd.grad(out, leaves, grad_out[i : i + 1].to(out.dtype))))
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


def _flex(causal: bool, grouped: bool, queries: int, keys: int, device: torch.device) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    mask = create_block_mask(visible, None, None, queries, keys, device=device.type) if causal else None
    # Each case has its own shapes and mask; without a reset, dynamo would stop at its recompile limit.
    torch._dynamo.reset()
    # The timed backward runs many times over one graph, which donated buffers would not allow.
    torch._functorch.config.donated_buffer = False
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return functools.partial(compiled, block_mask=mask, enable_gqa=grouped)


def _case(name: str, dtype: torch.dtype, quick: str, **sizes: Any) -> AttentionCase:
    """`quick` is a word of "f" and "b": the passes of the quick set."""
    passes = {"f": "forward", "b": "backward"}
    short = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}[dtype]
    return AttentionCase(
        f"{name}/{short}", dtype, ("forward", "backward"), tuple(passes[c] for c in quick), **sizes
    )


def _square(length: int) -> dict[str, int]:
    return {"queries": length, "keys": length}


def _models() -> list[AttentionCase]:
    bf16, fp32 = torch.bfloat16, torch.float32
    gpt2: dict[str, Any] = {"heads": 12, "kv_heads": 12, "head_dim": 64, "causal": True}
    llama: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head_dim": 128, "causal": True}
    vit: dict[str, Any] = {"heads": 16, "kv_heads": 16, "head_dim": 64}
    mini: dict[str, Any] = {"heads": 12, "kv_heads": 12, "head_dim": 32}
    return [
        _case("gpt2-small/1024", bf16, "fb", **gpt2, **_square(1024)),
        _case("gpt2-small/1024", fp32, "fb", **gpt2, **_square(1024)),
        _case("llama-3-8b/1024", bf16, "f", **llama, **_square(1024)),
        _case("llama-3-8b/4096", bf16, "", **llama, **_square(4096)),
        _case("llama-3-8b/2048", fp32, "", **llama, **_square(2048)),
        _case("vit-l-16/197", bf16, "fb", batch=4, **vit, **_square(197)),
        _case("vit-l-16/577", bf16, "", batch=2, **vit, **_square(577)),
        _case("vit-l-16/577", fp32, "f", batch=2, **vit, **_square(577)),
        _case("bert-large/512", bf16, "f", batch=2, **vit, **_square(512)),
        _case("bert-large/512", fp32, "", batch=2, **vit, **_square(512)),
        _case("minilm/128", fp32, "f", batch=16, **mini, **_square(128)),
        _case("minilm/128", bf16, "", batch=16, **mini, **_square(128)),
    ]


# Passes of the grid that `--quick` times, by (dtype, head dim, length, causal).
QUICK_GRID = {
    ("bf16", 64, 512, True): "fb",
    ("bf16", 64, 1024, False): "fb",
    ("bf16", 64, 1024, True): "fb",
    ("bf16", 64, 4096, False): "f",
    ("bf16", 64, 4096, True): "f",
    ("bf16", 128, 512, True): "fb",
    ("bf16", 128, 1024, False): "f",
    ("bf16", 128, 2048, True): "f",
    ("fp32", 64, 512, True): "fb",
    ("fp32", 64, 1024, False): "fb",
    ("fp32", 64, 2048, True): "fb",
    ("fp32", 128, 2048, False): "f",
}


def _grid() -> list[AttentionCase]:
    found = []
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for head_dim in (64, 128):
            for length in (256, 512, 1024, 2048, 4096):
                for causal in (False, True):
                    name = f"grid/d{head_dim}/{length}/{'causal' if causal else 'full'}"
                    quick = QUICK_GRID.get((short, head_dim, length, causal), "")
                    sizes: dict[str, Any] = {**_square(length), "head_dim": head_dim, "causal": causal}
                    found.append(_case(name, dtype, quick, **sizes))
    return found


def cases() -> list[Case]:
    return [*_models(), *_grid()]
