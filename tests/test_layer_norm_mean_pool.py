"""LayerNorm with mean pooling on every backend: the tolerance rule, long and empty sequences, unit length."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from operator_checks import assert_compiles, assert_repeatable, assert_strides_do_not_matter, cu_seqlens, randn, seed
from serving import every_backend, every_dtype, interpreted, serving
from tolerance import assert_matches_reference
from torch import Tensor

from triton_st import ops, reference

LENGTHS = [[1], [5, 0, 1, 25, 33, 64], [130, 3], [4] * 70, [512]]
COLUMNS = [50, 384, 7, 64, 1024]
SMALL_LENGTHS = [[1], [5, 0, 17, 3]]
SMALL_COLUMNS = [50, 7]
OPERATOR = "layer_norm_mean_pool_forward"
EPS = 1e-12


def calls(lengths: list[int], dropout_p: float, normalize: bool, device: torch.device) -> tuple[Any, Any]:
    """The operator and its specification as functions of tensors alone: x, residual, weight, bias and maybe x_bias."""
    offsets, key = cu_seqlens(lengths, device), seed(device)

    def of(function: Any) -> Any:
        def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None = None) -> Tensor:
            options: dict[str, Any] = {"dropout_p": dropout_p, "seed": key, "stream": 3, "normalize": normalize}
            return function(x, residual, weight, bias, EPS, offsets, x_bias=x_bias, **options)

        return call

    return of(ops.layer_norm_mean_pool), of(reference.layer_norm_mean_pool)


def inputs(tokens: int, columns: int, dtype: torch.dtype, device: torch.device, x_bias: bool = True) -> list[Tensor]:
    x, residual = randn(tokens, columns, 1).squeeze(-1), randn(tokens, columns)
    vectors = [1 + randn(columns), randn(1, columns)[0], randn(columns, 1)[:, 0]]
    return [x.to(dtype).to(device), residual.to(dtype).to(device), *(v.to(device) for v in vectors[: 2 + x_bias])]


@every_dtype
@every_backend
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_obeys_the_tolerance_rule(
    name: str, dtype: torch.dtype, normalize: bool, dropout_p: float, device: torch.device
) -> None:
    all_lengths, columns = (SMALL_LENGTHS, SMALL_COLUMNS) if interpreted(name, device) else (LENGTHS, COLUMNS)
    with serving(name, OPERATOR, dtype, device):
        for i, (lengths, d) in enumerate(zip(all_lengths, columns, strict=True)):
            arguments = inputs(sum(lengths), d, dtype, device, x_bias=i % 2 == 1)
            assert_matches_reference(*calls(lengths, dropout_p, normalize, device), arguments)


@every_backend
def test_is_its_two_parts(name: str, device: torch.device) -> None:
    lengths = [5, 0, 17, 3]
    x, residual, weight, bias, x_bias = inputs(25, 50, torch.float32, device)
    with serving(name, OPERATOR, device=device):
        actual = calls(lengths, 0.2, False, device)[0](x, residual, weight, bias, x_bias)
        hidden = ops.dropout_add_layer_norm(
            x, residual, weight, bias, EPS, x_bias=x_bias, dropout_p=0.2, seed=seed(device), stream=3
        )
        torch.testing.assert_close(actual, ops.packed_mean_pool(hidden, cu_seqlens(lengths, device)))
        unit = calls(lengths, 0.2, True, device)[0](x, residual, weight, bias, x_bias)
    norms = torch.linalg.vector_norm(unit, dim=1)
    torch.testing.assert_close(norms, torch.tensor([1.0, 0.0, 1.0, 1.0], device=device))


@every_backend
@pytest.mark.parametrize("normalize", [False, True])
def test_empty_sequences_are_zero_and_take_no_gradient(name: str, normalize: bool, device: torch.device) -> None:
    for lengths in ([], [0], [0, 0]):
        leaves = [x.requires_grad_() for x in inputs(0, 10, torch.float32, device)]
        with serving(name, OPERATOR, device=device):
            out = calls(lengths, 0.1, normalize, device)[0](*leaves)
            out.sum().backward()
        assert torch.equal(out, torch.zeros(len(lengths), 10, device=device))
        assert all(x.grad is not None and not x.grad.any() for x in leaves)


@every_dtype
def test_same_bits_on_every_run_and_any_number_of_threads(dtype: torch.dtype) -> None:
    lengths, cpu = [300, 0, 1, 64, 65] + [20] * 30, torch.device("cpu")
    with serving("cpp", OPERATOR):
        assert_repeatable(calls(lengths, 0.1, True, cpu)[0], inputs(sum(lengths), 50, dtype, cpu))


def test_strided_inputs() -> None:
    cpu = torch.device("cpu")
    with serving("cpp", OPERATOR):
        assert_strides_do_not_matter(calls([5, 15], 0.1, True, cpu)[0], inputs(20, 50, torch.float32, cpu))


def test_gradients_of_the_reference() -> None:
    leaves = [x.double().requires_grad_() for x in inputs(7, 6, torch.float64, torch.device("cpu"))]
    with serving("reference", OPERATOR):
        for normalize in (False, True):
            for function in calls([4, 0, 3], 0.4, normalize, torch.device("cpu")):
                assert torch.autograd.gradcheck(function, leaves)


@every_backend
def test_opcheck(name: str, device: torch.device) -> None:
    forward, backward = (
        torch.ops.triton_st.layer_norm_mean_pool_forward,
        torch.ops.triton_st.layer_norm_mean_pool_backward,
    )
    x, residual, weight, bias, x_bias = inputs(8, 6, torch.float32, device)
    offsets, key = cu_seqlens([3, 0, 5], device), seed(device)
    with serving(name, OPERATOR, device=device):
        for offset, normalize in itertools.product((None, x_bias), (False, True)):
            out, pooled, mean, rstd = forward(x, residual, weight, bias, offsets, offset, key, EPS, 0.2, 1, normalize)
            leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
            torch.library.opcheck(forward.default, (*leaves, offsets, offset, key, EPS, 0.2, 1, normalize))
            torch.library.opcheck(
                backward.default,
                (out.flip(0), x, residual, weight, pooled, mean, rstd, offsets, offset, key, 0.2, 1, normalize),
            )


@every_backend
def test_compiled_whole(name: str, device: torch.device) -> None:
    function = calls([3, 0, 5], 0.2, True, device)[0]
    with serving(name, OPERATOR, device=device):
        assert_compiles(lambda x, *rest: function(x * 2, *rest).square(), inputs(8, 6, torch.float32, device))


X, W = torch.zeros(4, 6), torch.ones(6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, X[:3], W, W, EPS, cu_seqlens([4])), ValueError, r"residual must be \[4, 6\] as x"),
        ((X, X, W, W[:5], EPS, cu_seqlens([4])), ValueError, r"bias must be \[6\]"),
        ((X, X, W, W, float("nan"), cu_seqlens([4])), ValueError, "eps must be at least 0"),
        ((X, X, W, W, EPS, cu_seqlens([3])), ValueError, "cu_seqlens must end at 4, the number of tokens, got 3"),
        ((X, X, W, W, EPS, torch.tensor([0, 5, 4])), ValueError, "cu_seqlens must not descend"),
        ((X, X, W, W, EPS, torch.tensor([1, 4])), ValueError, "cu_seqlens must start at 0, got 1"),
        ((X, X, W, W, EPS, None), TypeError, "cu_seqlens must be a tensor, got NoneType"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.layer_norm_mean_pool(*arguments)


def test_compiled_kernels_check_what_they_are_called_with() -> None:
    with serving("cpp", OPERATOR):
        ops.layer_norm_mean_pool(X, X, W, W, EPS, cu_seqlens([4]))  # loads the library
    with pytest.raises(RuntimeError, match="cu_seqlens must ascend"):
        torch.ops.triton_st_cpp.layer_norm_mean_pool_forward(
            X, X, W, W, cu_seqlens([9]), None, None, EPS, 0.0, 0, False
        )
