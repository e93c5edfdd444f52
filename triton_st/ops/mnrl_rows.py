"""The contrastive loss row by row, in all its forms: the one operator that `ops.mnrl_loss` is made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from triton_st.ops._library import define, require_device, require_dims, require_floating
from triton_st.reference.mnrl_rows import DOC_TO_QUERY, HARD_NEGATIVES, QUERY_TO_DOC

ARGUMENTS = (
    "Tensor queries, Tensor documents, Tensor? all_queries, Tensor? targets, int offset, Tensor scale, "
    "Tensor? row_weights, bool normalized, int directions, bool joint, int hardness_mode, float hardness_strength, "
    "Tensor? query_ids, Tensor? document_ids, Tensor? owner_ids, float? margin, bool relative_margin, int[] dims, "
    "float[] dim_weights"
)


def check(
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
    *flags: bool,
) -> None:
    """Raise on shapes, dtypes, devices and settings that do not fit."""
    require_floating(queries=queries, documents=documents, **({} if all_queries is None else _named(all_queries)))
    require_dims(queries, "queries", "[B, D]")
    require_dims(documents, "documents", "[M, D]")
    (b, d), (m, document_d) = queries.shape, documents.shape
    if d != document_d:
        raise ValueError(f"queries and documents must have rows of one length D, got {d} and {document_d}")
    if b == 0:
        raise ValueError("queries must have at least one row, got none")
    if targets is None:
        _check_batch(b, m, d, all_queries, offset)
    else:
        require_vector("targets", targets, b, torch.int64, queries)
        if m == 0:
            raise ValueError("documents must have at least one row, got none")
        if directions != QUERY_TO_DOC:
            raise ValueError("targets go with directions=('query_to_doc',) alone")
        if all_queries is not None or offset:
            raise ValueError("targets go without all_queries and without an offset")
        if hardness_mode == HARD_NEGATIVES:
            raise ValueError(
                "targets do not go with hardness_mode='hard_negatives': they do not say whose a negative is"
            )
    wide = torch.promote_types(queries.dtype, torch.float32)
    require_vector("scale", scale, b if scale.dim() else None, wide, queries)
    if row_weights is not None:
        require_vector("weights", row_weights, b, wide, queries)
    if not (directions & QUERY_TO_DOC and 0 < directions < 16):
        raise ValueError(f"directions must be a sum of 1, which must be there, 2, 4 and 8; got {directions}")
    if not joint and directions & ~(QUERY_TO_DOC | DOC_TO_QUERY):
        raise ValueError(f"without `joint`, directions may be 1 and 4, got {directions}")
    if hardness_mode not in range(4):
        raise ValueError(f"hardness_mode must be 0, 1, 2 or 3, got {hardness_mode}")
    if not 0 <= hardness_strength < math.inf:
        raise ValueError(f"hardness_strength must be a finite number >= 0, got {hardness_strength}")
    if margin is not None and not math.isfinite(margin):
        raise ValueError(f"margin must be a finite number, got {margin}")
    ids = {"query_ids": (query_ids, b), "document_ids": (document_ids, m), "owner_ids": (owner_ids, m)}
    if len({tensor is None for tensor, _ in ids.values()}) > 1:
        raise ValueError("query_ids, document_ids and owner_ids go together")
    for name, (tensor, length) in ids.items():
        if tensor is not None:
            require_vector(name, tensor, length, torch.int64, queries)
    if dims or dim_weights:
        _check_dims(dims, dim_weights, d)


def _named(all_queries: Tensor) -> dict[str, Tensor]:
    return {"all_queries": all_queries}


def _check_batch(b: int, m: int, d: int, all_queries: Tensor | None, offset: int) -> None:
    w = b
    if all_queries is not None:
        require_dims(all_queries, "all_queries", "[W, D]")
        w = all_queries.shape[0]
        if all_queries.shape[1] != d:
            raise ValueError(f"all_queries must have rows of length {d}, got {all_queries.shape[1]}")
    if offset < 0 or offset + b > w:
        raise ValueError(f"offset must place {b} queries among {w}, got {offset}")
    if m == 0 or m % w:
        raise ValueError(f"documents must have a multiple of {w} rows, one positive per query first; got {m}")


def _check_dims(dims: Sequence[int], dim_weights: Sequence[float], d: int) -> None:
    ascending = all(low < high for low, high in itertools.pairwise(dims))
    if not (dims and ascending and dims[0] > 0 and dims[-1] <= d):
        raise ValueError(f"matryoshka_dims must ascend within 1 ... {d}, got {list(dims)}")
    if len(dim_weights) != len(dims) or not all(map(math.isfinite, dim_weights)):
        raise ValueError(f"matryoshka_weights must be {len(dims)} finite numbers, got {list(dim_weights)}")


def require_vector(name: str, tensor: Tensor, length: int | None, dtype: torch.dtype | None, queries: Tensor) -> None:
    """`tensor` is [length] ([] for None), of `dtype` (any floating one for None), on the device of `queries`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype if dtype else not tensor.is_floating_point():
        raise TypeError(f"{name} must be {dtype or 'floating-point'}, got {tensor.dtype}")
    shape = () if length is None else (length,)
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    require_device("queries", queries, **{name: tensor})


def check_values(
    queries: Tensor,
    documents: Tensor,
    all_queries: Tensor | None,
    targets: Tensor | None,
    offset: int,
    scale: Tensor,
    row_weights: Tensor | None,
    *rest: object,
) -> None:
    """Raise on a scale that is not positive and finite, and on targets that are no rows of `documents`."""
    good = 0 < scale.item() < math.inf if scale.dim() == 0 else bool(((scale > 0) & (scale < math.inf)).all())
    if not good:
        raise ValueError(f"scale must be finite and > 0, got {scale.tolist() if scale.dim() == 0 else scale.min()}")
    if row_weights is not None and not row_weights.isfinite().all():
        raise ValueError("weights must be finite, and their sum, where a mean is wanted, not 0")
    if targets is not None:
        low, high = (bound.item() for bound in torch.aminmax(targets))
        if low < 0 or high >= len(documents):
            raise ValueError(f"targets must be rows of documents, 0 ... {len(documents) - 1}; got {low} ... {high}")


def fake(queries: Tensor, documents: Tensor, all_queries: Tensor | None, *rest: object) -> tuple[Tensor, ...]:
    """Results' shapes and dtypes."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    b = queries.shape[0]
    gradients, diagnostics = rest[-2:]

    def new(*shape: int, wanted: object = True) -> Tensor:
        return queries.new_empty(shape if wanted else 0, dtype=dtype)

    return (
        new(b),
        new(*queries.shape, wanted=gradients),
        new(*documents.shape, wanted=gradients),
        queries.new_empty(0, dtype=dtype) if all_queries is None else new(*all_queries.shape, wanted=gradients),
        new(b, wanted=gradients),
        new(4, b, wanted=diagnostics),
    )


define(
    f"mnrl_rows({ARGUMENTS}, bool gradients, bool diagnostics) -> (Tensor losses, Tensor grad_queries, "
    "Tensor grad_documents, Tensor grad_all_queries, Tensor grad_scale, Tensor diagnostics)",
    check=check,
    fake=fake,
    check_values=check_values,
)
