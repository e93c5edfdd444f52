"""The encoder's Triton kernels against the specification, and what only they have: shared tiles, slots, carries, parts.

Interpreted where there is no GPU, so shapes are small. The tests of each operator (schemas, gradients, bad input) run
on every backend and are elsewhere.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from serving import serving
from tolerance import assert_within_tolerance
from torch import Tensor

from triton_st import kernels
from triton_st.kernels import common
from triton_st.kernels.common import Tile, launch
from triton_st.kernels.layer_norm import RowTile
from triton_st.kernels.philox import dropout_arguments, keep_rows
from triton_st.kernels.segments import segment_sums
from triton_st.kernels.storing import saturate
from triton_st.kernels.sums import sum_parts
from triton_st.reference.philox import keep_mask

OPERATORS = ("packed_attention", "dropout_add_layer_norm", "embedding_layer_norm", "layer_norm_mean_pool", "bias_gelu")
reference = {name: importlib.import_module(f"triton_st.reference.{name}") for name in OPERATORS}
attention_module = importlib.import_module("triton_st.kernels.packed_attention")
pool_module = importlib.import_module("triton_st.kernels.layer_norm_mean_pool")

half_and_single = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
dropouts = pytest.mark.parametrize("dropout_p", [0.0, 0.3])
LENGTHS = [3, 17, 0, 1, 70, 5, 5, 9]


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def widened(arguments: Sequence[Any]) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]


def assert_as_specified(
    operator: str, name: str, arguments: Sequence[Any], rounded: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Every result of kernel `name` obeys the tolerance rule, rounded to that dtype if one is given; returns them."""
    specified: Callable[..., Any] = getattr(reference[operator], name)
    with serving("triton", name, device=arguments[0].device):
        actual = getattr(kernels, name)(*arguments)
    exact_arguments = widened(arguments)
    if operator == "embedding_layer_norm" and name.endswith("forward"):
        exact_arguments[-1] = torch.float64
    results = [actual, specified(*exact_arguments), specified(*arguments)]
    actual, exact, plain = (x if isinstance(x, tuple) else (x,) for x in results)
    for i, (a, e, p) in enumerate(zip(actual, exact, plain, strict=True)):
        assert_within_tolerance(a.to(rounded or a.dtype), e, p.to(rounded or p.dtype), f"{name}, result {i}")
    return actual


def seed_tensor(device: torch.device, value: int = -123456789012345) -> Tensor:
    return torch.tensor(value, device=device)


@triton.jit(do_not_specialize=["threshold", "stream"])
def keep_kernel(
    out, seed, threshold, factor, stream, first, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = first + tl.arange(0, BLOCK_R)
    kept = keep_rows(tl.load(seed), stream, threshold, row, D, BLOCK_R, BLOCK_D)
    at = out + tl.arange(0, BLOCK_R)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(at, kept.to(tl.int32))


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 0x123456789ABCDEF])
@pytest.mark.parametrize("dropout_p", [0.1, 0.75, 1 - 2**-33])
@pytest.mark.parametrize("first", [0, 2**34])
def test_dropout_bits_are_the_specified_ones(seed: int, dropout_p: float, first: int, device: torch.device) -> None:
    """Thresholds past 2^31, seeds of all signs, and rows whose groups need the counter's high word."""
    width, rows, stream = 30, 8, 2**31 + 5
    key = seed_tensor(device, seed)
    out = torch.empty(rows, 32, dtype=torch.int32, device=device)
    launch(
        keep_kernel, (1,), out=out, **dropout_arguments(dropout_p, key, stream), first=first,
        D=width, BLOCK_R=rows, BLOCK_D=32,
    )  # fmt: skip
    numbers = torch.arange(first, first + rows, device=device)
    assert torch.equal(out[:, :width] != 0, keep_mask(key, stream, numbers, width, width, dropout_p))


