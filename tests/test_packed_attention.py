"""Packed attention on every backend: the tolerance rule, ragged shapes, dropout, repeatability, bad input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_checks import assert_compiles, assert_repeatable, assert_strides_do_not_matter, cu_seqlens, randn, seed
from serving import every_backend, every_dtype, interpreted, serving
from tolerance import assert_matches_reference, value_and_gradients
from torch import Tensor

from triton_st import ops, reference
from triton_st.reference.philox import keep_mask

LENGTHS = [[1], [5, 0, 1, 25, 33, 64], [65, 3, 130], [16] * 20, [512]]
SIZES = [10, 32, 64, 1, 7, 33, 128]
SMALL_LENGTHS = [[1], [5, 0, 17, 3], [70]]
SMALL_SIZES = [10, 32, 5]
OPERATOR = "packed_attention_forward"


def shapes(name: str, device: torch.device) -> list[tuple[list[int], int]]:
    """Every list of lengths with one head size each, and every head size."""
    lengths, sizes = (SMALL_LENGTHS, SMALL_SIZES) if interpreted(name, device) else (LENGTHS, SIZES)
    size = itertools.cycle(sizes)
    return [(each, next(size)) for each in lengths] + [(lengths[1], d) for d in sizes]


def inputs(
    lengths: list[int], size: int, dtype: torch.dtype, device: torch.device, dropout_p: float, heads: int = 2
) -> tuple[Tensor, Tensor, int, float, Tensor, int]:
    qkv = randn(sum(lengths), 3, heads, size, dtype=dtype, device=device)
    return qkv, cu_seqlens(lengths, device), max(lengths) + 3, dropout_p, seed(device), 5


@every_dtype
@every_backend
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_obeys_the_tolerance_rule(name: str, dtype: torch.dtype, dropout_p: float, device: torch.device) -> None:
    with serving(name, OPERATOR, dtype, device):
        for lengths, size in shapes(name, device):
            arguments = inputs(lengths, size, dtype, device, dropout_p)
            assert_matches_reference(ops.packed_attention, reference.packed_attention, arguments)


def biased(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` with its last argument as the bias: in the inputs' dtype, so that its gradient is judged by that.

    It is float32 by right, of results that were rounded to half.
    """

    def run(qkv: Tensor, *arguments: Any) -> Tensor:
        *rest, bias = arguments
        return function(qkv, *rest, bias.to(torch.promote_types(qkv.dtype, torch.float32)))

    return run


@every_dtype
@every_backend
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_bias_by_relative_position(name: str, dtype: torch.dtype, dropout_p: float, device: torch.device) -> None:
    with serving(name, OPERATOR, dtype, device):
        for lengths, size in shapes(name, device):
            if max(lengths) == 1 or (interpreted(name, device) and max(lengths) > 64):
                continue  # the gradient is a difference of equal numbers; the interpreter is slow
            arguments = inputs(lengths, size, dtype, device, dropout_p)
            reach = arguments[2] + len(lengths) % 3
            arguments = (*arguments, 2 * randn(2, 2 * reach - 1, dtype=dtype, device=device))
            assert_matches_reference(biased(ops.packed_attention), biased(reference.packed_attention), arguments)


@every_backend
def test_bias_agrees_with_a_mask_in_pytorch(name: str, device: torch.device) -> None:
    """The column of key j and query i is that of j - i, from 1 - P on; what no pair of tokens has gets no gradient."""
    lengths, reach = [4, 1, 19], 25
    qkv, bias = randn(24, 3, 2, 10, device=device), randn(2, 2 * reach - 1, device=device).requires_grad_()
    with serving(name, OPERATOR, device=device):
        out = ops.packed_attention(qkv, cu_seqlens(lengths, device), 19, relative_bias=bias)
        (grad,) = torch.autograd.grad(out.square().sum(), bias)
    expected = []
    for start, end in itertools.pairwise(cu_seqlens(lengths).tolist()):
        q, k, v = qkv[start:end].permute(1, 2, 0, 3)
        rows = [bias[:, reach - 1 - i : reach - 1 - i + end - start] for i in range(end - start)]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.stack(rows, 1))
        expected.append(attended.transpose(0, 1).flatten(1))
    torch.testing.assert_close(out, torch.cat(expected))
    (wanted,) = torch.autograd.grad(torch.cat(expected).square().sum(), bias)
    torch.testing.assert_close(grad, wanted)
    assert not grad[:, : reach - 19].any()
    assert not grad[:, reach + 18 :].any()


