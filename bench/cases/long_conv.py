"""Long convolutions against what PyTorch has for them: real FFTs of twice the length, and elementwise gates."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import effkern
from effkern.ops.long_conv import long_conv_bytes, long_conv_flops
from effkern.reference.long_conv import compute_dtype, kernel_spectrum, long_conv

from . import Baseline, Call, Case, Oracle

CHANNELS = 2  # that the oracle looks at: the first and the last


@dataclass(frozen=True)
class LongConvCase(Case):
    """A kernel as long as u. `gates` come with a skip; `prepared`: ours starts from a spectrum of the kernel."""

    batch: int = 2
    channels: int = 64
    length: int = 4096
    causal: bool = True
    skip: bool = False
    gates: bool = False
    prepared: bool = False

    family = "long_conv"
    op = "long_conv"

    @property
    def shape(self) -> str:
        kind = "" if self.causal else ", both directions"
        extras = ", skip and gates" if self.gates else ", skip" if self.skip else ""
        ready = ", prepared kernel" if self.prepared else ""
        return f"B{self.batch} H{self.channels} L{self.length}{kind}{extras}{ready}"

    def _shapes(self) -> list[tuple[int, ...]]:
        row = (self.batch, self.channels, self.length)
        kernel = (self.channels, self.length) if self.causal else (self.channels, 2, self.length)
        return [row, kernel, *([(self.channels,)] if self.skip else []), *([row, row] if self.gates else [])]

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        scales = [1.0, self.length**-0.5, 1.0, 1.0, 1.0]
        return tuple(
            (torch.randn(shape, generator=generator) * scale).to(device, self.dtype)
            for shape, scale in zip(self._shapes(), scales, strict=False)
        )

    def _named(self, call: Callable[..., Any], **options: Any) -> Call:
        """A call of positional tensors: u, k, and what else there is by name."""
        names = [*(["skip"] if self.skip else []), *(["pre_gate", "post_gate"] if self.gates else [])]

        def named(u: Tensor, k: Any, *rest: Tensor) -> Tensor:
            return call(u, k, causal=self.causal, **dict(zip(names, rest, strict=True)), **options)

        return named

    def ours(self, backend: str | None) -> Call:
        return self._named(effkern.long_conv, backend=backend)

    def candidate(self, backend: str | None) -> Baseline:
        def prepare(u: Tensor, k: Tensor, *rest: Tensor) -> tuple[Any, ...]:
            return u, effkern.long_conv_prepare(k, self.length, causal=self.causal), *rest

        return Baseline(self.ours(backend), prepare=prepare if self.prepared else None)

    def baselines(self, device: torch.device, pass_: str, full: bool) -> dict[str, Baseline]:
        def transform(u: Tensor, k: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            return u, kernel_spectrum(k.to(compute_dtype(k.dtype)), 2 * self.length, self.causal), *rest

        found = {} if self.prepared else {"rfft": Baseline(self._named(rfft_convolution))}
        if pass_ == "forward":
            found["rfft-prepared"] = Baseline(self._named(rfft_convolution), prepare=transform)
        scipy = importlib.util.find_spec("scipy") is not None
        plain = self.causal and not self.prepared and self.dtype == torch.float32
        if full and scipy and plain and pass_ == "forward" and device.type == "cpu":
            found["oaconvolve"] = Baseline(self._named(overlap_add))
        return found

    def oracle(self, inputs: Sequence[Tensor], grad_out: Tensor | None) -> Oracle:
        """Channels do not see each other, so the exact results are those of a few."""
        picked = torch.linspace(0, self.channels - 1, CHANNELS).long().unique().tolist()

        def select(tensors: Sequence[Tensor]) -> list[Tensor]:
            # Outputs have channels along the second axis, as u and the gates; k and skip along the first.
            weights = () if len(tensors) == 1 else (1, 2) if self.skip else (1,)
            return [
                t.detach()[picked] if i in weights else t.detach()[:, picked] for i, t in enumerate(tensors)
            ]

        chosen = select(inputs)
        grad = None if grad_out is None else grad_out[:, picked]
        exact, plain = (
            _results(self._named(call), [t.to(dtype) for t in chosen], grad)
            for call, dtype in ((long_conv, torch.float64), (rfft_convolution, self.dtype))
        )
        return Oracle(select, exact, plain, f"channels {', '.join(map(str, picked))}")

    def _meta(self) -> tuple[Tensor, Any, dict[str, Tensor]]:
        u, k, *rest = (torch.empty(shape, dtype=self.dtype, device="meta") for shape in self._shapes())
        kernel = effkern.long_conv_prepare(k, self.length, causal=self.causal) if self.prepared else k
        return u, kernel, dict(zip(("skip", "pre_gate", "post_gate"), rest, strict=False))

    def flops(self, pass_: str) -> float:
        u, k, rest = self._meta()
        return sum(long_conv_flops(u, k, **rest, backward=backward) for backward in _directions(pass_))

    def bytes(self, pass_: str) -> float:
        u, k, rest = self._meta()
        return sum(long_conv_bytes(u, k, **rest, backward=backward) for backward in _directions(pass_))

    def tiny(self) -> LongConvCase:
        return replace(self, name="tiny", quick=(), batch=1, channels=3, length=16)


def rfft_convolution(
    u: Tensor,
    k: Tensor,
    *,
    causal: bool,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
) -> Tensor:
    """What one writes in PyTorch, every step a tensor of u's dtype; a complex k is its spectrum."""
    length, compute = u.shape[2], compute_dtype(u.dtype)
    x = u if pre_gate is None else pre_gate * u
    kernel = k if k.is_complex() else kernel_spectrum(k.to(compute), 2 * length, causal)
    y = torch.fft.irfft(torch.fft.rfft(x.to(compute), n=2 * length) * kernel, n=2 * length)[..., :length]
    y = y.to(u.dtype)
    if skip is not None:
        y = y + skip[:, None] * x
    return y if post_gate is None else post_gate * y


