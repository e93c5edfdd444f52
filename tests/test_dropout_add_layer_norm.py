"""Dropout + residual + LayerNorm on every backend: the tolerance rule, mixed dtypes, hard rows, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_checks import assert_compiles, assert_repeatable, assert_strides_do_not_matter, randn, seed
from serving import every_backend, every_dtype, interpreted, serving
from tolerance import assert_matches_reference
from torch import Tensor

from triton_st import ops, reference

SHAPES = [(1, 50), (130, 50), (64, 384), (65, 7), (3, 1), (512, 64), (5, 1024), (70, 312)]
SMALL_SHAPES = [(1, 50), (35, 50), (5, 384), (3, 7)]
OPERATOR = "dropout_add_layer_norm_forward"
EPS = 1e-12


def calls(dropout_p: float, device: torch.device) -> tuple[Any, Any]:
    """The operator and its specification as functions of tensors alone: x, residual, weight, bias and maybe x_bias."""

    def of(function: Any) -> Any:
        def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None = None) -> Tensor:
            dropout: dict[str, Any] = {"dropout_p": dropout_p, "seed": seed(device), "stream": 3}
            return function(x, residual, weight, bias, EPS, x_bias=x_bias, **dropout)

        return call

    return of(ops.dropout_add_layer_norm), of(reference.dropout_add_layer_norm)


def inputs(rows: int, columns: int, dtype: torch.dtype, device: torch.device, x_bias: bool = True) -> list[Tensor]:
    x, residual = randn(rows, columns, 1).squeeze(-1), randn(rows, columns)
    vectors = [1 + randn(columns), randn(1, columns)[0], randn(columns, 1)[:, 0]]
    return [x.to(dtype).to(device), residual.to(dtype).to(device), *(v.to(device) for v in vectors[: 2 + x_bias])]


@every_dtype
@every_backend
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_obeys_the_tolerance_rule(name: str, dtype: torch.dtype, dropout_p: float, device: torch.device) -> None:
    with serving(name, OPERATOR, dtype, device):
        for i, (rows, columns) in enumerate(SMALL_SHAPES if interpreted(name, device) else SHAPES):
            arguments = inputs(rows, columns, dtype, device, x_bias=i % 2 == 0)
            assert_matches_reference(*calls(dropout_p, device), arguments)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_product_on_a_half_residual(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Numbers past float16's range may stand in x: the sum is never stored."""
    x, *others = inputs(9, 50, dtype, device)
    with serving(name, OPERATOR, dtype, device):
        large = x.float() * 1e6
        assert_matches_reference(*calls(0.1, device), [large, *others])
        assert calls(0.1, device)[0](large, *others).dtype == dtype


@every_backend
def test_agrees_with_pytorch(name: str, device: torch.device) -> None:
    x, residual, weight, bias, x_bias = inputs(9, 50, torch.float32, device)
    with serving(name, OPERATOR, device=device):
        actual = ops.dropout_add_layer_norm(x, residual, weight, bias, EPS, x_bias=x_bias)
    torch.testing.assert_close(actual, F.layer_norm(x + x_bias + residual, (50,), weight, bias, EPS))


@every_backend
def test_rows_without_variance_or_far_from_zero(name: str, device: torch.device) -> None:
    """A constant row gives the bias; an offset of 1000 deviations costs no more digits than it must."""
    weight, bias = torch.full((8,), 2.0, device=device), torch.arange(8.0, device=device)
    zeros = torch.zeros(2, 8, device=device)
    with serving(name, OPERATOR, device=device):
        constant = ops.dropout_add_layer_norm(zeros + 3, zeros, weight, bias, EPS)
        torch.testing.assert_close(constant, bias.expand(2, 8), rtol=0, atol=1e-5)
        far = inputs(20, 64, torch.float32, device)
        far[1] = far[1] + 1000
        assert_matches_reference(*calls(0.0, device), far)


@every_backend
def test_nan_stays_in_its_row(name: str, device: torch.device) -> None:
    x, residual, weight, bias = inputs(3, 20, torch.float32, device, x_bias=False)
    x[1, 4] = float("nan")
    with serving(name, OPERATOR, device=device):
        out = ops.dropout_add_layer_norm(x, residual, weight, bias, EPS)
    assert out[1].isnan().all()
    assert out[::2].isfinite().all()


