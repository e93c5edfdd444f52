"""cosine_similarity on every backend: the tolerance rule, ragged and extreme input, repeatability, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import DTYPES, every_backend, every_dtype, interpreted, serving, threads
from tolerance import assert_matches_reference
from torch import Tensor

from triton_st import backend, ops, reference

SHAPES = [
    (1, 1, 50),
    (1, 300, 384),
    (300, 1, 7),
    (13, 29, 1),
    (64, 128, 50),
    (33, 65, 312),
    (200, 600, 384),
    (31, 17, 1024),
    (300, 400, 1024),
    (50, 60, 4096),
    (1000, 270, 50),
    (5, 20000, 16),
]
SMALL_SHAPES = [(1, 1, 50), (13, 29, 1), (33, 65, 50), (5, 7, 384)]


def shapes(name: str, device: torch.device) -> list[tuple[int, int, int]]:
    return SMALL_SHAPES if interpreted(name, device) else SHAPES


def rows(count: int, dim: int, dtype: torch.dtype, device: torch.device, seed: int = 0, size: float = 1.0) -> Tensor:
    """Rows around (1, …, 1): where a lone cosine cancels to nothing, the rule would compare rounding with luck."""
    generator = torch.Generator().manual_seed(1000 * count + 10 * dim + seed)
    return ((1 + torch.randn(count, dim, generator=generator)) * size).to(dtype).to(device)


def value_and_gradients(a: Tensor, b: Tensor, grad: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    result = ops.cosine_similarity(a, b)
    return (result.detach(), *torch.autograd.grad(result, (a, b), torch.ones_like(result) if grad is None else grad))


@every_dtype
@every_backend
def test_obeys_the_tolerance_rule(name: str, dtype: torch.dtype, device: torch.device) -> None:
    with serving(name, "cosine_similarity", dtype, device):
        for m, n, d in shapes(name, device):
            inputs = rows(m, d, dtype, device), rows(n, d, dtype, device, seed=1)
            assert_matches_reference(ops.cosine_similarity, reference.cosine_similarity, inputs, seed=d)


@every_dtype
@every_backend
@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_rows_of_one_direction(name: str, spread: float, dtype: torch.dtype, device: torch.device) -> None:
    """Embeddings of a collapsed model: gradients are small differences of large sums."""
    with serving(name, "cosine_similarity", dtype, device):
        centre = rows(1, 64, torch.float32, device)
        a = (centre + spread * rows(20, 64, torch.float32, device)).to(dtype)
        b = (centre + spread * rows(48, 64, torch.float32, device, seed=1)).to(dtype)
        assert_matches_reference(ops.cosine_similarity, reference.cosine_similarity, (a, b))


@every_backend
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e30),
        (torch.float32, 3e37),
        (torch.float32, 1e-10),
        (torch.float32, 1e-13),
        (torch.float32, 1e-30),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 1e-30),
        (torch.float16, 1e4),
        (torch.float16, 1e-6),
    ],
)
def test_huge_and_tiny_rows(name: str, dtype: torch.dtype, size: float, device: torch.device) -> None:
    with serving(name, "cosine_similarity", dtype, device):
        a, b = rows(6, 50, dtype, device, size=size), rows(9, 50, dtype, device, seed=1)
        assert_matches_reference(ops.cosine_similarity, reference.cosine_similarity, (a, b))
        assert_matches_reference(ops.cosine_similarity, reference.cosine_similarity, (b, a))
        mixed = torch.cat([a, b, torch.zeros_like(a)])
        assert_matches_reference(ops.cosine_similarity, reference.cosine_similarity, (mixed, mixed[2:12]))


@every_dtype
@every_backend
def test_largest_finite_rows(name: str, dtype: torch.dtype, device: torch.device) -> None:
    largest = min(torch.finfo(dtype).max, 3e38)
    a = torch.tensor([[largest] * 8, [largest, -largest] * 4, [6e4, 1.0] + [0.0] * 6], device=device).to(dtype)
    with serving(name, "cosine_similarity", dtype, device):
        result = ops.cosine_similarity(a, a)
    expected = torch.tensor([[1, 0, 0.3535592], [0, 1, 0.3535475], [0.3535592, 0.3535475, 1]], device=device)
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@every_dtype
@every_backend
def test_zero_rows_have_similarity_and_gradient_zero(name: str, dtype: torch.dtype, device: torch.device) -> None:
    a, b = rows(5, 50, dtype, device), rows(7, 50, dtype, device, seed=1)
    a[2], b[3] = 0, 0
    with serving(name, "cosine_similarity", dtype, device):
        result, grad_a, grad_b = value_and_gradients(a, b)
        assert_matches_reference(ops.cosine_similarity, reference.cosine_similarity, (a, b))
    assert not result[2].any()
    assert not result[:, 3].any()
    assert not grad_a[2].any()
    assert not grad_b[3].any()
    assert grad_a[0].any()
    assert all(x.isfinite().all() for x in (result, grad_a, grad_b))


@every_dtype
@every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_in_is_nan_out(name: str, bad: float, dtype: torch.dtype, device: torch.device) -> None:
    a, b = rows(4, 50, dtype, device), rows(5, 50, dtype, device, seed=1)
    a[1, 47] = bad
    with serving(name, "cosine_similarity", dtype, device):
        result, grad_a, grad_b = value_and_gradients(a, b)
    poisoned = torch.tensor([False, True, False, False], device=device)
    assert torch.equal(result.isnan().all(1), poisoned)
    assert torch.equal(result.isnan().any(1), poisoned)
    assert torch.equal(grad_a.isnan().any(1), poisoned)
    assert grad_b.isnan().any(1).all()


@every_dtype
@every_backend
def test_gradients_of_scaled_losses(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Mixed precision multiplies the loss by 2^16; the gradient may overflow only when it is stored."""
    with serving(name, "cosine_similarity", dtype, device):
        a, b = rows(9, 50, dtype, device, size=30.0), rows(33, 50, dtype, device, seed=1, size=30.0)
        for scale in (2.0**13, 2.0**-10):
            assert_matches_reference(ops.cosine_similarity, reference.cosine_similarity, (a, b), grad_scale=scale)


