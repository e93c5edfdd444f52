"""Similarities between embeddings under sentence-transformers' names and signs (distances are negated).

Every function takes lists, numpy arrays or tensors; a single vector counts as one row where a matrix is computed. Half
precision is scored in float32, since scores rounded to half tie where they should not.

Reference: https://sbert.net/docs/package_reference/util.html.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from triton_st import ops, reference

Embeddings: TypeAlias = Tensor | np.ndarray | Sequence[Any]


def _tensor(embeddings: Embeddings) -> Tensor:
    """As a floating-point tensor of 16 bits or more."""
    if isinstance(embeddings, Tensor):
        tensor = embeddings
    elif isinstance(embeddings, np.ndarray):
        # from_numpy refuses what it cannot share: read-only buffers, negative strides
        shareable = embeddings.flags.writeable and all(stride >= 0 for stride in embeddings.strides)
        tensor = torch.from_numpy(embeddings if shareable else embeddings.copy())
    elif len(embeddings) and all(isinstance(row, Tensor) for row in embeddings):
        tensor = torch.stack(list(embeddings))
    elif len(embeddings) and all(isinstance(row, np.ndarray) for row in embeddings):
        tensor = torch.from_numpy(np.stack(embeddings))
    else:
        tensor = torch.tensor(embeddings)
    return tensor if tensor.is_floating_point() and tensor.itemsize > 1 else tensor.float()


def _float_tensor(embeddings: Embeddings) -> Tensor:
    tensor = _tensor(embeddings)
    return tensor.float() if torch.finfo(tensor.dtype).bits < 32 else tensor


def _matrices(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [rows, D] of one dtype."""
    pair = [tensor.unsqueeze(0) if tensor.dim() == 1 else tensor for tensor in (a, b)]
    dtype = torch.promote_types(pair[0].dtype, pair[1].dtype)
    left, right = (tensor.to(dtype) for tensor in pair)
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[1]:
        raise ValueError(
            f"a, b: expected [M, D] and [N, D] with one D, got {tuple(left.shape)} and {tuple(right.shape)}"
        )
    return left, right


def _float_matrices(a: Embeddings, b: Embeddings) -> tuple[Tensor, Tensor]:
    return _matrices(_float_tensor(a), _float_tensor(b))


def _rows(a: Embeddings, b: Embeddings) -> tuple[Tensor, Tensor]:
    left, right = _float_tensor(a), _float_tensor(b)
    if left.shape != right.shape:
        raise ValueError(f"a, b: expected one shape, got {tuple(left.shape)} and {tuple(right.shape)}")
    return left, right


def cos_sim(a: Embeddings, b: Embeddings) -> Tensor:
    """Cosine similarity of every row of a [M, D] with every row of b [N, D] -> [M, N]; 0 for a zero vector."""
    return ops.cosine_similarity(*_float_matrices(a, b))


def dot_score(a: Embeddings, b: Embeddings) -> Tensor:
    """Dot product of every row of a [M, D] with every row of b [N, D] -> [M, N]."""
    left, right = _float_matrices(a, b)
    return left @ right.T


def euclidean_sim(a: Embeddings, b: Embeddings) -> Tensor:
    """Negated Euclidean distance of every row of a [M, D] to every row of b [N, D] -> [M, N]."""
    return -torch.cdist(*_float_matrices(a, b), p=2.0)


def manhattan_sim(a: Embeddings, b: Embeddings) -> Tensor:
    """Negated Manhattan distance of every row of a [M, D] to every row of b [N, D] -> [M, N]."""
    return -torch.cdist(*_float_matrices(a, b), p=1.0)


def pairwise_cos_sim(a: Embeddings, b: Embeddings) -> Tensor:
    """Cosine similarity of a[i] with b[i], both [N, D] -> [N]; 0 for a zero vector."""
    left, right = _rows(a, b)
    return (normalize_embeddings(left) * normalize_embeddings(right)).sum(-1)


def pairwise_dot_score(a: Embeddings, b: Embeddings) -> Tensor:
    """Dot product of a[i] with b[i], both [N, D] -> [N]."""
    left, right = _rows(a, b)
    return (left * right).sum(-1)


