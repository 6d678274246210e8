"""What reversible stacks refuse, and what their messages say."""

from __future__ import annotations

import pytest
import torch
from reversible_nets import WIDTH, Plain, blocks
from torch import Tensor, nn

from effkern.nn import ReversibleBlock, ReversibleSequence


class _Wrong(nn.Module):
    def __init__(self, out: object) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor) -> object:
        return self.out


X = torch.randn(3, WIDTH)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ReversibleSequence([]), ValueError, "blocks must not be empty"),
        (lambda: ReversibleSequence([nn.Identity()]), TypeError, "block 0 must be a ReversibleBlock.*got Identity"),
        (lambda: ReversibleBlock(torch.sin, Plain()), TypeError, "f must be a torch.nn.Module, got builtin"),
        (lambda: ReversibleSequence(blocks(1), overlap="yes"), ValueError, "overlap must be 'auto'.*got 'yes'"),
        (lambda: ReversibleSequence(blocks(1), exact=24), ValueError, "exact must be .* got 24"),
        (lambda: ReversibleSequence(blocks(1), exact=True), ValueError, "exact must be .* got True"),
        (lambda: ReversibleSequence(blocks(2), anchors=[2]), ValueError, r"from 0 to 1, got \[2\]"),
        (lambda: ReversibleSequence(blocks(2), anchors="all"), ValueError, "anchors must be .*got 'all'"),
        (lambda: ReversibleSequence(blocks(2), error_budget=0), ValueError, "error_budget must be positive, got 0"),
        (lambda: ReversibleSequence(blocks(2))(X, X[:1]), RuntimeError, r"one shape.*\(3, 8\).*\(1, 8\)"),
        (lambda: ReversibleSequence(blocks(2))(X.long()), RuntimeError, "x1 must be of a floating dtype, got"),
        (lambda: ReversibleSequence(blocks(2))([1.0]), TypeError, "x1 must be a tensor, got list"),
        (lambda: ReversibleSequence(blocks(2))(X, X, mask=X), TypeError, "no sub-block takes an argument named 'mask'"),
        (lambda: blocks(1)[0](X, X, mask=X), TypeError, "ReversibleBlock: no sub-block takes an argument named 'mask'"),
        (lambda: ReversibleSequence(blocks(2))(X, X, X, X), TypeError, "no sub-block takes 2 extra positional"),
        (lambda: ReversibleSequence(blocks(2))(X, X, X, condition=X), TypeError, "'condition' is given by position"),
        (
            lambda: ReversibleSequence([*blocks(1), ReversibleBlock(Plain(), _Wrong(X[:1]))])(X),
            RuntimeError,
            r"ReversibleSequence: block 1: g must return the shape of its input, \(3, 8\), got \(1, 8\)",
        ),
        (lambda: ReversibleBlock(_Wrong((X,)), Plain())(X, X), TypeError, "f must return a tensor, got tuple"),
    ],
)  # fmt: skip
def test_errors(call, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()


def test_changes_between_forward_and_backward_are_errors() -> None:
    net = ReversibleSequence(blocks(2))
    loss = sum(y.sum() for y in net(X))
    with torch.no_grad():
        net.blocks[1].g.branch.up.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"block 1: parameter g\.branch\.up\.weight was modified in place"):
        loss.backward()

    y1, y2 = net(X)
    loss = (y1 + y2).sum()
    with torch.no_grad():
        y1.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_hook_that_changes_a_block_s_output_is_an_error() -> None:
    net = ReversibleSequence(blocks(3))
    handle = net.blocks[1].register_forward_hook(lambda module, args, out: (out[0] * 2, out[1]))
    with pytest.raises(RuntimeError, match="output of block 1 was changed before block 2 got it"):
        net(X)
    handle.remove()
    seen: list[tuple[Tensor, ...]] = []
    net.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
    net(X)
    assert len(seen) == 1
    with pytest.raises(
        RuntimeError, match="block 1: a gradient came to this block's output but not to the output of"
    ):
        seen[0][0].sum().backward()
