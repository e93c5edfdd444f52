"""Both mean poolings on every backend: the tolerance rule, ragged and degenerate shapes, repeatability, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import every_backend, every_dtype, interpreted, serving, threads
from tolerance import assert_matches_reference
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from triton_st import backend, ops, reference

LENGTHS = [
    [1],
    [512],
    [5, 1, 512, 3],
    [0, 4, 0, 0, 2, 0],
    [129, 128, 127, 256, 257, 1000],
    [3] * 70,
]
DIMS = [50, 1, 7, 312, 384, 1024]
SMALL_LENGTHS = [[1], [5, 0, 17, 3], [130]]
SMALL_DIMS = [50, 1, 384]


def cases(lengths: list[list[int]], dims: list[int]) -> list[tuple[list[int], int]]:
    """Every list of lengths with one width each, and every width: all pairs would be slow and show no more."""
    dim = itertools.cycle(dims)
    return [(each, next(dim)) for each in lengths] + [(lengths[-1], d) for d in dims]


def shapes(name: str, device: torch.device) -> list[tuple[list[int], int]]:
    return cases(SMALL_LENGTHS, SMALL_DIMS) if interpreted(name, device) else cases(LENGTHS, DIMS)


def packed(lengths: list[int], dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hidden states [T, D] around 1: where a mean cancels to nothing, the rule would compare rounding with luck."""
    generator = torch.Generator().manual_seed(sum(lengths) + dim)
    hidden = (1 + torch.randn(sum(lengths), dim, generator=generator)).to(dtype)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return hidden.to(device), cu_seqlens.to(device)