def test_all_is_dropped_where_p_is_one(device: torch.device) -> None:
    qkv, cu_seqlens = randn(9, 3, 2, 8, device=device), cumulative([4, 5], device)
    out, logsumexp = kernels.packed_attention_forward(qkv, cu_seqlens, seed_tensor(device), 5, 1.0, 0)
    assert not out.any()
    assert logsumexp.isfinite().all()
    grad = torch.ones_like(out)
    settings = (cu_seqlens, seed_tensor(device), 5, 1.0, 0)
    assert not kernels.packed_attention_backward(grad, qkv, out, logsumexp, *settings)[0].any()


@half_and_single
@dropouts
@pytest.mark.parametrize(
    ("heads", "size", "lengths"),
    [(2, 10, LENGTHS), (2, 32, [3, 17, 0, 1, 9]), (1, 64, [70]), (3, 5, [1]), (1, 128, [33, 31]), (2, 1, [2, 0, 0, 3])],
    ids=str,
)
def test_attention(
    heads: int, size: int, lengths: list[int], dropout_p: float, dtype: torch.dtype, device: torch.device
) -> None:
    tokens, longest, cu_seqlens = sum(lengths), max(lengths), cumulative(lengths, device)
    qkv = randn(tokens, 3, heads, size, dtype=dtype, device=device)
    grad = randn(tokens, heads * size, dtype=dtype, device=device, seed=1)
    biases = [None, randn(heads, 2 * longest + 1, device=device, seed=2)]
    for bias in biases[: min(longest, 2)]:  # a lone token's is a difference of equal numbers
        settings = cu_seqlens, seed_tensor(device), longest + 2, dropout_p, 13, bias
        out, logsumexp = assert_as_specified("packed_attention", "packed_attention_forward", (qkv, *settings))
        backward = (grad, qkv, out, logsumexp, *settings)
        # The bias's gradient is float32, of results that were rounded to half.
        assert_as_specified("packed_attention", "packed_attention_backward", backward, rounded=dtype)


