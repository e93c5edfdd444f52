"""cosine_topk on every backend: the right rows in the right order, ties, NaN, bounded memory, bad input."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import sentence_transformers.util as st_util
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import DTYPES, every_backend, every_dtype, interpreted, serving, threads
from tolerance import assert_within_tolerance
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from triton_st import backend, kernels, ops, reference
from triton_st.kernels import common

Found = tuple[Tensor, Tensor]
launcher, plain = (importlib.import_module(f"triton_st.{name}.cosine_topk") for name in ("kernels", "reference"))

# queries, corpus rows, width, k; up to 16 queries are few to the C++
SHAPES = [
    (1, 1, 50, 1),
    (1, 5000, 384, 10),
    (2, 300, 7, 300),
    (3, 17, 1, 40),
    (5, 700, 312, 100),
    (16, 5000, 50, 1),
    (17, 5000, 50, 1),
    (33, 1000, 384, 100),
    (300, 900, 50, 5),
    (600, 33, 17, 33),
    (20, 300, 1024, 7),
    (18, 200, 4096, 3),
    (4, 200, 4096, 3),
]
SMALL_SHAPES = [(1, 1, 50, 1), (3, 17, 1, 40), (2, 150, 50, 7), (5, 70, 20, 3)]


@pytest.fixture(autouse=True)
def short_lists(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The interpreter sorts slowly: its lists are as short as a warp."""
    if device.type == "cpu":
        monkeypatch.setattr(launcher, "NUMBERS_PER_THREAD", 1)


def rows(count: int, dim: int, dtype: torch.dtype, device: torch.device, seed: int = 0, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * count + 10 * dim + seed)
    return (torch.randn(count, dim, generator=generator) * size).to(dtype).to(device)


def signs(count: int, device: torch.device, seed: int = 0) -> Tensor:
    """Rows of 16 numbers 1, 0 and -1 whose cosines are exact in any order of sums, and often equal; some are zero."""
    generator = torch.Generator().manual_seed(count + seed)
    x = torch.randint(0, 2, (count, 16), generator=generator).float() * 2 - 1
    x[:, 4:] *= torch.randint(0, 2, (count, 1), generator=generator)  # norm 4 or 2
    x[::11] = 0
    return x.to(device)


def assert_best(found: Found, queries: Tensor, corpus: Tensor, k: int) -> None:
    """`found` are the best k: as good as the float64 oracle's, each with the score of its row, in order, none twice."""
    scores, indices = found
    k = min(k, len(corpus))
    assert scores.shape == indices.shape == (len(queries), k)
    assert (scores.dtype, indices.dtype) == (torch.float32, torch.int64)
    cosines = reference.normalize(queries.double()) @ reference.normalize(corpus.double()).T
    single = (reference.normalize(queries.float()) @ reference.normalize(corpus.float()).T).gather(1, indices)
    best = cosines.topk(k, sorted=True).values
    assert_within_tolerance(scores, best, single.sort(1, descending=True).values, "scores", magnitude=1.0)
    assert_within_tolerance(scores, cosines.gather(1, indices), single, "scores of the rows found", magnitude=1.0)
    assert (scores[:, 1:] <= scores[:, :-1]).all()
    assert all(len(set(line)) == k for line in indices.tolist())


def assert_same(found: Found, expected: Found) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-6, equal_nan=True)
    assert torch.equal(found[1], expected[1])


