"""What only the Triton kernels have: splits, panels, tile sizes, powers of two. Interpreted where there is no GPU."""

from __future__ import annotations

import importlib

import pytest
import torch
from serving import serving
from tolerance import assert_matches_reference
from torch import Tensor

from triton_st import kernels, ops, reference
from triton_st.kernels import common, rows
from triton_st.kernels.common import Tile

PRODUCT_MODULES = [importlib.import_module(f"triton_st.kernels.{name}") for name in ("cosine_similarity", "products")]
HALF_AND_SINGLE = pytest.mark.parametrize("dtype", [torch.float16, torch.float32])


def random_rows(count: int, dim: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * count + 10 * dim + seed)
    return (0.5 + torch.randn(count, dim, generator=generator)).to(dtype).to(device)


@pytest.fixture
def tile(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Tile:
    """All products are made with the tile that the test is parametrised with."""
    for module in PRODUCT_MODULES:
        monkeypatch.setattr(module, "product_tile", lambda *_, **__: request.param)
    return request.param


def test_one_launcher_for_each_operator() -> None:
    operators = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "triton_st::" in name}
    composed = {"mnrl_loss_forward", "mnrl_loss_backward"}  # of mnrl_rows, on every backend
    composed |= {"bert_layer_forward", "bert_layer_backward"}  # of the layer's own operators, on a GPU
    assert set(kernels.__all__) == {name.partition(".")[0] for name in operators} - composed
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)


@HALF_AND_SINGLE
@pytest.mark.parametrize(
    "tile", [Tile(128, 128, 64, 8, 3), Tile(64, 32, 64, 4, 3), Tile(128, 64, 16, 8, 2)], indirect=True, ids=str
)
def test_every_tile_size(tile: Tile, dtype: torch.dtype, device: torch.device) -> None:
    a, b = random_rows(67, 20, dtype, device), random_rows(134, 20, dtype, device)
    with serving("triton", "cosine_similarity", dtype, device):
        assert_matches_reference(ops.cosine_similarity, reference.cosine_similarity, (a, b))