@dropouts
def test_small_tiles_agree(dropout_p: float, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles in both directions, tiles that begin and end within sequences, and with the slots' padding."""
    lengths = [1, 2, 3, 4, 17, 21, 7]
    monkeypatch.setattr(attention_module, "_tile", lambda *shape, **options: Tile(16, 16, 16, 4, 1))
    test_attention(1, 7, lengths, dropout_p, torch.float32, device)


def test_attention_of_tiny_gradients_in_half(device: torch.device) -> None:
    """Scores' gradients below 2^-24 would vanish in half; they are formed at a size that suits it."""
    lengths = [40, 24]
    qkv = 2 * randn(64, 3, 2, 32, device=device)
    qkv, cu_seqlens = qkv.half(), cumulative(lengths, device)
    out, logsumexp = kernels.packed_attention_forward(qkv, cu_seqlens, None, 40, 0.0, 0)
    grad = (2.0**-15 * randn(64, 64, device=device)).half()
    assert_as_specified(
        "packed_attention", "packed_attention_backward", (grad, qkv, out, logsumexp, cu_seqlens, None, 40, 0.0, 0)
    )


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_attention_at_extreme_scores(scale: float, device: torch.device) -> None:
    """Uniform weights, and weights that are one or nothing: logits past 1,000."""
    qkv, cu_seqlens = randn(50, 3, 1, 16, device=device), cumulative([20, 30], device)
    qkv[:, :2] *= scale
    arguments = qkv, cu_seqlens, None, 30, 0.0, 0
    out, logsumexp = assert_as_specified("packed_attention", "packed_attention_forward", arguments)
    assert out.isfinite().all()
    assert logsumexp.isfinite().all()


@dropouts
def test_one_sequence_changes_no_bit_of_the_others(dropout_p: float, device: torch.device) -> None:
    """Sequences of one tile, forward and in all gradients; and a NaN stays one where it came in."""
    lengths = [10, 9, 20, 1]
    cu_seqlens, rest = cumulative(lengths, device), torch.ones(40, dtype=torch.bool, device=device)
    rest[10:19] = False
    settings = cu_seqlens, seed_tensor(device), 20, dropout_p, 5
    clean, grad = randn(40, 3, 2, 16, device=device), randn(40, 32, device=device, seed=1)
    results = []
    for factor in (1.0, 1e4, float("nan")):
        qkv, g = (torch.where(rest.view(40, *[1] * (x.dim() - 1)), x, x * factor) for x in (clean, grad))
        out, logsumexp = kernels.packed_attention_forward(qkv, *settings)
        results.append((out, kernels.packed_attention_backward(g, qkv, out, logsumexp, *settings)[0]))
    for expected, changed, spoiled in zip(*results, strict=True):
        assert torch.equal(changed[rest], expected[rest])
        assert not torch.equal(changed[~rest], expected[~rest])
        assert spoiled[~rest].isnan().all()


def parameters(d: int, device: torch.device) -> list[Tensor]:
    return [1 + 0.2 * randn(d, device=device, seed=1), randn(d, device=device, seed=2), randn(d, device=device, seed=3)]


@half_and_single
@pytest.mark.parametrize(("tokens", "d"), [(37, 50), (1, 1), (5, 384), (3, 1030)], ids=str)
@pytest.mark.parametrize(("with_bias", "dropout_p"), [(True, 0.3), (False, 0.0)], ids=["x_bias", "no x_bias"])
def test_dropout_add_layer_norm(
    tokens: int, d: int, with_bias: bool, dropout_p: float, dtype: torch.dtype, device: torch.device
) -> None:
    weight, bias, x_bias = parameters(d, device)
    # as a product leaves it: float32
    x = randn(tokens, d, dtype=torch.float32 if with_bias else dtype, device=device)
    residual = 3 * randn(tokens, d, dtype=dtype, device=device, seed=4)
    seed, offset = seed_tensor(device), x_bias if with_bias else None
    _, mean, rstd = assert_as_specified(
        "dropout_add_layer_norm",
        "dropout_add_layer_norm_forward",
        (x, residual, weight, bias, offset, seed, 1e-12 if d > 1 else 1e-5, dropout_p, 3),
    )
    grad = randn(tokens, d, dtype=dtype, device=device, seed=5)
    assert_as_specified(
        "dropout_add_layer_norm",
        "dropout_add_layer_norm_backward",
        (grad, x, residual, weight, mean, rstd, offset, seed, dropout_p, 3),
    )


@half_and_single
@pytest.mark.parametrize(("normalize", "dropout_p"), [(True, 0.3), (False, 0.0)], ids=["unit", "mean"])
@pytest.mark.parametrize(("d", "lengths"), [(50, [3, 0, 21, 1]), (384, [3, 0, 6, 1])], ids=str)
def test_layer_norm_mean_pool(
    d: int, lengths: list[int], normalize: bool, dropout_p: float, dtype: torch.dtype, device: torch.device
) -> None:
    tokens, cu_seqlens, seed = sum(lengths), cumulative(lengths, device), seed_tensor(device)
    weight, bias, x_bias = parameters(d, device)
    x, residual = (randn(tokens, d, dtype=dtype, device=device, seed=i) for i in (4, 5))
    operator = "layer_norm_mean_pool"
    _, pooled, mean, rstd = assert_as_specified(
        operator,
        "layer_norm_mean_pool_forward",
        (x, residual, weight, bias, cu_seqlens, x_bias, seed, 1e-12, dropout_p, 3, normalize),
    )
    grad = randn(len(lengths), d, dtype=dtype, device=device, seed=6)
    inputs = grad, x, residual, weight, pooled, mean, rstd, cu_seqlens
    for offset in (x_bias, None):
        assert_as_specified(operator, "layer_norm_mean_pool_backward", (*inputs, offset, seed, dropout_p, 3, normalize))


def test_long_sequences_are_pooled_in_parts(device: torch.device) -> None:
    lengths = [200, 3]
    assert pool_module._parts(203, 2, RowTile.of(20)) > 1
    weight, bias, x_bias = parameters(20, device)
    x, residual = (randn(203, 20, device=device, seed=i) for i in (4, 5))
    arguments = x, residual, weight, bias, cumulative(lengths, device), x_bias, None, 1e-12, 0.0, 0, True
    assert_as_specified("layer_norm_mean_pool", "layer_norm_mean_pool_forward", arguments)


@half_and_single
@pytest.mark.parametrize(("kinds", "dropout_p"), [("none", 0.0), ("zeros", 0.3), ("given", 0.3)])
def test_embedding_layer_norm(kinds: str, dropout_p: float, dtype: torch.dtype, device: torch.device) -> None:
    """A few ids many times, many ids never; a run of equal ids longer than a chunk; positions that nobody reaches."""
    lengths, d, offset = [3, 0, 40, 1, 0, 60], 50, 2
    tokens, cu_seqlens, seed = sum(lengths), cumulative(lengths, device), seed_tensor(device)
    ids = torch.randint(0, 40, (tokens,), generator=torch.Generator().manual_seed(0)).to(device)
    ids[::2] = 7
    types = None if kinds == "none" else randn(3, d, device=device)
    type_ids = ids % 3 if kinds == "given" else None
    word, position = randn(40, d, device=device), randn(70, d, device=device)
    weight, bias, _ = parameters(d, device)
    operator, where = "embedding_layer_norm", (ids, cu_seqlens, type_ids, seed, offset)
    _, mean, rstd = assert_as_specified(
        operator,
        "embedding_layer_norm_forward",
        (word, position, types, weight, bias, *where, 1e-12, dropout_p, 3, dtype),
    )
    grad = randn(tokens, d, dtype=dtype, device=device, seed=6)
    assert_as_specified(
        operator,
        "embedding_layer_norm_backward",
        (grad, word, position, types, weight, mean, rstd, *where, dropout_p, 3),
    )


def test_an_id_outside_its_table_is_nan_and_touches_nothing_else(device: torch.device) -> None:
    word, position = randn(10, 16, device=device), randn(8, 16, device=device)
    weight, bias, _ = parameters(16, device)
    ids = torch.tensor([1, 10, 3, -1, 2], device=device)
    where = ids, cumulative([5], device), None, None, 0
    out, mean, rstd = kernels.embedding_layer_norm_forward(
        word, position, None, weight, bias, *where, 1e-12, 0.0, 0, torch.float32
    )
    assert out.isnan().any(1).tolist() == [False, True, False, True, False]
    grad_word, *_ = kernels.embedding_layer_norm_backward(
        torch.ones_like(out), word, position, None, weight, mean, rstd, *where, 0.0, 0
    )
    assert grad_word.shape == word.shape


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 200, 1100])
def test_runs_of_equal_keys(count: int, device: torch.device) -> None:
    """Runs that end with a chunk, fill several, and one that needs more carries than are added at a time."""
    rows = torch.arange(3.0 * count, device=device).view(count, 3)
    place = torch.arange(count)
    for keys in (torch.zeros(count), place // 32, place % 5, place // 50 * 2)[: 1 if count > 1000 else None]:
        keys = keys.long().to(device)
        results = int(keys.max()) + 1
        expected = torch.zeros(results, 3, device=device).index_add_(0, keys, rows)
        assert torch.equal(segment_sums(rows, keys, results), expected)  # whole numbers: sums are exact
        fewer = segment_sums(rows, keys, results - 1)
        assert torch.equal(fewer, expected[:-1])


def test_parts_are_added_up(device: torch.device) -> None:
    parts = torch.arange(70 * 3 * 50.0, device=device).view(70, 3, 50)
    assert torch.equal(sum_parts(parts), parts.sum(0))
    assert not sum_parts(parts[:0]).any()


@half_and_single
@pytest.mark.parametrize(("tokens", "n"), [(40, 200), (3, 7), (300, 1)], ids=str)
def test_bias_gelu(tokens: int, n: int, dtype: torch.dtype, device: torch.device) -> None:
    x, bias = 3 * randn(tokens, n, dtype=dtype, device=device), randn(n, device=device, seed=1)
    assert_as_specified("bias_gelu", "bias_gelu", (x, bias))
    assert_as_specified("bias_gelu", "bias_gelu_backward", (randn(tokens, n, dtype=dtype, device=device), x, bias))


@triton.jit
def saturate_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, saturate(tl.load(x + at), out.dtype.element_ty))