@every_dtype
@every_backend
def test_finds_the_best(name: str, dtype: torch.dtype, device: torch.device) -> None:
    with serving(name, "cosine_topk", dtype, device):
        for count, n, d, k in SMALL_SHAPES if interpreted(name, device) else SHAPES:
            queries, corpus = rows(count, d, dtype, device), rows(n, d, dtype, device, seed=1)
            assert_best(ops.cosine_topk(queries, corpus, k), queries, corpus, k)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 50),
    n=st.integers(1, 600),
    d=st.integers(1, 70),
    k=st.integers(1, 650),
    dtype=st.sampled_from(DTYPES),
)
@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_any_shape(name: str, count: int, n: int, d: int, k: int, dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    queries, corpus = rows(count, d, dtype, cpu), rows(n, d, dtype, cpu, seed=1)
    with serving(name, "cosine_topk"):
        assert_best(ops.cosine_topk(queries, corpus, k), queries, corpus, k)


@every_backend
@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("k", [1, 10, 200])
def test_equals_sentence_transformers(name: str, count: int, k: int, device: torch.device) -> None:
    if interpreted(name, device):
        count = 2
    n = 50 if interpreted(name, device) else 2000
    queries, corpus = rows(count, 32, torch.float32, device), rows(n, 32, torch.float32, device, seed=1)
    hits = st_util.semantic_search(queries, corpus, top_k=k)
    with serving(name, "cosine_topk", device=device):
        scores, indices = ops.cosine_topk(queries, corpus, k)
    assert indices.tolist() == [[hit["corpus_id"] for hit in line] for line in hits]
    expected = torch.tensor([[hit["score"] for hit in line] for line in hits])
    torch.testing.assert_close(scores.cpu(), expected, rtol=0, atol=1e-6)


@every_dtype
@every_backend
def test_of_equal_scores_the_lower_row_comes_first(name: str, dtype: torch.dtype, device: torch.device) -> None:
    small = interpreted(name, device)
    with serving(name, "cosine_topk", dtype, device):
        for count, n, k in [(2, 90, 5), (3, 90, 32)] if small else [(2, 9000, 50), (40, 9000, 50), (7, 900, 900)]:
            queries, corpus = signs(count, device).to(dtype), signs(n, device, seed=1).to(dtype)
            cosines = reference.normalize(queries.double()) @ reference.normalize(corpus.double()).T
            exact = cosines.sort(dim=1, descending=True, stable=True)
            scores, indices = ops.cosine_topk(queries, corpus, k)
            assert torch.equal(scores.double(), exact.values[:, :k])
            assert torch.equal(indices, exact.indices[:, :k])


@every_dtype
@every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("count", [2, 20])
def test_nan_is_found_first(name: str, bad: float, count: int, dtype: torch.dtype, device: torch.device) -> None:
    if interpreted(name, device):
        count = 2  # the kernels know no few and many
    queries, corpus = rows(count, 24, dtype, device), rows(60, 24, dtype, device, seed=1)
    with serving(name, "cosine_topk", dtype, device):
        expected = ops.cosine_topk(queries, corpus, 60)
        queries[1, 23] = corpus[59, 7] = corpus[33, 0] = bad
        scores, indices = ops.cosine_topk(queries, corpus, 6)
        alone, lowest = ops.cosine_topk(queries, corpus, 2)
    others = [i for i in range(count) if i != 1]
    assert scores[:, :2].isnan().all()
    assert indices[others, :2].tolist() == [[33, 59]] * len(others)
    assert scores[1].isnan().all()
    assert indices[1].tolist() == list(range(6))
    for i in others:  # behind them, what is found without them
        kept = [j for j, row in enumerate(expected[1][i].tolist()) if row not in (33, 59)][:4]
        assert torch.equal(indices[i, 2:], expected[1][i, kept])
        assert torch.equal(scores[i, 2:], expected[0][i, kept])
    assert alone.isnan().all()
    assert lowest[0].tolist() == [33, 59]


@every_backend
@pytest.mark.parametrize("count", [2, 20])
def test_more_nan_than_k(name: str, count: int, device: torch.device) -> None:
    count, n = (2, 60) if interpreted(name, device) else (count, 300)
    corpus = rows(n, 8, torch.float32, device)
    corpus[20:, 3] = float("nan")
    with serving(name, "cosine_topk", device=device):
        scores, indices = ops.cosine_topk(rows(count, 8, torch.float32, device, seed=1), corpus, 5)
    assert scores.isnan().all()
    assert indices.tolist() == [[20, 21, 22, 23, 24]] * count


@every_dtype
@every_backend
@pytest.mark.parametrize("count", [2, 20])
def test_zero_rows_score_zero(name: str, count: int, dtype: torch.dtype, device: torch.device) -> None:
    if interpreted(name, device):
        count = 2
    queries, corpus = rows(count, 50, dtype, device), rows(30, 50, dtype, device, seed=1)
    queries[1], corpus[4], corpus[9] = 0, 0, 0
    with serving(name, "cosine_topk", dtype, device):
        scores, indices = ops.cosine_topk(queries, corpus, 30)
        assert_best((scores, indices), queries, corpus, 30)
    assert not scores[1].any()
    assert indices[1].tolist() == list(range(30))
    assert not scores[(indices == 4) | (indices == 9)].any()


@every_backend
@pytest.mark.parametrize("count", [3, 20])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e30),
        (torch.float32, 3e37),
        (torch.float32, 1e-13),
        (torch.float32, 1e-30),
        (torch.bfloat16, 1e30),
        (torch.float16, 1e4),
        (torch.float16, 1e-6),
    ],
)
def test_huge_and_tiny_rows(name: str, count: int, dtype: torch.dtype, size: float, device: torch.device) -> None:
    if interpreted(name, device):
        count = 2
    with serving(name, "cosine_topk", dtype, device):
        ordinary = rows(20, 40, dtype, device, seed=1)
        extreme = rows(13, 40, dtype, device, size=size)
        for queries in (rows(count, 40, dtype, device), rows(count, 40, dtype, device, size=size)):
            corpus = torch.cat([ordinary, extreme])
            assert_best(ops.cosine_topk(queries, corpus, 9), queries, corpus, 9)


