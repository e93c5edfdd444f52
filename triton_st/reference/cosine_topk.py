"""The rows of a corpus nearest to each query by cosine."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_st.reference.normalize import normalize

MOST_SCORES = 1 << 22
"""Scores held at a time."""


def _best(scores: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each line, sorted: NaN first, then by falling score, of equals the one further left."""
    rank = torch.where(scores.isnan(), torch.inf, scores)
    least = rank.topk(k, sorted=True).values[:, -1:]
    above, equal = rank > least, rank == least
    kept = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    order = rank[kept].view(-1, k).sort(dim=1, descending=True, stable=True).indices
    return scores[kept].view(-1, k).gather(1, order), rows[kept].view(-1, k).gather(1, order)


def cosine_topk(queries: Tensor, corpus: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """queries [B, D], corpus [N, D] -> scores and corpus rows, both [B, min(k, N)]: see `ops.cosine_topk`."""
    unit = normalize(queries)
    count, device = len(unit), unit.device
    best = unit.new_empty(count, 0)
    rows = torch.empty(count, 0, dtype=torch.int64, device=device)
    step = max(1, MOST_SCORES // max(count, 1))
    for start in range(0, len(corpus), step):
        scores = unit @ normalize(corpus[start : start + step]).T
        numbers = torch.arange(start, start + scores.shape[1], device=device).expand_as(scores)
        best, rows = torch.cat([best, scores], 1), torch.cat([rows, numbers], 1)
        best, rows = _best(best, rows, min(k, best.shape[1]))
    return best, rows