def test_what_is_finite_stays_finite_in_half(device: torch.device) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([1e6, -1e6, inf, -inf, nan, 1.0, 65504.0, -65519.0], device=device)
    out = torch.empty(8, dtype=torch.float16, device=device)
    launch(saturate_kernel, (1,), x=x, out=out, BLOCK=8)
    expected = torch.tensor([65504, -65504, inf, -inf, nan, 1, 65504, -65504], dtype=torch.float16, device=device)
    assert torch.equal(out.nan_to_num(nan=7), expected.nan_to_num(nan=7))


def test_repeats_bit_for_bit_and_reads_strided_input(device: torch.device) -> None:
    tokens, cu_seqlens, seed = 30, cumulative([11, 19], device), seed_tensor(device)
    qkv = randn(tokens, 3, 2, 20, device=device)
    out, logsumexp = kernels.packed_attention_forward(qkv, cu_seqlens, seed, 19, 0.1, 0)
    strided = qkv.transpose(2, 3).contiguous().transpose(2, 3)
    again, _ = kernels.packed_attention_forward(strided, cu_seqlens.long(), seed, 19, 0.1, 0)
    assert not strided.is_contiguous()
    assert torch.equal(out, again)
    grads = [
        kernels.packed_attention_backward(g, q, out, logsumexp, cu_seqlens, seed, 19, 0.1, 0)[0]
        for q, g in ((qkv, out), (strided, out.t().contiguous().t()))
    ]
    assert torch.equal(*grads)


