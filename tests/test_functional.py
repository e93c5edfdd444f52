"""The encoder's inner functions against plain PyTorch: products, feed-forward, LayerNorm, dropout, attention's plan."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tolerance import assert_matches_reference, assert_within_tolerance, value_and_gradients
from triton_st import ops
from triton_st.models import attention as attention_module
from triton_st.models.attention import AttentionPlan, BiasedAttention
from triton_st.models.functional import feed_forward, fixed_row, joined, linear

HALVES = [torch.float16, torch.bfloat16]


def _reference_linear(x, weight, bias):
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide), bias.to(wide)).to(x.dtype)


def _reference_feed_forward(x, w1, b1, w2):
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(F.gelu(F.linear(x.to(wide), w1.to(wide), b1.to(wide))), w2.to(wide)).to(x.dtype)


def _stored_feed_forward(x, *weights):
    return feed_forward(x, *weights).to(x.dtype)


def _assert_function(function, reference, inputs, dtype):
    """The tolerance rule; for half storage its forward, and each gradient to a few roundings of that storage.

    What is kept for backward is rounded to half, which the float32 gradient of a parameter shows.
    """
    if dtype == torch.float32:
        assert_matches_reference(function, reference, inputs)
        return
    wide = [x.double() for x in inputs]
    exact = reference(*wide)
    assert_within_tolerance(function(*inputs), exact, reference(*inputs), "result")
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    _, grads = value_and_gradients(function, inputs, grad)
    _, exact_grads = value_and_gradients(reference, wide, grad)
    for x, actual, wanted in zip(inputs, grads, exact_grads, strict=True):
        assert actual.dtype == x.dtype
        assert (actual.double() - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("tokens", "k", "n"), [(1, 50, 150), (37, 7, 1), (200, 384, 400)])
def test_linear(dtype, tokens, k, n):
    torch.manual_seed(0)
    inputs = [torch.randn(tokens, k).to(dtype), torch.randn(n, k) * k**-0.5, torch.randn(n)]
    _assert_function(linear, _reference_linear, inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_feed_forward(dtype):
    torch.manual_seed(0)
    shapes = [(37, 50), (200, 50), (200,), (50, 200)]
    x, *parameters = (torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 1) for shape in shapes)
    _assert_function(_stored_feed_forward, _reference_feed_forward, [x.to(dtype), *parameters], dtype)


def test_a_half_product_keeps_its_range_until_it_is_added():
    x = torch.full((2, 8), 60_000.0, dtype=torch.float16)
    wide = linear(x, torch.ones(3, 8), as_computed=True)
    assert wide.dtype == torch.float32
    assert torch.equal(wide, torch.full((2, 3), 480_000.0))
    assert torch.equal(linear(x, torch.ones(3, 8)), torch.full((2, 3), 65504.0, dtype=torch.float16))


def test_fixed_row_gets_no_gradient():
    table = torch.randn(5, 3, requires_grad=True)
    ids = torch.tensor([1, 2, 2])
    (gradient,) = torch.autograd.grad(fixed_row(table, 2, ids).sum(), table)
    assert torch.equal(gradient, torch.ones(5, 3).index_fill(0, torch.tensor(2), 0))
    assert fixed_row(table, None, ids) is table
    assert fixed_row(table, 3, ids) is table  # never looked up


def test_joined_parameters_lie_side_by_side():
    """Once laid out, parameters are joined without a copy, through an optimizer's steps and until they are moved."""
    torch.manual_seed(0)
    parts = [torch.nn.Parameter(torch.randn(n, 40)) for n in (300, 300, 300)]
    values = torch.cat([part.detach().clone() for part in parts])
    with torch.inference_mode():
        assert torch.equal(joined(*parts), values)
    assert all(not part.is_inference() for part in parts)
    first = joined(*parts)
    assert first.data_ptr() == parts[0].data_ptr() == joined(*parts).data_ptr()
    weight = torch.randn(900, 40)
    (first * weight).sum().backward()
    assert torch.equal(torch.cat([part.grad for part in parts]), weight)
    torch.optim.SGD(parts, lr=0.5).step()
    torch.testing.assert_close(joined(*parts), values - 0.5 * weight, rtol=0, atol=0)
    assert joined(*parts).data_ptr() == parts[0].data_ptr()
    parts[1].data = parts[1].data.clone()
    torch.testing.assert_close(joined(*parts), values - 0.5 * weight, rtol=0, atol=0)
    assert joined(*parts).data_ptr() == parts[0].data_ptr()


