"""Embeddings on every backend: the tolerance rule, repeated and absent ids, type rows, repeatability, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operator_checks import assert_compiles, assert_repeatable, cu_seqlens, randn, seed
from serving import every_backend, every_dtype, interpreted, serving
from tolerance import assert_matches_reference
from torch import Tensor

from triton_st import ops, reference

LENGTHS = [[1], [5, 0, 1, 25, 33, 64], [130, 3], [4] * 70, [512]]
COLUMNS = [50, 384, 7, 64, 100]
SMALL_LENGTHS = [[1], [5, 0, 17, 3]]
SMALL_COLUMNS = [50, 7]
OPERATOR = "embedding_layer_norm_forward"
EPS = 1e-12
VOCABULARY = 40


def ids(tokens: int, size: int, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Some rows often, some never."""
    numbers = torch.rand(tokens, generator=torch.Generator().manual_seed(tokens)).square() * (size - 1)
    return numbers.to(dtype).to(device)


def calls(
    lengths: list[int],
    dropout_p: float,
    dtype: torch.dtype,
    device: torch.device,
    *,
    typed: bool = False,
    offset: int = 0,
    id_dtype: torch.dtype = torch.int64,
) -> tuple[Any, Any]:
    """The operator and its specification as functions of tensors alone: weight, bias, word, position and maybe type."""
    tokens = sum(lengths)
    input_ids = ids(tokens, VOCABULARY, device, id_dtype)
    options: dict[str, Any] = {"dropout_p": dropout_p, "seed": seed(device), "stream": 3, "position_offset": offset}
    options["token_type_ids"] = (torch.arange(tokens, device=device) // 3 % 2).to(id_dtype) if typed else None

    def of(function: Any) -> Any:
        def call(word: Tensor, position: Tensor, weight: Tensor, bias: Tensor, kind: Tensor | None = None) -> Tensor:
            wanted = dtype if word.dtype == torch.float32 else word.dtype
            offsets = cu_seqlens(lengths, device)
            return function(input_ids, offsets, word, position, kind, weight, bias, EPS, **options, dtype=wanted)

        return call

    return of(ops.embedding_layer_norm), of(reference.embedding_layer_norm)


def inputs(lengths: list[int], columns: int, device: torch.device, *, types: bool, offset: int = 0) -> list[Tensor]:
    tables = [randn(VOCABULARY, columns), randn(max(lengths, default=0) + offset + 3, columns)]
    vectors = [1 + randn(columns), randn(columns, 1)[:, 0]]
    return [x.to(device) for x in [*tables, *vectors, *([randn(2, columns)] if types else [])]]


@every_dtype
@every_backend
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_obeys_the_tolerance_rule(name: str, dtype: torch.dtype, dropout_p: float, device: torch.device) -> None:
    all_lengths, columns = (SMALL_LENGTHS, SMALL_COLUMNS) if interpreted(name, device) else (LENGTHS, COLUMNS)
    with serving(name, OPERATOR, dtype, device):
        for i, (lengths, d) in enumerate(zip(all_lengths, columns, strict=True)):
            for typed in (False, True):
                functions = calls(lengths, dropout_p, dtype, device, typed=typed, offset=2 * i)
                arguments = inputs(lengths, d, device, types=typed or i % 2 == 0, offset=2 * i)
                assert_matches_reference(*functions, arguments)


@every_backend
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
def test_agrees_with_pytorch(name: str, id_dtype: torch.dtype, device: torch.device) -> None:
    lengths = [4, 1, 9]
    word, position, weight, bias, kind = inputs(lengths, 50, device, types=True)
    places = torch.cat([torch.arange(length) for length in lengths]).to(device)
    input_ids = ids(14, VOCABULARY, device)
    expected = F.layer_norm(word[input_ids] + position[places] + kind[0], (50,), weight, bias, EPS)
    with serving(name, OPERATOR, device=device):
        actual = calls(lengths, 0.0, torch.float32, device, id_dtype=id_dtype)[0](word, position, weight, bias, kind)
    torch.testing.assert_close(actual, expected)


@every_backend
def test_rows_that_no_token_takes_have_gradient_zero(name: str, device: torch.device) -> None:
    lengths = [4, 1, 9]
    leaves = [x.requires_grad_() for x in inputs(lengths, 50, device, types=True)]
    word, position, _, _, kind = leaves
    with serving(name, OPERATOR, device=device):
        calls(lengths, 0.0, torch.float32, device)[0](*leaves).square().sum().backward()
    taken = torch.zeros(VOCABULARY, dtype=torch.bool)
    taken[ids(14, VOCABULARY, torch.device("cpu"))] = True
    assert word.grad is not None
    assert torch.equal(word.grad.any(1).cpu(), taken)
    assert position.grad is not None
    assert torch.equal(position.grad.any(1).cpu(), torch.arange(len(position)) < 9)
    assert kind.grad is not None
    assert kind.grad.any(1).tolist() == [True, False]


@every_dtype
def test_same_bits_on_every_run_and_any_number_of_threads(dtype: torch.dtype) -> None:
    lengths, cpu = [300, 0, 1, 64, 65] + [20] * 30, torch.device("cpu")
    with serving("cpp", OPERATOR):
        assert_repeatable(calls(lengths, 0.1, dtype, cpu, typed=True)[0], inputs(lengths, 50, cpu, types=True))


@every_backend
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_tokens(name: str, lengths: list[int], device: torch.device) -> None:
    leaves = [x.requires_grad_() for x in inputs(lengths, 10, device, types=True)]
    with serving(name, OPERATOR, device=device):
        out = calls(lengths, 0.1, torch.float32, device)[0](*leaves)
        out.sum().backward()
    assert out.shape == (0, 10)
    assert all(x.grad is not None and not x.grad.any() for x in leaves)


def test_gradients_of_the_reference() -> None:
    cpu = torch.device("cpu")
    leaves = [x.double().requires_grad_() for x in inputs([4, 0, 3], 6, cpu, types=True)]
    with serving("reference", OPERATOR):
        for function in calls([4, 0, 3], 0.4, torch.float32, cpu, typed=True):
            assert torch.autograd.gradcheck(function, leaves)


@every_backend
def test_opcheck(name: str, device: torch.device) -> None:
    forward, backward = (
        torch.ops.triton_st.embedding_layer_norm_forward,
        torch.ops.triton_st.embedding_layer_norm_backward,
    )
    lengths, key = [3, 0, 5], seed(device)
    tokens = (ids(8, VOCABULARY, device), cu_seqlens(lengths, device))
    with serving(name, OPERATOR, device=device):
        for types in (False, True):
            word, position, weight, bias, *rest = inputs(lengths, 6, device, types=types)
            kind = rest[0] if rest else None
            kinds = torch.ones(8, dtype=torch.int64, device=device) if types else None
            settings = (*tokens, kinds, key, 0, EPS, 0.2, 1, torch.float16)
            out, mean, rstd = forward(word, position, kind, weight, bias, *settings)
            leaves = [t.clone().requires_grad_() for t in (word, position, weight, bias)]
            torch.library.opcheck(forward.default, (*leaves[:2], kind, *leaves[2:], *settings))
            torch.library.opcheck(
                backward.default,
                (out, word, position, kind, weight, mean, rstd, *tokens, kinds, key, 0, 0.2, 1),
            )


@every_backend
def test_compiled_whole(name: str, device: torch.device) -> None:
    function = calls([3, 0, 5], 0.2, torch.float32, device)[0]
    with serving(name, OPERATOR, device=device):
        assert_compiles(
            lambda word, *rest: function(word * 2, *rest).square(), inputs([3, 0, 5], 6, device, types=True)
        )


IDS = torch.tensor([0, 1, 2, 3])
TABLE, VECTOR = torch.zeros(5, 6), torch.ones(6)
GOOD: dict[str, Any] = {
    "input_ids": IDS,
    "cu_seqlens": cu_seqlens([4]),
    "word": TABLE,
    "position": TABLE,
    "token_type": TABLE[:2],
    "weight": VECTOR,
    "bias": VECTOR,
    "eps": EPS,
}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"input_ids": IDS + 2}, ValueError, "input_ids must be from 0 to 4, the rows of word, got 5"),
        ({"input_ids": IDS - 1}, ValueError, "input_ids must be from 0 to 4, the rows of word, got -1"),
        ({"input_ids": IDS.float()}, TypeError, "input_ids must be int64 or int32, got torch.float32"),
        ({"input_ids": IDS.view(2, 2)}, ValueError, r"input_ids must be \[T\], got shape \[2, 2\]"),
        ({"cu_seqlens": cu_seqlens([3])}, ValueError, "cu_seqlens must end at 4"),
        ({"cu_seqlens": torch.tensor([0, 5, 4])}, ValueError, "cu_seqlens must not descend"),
        ({"position": TABLE[:3]}, ValueError, "sequences of at most 3 tokens.*3 rows.*got one of 4"),
        ({"position_offset": 2}, ValueError, "sequences of at most 3 tokens.*position_offset is 2.*got one of 4"),
        ({"position_offset": -1}, ValueError, "position_offset must be at least 0, got -1"),
        ({"position": TABLE[:, :5]}, ValueError, "position must have rows of 6 elements as word, got 5"),
        ({"word": TABLE.half()}, TypeError, "word must have|word must be float32 or float64|must have word's dtype"),
        ({"token_type_ids": IDS}, ValueError, "token_type_ids must be from 0 to 1, the rows of token_type, got 3"),
        ({"token_type_ids": IDS[:2]}, ValueError, r"token_type_ids must be \[4\] as input_ids"),
        ({"token_type": TABLE[:0]}, ValueError, "token_type must have at least one row"),
        ({"weight": VECTOR[:5]}, ValueError, r"weight must be \[6\]"),
        ({"bias": VECTOR.double()}, TypeError, "bias must be torch.float32"),
        ({"dtype": torch.float64}, TypeError, "dtype must be floating-point of 16 bits or torch.float32"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0"),
        ({"dropout_p": 2.0}, ValueError, "dropout_p must be a probability"),
        ({"dropout_p": 0.5}, ValueError, "seed must be given"),
    ],
)
def test_bad_input(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    ops.embedding_layer_norm(**GOOD)
    with pytest.raises(error, match=message):
        ops.embedding_layer_norm(**{**GOOD, **wrong})


def test_compiled_kernels_check_what_they_are_called_with() -> None:
    with serving("cpp", OPERATOR):
        ops.embedding_layer_norm(**GOOD)  # loads the library
    forward = torch.ops.triton_st_cpp.embedding_layer_norm_forward
    settings = (None, None, 0, EPS, 0.0, 0, torch.float32)
    with pytest.raises(RuntimeError, match="must lie within their table"):
        forward(TABLE, TABLE, None, VECTOR, VECTOR, IDS + 9, cu_seqlens([4]), *settings)
    with pytest.raises(RuntimeError, match="position has too few rows"):
        forward(TABLE, TABLE[:2], None, VECTOR, VECTOR, IDS, cu_seqlens([4]), *settings)
