"""Kernels from efficient-ML papers as drop-in PyTorch ops.

    import effkern
    out = effkern.attention(q, k, v, causal=True)

`effkern.masks` has the attention masks, `effkern.nn` the modules, `effkern.convert` changes whole models,
`effkern.reversible` draws what their backward passes do when, `effkern.backends` says which backend runs and forces
one, `effkern.testing` has the error measures, and `effkern.reference` the plain PyTorch versions.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from effkern import _lib

_lib.load()

from effkern import backends, masks, ops, reference  # noqa: E402
from effkern.ops import registry  # noqa: E402
from effkern.ops.attention import attention  # noqa: E402
from effkern.ops.attention_decode import attention_decode  # noqa: E402
from effkern.ops.attention_merge import attention_merge, lambda_attention  # noqa: E402
from effkern.ops.butterfly_conv import butterfly_conv, butterfly_factors  # noqa: E402
from effkern.ops.companion_kernel import companion_kernel  # noqa: E402
from effkern.ops.conv_accumulate import conv_accumulate  # noqa: E402
from effkern.ops.coupling import coupling  # noqa: E402
from effkern.ops.dkm import dkm  # noqa: E402
from effkern.ops.kmeans_init import kmeans_init  # noqa: E402
from effkern.ops.long_conv import long_conv, long_conv_prepare  # noqa: E402
from effkern.ops.long_conv_kernels import smooth_kernel, vandermonde_kernel  # noqa: E402
from effkern.ops.monarch import block_diag_matmul, monarch_matmul  # noqa: E402
from effkern.ops.monarch_factors import monarch_chain, monarch_dense, monarch_project  # noqa: E402
from effkern.ops.palettize import Palette, palettize  # noqa: E402
from effkern.ops.palettized_linear import eora_factors, palettized_linear  # noqa: E402
from effkern.ops.short_conv import short_conv  # noqa: E402

if TYPE_CHECKING:
    from effkern import convert, nn, reversible, testing
    from effkern.nn.checkpoint import checkpoint_sequence

registry.discover()

try:
    __version__ = version("effkern")
except PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0+source"

__all__ = [
    "Palette",
    "__version__",
    "attention",
    "attention_decode",
    "attention_merge",
    "backends",
    "block_diag_matmul",
    "butterfly_conv",
    "butterfly_factors",
    "checkpoint_sequence",
    "companion_kernel",
    "conv_accumulate",
    "convert",
    "coupling",
    "dkm",
    "eora_factors",
    "kmeans_init",
    "lambda_attention",
    "long_conv",
    "long_conv_prepare",
    "masks",
    "monarch_chain",
    "monarch_dense",
    "monarch_matmul",
    "monarch_project",
    "nn",
    "ops",
    "palettize",
    "palettized_linear",
    "reference",
    "reversible",
    "short_conv",
    "smooth_kernel",
    "testing",
    "vandermonde_kernel",
]

# Modules are imported when they are asked for: whoever wants an op does not wait for them.
_LATER = {
    "checkpoint_sequence": "effkern.nn.checkpoint",
    "convert": "effkern.convert",
    "nn": "effkern.nn",
    "reversible": "effkern.reversible",
    "testing": "effkern.testing",
}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f"module 'effkern' has no attribute '{name}'")
        module = import_module(_LATER[name])
        found = globals()[name] = module if _LATER[name] == f"effkern.{name}" else getattr(module, name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LATER})
