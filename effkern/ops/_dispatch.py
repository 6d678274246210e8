"""Registrations every family needs: Python kernels by dispatch key, autocast, flop formulas."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from effkern import _lib

_lib.load()

FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what kernels take; float64 is the reference's

# Keeps the Python registrations of all families alive.
LIBRARY = torch.library.Library("effkern", "IMPL")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require_dense(op: str, **named: Tensor | None) -> None:
    """Refuses sparse and other layouts, which PyTorch's own operations refuse in words that name no argument."""
    for name, tensor in named.items():
        if tensor is not None and tensor.layout != torch.strided:
            layout = str(tensor.layout).removeprefix("torch.")
            raise RuntimeError(f"{op}: {name} must be a dense strided tensor, got layout {layout}")


def refuse_all_but_fast(device: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    """Why a kernel for `FAST_DTYPES` cannot serve a request; of the form `registry.Backend` asks for."""
    if dtype in FAST_DTYPES:
        return None
    return f"it takes float32, bfloat16 and float16, not {dtype_name(dtype)}"


def refuse_all_but_floating(device: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    """The same for a reference, which takes every floating dtype."""
    return None if dtype.is_floating_point else f"it takes floating dtypes, not {dtype}"


def triton_refusal(module: str) -> Callable[[str, torch.dtype, Mapping[str, int]], str | None]:
    """The same for the Triton launchers of effkern._triton.`module`, which is imported at the first question."""

    def refusal(device: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        launcher = importlib.import_module(f"effkern._triton.{module}")
        return launcher.supports(torch.device(device), dtype, sizes)

    return refusal


def register_kernel(op: str, kernel: Callable[..., Any], *keys: str) -> None:
    for key in keys:
        LIBRARY.impl(op, kernel, key)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype a floating tensor has inside an op under the autocast mode of its device."""
    device = tensor.device.type
    if tensor.is_floating_point() and tensor.dtype != torch.float64 and _autocasts(tensor):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


# Meta tensors, for one, know no autocast. Asked here, because torch 2.11 cannot compile the question.
_AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla", "privateuseone")
    if torch.amp.is_autocast_available(device)
)


def _autocasts(tensor: Tensor) -> bool:
    device = tensor.device.type
    return device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Switches autocast off on the device of a tensor, where there is such a thing."""
    off = _autocasts(tensor)
    return torch.autocast(tensor.device.type, enabled=False) if off else contextlib.nullcontext()


def register_autocast(op: str, count: int | None = None) -> None:
    """Casts the first `count` arguments, or all, to the current autocast dtype where they are floating and not float64,
    as PyTorch's own matmul ops do.

    `torch.library.register_autocast` would fix the dtype once and for all.
    """
    overload = getattr(torch.ops.effkern, op).default

    def register(device: str) -> None:
        key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")
        excluded = torch._C.DispatchKeySet(key)

        def kernel(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            cast = [
                arg.to(dtype)
                if isinstance(arg, Tensor)
                and arg.is_floating_point()
                and arg.dtype not in (dtype, torch.float64)
                and arg.device.type == device
                else arg
                for arg in args[:count]
            ]
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return overload(*cast, *args[len(cast) :])

        LIBRARY.impl(op, kernel, f"Autocast{device.upper()}")

    for device in ("cpu", "cuda"):
        register(device)


def register_gradient(
    op: str,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """What `torch.library.register_autograd` does, without looking up every default in the schema at every call, which
    costs more than the call. `setup_context` gets the arguments as given: trailing defaults are missing, and `backward`
    returns as many gradients."""
    overload = getattr(torch.ops.effkern, op).default
    after = torch._C._after_autograd_keyset

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keys = args
        with torch._C._AutoDispatchBelowAutograd():
            output = overload.redispatch(keys & after, *inputs)
        setup_context(ctx, tuple(inputs), output)
        return output

    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *backward(ctx, *grads), None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    function: Any = type(f"Gradient_{op}", (torch.autograd.Function,), methods)

    def kernel(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args, keys)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keys & after, *args)

    LIBRARY.impl(op, kernel, "Autograd", with_keyset=True)


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Ops with a registered backward drop forward-mode tangents in silence: an error instead."""
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError(
            f"{op}: forward-mode derivatives are only available with backend='reference'"
        )


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Calls `action` once, right after `module` has been imported by whoever wants it, and is gone."""

    def __init__(self, module: str, action: Callable[[], None]) -> None:
        self.module, self.action = module, action
        self.loader: importlib.abc.Loader | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec) if self.loader else None

    def exec_module(self, module: ModuleType) -> None:
        assert self.loader is not None and module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.action()


_COUNTER = "torch.utils.flop_counter"
_formulas: dict[str, Callable[..., int]] = {}


def _register_flops() -> None:
    from torch.utils import flop_counter

    while _formulas:
        op, formula = _formulas.popitem()
        flop_counter.register_flop_formula(getattr(torch.ops.effkern, op), get_raw=True)(formula)


def register_flops(op: str, formula: Callable[..., int]) -> None:
    """Gives `formula`, which takes the op's arguments, to FlopCounterMode.

    Only once its module is imported: that import brings in triton, half a second nobody else should pay for.
    """
    _formulas[op] = formula
    if _COUNTER in sys.modules:
        _register_flops()
    elif not any(isinstance(finder, _AfterImport) and finder.module == _COUNTER for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(_COUNTER, _register_flops))
