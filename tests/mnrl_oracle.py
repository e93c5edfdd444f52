"""The contrastive loss with all its options, written a second time: masks by plain loops over texts, no kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GAP = 1e-4
"""How far from a margin's limit a similarity must be, so that rounding cannot decide what is masked."""


class Undecided(Exception):
    """A similarity lies on a margin's limit."""


def mnrl_oracle(
    queries: Tensor,
    documents: Tensor,
    scale: float | Tensor = 20.0,
    *,
    similarity: str = "cos_sim",
    targets: Tensor | int | None = None,
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    query_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    margin: float | None = None,
    margin_strategy: str = "absolute",
    weights: Tensor | None = None,
    matryoshka_dims: Sequence[int] | None = None,
    matryoshka_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    all_queries: Tensor | None = None,
    all_query_ids: Tensor | None = None,
) -> Tensor:
    """`ops.mnrl_loss`, differentiable any number of times, in the inputs' dtype widened to float32."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    q, d = queries.to(wide), documents.to(wide)
    others = q if all_queries is None else all_queries.to(wide)
    scales = torch.as_tensor(scale, dtype=wide).expand(len(q))
    offset = targets if isinstance(targets, int) else 0
    target = targets.tolist() if isinstance(targets, Tensor) else [offset + i for i in range(len(q))]
    pool = _Texts(target, offset, len(others), len(d), isinstance(targets, Tensor))
    if query_ids is not None and document_ids is not None:
        pool.name(query_ids.tolist(), document_ids.tolist(), (query_ids if all_query_ids is None else all_query_ids))
    total = q.new_zeros(len(q))
    dims = list(matryoshka_dims or [q.shape[1]])
    for dim, dim_weight in zip(dims, matryoshka_weights or [1.0] * len(dims), strict=True):

        def similarities(left: Tensor, right: Tensor, dim: int = dim) -> Tensor:
            left, right = left[:, :dim], right[:, :dim]
            if similarity == "cos_sim":
                left, right = F.normalize(left, dim=1), F.normalize(right, dim=1)
            return left @ right.T

        sims = {
            "query_to_doc": similarities(q, d),
            "query_to_query": similarities(q, others),
            "doc_to_query": similarities(d[target], others),
            "doc_to_doc": similarities(d[target], d),
        }
        for i, t in enumerate(target):
            positive = sims["query_to_doc"][i, t]
            sums = []
            for direction in directions:
                row, same = sims[direction][i], pool.positive(direction, i)
                kept = [
                    j == same
                    or not (pool.excluded(direction, i, j) or _too_near(row[j], positive, margin, margin_strategy))
                    for j in range(len(row))
                ]
                logits = row * scales[i]
                if direction == "query_to_doc":
                    hard = [hardness_strength * pool.is_penalised(hardness_mode, i, j) for j in range(len(row))]
                    logits = logits + row.detach() * row.new_tensor(hard)
                sums.append(logits[kept])
            sums = [torch.cat(sums)] if partition_mode == "joint" else sums
            log_z = torch.stack([x.logsumexp(0) for x in sums]).mean()
            total[i] = total[i] + dim_weight * (log_z - positive * scales[i])
    w = torch.ones_like(total) if weights is None else weights.to(wide)
    total = total * w
    return total if reduction == "none" else total.sum() / (w.sum() if reduction == "mean" else 1)


def _too_near(x: Tensor, positive: Tensor, margin: float | None, strategy: str) -> bool:
    if margin is None:
        return False
    limit = positive.item() - margin * (abs(positive.item()) if strategy == "relative" else 1)
    if abs(x.item() - limit) < GAP * max(1.0, abs(limit)):
        raise Undecided
    return x.item() > limit


class _Texts:
    """Who is whose positive, whose hard negative, and the same text as whom."""

    def __init__(self, target: list[int], offset: int, num_queries: int, num_documents: int, free: bool) -> None:
        self.target, self.offset, self.free = target, offset, free
        self.num_queries, self.num_documents = num_queries, num_documents
        self.named = False

    def name(self, query_ids: list[int], document_ids: list[int], all_query_ids: Tensor) -> None:
        self.named = True
        self.query_ids, self.document_ids, self.all_query_ids = query_ids, document_ids, all_query_ids.tolist()
        self.asked: dict[int, int] = {}  # document -> the query that it answers, by id
        for query_id, t in zip(query_ids, self.target, strict=True) if self.free else enumerate_ids(self.all_query_ids):
            self.asked[t] = min(query_id, self.asked.get(t, query_id))

    def positive(self, direction: str, i: int) -> int | None:
        if direction == "query_to_doc":
            return self.target[i]
        return self.offset + i if direction == "doc_to_query" else None

    def is_own(self, i: int, j: int) -> bool:
        return j == self.target[i] if self.free else j % self.num_queries == self.offset + i

    def is_penalised(self, mode: str | None, i: int, j: int) -> bool:
        if mode is None or j == self.target[i]:
            return False
        return mode == "all_negatives" or self.is_own(i, j) == (mode == "hard_negatives")

    def excluded(self, direction: str, i: int, j: int) -> bool:
        if direction == "query_to_query" and j == self.offset + i:
            return True
        if direction == "doc_to_doc" and self.is_own(i, j):
            return True
        if not self.named:
            return False
        query, document = self.query_ids[i], self.document_ids[self.target[i]]
        if direction in ("query_to_doc", "doc_to_doc"):
            return self.document_ids[j] in (query, document) or self.asked.get(j) == query
        return self.all_query_ids[j] in (query, document) or self.document_ids[j] == document


def enumerate_ids(ids: list[int]) -> list[tuple[int, int]]:
    """(id, position) pairs."""
    return [(query_id, t) for t, query_id in enumerate(ids)]
