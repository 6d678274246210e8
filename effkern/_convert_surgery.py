"""What surgery on models needs whatever it puts in: filters, the layers and their places, who owns a parameter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # rich costs more to import than the rest of effkern
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

Filter = str | Sequence[str] | type[nn.Module] | Callable[[str, nn.Module], bool] | None


class Report:
    """A report that prints as a table: `rich.print(report)` or `print(report)`."""

    skipped: list[tuple[str, str]]  # (name, reason)

    def _table(self) -> Table:
        raise NotImplementedError

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        yield self._table()
        if self.skipped:
            left = Table("not replaced", "reason")
            for row in self.skipped:
                left.add_row(*row)
            yield left

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def predicate(op: str, filter: Filter) -> Callable[[str, nn.Module], bool]:
    """A filter as a function of name and module."""
    if filter is None:
        return lambda name, module: True
    if isinstance(filter, type):
        kind = filter
        return lambda name, module: isinstance(module, kind)
    if callable(filter):
        return filter
    patterns = (
        [filter] if isinstance(filter, str) else list(filter) if isinstance(filter, Sequence) else [None]
    )
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{op}: filter must be a pattern, several, a class, or a function of name and module")
    return lambda name, module: any(fnmatchcase(name, str(pattern)) for pattern in patterns)


def places(
    model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...]
) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """(parent, attribute, name, layer) of every place in which a layer of these kinds stands; of a parent with several
    names the first."""
    for prefix, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            if isinstance(child, kinds):
                yield parent, attribute, f"{prefix}.{attribute}" if prefix else attribute, child


@contextlib.contextmanager
def undone_on_error(found: Sequence[tuple[nn.Module, str, str, nn.Module]]) -> Iterator[None]:
    """Puts the layers of these places back where what is inside fails."""
    try:
        yield
    except BaseException:
        for parent, attribute, _, layer in found:
            setattr(parent, attribute, layer)
        raise


def memory(parameter: Tensor) -> int:
    """The same number for tensors that share memory."""
    return parameter.untyped_storage()._cdata


def has_hooks(module: nn.Module) -> bool:
    return any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    )


def weight_reason(layer: nn.Module, parent: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str | None:
    """Why the weight of a layer cannot be taken whatever replaces it, None when it can."""
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "its parent reads its weight"
    if type(layer) not in kinds:
        expected = " or ".join(f"nn.{kind.__name__}" for kind in kinds)
        return f"its class is {type(layer).__name__}, not {expected}"
    weight = layer._parameters.get("weight")
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed from other parameters"
    if has_hooks(layer):
        return "it has hooks"
    if not weight.is_floating_point() or not weight.isfinite().all():
        return "its weight is not finite" if weight.is_floating_point() else f"its weight is {weight.dtype}"
    return None


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """|W - approximation| / |W|, Frobenius."""
    weight, approximation = (t.detach().double() for t in (weight, approximation))
    norm = torch.linalg.norm(weight).item()
    return torch.linalg.norm(weight - approximation).item() / norm if norm else 0.0
