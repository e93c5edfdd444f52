"""What only the Triton form of the contrastive loss has: tiles, panels, copies, split sums, powers of two."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import mnrl_traffic
from triton_st import backend, kernels, reference
from triton_st.kernels import common
from triton_st.kernels.common import Tile

sweeps_module = importlib.import_module("triton_st.kernels.mnrl_sweeps")
blocks_module = importlib.import_module("triton_st.kernels.mnrl_blocks")
prefix_blocks_module = importlib.import_module("triton_st.kernels.mnrl_prefix_blocks")
products_module = importlib.import_module("triton_st.kernels.products")

HALF_AND_SINGLE = pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
RESULTS = ("losses", "grad_queries", "grad_documents", "grad_all_queries", "grad_scale", "diagnostics")
QUERY_TO_QUERY, DOC_TO_QUERY, DOC_TO_DOC, EVERY_DIRECTION = 2, 4, 8, 15
IN_BATCH_NEGATIVES, HARD_NEGATIVES, ALL_NEGATIVES = 1, 2, 3


@pytest.fixture(autouse=True)
def served(device: torch.device) -> None:
    if problem := backend.triton_problem(device):
        pytest.skip(problem)


def arguments(
    batch: int,
    columns: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    noise: float = 1.0,
    others: int = 0,
    identified: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of `mnrl_rows`: positives are queries plus noise; `others` queries belong to other processes."""
    generator = torch.Generator().manual_seed(100 * batch + dim)
    whole = batch + others
    queries = torch.randn(whole, dim, generator=generator)
    documents = torch.randn(whole * columns, dim, generator=generator)
    documents[:whole] = queries + noise * documents[:whole]
    ids = torch.randint(0, 2 * whole, (whole * (columns + 1),), generator=generator)
    query_ids, document_ids = ids[:whole], ids[whole:]
    offset = others // 2
    own = slice(offset, offset + batch)
    chosen: dict[str, Any] = {
        "queries": queries[own], "documents": documents, "all_queries": queries if others else None, "targets": None,
        "offset": offset, "scale": torch.tensor(20.0), "row_weights": None, "normalized": True, "directions": 1,
        "joint": True, "hardness_mode": 0, "hardness_strength": 0.0, "query_ids": None, "document_ids": None,
        "owner_ids": None, "margin": None, "relative_margin": False, "dims": [], "dim_weights": [], "gradients": True,
        "diagnostics": True,
    }  # fmt: skip
    if identified:
        chosen["query_ids"], chosen["document_ids"] = query_ids[own], document_ids
        chosen["owner_ids"] = torch.cat([query_ids, document_ids[whole:]])
    chosen |= options
    for name in ("queries", "documents", "all_queries"):
        chosen[name] = chosen[name] if chosen[name] is None else chosen[name].to(dtype)
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in chosen.items()}


def widened(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in given.items()}


def assert_right(given: dict[str, Any]) -> tuple[Tensor, ...]:
    """All results agree with the reference in float64, to what their dtype's products can keep."""
    dtype = given["queries"].dtype
    results = kernels.mnrl_rows(**given)
    for name, actual, exact in zip(RESULTS, results, reference.mnrl_rows(**widened(given)), strict=True):
        assert actual.shape == exact.shape, name
        assert actual.dtype == torch.float32, name
        actual = actual.double()
        assert torch.equal(actual.isfinite(), exact.isfinite()), name
        finite = exact.isfinite()
        if not finite.any():
            continue
        if name.startswith("grad_") and name != "grad_scale":
            error, size = (actual - exact).norm(), exact.norm()
            assert error <= (1e-3 if dtype == torch.float16 else 1e-5) * size, f"{name}: {error:.2e} of {size:.2e}"
        else:
            error, size = (actual - exact)[finite].abs().max(), exact[finite].abs().max()
            assert error <= 1e-5 * size + 1e-6 * given["scale"].max().item(), f"{name}: {error:.2e} of {size:.2e}"
    return results


