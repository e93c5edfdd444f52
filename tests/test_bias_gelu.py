"""Bias + GELU on every backend: the tolerance rule, both tails, repeatability, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operator_checks import assert_compiles, assert_repeatable, assert_strides_do_not_matter, randn
from serving import every_backend, every_dtype, interpreted, serving
from tolerance import assert_matches_reference
from torch import Tensor

from triton_st import ops, reference

SHAPES = [(1, 200), (130, 200), (65, 1536), (3, 7), (512, 64), (9, 1)]
SMALL_SHAPES = [(1, 200), (35, 50), (5, 384), (3, 7)]


def inputs(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [(2 * randn(rows, columns)).to(dtype).to(device), randn(columns, device=device)]


@every_dtype
@every_backend
def test_obeys_the_tolerance_rule(name: str, dtype: torch.dtype, device: torch.device) -> None:
    with serving(name, "bias_gelu", dtype, device):
        for rows, columns in SMALL_SHAPES if interpreted(name, device) else SHAPES:
            assert_matches_reference(ops.bias_gelu, reference.bias_gelu, inputs(rows, columns, dtype, device))


@every_backend
def test_whole_range(name: str, device: torch.device) -> None:
    """Value and slope from tail to tail; far out the function is 0 or x, and NaN and infinity stay."""
    x = torch.linspace(-12, 12, 4001).view(-1, 1).to(device).requires_grad_()
    bias = torch.zeros(1, device=device)
    with serving(name, "bias_gelu", device=device):
        y = ops.bias_gelu(x, bias)
        (slope,) = torch.autograd.grad(y.sum(), x)
        ends = ops.bias_gelu(torch.tensor([[-1e30], [-200.0], [200.0], [1e30], [float("nan")]], device=device), bias)
    wide = x.detach().double().requires_grad_()
    expected = F.gelu(wide)
    (expected_slope,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-7 * 12)
    torch.testing.assert_close(slope.double(), expected_slope, rtol=0, atol=1e-6)
    assert not ends[:2].any()
    assert ends[2:4].flatten().tolist() == [200.0, torch.tensor(1e30).item()]
    assert ends[4].isnan().all()


@every_dtype
def test_same_bits_on_every_run_and_any_number_of_threads(dtype: torch.dtype) -> None:
    with serving("cpp", "bias_gelu"):
        assert_repeatable(ops.bias_gelu, inputs(1000, 200, dtype, torch.device("cpu")))


def test_strided_inputs() -> None:
    with serving("cpp", "bias_gelu"):
        assert_strides_do_not_matter(ops.bias_gelu, inputs(20, 50, torch.float32, torch.device("cpu")))


@every_backend
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(name: str, shape: tuple[int, int], device: torch.device) -> None:
    x = torch.zeros(shape, device=device, requires_grad=True)
    bias = torch.zeros(shape[1], device=device, requires_grad=True)
    with serving(name, "bias_gelu", device=device):
        ops.bias_gelu(x, bias).sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    assert not bias.grad.any()


def test_gradients_of_the_reference() -> None:
    leaves = [x.double().requires_grad_() for x in inputs(4, 6, torch.float64, torch.device("cpu"))]
    with serving("reference", "bias_gelu"):
        for function in (ops.bias_gelu, reference.bias_gelu):
            assert torch.autograd.gradcheck(function, leaves)


@every_backend
def test_opcheck(name: str, device: torch.device) -> None:
    x, bias = inputs(5, 6, torch.float32, device)
    with serving(name, "bias_gelu", device=device):
        torch.library.opcheck(
            torch.ops.triton_st.bias_gelu.default, (x.clone().requires_grad_(), bias.clone().requires_grad_())
        )
        torch.library.opcheck(torch.ops.triton_st.bias_gelu_backward.default, (x.flip(0), x, bias))


@every_backend
def test_compiled_whole(name: str, device: torch.device) -> None:
    with serving(name, "bias_gelu", device=device):
        assert_compiles(lambda x, bias: ops.bias_gelu(x * 2, bias).square(), inputs(5, 6, torch.float32, device))


@pytest.mark.parametrize(
    ("x", "bias", "error", "message"),
    [
        (torch.zeros(6), torch.zeros(6), ValueError, r"x must be \[T, N\], got shape \[6\]"),
        (torch.zeros(2, 6), torch.zeros(5), ValueError, r"bias must be \[6\], got shape \[5\]"),
        (torch.zeros(2, 6), torch.zeros(6).half(), TypeError, "bias must be torch.float32 with x in torch.float32"),
        (torch.zeros(2, 6).int(), torch.zeros(6), TypeError, "x must be a floating-point tensor"),
    ],
)
def test_bad_input(x: Tensor, bias: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.bias_gelu(x, bias)
