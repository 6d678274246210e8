"""The general Triton kernels and the decode kernels under the interpreter, against the reference in float64.

The cases run in a process of their own (tests/interpreted.py), in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_oracle import Case, check, differentiate, make, with_lse
from interpreted import needs_interpreter, report, settle
from test_attention_options import MASKS, TERMS

import effkern
from effkern.reference import attention as reference
from effkern.reference.attention_decode import attention_decode as decode_reference
from effkern.testing import errors

# Tiles of the interpreter are 16 x 16.
SHAPE = Case(b=2, hq=2, hkv=1, sq=20, sk=37, d=16, dv=12)
PACKED = ((17, 18), (0, 5), (3, 20))


class Interpreted:
    device, unit = "cpu", "triton"

    @staticmethod
    def check(op: str, dtype: torch.dtype) -> None:
        assert effkern.backends.last() == f"{op}:triton"


def judge(case: Case) -> None:
    with effkern.backends.force("triton"):
        check(case, torch.float32, Interpreted)


def judge_dropout(case: Case) -> None:
    inputs, options = make(case, torch.float32, "cpu"), case.options("cpu")
    with effkern.backends.force("triton"):
        torch.manual_seed(4)
        ours = differentiate(with_lse, inputs, dropout_p=0.3, **options)
    torch.manual_seed(4)
    oracle = differentiate(reference.attention, inputs.double(), dropout_p=0.3, **options)
    for name, result in ours.items():
        assert errors(result, oracle[name], name).relative_l2 < 1e-5


def judge_decode(page: int | None, queries: int, mask: Any, terms: bool) -> None:
    lengths, capacity = torch.tensor([33, 0, 50], dtype=torch.int32), 50
    q = torch.randn(3, 6, queries, 16)
    table = None
    k, v = torch.randn(3, 2, capacity, 16), torch.randn(3, 2, capacity, 20)
    if page is not None:
        pages = -(-capacity // page)
        k, v = torch.randn(3 * pages, 2, page, 16), torch.randn(3 * pages, 2, page, 20)
        table = torch.randperm(3 * pages).reshape(3, pages).to(torch.int32)
    options: dict[str, Any] = {"softcap": 3.0, "sink_logits": torch.randn(6)} if terms else {}
    ours = effkern.attention_decode(
        q, k, v, lengths, page_table=table, mask=mask, return_lse=True, backend="triton", **options
    )
    assert effkern.backends.last() == "attention_decode:triton"
    exact = decode_reference(
        q.double(), k.double(), v.double(), lengths, page_table=table, mask=mask, **options
    )
    for name, result, expected in zip(("out", "lse"), ours, exact, strict=True):
        assert errors(result, expected, name).max_abs < 2e-5


def cases() -> dict[str, Callable[[], None]]:
    masks = effkern.masks
    found: dict[str, Callable[[], None]] = {}
    for index, (name, mask) in enumerate(MASKS.items()):
        case = replace(SHAPE, causal=index % 2 == 0, align="top_left" if index % 3 == 0 else "bottom_right")
        found[f"mask: {name}"] = lambda case=case, mask=mask: judge(replace(case, mask=mask(case)))
        packed = replace(SHAPE, lengths=PACKED, causal=index % 2 == 1)
        if index % 3 == 0:
            found[f"packed mask: {name}"] = lambda case=packed, mask=mask: judge(
                replace(case, mask=mask(case))
            )
    for index, (name, terms) in enumerate(TERMS.items()):
        found[f"terms: {name}"] = lambda terms=terms, index=index: judge(
            replace(SHAPE, causal=index % 2 == 0, **terms)
        )
        if index % 3 == 0:
            found[f"packed terms: {name}"] = lambda terms=terms: judge(
                replace(SHAPE, lengths=PACKED, causal=True, **terms)
            )
    bias = (False, True, False, True)
    found["dropout"] = lambda: judge_dropout(replace(SHAPE, causal=True, softcap=5.0, bias=bias))
    found["packed dropout"] = lambda: judge_dropout(replace(SHAPE, lengths=PACKED, bias=bias))
    for page in (None, 7, 16):
        for queries in (1, 3):
            for mask in (None, masks.SlidingWindow(5, 0), masks.Lambda(3, 10)):
                name = f"decode: pages of {page}, {queries} queries, {mask}"
                found[name] = lambda page=page, queries=queries, mask=mask: judge_decode(
                    page, queries, mask, queries == 3
                )
    found["decode: more rows than a tile"] = lambda: judge_decode(None, 40, None, False)
    return found


@needs_interpreter
@pytest.mark.parametrize("name", cases())
def test_interpreted(name: str, verdicts: dict[str, str]) -> None:
    settle(verdicts[name])


if __name__ == "__main__":
    report(cases())