def assert_close_to_float64(qkv: Tensor, lengths: list[int], bias: Tensor, tolerance: float) -> None:
    """Result and gradients, absolutely, where numbers are too large for the tolerance rule to say anything."""
    arguments = (cu_seqlens(lengths, qkv.device), max(lengths), 0.0, None, 0)
    value, gradients = value_and_gradients(ops.packed_attention, (qkv, *arguments, bias))
    exact = value_and_gradients(reference.packed_attention, (qkv.double(), *arguments, bias.double()))
    for found, wanted in zip((value, *gradients), (exact[0], *exact[1]), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)


@every_backend
@pytest.mark.parametrize("lengths", [[5, 0, 17], [70]])
@pytest.mark.parametrize("size", [100.0, -100.0])
def test_bias_that_overflows_an_exponential(name: str, lengths: list[int], size: float, device: torch.device) -> None:
    """Past e^88 every weight that is formed without its row's maximum is infinite, in lanes that hold no query too."""
    qkv = randn(sum(lengths), 3, 2, 10, device=device)
    bias = randn(2, 2 * max(lengths) - 1, device=device) + size
    with serving(name, OPERATOR, device=device):
        assert_close_to_float64(qkv, lengths, bias, 1e-4)


@every_backend
@pytest.mark.parametrize("reach", [3, 50])
def test_bias_of_minus_infinity_keeps_keys_out(name: str, reach: int, device: torch.device) -> None:
    """A window round each query: whole blocks of keys that a long sequence is cut into have no weight at all."""
    longest = reach + 20 if interpreted(name, device) else 150
    qkv, bias = randn(longest + 3, 3, 2, 10, device=device), randn(2, 2 * longest - 1, device=device)
    bias[:, (torch.arange(2 * longest - 1) - longest + 1).abs() > reach] = -math.inf
    with serving(name, OPERATOR, device=device):
        assert_close_to_float64(qkv, [longest, 3], bias, 1e-4)


@every_backend
def test_agrees_with_pytorch(name: str, device: torch.device) -> None:
    lengths = [4, 1, 19]
    qkv = randn(24, 3, 2, 10, device=device)
    with serving(name, OPERATOR, device=device):
        out = ops.packed_attention(qkv, cu_seqlens(lengths, device), 19)
    for start, end in itertools.pairwise(cu_seqlens(lengths).tolist()):
        q, k, v = qkv[start:end].permute(1, 2, 0, 3)
        expected = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        torch.testing.assert_close(out[start:end], expected)


@every_backend
@pytest.mark.parametrize("lengths", [[9, 30, 1], [70]])
def test_dropout_drops_what_the_specification_names(name: str, lengths: list[int], device: torch.device) -> None:
    """Values are the unit vectors, so that the result shows every weight."""
    tokens, heads, size, longest = sum(lengths), 2, max(lengths), max(lengths) + 2
    qkv = torch.zeros(tokens, 3, heads, size)
    for start, end in itertools.pairwise(cu_seqlens(lengths).tolist()):
        qkv[start:end, 2] = torch.eye(size)[: end - start].unsqueeze(1)
    with serving(name, OPERATOR, device=device):
        out = ops.packed_attention(qkv.to(device), cu_seqlens(lengths, device), longest, 0.3, seed(device), 11)
    weights = out.cpu().view(tokens, heads, size)
    rows = torch.arange(heads).unsqueeze(1) * tokens + torch.arange(tokens)
    expected = keep_mask(seed(), 11, rows, size, longest, 0.3).transpose(0, 1)
    for start, end in itertools.pairwise(cu_seqlens(lengths).tolist()):
        length = end - start
        assert torch.equal(weights[start:end, :, :length] != 0, expected[start:end, :, :length])
        some = weights[start:end, :, :length]
        torch.testing.assert_close(some[some != 0], torch.full_like(some[some != 0], 1 / (0.7 * length)))


@every_backend
def test_scores_that_overflow_an_exponential(name: str, device: torch.device) -> None:
    """Scores up to ±3e4: only an exact maximum gives finite weights; lse is the row's own."""
    qkv = randn(80, 3, 1, 8, device=device) * 100
    with serving(name, OPERATOR, device=device):
        out, logsumexp = torch.ops.triton_st.packed_attention_forward(
            qkv, cu_seqlens([80], device), None, 80, 0.0, 0, None
        )
    q, k, v = qkv.double().permute(1, 2, 0, 3)
    scores = q @ k.mT / math.sqrt(8)
    torch.testing.assert_close(logsumexp.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-3)
    expected = (scores.softmax(-1) @ v).squeeze(0)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1.0)


