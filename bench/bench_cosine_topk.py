"""cosine_topk against faiss's exact inner-product search and PyTorch's product and topk; util.semantic_search against
sentence-transformers' own.

faiss and PyTorch are handed rows of length 1, and faiss its index built, before the clock starts; ours normalises what
it reads. The limit is reading the corpus once (up to 8 queries) or oneDNN's product alone.

`pytest bench/bench_cosine_topk.py --benchmark-only`
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import sentence_transformers.util as st_util
import torch
from torch import Tensor

from bench.conftest import Interleaved, Limit, Run, dtype_name
from bench.products import onednn_product
from triton_st import ops, reference, util

WIDTH = 384
# queries, corpus rows, k, dtype
CASES = [
    *((b, 10_000, k, torch.float32) for b in (1, 8, 128, 1024) for k in (10, 100)),
    *((b, 100_000, k, torch.float32) for b in (1, 8) for k in (10, 100)),
    *((b, 100_000, 10, torch.float32) for b in (128, 1024)),
    *((b, 100_000, 10, dtype) for dtype in (torch.float16, torch.bfloat16) for b in (1, 8, 128)),
    *((b, 1_000_000, 10, torch.float32) for b in (1, 8)),
]
SEARCHES = [(8, 10_000, 10), (1024, 10_000, 100), (128, 100_000, 10)]


@functools.lru_cache(maxsize=1)
def corpus_of(rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Callable[..., Any] | None]:
    """Random rows, the same of length 1, and faiss's search of those (on a CPU): flat, in halves where these are."""
    generator = torch.Generator().manual_seed(rows)
    corpus = torch.randn(rows, WIDTH, generator=generator).to(dtype)
    unit = torch.nn.functional.normalize(corpus.float())
    search = None
    if device.type == "cpu":
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        if dtype == torch.float32:
            index = faiss.IndexFlatIP(WIDTH)
        else:
            kinds = {torch.float16: faiss.ScalarQuantizer.QT_fp16, torch.bfloat16: faiss.ScalarQuantizer.QT_bf16}
            index = faiss.IndexScalarQuantizer(WIDTH, kinds[dtype], faiss.METRIC_INNER_PRODUCT)
        index.add(unit.numpy())
        search = index.search
    return corpus.to(device), unit.to(dtype).to(device), search


def queries_of(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count)).to(dtype).to(device)


def assert_found(scores: Tensor, rows: Tensor, queries: Tensor, corpus: Tensor, best: Tensor) -> None:
    """Parity, before anything is timed: the scores of `rows` are what is said, and as high as the best."""
    unit = reference.normalize(queries)
    for some in torch.arange(len(queries)).split(64):
        exact = torch.einsum("bd,bkd->bk", unit[some], reference.normalize(corpus[rows[some]]))
        torch.testing.assert_close(scores[some], exact, rtol=0, atol=2e-6)
    tolerance = 2e-6 if best.dtype == torch.float32 else 4 * torch.finfo(best.dtype).eps
    torch.testing.assert_close(scores, best.float(), rtol=0, atol=tolerance)


def limit_of(queries: Tensor, corpus: Tensor) -> Limit | None:
    if len(queries) > 8:
        return onednn_product(queries, corpus, times=1)
    numbers = corpus.view(torch.float32)
    return "reading the corpus once", numbers.sum


@pytest.mark.parametrize(("count", "rows", "k", "dtype"), CASES, ids=str)
def test_cosine_topk(
    interleaved: Interleaved, count: int, rows: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    corpus, unit, search = corpus_of(rows, dtype, device)
    queries = queries_of(count, dtype, device)
    unit_queries = reference.normalize(queries)
    in_dtype = unit_queries.to(dtype)

    def product_and_topk() -> tuple[Tensor, Tensor]:
        return (in_dtype @ unit.T).topk(k)

    peers: dict[str, Run] = {"PyTorch product and topk": product_and_topk}
    if search is not None:
        peers["faiss"] = functools.partial(search, unit_queries.numpy(), k)
    assert_found(*ops.cosine_topk(queries, corpus, k), queries, corpus, product_and_topk()[0])
    interleaved(
        lambda: ops.cosine_topk(queries, corpus, k),
        peers,
        limit=limit_of(queries, corpus),
        operator="cosine_topk",
        shape={"queries": count, "corpus rows": rows, "width": WIDTH, "k": k},
        dtype=dtype_name(dtype),
        direction="forward",
        gflop=2e-9 * count * rows * WIDTH,
    )


@pytest.mark.parametrize(("count", "rows", "k"), SEARCHES, ids=str)
def test_semantic_search(interleaved: Interleaved, count: int, rows: int, k: int, device: torch.device) -> None:
    corpus, _, _ = corpus_of(rows, torch.float32, device)
    queries = queries_of(count, torch.float32, device)
    ours, theirs = (module.semantic_search(queries, corpus, top_k=k) for module in (util, st_util))
    for found, expected in zip(ours, theirs, strict=True):
        assert [hit["score"] for hit in found] == pytest.approx([hit["score"] for hit in expected], abs=2e-6)
    interleaved(
        lambda: util.semantic_search(queries, corpus, top_k=k),
        {"sentence-transformers semantic_search": lambda: st_util.semantic_search(queries, corpus, top_k=k)},
        operator="util.semantic_search",
        shape={"queries": count, "corpus rows": rows, "width": WIDTH, "k": k},
        dtype="float32",
        direction="forward",
    )
