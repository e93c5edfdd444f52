"""How near a training step is to what its arithmetic takes at the fastest product's rate, and where the rest goes."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from bench import steps
from bench.products import onednn_product
from bench.training_worker import PRECISIONS
from triton_st import ops
from triton_st.models.packing import concatenate

ROUNDS = 5
PEAK_SHAPES = ((2048, 1024, 1024), (2048, 384, 1536), (4096, 512, 512))  # rows, inner, columns
OPERATORS_SHOWN = 7


def operations(lengths: Tensor, width: int, inner: int, layers: int, columns: int) -> dict[str, float]:
    """Multiplications and additions of one step, forward and backward; what is computed again is not counted.

    Args:
        lengths: tokens of every text.
        width: of the hidden states.
        inner: of the feed-forward block.
        layers: how many.
        columns: of the batch; the loss compares the first with all the others.
    """
    tokens, squares = float(lengths.sum()), float((lengths.double() ** 2).sum())
    queries = len(lengths) // columns
    documents = len(lengths) - queries
    return {  # backward has twice the products of forward: one for each operand's gradient
        "products": 3 * 2 * tokens * layers * (4 * width**2 + 2 * width * inner),
        "attention": 3 * 4 * squares * layers * width,
        "loss": 3 * 2.0 * queries * documents * width,
    }


def peak(dtype: torch.dtype) -> float:
    """Operations a second of oneDNN's products at the size that suits it best."""
    runs, counts = {}, {}
    for rows, inner, columns in PEAK_SHAPES:
        name = f"{rows}x{inner}x{columns}"
        found = onednn_product(torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype), 4)
        assert found is not None
        runs[name], counts[name] = found[1], 4 * 2.0 * rows * inner * columns
    seconds = steps.take_turns(runs, ROUNDS)
    return max(counts[name] / statistics.median(values) for name, values in seconds.items())


def products_alone(tokens: int, width: int, inner: int, layers: int, dtype: torch.dtype) -> float:
    """Seconds of a step's products by oneDNN at their own shapes, operands in place: forward, and both gradients."""
    total = 0.0
    for k, n in ((width, 3 * width), (width, width), (width, inner), (inner, width)):
        runs = {}
        for rows, depth, columns in ((tokens, k, n), (tokens, n, k), (n, tokens, k)):
            a, b = torch.randn(rows, depth, dtype=dtype), torch.randn(columns, depth, dtype=dtype)
            found = onednn_product(a, b, 1)
            assert found is not None
            runs[f"{rows}x{depth}x{columns}"] = found[1]
        total += sum(statistics.median(values) for values in steps.take_turns(runs, ROUNDS).values())
    return layers * total


def attention_alone(features: dict[str, Any], width: int, heads: int, layers: int, dtype: torch.dtype) -> float:
    """Seconds of attention with dropout, forward and backward, as an operator by itself."""
    tokens = features["input_ids"].numel()
    qkv = torch.randn(tokens, 3, heads, width // heads).to(dtype).requires_grad_()
    seed = torch.tensor(1)
    ones = torch.ones(tokens, width, dtype=dtype)

    def run() -> None:
        out = ops.packed_attention(qkv, features["cu_seqlens"], features["max_seqlen"], 0.1, seed)
        torch.autograd.grad(out, qkv, ones)

    return layers * statistics.median(steps.take_turns({"attention": run}, ROUNDS)["attention"])


def operators(step: steps.Step) -> dict[str, float]:
    """Share of a step's time that each operator takes by itself; the rest is Python."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu]) as profile, torch.profiler.record_function("python"):
        for _ in range(3):
            step()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(times.values())
    shown = sorted(times, key=times.__getitem__, reverse=True)[:OPERATORS_SHOWN]
    return {name: times[name] / total for name in shown}


def measure(contender: str, folder: str, texts: list[list[str]]) -> dict[str, Any]:
    """One training case of ours.

    Returns:
        Operations counted, oneDNN's best rate, seconds of the step, of the step without dropout, of its products and of
        its attention alone, and the share of each operator.
    """
    precision = PRECISIONS[contender]
    runs = {}
    for name, dropout in (("step", 0.1), ("without_dropout", 0.0)):
        model, loss = steps.load(contender, folder, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        columns = steps.features(model, texts)
        runs[name] = steps.training_step(model, loss, columns, precision, learning_rate=0.0)
    seconds = {name: statistics.median(values) for name, values in steps.take_turns(runs, 2 * ROUNDS).items()}
    features, config = concatenate(columns), model.encoder.config
    tokens = features["input_ids"].numel()
    shape = (config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    seconds["products_alone"] = products_alone(tokens, *shape, precision)
    seconds["attention_alone"] = attention_alone(
        features, config.hidden_size, config.num_attention_heads, config.num_hidden_layers, precision
    )
    counted = operations(features["cu_seqlens"].diff(), *shape, columns=len(texts))
    best = peak(precision)
    return {
        "tokens": tokens,
        "operations": counted,
        "peak": best,
        "seconds": seconds,
        "share": sum(counted.values()) / best / seconds["step"],
        "operators": operators(runs["step"]),
    }