@every_backend
def test_strided_inputs(name: str, device: torch.device) -> None:
    with serving(name, "cosine_similarity", device=device):
        wide = rows(20, 70, torch.float32, device)
        for a in (wide[:, 3:36], wide[::3, :33], wide[:, ::2][:, :33], wide.T[:33].T, wide[:1, :33].expand(4, -1)):
            for b in (wide[4:9, 20:53], wide.T.contiguous().T[:, 1:34]):
                assert_matches_reference(ops.cosine_similarity, reference.cosine_similarity, (a, b))
        a, b = rows(6, 8, torch.float32, device), rows(10, 8, torch.float32, device)
        grad = rows(10, 6, torch.float32, device).T
        expected = reference.cosine_similarity_backward(grad, a, b)
        torch.testing.assert_close(torch.ops.triton_st.cosine_similarity_backward(grad, a, b), expected)


@every_backend
@pytest.mark.parametrize(("m", "n", "d"), [(0, 3, 4), (3, 0, 4), (0, 0, 4), (3, 2, 0)])
def test_empty_inputs(name: str, m: int, n: int, d: int, device: torch.device) -> None:
    with serving(name, "cosine_similarity", device=device):
        result, grad_a, grad_b = value_and_gradients(torch.randn(m, d, device=device), torch.randn(n, d, device=device))
    assert torch.equal(result, torch.zeros(m, n, device=device))
    assert torch.equal(grad_a, torch.zeros(m, d, device=device))
    assert torch.equal(grad_b, torch.zeros(n, d, device=device))


@every_dtype
def test_results_do_not_depend_on_threads_or_runs(dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    for m, n, d in [(300, 700, 50), (3, 20000, 33), (129, 64, 384)]:
        a, b, grad = rows(m, d, dtype, cpu), rows(n, d, dtype, cpu, seed=1), rows(m, n, dtype, cpu)
        results = []
        with serving("cpp", "cosine_similarity"):
            for count in (1, 2, 3, 2):
                with threads(count):
                    results.append(value_and_gradients(a, b, grad))
        for other in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_a_row_s_cosines_do_not_depend_on_its_neighbours() -> None:
    a, b = torch.randn(100, 50), torch.randn(300, 50)
    with backend.use("cpp"):
        whole = ops.cosine_similarity(a, b)
        assert torch.equal(ops.cosine_similarity(a[37:38], b[100:250]), whole[37:38, 100:250])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(m=st.integers(1, 70), n=st.integers(1, 300), d=st.integers(1, 130), dtype=st.sampled_from(DTYPES))
@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_any_shape(name: str, m: int, n: int, d: int, dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    with serving(name, "cosine_similarity"):
        inputs = rows(m, d, dtype, cpu), rows(n, d, dtype, cpu, seed=1)
        assert_matches_reference(ops.cosine_similarity, reference.cosine_similarity, inputs, seed=n)


@every_backend
def test_opcheck(name: str, device: torch.device) -> None:
    a, b = torch.randn(4, 6, device=device), torch.randn(5, 6, device=device)
    with serving(name, "cosine_similarity", device=device):
        torch.library.opcheck(torch.ops.triton_st.cosine_similarity_backward.default, (a @ b.T, a, b))
        inputs = (a.requires_grad_(), b.requires_grad_())
        torch.library.opcheck(torch.ops.triton_st.cosine_similarity.default, inputs)


@every_backend
def test_compiled_whole(name: str, device: torch.device) -> None:
    def loss(a: Tensor, b: Tensor) -> Tensor:
        return ops.cosine_similarity(a * 3, b + 1).square()

    a, b = torch.randn(4, 6, device=device), torch.randn(5, 6, device=device)
    results = []
    with serving(name, "cosine_similarity", device=device):
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
            result = function(*leaves)
            results.append((result.detach(), *torch.autograd.grad(result.sum(), leaves)))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (torch.zeros(4), torch.zeros(2, 4), ValueError, r"a must be \[M, D\], got shape \[4\]"),
        (torch.zeros(2, 4), torch.zeros(1, 2, 4), ValueError, r"b must be \[N, D\], got shape \[1, 2, 4\]"),
        (torch.zeros(2, 4), torch.zeros(2, 5), ValueError, "rows of one length D, got 4 and 5"),
        (
            torch.zeros(2, 4),
            torch.zeros(2, 4).half(),
            TypeError,
            "b must have a's dtype torch.float32, got torch.float16",
        ),
        (torch.zeros(2, 4).long(), torch.zeros(2, 4).long(), TypeError, "a must be a floating-point tensor"),
        (torch.zeros(2, 4), torch.zeros(2, 4, device="meta"), ValueError, "b must be on a's device cpu, got meta"),
    ],
)
def test_bad_input(a: Tensor, b: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.cosine_similarity(a, b)


def test_bad_gradient() -> None:
    with pytest.raises(ValueError, match=r"grad must be \[2, 3\], got shape \[3, 2\]"):
        torch.ops.triton_st.cosine_similarity_backward(torch.zeros(3, 2), torch.zeros(2, 4), torch.zeros(3, 4))
