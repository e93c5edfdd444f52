"""In-batch contrastive loss in both directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from triton_st import util
from triton_st.losses.multiple_negatives_ranking import MultipleNegativesRankingLoss

if TYPE_CHECKING:
    from triton_st.sentence_transformer import SentenceTransformer


class MultipleNegativesSymmetricRankingLoss(MultipleNegativesRankingLoss):
    """The mean of two losses: find the positive of each anchor, and the anchor of each positive.

    It is `MultipleNegativesRankingLoss` with directions ("query_to_doc", "doc_to_query"), each with a softmax of its
    own, which is what sentence-transformers recommends to write instead.

    Args:
        model, scale, similarity_fct, gather_across_devices: as `MultipleNegativesRankingLoss`.
        ours: `margin`, `margin_strategy`, `false_negatives`, `diagnostics`, as there.

    Reference: https://sbert.net/docs/package_reference/sentence_transformer/losses.html
    """

    def __init__(
        self,
        model: SentenceTransformer | nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.cos_sim,
        gather_across_devices: bool = False,
        **ours: Any,
    ) -> None:
        directions = ("query_to_doc", "doc_to_query")
        super().__init__(
            model, scale, similarity_fct, gather_across_devices, directions, partition_mode="per_direction", **ours
        )