@every_backend
@pytest.mark.parametrize("count", [2, 20])
def test_strided_inputs(name: str, count: int, device: torch.device) -> None:
    with serving(name, "cosine_topk", device=device):
        count, n = (2, 12) if interpreted(name, device) else (count, 180)
        wide, tall = rows(count, 70, torch.float32, device), rows(n, 70, torch.float32, device, seed=1)
        for queries in (wide[:, 3:36], wide[:, ::2][:, :33], wide.T[:33].T, wide[:1, :33].expand(count, -1)):
            for corpus in (tall[::2, 20:53], tall.T.contiguous().T[:, 1:34]):
                expected = ops.cosine_topk(queries.contiguous(), corpus.contiguous(), 4)
                assert_same(ops.cosine_topk(queries, corpus, 4), expected)


@every_backend
@pytest.mark.parametrize(
    ("count", "n", "d", "shape"), [(0, 3, 4, (0, 2)), (3, 0, 4, (3, 0)), (0, 0, 4, (0, 0)), (3, 2, 0, (3, 2))]
)
def test_empty_inputs(name: str, count: int, n: int, d: int, shape: tuple[int, int], device: torch.device) -> None:
    with serving(name, "cosine_topk", device=device):
        scores, indices = ops.cosine_topk(torch.randn(count, d, device=device), torch.randn(n, d, device=device), 2)
    assert torch.equal(scores, torch.zeros(shape, device=device))
    assert torch.equal(indices, torch.arange(shape[1], device=device).expand(shape))
    assert indices.dtype == torch.int64


