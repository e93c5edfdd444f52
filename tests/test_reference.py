"""The specification checked by itself: gradients by finite differences, known answers, agreement with torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from triton_st import backend, ops, reference


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


MASK = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]])
CU_SEQLENS = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
CASES = {
    "masked_mean_pool": ((rows(3, 3, 4), MASK), ops.masked_mean_pool, reference.masked_mean_pool),
    "packed_mean_pool": ((rows(5, 4), CU_SEQLENS), ops.packed_mean_pool, reference.packed_mean_pool),
    "cosine_similarity": ((rows(3, 4), rows(5, 4, seed=1)), ops.cosine_similarity, reference.cosine_similarity),
    "mnrl_loss": ((rows(3, 4), rows(6, 4, seed=1), 7.0), ops.mnrl_loss, reference.mnrl_loss),
}


@pytest.mark.parametrize("name", CASES)
def test_written_out_gradients_are_autograd_s_and_finite_differences_(name: str) -> None:
    inputs, op, plain = CASES[name]
    with backend.use("reference"):
        assert gradcheck(op, inputs)
        assert gradcheck(plain, inputs)
        torch.testing.assert_close(op(*inputs), plain(*inputs), rtol=0, atol=1e-15)


def test_normalize_is_torch_s_but_for_zero_rows() -> None:
    x = torch.randn(6, 5, dtype=torch.float64)
    x[1] *= 1e-14  # below EPS: divided by EPS, not by its norm
    torch.testing.assert_close(reference.normalize(x), F.normalize(x))
    x[2] = 0
    x.requires_grad_()
    unit = reference.normalize(x)
    (gradient,) = torch.autograd.grad(unit.sum(), x)
    assert not unit[2].any()
    assert not gradient[2].any()
    assert gradient[1].any()


@pytest.mark.parametrize("size", [1e-30, 1e30, 3e38])
def test_normalize_neither_overflows_nor_vanishes(size: float) -> None:
    x = torch.full((1, 64), size, dtype=torch.float32)
    expected = size / max(size * 8, 1e-12)
    torch.testing.assert_close(reference.normalize(x), torch.full((1, 64), expected), rtol=1e-6, atol=0)


def test_nan_in_is_nan_out() -> None:
    x = torch.randn(3, 4)
    x[1, 2] = float("nan")
    assert torch.equal(reference.normalize(x).isnan().any(1), torch.tensor([False, True, False]))
    assert reference.mnrl_loss(x, x).isnan()


def test_mnrl_is_cross_entropy_of_scaled_cosines() -> None:
    queries, documents = rows(4, 6), rows(12, 6, seed=1)
    logits = 20 * F.normalize(queries) @ F.normalize(documents).T
    torch.testing.assert_close(reference.mnrl_loss(queries, documents), F.cross_entropy(logits, torch.arange(4)))
