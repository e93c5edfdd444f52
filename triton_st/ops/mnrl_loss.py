"""Multiple negatives ranking loss: scaled cross-entropy over in-batch similarities, streamed, with all its variants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from triton_st import backend, reference
from triton_st.ops import mnrl_rows as rows
from triton_st.ops._library import LIBRARY, define, observed, require_floating
from triton_st.reference.mnrl_rows import (
    ALL_NEGATIVES,
    DOC_TO_DOC,
    DOC_TO_QUERY,
    HARD_NEGATIVES,
    IN_BATCH_NEGATIVES,
    QUERY_TO_DOC,
    QUERY_TO_QUERY,
)

DIRECTIONS = {
    "query_to_doc": QUERY_TO_DOC,
    "query_to_query": QUERY_TO_QUERY,
    "doc_to_query": DOC_TO_QUERY,
    "doc_to_doc": DOC_TO_DOC,
}
HARDNESS_MODES = {
    None: 0,
    "in_batch_negatives": IN_BATCH_NEGATIVES,
    "hard_negatives": HARD_NEGATIVES,
    "all_negatives": ALL_NEGATIVES,
}
SIMILARITIES = ("cos_sim", "dot")
PARTITION_MODES = ("joint", "per_direction")
MARGIN_STRATEGIES = ("absolute", "relative")
REDUCTIONS = ("mean", "sum", "none")


class RankingDiagnostics(NamedTuple):
    """How each query's positive ranks among the documents that are its candidates; each field float32 [B]."""

    correct: Tensor
    """1 if no other document is as similar to the query as the positive, else 0."""
    reciprocal_rank: Tensor
    """1 / (1 + the number of other documents at least as similar)."""
    positive_similarity: Tensor
    hardest_negative_similarity: Tensor
    """The largest similarity of another document; -inf where there is no other."""


@overload
def mnrl_loss(
    queries: Tensor, documents: Tensor, scale: float | Tensor = ..., *, diagnostics: Literal[False] = ..., **how: Any
) -> Tensor: ...


@overload
def mnrl_loss(
    queries: Tensor, documents: Tensor, scale: float | Tensor = 20.0, *, diagnostics: Literal[True], **how: Any
) -> tuple[Tensor, RankingDiagnostics]: ...