def padded(lengths: list[int], dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hidden states [B, L, D] with NaN as padding, and a mask with holes: nothing masked may be read."""
    generator = torch.Generator().manual_seed(sum(lengths) + dim)
    batch, length = len(lengths), max(1, *lengths) if len(lengths) > 1 else max(1, lengths[0])
    mask = torch.arange(length) < torch.tensor(lengths).unsqueeze(1)
    mask &= torch.rand(batch, length, generator=generator) > 0.2
    hidden = 1 + torch.randn(batch, length, dim, generator=generator)
    hidden[~mask] = float("nan")
    return hidden.to(dtype).to(device), mask.long().to(device)


@every_dtype
@every_backend
def test_packed_obeys_the_tolerance_rule(name: str, dtype: torch.dtype, device: torch.device) -> None:
    with serving(name, "packed_mean_pool", dtype, device):
        for lengths, dim in shapes(name, device):
            inputs = packed(lengths, dim, dtype, device)
            assert_matches_reference(ops.packed_mean_pool, reference.packed_mean_pool, inputs)


@every_dtype
@every_backend
def test_masked_obeys_the_tolerance_rule(name: str, dtype: torch.dtype, device: torch.device) -> None:
    with serving(name, "masked_mean_pool", dtype, device):
        for lengths, dim in shapes(name, device):
            inputs = padded(lengths, dim, dtype, device)
            assert_matches_reference(ops.masked_mean_pool, reference.masked_mean_pool, inputs)


@every_backend
def test_masked_and_packed_agree(name: str, device: torch.device) -> None:
    hidden, cu_seqlens = packed([4, 1, 7], 9, torch.float32, device)
    mask = torch.arange(7) < torch.tensor([4, 1, 7]).unsqueeze(1)
    grid = torch.full((3, 7, 9), float("inf"), device=device)
    grid[mask] = hidden
    with serving(name, "masked_mean_pool", device=device):
        torch.testing.assert_close(
            ops.masked_mean_pool(grid, mask.to(device)), ops.packed_mean_pool(hidden, cu_seqlens)
        )


@every_backend
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_mask_dtype(name: str, mask_dtype: torch.dtype, device: torch.device) -> None:
    hidden = torch.randn(2, 5, 6, device=device)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1]], device=device)
    with serving(name, "masked_mean_pool", device=device):
        expected = reference.masked_mean_pool(hidden, mask)
        torch.testing.assert_close(ops.masked_mean_pool(hidden, mask.to(mask_dtype)), expected)


@every_backend
def test_a_mask_value_other_than_one_keeps_the_token(name: str, device: torch.device) -> None:
    hidden = torch.randn(1, 3, 4, device=device)
    with serving(name, "masked_mean_pool", device=device):
        pooled = ops.masked_mean_pool(hidden, torch.tensor([[2, -1, 0]], device=device))
    torch.testing.assert_close(pooled, hidden[:, :2].mean(1))


@every_backend
def test_strided_inputs(name: str, device: torch.device) -> None:
    with serving(name, "packed_mean_pool", device=device):
        wide = torch.randn(9, 40, device=device)
        cu_seqlens = torch.tensor([0, 99, 4, 99, 9, 99], dtype=torch.int64, device=device)[::2]
        for view in (wide[:, 3:20], wide[:, ::2], wide.T[:9].contiguous().T[:9], wide[:1].expand(9, -1)):
            inputs = (view, cu_seqlens)
            assert_matches_reference(ops.packed_mean_pool, reference.packed_mean_pool, inputs)
        states = torch.randn(6, 3, 24, device=device)
        mask = torch.ones(4, 6, dtype=torch.bool, device=device).T[:, :3]
        for view in (states, states.transpose(0, 1).contiguous().transpose(0, 1), states[..., ::3], states[..., 5:]):
            assert_matches_reference(ops.masked_mean_pool, reference.masked_mean_pool, (view, mask))


@every_backend
@pytest.mark.parametrize(("batch", "length", "dim"), [(0, 4, 8), (3, 0, 8), (3, 4, 0)])
def test_empty_inputs(name: str, batch: int, length: int, dim: int, device: torch.device) -> None:
    with serving(name, "masked_mean_pool", device=device):
        hidden = torch.randn(batch, length, dim, device=device, requires_grad=True)
        pooled = ops.masked_mean_pool(hidden, torch.ones(batch, length, dtype=torch.bool, device=device))
        assert torch.equal(pooled, torch.zeros(batch, dim, device=device))
        pooled.sum().backward()
        assert hidden.grad is not None
        assert hidden.grad.shape == hidden.shape
        tokens = torch.randn(batch * length, dim, device=device, requires_grad=True)
        pooled = ops.packed_mean_pool(tokens, torch.arange(batch + 1, dtype=torch.int32, device=device) * length)
        assert torch.equal(pooled, torch.zeros(batch, dim, device=device))
        pooled.sum().backward()
        assert tokens.grad is not None


@every_backend
def test_rows_without_a_token_give_zero_and_take_no_gradient(name: str, device: torch.device) -> None:
    hidden = torch.full((3, 4, 5), float("nan"), device=device, requires_grad=True)
    with serving(name, "masked_mean_pool", device=device):
        pooled = ops.masked_mean_pool(hidden, torch.zeros(3, 4, dtype=torch.int64, device=device))
        pooled.sum().backward()
    assert not pooled.any()
    assert hidden.grad is not None
    assert not hidden.grad.any()


@every_backend
def test_nan_and_overflow_are_not_hidden(name: str, device: torch.device) -> None:
    with serving(name, "packed_mean_pool", torch.float16, device):
        hidden = torch.full((6, 4), 6e4, dtype=torch.float16, device=device)
        hidden[3, 1] = float("nan")
        hidden[4, 2] = float("inf")
        pooled = ops.packed_mean_pool(hidden, torch.tensor([0, 2, 4, 6], dtype=torch.int32, device=device))
    assert pooled[0].eq(hidden[0]).all()  # the sum of two such numbers is no fp16
    assert pooled.isnan().nonzero().tolist() == [[1, 1]]
    assert pooled.isinf().nonzero().tolist() == [[2, 2]]


@every_dtype
@every_backend
def test_gradients_of_large_losses(name: str, dtype: torch.dtype, device: torch.device) -> None:
    with serving(name, "packed_mean_pool", dtype, device):
        inputs = packed([3, 1, 20], 50, dtype, device)
        assert_matches_reference(ops.packed_mean_pool, reference.packed_mean_pool, inputs, grad_scale=2.0**14)


def test_a_very_long_sequence_keeps_its_digits() -> None:
    hidden, cu_seqlens = packed([327_680], 3, torch.float32, torch.device("cpu"))
    mask = torch.ones(1, len(hidden), dtype=torch.bool)
    with serving("cpp", "packed_mean_pool"):
        assert_matches_reference(ops.packed_mean_pool, reference.packed_mean_pool, (hidden, cu_seqlens))
        assert_matches_reference(ops.masked_mean_pool, reference.masked_mean_pool, (hidden.unsqueeze(0), mask))


@every_dtype
def test_results_do_not_depend_on_threads_or_runs(dtype: torch.dtype) -> None:
    lengths = [700, 3, 0, 9000, 1, 128, 129] + [5] * 400
    hidden, cu_seqlens = packed(lengths, 50, dtype, torch.device("cpu"))
    grid, mask = padded([700, 3, 0, 600, 1], 384, dtype, torch.device("cpu"))
    results = []
    with serving("cpp", "packed_mean_pool"):
        for count in (1, 2, 3, 2):
            with threads(count):
                pooled = ops.packed_mean_pool(hidden, cu_seqlens)
                averaged = ops.masked_mean_pool(grid, mask)
                results.append(
                    (
                        pooled,
                        averaged,
                        torch.ops.triton_st.packed_mean_pool_backward(pooled, cu_seqlens, len(hidden)),
                        torch.ops.triton_st.masked_mean_pool_backward(averaged, mask),
                    )
                )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_dtype
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dim", [3, 50, 384, 1023])
def test_large_gradients(dim: int, mapped: bool, dtype: torch.dtype) -> None:
    """Many units of work, rows that begin within a cache line, holes in the mask: every byte must be there.

    Of 12 MB they are written past the caches; of 40 MB not, but to memory that begins with a huge page.
    """
    lengths = [1, 0, 4000, 77] + [25] * ((40_000_000 if mapped else 12_000_000) // (25 * dtype.itemsize * dim))
    grad = torch.randn(len(lengths), dim).to(dtype)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    mask = torch.ones(len(lengths), 30, dtype=torch.bool)
    mask[::3, 11:] = False
    mask[1, 5:9] = False
    with backend.use("cpp"):
        tokens = torch.ops.triton_st.packed_mean_pool_backward(grad, cu_seqlens, sum(lengths))
        assert torch.equal(tokens, reference.packed_mean_pool_backward(grad, cu_seqlens, sum(lengths)))
        grid = torch.ops.triton_st.masked_mean_pool_backward(grad, mask)
        assert torch.equal(grid, reference.masked_mean_pool_backward(grad, mask))
    for each in (tokens, grid):  # of 40 MB, memory of its own that is larger than it
        assert each.is_contiguous()
        assert not mapped or each.data_ptr() % (2 << 20) == 0
        assert each.storage_offset() * each.element_size() + each.nbytes <= each.untyped_storage().nbytes()


@every_dtype
@pytest.mark.parametrize("dim", [3, 1023, 9001])
def test_gradients_of_long_runs(dim: int, dtype: torch.dtype) -> None:
    """Long runs are copied from their own beginning, whatever part of them one row is."""
    longest = max(100, 40_000 // dim)
    lengths = [longest, longest // 2, 1]
    grad = torch.randn(3, dim).to(dtype)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths).unsqueeze(1)
    with backend.use("cpp"):
        packed_grad = torch.ops.triton_st.packed_mean_pool_backward(
            grad, torch.tensor([0, *itertools.accumulate(lengths)]), sum(lengths)
        )
        grid = torch.ops.triton_st.masked_mean_pool_backward(grad, mask)
    share = (grad.float() / torch.tensor(lengths).unsqueeze(1)).to(dtype)
    assert torch.equal(packed_grad, share.repeat_interleave(torch.tensor(lengths), 0))
    assert torch.equal(grid, share.unsqueeze(1) * mask.unsqueeze(-1))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=12).filter(any), dim=st.integers(1, 130), data=st.data()
)
@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_any_shape(name: str, lengths: list[int], dim: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    cpu = torch.device("cpu")
    with serving(name, "packed_mean_pool"):
        assert_matches_reference(
            ops.packed_mean_pool, reference.packed_mean_pool, packed(lengths, dim, dtype, cpu), seed=dim
        )
        assert_matches_reference(
            ops.masked_mean_pool, reference.masked_mean_pool, padded(lengths, dim, dtype, cpu), seed=dim
        )


@every_backend
def test_opcheck(name: str, device: torch.device) -> None:
    hidden, cu_seqlens = packed([3, 0, 2], 6, torch.float32, device)
    grid, mask = torch.randn(3, 4, 6, device=device), torch.tensor([[1, 1, 0, 0]] * 3, device=device)
    grad = torch.randn(3, 6, device=device)
    operators = torch.ops.triton_st
    with serving(name, "packed_mean_pool", device=device):
        torch.library.opcheck(operators.packed_mean_pool.default, (hidden.requires_grad_(), cu_seqlens))
        torch.library.opcheck(operators.masked_mean_pool.default, (grid.requires_grad_(), mask))
        torch.library.opcheck(operators.packed_mean_pool_backward.default, (grad, cu_seqlens, 5))
        torch.library.opcheck(operators.masked_mean_pool_backward.default, (grad, mask))


@every_backend
def test_past_the_dispatcher_and_through_it(name: str, device: torch.device) -> None:
    """Eager calls take a shorter way, with the same result; who listens in still sees the operator."""
    hidden, cu_seqlens = packed([3, 0, 2], 6, torch.float32, device)
    with serving(name, "packed_mean_pool", device=device):
        results = []
        for function in (ops.packed_mean_pool, torch.ops.triton_st.packed_mean_pool):
            leaf = hidden.clone().requires_grad_()
            pooled = function(leaf, cu_seqlens)
            results.append((pooled.detach(), *torch.autograd.grad(pooled.square().sum(), leaf)))
            assert torch.equal(function(hidden, cu_seqlens), pooled)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        traced = make_fx(ops.packed_mean_pool)(hidden, cu_seqlens)
    assert "torch.ops.triton_st.packed_mean_pool" in traced.code


@every_backend
def test_compiled_whole(name: str, device: torch.device) -> None:
    hidden, cu_seqlens = packed([3, 0, 2], 6, torch.float32, device)
    grid, mask = torch.randn(3, 4, 6, device=device), torch.tensor([[1, 1, 0, 0]] * 3, device=device)

    def both(hidden: Tensor, grid: Tensor) -> Tensor:
        return ops.packed_mean_pool(hidden * 2, cu_seqlens) + ops.masked_mean_pool(grid.sin(), mask)

    with serving(name, "packed_mean_pool", device=device):
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
        gradients = []
        for function in (both, compiled):
            leaves = [hidden.clone().requires_grad_(), grid.clone().requires_grad_()]
            result = function(*leaves)
            gradients.append((result.detach(), *torch.autograd.grad(result.square().sum(), leaves)))
    for eager, traced in zip(*gradients, strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize(
    ("hidden", "mask", "error", "message"),
    [
        (torch.zeros(2, 3), torch.ones(2, 3), ValueError, r"hidden must be \[B, L, D\], got shape \[2, 3\]"),
        (torch.zeros(2, 3, 4), torch.ones(2, 4).long(), ValueError, r"attention_mask must be \[2, 3\], got.*\[2, 4\]"),
        (torch.zeros(2, 3, 4), torch.ones(6).long(), ValueError, r"attention_mask must be \[B, L\]"),
        (
            torch.zeros(2, 3, 4),
            torch.ones(2, 3),
            TypeError,
            "attention_mask must be bool or integer, got torch.float32",
        ),
        (torch.zeros(2, 3, 4).long(), torch.ones(2, 3).long(), TypeError, "hidden must be a floating-point tensor"),
    ],
)
def test_bad_input_of_masked(hidden: Tensor, mask: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.masked_mean_pool(hidden, mask)


@pytest.mark.parametrize(
    ("shape", "cu_seqlens", "error", "message"),
    [
        ((4,), [0, 4], ValueError, r"hidden must be \[T, D\]"),
        ((4, 2), [[0, 4]], ValueError, r"cu_seqlens must be \[B \+ 1\]"),
        ((4, 2), [], ValueError, "cu_seqlens must have at least one entry"),
        ((4, 2), [1, 4], ValueError, "cu_seqlens must start at 0, got 1"),
        ((4, 2), [0, 5], ValueError, "cu_seqlens must end at 4, the number of tokens, got 5"),
        ((4, 2), [0, 3, 2, 4], ValueError, "cu_seqlens must not descend"),
        ((4, 2), [0, 2**63 - 1, -2, 4], ValueError, "cu_seqlens must not descend"),  # every difference wraps around
        ((4, 2), [0.0, 4.0], TypeError, "cu_seqlens must be int32 or int64, got torch.float32"),
    ],
)
def test_bad_input_of_packed(
    shape: tuple[int, ...], cu_seqlens: list[float], error: type[Exception], message: str
) -> None:
    offsets = torch.tensor(cu_seqlens) if cu_seqlens else torch.zeros(0, dtype=torch.int32)
    with pytest.raises(error, match=message):
        ops.packed_mean_pool(torch.zeros(shape), offsets)


def test_compiled_kernels_check_what_they_are_called_with() -> None:
    """A direct call passes by the checks in Python: it must not read out of bounds."""
    with backend.use("cpp"):
        ops.packed_mean_pool(torch.zeros(1, 1), torch.tensor([0, 1]))  # loads the library
    packed_mean_pool, masked_mean_pool = (
        torch.ops.triton_st_cpp.packed_mean_pool,
        torch.ops.triton_st_cpp.masked_mean_pool,
    )
    with pytest.raises(RuntimeError, match="cu_seqlens must ascend"):
        packed_mean_pool(torch.zeros(4, 2), torch.tensor([0, 9, 4]))
    for hidden, cu_seqlens in (
        (torch.zeros(4, 2, 1), torch.tensor([0, 4])),
        (torch.zeros(4), torch.tensor([0, 4])),
        (torch.zeros(4, 2), torch.tensor([[0, 4]])),
        (torch.zeros(4, 2), torch.tensor([0.0, 4.0])),
        (torch.zeros(4, 2), torch.tensor([0, 4], dtype=torch.int16)),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)),
    ):
        with pytest.raises(RuntimeError, match="packed_mean_pool takes"):
            packed_mean_pool(hidden, cu_seqlens)
    for hidden, mask in (
        (torch.zeros(4, 2), torch.ones(4, 2).long()),
        (torch.zeros(4, 2, 3, 1), torch.ones(4, 2).long()),
        (torch.zeros(4, 2, 3), torch.ones(4).long()),
        (torch.zeros(4, 2, 3), torch.ones(4, 2)),
        (torch.zeros(4, 2, 3), torch.ones(4, 2, dtype=torch.complex64)),
    ):
        with pytest.raises(RuntimeError, match="masked_mean_pool takes"):
            masked_mean_pool(hidden, mask)
    with pytest.raises(RuntimeError, match="attention_mask does not fit"):
        masked_mean_pool(torch.zeros(4, 2, 3), torch.ones(4, 3).long())
