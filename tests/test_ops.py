"""What every operator refuses, before any kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from triton_st import ops

CU_SEQLENS = torch.tensor([0, 1, 4])
MASK = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
IDS = torch.tensor([0, 3, 1, 1])
ONES = torch.ones(6)


def vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """A scale and an offset for the columns of x."""
    return ONES.to(x.dtype), ONES.to(x.dtype)


OPERATORS: dict[str, Callable[[Any], Tensor]] = {
    "masked_mean_pool": lambda x: ops.masked_mean_pool(x.unsqueeze(1).expand(4, 4, 6), MASK),
    "packed_mean_pool": lambda x: ops.packed_mean_pool(x, CU_SEQLENS),
    "cosine_similarity": lambda x: ops.cosine_similarity(x, x.detach().flip(0)),
    "mnrl_loss": lambda x: ops.mnrl_loss(x, x.detach().flip(0)),
    "packed_attention": lambda x: ops.packed_attention(x.view(4, 3, 1, 2), CU_SEQLENS, 3),
    "dropout_add_layer_norm": lambda x: ops.dropout_add_layer_norm(x, x, *vectors(x), 1e-5),
    "layer_norm_mean_pool": lambda x: ops.layer_norm_mean_pool(x, x, *vectors(x), 1e-5, CU_SEQLENS),
    "embedding_layer_norm": lambda x: ops.embedding_layer_norm(IDS, CU_SEQLENS, x, x, None, *vectors(x), 1e-5),
    "bias_gelu": lambda x: ops.bias_gelu(x, vectors(x)[0]),
}
every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
every_function = pytest.mark.parametrize(
    "operator",
    [
        lambda x: ops.masked_mean_pool(x, MASK),
        lambda x: ops.packed_mean_pool(x, CU_SEQLENS),
        lambda x: ops.cosine_similarity(x, x),
        lambda x: ops.mnrl_loss(x, x),
        lambda x: ops.packed_attention(x, CU_SEQLENS, 3),
        lambda x: ops.dropout_add_layer_norm(x, x, ONES, ONES, 1e-5),
        lambda x: ops.layer_norm_mean_pool(x, x, ONES, ONES, 1e-5, CU_SEQLENS),
        lambda x: ops.embedding_layer_norm(IDS, CU_SEQLENS, x, x, None, ONES, ONES, 1e-5),
        lambda x: ops.bias_gelu(x, ONES),
    ],
    ids=OPERATORS.keys(),
)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_second_derivative_is_an_error_and_not_zero(operator: Callable[[Any], Tensor], dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, dtype=dtype, requires_grad=True)
    value = operator(x).square().sum()
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        (value + gradient.square().sum()).backward()


@every_function
def test_what_is_no_dense_floating_tensor_is_a_type_error(operator: Callable[[Any], Tensor]) -> None:
    x = torch.randn(4, 6)
    for wrong, got in [
        (x.int(), "torch.int32"),
        (x.to(torch.complex64), "torch.complex64"),
        (x.to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (x.to_sparse(), "torch.sparse_coo"),
        (None, "NoneType"),
    ]:
        with pytest.raises(TypeError, match=f"must be a .*got .*{got}"):
            operator(wrong)


def test_compiled_for_any_number_of_rows() -> None:
    """One graph serves all sizes, forward and backward: no check may tie it to the numbers that it was traced with."""

    def all_of_them(x: Tensor, mask: Tensor, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        states = ops.embedding_layer_norm(ids, cu_seqlens, x, x, None, *vectors(x), 1e-5)
        pooled = ops.packed_mean_pool(states, cu_seqlens) + ops.masked_mean_pool(x.unsqueeze(1) * mask[..., None], mask)
        pooled = pooled + ops.layer_norm_mean_pool(states, states, *vectors(x), 1e-5, cu_seqlens)
        found = ops.cosine_topk(pooled.detach(), states.detach(), 3)
        return ops.cosine_similarity(pooled, states).sum() + pooled.sum() + found[0].sum() + found[1].sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(all_of_them, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for count in (11, 17, 30):
        x = torch.randn(count, 6, requires_grad=True)
        arguments = torch.ones(count, 9).long(), torch.arange(2 * count) % count, torch.arange(0, 2 * count + 1, 2)
        values = [function(x, *arguments) for function in (compiled, all_of_them)]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(value, x) for value in values))
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1