@every_dtype
def test_same_bits_on_every_run_and_any_number_of_threads(dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    with serving("cpp", OPERATOR):
        assert_repeatable(calls(0.1, cpu)[0], inputs(1000, 50, dtype, cpu))


def test_strided_inputs() -> None:
    cpu = torch.device("cpu")
    with serving("cpp", OPERATOR):
        assert_strides_do_not_matter(calls(0.1, cpu)[0], inputs(20, 50, torch.float32, cpu))


@every_backend
def test_no_rows(name: str, device: torch.device) -> None:
    arguments = inputs(0, 50, torch.float32, device)
    leaves = [x.requires_grad_() for x in arguments]
    with serving(name, OPERATOR, device=device):
        out = calls(0.1, device)[0](*leaves)
        out.sum().backward()
    assert out.shape == (0, 50)
    assert all(x.grad is not None and not x.grad.any() for x in leaves)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 200),
    columns=st.integers(16, 200),
    dropout_p=st.sampled_from([0.0, 0.1, 0.6]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_any_shape(rows: int, columns: int, dropout_p: float, dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    with serving("cpp", OPERATOR):
        arguments = inputs(rows, columns, dtype, cpu)
        arguments[1] = (arguments[1].float() + torch.arange(columns)).to(dtype)  # no row without variance
        assert_matches_reference(*calls(dropout_p, cpu), arguments)


def test_gradients_of_the_reference() -> None:
    leaves = [x.double().requires_grad_() for x in inputs(4, 6, torch.float64, torch.device("cpu"))]
    with serving("reference", OPERATOR):
        for function in calls(0.4, torch.device("cpu")):
            assert torch.autograd.gradcheck(function, leaves)


@every_backend
def test_opcheck(name: str, device: torch.device) -> None:
    with serving(name, OPERATOR, device=device):
        for x_bias in (False, True):
            x, residual, weight, bias, *rest = inputs(5, 6, torch.float32, device, x_bias=x_bias)
            offset = rest[0] if rest else None
            key = seed(device)
            forward, backward = (
                torch.ops.triton_st.dropout_add_layer_norm_forward,
                torch.ops.triton_st.dropout_add_layer_norm_backward,
            )
            out, mean, rstd = forward(x, residual, weight, bias, offset, key, EPS, 0.2, 1)
            arguments = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
            torch.library.opcheck(forward.default, (*arguments, offset, key, EPS, 0.2, 1))
            torch.library.opcheck(backward.default, (out, x, residual, weight, mean, rstd, offset, key, 0.2, 1))


@every_backend
def test_compiled_whole(name: str, device: torch.device) -> None:
    function = calls(0.2, device)[0]
    with serving(name, OPERATOR, device=device):
        assert_compiles(lambda x, *rest: function(x * 2, *rest).square(), inputs(5, 6, torch.float32, device))


X, W = torch.zeros(4, 6), torch.ones(6)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[0], X[0], W, W, EPS), {}, ValueError, r"x must be \[T, D\], got shape \[6\]"),
        ((X, X[:3], W, W, EPS), {}, ValueError, r"residual must be \[4, 6\] as x, got shape \[3, 6\]"),
        ((X[:, :0], X[:, :0], W[:0], W[:0], EPS), {}, ValueError, "x must have rows of at least one element"),
        (
            (X.half(), X, W, W, EPS),
            {},
            TypeError,
            "x must have residual's dtype torch.float32 or float32, got.*float16",
        ),
        ((X.int(), X, W, W, EPS), {}, TypeError, "x must be a floating-point tensor.*got torch.int32"),
        ((X, X, W.half(), W, EPS), {}, TypeError, "weight must be torch.float32 with residual in torch.float32"),
        ((X, X, W, W[:5], EPS), {}, ValueError, r"bias must be \[6\], got shape \[5\]"),
        ((X, X, W, W, EPS), {"x_bias": X}, ValueError, r"x_bias must be \[6\], got shape \[4, 6\]"),
        ((X, X, W, W, -1.0), {}, ValueError, "eps must be at least 0, got -1.0"),
        ((X, X, W, W, EPS), {"dropout_p": -0.1}, ValueError, "dropout_p must be a probability"),
        ((X, X, W, W, EPS), {"dropout_p": 0.1}, ValueError, "seed must be given"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.dropout_add_layer_norm(*arguments, **options)