def overlap_add(
    u: Tensor,
    k: Tensor,
    *,
    causal: bool,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
) -> Tensor:
    """scipy.signal.oaconvolve, on one thread, and the rest in PyTorch."""
    from scipy.signal import oaconvolve

    x = u if pre_gate is None else pre_gate * u
    y = torch.from_numpy(oaconvolve(x.numpy(), k.numpy()[None], axes=-1)[..., : u.shape[2]])
    if skip is not None:
        y = y + skip[:, None] * x
    return y if post_gate is None else post_gate * y


def _results(call: Call, inputs: list[Tensor], grad: Tensor | None) -> list[Tensor]:
    """The output, or all gradients."""
    with torch.set_grad_enabled(grad is not None):
        leaves = [t.detach().requires_grad_(grad is not None) for t in inputs]
        out = call(*leaves)
        return [out] if grad is None else list(torch.autograd.grad(out, leaves, grad.to(out.dtype)))


def _directions(pass_: str) -> list[bool]:
    return {"forward": [False], "backward": [True], "both": [False, True]}[pass_]


# The lengths the project is judged by, each with as many channels as make four million taps.
SWEEP = {"1k": 1 << 10, "4k": 1 << 12, "16k": 1 << 14, "64k": 1 << 16, "256k": 1 << 18, "1m": 1 << 20}
TAPS = 1 << 22


def cases() -> list[Case]:
    fp32, bf16 = torch.float32, torch.bfloat16
    forward, every = ("forward",), ("forward", "backward", "both")
    make = functools.partial(LongConvCase, dtype=fp32, passes=every, quick=())
    found: list[Case] = []
    for name, length in SWEEP.items():
        quick = ("forward", "both") if length >= 4096 else forward
        case = make(f"sweep/{name}/fp32", quick=quick, channels=TAPS // length, length=length)
        ready = replace(case, name=f"prepared/{name}/fp32", passes=forward, quick=forward, prepared=True)
        found += [case, ready]
    for dtype, name in ((fp32, "fp32"), (bf16, "bf16")):
        found.append(
            make(
                f"gated/8k/{name}",
                dtype=dtype,
                quick=("forward", "both") if dtype == fp32 else (),
                channels=256,
                length=8192,
                skip=True,
                gates=True,
            )
        )
    found += [
        # B=1 as in training on single sequences; Hyena's 768 channels are cut to a third.
        *(
            make(
                f"hyenadna/{name}/fp32",
                passes=("forward", "both"),
                batch=1,
                channels=channels,
                length=length,
                skip=True,
            )
            for name, channels, length in (
                ("450k", 256, 450_000),
                ("1m", 128, 1 << 20),
                ("1m-wide", 256, 1 << 20),
            )
        ),
        make("hyena/8k/fp32", batch=1, channels=256, length=8192, skip=True, gates=True),
        make("hyena/8k/bf16", dtype=bf16, batch=1, channels=256, length=8192, skip=True, gates=True),
        make("h3-125m/2k/fp32", channels=768, length=2048, skip=True, gates=True),
        make("path-256/64k/fp32", batch=1, channels=128, length=1 << 16, skip=True),
        make("m2-bert/4k/fp32", quick=forward, channels=768, length=4096, causal=False, skip=True),
        make("s4d-audio/16k/fp32", batch=4, channels=128, length=16_000, skip=True),
        make("s4d-audio/64k/fp32", channels=64, length=64_000, skip=True),
    ]
    return found
