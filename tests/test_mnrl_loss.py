"""mnrl_loss on every backend: the tolerance rule at any scale and loss level, extreme rows, repeatability."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import DTYPES, every_backend, every_dtype, interpreted, serving, threads
from tolerance import assert_matches_reference
from torch import Tensor

from triton_st import backend, ops, reference

SHAPES = [(1, 3, 50), (2, 1, 7), (13, 3, 1), (128, 2, 50), (33, 2, 312), (300, 3, 384), (17, 60, 64), (31, 2, 1024)]
"""(queries, documents per query, width)"""
SMALL_SHAPES = [(1, 3, 50), (13, 3, 1), (17, 2, 50), (5, 1, 384)]


def shapes(name: str, device: torch.device) -> list[tuple[int, int, int]]:
    return SMALL_SHAPES if interpreted(name, device) else SHAPES


def embeddings(
    batch: int, columns: int, dim: int, dtype: torch.dtype, device: torch.device, noise: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Queries [B, D] and documents [columns · B, D]: positives are queries plus noise, the rest are random."""
    generator = torch.Generator().manual_seed(100 * batch + dim)
    queries = torch.randn(batch, dim, generator=generator)
    documents = torch.randn(batch * columns, dim, generator=generator)
    documents[:batch] = queries + noise * documents[:batch]
    return queries.to(dtype).to(device), documents.to(dtype).to(device)


def assert_right(queries: Tensor, documents: Tensor, scale: float = 20.0) -> None:
    """The tolerance rule; the loss is a difference of logits, whose magnitude is `scale`."""
    inputs = (queries, documents, scale)
    assert_matches_reference(ops.mnrl_loss, reference.mnrl_loss, inputs, magnitude=scale)


def value_and_gradients(
    queries: Tensor, documents: Tensor, scale: float, grad: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    queries, documents = queries.clone().requires_grad_(), documents.clone().requires_grad_()
    loss = ops.mnrl_loss(queries, documents, scale)
    gradients = torch.autograd.grad(loss, (queries, documents), torch.tensor(grad, device=loss.device))
    return (loss.detach(), *gradients)


@every_dtype
@every_backend
def test_obeys_the_tolerance_rule(name: str, dtype: torch.dtype, device: torch.device) -> None:
    with serving(name, "mnrl_rows", dtype, device):
        for batch, columns, dim in shapes(name, device):
            assert_right(*embeddings(batch, columns, dim, dtype, device))


@every_dtype
@every_backend
@pytest.mark.parametrize("scale", [0.01, 20.0, 125.0, 1_000.0, 10_000.0])
def test_any_scale(name: str, scale: float, dtype: torch.dtype, device: torch.device) -> None:
    """A fixed maximum, 1 / temperature, would overflow at the larger ones."""
    with serving(name, "mnrl_rows", dtype, device):
        assert_right(*embeddings(12, 3, 50, dtype, device, noise=3.0), scale)
        # Here p of the positive is 1 to more digits than float64 has, and only finiteness can be asked for.
        results = value_and_gradients(*embeddings(12, 3, 50, dtype, device, noise=0.1), scale)
        assert all(x.isfinite().all() for x in results)


@every_dtype
@every_backend
@pytest.mark.parametrize("grad", [1.0, 2.0**16])
def test_gradients_of_a_small_loss(name: str, grad: float, dtype: torch.dtype, device: torch.device) -> None:
    """Where p of the positive is nearly 1, a gradient formed from p cast to half is all rounding."""
    queries, documents = embeddings(24, 2, 50, dtype, device, noise=0.6)
    scale = 20.0
    wide = [x.double().requires_grad_() for x in (queries, documents)]
    exact = torch.autograd.grad(grad * reference.mnrl_loss(*wide, scale), wide)
    with serving(name, "mnrl_rows", dtype, device):
        loss, *gradients = value_and_gradients(queries, documents, scale, grad)
    assert 1e-5 < loss.item() < 1e-3
    for actual, expected in zip(gradients, exact, strict=True):
        error = (actual.double() - expected).norm() / expected.norm()
        stored = (expected.to(dtype).double() - expected).norm() / expected.norm()  # no method can avoid this
        # Nor the rounding of logits. Whoever forms 1 − p of the positive has that in relation to the loss besides.
        logits = 4 * scale * torch.finfo(torch.float32).eps
        assert error <= 2 * stored + (logits if name == "cpp" else logits / loss.item()) + 2 * torch.finfo(dtype).eps


@every_dtype
@every_backend
def test_batch_of_one_document_has_no_loss(name: str, dtype: torch.dtype, device: torch.device) -> None:
    queries, documents = embeddings(1, 1, 50, dtype, device)
    with serving(name, "mnrl_rows", dtype, device):
        loss, *gradients = value_and_gradients(queries, documents, 20.0)
    assert loss == 0
    assert not any(x.abs().max() > 1e-6 for x in gradients)


@every_backend
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e30),
        (torch.float32, 3e37),
        (torch.float32, 1e-12),
        (torch.float32, 1e-30),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 1e-20),
        (torch.float16, 1.5e4),
        (torch.float16, 1e-5),
    ],
)
def test_huge_and_tiny_rows(name: str, dtype: torch.dtype, size: float, device: torch.device) -> None:
    queries, documents = embeddings(8, 2, 50, torch.float32, device)
    with serving(name, "mnrl_rows", dtype, device):
        for q, d in ((queries * size, documents), (queries, documents * size), (queries * size, documents * size)):
            assert_right(q.to(dtype), d.to(dtype))