@every_backend
def test_nothing_passes_from_one_sequence_to_another(name: str, device: torch.device) -> None:
    qkv = randn(40, 3, 2, 10, device=device).requires_grad_()
    offsets = cu_seqlens([10, 10, 20], device)
    with serving(name, OPERATOR, device=device):
        clean = ops.packed_attention(qkv, offsets, 20)
        for factor in (1e4, float("nan")):
            spoiled = qkv.detach().clone()
            spoiled[10:20] *= factor
            out = ops.packed_attention(spoiled, offsets, 20)
            assert out[10:20].isfinite().all() == (factor == 1e4)
            if factor == 1e4 or name != "triton":  # whose sequences share tiles, in which weight 0 times NaN is NaN
                assert torch.equal(out[:10], clean[:10])
                assert torch.equal(out[20:], clean[20:])
        (grad,) = torch.autograd.grad(clean[:10].sum(), qkv)
    assert not grad[10:].any()
    assert grad[:10, 2].any()


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_finite_results_past_half_s_range_are_its_largest(name: str) -> None:
    qkv = torch.full((24, 3, 1, 8), 6e4, dtype=torch.float16)
    qkv[:, :2] = 0
    with serving(name, OPERATOR):
        out = ops.packed_attention(qkv, cu_seqlens([24]), 24, 0.5, seed())
    assert out.isfinite().all()
    assert out.max() == torch.finfo(torch.float16).max


@every_dtype
@pytest.mark.parametrize("lengths", [[25, 0, 1, 33, 64, 5] * 4, [150, 20]])
def test_same_bits_on_every_run_and_any_number_of_threads(dtype: torch.dtype, lengths: list[int]) -> None:
    arguments = inputs(lengths, 10, dtype, torch.device("cpu"), 0.1)
    with serving("cpp", OPERATOR):
        assert_repeatable(ops.packed_attention, arguments)
        assert_repeatable(ops.packed_attention, (*arguments, randn(2, 2 * max(lengths) + 5)))


def test_strided_inputs() -> None:
    with serving("cpp", OPERATOR):
        assert_strides_do_not_matter(ops.packed_attention, inputs([5, 20], 10, torch.float32, torch.device("cpu"), 0.1))
        wide = randn(25, 3, 2, 30)
        views = (wide[..., 10:20], wide.transpose(1, 2).contiguous().transpose(1, 2)[..., :10])
        for view in views:
            arguments = (view, cu_seqlens([5, 20]), 20)
            assert_matches_reference(ops.packed_attention, reference.packed_attention, arguments)


