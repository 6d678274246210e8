"""Training steps of stacks of transformer blocks: every activation stored, checkpointed, or recovered.

A step is the forward pass and the gradients of the input and of all weights. Weights and the states between blocks are
float32; bfloat16 cases run under autocast, as trainings do. memcnn and revtorch, where they are installed, run the same
sub-blocks with the same weights (`effkern.bench.rivals` says what to mind with them).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import effkern
from effkern import _host
from effkern.nn import ReversibleBlock, ReversibleSequence

from .. import rivals
from ..reversible_plain import Attention, Residual, Runner, by_hand, checkpointed, stored
from . import Baseline, Call, Case, Oracle

CPU_FLOPS = 2e11  # of a step: seconds, and a minute for all that are compared
RIVALS = {"memcnn": rivals.memcnn_stack, "revtorch": rivals.revtorch_stack}


@dataclass(frozen=True)
class StackCase(Case):
    """`depth` blocks of a model; `ordinary` ones have one stream, for `checkpoint_sequence`."""

    batch: int = 1
    tokens: int = 197
    width: int = 768
    heads: int = 12
    causal: bool = False
    depth: int = 12
    ordinary: bool = False

    family = "reversible"

    @property
    def op(self) -> str:  # type: ignore[override]
        return "checkpoint_sequence" if self.ordinary else "ReversibleSequence"

    @property
    def shape(self) -> str:
        kind = "one stream" if self.ordinary else "two streams"
        return f"B{self.batch} S{self.tokens} E{self.width} H{self.heads}, {self.depth} blocks, {kind}"

    def _blocks(self) -> list[nn.Module]:
        """On no device; `_filled` gives them their weights."""
        make = Residual if self.ordinary else ReversibleBlock

        def mlp() -> nn.Module:
            width = self.width
            up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            return nn.Sequential(nn.LayerNorm(width), up, nn.GELU(), down)

        with torch.device("meta"):
            return [make(Attention(self.width, self.heads, self.causal), mlp()) for _ in range(self.depth)]

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        """The input, then the weights of all blocks."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, self.tokens, self.width, generator=generator)
        return tuple(t.to(device) for t in (x, *self._weights(generator)))

    def _weights(self, generator: torch.Generator) -> list[Tensor]:
        """As GPT-2 starts them."""
        weights = []
        for block in self._blocks():
            for name, meta in block.named_parameters():
                weight = 0.02 * torch.randn(meta.shape, generator=generator)
                if "norm" in name or name.startswith("g.0."):
                    weight += name.endswith("weight")
                elif name in ("f.out.weight", "g.3.weight"):
                    weight /= (2 * self.depth) ** 0.5
                weights.append(weight)
        return weights

    def _filled(self, weights: Sequence[Tensor]) -> list[nn.Module]:
        """Blocks that hold these very tensors, so that the gradients of a step are theirs."""
        blocks, rest = self._blocks(), iter(weights)
        for block in blocks:
            for module in block.modules():
                for name in module._parameters:
                    module._parameters[name] = next(rest)  # type: ignore[assignment]
        return blocks

    def _call(self, runner: Callable[[list[nn.Module]], Runner]) -> Call:
        """A call of (x, *weights). Modules are made once for each set of weights."""
        known: dict[int, tuple[Tensor, Runner]] = {}

        def call(x: Tensor, *weights: Tensor) -> Tensor:
            if id(weights[0]) not in known:
                known[id(weights[0])] = weights[0], runner(self._filled(weights))
            with self._autocast(x.device):
                return known[id(weights[0])][1](x)

        return call

    def _autocast(self, device: torch.device, cache: bool | None = None) -> torch.autocast:
        enabled = self.dtype == torch.bfloat16
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=cache)

    def ours(self, backend: str | None) -> Call:
        return self._call(self._recomputed())

    def _recomputed(self, *, overlap: bool = False, **options: Any) -> Callable[[list[nn.Module]], Runner]:
        """Our stack. Not with "auto": its first backward passes on a CPU are trials, and would be what is timed."""
        if self.ordinary:
            return lambda blocks: lambda x: effkern.checkpoint_sequence(blocks, x, overlap=overlap)
        return lambda blocks: _sequence(blocks, overlap=overlap, **options)

    def baselines(self, device: torch.device, pass_: str, full: bool) -> dict[str, Baseline]:
        found = {"stored": self._call(stored), "torch-checkpoint": self._call(checkpointed)}
        found["effkern-overlap"] = self._call(self._recomputed(overlap=True))
        if not self.ordinary:
            found["effkern-exact"] = self._call(self._recomputed(exact=14))
        baselines = {name: Baseline(call) for name, call in found.items()}
        # Their second forward pass has the numerics of the first only if backward runs under autocast, too. It keeps
        # no casts: those of one step would serve the next.
        context = partial(self._autocast, device, cache=False)
        for name, stack in RIVALS.items():
            if not self.ordinary and pass_ == "both" and rivals.installed(name):
                baselines[name] = Baseline(self._call(stack), context, accumulates=True)
        return baselines

    def oracle(self, inputs: Sequence[Tensor], grad_out: Tensor | None) -> Oracle:
        """Of the input, the first and the last block. The composition is the backward pass written by hand."""
        count = (len(inputs) - 1) // self.depth

        def select(tensors: Sequence[Tensor]) -> list[Tensor]:
            picked = [tensors[0], *tensors[1 : 1 + count], *tensors[-count:]] if len(tensors) > 1 else tensors
            return [t.detach() for t in picked]

        def results(dtype: torch.dtype, runner: Callable[[list[nn.Module]], Runner]) -> list[Tensor]:
            case = replace(self, dtype=dtype if dtype == torch.float64 else self.dtype)
            with torch.set_grad_enabled(grad_out is not None):
                leaves = [t.detach().to(dtype).requires_grad_(grad_out is not None) for t in inputs]
                out = case._call(runner)(*leaves)
                if grad_out is None:
                    return [out]
                return select(torch.autograd.grad(out, leaves, grad_out.to(dtype)))

        plain = checkpointed if self.ordinary or grad_out is None else by_hand
        note = "input, first and last block" if count else "input"
        return Oracle(select, results(torch.float64, checkpointed), results(torch.float32, plain), note)

    def included(self, device: torch.device) -> bool:
        if device.type != "cpu":
            return self.depth > FEW
        # PyTorch's own bfloat16 products are a hundred times slower than float32 ones where there are no units for them
        units = self.dtype != torch.bfloat16 or {"avx512_bf16", "amx"} & set(_host.isa_levels())
        return bool(units) and self.flops("both") <= CPU_FLOPS

    def flops(self, pass_: str) -> float:
        """Of the products of the step itself, without what is computed twice."""
        scores = 2 * self.batch * self.tokens**2 * self.width * (1 if self.causal else 2)
        forward = self.depth * (24 * self.batch * self.tokens * self.width**2 + scores)
        return float(forward if pass_ == "forward" else 3 * forward)

    def bytes(self, pass_: str) -> float:
        """Weights read in both passes, their gradients written; the input, the output and their gradients."""
        weights = sum(p.numel() for block in self._blocks()[:1] for p in block.parameters()) * self.depth
        states = self.batch * self.tokens * self.width
        return float(4 * (weights + 2 * states) if pass_ == "forward" else 4 * (3 * weights + 4 * states))

    def tiny(self) -> StackCase:
        return replace(self, name="tiny", quick=(), batch=1, tokens=4, width=16, heads=2, depth=2)