SINGLE_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "symmetric": {"directions": 1 | DOC_TO_QUERY, "joint": False},
    "symmetric, joint": {"directions": 1 | DOC_TO_QUERY},
    "queries": {"directions": 1 | QUERY_TO_QUERY},
    "documents": {"directions": 1 | DOC_TO_DOC},
    "every direction": {"directions": EVERY_DIRECTION},
    "every direction of a gathered batch": {"directions": EVERY_DIRECTION, "others": 5},
    "symmetric of a gathered batch": {"directions": 1 | DOC_TO_QUERY, "joint": False, "others": 5},
    "gathered documents only": {"others": 5},
    "in-batch hardness": {"hardness_mode": IN_BATCH_NEGATIVES, "hardness_strength": 9.0},
    "hard hardness": {"hardness_mode": HARD_NEGATIVES, "hardness_strength": 5.0},
    "all hardness": {"hardness_mode": ALL_NEGATIVES, "hardness_strength": 5.0},
    "ids": {"directions": EVERY_DIRECTION, "identified": True},
    "margin": {"directions": EVERY_DIRECTION, "margin": 0.3},
    "relative margin": {"margin": 0.2, "relative_margin": True},
    "dot products": {"normalized": False, "scale": torch.tensor(0.1)},
    "scale of each row": {"scale": torch.linspace(1, 50, 17)},
    "weights": {"row_weights": torch.linspace(-1, 3e5, 17)},
    "prefixes": {"dims": [7, 16, 40], "dim_weights": [0.5, 1.0, 2.0]},
    "everything": {
        "directions": EVERY_DIRECTION, "others": 5, "hardness_mode": IN_BATCH_NEGATIVES, "hardness_strength": 9.0,
        "identified": True, "margin": 0.2, "scale": torch.linspace(1, 50, 17),
        "row_weights": torch.linspace(0, 1, 17), "dims": [16, 50], "dim_weights": [1.0, 1.0],
    },
}  # fmt: skip