@every_dtype
def test_results_do_not_depend_on_threads_or_runs(dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    for count, n, d, k in [(1, 30000, 33, 7), (9, 20000, 20, 100), (70, 20000, 20, 50), (400, 9000, 24, 10)]:
        queries, corpus = rows(count, d, dtype, cpu), rows(n, d, dtype, cpu, seed=1)
        corpus[n // 2 :] = corpus[: n - n // 2].clone()  # every score twice, in stripes far apart
        results = []
        with serving("cpp", "cosine_topk"):
            for number in (1, 2, 3, 8, 2):
                with threads(number):
                    results.append(ops.cosine_topk(queries, corpus, k))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        assert (results[0][1][:, 1] - results[0][1][:, 0] == n // 2).all()


def test_scores_are_those_of_cosine_similarity() -> None:
    queries, corpus = torch.randn(40, 300), torch.randn(900, 300)
    with backend.use("cpp"):
        scores, indices = ops.cosine_topk(queries, corpus, 900)
        assert torch.equal(scores, ops.cosine_similarity(queries, corpus).gather(1, indices))


MEMORY = """
import torch
from triton_st import backend, ops

def peak():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

torch.set_num_threads(2)
with backend.use("cpp"):
    for count, corpus in ((512, torch.ones(200_000, 8)), (8, torch.ones(4_000_000, 8, dtype=torch.float16))):
        queries = torch.ones(count, 8, dtype=corpus.dtype)
        ops.cosine_topk(queries, corpus[:1000], 10)
        before = peak()
        ops.cosine_topk(queries, corpus, 10)
        print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_the_process_does_not_grow_with_the_corpus() -> None:
    """All scores would be 390 MiB and 122 MiB, a number for each corpus row 15 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    many, few = map(float, done.stdout.split())
    assert many < 24
    assert few < 8


class Largest(TorchDispatchMode):
    """Remembers the most elements that anything computed had."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else (result,)
        if not getattr(function, "is_view", False):
            self.elements = max([self.elements, *(x.numel() for x in results if isinstance(x, Tensor))])
        return result


def test_triton_holds_a_panel_of_scores_at_most() -> None:
    queries, corpus = (torch.empty(n, 64, device="meta") for n in (3000, 1_000_000))
    with common.recording("cuda") as launches, Largest() as largest:
        kernels.cosine_topk(queries, corpus, 100)
    assert 0 < largest.elements <= launcher.PANEL_SCORES + 16 * launcher.MOST_QUERIES
    assert len(launches) > 3 * 122


def test_the_reference_holds_a_piece_of_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "MOST_SCORES", 4096)
    queries, corpus = torch.randn(64, 8), torch.randn(1000, 8)
    with Largest() as largest:
        reference.cosine_topk(queries, corpus, 10)
    assert largest.elements <= 4096 + 64 * 10


@pytest.mark.parametrize(("panel", "most_queries"), [(512, 2), (8 << 20, 1024)])
def test_triton_panels_and_stripes(
    panel: int, most_queries: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search cut into many panels, each of several stripes, finds what one of a single panel does."""
    monkeypatch.setattr(launcher, "PANEL_SCORES", panel)
    monkeypatch.setattr(launcher, "MOST_QUERIES", most_queries)
    queries, corpus = signs(3, device), signs(400, device, seed=1)
    with common.recording("cuda") as launches:
        kernels.cosine_topk(queries, corpus, 5)
    assert max(launch.grid[1] for launch in launches if len(launch.grid) == 2) > 1
    with serving("triton", "cosine_topk", device=device):
        assert_same(ops.cosine_topk(queries, corpus, 5), reference.cosine_topk(queries, corpus, 5))


@pytest.mark.parametrize("k", [250, 1000])
def test_triton_large_k(k: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the longest list PyTorch takes over."""
    monkeypatch.setattr(launcher, "MOST_KEPT", 256)
    queries, corpus = signs(1, device) + 1, signs(300 if k < 256 else 1001, device, seed=1)
    with serving("triton", "cosine_topk", device=device):
        assert_same(ops.cosine_topk(queries, corpus, k), reference.cosine_topk(queries, corpus, k))


def test_float64_is_served_by_the_reference() -> None:
    queries, corpus = torch.randn(3, 9).double(), torch.randn(40, 9).double()
    scores, indices = ops.cosine_topk(queries, corpus, 4)
    cosines = torch.cosine_similarity(queries[:, None], corpus[None], dim=-1)
    assert torch.equal(indices, cosines.topk(4).indices)
    torch.testing.assert_close(scores, cosines.topk(4).values)


@every_backend
def test_there_is_no_gradient(name: str, device: torch.device) -> None:
    queries, corpus = torch.randn(4, 6, device=device), torch.randn(50, 6, device=device)
    with serving(name, "cosine_topk", device=device):
        expected = ops.cosine_topk(queries, corpus, 3)
        scores, indices = ops.cosine_topk(queries.requires_grad_(), corpus, 3)
    assert torch.equal(scores, expected[0])
    assert torch.equal(indices, expected[1])
    assert not indices.requires_grad
    with pytest.raises(NotImplementedError, match="cosine_topk has no gradient"):
        scores.sum().backward()


@every_backend
def test_opcheck(name: str, device: torch.device) -> None:
    queries, corpus = torch.randn(4, 6, device=device), torch.randn(9, 6, device=device)
    with serving(name, "cosine_topk", device=device):
        for k in (3, 20):
            torch.library.opcheck(torch.ops.triton_st.cosine_topk.default, (queries, corpus, k))
        torch.library.opcheck(torch.ops.triton_st.cosine_topk.default, (queries.half(), corpus.half(), 2))


@every_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(name: str, dynamic: bool, device: torch.device) -> None:
    def search(queries: Tensor, corpus: Tensor) -> Found:
        scores, indices = ops.cosine_topk(queries * 3, corpus, 4)
        return scores + 1, indices

    with serving(name, "cosine_topk", device=device):
        compiled = torch.compile(search, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for n in (30, 20, 3):
            inputs = signs(5, device), signs(n, device, seed=1)
            assert_same(compiled(*inputs), search(*inputs))


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiled_where_the_number_of_rows_depends_on_values() -> None:
    def search(queries: Tensor, corpus: Tensor, kept: Tensor) -> Found:
        scores, indices = ops.cosine_topk(queries, corpus[kept], 4)
        return scores + 1, indices

    compiled = torch.compile(search, fullgraph=True, backend="aot_eager")
    queries, corpus = signs(5, torch.device("cpu")), signs(30, torch.device("cpu"), seed=1)
    for n in (20, 3):
        inputs = queries, corpus, torch.arange(30) < n
        assert_same(compiled(*inputs), search(*inputs))


X = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("queries", "corpus", "k", "error", "message"),
    [
        (torch.zeros(4), X, 1, ValueError, r"queries must be \[B, D\], got shape \[4\]"),
        (X, torch.zeros(1, 2, 4), 1, ValueError, r"corpus must be \[N, D\], got shape \[1, 2, 4\]"),
        (X, torch.zeros(2, 5), 1, ValueError, "rows of one length D, got 4 and 5"),
        (X, X.half(), 1, TypeError, "corpus must have queries's dtype torch.float32, got torch.float16"),
        (X.long(), X.long(), 1, TypeError, "queries must be a floating-point tensor .* got torch.int64"),
        (X, None, 1, TypeError, "corpus must be a tensor, got NoneType"),
        (X.to_sparse(), X, 1, TypeError, "queries must be a dense tensor, got layout torch.sparse_coo"),
        (X, torch.zeros(2, 4, device="meta"), 1, ValueError, "corpus must be on queries's device cpu, got meta"),
        (X, X, 0, ValueError, "k must be at least 1, got 0"),
        (X, X, -3, ValueError, "k must be at least 1, got -3"),
        (X, X, 2.0, TypeError, "k must be an int, got float"),
        (X, X, True, TypeError, "k must be an int, got bool"),
        (X[:1], torch.zeros(1, 4).expand(2**32, 4), 1, ValueError, "corpus must have at most 4,294,967,295 rows"),
    ],
)
def test_bad_input(queries: Any, corpus: Any, k: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.cosine_topk(queries, corpus, k)
