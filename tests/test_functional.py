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
from triton_st.models.functional import dropout, dropout_add_layer_norm, feed_forward, keep_mask, linear

HALVES = [torch.float16, torch.bfloat16]


def _reference_linear(x, weight, bias):
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide), bias.to(wide)).to(x.dtype)


def _reference_feed_forward(x, w1, b1, w2, b2):
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(F.gelu(F.linear(x.to(wide), w1.to(wide), b1.to(wide))), w2.to(wide), b2.to(wide)).to(x.dtype)


def _reference_add_layer_norm(x, residual, weight, bias):
    wide = torch.promote_types(residual.dtype, torch.float32)
    total = x.to(wide) + residual.to(wide)
    return F.layer_norm(total, weight.shape, weight.to(wide), bias.to(wide), 1e-12).to(residual.dtype)


def _add_layer_norm(x, residual, weight, bias):
    return dropout_add_layer_norm(x, residual, weight, bias, 1e-12)


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
    shapes = [(37, 50), (200, 50), (200,), (50, 200), (50,)]
    x, *parameters = (torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 1) for shape in shapes)
    inputs = [x.to(dtype), *parameters]
    _assert_function(feed_forward, _reference_feed_forward, inputs, dtype)
    with torch.no_grad():  # the path without a backward
        assert_within_tolerance(
            feed_forward(*inputs),
            _reference_feed_forward(*(t.double() for t in inputs)),
            _reference_feed_forward(*inputs),
            "inference",
        )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_add_layer_norm(dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(9, 50), torch.randn(9, 50).to(dtype), torch.randn(50), torch.randn(50)]
    _assert_function(_add_layer_norm, _reference_add_layer_norm, inputs, dtype)


def test_gradients_with_dropout_are_those_of_the_drawn_mask():
    torch.manual_seed(0)
    plan = AttentionPlan.build([3, 0, 2], torch.device("cpu"))
    qkv = torch.randn(5, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    x, residual = torch.randn(2, 5, 8, dtype=torch.float64).unbind()
    x.requires_grad_()
    residual.requires_grad_()
    weight, bias = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))

    seed = torch.tensor(5)
    relative_bias = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t, bias: BiasedAttention(plan, bias)(t, 4, 0.3, seed, 8), (qkv, relative_bias)
    )
    assert torch.autograd.gradcheck(lambda t: dropout(t, 0.3, seed), (x,))
    assert torch.autograd.gradcheck(
        lambda *args: dropout_add_layer_norm(*args, 1e-5, 0.3, seed), (x, residual, weight, bias)
    )


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_mask_has_its_rate_and_keeps_the_mean(p):
    mask, factor = keep_mask((1000, 1001), p, torch.tensor(3), 0, torch.device("cpu"))
    assert mask.double().mean().item() == pytest.approx(1 - p, abs=0.002)
    assert mask.double().mean(0).std() < 0.03  # no column is special: every one of a word's 16-bit parts is used
    if p < 1:
        assert factor == pytest.approx(1 / (1 - p), rel=1e-4)
    dropped = dropout(torch.ones(1000, 1001), p, torch.tensor(4))
    assert dropped.mean().item() == pytest.approx(0.0 if p == 1 else 1.0, abs=0.005)


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
        lambda x: feed_forward(x, square, ones, square, ones),
        lambda x: dropout(x, 0.5, torch.tensor(0)),
        lambda x: dropout_add_layer_norm(x, x, ones, ones, 1e-12),
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