@HALF_AND_SINGLE
@pytest.mark.parametrize("options", SINGLE_OPTIONS.values(), ids=SINGLE_OPTIONS.keys())
def test_options(options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    assert_right(arguments(17, 3, 50, dtype, device, **options))


@HALF_AND_SINGLE
@pytest.mark.parametrize("tile", [Tile(128, 128, 64, 8, 3), Tile(64, 32, 64, 4, 3), Tile(128, 64, 16, 8, 2)], ids=str)
def test_every_tile_size(tile: Tile, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sweeps_module, products_module):
        monkeypatch.setattr(module, "product_tile", lambda *_, **__: tile)
    assert_right(arguments(67, 2, 20, dtype, device, directions=1 | DOC_TO_DOC))
    if common.padded_width(dtype, 1) % tile.depth == 0:  # segments of copies are whole blocks
        assert_right(arguments(67, 2, 20, dtype, device, directions=1 | DOC_TO_DOC, dims=[8, 20], dim_weights=[1, 2]))


@pytest.mark.parametrize("dims", [[], [8, 24]], ids=str)
@pytest.mark.parametrize(
    ("dtype", "copied"), [(torch.float32, "at once"), (torch.float32, "by panels"), (torch.float16, "by panels")]
)
def test_panels(
    copied: str, dims: list[int], dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two panels of queries, several of documents; own columns lie in some of them only."""
    weights = [float(1 + i) for i in range(len(dims))]
    given = arguments(20, 4, 24, dtype, device, directions=EVERY_DIRECTION, others=4, dims=dims, dim_weights=weights)
    whole = kernels.mnrl_rows(**given)
    monkeypatch.setattr(sweeps_module, "PANEL_ROWS", 16)
    monkeypatch.setattr(sweeps_module, "PANEL_BYTES", 16 * 64 * dtype.itemsize)
    if copied == "by panels":
        monkeypatch.setattr(sweeps_module, "COPY_BYTES", 0)
        monkeypatch.setattr(sweeps_module, "MIN_COPIED_ROWS", 32)
    with common.recording("cuda") as launches:
        kernels.mnrl_rows(**given)
    kernel = prefix_blocks_module._prefix_weights_kernel if dims else blocks_module._weights_kernel
    count = sum(launch.kernel is kernel for launch in launches)
    assert count == 2 * ((2 + 1 + 1 + 2) if copied == "at once" else (3 + 1 + 1 + 3))
    for name, actual, expected in zip(RESULTS, assert_right(given), whole, strict=True):
        bound = 64 * torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=bound, msg=name)


@HALF_AND_SINGLE
def test_targets_anywhere(dtype: torch.dtype, device: torch.device) -> None:
    """Several queries of one document, documents of no query, in no order."""
    targets = torch.tensor([4, 4, 0, 20, 4, 7, 7, 1, 19, 4, 2, 3, 20])
    given = arguments(13, 3, 50, dtype, device, targets=targets.to(device))
    given["documents"] = given["documents"][:21]
    for mode in (0, IN_BATCH_NEGATIVES, ALL_NEGATIVES):
        assert_right(given | {"hardness_mode": mode, "hardness_strength": 3.0})
    first, second = (kernels.mnrl_rows(**given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_right(given | {"normalized": False, "scale": torch.tensor(0.1, device=device)})


@HALF_AND_SINGLE
@pytest.mark.parametrize(("noise", "loss"), [(2.0, 0.5), (0.9, 1e-3), (0.6, 1e-4), (0.3, 1e-5)])
def test_gradients_of_a_small_loss(noise: float, loss: float, dtype: torch.dtype, device: torch.device) -> None:
    """Where p of the positive is nearly 1, in every way of adding up directions."""
    for options in ({}, {"directions": EVERY_DIRECTION}, {"directions": 1 | DOC_TO_QUERY, "joint": False}):
        given = arguments(24, 2, 50, dtype, device, noise=noise, **options)
        _, *gradients = kernels.mnrl_rows(**given)
        losses, *exact = reference.mnrl_rows(**widened(given))
        if not options:
            assert loss < losses.mean() < 2 * loss
        # The rounding of logits, in relation to the exponentials that the gradient is made of.
        allowed = (1e-3 if dtype == torch.float16 else 0) + 4 * 20 * torch.finfo(torch.float32).eps
        for actual, expected in zip(gradients[:2], exact[:2], strict=True):
            assert (actual.double() - expected).norm() <= allowed * expected.norm()


def test_half_weights_neither_overflow_nor_vanish(device: torch.device) -> None:
    """Probabilities from 1 down to 1e-8, norms from 2^-10 to 2^10 within one batch of halves; weights up to 2^16."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(24, 48, generator=generator)
    documents = torch.cat([queries + 0.5 * torch.randn(24, 48, generator=generator), -queries])
    sizes = torch.exp2(torch.linspace(-10, 10, 24))[:, None]
    queries, documents = queries * sizes, documents * sizes.flip(0).repeat(2, 1)
    given = arguments(24, 2, 48, torch.float16, device, scale=torch.tensor(30.0))
    given |= {"queries": queries.half().to(device), "documents": documents.half().to(device)}
    for size in (1.0, 2.0**16, 2.0**-24):
        given["row_weights"] = torch.full((24,), size, device=device)
        _, *actual = kernels.mnrl_rows(**given)
        _, *exact = reference.mnrl_rows(**widened(given))
        for a, e in zip(actual[:2], exact[:2], strict=True):
            # Row by row: a lost row would hide behind those with larger gradients.
            assert ((a.double() - e).norm(dim=1) <= 1e-3 * e.norm(dim=1)).all()


@pytest.mark.parametrize("dim", [50, 384])
def test_few_queries_fill_many_multiprocessors(dim: int) -> None:
    """B = 128: every large kernel has more programs than the 2 that its rows alone would make."""
    queries = common.meta(128, dim, dtype=torch.float16)
    documents = common.meta(384, dim, dtype=torch.float16)
    with common.recording("cuda") as launches:
        kernels.mnrl_rows(
            queries, documents, None, None, 0, common.meta(dtype=torch.float32), None, True, 1, True, 0, 0.0,
            None, None, None, None, False, [], [], True, False,
        )  # fmt: skip
    programs = {
        launch.kernel.fn.__name__: launch.grid[0] * launch.grid[1] for launch in launches if len(launch.grid) > 1
    }
    assert set(programs) == {"_sums_kernel", "_weights_kernel", "_weighted_sum_kernel"}
    assert min(programs.values()) > 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_workspace_is_bounded(dtype: torch.dtype) -> None:
    """What is allocated beyond the results, with every option: nothing is launched, and memory is not touched."""
    everything = {
        "directions": EVERY_DIRECTION, "ids": True, "margin": 0.1, "hardness_mode": 1, "hardness_strength": 5.0,
        "diagnostics": True,
    }  # fmt: skip
    for form in ({}, everything, everything | {"prefixes": (4, 3, 2, 1)}):
        assert mnrl_traffic.workspace(4096, 8192, 384, dtype, **form) < 64 << 20
        assert mnrl_traffic.workspace(65536, 131072, 384, dtype, **form) < 256 << 20


def test_four_products_and_a_known_cost_of_options() -> None:
    counted = {
        name: sum(
            work for _, work, _ in mnrl_traffic.by_kernel(mnrl_traffic.launches(4096, 8192, 384, **form)).values()
        )
        for name, form in mnrl_traffic.FORMS.items()
    }
    product = 2 * 4096 * 8192 * 384
    assert {name: work / product for name, work in counted.items()} == {
        "plain": 4, "symmetric": 6, "every direction": 12, "four prefixes (D, D/2, D/4, D/8)": 4 * 448 / 384,
        "ids, margin, hardness": 4,
    }  # fmt: skip


@pytest.mark.parametrize("parts", [(1,), (2, 1), (8, 4, 2, 1), tuple(8 / i for i in range(8, 0, -1))], ids=len)
def test_prefixes_take_one_sweep(parts: tuple[float, ...]) -> None:
    """However many prefixes there are, products are those over the longest alone."""
    b, m, d = 512, 1024, 512
    form = {"dims": sorted(int(d / part) for part in parts), "dim_weights": [1.0] * len(parts)}
    for gradients, products in ((True, 4), (False, 1)):
        recorded = mnrl_traffic.launches(b, m, d, gradients=gradients, **form)
        counted = mnrl_traffic.by_kernel(recorded)
        assert sum(work for _, work, _ in counted.values()) == products * 2 * b * m * d
        sweeps = sum("sums_kernel" in launch.kernel.fn.__name__ for launch in recorded)
        assert sweeps == 1


@HALF_AND_SINGLE
@pytest.mark.parametrize("directions", [1, EVERY_DIRECTION])
def test_many_prefixes(directions: int, dtype: torch.dtype, device: torch.device) -> None:
    """Of every length there is; cosines of the first, one column, are ±1."""
    dims = [*range(1, 12), 20, 30, 40, 49, 50]
    weights = torch.linspace(0.2, 2, len(dims)).tolist()
    assert_right(arguments(17, 2, 50, dtype, device, directions=directions, dims=dims, dim_weights=weights))
    given = arguments(17, 2, 50, dtype, device, directions=directions, dims=[1, 50], dim_weights=[1.0, 0.0])
    _, grad_q, grad_d, *_ = kernels.mnrl_rows(**given)
    assert not grad_q.any()
    assert not grad_d.any()


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float16, 2.0**-14), (torch.float32, 1e-11), (torch.float32, 1e-25), (torch.float32, 1e25)],
)
def test_prefixes_of_any_size(dtype: torch.dtype, size: float, device: torch.device) -> None:
    """First columns far smaller, or larger, than the rest, or 0; half of the rows are ordinary."""
    given = arguments(12, 2, 40, torch.float32, device, dims=[6, 20, 40], dim_weights=[1.0, 1.0, 1.0])
    for name in ("queries", "documents"):
        given[name][::2, :6] *= size
        given[name][3, :6] = 0
        given[name][5, :20] = 0
        given[name][7] = 0
        given[name] = given[name].to(dtype)
    _, *actual = kernels.mnrl_rows(**given)
    _, *exact = reference.mnrl_rows(**widened(given))
    for a, e in zip(actual[:2], exact[:2], strict=True):
        assert a.isfinite().all()
        for columns in (slice(0, 6), slice(6, 20), slice(20, 40)):
            error, norm = (a.double() - e)[:, columns].norm(dim=1), e[:, columns].norm(dim=1)
            assert (error <= (1e-2 if dtype == torch.float16 else 1e-4) * norm).all(), (error / norm).max()


