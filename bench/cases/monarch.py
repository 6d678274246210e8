"""Monarch products against the dense layer they replace and against the two batched products they consist of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import effkern
from effkern.ops.monarch import monarch_bytes, monarch_flops
from effkern.reference.monarch import monarch_matmul as two_bmm

from . import Baseline, Call, Case, Oracle


@dataclass(frozen=True)
class MonarchCase(Case):
    """A layer from `width` to `outputs` features, its factors as `effkern.nn.MonarchLinear` makes them."""

    width: int = 1024
    outputs: int = 1024
    nblocks: int = 8
    tokens: int = 2048

    family = "monarch"
    op = "monarch_matmul"

    @property
    def shape(self) -> str:
        return f"{self.tokens} tokens, {self.width} to {self.outputs}, {self.nblocks} blocks"

    def _factor_shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        p, s = self.width // self.nblocks, self.outputs // self.nblocks
        inner = -(-min(p, s) // self.nblocks) * self.nblocks
        return (self.nblocks, inner, p), (self.nblocks, s, inner)

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)

        def make(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(device, self.dtype)

        first, second = self._factor_shapes()
        weights = (make(*shape, scale=shape[2] ** -0.5) for shape in (first, second))
        return make(self.tokens, self.width), *weights, make(self.outputs)

    def ours(self, backend: str | None) -> Call:
        return functools.partial(effkern.monarch_matmul, backend=backend)

    def baselines(self, device: torch.device, pass_: str, full: bool) -> dict[str, Baseline]:
        def dense(x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            weight = effkern.monarch_dense(w1.detach(), w2.detach()).contiguous()
            return x, weight.requires_grad_(w1.requires_grad), bias

        def einsum(x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor) -> Tensor:
            (k, _, p), (l, _, r) = w1.shape, w2.shape
            mid = torch.einsum("tkp,kqp->tkq", x.view(-1, k, p), w1).reshape(-1, r, l)
            return torch.einsum("trl,lsr->tsl", mid, w2).flatten(1) + bias

        def linear(layer: Callable[..., Tensor]) -> Baseline:
            # Its gradients are those of x, of a weight that nobody else has, and of the bias.
            return Baseline(layer, prepare=dense, results=(0, None, 3))

        found = {"bmm": Baseline(two_bmm), "dense": linear(F.linear)}
        if full:
            found["einsum"] = Baseline(einsum)
            found["compile-bmm"] = Baseline(_compiled(two_bmm))
            found["compile-dense"] = linear(_compiled(F.linear))
        return found

    def oracle(self, inputs: Sequence[Tensor], grad_out: Tensor | None) -> Oracle:
        leaves = [t.detach() for t in inputs]
        exact, plain = (_exact(leaves, grad_out, dtype) for dtype in (torch.float64, self.dtype))
        return Oracle(lambda tensors: [t.detach() for t in tensors], exact, plain, "all")

    def _meta(self) -> list[Tensor]:
        shapes = (self.tokens, self.width), *self._factor_shapes()
        return [torch.empty(shape, dtype=self.dtype, device="meta") for shape in shapes]

    def flops(self, pass_: str) -> float:
        return sum(monarch_flops(*self._meta(), backward=backward) for backward in _directions(pass_))

    def bytes(self, pass_: str) -> float:
        return sum(monarch_bytes(*self._meta(), backward=backward) for backward in _directions(pass_))

    def tiny(self) -> MonarchCase:
        return MonarchCase("tiny", self.dtype, self.passes, (), width=16, outputs=16, nblocks=4, tokens=4)


def _directions(pass_: str) -> list[bool]:
    return {"forward": [False], "backward": [True], "both": [False, True]}[pass_]


def _compiled(call: Call) -> Call:
    torch._dynamo.reset()  # one graph a case; dynamo would stop at its recompile limit
    torch._functorch.config.donated_buffer = False  # the timed backward runs many times over one graph
    return torch.compile(call, dynamic=False)


def _exact(inputs: list[Tensor], grad_out: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """The output or all gradients; with a half dtype every intermediate is rounded, the products run in fp32."""
    compute = dtype if dtype in (torch.float64, torch.float32) else torch.float32

    def rounded(t: Tensor) -> Tensor:
        return t.to(dtype).to(compute)

    x, w1, w2, bias = (t.to(compute) for t in inputs)
    (k, q, p), (l, s, r) = w1.shape, w2.shape
    rows = x.view(-1, k, p).transpose(0, 1)  # (k, tokens, p)
    mid = rounded(rows @ w1.mT).transpose(0, 1).reshape(-1, r, l).movedim(2, 0)  # (l, tokens, r)
    if grad_out is None:
        out = rounded(mid @ w2.mT).movedim(0, 2).flatten(1)
        return [(out + bias).to(dtype)]
    sent = grad_out.to(compute).view(-1, s, l).movedim(2, 0)  # (l, tokens, s)
    grad_mid = rounded(sent @ w2).permute(1, 2, 0).reshape(-1, k, q).transpose(0, 1)  # (k, tokens, q)
    grad_x = (grad_mid @ w1).transpose(0, 1).flatten(1)
    grads = [grad_x, grad_mid.mT @ rows, sent.mT @ mid, grad_out.to(compute).sum(0)]
    return [g.to(dtype) for g in grads]


# Widths of the first layer of the MLPs of real models.
MODELS = {"gpt2": (768, 3072), "vit-l": (1024, 4096), "bert-large": (1024, 4096), "llama-3-8b": (4096, 14336)}
GRID = "pays/"  # names of the cases that show where Monarch pays
# The rows the project is judged by: width, blocks, tokens.
BARS = [(1024, 8, 2048), (2048, 16, 2048), (4096, 16, 2048), (4096, 16, 16)]


def cases() -> list[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    short = {bf16: "bf16", fp32: "fp32"}
    every = ("forward", "backward", "both")
    found: list[Case] = []
    for width, nblocks, tokens in BARS:
        for dtype in (fp32, bf16):
            # In the first place fp32: without bf16 units a dense bf16 layer of PyTorch takes seconds.
            quick = ("forward", "both") if tokens > 16 and width < 4096 else ("forward",)
            found.append(
                MonarchCase(
                    f"square/{width}/nb{nblocks}/{tokens}/{short[dtype]}",
                    dtype,
                    every,
                    quick if dtype == fp32 or tokens == 16 else (),
                    width=width,
                    outputs=width,
                    nblocks=nblocks,
                    tokens=tokens,
                )
            )
    timed = {
        ("gpt2", 8, 256),
        ("vit-l", 8, 256),
        ("vit-l", 8, 1),
        ("llama-3-8b", 16, 1),
        ("llama-3-8b", 16, 16),
    }
    for model, (width, outputs) in MODELS.items():
        for nblocks in (4, 8, 16, 32):
            for tokens in (1, 16, 256, 2048):
                for dtype in (fp32, bf16):
                    chosen = dtype == fp32 and (model, nblocks, tokens) in timed
                    found.append(
                        MonarchCase(
                            f"{model}/nb{nblocks}/{tokens}/{short[dtype]}",
                            dtype,
                            every,
                            ("forward",) if chosen else (),
                            width=width,
                            outputs=outputs,
                            nblocks=nblocks,
                            tokens=tokens,
                        )
                    )
    found += [
        MonarchCase(
            f"{GRID}{width}/nb{nblocks}/fp32",
            fp32,
            ("forward", "both"),
            (),
            width=width,
            outputs=width,
            nblocks=nblocks,
        )
        for width in (512, 1024, 2048, 4096)
        for nblocks in (2, 4, 8, 16, 32, 64)
    ]
    return found
