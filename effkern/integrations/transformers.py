"""effkern as an attention implementation of Hugging Face transformers.

    effkern.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="effkern")

Tested with transformers 5.23.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effkern.integrations._transformers_mask import Visible, build_mask
from effkern.masks import Dense, Mask
from effkern.ops.attention import attention
from effkern.ops.attention_decode import attention_decode

__all__ = ["attention_forward", "build_mask", "register"]

DECODE_QUERIES = 8  # up to so many new tokens the keys are split over the threads instead of the queries


def register(name: str = "effkern") -> None:
    """Makes `attn_implementation=name` known to transformers: the attention function and the function of its masks.

    Models that call transformers' attention interface, which nearly all do, run on effkern when asked to; nothing else
    changes. Calling it again is harmless.

    What the masks of transformers say goes to the kernels as data: causal order, sliding windows and packed sequences
    skip the tiles they hide, padding hides keys; any other mask function becomes a boolean table, exactly. The number
    of query heads, of key heads, their head dims (1 to 256 on kernels, more through the reference), the cache, softcap,
    sinks (`s_aux`), a position bias and dropout are passed on. `docs/integrations.md` has the table.

    Args:
        name: what to call it there.

    Raises:
        ImportError: transformers is not installed, or has no attention interface.
        RuntimeError: its mask interface is not the one of 5.23.
    """
    import inspect

    try:
        from transformers import AttentionInterface, AttentionMaskInterface, __version__
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        hint = "pip install 'effkern[integrations]'"
        raise ImportError(
            f"transformers.register: expected transformers 5.23 or newer ({hint}): {error}"
        ) from error
    missing = {"q_length", "q_offset", "kv_offset", "use_vmap"} - set(inspect.signature(sdpa_mask).parameters)
    if missing:
        raise RuntimeError(f"transformers.register: expected transformers 5.23 or newer, got {__version__}")
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, build_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visible | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that `register` gives to transformers.

    Args:
        module: the attention layer; asked for `is_causal` where neither a mask nor an argument says.
        query: (B, Hq, Sq, D).
        key: (B, Hkv, Sk, D), never repeated.
        value: (B, Hkv, Sk, Dv).
        attention_mask: what `build_mask` made; or a tensor that broadcasts to (B, Hq, Sq, Sk), bool (True is visible)
            or additive; or None: causal as transformers' "sdpa" has it, from the upper left and for Sq > 1 only.
        dropout: probability that a weight is dropped; layers pass 0 in evaluation.
        scaling: None is D ** -0.5.
        is_causal: what holds without a mask; None asks the layer.
        position_bias: added to the scores, with a gradient.
        softcap: bound of the scores.
        s_aux: (Hq,), one more logit a head in the denominator, with a gradient.
        kwargs: what else layers pass on and attention does not depend on, as the mask already contains it: a
            `sliding_window`, positions.

    Returns:
        (out, None), out (B, Sq, Hq, Dv).

    Raises:
        NotImplementedError: `output_attentions`, `head_mask`, or a paged `cache` of continuous batching is asked for.
        TypeError: attention_mask is none of the above.
        ValueError: it was made for other numbers of queries and keys.
    """
    for name in ("output_attentions", "head_mask", "cache"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise NotImplementedError(f"attn_implementation='effkern': {name} is not supported; use 'eager'")
    queries, keys = query.shape[2], key.shape[2]
    if query.shape[0] == 1:  # learned queries, the same for all
        query = query.expand(key.shape[0], -1, -1, -1)
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sink_logits": s_aux}
    bias, mask, causal, align = position_bias, None, False, "bottom_right"
    if isinstance(attention_mask, Visible):
        attention_mask.require_sizes(queries, keys)
        if _decodes(attention_mask, queries, keys, bias, dropout, query, key, value, s_aux):
            lengths = torch.full((key.shape[0],), keys, dtype=torch.int32, device=key.device)
            found = attention_decode(query, key, value, lengths, mask=attention_mask.window, **options)
            assert isinstance(found, Tensor)
            return found.transpose(1, 2).contiguous(), None
        mask, causal = attention_mask.mask(), attention_mask.causal
    elif attention_mask is None:
        causal = queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        align = "top_left"
    else:
        mask, bias = _table(attention_mask, bias, query)
    out = attention(
        *(query, key, value),
        causal=bool(causal),
        align=align,
        mask=mask,
        bias=bias,
        dropout_p=dropout,
        **options,
    )
    return out.transpose(1, 2).contiguous(), None


def _decodes(
    visible: Visible,
    queries: int,
    keys: int,
    bias: Tensor | None,
    dropout: float,
    *tensors: Tensor | None,
) -> bool:
    """Whether a call is a decoding step that `attention_decode` can do."""
    if (
        queries > min(DECODE_QUERIES, keys)
        or bias is not None
        or dropout != 0.0
        or visible.others is not None
    ):
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return False
    return visible.causal


def _table(table: Any, bias: Tensor | None, query: Tensor) -> tuple[Mask | None, Tensor | None]:
    """A mask made by the model or by its user, and the sum of the biases."""
    if not isinstance(table, Tensor) or table.dim() != 4:
        got = f"shape {tuple(table.shape)}" if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(
            "attn_implementation='effkern': attention_mask must be None, made by build_mask, or a tensor of four "
            f"dimensions, got {got}"
        )
    if table.dtype == torch.bool:
        return Dense(table), bias
    if not table.is_floating_point():
        raise TypeError(
            f"attn_implementation='effkern': attention_mask must be bool or additive, got {table.dtype}"
        )
    if table.dtype != query.dtype:  # never rounded to 16 bits: large numbers would lose what tells keys apart
        table = table.to(torch.promote_types(query.dtype, torch.float32))
    return None, table if bias is None else table + bias
