"""The contrastive loss row by row with all its options and its gradients: what every backend's `mnrl_rows` computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from triton_st.reference.normalize import normalize, normalize_backward, widen

QUERY_TO_DOC, QUERY_TO_QUERY, DOC_TO_QUERY, DOC_TO_DOC = 1, 2, 4, 8
"""Bits of `directions`."""
IN_BATCH_NEGATIVES, HARD_NEGATIVES, ALL_NEGATIVES = 1, 2, 3
"""Values of `hardness_mode`; 0 is none."""


def mnrl_rows(
    queries: Tensor,
    documents: Tensor,
    all_queries: Tensor | None,
    targets: Tensor | None,
    offset: int,
    scale: Tensor,
    row_weights: Tensor | None,
    normalized: bool,
    directions: int,
    joint: bool,
    hardness_mode: int,
    hardness_strength: float,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
    owner_ids: Tensor | None,
    margin: float | None,
    relative_margin: bool,
    dims: Sequence[int],
    dim_weights: Sequence[float],
    gradients: bool,
    diagnostics: bool,
    similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss of each of B queries, and the gradients of Σ_i row_weights[i] · losses[i].

    Row i is the pair of query i and its positive t, document `targets[i]`, or `offset` + i without targets. Its
    candidates, direction by direction:

        query_to_doc    query i against all documents; the positive is one of them
        query_to_query  query i against all other queries (without query `offset` + i)
        doc_to_query    document t against all queries
        doc_to_doc      document t against the documents of other queries

    A similarity times `scale`, plus its hardness penalty, is a logit. losses[i] is log Σ exp(logits) − logit of the
    positive: one sum over the candidates of all directions if `joint`, else the mean over directions of one sum each.

    A candidate is left out of the sums (never the positive pair itself, in query_to_doc or doc_to_query)
    - by ids, with a = query_ids[i] and b = document_ids[t]:
      document j if document_ids[j] is a or b, or owner_ids[j] is a;
      query w if owner_ids[w] is a or b, or document_ids[w] is b;
    - by `margin`, if its unscaled similarity is > positive − margin; if `relative_margin`, > positive − |positive| ·
      margin.

    Args:
        queries: [B, D]; float32, float16 or bfloat16.
        documents: [M, D], of the same dtype. With `targets`, M is arbitrary. Else M is a multiple of W (the rows of
            `all_queries`, or B), and document c·W + g belongs to query g: c = 0 are the positives.
        all_queries: [W, D], the queries of query_to_query and doc_to_query, row `offset` + i being query i; None:
            `queries`, whose gradient then includes what these directions add. The positive pair's gradient, in
            whichever direction, is the gradient of `queries`, not of `all_queries`.
        targets: int64 [B], positions in `documents`; with query_to_doc alone, `offset` 0 and no `all_queries`.
        offset: query i is query `offset` + i of `all_queries`.
        scale: float32 [] or [B], > 0.
        row_weights: float32 [B]; None: 1 / B each.
        normalized: similarities are cosines, else dot products.
        directions: sum of `QUERY_TO_DOC` (always) and the other bits.
        joint: one softmax over all directions; without it, only query_to_doc and doc_to_query.
        hardness_mode: whose query_to_doc logits get `hardness_strength` · similarity added, as a constant: 0 nobody's,
            1 the documents' of other queries, 2 the query's own hard negatives', 3 all but the positive's. With
            `targets` only the positive is a query's own.
        query_ids, document_ids, owner_ids: int64 [B], [M], [M], all or none. owner_ids[j] is the id of the query that
            document j is the positive of, and document_ids[j] where it is none's. Without `targets`, owner_ids[:W] are
            therefore the ids of all queries.
        margin: None: nothing is left out by similarity.
        dims, dim_weights: losses[i] is Σ_k dim_weights[k] · the loss of the first dims[k] columns, ascending. Empty: of
            all columns, with weight 1. Masks by margin and cosines are each prefix's own.
        gradients: whether to compute them here; without it, autograd can derive `losses`.
        diagnostics: whether to compute them.
        similarity_fct: no argument of the operator: [N, D], [K, D] -> [N, K] in place of cosine and dot, queries first
            in query_to_doc and doc_to_query; without `gradients`, which autograd then derives.

    Returns:
        losses [B]; gradients of queries [B, D], documents [M, D], all_queries [W, D] and scale [B] (row by row); and
        diagnostics [4, B]. All float32 (float64 for float64 inputs). What is not asked for, or is the gradient of
        no `all_queries`, has shape [0]. Rows of the diagnostics, all of the longest prefix in query_to_doc, among the
        candidates not left out: 1 if no other similarity reaches the positive's, else 0; 1 / (1 + how many do); the
        positive's similarity; the largest other similarity, -inf where there is none.
    """
    q, d = widen(queries), widen(documents)
    others = None if all_queries is None else widen(all_queries)
    b, w, m = len(q), len(q if others is None else others), len(d)
    rows = torch.arange(b, device=q.device)
    own = rows + offset  # whose number query i has among all queries
    target = own if targets is None else targets
    owner = torch.arange(m, device=q.device) % w if targets is None else None  # which query a document belongs to
    scale = scale.to(q.dtype).expand(b)
    weights = q.new_full((b,), 1 / b) if row_weights is None else row_weights.to(q.dtype)

    is_target = torch.zeros(b, m, dtype=torch.bool, device=q.device)
    is_target[rows, target] = True
    is_own_query = torch.zeros(b, w, dtype=torch.bool, device=q.device)
    if targets is None:
        is_own_query[rows, own] = True
    is_own_document = is_target if owner is None else owner == own[:, None]

    keep_documents = torch.ones_like(is_target)
    keep_queries = torch.ones_like(is_own_query)
    if query_ids is not None:
        assert document_ids is not None
        assert owner_ids is not None
        query_id, target_id = query_ids[:, None], document_ids[target][:, None]
        keep_documents = (document_ids != query_id) & (document_ids != target_id) & (owner_ids != query_id)
        if targets is None:
            keep_queries = (owner_ids[:w] != query_id) & (owner_ids[:w] != target_id) & (document_ids[:w] != target_id)

    losses, grad_scale = torch.zeros_like(weights), torch.zeros_like(weights)
    grad_q, grad_d = torch.zeros_like(q), torch.zeros_like(d)
    grad_others = grad_q if others is None else torch.zeros_like(others)
    facts = q.new_empty(0)

    for dim, dim_weight in zip(dims or [q.shape[1]], dim_weights or [1.0], strict=True):

        def unit(x: Tensor, dim: int = dim) -> Tensor:
            return normalize(x[:, :dim]) if normalized else x[:, :dim]

        left_q, right_d = unit(q), unit(d)
        left_d, right_q = right_d[target], left_q if others is None else unit(others)
        # direction: left rows, right rows, candidates, the positive pair among them
        blocks = {
            QUERY_TO_DOC: (left_q, right_d, keep_documents | is_target, is_target),
            QUERY_TO_QUERY: (left_q, right_q, keep_queries & ~is_own_query, None),
            DOC_TO_QUERY: (left_d, right_q, keep_queries | is_own_query, is_own_query),
            DOC_TO_DOC: (left_d, right_d, keep_documents & ~is_own_document, None),
        }
        chosen = [bit for bit in blocks if directions & bit]
        similarities = [_similarity(similarity_fct, bit, *blocks[bit][:2]) for bit in chosen]
        positive = similarities[0].gather(1, target[:, None])
        bound = None if margin is None else positive - margin * (positive.abs() if relative_margin else 1)
        logits = []
        for bit, similarity in zip(chosen, similarities, strict=True):
            candidate, is_positive = blocks[bit][2:]
            if bound is not None:
                candidate = candidate & ~(similarity > bound)
                candidate = candidate if is_positive is None else candidate | is_positive
            logit = similarity * scale[:, None]
            if bit == QUERY_TO_DOC:
                penalised = _penalised(hardness_mode, is_target, is_own_document)
                logit = logit + torch.where(penalised, hardness_strength * similarity.detach(), 0)
                if diagnostics:
                    facts = _diagnostics(similarity, candidate & ~is_target, positive)
            logits.append(logit.masked_fill(~candidate, -torch.inf))

        sums = [torch.cat(logits, 1).logsumexp(1)] * len(chosen) if joint else [x.logsumexp(1) for x in logits]
        losses += dim_weight * (torch.stack(sums).mean(0) - positive[:, 0] * scale)
        if not gradients:
            continue

        # d losses[i] / d logit: a softmax over all candidates. That of the positive pair, in whichever direction, is
        # minus the sum of all others, for 1 − p has no digits left where p is nearly 1.
        shares = []
        for bit, logit, total in zip(chosen, logits, sums, strict=True):
            share = torch.exp(logit - total[:, None]) / (1 if joint else len(chosen))
            is_positive = blocks[bit][3]
            shares.append(share if is_positive is None else share.masked_fill(is_positive, 0))
        shares[0] = torch.where(is_target, -torch.stack([x.sum(1) for x in shares]).sum(0)[:, None], shares[0])
        for bit, share, similarity in zip(chosen, shares, similarities, strict=True):
            left, right, *_ = blocks[bit]
            share = share * (dim_weight * weights)[:, None]
            grad_scale += (share * torch.where(share == 0, 0, similarity)).sum(1)
            share = share * scale[:, None]
            to_left, to_right = share @ right, share.T @ left
            grad_left = grad_q if bit in (QUERY_TO_DOC, QUERY_TO_QUERY) else grad_d
            left_rows, left_at = (q, rows) if grad_left is grad_q else (d[target], target)
            right_rows, grad_right = (d, grad_d) if bit in (QUERY_TO_DOC, DOC_TO_DOC) else (others, grad_others)
            right_rows = q if right_rows is None else right_rows
            if normalized:
                to_left = normalize_backward(to_left, left_rows[:, :dim])
                to_right = normalize_backward(to_right, right_rows[:, :dim])
            grad_left[:, :dim].index_add_(0, left_at, to_left)
            grad_right[:, :dim] += to_right

    if not gradients:
        grad_q, grad_d, grad_others, grad_scale = (q.new_empty(0) for _ in range(4))
    return losses, grad_q, grad_d, q.new_empty(0) if others is None else grad_others, grad_scale, facts


def _similarity(fct: Callable[[Tensor, Tensor], Tensor] | None, bit: int, left: Tensor, right: Tensor) -> Tensor:
    if fct is None:
        return left @ right.T
    queries_left = bit in (QUERY_TO_DOC, QUERY_TO_QUERY)
    return fct(left, right) if queries_left else fct(right, left).T


def _penalised(mode: int, is_target: Tensor, is_own_document: Tensor) -> Tensor:
    if mode == IN_BATCH_NEGATIVES:
        return ~is_own_document
    if mode == HARD_NEGATIVES:
        return is_own_document & ~is_target
    return ~is_target if mode == ALL_NEGATIVES else torch.zeros_like(is_target)


def _diagnostics(similarity: Tensor, is_rival: Tensor, positive: Tensor) -> Tensor:
    rank = 1 + (is_rival & (similarity >= positive)).sum(1)
    hardest = similarity.masked_fill(~is_rival, -torch.inf).amax(1)
    return torch.stack([(rank == 1).to(similarity.dtype), 1 / rank, positive[:, 0], hardest])