@every_dtype
@every_backend
def test_zero_rows_are_finite_and_have_gradient_zero(name: str, dtype: torch.dtype, device: torch.device) -> None:
    queries, documents = embeddings(7, 2, 50, dtype, device)
    queries[2], documents[3], documents[9] = 0, 0, 0
    with serving(name, "mnrl_rows", dtype, device):
        loss, grad_q, grad_d = value_and_gradients(queries, documents, 20.0)
        assert_right(queries, documents)
        everything_zero = value_and_gradients(queries * 0, documents * 0, 20.0)
    assert loss.isfinite()
    assert not grad_q[2].any()
    assert not grad_d[[3, 9]].any()
    assert grad_q[3].any()
    assert everything_zero[0].item() == pytest.approx(math.log(14), rel=1e-6)
    assert not everything_zero[1].any()
    assert not everything_zero[2].any()


@every_dtype
@every_backend
def test_constant_embeddings(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """A model that maps every text to one vector: the loss is log M, its gradient is finite."""
    row = embeddings(1, 1, 50, dtype, device)[0]
    with serving(name, "mnrl_rows", dtype, device):
        loss, *gradients = value_and_gradients(row.expand(6, -1), row.expand(18, -1), 20.0)
    assert loss.item() == pytest.approx(math.log(18), rel=1e-5)
    assert all(x.isfinite().all() and x.abs().max() < 0.05 for x in gradients)


@every_dtype
@every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_is_nan_out(name: str, bad: float, dtype: torch.dtype, device: torch.device) -> None:
    queries, documents = embeddings(5, 2, 50, dtype, device)
    with serving(name, "mnrl_rows", dtype, device):
        for tensor in (queries, documents):
            kept = tensor[3, 49].item()
            tensor[3, 49] = bad
            loss, grad_q, grad_d = value_and_gradients(queries, documents, 20.0)
            assert loss.isnan()
            assert grad_q[3].isnan().any()
            assert grad_d.isnan().any(1).all()
            tensor[3, 49] = kept


@every_backend
def test_strided_inputs(name: str, device: torch.device) -> None:
    queries, documents = embeddings(8, 2, 66, torch.float32, device)
    with serving(name, "mnrl_rows", device=device):
        for q, d in (
            (queries[:, 3:36], documents[:, 3:36]),
            (queries[:, ::2], documents[:, ::2]),
            (queries.T.contiguous().T, documents),
        ):
            assert_right(q, d)


def test_a_batch_larger_than_one_tile() -> None:
    """More documents than a tile has columns, and more queries than a tile then has rows."""
    queries, documents = embeddings(700, 13, 24, torch.float32, torch.device("cpu"))
    with backend.use("cpp"):
        assert_right(queries, documents)


@every_dtype
def test_results_do_not_depend_on_threads_or_runs(dtype: torch.dtype) -> None:
    for batch, columns, dim in [(700, 13, 24), (128, 2, 50), (100, 3, 384)]:
        inputs = embeddings(batch, columns, dim, dtype, torch.device("cpu"))
        results = []
        with serving("cpp", "mnrl_rows"):
            for count in (1, 2, 3, 2):
                with threads(count):
                    results.append(value_and_gradients(*inputs, 20.0))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 90),
    columns=st.integers(1, 4),
    dim=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 7.0]),  # a larger one may take p nearer to 1 than float64 can say
)
@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_any_shape(name: str, batch: int, columns: int, dim: int, dtype: torch.dtype, scale: float) -> None:
    with serving(name, "mnrl_rows"):
        assert_right(*embeddings(batch, columns, dim, dtype, torch.device("cpu")), scale)


@every_backend
def test_is_cross_entropy_of_scaled_cosines(name: str, device: torch.device) -> None:
    queries, documents = embeddings(9, 3, 20, torch.float32, device)
    expected = F.cross_entropy(20 * F.normalize(queries) @ F.normalize(documents).T, torch.arange(9, device=device))
    with serving(name, "mnrl_rows", device=device):
        torch.testing.assert_close(ops.mnrl_loss(queries, documents), expected)


@pytest.mark.parametrize(
    ("queries", "documents", "scale", "error", "message"),
    [
        (torch.zeros(4), torch.zeros(2, 4), 20.0, ValueError, r"queries must be \[B, D\], got shape \[4\]"),
        (torch.zeros(2, 4), torch.zeros(4), 20.0, ValueError, r"documents must be \[M, D\], got shape \[4\]"),
        (torch.zeros(2, 4), torch.zeros(2, 5), 20.0, ValueError, "rows of one length D, got 4 and 5"),
        (torch.zeros(0, 4), torch.zeros(2, 4), 20.0, ValueError, "queries must have at least one row"),
        (torch.zeros(2, 4), torch.zeros(3, 4), 20.0, ValueError, "documents must have a multiple of 2 rows.*got 3"),
        (torch.zeros(2, 4), torch.zeros(0, 4), 20.0, ValueError, "documents must have a multiple of 2 rows.*got 0"),
        (torch.zeros(2, 4), torch.zeros(2, 4), 0.0, ValueError, "scale must be a finite number > 0, got 0.0"),
        (torch.zeros(2, 4), torch.zeros(2, 4), -1.0, ValueError, "scale must be a finite number > 0"),
        (torch.zeros(2, 4), torch.zeros(2, 4), float("nan"), ValueError, "scale must be a finite number > 0"),
        (torch.zeros(2, 4), torch.zeros(2, 4).half(), 20.0, TypeError, "documents must have queries's dtype"),
        (torch.zeros(2, 4).int(), torch.zeros(2, 4).int(), 20.0, TypeError, "queries must be a floating-point tensor"),
        (
            torch.zeros(2, 4),
            torch.zeros(2, 4, device="meta"),
            20.0,
            ValueError,
            "documents must be on queries's device",
        ),
    ],
)
def test_bad_input(queries: Tensor, documents: Tensor, scale: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.mnrl_loss(queries, documents, scale)
