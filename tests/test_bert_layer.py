"""A whole transformer layer in one operator, against its specification and against the operators it is composed of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.lesser import lesser_forms
from tests.serving import every_backend, every_dtype, interpreted, serving, threads
from tests.test_extension import finish, start
from tests.tolerance import assert_matches_reference
from triton_st import backend, ops, reference
from triton_st.ops.bert_layer import BertLayerParameters

SEED = torch.tensor(12345678901234)
# hidden, inner, heads, lengths
SMALL = (12, 20, 3, [5, 1, 3])
CASES = [
    SMALL,
    (50, 200, 5, [7, 1, 23, 0, 40, 3]),
    (7, 13, 1, [60, 2]),
    (33, 70, 3, [250, 2, 191, 192, 17]),  # longer than what goes through products together
    (272, 800, 4, [33, 1, 100]),  # weights' gradients by blocks
    (264, 900, 3, [1300, 1100]),  # and in several parts
    (50, 200, 5, [512]),
]


def layer_inputs(case: tuple[int, int, int, list[int]], dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    hidden, inner, _, lengths = case
    generator = torch.Generator().manual_seed(hidden)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    parameters = []
    for name in BertLayerParameters._fields:
        rows = {"qkv": 3 * hidden, "up": inner}.get(name.split("_")[0], hidden)
        columns = inner if name == "down_weight" else hidden
        if name.endswith("norm_weight"):
            parameters.append(1 + normal(hidden, scale=0.3))
        elif name.endswith("bias"):
            parameters.append(normal(rows, scale=0.3))
        else:
            parameters.append(normal(rows, columns, scale=columns**-0.5))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return normal(sum(lengths), hidden, scale=1.0).to(dtype), cu_seqlens, parameters


def layer(
    function: Callable[..., Tensor], case: tuple[int, int, int, list[int]], cu_seqlens: Tensor, p: float = 0.1
) -> Callable[..., Tensor]:
    """`function` of hidden and the parameters alone."""

    def run(hidden: Tensor, *parameters: Tensor) -> Tensor:
        return function(
            hidden,
            cu_seqlens,
            max(case[3], default=1),
            BertLayerParameters(*parameters),
            case[2],
            1e-12,
            attention_dropout_p=p,
            projection_dropout_p=p / 2,
            hidden_dropout_p=p,
            seed=SEED,
            stream=8,
        )

    return run


def biased(
    function: Callable[..., Tensor], case: tuple[int, int, int, list[int]], cu_seqlens: Tensor
) -> Callable[..., Tensor]:
    """As `layer`, with a bias by relative position before the parameters, in hidden's dtype: see packed_attention's."""

    def run(hidden: Tensor, bias: Tensor, *parameters: Tensor) -> Tensor:
        wide = bias.to(torch.promote_types(hidden.dtype, torch.float32))
        return layer(functools.partial(function, relative_bias=wide), case, cu_seqlens)(hidden, *parameters)

    return run


def bias_of(case: tuple[int, int, int, list[int]], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(case[2], 2 * max(case[3]) + 3, generator=generator).to(dtype)


def gradients(function: Callable[..., Tensor], hidden: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (hidden, *parameters)]
    result = function(*leaves)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, weights)]


@every_backend
@every_dtype
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_values_and_gradients(
    name: str, dtype: torch.dtype, case: tuple[int, int, int, list[int]], p: float, device: torch.device
) -> None:
    if interpreted(name, device) and case != SMALL:
        pytest.skip("the interpreter is slow: one small case")
    if name == "triton" and dtype != torch.float32:
        pytest.skip("a layer of operators rounds at each of them, which have tests of their own")
    if name == "reference" and sum(case[3]) > 500:
        pytest.skip("the reference is held to itself on small cases")
    hidden, cu_seqlens, parameters = layer_inputs(case, dtype)
    with serving(name, "dropout_add_layer_norm_forward" if name == "triton" else "bert_layer_forward", dtype, device):
        assert_matches_reference(
            layer(ops.bert_layer, case, cu_seqlens, p),
            layer(reference.bert_layer, case, cu_seqlens, p),
            [hidden, *parameters],
        )


@every_backend
@every_dtype
@pytest.mark.parametrize("case", [SMALL, CASES[1], CASES[4], CASES[6]], ids=lambda case: f"{case[0]}-{max(case[3])}")
def test_pooled_values_and_gradients(
    name: str, dtype: torch.dtype, case: tuple[int, int, int, list[int]], device: torch.device
) -> None:
    """All tokens of a sequence have the same gradient: its sums lose digits where they add row to row."""
    if interpreted(name, device) and case != SMALL:
        pytest.skip("the interpreter is slow: one small case")
    if name == "triton" and dtype != torch.float32:
        pytest.skip("a layer of operators rounds at each of them, which have tests of their own")
    hidden, cu_seqlens, parameters = layer_inputs(case, dtype)

    def specified(*arguments: Any, **settings: Any) -> Tensor:
        states = reference.bert_layer(*arguments, **settings)
        return reference.packed_mean_pool(states, cu_seqlens)

    with serving(name, "layer_norm_mean_pool_forward" if name == "triton" else "bert_layer_forward", dtype, device):
        assert_matches_reference(
            layer(functools.partial(ops.bert_layer, pool=True), case, cu_seqlens),
            layer(specified, case, cu_seqlens),
            [hidden, *parameters],
        )


@every_backend
@every_dtype
@pytest.mark.parametrize("case", [SMALL, CASES[1], CASES[3], CASES[4]], ids=lambda case: f"{case[0]}-{max(case[3])}")
def test_bias_by_relative_position(
    name: str, dtype: torch.dtype, case: tuple[int, int, int, list[int]], device: torch.device
) -> None:
    if interpreted(name, device) and case != SMALL:
        pytest.skip("the interpreter is slow: one small case")
    if name == "triton" and dtype != torch.float32:
        pytest.skip("a layer of operators rounds at each of them, which have tests of their own")
    hidden, cu_seqlens, parameters = layer_inputs(case, dtype)
    with serving(name, "dropout_add_layer_norm_forward" if name == "triton" else "bert_layer_forward", dtype, device):
        assert_matches_reference(
            biased(ops.bert_layer, case, cu_seqlens),
            biased(reference.bert_layer, case, cu_seqlens),
            [hidden, bias_of(case, dtype), *parameters],
        )


@every_dtype
@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=["narrow", "wide"])
def test_the_number_of_threads_does_not_change_a_bit(dtype: torch.dtype, case: Any) -> None:
    case = (*case[:3], [5, 60, 130, 1, 64, 65, 90, 17] * 3)
    hidden, cu_seqlens, parameters = layer_inputs(case, dtype)
    results = []
    for count in (1, 2, 3, 2):
        with serving("cpp", "bert_layer_forward", dtype), threads(count):
            run = biased(ops.bert_layer, case, cu_seqlens)
            results.append(gradients(run, hidden, [bias_of(case, torch.float32), *parameters]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_nothing_but_the_result_is_kept_without_gradients(name: str) -> None:
    hidden, cu_seqlens, parameters = layer_inputs(CASES[1], torch.float32)
    run = layer(ops.bert_layer, CASES[1], cu_seqlens)
    with serving(name, "bert_layer_forward"):
        expected = run(hidden.clone().requires_grad_(), *parameters)
        torch.testing.assert_close(run(hidden, *parameters), expected, rtol=0, atol=0)
        arguments = [hidden, cu_seqlens, SEED, *parameters, 40, 5, 1e-12, 0.1, 0.05, 0.1, 8, False, None]
        out, *kept = torch.ops.triton_st.bert_layer_forward(*arguments)
    assert torch.equal(out, expected)
    assert all(x.numel() == 0 for x in kept)


@pytest.mark.parametrize("name", ["cpp", "reference"])
@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=["narrow", "wide"])
def test_no_tokens(name: str, case: Any) -> None:
    for lengths in ([], [0, 0]):
        empty = (*case[:3], lengths)
        hidden, cu_seqlens, parameters = layer_inputs(empty, torch.float32)
        with serving(name, "bert_layer_forward"):
            result, grad_hidden, *grads = gradients(layer(ops.bert_layer, empty, cu_seqlens), hidden, parameters)
        assert result.shape == grad_hidden.shape == hidden.shape
        assert all(bool((grad == 0).all()) for grad in grads)


def test_a_layer_of_operators_drops_the_same_elements() -> None:
    """What GPUs run is composed of other operators; with half of everything dropped, results agree only bit for bit."""
    hidden, cu_seqlens, parameters = layer_inputs(CASES[1], torch.float32)
    p = BertLayerParameters(*parameters)
    fused = layer(ops.bert_layer, CASES[1], cu_seqlens, 0.5)(hidden, *parameters)
    qkv = torch.nn.functional.linear(hidden, p.qkv_weight, p.qkv_bias).view(-1, 3, 5, 10)
    attended = ops.packed_attention(qkv, cu_seqlens, 40, 0.5, SEED, 8)
    middle = ops.dropout_add_layer_norm(
        attended @ p.projection_weight.T,
        hidden,
        p.attention_norm_weight,
        p.attention_norm_bias,
        1e-12,
        x_bias=p.projection_bias,
        dropout_p=0.25,
        seed=SEED,
        stream=9,
    )
    fed = ops.bias_gelu(middle @ p.up_weight.T, p.up_bias) @ p.down_weight.T
    norm = (p.output_norm_weight, p.output_norm_bias, 1e-12)
    composed = ops.dropout_add_layer_norm(fed, middle, *norm, x_bias=p.down_bias, dropout_p=0.5, seed=SEED, stream=10)
    torch.testing.assert_close(fused, composed, rtol=1e-5, atol=1e-5)


def test_fp16_saturates_and_keeps_nan() -> None:
    hidden, cu_seqlens, parameters = layer_inputs(CASES[2], torch.float16)
    parameters[-1] = torch.full_like(parameters[-1], 1e6)
    run = layer(ops.bert_layer, CASES[2], cu_seqlens, 0.0)
    assert bool((run(hidden, *parameters) == 65504).all())
    hidden[1] = torch.nan
    result = run(hidden, *parameters)
    assert bool(result[:60].isnan().all())  # the sequence of the token that is none, and no other
    assert bool((result[60:] == 65504).all())


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_opcheck_and_compile(name: str) -> None:
    case = CASES[1]
    hidden, cu_seqlens, parameters = layer_inputs(case, torch.float32)
    leaves = [x.requires_grad_() for x in parameters]
    with serving(name, "bert_layer_forward"):
        for bias in (None, torch.randn(5, 81, requires_grad=True)):
            settings = (40, 5, 1e-12, 0.1, 0.05, 0.1, 8, True, bias)
            arguments = (hidden.requires_grad_(), cu_seqlens, SEED, *leaves, *settings)
            torch.library.opcheck(torch.ops.triton_st.bert_layer_forward.default, arguments)
        run = layer(ops.bert_layer, case, cu_seqlens)
        compiled = torch.compile(run, fullgraph=True)
        plain = [x.detach() for x in leaves]
        for ours, eager in zip(
            gradients(compiled, hidden.detach(), plain), gradients(run, hidden.detach(), plain), strict=True
        ):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


def test_a_second_derivative_is_an_error() -> None:
    hidden, cu_seqlens, parameters = layer_inputs(CASES[1], torch.float32)
    hidden.requires_grad_()
    value = layer(ops.bert_layer, CASES[1], cu_seqlens)(hidden, *parameters).square().sum()
    (gradient,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        gradient.square().sum().backward()


def test_bad_input_is_named() -> None:
    hidden, cu_seqlens, parameters = layer_inputs(CASES[1], torch.float32)
    good: dict[str, Any] = {
        "hidden": hidden,
        "cu_seqlens": cu_seqlens,
        "max_seqlen": 40,
        "parameters": BertLayerParameters(*parameters),
        "heads": 5,
        "eps": 1e-12,
        "hidden_dropout_p": 0.1,
        "seed": SEED,
    }
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, r"hidden must be \[T, D\]", {"hidden": hidden[0]}),
        (TypeError, "hidden must be a floating-point tensor", {"hidden": hidden.int()}),
        (ValueError, "cu_seqlens must start at 0", {"cu_seqlens": cu_seqlens + 1}),
        (ValueError, "cu_seqlens must end at 75", {"hidden": torch.cat([hidden, hidden])[:75]}),
        (ValueError, "max_seqlen must be at least 40", {"max_seqlen": 39}),
        (TypeError, "max_seqlen must be an int, got float", {"max_seqlen": 40.0}),
        (ValueError, "heads must divide", {"heads": 3}),
        (ValueError, "eps must be at least 0", {"eps": -1.0}),
        (ValueError, "dropout_p must be a probability", {"hidden_dropout_p": 1.5}),
        (ValueError, "seed must be given", {"seed": None}),
        (ValueError, "relative_bias must have at least 79 columns", {"relative_bias": torch.zeros(5, 77)}),
        (ValueError, r"relative_bias must be \[H, 2 P - 1\] with 5 heads", {"relative_bias": torch.zeros(4, 79)}),
        (
            TypeError,
            "up_bias must be torch.float32",
            {"parameters": good["parameters"]._replace(up_bias=hidden.half())},
        ),
        (
            ValueError,
            r"down_weight must be \[50, 200\]",
            {"parameters": good["parameters"]._replace(down_weight=torch.randn(200, 50))},
        ),
    ]
    for error, message, change in wrong:
        with pytest.raises(error, match=message):
            ops.bert_layer(**{**good, **change})


def test_the_reference_serves_float64() -> None:
    hidden, cu_seqlens, parameters = layer_inputs(CASES[1], torch.float64)
    wide = [x.double() for x in parameters]
    assert backend.select(hidden) == "reference"
    results = gradients(layer(ops.bert_layer, CASES[1], cu_seqlens), hidden, wide)
    expected = gradients(layer(reference.bert_layer, CASES[1], cu_seqlens), hidden, wide)
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# --- instruction sets ---

PARITY = """
import sys
sys.path[:0] = {paths!r}
from triton_st import extension
names = ("bert_layer", "bert_layer_backward")
sources = [path for path in extension.sources() if path.suffix == ".h" or path.stem in names]
extension.sources = lambda: sources  # the other operators have forms of their own to test
import torch
import tests.test_bert_layer as this
for case in (this.SMALL, this.CASES[1], this.CASES[4]):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        hidden, cu_seqlens, parameters = this.layer_inputs(case, dtype)
        ours, plain = (this.layer(m.bert_layer, case, cu_seqlens) for m in (this.ops, this.reference))
        with this.backend.use("cpp"):
            this.assert_matches_reference(ours, plain, [hidden, *parameters])
"""


def test_forms_for_lesser_processors(tmp_path: Path) -> None:
    """Products by vectors, with and without pairs of bf16."""
    code = PARITY.format(paths=[str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    forms = lesser_forms("x86-64-v4", "x86-64-v3", "x86-64")
    for process in [start(code, tmp_path, TRITON_ST_CXXFLAGS=flags) for flags in forms]:
        finish(process)
