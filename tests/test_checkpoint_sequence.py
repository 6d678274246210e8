"""checkpoint_sequence is the loop over the blocks, with less memory."""

from __future__ import annotations

import pytest
import torch
from reversible_nets import WIDTH, Branch, assert_same
from torch import Tensor, nn

from effkern import checkpoint_sequence


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = Branch()

    def forward(self, x: Tensor, condition: Tensor | None = None, *, scale: Tensor | None = None) -> Tensor:
        return x + self.branch(x, condition, scale=scale)


@pytest.mark.parametrize("overlap", ["auto", False, True])
@pytest.mark.parametrize("depth", [1, 2, 5, 12])
def test_gradients_are_those_of_the_loop(depth: int, overlap: bool | str) -> None:
    blocks = [Residual().double() for _ in range(depth)]
    x, condition, scale = (torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(3))
    leaves = [x, condition, scale, *(p for block in blocks for p in block.parameters())]
    y = checkpoint_sequence(blocks, x, condition, scale=scale, overlap=overlap)
    found = torch.autograd.grad(y.square().sum(), leaves)
    expected_y = x
    for block in blocks:
        expected_y = block(expected_y, condition, scale=scale)
    assert torch.equal(y, expected_y)
    assert_same(found, torch.autograd.grad(expected_y.square().sum(), leaves), 1e-14)


def test_tokens_in_and_shapes_that_change() -> None:
    blocks = nn.Sequential(nn.Embedding(7, WIDTH), Residual(), nn.Flatten(), nn.Linear(3 * WIDTH, 2)).double()
    tokens = torch.randint(7, (4, 3))
    found = torch.autograd.grad(checkpoint_sequence(blocks, tokens).square().sum(), list(blocks.parameters()))
    expected = torch.autograd.grad(blocks(tokens).square().sum(), list(blocks.parameters()))
    assert_same(found, expected, 1e-14)


def test_only_the_inputs_of_blocks_are_saved() -> None:
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    blocks = [Residual() for _ in range(6)]
    x = torch.randn(3, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = checkpoint_sequence(blocks, x)
    assert len(saved) == 6
    y.sum().backward()


def test_edges_and_errors() -> None:
    x = torch.randn(3, WIDTH)
    assert checkpoint_sequence([], x) is x
    with torch.no_grad():
        assert checkpoint_sequence([Residual()], x).grad_fn is None
    for call, error, message in (
        (
            lambda: checkpoint_sequence([torch.sin], x),
            TypeError,
            "block 0 must be a torch.nn.Module, got builtin",
        ),
        (lambda: checkpoint_sequence([nn.Identity()], [1]), TypeError, "x must be a tensor, got list"),
        (lambda: checkpoint_sequence([Residual()], x, overlap=2), ValueError, "overlap must be .* got 2"),
        (
            lambda: checkpoint_sequence([nn.Identity(), nn.LSTM(8, 8)], x),
            TypeError,
            "block 1: forward must return a t",
        ),
    ):
        with pytest.raises(error, match=message):
            call()

    blocks = [Residual(), Residual()]
    y = checkpoint_sequence(blocks, x)
    with torch.no_grad():
        blocks[0].branch.up.bias.add_(1)
    with pytest.raises(RuntimeError, match=r"block 0: parameter branch\.up\.bias was modified in place"):
        y.sum().backward()