def mnrl_loss(  # type: ignore[misc]  # `how` stands for the keywords below
    queries: Tensor,
    documents: Tensor,
    scale: float | Tensor = 20.0,
    *,
    similarity: str | Callable[[Tensor, Tensor], Tensor] = "cos_sim",
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
    diagnostics: bool = False,
) -> Tensor | tuple[Tensor, RankingDiagnostics]:
    """Mean over queries of −log softmax(scale · similarity)[positive]; document i is the positive of query i.

    The other documents, hard negatives included, are every query's negatives. Forward and backward stream over the
    similarities in blocks of bounded size, however many there are, with an exact log-sum-exp in float32; each gradient
    runs through the normalisation. A zero row has cosine 0 and gradient 0. Where a gradient will be wanted, mean and
    sum form it in the forward pass, with three matrix products in all; there is no second derivative.

    Args:
        queries: [B, D]; float32, float16, bfloat16 (float64 by the reference).
        documents: [M, D], M a multiple of B: the B positives, then B hard negatives, and so on.
        scale: inverse temperature, finite and > 0: a number, or a tensor [] or [B] (one for each query), which may want
            a gradient.
        similarity: "cos_sim" or "dot"; or any function [N, D], [K, D] -> [N, K], which runs in plain PyTorch, with all
            similarities at once.
        targets: int64 [B], the position of each query's positive in `documents`, of which there may then be any number
            (directions: query_to_doc alone). Or a number, the position of the first query in `all_queries`.
        directions: "query_to_doc", which must be there, and any of
            "query_to_query" (query against all other queries), "doc_to_query" (positive against all queries),
            "doc_to_doc" (positive against the documents of other queries).
        partition_mode: "joint", one softmax over all directions, or "per_direction", the mean of one each, for
            query_to_doc and doc_to_query only.
        hardness_mode: which query_to_doc logits get `hardness_strength` · similarity added, as a constant:
            "in_batch_negatives" (other queries' documents), "hard_negatives" (the query's own), "all_negatives"; None.
        hardness_strength: >= 0.
        query_ids, document_ids: int64 [B], [M], equal for equal texts; both or none. Query i is then not contrasted
            with a document that has its own id or its positive's, nor with the positive of a query of its own id; in
            the other directions likewise. Where a document is the positive in `targets` of queries with several ids,
            the smallest of these is taken.
        margin: leave out, as no negative after all, what is more similar than the positive's similarity − margin; for
            `margin_strategy` "relative", − margin · |the positive's|. Never the positive itself.
        weights: float [B], what each query counts; the mean is then Σ w · loss / Σ w. They may want a gradient.
        matryoshka_dims, matryoshka_weights: the weighted sum of the losses of these prefixes of the embeddings
            (ascending; weights 1 by default), in one sweep.
        reduction: "mean", "sum" or "none".
        all_queries: [W, D], the queries of all processes, with M a multiple of W; `targets` is then this process'
            first, whose queries are rows `targets` ... `targets` + B of them.
        all_query_ids: int64 [W]; needed with `all_queries` and ids.
        diagnostics: return `RankingDiagnostics` as well, from the same pass.

    Returns:
        The loss, 0-d ([B] for reduction "none"); float32 (float64 for float64 inputs). Gradients have the inputs'
        dtype.

    Raises:
        ValueError: shapes, devices, values or options do not fit. TypeError: dtypes are not floating or differ.

    References: Henderson et al., https://arxiv.org/abs/1705.00652; Li et al., https://arxiv.org/abs/2308.03281
    (directions); Lan et al., https://arxiv.org/abs/2503.04812 (hardness); Solatorio, https://arxiv.org/abs/2402.16829
    (margin); Kusupati et al., https://arxiv.org/abs/2205.13147 (prefixes); sentence-transformers'
    MultipleNegativesRankingLoss, https://sbert.net/docs/package_reference/sentence_transformer/losses.html
    """
    require_floating(queries=queries, documents=documents)
    if not callable(similarity):
        _require_choice("similarity", similarity, SIMILARITIES)
    _require_choice("margin_strategy", margin_strategy, MARGIN_STRATEGIES)
    _require_choice("reduction", reduction, REDUCTIONS)
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    if not isinstance(scale, Tensor):
        require_scale(scale)
        scale = torch.full((), scale, dtype=wide, device=queries.device)
    elif scale.dtype != wide:
        scale = scale.to(wide)
    offset = 0
    if isinstance(targets, int):
        offset, targets = targets, None
    elif targets is not None:
        rows.require_vector("targets", targets, len(queries), torch.int64, queries)
    row_weights = None
    if weights is not None:
        rows.require_vector("weights", weights, len(queries), None, queries)
        row_weights = weights.to(wide)
        if reduction == "mean":
            row_weights = row_weights / row_weights.sum()
    elif reduction == "sum":
        row_weights = queries.new_ones(len(queries), dtype=wide)
    owner_ids = None
    if query_ids is not None or document_ids is not None or all_query_ids is not None:
        owner_ids = _owner_ids(queries, documents, query_ids, document_ids, all_query_ids, targets, all_queries)
    dims = [] if matryoshka_dims is None else list(matryoshka_dims)
    dim_weights = [1.0] * len(dims) if matryoshka_weights is None else [float(x) for x in matryoshka_weights]
    reduce = reduction != "none"

    tensors = (queries, documents, all_queries, targets, scale, row_weights, query_ids, document_ids, owner_ids)
    gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    options = (
        similarity == "cos_sim",
        direction_mask(directions, partition_mode),
        partition_mode == "joint",
        hardness_number(hardness_mode, hardness_strength),
        float(hardness_strength),
        query_ids,
        document_ids,
        owner_ids,
        margin if margin is None else float(margin),
        margin_strategy == "relative",
        dims,
        dim_weights,
    )
    arguments = (
        queries, documents, all_queries, targets, offset, scale, row_weights if reduce else None, *options,
        reduce, gradients and reduce, diagnostics,
    )  # fmt: skip
    if callable(similarity):
        loss, facts = _plain(similarity, *arguments)
    elif observed() or not all(type(x) in (Tensor, torch.nn.Parameter, type(None)) for x in tensors):
        result = torch.ops.triton_st.mnrl_loss_forward(*arguments)
        loss, facts = result[0], result[-1]
    elif gradients:
        loss, facts = _Loss.apply(*arguments)
    else:
        loss, *_, facts = _checked_forward(*arguments)
    if not reduce and row_weights is not None:
        loss = loss * row_weights
    return (loss, RankingDiagnostics(*facts.unbind())) if diagnostics else loss


