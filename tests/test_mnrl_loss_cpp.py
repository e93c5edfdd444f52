"""The C++ loss where its blocks end: many rows, many candidates, every option; memory, threads, instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import DTYPES, every_dtype, threads
from tolerance import assert_within_tolerance
from torch import Tensor

from triton_st import extension
from triton_st.reference import mnrl_rows

RESULTS = ("losses", "grad_queries", "grad_documents", "grad_all_queries", "grad_scale")
FOUR_DIRECTIONS, TWO_DIRECTIONS = 15, 5


def arguments(
    batch: int, columns: int, dim: int, dtype: torch.dtype = torch.float32, *, others: int = 0, **options: Any
) -> list[Any]:
    """Those of `mnrl_rows` by position; the queries are rows 1 ... of `batch` + `others`, if there are others."""
    generator = torch.Generator().manual_seed(batch + dim)
    w = batch + others
    all_queries = torch.randn(w, dim, generator=generator)
    documents = torch.randn(columns * w, dim, generator=generator)
    documents[:w] += 2 * all_queries
    offset = min(others, 1)
    ids = torch.randint(4 * w, (w,), generator=generator) - w
    document_ids = torch.randint(4 * w, (columns * w,), generator=generator) - w
    given: dict[str, Any] = {
        "queries": all_queries[offset : offset + batch].to(dtype),
        "documents": documents.to(dtype),
        "all_queries": all_queries.to(dtype) if others else None,
        "targets": None,
        "offset": offset,
        "scale": 5 + torch.rand(batch, generator=generator),
        "row_weights": torch.rand(batch, generator=generator),
        "normalized": True,
        "directions": 1,
        "joint": True,
        "hardness_mode": 0,
        "hardness_strength": 0.0,
        "query_ids": None,
        "document_ids": None,
        "owner_ids": None,
        "margin": None,
        "relative_margin": False,
        "dims": [],
        "dim_weights": [],
        "gradients": True,
        "diagnostics": True,
    }
    if options.pop("ids", False):
        given["query_ids"], given["document_ids"] = ids[offset : offset + batch], document_ids
        given["owner_ids"] = torch.cat([ids, document_ids[w:]])
    return list((given | options).values())


def compiled(given: list[Any]) -> tuple[Tensor, ...]:
    extension.load()
    result: tuple[Tensor, ...] = torch.ops.triton_st_cpp.mnrl_rows(*given)
    return result


def assert_right(given: list[Any]) -> None:
    """The tolerance rule, for results and gradients that are float32 whatever the inputs are."""
    wide: list[Any] = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given]
    exact, plain, actual = mnrl_rows(*wide), mnrl_rows(*given), compiled(given)
    for name, a, e, p in zip(RESULTS, actual, exact, plain, strict=False):
        floor = 20.0 if name in ("losses", "grad_scale") else 0.0
        if given[0].dtype == torch.bfloat16 and name.startswith("grad"):
            # Coefficients are rounded before they are multiplied, as they are for the results of that dtype.
            assert a.shape == e.shape
            assert (a - e).norm() <= 4e-3 * e.norm()
        else:
            assert_within_tolerance(a, e, p, name, magnitude=floor)
    torch.testing.assert_close(actual[5].double(), exact[5], rtol=1e-5, atol=1e-5)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"directions": TWO_DIRECTIONS, "joint": False, "row_weights": None, "scale": torch.tensor(7.0)},
    {"directions": FOUR_DIRECTIONS, "hardness_mode": 1, "hardness_strength": 4.0},
    {"directions": FOUR_DIRECTIONS, "others": 70, "ids": True},
    {"hardness_mode": 2, "hardness_strength": 4.0, "ids": True, "normalized": False, "scale": torch.tensor(0.1)},
    {"directions": FOUR_DIRECTIONS, "dims": [7, 32, 49], "dim_weights": [1.0, 0.5, 0.25], "others": 3},
    {"dims": [6, 50], "dim_weights": [1.0, 1.0], "hardness_mode": 1, "hardness_strength": 4.0, "ids": True},
]


@every_dtype
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_more_rows_than_a_block(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_right(arguments(301, 3, 50, dtype, **options))


def test_many_targets_in_one_document() -> None:
    targets = torch.randint(5, (300,), generator=torch.Generator().manual_seed(0))
    assert_right(arguments(300, 1, 33, targets=targets, offset=0))


def test_margin_leaves_out_what_is_too_near() -> None:
    given = arguments(280, 2, 40, margin=0.6, directions=FOUR_DIRECTIONS)
    without = arguments(280, 2, 40, directions=FOUR_DIRECTIONS)
    assert_right(given)
    assert (compiled(given)[0] < compiled(without)[0]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_with_any_number_of_threads(dtype: torch.dtype) -> None:
    for options in (OPTIONS[0], OPTIONS[3], OPTIONS[5]):
        given = arguments(290, 3, 64, dtype, **options)
        results = []
        for count in (1, 2, 3, 2):
            with threads(count):
                results.append(compiled(given))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_without_gradients_the_losses_are_the_same_bits() -> None:
    given = arguments(290, 3, 64, directions=FOUR_DIRECTIONS)
    expected = compiled(given)
    given[-2] = False
    losses, *empty, facts = compiled(given)
    assert torch.equal(losses, expected[0])
    assert torch.equal(facts, expected[5])
    assert all(x.shape == (0,) for x in empty)


MEMORY = """
import re, torch
from pathlib import Path
from triton_st import ops
def resident(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
def run(rows):
    torch.manual_seed(0)
    q, d = torch.randn(rows, 32, requires_grad=True), torch.randn(2 * rows, 32, requires_grad=True)
    ids = torch.arange(3 * rows)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    ops.mnrl_loss(
        q, d, directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"), margin=0.1,
        hardness_mode="in_batch_negatives", hardness_strength=2.0, query_ids=ids[:rows], document_ids=ids[rows:],
        matryoshka_dims=(8, 16, 24, 32),
    ).backward()
    return resident("VmHWM") - before
run(64)
print(run(4096))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells how much memory was used")
def test_memory_is_bounded() -> None:
    """4,096 triplets have 400 MiB of similarities in four directions, for each of four prefixes."""
    env = {**os.environ, "TRITON_ST_BACKEND": "cpp"}
    bound = 64.0
    if "libasan" in env.get("LD_PRELOAD", ""):
        # It keeps 256 MiB of what is freed, unless told not to, and marks what is used in memory of an eighth the size.
        bound *= 9 / 8
        env["ASAN_OPTIONS"] = env.get("ASAN_OPTIONS", "") + ":quarantine_size_mb=0:thread_local_quarantine_size_kb=0"
    done = subprocess.run([sys.executable, "-c", MEMORY], env=env, capture_output=True, text=True, check=True)
    assert float(done.stdout) < bound


LESSER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from triton_st import extension
folder = Path({source!r})
extension.sources = lambda: [p for p in sorted(folder.iterdir()) if p.suffix == ".h" or p.name == "mnrl_rows.cpp"]
import test_mnrl_loss_cpp as this
for options in this.OPTIONS:
    for dtype in this.DTYPES:
        this.assert_right(this.arguments(75, 3, 50, dtype, **options))
"""


@pytest.mark.parametrize("processor", ["x86-64-v3", "x86-64"])
def test_lesser_instruction_sets(processor: str, tmp_path: Path) -> None:
    env = {**os.environ, "TRITON_ST_CACHE": str(tmp_path), "TRITON_ST_CXXFLAGS": f"-O1 -march={processor}"}
    source = str(extension.sources()[0].parent)
    code = LESSER.format(tests=str(Path(__file__).parent), source=source)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
