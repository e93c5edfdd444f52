"""The operators round LayerNorm against PyTorch's own functions, plain and by torch.compile.

`pytest bench/bench_layer_norm.py --benchmark-only`
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.conftest import DTYPES, Interleaved, Run, assert_close, dtype_name, training
from triton_st import ops

SHAPES = [(9042, 50), (9042, 384), (1500, 768), (12, 384)]
DROPOUT = 0.1
EPS = 1e-12
LENGTH = 24
VOCABULARY = 2000


def plain_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor, p: float) -> Tensor:
    """What BERT's output block does after its product, statistics in float32."""
    total = F.dropout(x + x_bias.to(x.dtype), p) + residual
    return F.layer_norm(total, total.shape[1:], weight.to(x.dtype), bias.to(x.dtype), EPS)


compiled_layer_norm = torch.compile(plain_layer_norm, dynamic=True)


def plain_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias.to(x.dtype))


compiled_gelu = torch.compile(plain_gelu, dynamic=True)


def runs(function: Callable[..., Tensor], arguments: list[Tensor], train: bool) -> Run:
    return training(function, *arguments) if train else lambda: function(*arguments)


every_direction = pytest.mark.parametrize("direction", ["forward", "forward and backward"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@every_direction
@every_dtype
@every_shape
def test_dropout_add_layer_norm(
    interleaved: Interleaved, shape: tuple[int, int], dtype: torch.dtype, direction: str, device: torch.device
) -> None:
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight, bias, x_bias = (torch.randn(shape[1], device=device) for _ in range(3))
    seed, train = torch.tensor(42, device=device), direction != "forward"
    arguments = [x, residual, weight, bias, x_bias]

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor, p: float = DROPOUT) -> Tensor:
        return ops.dropout_add_layer_norm(x, residual, weight, bias, EPS, x_bias=x_bias, dropout_p=p, seed=seed)

    with torch.set_grad_enabled(train):
        assert_close(ours(*arguments, p=0.0), plain_layer_norm(*(a.double() for a in arguments), p=0.0))
        peers = {
            "PyTorch": lambda *a: plain_layer_norm(*a, p=DROPOUT),
            "torch.compile": lambda *a: compiled_layer_norm(*a, p=DROPOUT),
        }
        interleaved(
            runs(ours, arguments, train),
            {name: runs(peer, arguments, train) for name, peer in peers.items()},
            operator="dropout_add_layer_norm",
            shape={"tokens": shape[0], "width": shape[1]},
            dtype=dtype_name(dtype),
            direction=direction,
        )


@every_direction
@every_dtype
@every_shape
def test_bias_gelu(
    interleaved: Interleaved, shape: tuple[int, int], dtype: torch.dtype, direction: str, device: torch.device
) -> None:
    x = torch.randn(shape[0], 4 * shape[1], device=device).to(dtype)
    bias, train = torch.randn(4 * shape[1], device=device), direction != "forward"
    with torch.set_grad_enabled(train):
        assert_close(ops.bias_gelu(x, bias), plain_gelu(x.double(), bias.double()))
        interleaved(
            runs(ops.bias_gelu, [x, bias], train),
            {"PyTorch": runs(plain_gelu, [x, bias], train), "torch.compile": runs(compiled_gelu, [x, bias], train)},
            operator="bias_gelu",
            shape={"tokens": shape[0], "width": 4 * shape[1]},
            dtype=dtype_name(dtype),
            direction=direction,
        )


@every_direction
@every_shape
def test_embedding_layer_norm(
    interleaved: Interleaved, shape: tuple[int, int], direction: str, device: torch.device
) -> None:
    tokens, width = shape
    input_ids = torch.randint(VOCABULARY, (tokens,), device=device)
    offsets = torch.arange(0, tokens + LENGTH, LENGTH, device=device).clamp_max(tokens)
    positions = torch.arange(tokens, device=device) % LENGTH
    tables = [torch.randn(rows, width, device=device) for rows in (VOCABULARY, 512, 2)]
    weight, bias = torch.randn(width, device=device), torch.randn(width, device=device)
    seed, train = torch.tensor(42, device=device), direction != "forward"
    arguments = [*tables, weight, bias]

    def ours(word: Tensor, position: Tensor, kind: Tensor, weight: Tensor, bias: Tensor, p: float = DROPOUT) -> Tensor:
        return ops.embedding_layer_norm(
            input_ids, offsets, word, position, kind, weight, bias, EPS, dropout_p=p, seed=seed
        )

    def plain(word: Tensor, position: Tensor, kind: Tensor, weight: Tensor, bias: Tensor, p: float = DROPOUT) -> Tensor:
        total = F.embedding(input_ids, word) + F.embedding(positions, position) + kind[0]
        return F.dropout(F.layer_norm(total, (width,), weight, bias, EPS), p)

    with torch.set_grad_enabled(train):
        assert_close(ours(*arguments, p=0.0), plain(*(a.double() for a in arguments), p=0.0))
        interleaved(
            runs(ours, arguments, train),
            {"PyTorch": runs(plain, arguments, train)},
            operator="embedding_layer_norm",
            shape={"tokens": tokens, "width": width, "vocabulary": VOCABULARY},
            dtype="float32",
            direction=direction,
        )


@every_direction
@every_dtype
@every_shape
def test_layer_norm_mean_pool(
    interleaved: Interleaved, shape: tuple[int, int], dtype: torch.dtype, direction: str, device: torch.device
) -> None:
    tokens, width = shape
    offsets = torch.tensor([*itertools.chain(range(0, tokens, LENGTH), [tokens])], dtype=torch.int32, device=device)
    lengths = offsets.diff()
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight, bias, x_bias = (torch.randn(width, device=device) for _ in range(3))
    seed, train = torch.tensor(42, device=device), direction != "forward"
    arguments = [x, residual, weight, bias, x_bias]

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor, p: float = DROPOUT) -> Tensor:
        return ops.layer_norm_mean_pool(x, residual, weight, bias, EPS, offsets, x_bias=x_bias, dropout_p=p, seed=seed)

    def plain(*arguments: Tensor, p: float = DROPOUT) -> Tensor:
        hidden = plain_layer_norm(*arguments, p=p)
        return torch.segment_reduce(hidden.float(), "mean", lengths=lengths.long(), unsafe=True).to(hidden.dtype)

    with torch.set_grad_enabled(train):
        exact = plain_layer_norm(*(a.double() for a in arguments), p=0.0)
        exact = torch.segment_reduce(exact, "mean", lengths=lengths.long(), unsafe=True)
        assert_close(ours(*arguments, p=0.0), exact)
        interleaved(
            runs(ours, arguments, train),
            {"PyTorch": runs(plain, arguments, train)},
            operator="layer_norm_mean_pool",
            shape={"tokens": tokens, "width": width},
            dtype=dtype_name(dtype),
            direction=direction,
        )
