"""What the tests of dkm hold it against: autograd through the plain iterations, in float64 and in the dtype tested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import effkern
from effkern.reference.dkm import dkm as reference
from effkern.testing import assert_close_to_oracle

FIELDS = ("clustered", "centroids", "grad")


def results(
    function: Callable[..., Any],
    weight: Tensor,
    centroids: Tensor,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Output, centroids, and the gradient of the weight. What is sent back is exact in every dtype."""
    leaf = weight.detach().to(dtype or weight.dtype).requires_grad_()
    clustered, found = function(leaf, centroids.to(dtype) if dtype else centroids, **options)
    generator = torch.Generator().manual_seed(1)
    sent = torch.randint(-64, 65, weight.shape, generator=generator).to(clustered) / 32
    (grad,) = torch.autograd.grad(clustered, leaf, sent)
    return {"clustered": clustered.detach(), "centroids": found, "grad": grad}


def relative(actual: Tensor, exact: Tensor) -> float:
    """The error's norm by that of the exact result."""
    norm = exact.norm().item()
    return (actual.double() - exact).norm().item() / norm if norm > 0 else actual.double().norm().item()


def check(
    path: str, weight: Tensor, centroids: Tensor, backend: str | None = None, **options: Any
) -> dict[str, Tensor]:
    """Ours by the rule of effkern.testing: at most twice as far off as autograd in the same dtype, plus a floor."""
    ours = results(effkern.dkm, weight, centroids, backend=backend, **options)
    assert effkern.backends.last() == f"dkm_backward:{backend or 'cpu'}{path and f'/{path}'}"
    plain = results(reference, weight, centroids, **options)
    exact = results(reference, weight, centroids, torch.float64, **options)
    for name in FIELDS:
        # The gradient is a sum of terms that may cancel, each as large as what the output feels.
        unit = 16.0 if name == "grad" else 1.0
        assert_close_to_oracle(ours[name], plain[name].to(ours[name].dtype), exact[name], name, unit=unit)
    assert ours["clustered"].is_contiguous() and ours["clustered"].dtype == weight.dtype
    assert ours["clustered"].shape == weight.shape and ours["grad"].dtype == weight.dtype
    assert ours["centroids"].dtype == torch.float32 and ours["centroids"].shape == centroids.shape
    return ours
