"""What every operator of the encoder is put to, beside the tolerance rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from serving import threads
from tolerance import value_and_gradients
from torch import Tensor

SEED = 0x1234_5678_9ABC_DEF


def seed(device: torch.device | str = "cpu") -> Tensor:
    """A seed both of whose halves matter."""
    return torch.tensor(SEED, device=device)


def cu_seqlens(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Random numbers that depend on the shape alone."""
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def _results(function: Callable[..., Tensor], inputs: Sequence[object]) -> list[Tensor]:
    value, gradients = value_and_gradients(function, inputs)
    return [value, *gradients]


def assert_repeatable(function: Callable[..., Tensor], inputs: Sequence[object]) -> None:
    """The same bits on every run and on any number of threads."""
    first = _results(function, inputs)
    for count in (1, 2, 3, 2):
        with threads(count):
            assert all(torch.equal(a, b) for a, b in zip(first, _results(function, inputs), strict=True))


def assert_compiles(function: Callable[..., Tensor], inputs: Sequence[object]) -> None:
    """Traced whole, with the same value and gradients."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(_results(function, inputs), _results(compiled, inputs), strict=True):
        torch.testing.assert_close(traced, eager)


def assert_strides_do_not_matter(function: Callable[..., Tensor], inputs: Sequence[object]) -> None:
    """Transposed and expanded storage of the first input gives what a dense copy gives, and so do such gradients."""
    first, *others = inputs
    assert isinstance(first, Tensor)
    expected = _results(function, inputs)
    scattered = torch.empty(*first.shape[:-1], 2 * first.shape[-1], dtype=first.dtype)[..., ::2].copy_(first)
    swapped = first.transpose(0, -1).contiguous().transpose(0, -1)
    for view in (scattered, swapped):
        leaf = view.requires_grad_()
        result = function(leaf, *others)
        assert torch.equal(result, expected[0])
        (grad,) = torch.autograd.grad(result, leaf, torch.ones((), dtype=result.dtype).expand_as(result))
        assert torch.equal(grad, expected[1])
