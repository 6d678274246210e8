"""Calls of palettized_linear that must work and calls that must fail, for the contract tests and the self-test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.ops import _palette_layout as layout
from effkern.ops.palettize import Palette
from effkern.ops.registry import BadSample, Sample


def _random(device: str, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def make_palette(
    device: str, dtype: torch.dtype, rows: int, columns: int, bits: int, groups: int = 1, dim: int = 1
) -> Palette:
    """Of random bytes: with 2^bits entries a table, any byte is a valid one."""
    generator = torch.Generator().manual_seed(rows + columns)
    size = (rows, layout.row_bytes(columns // dim, bits))
    indices = torch.randint(256, size, generator=generator, dtype=torch.uint8).to(device)
    shape = [*([groups] if groups > 1 else []), 2**bits, *([dim] if dim > 1 else [])]
    return Palette(indices, _random(device, dtype, *shape), (rows, columns), bits, groups, dim)


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    def sample(
        name: str, x: tuple[int, ...], rows: int, bits: int, groups: int = 1, dim: int = 1, **kwargs: Any
    ) -> Sample:
        palette = make_palette(device, dtype, rows, x[-1], bits, groups, dim)
        return Sample(name, (_random(device, dtype, *x),), {"palette": palette, **kwargs})

    bias = _random(device, dtype, 20)
    return [
        sample("three bits", (5, 7, 40), 20, 3, bias=bias),
        sample("one token, groups", (530,), 20, 4, 4, bias=bias),
        sample("pairs", (3, 80), 20, 6, 1, 2, bias=bias),
        sample("many tokens, a whole byte", (40, 36), 20, 8, 2),
        sample("no tokens", (2, 0, 24), 20, 2),
    ]


def calls(sample: Sample) -> list[tuple[str, tuple[Any, ...]]]:
    """The same call at the dispatcher, forward and backward."""
    (x,), palette = sample.args, sample.kwargs["palette"]
    weight = (palette.indices, palette.lut, palette.bits, palette.groups, palette.dim)
    bias = sample.kwargs.get("bias")
    with torch.no_grad():
        out = torch.ops.effkern.palettized_linear(x, *weight, bias)
    return [
        ("palettized_linear", (x, *weight, bias)),
        ("palettized_linear", (x, *weight, bias, True)),
        ("palettized_linear_backward", (torch.cos(out), x, *weight)),
        ("palettized_linear_backward", (torch.cos(out), x, *weight, False, True)),
    ]


def bad_samples(device: str) -> list[BadSample]:
    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    palette = make_palette(device, torch.float32, 6, 8, 3)

    def bad(name: str, match: str, x: Any, error: type[Exception] = RuntimeError, **kwargs: Any) -> BadSample:
        return BadSample(name, (x,), {"palette": palette, **kwargs}, error, match)

    x, factors = ones(3, 8), (ones(2, 8), ones(6, 2))
    far = Palette(palette.indices, palette.lut.to("meta"), palette.shape, palette.bits)
    return [
        bad("features", r"x must have 8 features, got shape \(3, 9\)", ones(3, 9)),
        bad("scalar", "x must have 8 features", ones()),
        bad("integers", "x must be float32, bfloat16, float16 or float64", x.long()),
        bad("not a tensor", "x must be a tensor, got list", [1.0], TypeError),
        bad("dense weight", "palette must be a Palette, got Tensor", x, TypeError, palette=ones(6, 8)),
        bad("device", "palette is on another device than x", x, palette=far),
        bad("bias", r"bias must have shape \(6,\), got \(5,\)", x, bias=ones(5)),
        bad("bias of integers", "bias must be floating", x, bias=ones(6).long()),
        bad("one factor", "low_rank must be two tensors", x, TypeError, low_rank=(factors[0],)),
        bad("first factor", r"low_rank\[0\] must have shape \(r, 8\)", x, low_rank=(ones(2, 7), factors[1])),
        bad("second factor", r"low_rank\[1\] must have shape \(6, 2\)", x, low_rank=(factors[0], ones(6, 3))),
        bad("backend", "backend 'gpu' is unknown", x, ValueError, backend="gpu"),
    ]