def _plain(similarity: Callable[[Tensor, Tensor], Tensor], *arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, (reduce, _, diagnostics) = arguments[:_INPUTS], arguments[_INPUTS:]
    rows.check(*inputs)
    specified: Callable[..., Any] = reference.mnrl_rows
    losses, *_none, facts = specified(*inputs, False, diagnostics, similarity)
    row_weights = inputs[6]
    if reduce:
        losses = losses.mean() if row_weights is None else (losses * row_weights).sum()
    return losses, facts.detach()


def require_scale(scale: float) -> None:
    """ValueError unless `scale` is positive and finite."""
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be a finite number > 0, got {scale}")


def direction_mask(directions: Sequence[str], partition_mode: str) -> int:
    """`directions` as the sum of their bits; ValueError where they are unknown or do not go with `partition_mode`."""
    if isinstance(directions, str) or not directions:
        raise ValueError(f"directions must be a sequence with at least one of {list(DIRECTIONS)}, got {directions!r}")
    for direction in directions:
        _require_choice("directions", direction, DIRECTIONS)
    if "query_to_doc" not in directions:
        raise ValueError(f"directions must contain 'query_to_doc', which has the positive pair; got {directions}")
    _require_choice("partition_mode", partition_mode, PARTITION_MODES)
    if partition_mode == "per_direction" and not {"query_to_query", "doc_to_doc"}.isdisjoint(directions):
        raise ValueError(
            "partition_mode='per_direction' takes directions that contain the positive pair, 'query_to_doc' and "
            f"'doc_to_query'; got {directions}; partition_mode='joint' takes them all"
        )
    return sum(DIRECTIONS[direction] for direction in set(directions))


def hardness_number(hardness_mode: str | None, hardness_strength: float) -> int:
    """`hardness_mode` as the operator's number; ValueError where it is unknown or the strength negative."""
    _require_choice("hardness_mode", hardness_mode, HARDNESS_MODES)
    if not 0 <= hardness_strength < math.inf:
        raise ValueError(f"hardness_strength must be a finite number >= 0 (non-negative), got {hardness_strength}")
    return HARDNESS_MODES[hardness_mode] if hardness_strength else 0


def _require_choice(name: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def _owner_ids(
    queries: Tensor,
    documents: Tensor,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
    all_query_ids: Tensor | None,
    targets: Tensor | None,
    all_queries: Tensor | None,
) -> Tensor:
    """Id of the query that each document is the positive of, or its own where it is none's. int64 [M]."""
    if query_ids is None or document_ids is None or (all_query_ids is None) != (all_queries is None):
        raise ValueError(
            "query_ids and document_ids go together, and all_query_ids with all_queries; got "
            + ", ".join(
                f"{name} {'None' if tensor is None else list(tensor.shape)}"
                for name, tensor in (
                    ("query_ids", query_ids), ("document_ids", document_ids),
                    ("all_queries", all_queries), ("all_query_ids", all_query_ids),
                )
            )
        )  # fmt: skip
    rows.require_vector("query_ids", query_ids, len(queries), torch.int64, queries)
    rows.require_vector("document_ids", document_ids, len(documents), torch.int64, queries)
    if all_queries is not None and all_query_ids is not None:
        rows.require_vector("all_query_ids", all_query_ids, len(all_queries), torch.int64, queries)
    if targets is not None:
        # Targets past the end are the operator's to refuse, for which it reads their values.
        index = targets.clamp(0, max(len(documents) - 1, 0))
        return document_ids.scatter_reduce(0, index, query_ids, "amin", include_self=False)
    owners = query_ids if all_query_ids is None else all_query_ids
    return torch.cat([owners, document_ids[len(owners) :]])


# --- the operator and its gradient ------------------------------------------------------------------------------------

_TENSORS = (0, 1, 2, 3, 5, 6, 12, 13, 14)
"""Which of the inputs of `mnrl_rows` are tensors, or None."""
_INPUTS = 19


def _rows(*arguments: Any) -> Any:
    return backend.kernel("mnrl_rows", arguments[0])(*arguments)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Give the loss, the losses it is the sum of (if it is), their four gradients, and diagnostics."""
    inputs, (reduce, gradients, diagnostics) = arguments[:_INPUTS], arguments[_INPUTS:]
    losses, *formed, facts = _rows(*inputs, gradients, diagnostics)
    if not reduce:
        return losses, losses.new_empty(0), *formed, facts
    row_weights = inputs[6]
    loss = _total(losses) / len(losses) if row_weights is None else _total(losses * row_weights)
    return loss, losses, *formed, facts


def _total(x: Tensor) -> Tensor:
    """Sum of a vector; on a CPU in float64, so that it does not show how many threads add it up."""
    return x.sum(dtype=torch.float64).to(x.dtype) if x.device.type == "cpu" else x.sum()


def _backward(grad: Tensor, losses: Tensor, formed: Sequence[Tensor], *inputs: Any) -> tuple[Tensor, ...]:
    """Give the gradients of queries, documents, all_queries, scale and row_weights; [0] where there is no such input.

    Args:
        grad: of the loss: [], or [B] for a loss that is no sum.
        losses: [B], of a loss that is a sum.
        formed: the four gradients for `grad` 1, of a loss that is a sum; empty where they are yet to be computed.
        inputs: of `mnrl_rows`, and whether `formed` may be overwritten.
    """
    *inputs_of_rows, owned = inputs
    queries, scale, row_weights = (inputs_of_rows[i] for i in (0, 5, 6))
    if not formed:
        if grad.dim():
            inputs_of_rows[6], factor = grad.contiguous(), None
        else:
            factor = grad
        formed, owned = _rows(*inputs_of_rows, True, False)[1:5], True
    else:
        factor = grad
    if owned and factor is not None and factor.device.type == "cpu" and factor.item() == 1:
        factor = None
    grad_q, grad_d, grad_all, grad_scale = (
        _times(gradient, factor, dtype, owned)
        for gradient, dtype in zip(formed, (queries.dtype,) * 3 + (scale.dtype,), strict=True)
    )
    grad_weights = losses.new_empty(0) if row_weights is None or grad.dim() else grad * losses
    return grad_q, grad_d, grad_all, grad_scale if scale.dim() else _total(grad_scale), grad_weights


def _times(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype, owned: bool) -> Tensor:
    """gradient · factor, multiplied in float32 and cast once; in place where it is `owned` and of that dtype."""
    if factor is None:
        return gradient.to(dtype)
    if owned and gradient.dtype == dtype:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=gradient.new_empty(gradient.shape, dtype=dtype))


def _in_place(gradients: Sequence[Tensor], *inputs: Any) -> tuple[Any, ...]:
    """Put the gradients where the forward operator's arguments are."""
    grad_q, grad_d, grad_all, grad_scale, grad_weights = gradients
    of_all = None if inputs[2] is None else grad_all
    of_weights = grad_weights if grad_weights.numel() else None  # a loss that is no sum takes no notice of weights
    return grad_q, grad_d, of_all, None, None, grad_scale, of_weights, *[None] * 15


def _save(ctx: Any, arguments: Sequence[Any], *more: Tensor) -> None:
    ctx.save_for_backward(*(arguments[i] for i in _TENSORS), *more)
    ctx.others = [x for i, x in enumerate(arguments[:_INPUTS]) if i not in _TENSORS]


def _saved(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """Give the inputs of `mnrl_rows`, and what else was saved."""
    saved = ctx.saved_tensors
    tensors, others = iter(saved), iter(ctx.others)
    inputs = [next(tensors) if i in _TENSORS else next(others) for i in range(_INPUTS)]
    return inputs, list(tensors)


def _setup(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    _loss, losses, *formed, facts = output
    ctx.mark_non_differentiable(losses, *formed, facts)
    ctx.formed = inputs[_INPUTS + 1]
    _save(ctx, inputs, losses, *(formed if ctx.formed else ()))


def _traced_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    inputs, (losses, *formed) = _saved(ctx)
    return _in_place(torch.ops.triton_st.mnrl_loss_backward(grad, losses, formed, *inputs), *inputs)


class _Loss(torch.autograd.Function):
    """The operator past the dispatcher. Its gradients are nobody else's, so they can be scaled in place."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        loss, losses, *formed, facts = _checked_forward(*arguments)
        _save(ctx, arguments)
        ctx.losses, ctx.formed = losses, formed if arguments[_INPUTS] else []
        ctx.mark_non_differentiable(facts)
        return loss, facts

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        inputs, _none = _saved(ctx)
        formed, ctx.formed = ctx.formed, []  # through a retained graph there may be another backward pass
        if torch.is_grad_enabled():  # somebody wants a graph of this: that operator refuses to be derived
            gradients = torch.ops.triton_st.mnrl_loss_backward(grad, ctx.losses, formed, *inputs)
        else:
            gradients = _backward(grad, ctx.losses, formed, *inputs, True)
        return _in_place(gradients, *inputs)


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    losses, *others = rows.fake(*arguments[:_INPUTS], *arguments[_INPUTS + 1 :])
    reduce = arguments[_INPUTS]
    return losses.new_empty(() if reduce else losses.shape), losses.new_empty(losses.shape if reduce else 0), *others


def _fake_backward(grad: Tensor, losses: Tensor, formed: Sequence[Tensor], *inputs: Any) -> tuple[Tensor, ...]:
    queries, documents, all_queries, scale, row_weights = (inputs[i] for i in (0, 1, 2, 5, 6))
    grad_all = queries.new_empty(0 if all_queries is None else all_queries.shape)
    grad_weights = losses.new_empty(0 if row_weights is None or grad.dim() else row_weights.shape)
    return (
        queries.new_empty(queries.shape),
        documents.new_empty(documents.shape),
        grad_all,
        torch.empty_like(scale),
        (grad_weights),
    )


def _refuse(ctx: Any, *gradients: Tensor) -> Any:
    raise NotImplementedError("mnrl_loss has no second derivative; triton_st.reference.mnrl_loss has all of them")


_checked_forward = define(
    f"mnrl_loss_forward({rows.ARGUMENTS}, bool reduce, bool gradients, bool diagnostics) -> (Tensor loss, "
    "Tensor losses, Tensor grad_queries, Tensor grad_documents, Tensor grad_all_queries, Tensor grad_scale, "
    "Tensor diagnostics)",
    check=rows.check,
    check_values=rows.check_values,
    fake=_fake,
    compute=_forward,
)
define(
    f"mnrl_loss_backward(Tensor grad, Tensor losses, Tensor[] formed, {rows.ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=lambda grad, losses, formed, *inputs: rows.check(*inputs),
    fake=_fake_backward,
    compute=lambda *arguments: _backward(*arguments, False),
)
torch.library.register_autograd("triton_st::mnrl_loss_forward", _traced_backward, setup_context=_setup, lib=LIBRARY)
for _name in ("mnrl_loss_backward", "mnrl_rows"):
    torch.library.register_autograd(f"triton_st::{_name}", _refuse, lib=LIBRARY)