def pairwise_euclidean_sim(a: Embeddings, b: Embeddings) -> Tensor:
    """Negated Euclidean distance of a[i] to b[i], both [N, D] -> [N]."""
    left, right = _rows(a, b)
    return -torch.linalg.vector_norm(left - right, dim=-1)


def pairwise_manhattan_sim(a: Embeddings, b: Embeddings) -> Tensor:
    """Negated Manhattan distance of a[i] to b[i], both [N, D] -> [N]."""
    left, right = _rows(a, b)
    return -(left - right).abs().sum(-1)


def normalize_embeddings(embeddings: Tensor) -> Tensor:
    """Scale vectors [..., D] of any finite size to length 1, in float32; a zero vector stays and has gradient zero."""
    return reference.normalize(embeddings).to(embeddings.dtype)


SIMILARITIES = {
    "cosine": (cos_sim, pairwise_cos_sim),
    "dot": (dot_score, pairwise_dot_score),
    "euclidean": (euclidean_sim, pairwise_euclidean_sim),
    "manhattan": (manhattan_sim, pairwise_manhattan_sim),
}
"""Similarity name -> (every row with every row, row with row)."""


def semantic_search(
    query_embeddings: Embeddings,
    corpus_embeddings: Embeddings,
    query_chunk_size: int = 100,
    corpus_chunk_size: int = 65_536,
    top_k: int = 10,
    score_function: Callable[[Tensor, Tensor], Tensor] = cos_sim,
) -> list[list[dict[str, int | float]]]:
    """The `top_k` rows of a corpus that score highest for each query.

    By the cosine it is `ops.cosine_topk`, whose memory does not grow with the corpus: chunk sizes then mean nothing,
    half precision is read as it is (and scored in float32), and of equal scores the lower row comes first.

    Args:
        query_embeddings: [Q, D], or [D] for one query. corpus_embeddings: [N, D].
        query_chunk_size, corpus_chunk_size: how many of each `score_function` is given at a time, which bounds the
            memory.
        top_k: how many to find; all of a smaller corpus.
        score_function: [Q, D], [N, D] -> [Q, N].

    Returns:
        For each query `{"corpus_id": row, "score": score}`, the highest score first.

    Raises:
        ValueError: shapes do not fit, or a size is not positive.

    Reference: https://sbert.net/docs/package_reference/util.html#sentence_transformers.util.semantic_search.
    """
    for name, value in (("query_chunk_size", query_chunk_size), ("corpus_chunk_size", corpus_chunk_size)):
        if value <= 0:
            raise ValueError(f"{name}: expected a positive int, got {value!r}")
    if top_k <= 0:
        raise ValueError(f"top_k: expected a positive int, got {top_k!r}")
    if score_function is cos_sim:
        queries, corpus = _matrices(_tensor(query_embeddings), _tensor(corpus_embeddings))
        scores, rows = ops.cosine_topk(queries.to(corpus.device), corpus, operator.index(top_k))
        return _hits(scores, rows)
    queries, corpus = _float_matrices(query_embeddings, corpus_embeddings)
    queries = queries.to(corpus.device)
    found: list[list[dict[str, int | float]]] = []
    for chunk in queries.split(query_chunk_size):
        best = chunk.new_empty(len(chunk), 0)
        rows = torch.empty(len(chunk), 0, dtype=torch.int64, device=corpus.device)
        for start in range(0, len(corpus), corpus_chunk_size):
            scores = score_function(chunk, corpus[start : start + corpus_chunk_size])
            numbers = torch.arange(start, start + scores.shape[1], device=corpus.device).expand_as(scores)
            candidates = torch.cat([best, scores], 1)
            best, index = candidates.topk(min(top_k, candidates.shape[1]), dim=1)
            rows = torch.cat([rows, numbers], 1).gather(1, index)
        found += _hits(best, rows)
    return found


def _hits(scores: Tensor, rows: Tensor) -> list[list[dict[str, int | float]]]:
    """Scores and corpus rows, both [Q, k], as sentence-transformers returns them."""
    return [
        [{"corpus_id": row, "score": score} for row, score in zip(*pair, strict=True)]
        for pair in zip(rows.tolist(), scores.tolist(), strict=True)
    ]