@dataclass(frozen=True)
class ActivationsCase(StackCase):
    """A step after which no gradient of a weight is left: a hook frees each as it comes, as an optimizer that steps in
    the backward pass would. The peak is then that of activations. Weights belong to the case and are no inputs."""

    tensors_only = True

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        return super().inputs(device, seed)[:1]

    def _call(self, runner: Callable[[list[nn.Module]], Runner]) -> Call:
        call = super()._call(runner)
        known: dict[torch.dtype, list[Tensor]] = {}

        def with_weights(x: Tensor) -> Tensor:
            if x.dtype not in known:
                weights = [w.to(x) for w in self._weights(torch.Generator().manual_seed(0))]
                for weight in weights:
                    weight.requires_grad_().register_post_accumulate_grad_hook(_freed)
                known[x.dtype] = weights
            return call(x, *known[x.dtype])

        return with_weights

    def candidate(self, backend: str | None) -> Baseline:
        return replace(super().candidate(backend), accumulates=True)

    def baselines(self, device: torch.device, pass_: str, full: bool) -> dict[str, Baseline]:
        found = super().baselines(device, pass_, full)
        if device.type == "cpu":
            del found["effkern-overlap"]  # the trace of tensors does not see what its second thread allocates
        return {name: replace(baseline, accumulates=True) for name, baseline in found.items()}


def _freed(weight: Tensor) -> None:
    weight.grad = None


def _sequence(blocks: list[nn.Module], **options: Any) -> Runner:
    sequence = ReversibleSequence(blocks, **options)

    def run(x: Tensor) -> Tensor:
        y1, y2 = sequence(x)
        return y1 + y2

    return run


@dataclass(frozen=True)
class _Model:
    tokens: int
    width: int
    heads: int
    batches: dict[int, tuple[int, ...]]  # by the number of blocks
    causal: bool = False


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FEW = 2  # blocks: what a CPU can do of the models in seconds
MODELS = {
    "vit-b-16": _Model(197, 768, 12, {12: (1, 8, 32), 24: (1,), 36: (1,), 48: (1,), FEW: (1, 4)}),
    "vit-l-16": _Model(197, 1024, 16, {24: (1, 8), FEW: (1,)}),
    "roberta-base": _Model(512, 768, 12, {12: (1, 8), FEW: (1,)}),
    "gpt2-medium": _Model(1024, 1024, 16, {24: (1, 4), FEW: (1,)}, causal=True),
}
# Cheap enough for a CPU to go deep; 16 sequences are those of the table of memory in docs/reversible.md.
NARROW = _Model(64, 64, 1, {12: (1, 4, 16, 64), 24: (16,), 48: (16,)})


def cases() -> list[Case]:
    found = [case for name, model in MODELS.items() for case in _sizes(StackCase, name, model, DTYPES)]
    return [*found, *_sizes(ActivationsCase, "narrow", NARROW, {"fp32": torch.float32})]


def _sizes(
    kind: type[StackCase], model: str, sizes: _Model, dtypes: dict[str, torch.dtype]
) -> Iterator[Case]:
    shapes = [(depth, batch) for depth, batches in sizes.batches.items() for batch in batches]
    for (depth, batch), (short, dtype), ordinary in itertools.product(shapes, dtypes.items(), (False, True)):
        quick = (model, depth, batch, short) == ("vit-b-16", 12, 1, "fp32")
        yield kind(
            f"{model}/{'checkpoint' if ordinary else 'reversible'}/{depth}/b{batch}/{short}",
            dtype,
            ("both",),
            ("both",) if quick else (),
            batch=batch,
            tokens=sizes.tokens,
            width=sizes.width,
            heads=sizes.heads,
            causal=sizes.causal,
            depth=depth,
            ordinary=ordinary,
        )