@HALF_AND_SINGLE
def test_prefixes_of_rows_of_nearly_one_direction(dtype: torch.dtype, device: torch.device) -> None:
    """What lies along the rows is a hundred times what is left of the gradient, and rounded weights turn no row."""
    given = arguments(24, 2, 48, torch.float32, device, dims=[16, 32, 48], dim_weights=[1.0, 1.0, 1.0])
    one = torch.randn(48, generator=torch.Generator().manual_seed(1)).to(device)
    for name in ("queries", "documents"):
        given[name] = (one + 0.01 * given[name]).to(dtype)
    _, *actual = kernels.mnrl_rows(**given)
    _, *exact = reference.mnrl_rows(**widened(given))
    for a, e in zip(actual[:2], exact[:2], strict=True):
        assert (a.double() - e).norm() <= (2e-3 if dtype == torch.float16 else 2e-5) * e.norm()


def test_repeats_bit_for_bit(device: torch.device) -> None:
    given = arguments(40, 2, 20, torch.float16, device, directions=EVERY_DIRECTION, identified=True)
    first, second = (kernels.mnrl_rows(**given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_not_asked_for_is_not_computed(device: torch.device) -> None:
    given = arguments(9, 2, 20, torch.float32, device, gradients=False, diagnostics=False)
    with common.recording("cuda") as launches:
        kernels.mnrl_rows(**given)
    assert not any(launch.kernel is blocks_module._weights_kernel for launch in launches)
    losses, *rest = assert_right(given)
    assert losses.shape == (9,)
    assert all(x.shape == (0,) for x in rest)