def test_biased_attention_has_the_gradients_of_the_drawn_mask():
    torch.manual_seed(0)
    plan = AttentionPlan.build([3, 0, 2], torch.device("cpu"))
    qkv = torch.randn(5, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    relative_bias = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor(5)
    assert torch.autograd.gradcheck(
        lambda t, bias: BiasedAttention(plan, bias)(t, 4, 0.3, seed, 8), (qkv, relative_bias)
    )


@given(st.lists(st.integers(0, 40), max_size=12))
@settings(max_examples=50, deadline=None)
def test_attention_plan_covers_every_token_once(lengths):
    plan = AttentionPlan.build(lengths, torch.device("cpu"))
    total = sum(lengths)
    assert plan.restore.shape == (total,)
    if total:
        laid = torch.cat([bucket.index for bucket in plan.buckets])
        assert torch.equal(laid[plan.restore], torch.arange(total))
        assert int((laid == total).sum()) == len(laid) - total  # the rest is padding
    for bucket in plan.buckets:
        real = bucket.index.view(bucket.rows, bucket.length) < total
        assert bool(real[:, 0].all())
        bias = torch.zeros(real.shape) if bucket.key_bias is None else bucket.key_bias[:, 0, 0]
        assert torch.equal(bias == 0, real)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(0, 2000))
@settings(max_examples=60, deadline=None)
def test_buckets_have_least_cost(lengths, bucket_cost):
    lengths = sorted(lengths)

    def cost(runs):
        return sum((end - start) * lengths[end - 1] ** 2 + bucket_cost for start, end in runs)

    def all_cuts():
        n = len(lengths)
        for bits in itertools.product([0, 1], repeat=n - 1):
            ends = [i + 1 for i, bit in enumerate(bits) if bit] + [n]
            yield list(itertools.pairwise([0, *ends]))

    previous = attention_module._BUCKET_COST
    attention_module._BUCKET_COST = bucket_cost
    try:
        runs = attention_module._cut(np.array(lengths))
    finally:
        attention_module._BUCKET_COST = previous
    assert cost(runs) == min(cost(cuts) for cuts in all_cuts())
    assert [i for start, end in runs for i in range(start, end)] == list(range(len(lengths)))


def test_a_second_derivative_is_an_error_and_not_zero():
    x = torch.randn(5, 6, requires_grad=True)
    square, ones = torch.randn(6, 6, requires_grad=True), torch.ones(6, requires_grad=True)
    plan = AttentionPlan.build([2, 3], torch.device("cpu"))
    functions = [
        lambda x: linear(x, square, ones),
        lambda x: feed_forward(x, square, ones, square),
        lambda x: fixed_row(x, 1, torch.tensor([1])),
        lambda x: BiasedAttention(plan, torch.zeros(2, 5))(x.view(5, 1, 2, 3).expand(5, 3, 2, 3), 3),
    ]
    for function in functions:
        (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_biased_attention_without_a_bias_is_packed_attention(dtype, dropout_p):
    """The same scores, and the same weights dropped, head by head and token by token."""
    lengths = [3, 1, 0, 17, 40, 2]
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 5, 10).to(dtype).requires_grad_()
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    seed = torch.tensor(-7)
    attention = BiasedAttention(AttentionPlan.build(lengths, qkv.device), torch.zeros(5, 81))
    found = attention(qkv, 41, dropout_p, seed, 16)
    wanted = ops.packed_attention(qkv, cu_seqlens, 41, dropout_p, seed, 16)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(found)
    (gradient,), (expected,) = (torch.autograd.grad(out, qkv, grad) for out in (found, wanted))
    torch.testing.assert_close(gradient, expected, rtol=4 * tolerance, atol=4 * tolerance)
