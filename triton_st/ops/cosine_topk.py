"""The rows of a corpus nearest to each query by cosine, without the matrix of all similarities."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from triton_st.ops._library import LIBRARY, call, define, require_dims, require_floating

MOST_ROWS = 2**32 - 1


def cosine_topk(queries: Tensor, corpus: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows of the corpus with the highest cosine to each query, as sentence-transformers' `semantic_search`.

    Neither input is written out normalised, nor is more of the similarities held than a tile of fixed size: beside the
    results this takes memory in proportion to B · k. Cosines are those of `cosine_similarity`, in float32.

    Scores descend; of equal ones the lower row comes first, so the result is one and the same on every run and any
    number of threads. A NaN or inf in a row makes all its scores NaN, and these come before all numbers, as in
    `torch.topk`: a broken row of the corpus is the first found for every query, not hidden. A zero row scores 0.

    Up to 16 queries the CPU sums products in another order than for more, so the last bit of a score may depend on how
    many come together. On a GPU, k above 1,024 is served by PyTorch, in bounded memory too, but slower.

    Args:
        queries: [B, D]; float32, float16, bfloat16 (float64 by the reference).
        corpus: [N, D], of the queries' dtype and device; at most 2^32 - 1 rows.
        k: how many to find, at least 1; min(k, N) are found, all N rows of a smaller corpus.

    Returns:
        Scores [B, min(k, N)], float32 (float64 for float64), and the corpus rows that they are of, as many int64. There
        is no gradient: a backward pass through the scores raises NotImplementedError. To train on what was found, take
        `cosine_similarity` with those rows.

    Raises:
        ValueError: shapes or devices do not fit, k is not positive, the corpus has too many rows.
        TypeError: dtypes are not floating or differ, k is not an int.
    """
    return call("cosine_topk", queries, corpus, k)


def _check(queries: Tensor, corpus: Tensor, k: int) -> None:
    require_floating(queries=queries, corpus=corpus)
    require_dims(queries, "queries", "[B, D]")
    require_dims(corpus, "corpus", "[N, D]")
    if queries.shape[1] != corpus.shape[1]:
        raise ValueError(
            f"queries and corpus must have rows of one length D, got {queries.shape[1]} and {corpus.shape[1]}"
        )
    rows = corpus.shape[0]  # len() would tie a traced graph to this one number
    if rows > MOST_ROWS:
        raise ValueError(f"corpus must have at most {MOST_ROWS:,} rows, got {rows:,}")
    if isinstance(k, bool) or not isinstance(k, int | torch.SymInt):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def _fake(queries: Tensor, corpus: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], torch.sym_min(k, corpus.shape[0]))
    dtype = torch.promote_types(queries.dtype, torch.float32)
    return queries.new_empty(shape, dtype=dtype), queries.new_empty(shape, dtype=torch.int64)


def _refuse(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError("triton_st::cosine_topk has no gradient; take cosine_similarity with the rows it found")


define("cosine_topk(Tensor queries, Tensor corpus, int k) -> (Tensor, Tensor)", check=_check, fake=_fake)
# Without a rule, autograd would only warn, and go on with zeros.
torch.library.register_autograd("triton_st::cosine_topk", _refuse, lib=LIBRARY)
