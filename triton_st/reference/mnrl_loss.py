"""Multiple negatives ranking loss."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_st.reference.mnrl_rows import QUERY_TO_DOC, mnrl_rows


def mnrl_loss(queries: Tensor, documents: Tensor, scale: float = 20.0) -> Tensor:
    """Mean cross-entropy of scale · cosine, document i being the positive of query i. [B, D], [M, D] -> scalar."""
    factor = torch.full((), scale, dtype=torch.float64, device=queries.device)
    losses, *_ = mnrl_rows(
        queries, documents, None, None, 0, factor, None, True, QUERY_TO_DOC, True, 0, 0.0, None, None, None,
        None, False, [], [], gradients=False, diagnostics=False,
    )  # fmt: skip
    return losses.mean()