@every_backend
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tokens(name: str, lengths: list[int], device: torch.device) -> None:
    qkv = torch.randn(0, 3, 2, 10, device=device, requires_grad=True)
    with serving(name, OPERATOR, device=device):
        out = ops.packed_attention(qkv, cu_seqlens(lengths, device), 0)
        assert out.shape == (0, 20)
        out.sum().backward()
    assert qkv.grad is not None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=5).filter(any),
    size=st.integers(4, 128),  # of one number, a gradient is a cancelling sum: its error is a matter of luck
    dropout_p=st.sampled_from([0.0, 0.1, 0.7]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_any_shape(lengths: list[int], size: int, dropout_p: float, dtype: torch.dtype) -> None:
    with serving("cpp", OPERATOR):
        arguments = inputs(lengths, size, dtype, torch.device("cpu"), dropout_p, heads=1)
        assert_matches_reference(ops.packed_attention, reference.packed_attention, arguments)


def test_gradients_of_the_reference() -> None:
    qkv = torch.randn(9, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 11, dtype=torch.float64, requires_grad=True)
    with serving("reference", OPERATOR):
        for function in (ops.packed_attention, reference.packed_attention):
            for dropout_p in (0.0, 0.4):
                assert torch.autograd.gradcheck(
                    lambda x, b, f=function, p=dropout_p: f(x, cu_seqlens([4, 0, 5]), 5, p, seed(), 2, b), (qkv, bias)
                )


@every_backend
def test_opcheck(name: str, device: torch.device) -> None:
    qkv, offsets = randn(8, 3, 2, 6, device=device), cu_seqlens([3, 0, 5], device)
    with serving(name, OPERATOR, device=device):
        for dropout_p, key, bias in ((0.0, None, None), (0.2, seed(device), randn(2, 9, device=device))):
            settings = (offsets, key, 5, dropout_p, 1, bias)
            out, logsumexp = torch.ops.triton_st.packed_attention_forward(qkv, *settings)
            torch.library.opcheck(
                torch.ops.triton_st.packed_attention_forward.default, (qkv.clone().requires_grad_(), *settings)
            )
            torch.library.opcheck(
                torch.ops.triton_st.packed_attention_backward.default,
                (torch.randn_like(out), qkv, out, logsumexp, *settings),
            )


@every_backend
def test_compiled_whole(name: str, device: torch.device) -> None:
    offsets, key = cu_seqlens([3, 0, 5], device), seed(device)

    def attend(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.packed_attention(qkv * 2, offsets, 5, 0.2, key, 1, bias).square()

    with serving(name, OPERATOR, device=device):
        assert_compiles(attend, [randn(8, 3, 2, 6, device=device)])
        assert_compiles(attend, [randn(8, 3, 2, 6, device=device), randn(2, 9, device=device)])


QKV = torch.zeros(4, 3, 2, 5)
BIASED = (QKV, cu_seqlens([4]), 4, 0.0, None, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((QKV[0], cu_seqlens([4]), 4), ValueError, r"qkv must be \[T, 3, H, d\], got shape \[3, 2, 5\]"),
        ((QKV[:, :2], cu_seqlens([4]), 4), ValueError, r"qkv must be \[T, 3, H, d\], got shape \[4, 2, 2, 5\]"),
        ((QKV.long(), cu_seqlens([4]), 4), TypeError, "qkv must be a floating-point tensor"),
        ((torch.zeros(4, 3, 2, 129), cu_seqlens([4]), 4), ValueError, "heads of 1 to 128 elements, got 129"),
        ((torch.zeros(4, 3, 2, 0), cu_seqlens([4]), 4), ValueError, "heads of 1 to 128 elements, got 0"),
        ((QKV, cu_seqlens([4]).float(), 4), TypeError, "cu_seqlens must be int32 or int64, got torch.float32"),
        ((QKV, torch.tensor([1, 4]), 4), ValueError, "cu_seqlens must start at 0, got 1"),
        ((QKV, torch.tensor([0, 3, 2, 4]), 4), ValueError, "cu_seqlens must not descend"),
        ((QKV, cu_seqlens([5]), 5), ValueError, "cu_seqlens must end at 4, the number of tokens, got 5"),
        ((QKV, cu_seqlens([1, 3]), 2), ValueError, "max_seqlen must be at least 3, the longest sequence.*got 2"),
        ((QKV, cu_seqlens([4]), 4.0), TypeError, "max_seqlen must be an int, got float"),
        ((QKV, cu_seqlens([4]), 4, 1.5), ValueError, "dropout_p must be a probability, 0 to 1, got 1.5"),
        ((QKV, cu_seqlens([4]), 4, float("nan")), ValueError, "dropout_p must be a probability"),
        ((QKV, cu_seqlens([4]), 4, 0.1), ValueError, "seed must be given where dropout_p is not 0"),
        ((QKV, cu_seqlens([4]), 4, 0.1, torch.tensor(1.0)), TypeError, "seed must be int64, got torch.float32"),
        ((QKV, cu_seqlens([4]), 4, 0.1, torch.tensor([1, 2])), ValueError, r"seed must have one element, got.*\[2\]"),
        (
            (*BIASED, torch.zeros(2, 5)),
            ValueError,
            "relative_bias must have at least 7 columns with max_seqlen 4, got 5",
        ),
        ((QKV, cu_seqlens([4]), 9, 0.0, None, 0, torch.zeros(2, 7)), ValueError, "at least 17 columns.*9, got 7"),
        (
            (*BIASED, torch.zeros(2, 8)),
            ValueError,
            r"relative_bias must be \[H, 2 P - 1\] with 2 heads, got shape \[2, 8\]",
        ),
        (
            (*BIASED, torch.zeros(3, 7)),
            ValueError,
            r"relative_bias must be \[H, 2 P - 1\] with 2 heads, got shape \[3, 7\]",
        ),
        ((*BIASED, torch.zeros(7)), ValueError, r"relative_bias must be \[H, 2 P - 1\] with 2 heads, got shape \[7\]"),
        (
            (*BIASED, torch.zeros(2, 7).half()),
            TypeError,
            "relative_bias must be torch.float32 with qkv in torch.float32",
        ),
        ((*BIASED, 0.5), TypeError, "relative_bias must be a tensor, got float"),
        ((*BIASED, torch.zeros(2, 7).to_sparse()), TypeError, "relative_bias must be a dense tensor, got layout"),
    ],
)
def test_bad_input(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.packed_attention(*arguments)  # type: ignore[arg-type]


def test_compiled_kernels_check_what_they_are_called_with() -> None:
    """A direct call passes by the checks in Python: it must not read out of bounds."""
    with serving("cpp", OPERATOR):
        ops.packed_attention(QKV, cu_seqlens([4]), 4)  # loads the library
    for offsets, longest in ((torch.tensor([0, 9, 4]), 9), (torch.tensor([0, 4]), 3)):
        with pytest.raises(RuntimeError, match=r"cu_seqlens must ascend|max_seqlen is smaller"):
            torch.ops.triton_st_cpp.packed_attention_forward(QKV, offsets, None, longest, 0.0, 0, None)
    for bias in (torch.zeros(2, 5), torch.zeros(1, 7)):
        with pytest.raises(RuntimeError, match=r"relative_bias must be float32 \[H, 2 P - 1\]"):
            torch.ops.triton_st_cpp.packed_attention_forward(QKV, cu_seqlens([4]), None, 4, 0.0, 0, bias)