def test_empty_batches(device: torch.device) -> None:
    for lengths in ([], [0, 0]):
        cu_seqlens, batch = cumulative(lengths, device), len(lengths)
        nothing, weight = torch.empty(0, 6, device=device), torch.ones(6, device=device)
        row = torch.empty(0, device=device)
        out, logsumexp = kernels.packed_attention_forward(nothing.view(0, 3, 1, 2), cu_seqlens, None, 0, 0.0, 0)
        assert out.shape == (0, 2)
        assert logsumexp.shape == (1, 0)
        for bias in (None, torch.ones(1, 5, device=device)):
            grad, grad_bias = kernels.packed_attention_backward(
                out, nothing.view(0, 3, 1, 2), out, logsumexp, cu_seqlens, None, 0, 0.0, 0, bias
            )
            assert grad.shape == (0, 3, 1, 2)
            assert grad_bias.shape == (1, 0 if bias is None else 5)
            assert not grad_bias.any()
        pooled = kernels.layer_norm_mean_pool_forward(
            nothing, nothing, weight, weight, cu_seqlens, None, None, 1e-12, 0.0, 0, True
        )
        assert pooled[0].shape == (batch, 6)
        assert not pooled[0].any()
        grads = kernels.layer_norm_mean_pool_backward(
            pooled[0], nothing, nothing, weight, pooled[1], row, row, cu_seqlens, None, None, 0.0, 0, True
        )
        assert not grads[2].any()
        assert not grads[3].any()
        grads = kernels.dropout_add_layer_norm_backward(
            nothing, nothing, nothing, weight, row, row, weight, None, 0.0, 0
        )
        assert all(grads[i].shape == (6,) and not grads[i].any() for i in (2, 3, 4))
        ids, tables = torch.empty(0, dtype=torch.int64, device=device), (torch.ones(3, 6, device=device),) * 3
        grads = kernels.embedding_layer_norm_backward(
            nothing, *tables, weight, row, row, ids, cu_seqlens, None, None, 0, 0.0, 0
        )
        assert all(not grad.any() for grad in grads)
        grad_x, grad_bias = kernels.bias_gelu_backward(nothing, nothing, weight)
        assert grad_x.shape == (0, 6)
        assert not grad_bias.any()


def test_launches_follow_from_shapes_alone() -> None:
    """Meta tensors have no values: were one read, this would fail."""
    for d in (50, 384):
        for name in OPERATORS:
            module = importlib.import_module(f"triton_st.kernels.{name}")
            for launcher, arguments in module.examples(torch.float16, d):
                with common.recording("cuda") as launches:
                    launcher(*arguments)
                assert launches
