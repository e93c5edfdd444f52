"""Every legal combination of mnrl_loss's options against a plain oracle: value and every gradient, on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mnrl_oracle import Undecided, mnrl_oracle
from serving import serving
from tolerance import value_and_gradients
from torch import Tensor

from triton_st import ops

DIRECTIONS = ["query_to_query", "doc_to_query", "doc_to_doc"]
EPS = torch.finfo(torch.float32).eps


@st.composite
def cases(draw: st.DrawFn, batches: int = 9, widths: int = 40) -> tuple[list[Tensor], Any, dict[str, Any]]:
    """Draw float tensors, a function from these to `mnrl_loss`'s arguments by name, and the other arguments."""
    form = draw(st.sampled_from(["batch", "batch", "gathered", "targets"]))
    b, d = draw(st.integers(1, batches)), draw(st.integers(1, widths))
    w = b + draw(st.integers(1, 5)) if form == "gathered" else b
    m = draw(st.integers(1, 3 * batches)) if form == "targets" else w * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    queries = torch.randn(w, d, generator=generator)
    documents = torch.randn(m, d, generator=generator)
    documents[: min(m, w)] += queries[: min(m, w)]
    cosine = draw(st.booleans())
    if not cosine:
        queries, documents = queries / d**0.5, documents / d**0.5
    floats = {"queries": queries, "documents": documents}
    options: dict[str, Any] = {"similarity": "cos_sim" if cosine else "dot"}
    start = draw(st.integers(0, w - b))
    if form == "targets":
        options["targets"] = torch.randint(m, (b,), generator=generator)
    else:
        directions = [name for name in DIRECTIONS if draw(st.booleans())]
        options["directions"] = ("query_to_doc", *directions)
        if set(directions) <= {"doc_to_query"}:
            options["partition_mode"] = draw(st.sampled_from(["joint", "per_direction"]))
    modes = [None, "in_batch_negatives", "all_negatives"] + ["hard_negatives"] * (form != "targets")
    options["hardness_mode"] = draw(st.sampled_from(modes))
    options["hardness_strength"] = draw(st.sampled_from([0.0, 2.5]))
    if draw(st.booleans()):
        ids = torch.randint(draw(st.sampled_from([3, 12, 100])), (w + m,), generator=generator) - 1
        options["query_ids"], options["document_ids"] = ids[start : start + b], ids[w:]
        if form == "gathered":
            options["all_query_ids"] = ids[:w]
    if draw(st.booleans()):
        options["margin"] = draw(st.sampled_from([-0.3, 0.0, 0.05, 0.4]))
        options["margin_strategy"] = draw(st.sampled_from(["absolute", "relative"]))
    if draw(st.booleans()):
        dims = sorted(draw(st.sets(st.integers(1, d), min_size=1, max_size=4)))
        options["matryoshka_dims"] = dims
        options["matryoshka_weights"] = draw(st.none() | st.just([0.5 + i for i in range(len(dims))]))
    options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    scale = draw(st.sampled_from(["number", "tensor", "rows"]))
    if scale == "number":
        options["scale"] = draw(st.sampled_from([1.0, 20.0]))
    else:
        floats["scale"] = 1 + 9 * torch.rand(() if scale == "tensor" else (b,), generator=generator)
    if draw(st.booleans()):
        floats["weights"] = torch.rand(b, generator=generator) + 0.1

    def arguments(*leaves: Tensor) -> dict[str, Any]:
        given_now: dict[str, Any] = dict(zip(floats, leaves, strict=True))
        if form == "gathered":
            given_now["all_queries"] = given_now["queries"]
            given_now["queries"] = given_now["queries"][start : start + b]
            given_now["targets"] = start
        return given_now

    return list(floats.values()), arguments, options


def assert_right(case: tuple[list[Tensor], Any, dict[str, Any]], dtype: torch.dtype) -> None:
    """The tolerance rule; a logit's rounding, which nobody can avoid, enters every number times the scale."""
    floats, arguments, options = case
    inputs = [x.to(dtype) if x.dim() == 2 else x for x in floats]

    def run(function: Any) -> Any:
        return lambda *leaves: function(**arguments(*leaves), **options)

    try:
        wide = [x.double() for x in inputs]
        seed = torch.randn(run(mnrl_oracle)(*inputs).shape, generator=torch.Generator().manual_seed(0))
        exact, exact_grads = value_and_gradients(run(mnrl_oracle), wide, seed)
        plain, plain_grads = value_and_gradients(run(mnrl_oracle), inputs, seed)
    except Undecided:
        assume(False)
    actual, actual_grads = value_and_gradients(run(ops.mnrl_loss), inputs, seed)
    size = 1.0 if options["similarity"] == "cos_sim" else _largest(inputs[0].float() @ inputs[1].float().T)
    logit = size * (options["scale"] if "scale" in options else _largest(inputs[2])) * seed.abs().max().item()
    _close(actual, exact, plain, "loss", max(1.0, logit))
    for i, grads in enumerate(zip(actual_grads, exact_grads, plain_grads, strict=True)):
        # A gradient of scale or weights is a small difference of similarities or losses.
        _close(*grads, f"gradient of input {i}", max(1.0, logit), 0.01 if i < 2 else 1.0)


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _close(actual: Tensor, exact: Tensor, plain: Tensor, what: str, logit: float, magnitude: float = 1.0) -> None:
    assert actual.dtype == plain.dtype, what
    assert actual.shape == exact.shape, what
    error = (actual.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item()
    largest = _largest(exact)
    floor = 4 * torch.finfo(plain.dtype).eps * largest + 4 * EPS * logit * max(largest, magnitude)
    assert math.isfinite(error), f"{what}: not finite"
    assert error <= allowed + floor, f"{what}: error {error:.3e} against float64 exceeds {allowed + floor:.3e}"


HYPOTHESIS = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.mark.parametrize("name", ["cpp", "reference"])
@HYPOTHESIS
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_any_combination(name: str, case: Any, dtype: torch.dtype) -> None:
    with serving(name, "mnrl_rows"):
        assert_right(case, dtype)


@settings(HYPOTHESIS, max_examples=25)
@given(case=cases(batches=5, widths=20), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_any_combination_in_triton(case: Any, dtype: torch.dtype) -> None:
    with serving("triton", "mnrl_rows"):
        assert_right(case, dtype)