@HALF_AND_SINGLE
def test_sums_in_parts(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows against many: the products behind the gradients are cut along the many, and added up afterwards."""
    a, b = random_rows(3, 20, dtype, device), random_rows(700, 20, dtype, device)
    with common.recording("cuda") as launches:
        kernels.cosine_similarity_backward(a.new_ones(3, 700), a, b)
    assert max(launch.grid[1] for launch in launches if len(launch.grid) == 2) > 1
    with serving("triton", "cosine_similarity", dtype, device):
        assert_matches_reference(ops.cosine_similarity, reference.cosine_similarity, (a, b))


def test_gradients_of_rows_of_one_direction(device: torch.device) -> None:
    """1 % apart, in half: a rounded unit row would be turned by more than the gradient is large."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(48, generator=generator)
    a, b = (centre + 0.01 * torch.randn(n, 48, generator=generator) for n in (20, 40))
    grad = 1 + 0.3 * torch.randn(20, 40, generator=generator)
    inputs = [x.half().to(device) for x in (grad, a, b)]
    actual = kernels.cosine_similarity_backward(*inputs)
    exact = reference.cosine_similarity_backward(*(x.double() for x in inputs))
    for x, e in zip(actual, exact, strict=True):
        assert (x.double() - e).norm() <= 5e-4 * e.norm()  # a rounded unit row: 24e-4


@pytest.mark.parametrize("length", [1, 31, 64, 513])
@HALF_AND_SINGLE
def test_long_sequences_are_pooled_in_parts(length: int, dtype: torch.dtype, device: torch.device) -> None:
    hidden = random_rows(2 * length, 20, dtype, device)
    cu_seqlens = torch.tensor([0, length + length // 2, 2 * length], dtype=torch.int32, device=device)
    mask = torch.arange(2 * length, device=device).remainder(3).view(2, length) != 0
    with serving("triton", "packed_mean_pool", dtype, device):
        assert_matches_reference(ops.packed_mean_pool, reference.packed_mean_pool, (hidden, cu_seqlens))
        padded = hidden.view(2, length, 20)
        assert_matches_reference(ops.masked_mean_pool, reference.masked_mean_pool, (padded, mask))
    parts = common.splits(2, 513 // 32 + 1)
    assert 1 < parts <= 17


def test_splits_cover_every_step_and_leave_none_empty() -> None:
    for programs in (0, 1, 7, 511, 512, 10_000):
        for steps in (0, 1, 2, 16, 17, 1000):
            parts = common.splits(programs, steps, most=64)
            per_part = -(-max(steps, 1) // parts)
            assert 1 <= parts <= 64
            assert (parts - 1) * per_part < max(steps, 1) <= parts * per_part
    assert common.splits(512, 1000) == 1


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-13, 1e-6, 1.0, 1e6, 1e30, 1e37])
def test_copies_have_one_size(size: float, device: torch.device) -> None:
    """Copies are the rows times a power of two; copy over norm is the unit row."""
    x = random_rows(5, 50, torch.float32, device) * size
    x[3] = 0
    scaled, other = rows.Scaled(x), rows.Scaled(x[:2])
    copy, _ = rows.copy_rows(scaled, other)
    assert copy.shape == (5, common.padded_width(torch.float32, 50))
    assert not copy[3].any()
    assert not copy[:, 50:].any()
    copy = copy[:, :50]
    torch.testing.assert_close(copy / scaled.norm[:, None], reference.normalize(x), rtol=3e-7, atol=0)
    kept = [0, 1, 2, 4]
    mantissa, _ = torch.frexp(scaled.power[kept])
    assert torch.equal(mantissa, torch.full_like(mantissa, 0.5))
    assert torch.equal(copy[kept], (x.double() * scaled.power.double()[:, None]).float()[kept])
    norms = copy.double().norm(dim=1)[kept]
    if size > 1e-12:
        assert ((norms >= 2**rows.COPY_EXPONENT) & (norms < 2 ** (rows.COPY_EXPONENT + 1))).all()
        torch.testing.assert_close(scaled.norm[kept].double(), norms)
    else:  # shorter than EPS: divided by that
        torch.testing.assert_close((scaled.power / scaled.norm)[kept], torch.full((4,), 1e12, device=device))


def test_extreme_rows_are_noticed(device: torch.device) -> None:
    ordinary, extreme = random_rows(20, 50, torch.float32, device), random_rows(20, 50, torch.float32, device)
    extreme[17] *= 1e25
    assert rows.Statistics(ordinary, ordinary).extreme.item() == 0
    statistics = rows.Statistics(ordinary, extreme)
    assert statistics.extreme.item() == 1
    assert torch.equal(statistics.a_power, torch.ones_like(statistics.a_power))
    assert statistics.b_power.ne(1).nonzero().tolist() == [[17]]
    ordinary[3] = 0  # a zero row is nothing special
    assert rows.Statistics(ordinary, ordinary).extreme.item() == 0


def test_recording_launches_nothing_and_needs_no_values(device: torch.device) -> None:
    hidden = torch.empty(6, 8, device="meta")
    with common.recording("hip") as launches:
        assert common.on_hip()
        result = kernels.packed_mean_pool(hidden, torch.empty(3, dtype=torch.int32, device="meta"))
    assert result.shape == (2, 8)
    assert [launch.arguments["D"] for launch in launches] == [8]
    assert common._recorded is None


def test_empty_results_launch_nothing(device: torch.device) -> None:
    with common.recording("cuda") as launches:
        empty = torch.empty(0, 8, device=device)
        assert kernels.packed_mean_pool(empty, torch.zeros(1, dtype=torch.int32, device=device)).shape == (0, 8)
        assert kernels.cosine_similarity(empty, torch.ones(3, 8, device=device)).shape == (0, 3)
        assert kernels.masked_mean_pool(empty[None], empty[None, :, 0].long()).shape == (1, 8)
    assert len(launches) == 1  # one row without tokens: it is written as zero
